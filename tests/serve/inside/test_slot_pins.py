"""Pins on vLLM's own caches: they hold, they give way rather than end a step, and they can be taken back."""

import random

import pytest

from loradock_serve.inside.slot_pins import SlotPins
from loradock_testing.vllm_managers import BareWorkerManager, request


def pinned(slots: int, *adapters: int, cached: int = 8) -> tuple[BareWorkerManager, SlotPins]:
    """A worker with some adapters pinned."""
    worker = BareWorkerManager(slots, cached)
    pins = SlotPins(worker)
    for number in adapters:
        worker.add_adapter(request(number))
        assert pins.pin(number) == "pinned"
    return worker, pins


def test_stock_pin_ends_a_step_with_as_many_other_adapters_as_slots() -> None:
    """The fault that this module is for; when it is gone from vLLM, so can be `_watch_steps`."""
    worker = BareWorkerManager(2, 8)
    worker.add_adapter(request(1))
    worker.pin_adapter(1)

    with pytest.raises(ValueError, match="is not in list"):
        worker.batch(2, 3)


def test_pinned_adapter_stays_in_its_slot_under_traffic_on_more_adapters_than_slots() -> None:
    worker, _ = pinned(3, 1)
    slot = worker.slots.index(1)

    for number in range(2, 40):
        worker.batch(number, 2 + number % 5)
        assert worker.slots[slot] == 1
    assert worker.read.count(1) == 1  # host memory was too small for 40, and it was never read again


def test_batch_that_leaves_no_slot_for_a_pin_runs_and_the_pin_comes_back() -> None:
    worker, pins = pinned(2, 1)

    worker.batch(2, 3)

    assert 1 not in worker.slots
    assert pins.pinned == [1]
    worker.batch(2)
    assert 1 in worker.slots
    worker.batch(4)
    worker.batch(5)
    assert 1 in worker.slots


def test_pin_of_an_adapter_that_had_to_leave_host_memory_comes_back_with_it() -> None:
    worker, pins = pinned(2, 1, cached=2)

    worker.batch(2, 3)
    assert 1 not in worker._adapter_manager.list_adapters()
    worker.batch(1)

    assert pins.pinned == [1]
    worker.batch(4)
    worker.batch(5)
    assert 1 in worker.slots


def test_unpinned_adapter_leaves_when_others_need_its_slot() -> None:
    worker, pins = pinned(2, 1)

    assert pins.unpin(1) is True

    worker.batch(2, 3)
    assert 1 not in worker.slots
    assert (pins.pinned, pins.unpin(1)) == ([], False)


def test_last_slot_cannot_be_pinned() -> None:
    worker, pins = pinned(3, 1, 2)
    worker.add_adapter(request(3))

    assert pins.pin(3) == "full"
    assert pins.pin(2) == "pinned"  # again, which changes nothing
    assert pins.pinned == [1, 2]


def test_adapter_that_is_not_in_host_memory_cannot_be_pinned() -> None:
    _, pins = pinned(3)

    assert pins.pin(7) == "absent"


def test_removed_adapter_is_pinned_no_more() -> None:
    worker, pins = pinned(2, 1)

    worker.remove_adapter(1)
    worker.batch(2, 3)
    worker.batch(2)

    assert pins.pinned == []
    assert 1 not in worker.slots


@pytest.mark.parametrize("seed", range(20))
def test_every_batch_finds_its_adapters_in_slots_whatever_is_pinned(seed: int) -> None:
    chance = random.Random(seed)
    slots = chance.randint(2, 6)
    worker, pins = pinned(slots, cached=slots + chance.randint(0, 4))

    for _ in range(300):
        number = chance.randint(1, 12)
        if chance.random() < 0.2:
            worker.add_adapter(request(number))
            assert pins.pin(number) in ("pinned", "full")
        elif chance.random() < 0.2:
            pins.unpin(number)
        elif chance.random() < 0.1:
            worker.remove_adapter(number)
        batch = chance.sample(range(1, 13), chance.randint(0, slots))
        assert len(set(worker.batch(*batch))) == len(batch)
        if len({*batch, *pins.pinned}) <= slots:
            in_memory = worker.list_adapters()
            assert {one for one in pins.pinned if one in in_memory} <= set(worker.slots)
