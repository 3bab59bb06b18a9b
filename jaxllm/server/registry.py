"""Names for classes that are chosen by a flag, and files that bring more of them."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Makers of parsers by name.

    Args:
        option: the option that chooses one, for errors.
        makers: the built-in ones.
    """

    def __init__(self, option: str, makers: dict[str, T]) -> None:
        self._option, self._makers = option, makers

    @property
    def names(self) -> tuple[str, ...]:
        """All names, sorted."""
        return tuple(sorted(self._makers))

    def register(self, name: str, maker: T) -> None:
        """Adds one.

        Raises:
            ValueError: the name is empty or taken.
            TypeError: it cannot be called.
        """
        if not name or name in self._makers:
            raise ValueError(f"{self._option}: {name!r} is {'taken' if name else 'empty'}; take another name")
        if not isinstance(maker, Callable):
            raise TypeError(f"{self._option}: {maker!r} is neither a class nor a function")
        self._makers[name] = maker

    def unregister(self, name: str) -> None:
        """Takes one away.

        Raises:
            ValueError: there is none of this name.
        """
        self.get(name)
        del self._makers[name]

    def get(self, name: str) -> T:
        """Finds one.

        Raises:
            ValueError: there is none of this name; the message lists those that there are.
        """
        if name not in self._makers:
            raise ValueError(f"{self._option}={name!r}: must be one of {', '.join(self.names)}")
        return self._makers[name]


def load_plugin(option: str, path: Path) -> None:
    """Runs a Python file, which registers what it brings.

    Raises:
        ValueError: there is no such file, or it fails.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{option}={str(path)!r}: must be a Python file")
    try:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    except Exception as error:  # somebody else's program: it may fail in any way
        raise ValueError(f"{option}={str(path)!r}: {type(error).__name__}: {error}") from error
