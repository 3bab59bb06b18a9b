"""Custom logits processors: pure functions that a caller registers by name and a request selects.

    @register_logits_processor("boost", parameters={"token": None, "amount": 1.0})
    def boost(logits, token_counts, params):
        hit = jnp.arange(logits.shape[1]) == params["token"][:, None]
        return jnp.where(hit, logits + params["amount"][:, None], logits)

    SamplingParams(logits_processors=["boost"], extra_args={"boost": {"token": 7}})

They are traced into the sampler's program, so they have to be registered before the engine is made. A step
in which no request selects one skips it; where one does, the function sees all rows of the step and its
result is used for the rows that selected it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Array, Float, Int

from jaxllm.sampling.params import SamplingParams

ProcessorFunction = Callable[
    [Float[Array, "seqs vocab"], Int[Array, "seqs vocab"], Mapping[str, Float[Array, "seqs"]]],
    Float[Array, "seqs vocab"],
]
"""(logits, how often the output so far has each token, each parameter's value in each row) -> logits"""

MAX_PROCESSORS = 32
"""A row's selection is one 32-bit word."""


@dataclass(frozen=True)
class LogitsProcessor:
    """A function under its name, with its parameters' defaults; None where a request must give the value."""

    name: str
    function: ProcessorFunction
    parameters: Mapping[str, float | None] = field(default_factory=dict, hash=False)


_REGISTRY: dict[str, LogitsProcessor] = {}


def register_logits_processor(
    name: str, *, parameters: Mapping[str, float | None] | None = None
) -> Callable[[ProcessorFunction], ProcessorFunction]:
    """Registers the function that it decorates, and returns it unchanged.

    Args:
        name: what requests select it by.
        parameters: scalars that a request may set in `extra_args[name]`, with their defaults; None: required.

    Raises:
        ValueError: the name is taken, or there are 32 processors already.
    """

    def register(function: ProcessorFunction) -> ProcessorFunction:
        if name in _REGISTRY:
            raise ValueError(f"logits processor {name!r} is already registered: choose another name")
        if len(_REGISTRY) == MAX_PROCESSORS:
            raise ValueError(f"logits processor {name!r}: at most {MAX_PROCESSORS} can be registered")
        _REGISTRY[name] = LogitsProcessor(name, function, dict(parameters or {}))
        return function

    return register


def unregister_logits_processor(name: str) -> None:
    """Removes a processor; engines that were made with it keep it.

    Raises:
        KeyError: nothing is registered under the name.
    """
    if name not in _REGISTRY:
        raise KeyError(f"no logits processor {name!r} is registered; there are {sorted(_REGISTRY)}")
    del _REGISTRY[name]


def registered_logits_processors() -> tuple[LogitsProcessor, ...]:
    """All processors in the order of their registration, which is the order they are applied in."""
    return tuple(_REGISTRY.values())


def select_processors(
    processors: tuple[LogitsProcessor, ...], params: SamplingParams
) -> tuple[np.uint32, np.ndarray]:
    """Reads a request's selection: a bit for each processor, and the values of all their parameters.

    Raises:
        ValueError: an unknown processor or parameter, or a required parameter that is missing.
    """
    known = {processor.name for processor in processors}
    for name in params.logits_processors:
        if name not in known:
            raise ValueError(
                f"logits_processors={name!r}: not registered when the engine was made; it has {sorted(known)}"
            )
    bits, values = 0, []
    for index, processor in enumerate(processors):
        chosen = processor.name in params.logits_processors
        bits |= int(chosen) << index
        given = (params.extra_args or {}).get(processor.name, {})
        values += _parameter_values(processor, given) if chosen else [0.0] * len(processor.parameters)
    return np.uint32(bits), np.array(values, np.float32)


def _parameter_values(processor: LogitsProcessor, given: Mapping[str, float]) -> list[float]:
    where = f"extra_args[{processor.name!r}]"
    for name in given:
        if name not in processor.parameters:
            raise ValueError(f"{where} has {name!r}: the processor takes {sorted(processor.parameters)}")
    values = []
    for name, default in processor.parameters.items():
        value = given.get(name, default)
        if value is None:
            raise ValueError(f"{where} lacks {name!r}, which the processor {processor.name!r} requires")
        values.append(value)
    return values
