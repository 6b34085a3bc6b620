"""The shorter way of a step leaves vLLM's caches as the long one does."""

import random
from collections.abc import Sequence

import pytest

from loradock_serve.inside.warm_steps import spare_warm_steps
from loradock_testing.vllm_managers import BareWorkerManager


def state(worker: BareWorkerManager) -> list[Sequence[int | None]]:
    manager = worker._adapter_manager
    return [worker.slots, list(manager._active_adapters.order), list(manager._registered_adapters.order), worker.read]


@pytest.mark.parametrize("seed", range(10))
def test_batches_whatever_they_hold_leave_slots_and_both_orders_as_stock_leaves_them(seed: int) -> None:
    chance = random.Random(seed)
    slots = chance.randint(2, 6)
    stock, ours = (BareWorkerManager(slots, slots + seed % 3) for _ in range(2))
    spare_warm_steps(ours)
    batch: list[int] = []

    for _ in range(300):
        if chance.random() < 0.3:  # most steps hold what the step before held
            batch = chance.sample(range(1, slots + 3), chance.randint(0, slots))
        if chance.random() < 0.1:
            gone = chance.randint(1, slots + 2)
            assert stock.remove_adapter(gone) == ours.remove_adapter(gone)
        stock.batch(*batch)
        ours.batch(*batch)
        assert state(ours) == state(stock)


def test_step_whose_adapters_all_lie_in_slots_copies_no_list_of_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = BareWorkerManager(4, 8)
    spare_warm_steps(worker)
    worker.batch(1, 2, 3)
    copies: list[set[int]] = []
    stock = type(worker).list_adapters

    def counted(self: BareWorkerManager) -> set[int]:
        copies.append(stock(self))
        return copies[-1]

    monkeypatch.setattr(type(worker), "list_adapters", counted)

    worker.batch(3, 1)
    assert not copies

    worker.batch(3, 4)
    assert copies
