"""Every row with an adapter is in the plan exactly once, whatever the mixture."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loradock_serve.inside.row_plan import NO_ADAPTER, RowPlan, slots_of


def rows_by_slot(plan: RowPlan) -> dict[int, list[int]]:
    """Which rows the plan would compute for each slot."""
    found: dict[int, list[int]] = {}
    for row, slot in zip(plan.order.tolist(), plan.sorted_slots.tolist(), strict=True):
        found.setdefault(slot, []).append(row)
    return found


@given(st.lists(st.integers(NO_ADAPTER, 20), max_size=120))
def test_plan_of_any_batch_holds_each_row_once_under_its_slot(slots: list[int]) -> None:
    array = np.asarray(slots, dtype=np.int64)

    plan = RowPlan.of(array)

    expected = {slot: np.flatnonzero(array == slot).tolist() for slot in set(slots) - {NO_ADAPTER}}
    assert rows_by_slot(plan) == expected
    assert plan.is_empty == (not expected)
    assert plan.sorted_slots.tolist() == sorted(slot for slot in slots if slot != NO_ADAPTER)


def test_slots_of_translates_ids_and_keeps_the_base_apart() -> None:
    assert slots_of((0, 7, 9, 0, 7), [9, None, 7]).tolist() == [-1, 2, 0, -1, 2]


def test_slots_of_an_id_in_no_slot_raises() -> None:
    with pytest.raises(KeyError):
        slots_of((5,), [9, None, 7])
