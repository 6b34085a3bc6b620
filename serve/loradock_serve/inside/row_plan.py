"""Which adapter slot each row of a batch belongs to, sorted once per engine step.

vLLM hands over one slot index per row (-1: the base, no adapter). Every wrapped layer of the model then asks the same
question, "which rows want which slot", dozens of times a step; a `RowPlan` is the answer. It knows nothing of weights,
layers or vLLM.

Legend: n rows, m of them with an adapter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NO_ADAPTER = -1

Slots = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RowPlan:
    """The rows of one batch, by adapter; rows of the base are left out."""

    slots: Slots
    """(n,) slot of each row, or NO_ADAPTER."""
    order: Slots
    """(m,) the rows that have an adapter, sorted by slot and then as they lie."""
    sorted_slots: Slots
    """(m,) the slot of each of those."""

    @classmethod
    def of(cls, slots: Slots) -> "RowPlan":
        """Sort the rows."""
        order = np.argsort(slots, kind="stable")
        order = np.ascontiguousarray(order[np.searchsorted(slots[order], 0) :])
        return cls(slots, order, slots[order])

    @property
    def rows(self) -> int:
        return len(self.slots)

    @property
    def is_empty(self) -> bool:
        """Whether no row has an adapter."""
        return not len(self.order)

    @property
    def is_uniform(self) -> bool:
        """Whether all rows want the same, so that it does not matter how many there are."""
        return bool((self.slots == self.slots[:1]).all())

    def part(self, start: int, end: int) -> "RowPlan":
        """The plan of the rows [start, end) alone."""
        return RowPlan.of(self.slots[start:end])


EMPTY_PLAN = RowPlan.of(np.empty(0, dtype=np.int64))


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
