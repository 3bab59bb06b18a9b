"""That proofs are kept; needs no compiler."""

import pytest
from aot_cases import attention_cases, product_cases
from aot_records import EVERYTHING, replaces_all

from pallas_kernels.targets.proofs import read_proofs


def test_every_case_has_a_proof() -> None:
    wanted = {
        ("paged_attention", one.backend, one.target, str(one.devices), one.shape, one.pages)
        for one in attention_cases()
    }
    wanted |= {(one.op, one.backend, one.target, str(one.devices), one.shape, "") for one in product_cases()}
    assert wanted - {proof.key for proof in read_proofs()} == set()


@pytest.mark.parametrize(
    "chosen", [("--lf",), ("-k", "decode"), ("tests/aot/test_experts_aot.py",)], ids=" ".join
)
def test_a_part_of_the_tests_does_not_replace_all_proofs(chosen: tuple[str, ...]) -> None:
    assert replaces_all(EVERYTHING)
    assert not replaces_all((*EVERYTHING, *chosen))
    assert not replaces_all((*EVERYTHING[:2], *chosen))
