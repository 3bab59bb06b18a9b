"""What the text of a compiled program says: what it copies, gathers and sends, and what its kernels use."""

import math
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
_COPIES = ("copy", "copy-start", "transpose", "convert", "bitcast-convert")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?)\s([a-z][\w\-]*)\(([^)]*)\)")
_CALLS = re.compile(r"calls=%?([\w.\-]+)")
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_LISTED_GROUPS = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}")
_COUNTED_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_VMEM = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"')


@dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
        result: its type as it is printed, a tuple's in parentheses.
        nbytes: of the largest array in the result, without the padding of its tiles.
        operands: names of other instructions.
        computation: the function that it is in.
    """

    name: str
    opcode: str
    result: str
    nbytes: int
    operands: tuple[str, ...]
    computation: str
    line: str

    @property
    def calls(self) -> str | None:
        """The computation that a fusion stands for."""
        match = _CALLS.search(self.line) if self.opcode == "fusion" else None
        return match[1] if match else None

    @property
    def device_groups(self) -> list[list[int]]:
        """Of a collective the devices that speak with each other, by their numbers; empty: all do."""
        if listed := _LISTED_GROUPS.search(self.line):
            return [_integers(one) for one in re.findall(r"\{([\d,]+)\}", listed[1])]
        if counted := _COUNTED_GROUPS.search(self.line):
            groups, sizes, order = (_integers(part) if part else None for part in counted.groups())
            assert groups is not None
            assert sizes is not None
            devices = np.arange(math.prod(sizes)).reshape(sizes).transpose(order or range(len(sizes)))
            return devices.reshape(groups).tolist()
        return []

    @property
    def target(self) -> str | None:
        """What a custom call calls."""
        match = _TARGET.search(self.line) if self.opcode == "custom-call" else None
        return match[1] if match else None


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind: how many, and bytes of their results on each device."""

    count: int
    nbytes: int


@dataclass(frozen=True)
class CompiledText:
    """The text of a compiled program (`jax.stages.Compiled.as_text()`), instruction by instruction."""

    instructions: tuple[Instruction, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads the text; lines that are no instructions are left out."""
        computation, found = "", []
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                computation = header[1]
            elif match := _INSTRUCTION.match(line):
                name, result, opcode, operands = match.groups()
                names = tuple(re.findall(r"%([\w.\-]+)", operands))
                size = array_bytes(result)
                found.append(Instruction(name, opcode, result, size, names, computation, line))
        return cls(tuple(found))

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        """All instructions."""
        return {one.name: one for one in self.instructions}

    @cached_property
    def fused(self) -> set[str]:
        """Computations inside fusions: of what they compute only the root's result is ever in memory."""
        return {one.calls for one in self.instructions if one.calls}

    @cached_property
    def computations(self) -> dict[str, list[Instruction]]:
        """The instructions of each function."""
        found: dict[str, list[Instruction]] = defaultdict(list)
        for one in self.instructions:
            found[one.computation].append(one)
        return dict(found)

    def copies(self, at_least: int) -> list[Instruction]:
        """Instructions that write so many bytes to memory again, in the same order or type or another.

        A copy that is computed inside a fusion on the way to something else is none of them.
        """
        return [
            one
            for one in self.instructions
            if one.nbytes >= at_least
            and one.computation not in self.fused
            and self._moves_only(one)
            and "S(1)" not in one.result.split("}")[0]  # to a TPU's VMEM, ahead of its use
        ]

    def gathers(self, of_at_least: int = 0) -> list[Instruction]:
        """Gathers from arrays of so many bytes, wherever they are."""
        return [
            one
            for one in self.instructions
            if one.opcode == "gather"
            and one.operands[0] in self.by_name
            and self.by_name[one.operands[0]].nbytes >= of_at_least
        ]

    def collectives(self, wanted: Callable[[Instruction], bool] = lambda _: True) -> dict[str, Traffic]:
        """What is sent between devices, by kind; a loop's once.

        Args:
            wanted: which collectives count; by default all.
        """
        found: dict[str, list[int]] = defaultdict(list)
        for one in self.instructions:
            kind = one.opcode.removesuffix("-start")
            if kind in COLLECTIVES and wanted(one):
                found[kind].append(one.nbytes)
        return {kind: Traffic(len(sizes), sum(sizes)) for kind, sizes in sorted(found.items())}

    def custom_calls(self) -> dict[str, list[Instruction]]:
        """Calls of kernels and of the compiler's own code, by target."""
        found: dict[str, list[Instruction]] = defaultdict(list)
        for one in self.instructions:
            if one.target is not None:
                found[one.target].append(one)
        return dict(found)

    def vmem(self) -> int | None:
        """The most VMEM that one of the program's TPU kernels uses; None where it has none."""
        kernels = self.custom_calls().get("tpu_custom_call", [])
        return max((int(size) for one in kernels for size in _VMEM.findall(one.line)), default=None)

    def _moves_only(self, one: Instruction) -> bool:
        """Whether it computes nothing: a copy, or a fusion of such."""
        if one.calls is None:
            return one.opcode in _COPIES
        inside = self.computations[one.calls]
        return any(map(self._moves_only, inside)) and all(
            self._moves_only(part) or part.opcode in ("parameter", "bitcast", "reshape") for part in inside
        )


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def array_bytes(result: str) -> int:
    """Bytes of the largest array in a type as it is printed: "bf16[16,128]{1,0}" has 4,096."""
    sizes = [
        math.prod(map(int, filter(None, dims.split(",")))) * bits_of(dtype) // 8
        for dtype, dims in _ARRAY.findall(result)
    ]
    return max(sizes, default=0)


def bits_of(dtype: str) -> int:
    """Of an element: 16 for "bf16", 8 for "f8e4m3fn" and "pred"."""
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 8
