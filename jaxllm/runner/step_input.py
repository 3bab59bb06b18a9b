"""A step's integers, packed into one array so that a step is one upload."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Int32

from jaxllm.runner.buckets import Bucket
from jaxllm.scheduler.plan import PageUpdate, StepPlan


@dataclass(frozen=True)
class StepInput:
    """What the program of a bucket unpacks from the upload."""

    num_rows: Int32[Array, " 2"]
    """Rows of exactly one token, which come first, and rows in use."""
    query_start: Int32[Array, "rows+1"]
    kv_lens: Int32[Array, " rows"]
    row_ids: Int32[Array, " rows"]
    """Row on the device of each row of the step; the spare row where none is in use."""
    samples: Bool[Array, " rows"]
    """Whether the step reaches the row's newest token, so that the next one is sampled."""
    table_index: Int32[Array, " updates"]
    """Entries of the flat page tables that change; past their end where there is no update."""
    table_page: Int32[Array, " updates"]


@dataclass(frozen=True)
class StepLayout:
    """Where each field of a `StepInput` lies in the packed array."""

    bucket: Bucket
    table_shape: tuple[int, int, int]
    """Groups, rows of the device (the spare one is the last), pages of the longest request."""
    page_size: int

    @property
    def num_updates(self) -> int:
        """Most pages a step can add: a row of n tokens needs at most ceil(n / page_size) new ones a group."""
        return self.table_shape[0] * (self.bucket.rows + self.bucket.tokens // self.page_size)

    @property
    def size(self) -> int:
        """Integers in the packed array."""
        return sum(self._sizes)

    @property
    def _sizes(self) -> tuple[int, ...]:
        rows = self.bucket.rows
        return (2, rows + 1, rows, rows, rows, self.num_updates, self.num_updates)

    def pack(self, plan: StepPlan, updates: Sequence[PageUpdate]) -> Int32[np.ndarray, " size"]:
        """The plan as integers; `updates` are the new pages of rows that were running already."""
        groups, device_rows, columns = self.table_shape
        packed = np.zeros(self.size, np.int32)
        num_rows, query_start, kv_lens, row_ids, samples, table_index, table_page = self._split(packed)
        used = len(plan.rows)
        num_rows[:] = plan.num_decode_rows, used
        fields = np.array([(r.num_tokens, r.start, r.row, r.samples) for r in plan.rows], np.int32)
        fields = fields.reshape(used, 4)  # a data group may have no rows
        counts, starts, ids, sampling = fields.T
        np.cumsum(counts, out=query_start[1 : used + 1])
        query_start[used + 1 :] = query_start[used]
        kv_lens[:used] = counts + starts
        row_ids[:] = device_rows - 1
        row_ids[:used] = ids
        samples[:used] = sampling
        table_index[:] = groups * device_rows * columns
        end = 0
        for update in updates:
            first = (update.group * device_rows + update.row) * columns + update.index
            begin, end = end, end + len(update.pages)
            table_index[begin:end] = range(first, first + len(update.pages))
            table_page[begin:end] = update.pages
        return packed

    def unpack(self, packed: Int32[Array, " size"]) -> StepInput:
        """The inverse of `pack`, inside the program."""
        num_rows, query_start, kv_lens, row_ids, samples, table_index, table_page = self._split(packed)
        samples = samples.astype(bool)
        return StepInput(num_rows, query_start, kv_lens, row_ids, samples, table_index, table_page)

    def _split(self, packed: Any) -> list[Any]:
        """Views of a numpy array on the host, slices of a traced one in the program."""
        ends = np.cumsum(self._sizes)
        return [packed[end - size : end] for size, end in zip(self._sizes, ends, strict=True)]
