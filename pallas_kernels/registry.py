"""Backends of an op by name, and the choice among them: the first in an order that serves the problem."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

logger = logging.getLogger(__name__)


class Problem(Protocol):
    """What is static about a call of an op; each op has a class of its own."""

    @property
    def platform(self) -> str:
        """As in `jax.Device.platform`: "cpu", "gpu" or "tpu"."""
        ...


class Backend(Protocol):
    """A way to compute an op, made of a name and a function at the least."""

    def __init__(self, name: str, function: Any, /) -> None: ...

    @property
    def name(self) -> str:
        """What it is chosen by."""
        ...

    @property
    def require(self) -> Callable[[Any], None]:
        """Raises NotImplementedError, with the reason, for a problem that the backend does not serve."""
        ...

    @property
    def interpreted(self) -> Callable[..., Any] | None:
        """The same kernel on the CPU, where the function needs an accelerator."""
        ...


def function_of(backend: Any) -> Callable[..., Any]:
    """What a backend computes with: attention's `attend`, the products' `multiply`."""
    return backend.attend if hasattr(backend, "attend") else backend.multiply


def serves_all(problem: Problem) -> None:
    """The `require` of a backend that refuses nothing."""


def do_nothing() -> None:
    """The `prepare` of a backend that is ready as it is."""


BackendT = TypeVar("BackendT", bound=Backend)


@dataclass(frozen=True)
class Choice(Generic[BackendT]):
    """The backend that was chosen, and why those before it in the order were not."""

    backend: BackendT
    passed_over: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        reasons = "; ".join(f"not {name}: {reason}" for name, reason in self.passed_over)
        return f"{self.backend.name} ({reasons})" if reasons else self.backend.name


@dataclass
class Registry(Generic[BackendT]):
    """The backends of one op.

    Attributes:
        op: the op's name, for messages.
        argument: the argument that names a backend, for messages.
        order: for each platform the names that "auto" tries, best first.
        backend: the class of its backends.
    """

    op: str
    argument: str
    order: Mapping[str, tuple[str, ...]]
    backend: type[BackendT]
    _backends: dict[str, BackendT] = field(default_factory=dict)
    _logged: set[str] = field(default_factory=set)

    def register(self, backend: BackendT) -> BackendT:
        """Makes the backend known by its name, and returns it.

        Raises:
            ValueError: the name is taken, or is "auto".
        """
        if backend.name == "auto" or backend.name in self._backends:
            raise ValueError(f"backend {backend.name!r} exists already; take another name")
        self._backends[backend.name] = backend
        return backend

    def names(self) -> list[str]:
        """The registered names."""
        return sorted(self._backends)

    def get(self, name: str) -> BackendT:
        """The backend of that name.

        Raises:
            ValueError: there is none; the message lists those there are.
        """
        if name not in self._backends:
            known = ", ".join(["auto", *self.names()])
            raise ValueError(f"{self.argument}={name!r}: there is no such backend; there are {known}")
        return self._backends[name]

    def as_backend(self, kernel: str | BackendT | Callable[..., Any]) -> BackendT:
        """The backend of that name; a function becomes one under its own name."""
        if isinstance(kernel, self.backend):
            return kernel
        if isinstance(kernel, str):
            return self.get(kernel)
        return self.backend(getattr(kernel, "__name__", type(kernel).__name__), kernel)

    def choose(
        self,
        kernel: str | BackendT | Callable[..., Any],
        problems: Sequence[Problem],
        among: Sequence[str] | None = None,
    ) -> Choice[BackendT]:
        """That backend, or for "auto" the first in the platform's order that serves all problems.

        What "auto" chose is logged, once for each choice.

        Args:
            kernel: a registered name, "auto", a backend, or a function.
            among: the names that "auto" may take; None: all.

        Raises:
            ValueError: there is no such backend, or no order for the platform.
            NotImplementedError: the one that was asked for does not serve a problem, or none does.
        """
        if kernel != "auto":
            backend = self.as_backend(kernel)
            for problem in problems:
                backend.require(problem)
            return Choice(backend)
        platform = problems[0].platform
        if platform not in self.order:
            known = ", ".join(self.order)
            raise ValueError(f"{self.op}: no backends for {platform!r}; there are for {known}")
        passed_over: list[tuple[str, str]] = []
        for candidate in self.order[platform]:
            if among is not None and candidate not in among:
                continue
            backend = self.get(candidate)
            try:
                for problem in problems:
                    backend.require(problem)
            except NotImplementedError as error:
                passed_over.append((candidate, str(error)))
                continue
            choice = Choice(backend, tuple(passed_over))
            self._log(f"{self.op} on {platform}: {choice}")
            return choice
        reasons = "; ".join(f"{candidate}: {reason}" for candidate, reason in passed_over)
        raise NotImplementedError(f"{self.op}: no backend serves this: {reasons}")

    def _log(self, message: str) -> None:
        if message not in self._logged:
            self._logged.add(message)
            logger.info("%s", message)
