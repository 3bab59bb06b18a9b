"""What a runner is told to do, as messages to hosts that do the same: everything that touches the device."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxllm.parallel.channel import Message
from jaxllm.sampling.state import RowScalars, RowSettings, RowTables

NUM_SCALARS = len(dataclasses.fields(RowScalars))
NUM_TABLES = len(dataclasses.fields(RowTables))


@dataclass(frozen=True)
class Admit:
    """Gives a row to a request."""

    row: int
    token_ids: np.ndarray
    """int32, all that it knows."""
    tables: np.ndarray
    """int32[groups, pages], its pages from the first on; zeros beyond."""
    settings: RowSettings


@dataclass(frozen=True)
class Step:
    """Admissions, and then a step."""

    bucket: int
    """Tokens of its bucket."""
    packed: np.ndarray
    """int32, what `StepLayout.pack` makes."""
    admits: tuple[Admit, ...]


def step_message(step: Step) -> Message:
    """A step as a message; zeros at the ends of rows are left out."""
    arrays, admits = [step.packed], []
    for admit in step.admits:
        used = np.flatnonzero(np.any(admit.tables, axis=0))
        arrays += [admit.token_ids, admit.tables[:, : used[-1] + 1 if used.size else 0]]
        arrays += [np.asarray(leaf) for leaf in _leaves(admit.settings)]
        admits.append([admit.row, admit.settings.tables is not None])
    return Message("step", {"bucket": step.bucket, "admits": admits}, arrays)


def read_step(message: Message, table_width: int) -> Step:
    """The inverse of `step_message`.

    Args:
        table_width: pages of the longest request.
    """
    packed, *arrays = message.arrays
    rest, admits = iter(arrays), []
    for row, with_tables in message.fields["admits"]:
        token_ids, used = next(rest), next(rest)
        tables = np.zeros((len(used), table_width), np.int32)
        tables[:, : used.shape[1]] = used
        admits.append(Admit(row, token_ids, tables, _settings(rest, with_tables)))
    return Step(message.fields["bucket"], packed, tuple(admits))


def _leaves(settings: RowSettings) -> list[Any]:
    parts = [settings.scalars] if settings.tables is None else [settings.scalars, settings.tables]
    return [getattr(part, field.name) for part in parts for field in dataclasses.fields(part)]


def _settings(leaves: Iterator[np.ndarray], with_tables: bool) -> RowSettings:
    scalars = RowScalars(*(next(leaves) for _ in range(NUM_SCALARS)))
    if not with_tables:
        return RowSettings(scalars, None)
    return RowSettings(scalars, RowTables(*(next(leaves) for _ in range(NUM_TABLES))))
