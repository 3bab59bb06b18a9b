"""What is counted in the text of a compiled program."""

import pytest

from pallas_kernels.targets.compiled import CompiledText
from pallas_kernels.targets.work import grouped_kernels, memory_bytes, product_flops, ragged_flops

HEAD = "ENTRY %main (a: bf16[64,128]) -> bf16[64,64] {\n"
ARGUMENTS = """\
  %a = bf16[64,128]{1,0} parameter(0)
  %b = bf16[128,64]{1,0} parameter(1)
  %i = s32[4]{0} parameter(2)
"""
SIZE_A, SIZE_B, RESULT = 64 * 128 * 2, 128 * 64 * 2, 64 * 64 * 2
FUSED = {
    "rows": """\
%rows (p0: bf16[64,128], p1: s32[4]) -> bf16[4,128] {
  %p0 = bf16[64,128]{1,0} parameter(0)
  %p1 = s32[4]{0} parameter(1)
  %bits = u16[64,128]{1,0} bitcast-convert(%p0)
  ROOT %taken = u16[4,128]{1,0} gather(%bits, %p1), offset_dims={1}
}
""",
    "sums": """\
%sums (q0: bf16[64,128]) -> f32[64] {
  %q0 = bf16[64,128]{1,0} parameter(0)
  ROOT %sum = f32[64]{0} reduce(%q0), dimensions={1}
}
""",
    "writes": """\
%writes (r0: bf16[64,128], r1: bf16[1,128], r2: s32[]) -> bf16[64,128] {
  %r0 = bf16[64,128]{1,0} parameter(0)
  %r1 = bf16[1,128]{1,0} parameter(1)
  %r2 = s32[] parameter(2)
  ROOT %put = bf16[64,128]{1,0} dynamic-update-slice(%r0, %r1, %r2)
}
""",
}


def parse(*lines: str) -> CompiledText:
    """A program of these lines, and of what they call."""
    body = "".join(f"  {line}\n" for line in lines)
    called = "".join(text for name, text in FUSED.items() if f"calls=%{name}" in body)
    return CompiledText.parse(called + HEAD + ARGUMENTS + body + "}\n")


@pytest.mark.parametrize(
    ("line", "nbytes"),
    [
        ("%dot = bf16[64,64]{1,0} dot(%a, %b), lhs_contracting_dims={1}", SIZE_A + SIZE_B + RESULT),
        # to VMEM only the reading counts, and from there nothing
        ("%in = (bf16[64,128]{1,0:S(1)}, bf16[64,128]{1,0}, u32[]{:S(2)}) copy-start(%a)", SIZE_A),
        ("%part = ((bf16[64,128]{1,0}), bf16[8,128]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%a)", 8 * 128 * 2),
        ("%add = bf16[64,128]{1,0:S(1)} add(%a, %a)", 2 * SIZE_A),
        ("%rows1 = u16[4,128]{1,0} fusion(%a, %i), kind=kLoop, calls=%rows", 2 * 4 * 128 * 2 + 16),
        ("%sums1 = f32[64]{0} fusion(%a), kind=kLoop, calls=%sums", SIZE_A + 256),
        ('%kernel = bf16[64,64]{1,0} custom-call(%a, %b), custom_call_target="tpu_custom_call"', 0),
        ('%gemm = bf16[64,64]{1,0} custom-call(%a), custom_call_target="__cublas$gemm"', SIZE_A + RESULT),
        ("%tuple = (bf16[64,128]{1,0}) tuple(%a)", 0),
        ("%rows2 = bf16[4,128]{1,0} gather(%a, %i), offset_dims={1}", 2 * 4 * 128 * 2),
        ("%put1 = bf16[64,128]{1,0} scatter(%a, %i, %b)", 2 * SIZE_B),
    ],
)
def test_memory_bytes(line: str, nbytes: int) -> None:
    assert memory_bytes(parse(line)) == nbytes


def test_an_update_in_place_writes_its_part() -> None:
    lines = (
        "%one = bf16[1,128]{1,0:S(1)} slice(%a)",
        "%put2 = bf16[64,128]{1,0} fusion(%a, %one, %i), kind=kLoop, calls=%writes",
    )
    assert memory_bytes(parse(*lines)) == 256 + 256 + 16


def test_product_flops() -> None:
    lines = (
        "%dot = f32[64,64]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
        "%gram = f32[128,128]{1,0} dot(%a, %a), lhs_contracting_dims={0}, rhs_contracting_dims={0}",
    )
    assert product_flops(parse(*lines)) == 2 * 64 * 64 * 128 + 2 * 128 * 128 * 64


def test_grouped_kernels() -> None:
    call = 'custom-call(%a), custom_call_target="tpu_custom_call"'
    lines = (
        f"%ragged-dot-metadata.1 = s32[4]{{0}} {call}",
        f"%ragged-dot-none.1 = f32[64,64]{{1,0}} {call}",
        f"%attend.1 = f32[64,64]{{1,0}} {call}",
    )
    assert grouped_kernels(parse(*lines)) == 1


def test_grouped_kernels_on_gpu() -> None:
    call = 'custom-call(%a), custom_call_target="mosaic_gpu_v2"'
    lines = (
        f'%mpmd_map.1 = f32[64,64]{{1,0}} {call}, metadata={{op_name="jit(step)/grouped_matmul/body"}}',
        f'%mpmd_map.2 = f32[64,64]{{1,0}} {call}, metadata={{op_name="jit(step)/paged_attention/body"}}',
    )
    assert grouped_kernels(parse(*lines)) == 1


def test_ragged_flops() -> None:
    call = 'custom-call(%a, %w), custom_call_target="tpu_custom_call"'
    lines = (
        "%w = bf16[4,128,32]{2,1,0} bitcast(%b)",
        f"%ragged-dot-none.1 = f32[64,32]{{1,0}} {call}",
        f"%attend.1 = f32[64,64]{{1,0}} {call}",
    )
    assert ragged_flops(parse(*lines)) == 2 * 64 * 32 * 128


@pytest.mark.parametrize(
    ("attribute", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, use_global_device_ids=true", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=[2,2]<=[2,1,2]T(0,2,1)", [[0, 1], [2, 3]]),
        ("source_target_pairs={{0,2},{2,0}}", [[0, 2], [2, 0]]),
        ("replica_groups={}", []),
    ],
)
def test_who_speaks_with_whom(attribute: str, groups: list[list[int]]) -> None:
    text = CompiledText.parse(f"{HEAD}  %s = f32[4]{{0}} all-reduce(%a), channel_id=1, {attribute}\n}}\n")
    [one] = text.instructions
    assert one.device_groups == groups
    assert len(text.collectives(lambda one: bool(one.device_groups))) == bool(groups)
