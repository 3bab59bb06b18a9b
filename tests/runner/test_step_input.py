"""What is packed on the host comes out in the program."""

import jax.numpy as jnp
import numpy as np

from jaxllm.runner.buckets import Bucket
from jaxllm.runner.step_input import StepLayout
from jaxllm.scheduler.plan import PageUpdate, RowPlan, StepPlan

LAYOUT = StepLayout(Bucket(tokens=16, rows=4, sampled=8), table_shape=(2, 6, 5), page_size=4)


def test_round_trip() -> None:
    plan = StepPlan(
        rows=(RowPlan("a", 3, 11, 1, True), RowPlan("b", 0, 8, 5, False), RowPlan("c", 2, 0, 7, True))
    )
    updates = [
        PageUpdate(row=0, group=1, index=2, pages=(7, 9)),
        PageUpdate(row=3, group=0, index=4, pages=(5,)),
    ]
    packed = LAYOUT.pack(plan, updates)
    assert packed.shape == (LAYOUT.size,)
    step = LAYOUT.unpack(jnp.asarray(packed))
    assert step.num_rows.tolist() == [1, 3]
    assert step.query_start.tolist() == [0, 1, 6, 13, 13]
    assert step.kv_lens.tolist() == [12, 13, 7, 0]
    assert step.row_ids.tolist() == [3, 0, 2, 5]  # the spare row where there is none
    assert step.samples.tolist() == [True, False, True, False]
    tables = np.zeros(LAYOUT.table_shape, int)
    flat = jnp.asarray(tables).reshape(-1).at[step.table_index].set(step.table_page, mode="drop")
    tables[1, 0, 2:4], tables[0, 3, 4] = (7, 9), 5
    assert (flat.reshape(tables.shape) == tables).all()


def test_room_for_all_pages_a_step_can_add() -> None:
    """Each row may begin a page just after a full one, in every group."""
    counts = (1, 1, 5, 9)
    rows = tuple(RowPlan(f"{i}", i, 4, n, True) for i, n in enumerate(counts))
    needed = sum(-(-n // 4) for n in counts) * 2
    assert sum(counts) == LAYOUT.bucket.tokens
    assert needed <= LAYOUT.num_updates
    pages = [PageUpdate(i, g, 1, tuple(range(-(-n // 4)))) for i, n in enumerate(counts) for g in range(2)]
    LAYOUT.pack(StepPlan(rows=rows), pages)
