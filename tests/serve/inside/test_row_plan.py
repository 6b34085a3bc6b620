"""Every row with an adapter is in the plan exactly once, whatever the mixture."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loradock_serve.inside.row_plan import NO_ADAPTER, RowPlan, slots_of


def rows_by_slot(plan: RowPlan) -> dict[int, list[int]]:
    """Which rows the plan would compute for each slot."""
    found: dict[int, list[int]] = {}
    order = np.arange(plan.rows) if plan.order is None else plan.order.numpy()
    for segment in plan.segments:
        found.setdefault(segment.slot, []).extend(order[segment.start : segment.end].tolist())
    if plan.bundle is not None:
        bundle = plan.bundle
        gather = bundle.gather.numpy()
        kept = np.arange(len(gather)) if bundle.kept is None else bundle.kept.numpy()
        assert gather[kept].tolist() == bundle.rows.tolist()
        size = len(gather) // len(bundle.slots)
        assert (bundle.picked is None) == (list(bundle.slots) == list(range(bundle.slots[0], bundle.slots[-1] + 1)))
        for place in kept.tolist():
            found.setdefault(bundle.slots[place // size], []).append(int(gather[place]))
    return {slot: sorted(rows) for slot, rows in found.items()}


@given(st.lists(st.integers(NO_ADAPTER, 20), max_size=120), st.integers(1, 12))
def test_plan_of_any_batch_holds_each_row_once_under_its_slot(slots: list[int], bundle_from: int) -> None:
    array = np.asarray(slots, dtype=np.int64)

    plan = RowPlan.of(array, bundle_from)

    expected = {slot: np.flatnonzero(array == slot).tolist() for slot in set(slots) - {NO_ADAPTER}}
    assert rows_by_slot(plan) == expected
    assert plan.is_empty == (not expected)


def test_plan_of_prompts_gathers_nothing() -> None:
    plan = RowPlan.of(np.repeat([2, NO_ADAPTER, 0, 2], 20))

    assert plan.order is None
    assert [tuple(segment) for segment in plan.segments] == [(2, 0, 20), (0, 40, 60), (2, 60, 80)]


def test_plan_of_many_single_rows_is_one_bundle() -> None:
    plan = RowPlan.of(np.arange(16))

    assert not plan.segments
    assert plan.bundle is not None
    assert plan.bundle.kept is None


def test_plan_of_single_rows_in_slots_far_apart_picks_the_slots() -> None:
    plan = RowPlan.of(np.arange(5) * 9)

    assert plan.bundle is not None
    assert plan.bundle.slots == (0, 9, 18, 27, 36)
    assert plan.bundle.picked is not None


def test_slots_of_translates_ids_and_keeps_the_base_apart() -> None:
    assert slots_of((0, 7, 9, 0, 7), [9, None, 7]).tolist() == [-1, 2, 0, -1, 2]


def test_slots_of_an_id_in_no_slot_raises() -> None:
    with pytest.raises(KeyError):
        slots_of((5,), [9, None, 7])
