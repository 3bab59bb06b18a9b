"""A runner's `dispatch` and `sample` as messages to hosts that do the same."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from jaxllm.parallel.channel import Message
from jaxllm.runner.runner import Admission
from jaxllm.runner.stage import RowMasks
from jaxllm.sampling.state import RowScalars, RowSettings, RowTables
from jaxllm.scheduler.plan import PageUpdate, RowPlan, StepPlan

NUM_SCALARS = len(dataclasses.fields(RowScalars))
NUM_TABLES = len(dataclasses.fields(RowTables))


def dispatch_message(
    plan: StepPlan,
    admissions: Mapping[int, Admission],
    bucket: int,
    returned: Sequence[Int32[np.ndarray, " sampled"]] = (),
) -> Message:
    """A step as a message. Requests' names are left out: devices know rows alone.

    Args:
        bucket: index of the one that the step is to run in.
        returned: the tokens of earlier steps that the first stage takes before it.
    """
    rows = [(row.row, row.start, row.num_tokens, row.samples) for row in plan.rows]
    updates = [(update.row, update.group, update.index, len(update.pages)) for update in plan.page_updates]
    pages = [page for update in plan.page_updates for page in update.pages]
    arrays = [_integers(rows, 4), _integers(updates, 4), np.array(pages, np.int32), *returned]
    admits = []
    for row, admission in admissions.items():
        arrays.append(np.array(admission.token_ids, np.int32))
        arrays += [np.asarray(leaf) for leaf in _leaves(admission.settings)]
        admits.append([row, admission.settings.tables is not None])
    fields = {"bucket": bucket, "admits": admits, "returned": len(returned)}
    return Message("dispatch", fields, arrays)


def read_dispatch(message: Message) -> tuple[StepPlan, dict[int, Admission], int, list[np.ndarray]]:
    """The inverse of `dispatch_message`."""
    rows, heads, pages, *arrays = message.arrays
    returned = [arrays.pop(0) for _ in range(message.fields["returned"])]
    updates, begin = [], 0
    for row, group, index, count in heads.tolist():
        updates.append(PageUpdate(row, group, index, tuple(pages[begin : begin + count].tolist())))
        begin += count
    planned = (RowPlan("", row, start, count, bool(samples)) for row, start, count, samples in rows.tolist())
    rest, admissions = iter(arrays), {}
    for row, with_tables in message.fields["admits"]:
        token_ids = next(rest).tolist()
        admissions[row] = Admission(token_ids, _settings(rest, with_tables))
    plan = StepPlan(tuple(planned), page_updates=tuple(updates))
    return plan, admissions, message.fields["bucket"], returned


def sample_message(masks: RowMasks | None) -> Message:
    """That a step chooses its tokens, as a message."""
    if masks is None:
        return Message("sample")
    rows, words = masks
    return Message("sample", {"rows": list(rows)}, [words])


def read_sample(message: Message) -> RowMasks | None:
    """The inverse of `sample_message`."""
    return (message.fields["rows"], message.arrays[0]) if message.arrays else None


def _integers(values: list[Any], width: int) -> np.ndarray:
    return np.array(values, np.int32).reshape(-1, width)


def _leaves(settings: RowSettings) -> list[Any]:
    parts = [settings.scalars] if settings.tables is None else [settings.scalars, settings.tables]
    return [getattr(part, field.name) for part in parts for field in dataclasses.fields(part)]


def _settings(leaves: Iterator[np.ndarray], with_tables: bool) -> RowSettings:
    scalars = RowScalars(*(next(leaves) for _ in range(NUM_SCALARS)))
    if not with_tables:
        return RowSettings(scalars, None)
    return RowSettings(scalars, RowTables(*(next(leaves) for _ in range(NUM_TABLES))))
