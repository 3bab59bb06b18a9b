"""A step's integers, packed into one array so that a step is one upload."""

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
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
        return self._ends[-1]

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        rows = self.bucket.rows
        sizes = (2, rows + 1, rows, rows, rows, self.num_updates, self.num_updates)
        return tuple(itertools.accumulate(sizes))

    @cached_property
    def _empty(self) -> Int32[np.ndarray, " size"]:
        """A step without rows."""
        groups, device_rows, columns = self.table_shape
        packed = np.zeros(self.size, np.int32)
        _, _, _, row_ids, _, table_index, _ = self._split(packed)
        row_ids[:] = device_rows - 1
        table_index[:] = groups * device_rows * columns
        return packed

    def pack(self, plan: StepPlan, updates: Sequence[PageUpdate]) -> Int32[np.ndarray, " size"]:
        """The plan as integers; `updates` are the new pages of rows that were running already."""
        _, device_rows, columns = self.table_shape
        packed = self._empty.copy()
        num_rows, query_start, kv_lens, row_ids, samples, table_index, table_page = self._split(packed)
        if plan.rows:  # a data group may have none
            used = len(plan.rows)
            _, ids, starts, counts, sampling = zip(*plan.rows, strict=True)
            num_rows[:] = plan.num_decode_rows, used
            query_start[: used + 1] = list(itertools.accumulate(counts, initial=0))
            query_start[used + 1 :] = plan.num_tokens
            kv_lens[:used] = list(map(operator.add, starts, counts))
            row_ids[:used] = ids
            samples[:used] = sampling
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
        return [packed[begin:end] for begin, end in itertools.pairwise((0, *self._ends))]
