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

SMALL_ROWS = 8
"""Groups up to this size may go into a bundle: padded to one size and multiplied in one batched product."""
BUNDLE_FROM = 6
"""From how many small groups on a bundle is cheaper than a product each (benchmarks/cpu_lora_kernel.py)."""

Slots = npt.NDArray[np.int64]


class Segment(NamedTuple):
    """Consecutive rows [start, end) that all want `slot`."""

    slot: int
    start: int
    end: int


@dataclass(frozen=True)
class Bundle:
    """Small groups of a range of slots, each padded to m rows."""

    first_slot: int
    end_slot: int
    gather: torch.Tensor
    """((end_slot - first_slot) * m,) rows of the batch to multiply, slot by slot; padding repeats some row."""
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
        if len(runs) <= 2 * len({run.slot for run in runs}):
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
    """Bundle the small groups, if they are many and lie densely enough in the range of slots."""
    counts = np.bincount(slots[slots != NO_ADAPTER], minlength=1)
    small = np.flatnonzero((counts > 0) & (counts <= SMALL_ROWS))
    if len(small) < bundle_from:
        return None
    first, end = int(small[0]), int(small[-1]) + 1
    if end - first > 2 * len(small):
        return None
    size = int(counts[small].max())
    rows = np.flatnonzero(np.isin(slots, small))
    rows = rows[np.argsort(slots[rows], kind="stable")]
    places = np.concatenate([(slot - first) * size + np.arange(counts[slot]) for slot in small])
    gather = np.full((end - first) * size, rows[0])
    gather[places] = rows
    kept = None if len(places) == len(gather) else torch.from_numpy(places)
    return Bundle(first, end, torch.from_numpy(gather), torch.from_numpy(rows), kept)
