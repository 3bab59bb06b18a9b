"""What a compiled program has to do, counted in its text: operations of its products, and bytes moved.

XLA's own counts (`Compiled.cost_analysis()`) do not serve: there are none for GPUs that are not there, and of
TPUs "bytes accessed" takes what stays in VMEM for memory traffic: for a layer of a decode step of Llama-3-8B
it says five times what its weights have, and this 1.02 times. Here only arrays that live in the chip's memory
count. HLO's text says where each lives: "S(1)" in a layout is VMEM, nothing is the memory.
"""

import math
import re

from pallas_kernels.targets.compiled import CompiledText, Instruction, bits_of

KERNEL_TARGETS = ("tpu_custom_call", "mosaic_gpu_v2")
"""What programs call kernels of Pallas by: these read what they choose to of their operands."""
_GROUPED = re.compile(r'op_name="[^"]*grouped_matmul')
_NOT_CALLS = ("AllocateBuffer", "ConcatBitcast", "Sharding")
"""Custom calls that move nothing."""
_NO_WORK = ("parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "opt-barrier")
_CONTROL = ("while", "conditional", "call", "after-all", "partition-id", "replica-id")
_LEAF = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_NUMBER = re.compile(r"parameter\((\d+)\)")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_LOOKS_ALIKE = ("bitcast", "bitcast-convert", "reshape", "convert")
"""What a slice can be taken of as well as of their operand, inside a fusion."""
_READS_PART = ("slice", "dynamic-slice", "gather")
_WRITES_PART = {"dynamic-update-slice": 1, "scatter": 2}
"""Where among the operands the part is that is written; the rest stays as it is, where it is."""


def memory_bytes(text: CompiledText) -> int:
    """Bytes that the program reads from and writes to the memory of one chip.

    Kernels of Pallas are left out, as they read what they choose to, and a loop's body is counted once.
    """
    return _Counter(text).total()


def product_flops(text: CompiledText) -> int:
    """Operations of the program's `dot`s on one chip, a multiplication and an addition counted as two.

    A loop's body is counted once. Programs for TPU have convolutions instead, which XLA counts itself.
    """
    return sum(_dot_flops(text, one) for one in text.instructions if one.opcode == "dot")


def grouped_kernels(text: CompiledText) -> int:
    """How many products with experts' weights are kernels, `pallas_kernels.grouped_matmul`'s or XLA's own.

    XLA for TPU makes one of a `ragged_dot`; elsewhere that becomes a dot with the weights of all experts.
    """
    calls = [one for target in KERNEL_TARGETS for one in text.custom_calls().get(target, [])]
    return sum("ragged-dot-none" in one.name or _GROUPED.search(one.line) is not None for one in calls)


def ragged_flops(text: CompiledText) -> int:
    """What XLA itself counts of its kernels for `ragged_dot`: all rows there is room for, used or not."""
    total = 0
    for call in text.custom_calls().get("tpu_custom_call", []):
        if "ragged-dot-none" in call.name:
            [[_, inputs, _]], [rows] = _shapes(text.by_name[call.operands[-1]].result), _shapes(call.result)
            total += 2 * math.prod(rows) * inputs
    return total


def _dot_flops(text: CompiledText, dot: Instruction) -> int:
    left, contracted = text.by_name[dot.operands[0]], _CONTRACTED.search(dot.line)
    [sizes], [result] = _shapes(left.result), _shapes(dot.result)
    axes = map(int, filter(None, contracted[1].split(","))) if contracted else ()
    return 2 * math.prod(result) * math.prod(sizes[axis] for axis in axes)


def _shapes(result: str) -> list[tuple[int, ...]]:
    return [tuple(map(int, filter(None, dims.split(",")))) for _, dims, _ in _LEAF.findall(result)]


class _Counter:
    """Of the bytes that a program's instructions move."""

    def __init__(self, text: CompiledText) -> None:
        self._text = text

    def total(self) -> int:
        """Of all instructions that run by themselves."""
        text = self._text
        return sum(self._moved(one) for one in text.instructions if one.computation not in text.fused)

    def _moved(self, one: Instruction) -> int:
        opcode = one.opcode
        if opcode in (*_NO_WORK, *_CONTROL) or opcode.endswith(("-done", "-update")):
            return 0
        if one.target in (*KERNEL_TARGETS, *_NOT_CALLS):
            return 0
        if opcode == "slice-start":  # its result is (what it slices, the slice, a flag)
            part = _leaves(one.result)[1]
            return part[0] + _in_memory([part])
        if opcode in ("copy-start", "all-gather-start", "collective-permute-start"):
            return _in_memory(_leaves(one.result))  # what is read is part of the result
        if opcode in _READS_PART:
            part = _leaves(one.result)
            read = sum(size for size, _ in part) if self._operand(one.operands[0]) else 0
            return read + _in_memory(part)
        if opcode in _WRITES_PART:
            return 2 * self._operand(one.operands[_WRITES_PART[opcode]])
        if opcode == "fusion":
            return self._fusion(one)
        return sum(map(self._operand, one.operands)) + _in_memory(_leaves(one.result))

    def _fusion(self, one: Instruction) -> int:
        inside = self._text.computations.get(one.calls or "", [])
        read = sum(self._fused_read(inside, index, name) for index, name in enumerate(one.operands))
        roots = [part for part in inside if part.line.lstrip().startswith("ROOT")]
        if roots and roots[0].opcode in _WRITES_PART and _in_memory(_leaves(one.result)):
            updates = roots[0].operands[_WRITES_PART[roots[0].opcode]]
            return read + sum(_in_memory(_leaves(part.result)) for part in inside if part.name == updates)
        return read + _in_memory(_leaves(one.result))

    def _fused_read(self, inside: list[Instruction], index: int, name: str) -> int:
        """What a fusion reads of an operand: only parts, where nothing else is done with it than slicing."""
        whole = self._operand(name)
        if not whole:
            return 0
        own = next(
            (p for p in inside if (number := _NUMBER.search(p.line)) and int(number[1]) == index), None
        )
        users = [] if own is None else _users(inside, own)
        if users and all(user.opcode in _READS_PART for user in users):
            return min(whole, sum(size for user in users for size, _ in _leaves(user.result)))
        return 0 if users and all(user.opcode in _WRITES_PART for user in users) else whole

    def _operand(self, name: str) -> int:
        """Bytes of an operand that live in the chip's memory."""
        found = self._text.by_name.get(name)
        return 0 if found is None or found.opcode == "constant" else _in_memory(_leaves(found.result))


def _users(inside: list[Instruction], source: Instruction) -> list[Instruction]:
    """What takes an instruction's result as its first operand, directly or by another type or shape.

    Empty where something takes it as another operand, and so reads all of it.
    """
    found = []
    for part in inside:
        if source.name in part.operands[1:]:
            return []
        if source.name in part.operands[:1]:
            users = _users(inside, part) if part.opcode in _LOOKS_ALIKE else [part]
            if not users:
                return []
            found += users
    return found


def _in_memory(leaves: list[tuple[int, int]]) -> int:
    return sum(size for size, space in leaves if space == 0)


def _leaves(result: str) -> list[tuple[int, int]]:
    """Bytes and memory space of each array in a type as it is printed; 0 is the chip's memory."""
    found = []
    for dtype, dims, layout in _LEAF.findall(result):
        space = _SPACE.search(layout)
        size = math.prod(map(int, filter(None, dims.split(",")))) * bits_of(dtype) // 8
        found.append((size, int(space[1]) if space else 0))
    return found
