"""Keeps what a run of the compile checks has shown."""

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from aot_records import PROOFS, replaces_all

from pallas_kernels.targets.proofs import read_proofs, summary, write_proofs

README = Path(__file__).parent.parent.parent / "README.md"
MARKS = ("<!-- make aot writes this table -->\n\n", "\n\n<!-- to here -->")


@pytest.fixture(autouse=True, scope="session")
def compile_anew() -> Iterator[None]:
    """A program from the cache of compiled programs could not be read: that needs the chip."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", before)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run of everything replaces all proofs, a part of it those that it has made again."""
    if not PROOFS:
        return
    made = {proof.key for proof in PROOFS}
    whole = exitstatus == 0 and replaces_all(session.config.invocation_params.args)
    kept = [] if whole else [proof for proof in read_proofs() if proof.key not in made]
    write_proofs([*kept, *PROOFS])
    before, rest = README.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    README.write_text(before + MARKS[0] + summary(read_proofs()) + MARKS[1] + after)
