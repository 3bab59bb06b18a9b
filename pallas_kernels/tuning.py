"""Block sizes that were measured to be fast, and the search for them.

`<op>/tuning.json` holds, for each backend and chip, sets of blocks and what they are for:
`{"tpu": {"TPU v5 lite": [{"key": {"phase": "decode", "head_dim": 128, ...}, "blocks": {"pages": 8, ...},
"measured": {...}}]}}`. A set is taken only where all of its key is the same, and only if the backend knows
each of its names and values. So the file can make a kernel slow, and not wrong.
"""

import itertools
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

Blocks = dict[str, int]
Key = Mapping[str, str | int]
FIELDS = {"key", "blocks", "measured"}


@dataclass(frozen=True, eq=False)
class Tunable:
    """How a backend's blocks are searched; a backend has one as its attribute `tunable`.

    Equal to itself alone, so that a backend can be hashed: programs are cached by it.

    Attributes:
        values: for each phase the numbers that can be chosen, and which values each may take.
        key: what of a problem decides which blocks are good, such as dtypes, heads, head_dim and page_size.
        bind: the backend's function with blocks for one phase.
        fits: whether blocks are worth compiling for a problem; what does not compile is left out anyway.
    """

    values: Mapping[str, Mapping[str, Collection[int]]]
    key: Callable[[Any], Key]
    bind: Callable[[str, Blocks], Callable[..., Any]]
    fits: Callable[[Any, str, Blocks], bool] = lambda problem, phase, blocks: True

    def candidates(self, problem: Any, phase: str) -> Iterator[Blocks]:
        """All blocks of the phase that fit."""
        names = self.values.get(phase, {})
        for values in itertools.product(*names.values()) if names else ():
            blocks = dict(zip(names, values, strict=True))
            if self.fits(problem, phase, blocks):
                yield blocks


def lookup(
    op: str, backend: str, chip: str, key: Key, allowed: Mapping[str, Collection[int]]
) -> Blocks | None:
    """The blocks that were found best for exactly this; None where nothing was measured.

    Args:
        chip: as in `jax.Device.device_kind`.
        allowed: the numbers that the backend takes, and the values of each that cannot make its result wrong.

    Raises:
        ValueError: the file is not in its form, or has a name or value that is not allowed; the message says
            which.
    """
    for entry in _read(op).get(backend, {}).get(chip, []):
        if entry["key"] == dict(key):
            _check_blocks(op, backend, chip, entry["blocks"], allowed)
            return dict(entry["blocks"])
    return None


def default_path(op: str) -> Path:
    """Where the library keeps an op's file."""
    return Path(str(resources.files("pallas_kernels"))) / op / "tuning.json"


def save(
    path: Path, backend: str, chip: str, key: Key, blocks: Blocks, measured: Mapping[str, str | float]
) -> None:
    """Puts blocks into a file, in place of those that it had for the same key.

    Args:
        measured: date, versions and gain, for people.

    Raises:
        ValueError: the file is there and not in its form.
    """
    content = _parse(path.read_text(), str(path)) if path.exists() else {}
    entries = content.setdefault(backend, {}).setdefault(chip, [])
    entries[:] = [entry for entry in entries if entry["key"] != dict(key)]
    entries.append({"key": dict(key), "blocks": blocks, "measured": dict(measured)})
    entries.sort(key=lambda entry: json.dumps(entry["key"]))
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    _read.cache_clear()


@cache
def _read(op: str) -> dict[str, dict[str, list[dict[str, Any]]]]:
    file = resources.files("pallas_kernels").joinpath(op, "tuning.json")
    return _parse(file.read_text(), f"{op}/tuning.json") if file.is_file() else {}


def _parse(text: str, name: str) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The content of a file, if all of it has the form that the module's docstring shows."""
    content = json.loads(text)
    for backend, chips in _mapping(content, name).items():
        for chip, entries in _mapping(chips, f"{name}: {backend}").items():
            where = f"{name}: {backend}: {chip}"
            if not isinstance(entries, list):
                raise ValueError(f"{where}: must be a list")
            for entry in entries:
                if set(_mapping(entry, where)) != FIELDS:
                    raise ValueError(
                        f"{where}: an entry has {', '.join(sorted(FIELDS))}, not {sorted(entry)}"
                    )
                for part, kinds in (("key", (str, int)), ("blocks", int)):
                    for field, value in _mapping(entry[part], f"{where}: {part}").items():
                        if not isinstance(value, kinds) or isinstance(value, bool):
                            raise ValueError(f"{where}: {part}: {field}={value!r} is of the wrong type")
    return content


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: must be an object")
    return value


def _check_blocks(
    op: str, backend: str, chip: str, blocks: Blocks, allowed: Mapping[str, Collection[int]]
) -> None:
    where = f"{op}/tuning.json: {backend}: {chip}"
    if set(blocks) != set(allowed):
        raise ValueError(f"{where}: blocks are {', '.join(allowed)}; found are {', '.join(blocks)}")
    for name, value in blocks.items():
        if value not in allowed[name]:
            known = ", ".join(map(str, allowed[name]))
            raise ValueError(f"{where}: {name}={value}: may be {known}")
