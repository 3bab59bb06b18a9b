"""The flags that commands share: the engine's options, and what a request asks of the sampler."""

import argparse
import dataclasses
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, get_type_hints

from jaxllm.cli.constraint import add_constraint_flags, constraint_options
from jaxllm.cli.flags import Fields, add_flags, flag_name, given
from jaxllm.config import EngineConfig, ModelConfig, option_fields
from jaxllm.engine.vllm_options import RENAMED
from jaxllm.sampling.params import SamplingParams

if TYPE_CHECKING:
    from jaxllm.engine.engine import Engine

DECIDED_BY_COMMANDS = frozenset({"output_kind", "detokenize", "structured_outputs"})
"""Sampling parameters without a flag of their name: a command shows text, and streams it where it can; what
an output is held to has a flag for each way to say it."""


def add_engine_flags(parser: argparse.ArgumentParser, *, model_may_lack: bool = False) -> None:
    """Adds MODEL, and a flag for every option of the engine, under vLLM's name as well where it has another.

    Args:
        model_may_lack: MODEL is None where it is not given.
    """
    model = next(f for f in dataclasses.fields(ModelConfig) if f.name == "model")
    nargs = "?" if model_may_lack else None
    parser.add_argument("model", metavar="MODEL", nargs=nargs, help=model.metadata["help"])
    for name, part in get_type_hints(EngineConfig).items():
        group = parser.add_argument_group(f"{name} options", part.__doc__)
        add_flags(group, part, _with_flags(part), aliases=_VLLM_NAMES)


def add_sampling_flags(
    parser: argparse.ArgumentParser, *, without: Collection[str] = (), with_seed: bool = False
) -> None:
    """Adds a flag for every sampling parameter, but for those named in `without`, and for constraints.

    An option of the engine that has the same name (`seed`) shares its flag.

    Args:
        with_seed: the command has no flags of the engine, and so none to share.
    """
    without = {*without} if with_seed else {*without, *(f.name for _, f in option_fields())}
    group = parser.add_argument_group(
        "sampling parameters", "Where the model brings defaults of its own, those hold."
    )
    add_flags(group, SamplingParams, [f for f in _sampling_fields() if f.name not in without])
    add_constraint_flags(parser)


def engine_options_given(arguments: argparse.Namespace) -> list[str]:
    """The flags of the engine that were given, but for those that requests have, too."""
    shared = {f.name for f in _sampling_fields()}
    return [flag_name(name) for name in _engine_options(arguments) if name not in shared]


def _engine_options(arguments: argparse.Namespace) -> dict[str, Any]:
    options = {}
    for part in get_type_hints(EngineConfig).values():
        options |= given(arguments, _with_flags(part))
    return options


def engine_options(arguments: argparse.Namespace, *, several_hosts: bool = False) -> dict[str, Any]:
    """The engine's options that were given; a bad one is an error of usage, before anything is loaded.

    Args:
        several_hosts: the command calls `follow_if_told`. Host 0 would wait in vain for others that do not.
    """
    options = _engine_options(arguments)
    try:
        hosts = EngineConfig.create(arguments.model, **options).parallel.num_hosts
        if hosts != 1 and not several_hosts:
            raise ValueError(
                f"num_hosts={hosts}: this command runs on one host; on several run "
                "`jaxllm serve`, `jaxllm generate` and `jaxllm bench throughput`"
            )
    except (TypeError, ValueError) as error:
        arguments.usage_error(str(error))
    return options


def sampling_options(arguments: argparse.Namespace, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling parameters that were given, over a command's own; a bad one is an error of usage."""
    options = {**defaults, **given(arguments, _sampling_fields()), **constraint_options(arguments)}
    try:
        SamplingParams(**options)
    except (TypeError, ValueError) as error:
        arguments.usage_error(str(error))
    return options


def request_params(engine: "Engine", options: Mapping[str, Any]) -> SamplingParams:
    """The model's own sampling parameters, with `options` in place of some."""
    defaults = engine.make_input([0]).params  # of any prompt that brings none of its own
    return dataclasses.replace(defaults, **options)


_VLLM_NAMES = {
    ours: [theirs for theirs, name in RENAMED.items() if name == ours] for ours in RENAMED.values()
}


def _with_flags(part: type) -> Fields:
    return [f for f in dataclasses.fields(part) if f.metadata["flag"]]


def _sampling_fields() -> Fields:
    return [f for f in dataclasses.fields(SamplingParams) if f.name not in DECIDED_BY_COMMANDS]
