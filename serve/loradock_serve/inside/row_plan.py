"""Which adapter slot each row of a batch belongs to, grouped once per engine step.

vLLM hands over one slot index per row (-1: the base, no adapter). Every wrapped layer of the model then asks the same
question, "which rows want which slot", dozens of times a step; a `RowPlan` holds the answer in the form that costs
the layers least. It knows nothing of weights, layers or vLLM.

Legend: n rows, k distinct adapters among them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

NO_ADAPTER = -1

SMALL_ROWS = (16, 4)
"""Groups up to this size may go into a bundle, padded to one size and multiplied in one batched product; the second
size is tried where the first would pad too much."""
MAX_PADDING = 2.5
"""How many rows a bundle may multiply for each row that it is for."""
BUNDLE_FROM = 4
"""From how many small groups on a bundle is cheaper than a product each (measured: 2 to 8, by width and dtype)."""
LONG_RUN = 16
"""Rows that lie together on average, as a prompt's do, are not gathered: the copies cost more than a product."""

Slots = npt.NDArray[np.int64]


class Segment(NamedTuple):
    """Consecutive rows [start, end) that all want `slot`."""

    slot: int
    start: int
    end: int


@dataclass(frozen=True)
class Bundle:
    """Small groups, each padded to m rows."""

    slots: tuple[int, ...]
    """In rising order; also some that no row wants, where that makes them a range."""
    picked: torch.Tensor | None
    """The slots as an index; None if they are a range, whose weights need no copy."""
    gather: torch.Tensor
    """(len(slots) * m,) rows of the batch to multiply, slot by slot; padding repeats some row."""
    rows: torch.Tensor
    """(rows with one of these adapters,) where the results belong in the batch."""
    kept: torch.Tensor | None
    """Which of the gathered rows those are; None if all of them, in this order."""


@dataclass(frozen=True)
class RowPlan:
    """The rows of one batch, by adapter. Each row that has an adapter is in one segment, or in the bundle."""

    slots: Slots
    """(n,) slot of each row, or NO_ADAPTER."""
    segments: tuple[Segment, ...] = ()
    """Of the batch as it lies where `order` is None, else of the rows that `order` gathers."""
    order: torch.Tensor | None = None
    """Rows of the batch, sorted by slot."""
    bundle: Bundle | None = None

    @classmethod
    def of(cls, slots: Slots, bundle_from: int = BUNDLE_FROM) -> "RowPlan":
        """Group the rows; gather them only if that makes fewer groups."""
        bundle = _bundle(slots, bundle_from)
        rest = slots
        if bundle is not None:
            rest = slots.copy()
            rest[bundle.rows.numpy()] = NO_ADAPTER
        runs = _runs(rest)
        if len(runs) <= max(2 * len({run.slot for run in runs}), len(slots) // LONG_RUN):
            return cls(slots, runs, None, bundle)
        order = np.argsort(rest, kind="stable")
        order = order[np.searchsorted(rest[order], 0) :]  # rows of the base sort first, and stay out
        return cls(slots, _runs(rest[order]), torch.from_numpy(order), bundle)

    @property
    def rows(self) -> int:
        return len(self.slots)

    @property
    def is_empty(self) -> bool:
        """Whether no row has an adapter."""
        return not self.segments and self.bundle is None

    @property
    def is_uniform(self) -> bool:
        """Whether all rows want the same, so that it does not matter how many there are."""
        return bool((self.slots == self.slots[:1]).all())

    def part(self, start: int, end: int) -> "RowPlan":
        """The plan of the rows [start, end) alone."""
        return RowPlan.of(self.slots[start:end])


EMPTY_PLAN = RowPlan(np.empty(0, dtype=np.int64))


def slots_of(adapter_ids: Sequence[int], slot_to_id: Sequence[int | None]) -> Slots:
    """Translate vLLM's adapter id of each row (0: none) into its slot.

    Raises:
        KeyError: An id lies in no slot. Answering such a row with the base, or with whatever lies in some slot, would
            be a wrong answer; vLLM itself raises the same error here.
    """
    ids = np.asarray(adapter_ids, dtype=np.int64)
    distinct, inverse = np.unique(ids, return_inverse=True)
    id_to_slot = {adapter_id: slot for slot, adapter_id in enumerate(slot_to_id) if adapter_id is not None}
    translated = [id_to_slot[adapter_id] if adapter_id > 0 else NO_ADAPTER for adapter_id in distinct.tolist()]
    return np.asarray(translated, dtype=np.int64)[inverse]


def _runs(slots: Slots) -> tuple[Segment, ...]:
    """Maximal runs of equal slots, without those of the base."""
    if len(slots) == 0:
        return ()
    edges = [0, *(np.flatnonzero(np.diff(slots)) + 1).tolist(), len(slots)]
    return tuple(Segment(int(slots[start]), start, end) for start, end in pairwise(edges) if slots[start] != NO_ADAPTER)


def _bundle(slots: Slots, bundle_from: int) -> Bundle | None:
    """Bundle the small groups, if they are many and of about one size."""
    counts = np.bincount(slots[slots != NO_ADAPTER], minlength=1)
    for largest in SMALL_ROWS:
        small = np.flatnonzero((counts > 0) & (counts <= largest))
        if len(small) < bundle_from:
            return None
        span = np.arange(small[0], small[-1] + 1)
        is_dense = len(span) <= 2 * len(small)  # reading an idle slot is cheaper than copying a busy one
        used, size = span if is_dense else small, int(counts[small].max())
        if len(used) * size <= MAX_PADDING * counts[small].sum():
            return _pad(slots, counts, small, used, size, None if is_dense else torch.from_numpy(small))
    return None


def _pad(slots: Slots, counts: Slots, small: Slots, used: Slots, size: int, picked: torch.Tensor | None) -> Bundle:
    """Lay the rows of the small groups out in a table of `size` rows for each slot used."""
    rows = np.flatnonzero(np.isin(slots, small))
    rows = rows[np.argsort(slots[rows], kind="stable")]
    first_places = np.searchsorted(used, small) * size
    places = np.concatenate([place + np.arange(counts[slot]) for place, slot in zip(first_places, small, strict=True)])
    gather = np.full(len(used) * size, rows[0])
    gather[places] = rows
    kept = None if len(places) == len(gather) else torch.from_numpy(places)
    return Bundle(tuple(used.tolist()), picked, torch.from_numpy(gather), torch.from_numpy(rows), kept)
