"""What is counted of adapters, on vLLM's own caches."""

from typing import Any

import pytest

from loradock_serve.inside import adapter_counts
from loradock_serve.inside.adapter_counts import AdapterCounts, Count
from loradock_testing.vllm_managers import BareWorkerManager, request


def counted(slots: int, cached: int) -> tuple[BareWorkerManager, AdapterCounts]:
    worker = BareWorkerManager(slots, cached)
    return worker, AdapterCounts(worker._adapter_manager)


def test_read_and_written_adapter_counts_once_however_often_it_runs() -> None:
    worker, counts = counted(2, 4)

    for _ in range(5):
        worker.batch(1)

    assert counts.total == Count(reads=1, activations=1)
    assert counts.to_json() == {1: {"reads": 1, "activations": 1, "slot_evictions": 0, "cpu_evictions": 0}}


def test_adapter_that_makes_room_in_the_slots_counts_as_evicted_from_there() -> None:
    worker, counts = counted(1, 4)

    for number in (1, 2, 1):
        worker.batch(number)

    assert counts.total == Count(reads=2, activations=3, slot_evictions=2)
    assert counts.to_json()[1] == {"reads": 1, "activations": 2, "slot_evictions": 1, "cpu_evictions": 0}


def test_adapter_that_leaves_host_memory_leaves_its_slot_too() -> None:
    worker, counts = counted(2, 2)

    for number in (1, 2, 3, 1):
        worker.batch(number)

    assert counts.to_json()[1] == {"reads": 2, "activations": 2, "slot_evictions": 1, "cpu_evictions": 1}
    assert counts.total == Count(reads=4, activations=4, slot_evictions=2, cpu_evictions=2)


def test_unloaded_and_cleared_adapters_were_not_evicted() -> None:
    worker, counts = counted(2, 4)
    worker.batch(1, 2)

    worker.remove_adapter(1)
    clear: Any = worker._adapter_manager.remove_all_adapters
    clear()

    assert (counts.total.slot_evictions, counts.total.cpu_evictions) == (0, 0)


def test_adapters_beyond_the_bound_are_forgotten_the_oldest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_counts, "MAX_COUNTED", 3)
    worker, counts = counted(2, 4)

    for number in (1, 2, 3, 4):
        worker.add_adapter(request(number))

    assert 1 not in counts.to_json()
    assert counts.total.reads == 4
