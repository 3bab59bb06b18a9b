"""The parser of a command line, whose complaints are one line and not the whole usage."""

import argparse
import os
import sys
from typing import Any, NoReturn

from jaxllm.wording import did_you_mean


class Parser(argparse.ArgumentParser):
    """argparse's own, but for what it says of a line that is wrong: usage alone takes 60 lines here."""

    def error(self, message: str) -> NoReturn:
        """Ends the program, which was called wrongly."""
        print(f"{self.prog}: {message}\nsee {self.prog} --help", file=sys.stderr)
        sys.exit(2)

    def parse_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Any = None, namespace: Any = None
    ) -> Any:
        """As argparse's; for a flag that there is not it proposes one."""
        return self._without_unknown(*self.parse_known_args(args, namespace))

    def parse_intermixed_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Any = None, namespace: Any = None
    ) -> Any:
        """As argparse's; for a flag that there is not it proposes one."""
        return self._without_unknown(*self.parse_known_intermixed_args(args, namespace))

    def explain(self, error: OSError, arguments: argparse.Namespace) -> str:
        """What the system says of a file, and the argument that names it, if one does."""
        if error.filename is None or error.strerror is None:
            return str(error)
        file = os.fspath(error.filename)
        for action in self._actions:
            if str(getattr(arguments, action.dest, None)) == file:
                name = "/".join(action.option_strings) or action.metavar
                return f"{name}: {file}: {error.strerror}"
        return f"{file}: {error.strerror}"

    def _without_unknown(self, arguments: argparse.Namespace, unknown: list[str]) -> argparse.Namespace:
        if unknown:
            flags = [word.split("=")[0] for word in unknown if word.startswith("-")]
            known = [name for a in self._actions if a.help != argparse.SUPPRESS for name in a.option_strings]
            hints = [did_you_mean(flag, known) for flag in flags]
            self.error(f"unrecognized arguments: {' '.join(unknown)}{''.join(hints)}")
        return arguments
