"""The owner of the queue, on a clock that a test moves and an engine that it starts anew."""

import asyncio
import gc
from collections.abc import Callable
from typing import Any

import pytest

from loradock_serve import metrics
from loradock_serve.engine import EngineStart
from loradock_serve.engine_client import EngineStatus
from loradock_serve.errors import ConflictError, DeadlineError
from loradock_serve.slots import UNLIMITED
from loradock_serve.tickets import Ask, Limits, Ticket
from loradock_serve.turnstile import Alarm, Turnstile, Turnstiles, limits_of
from loradock_testing.admission_world import Rules
from loradock_testing.recorded_fleet import RecordedClient, RecordedEngine, settle


def start(number: int, **limits: Any) -> EngineStart:
    return EngineStart(number, RecordedClient(), EngineStatus("cpu", "x", True, (), limits))


class HandClock:
    """Time goes by when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0
        self.alarms: list[tuple[float, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], None]) -> Alarm:
        alarm = (when, callback)
        self.alarms.append(alarm)
        clock = self

        class Ring:
            def cancel(self) -> None:
                clock.alarms.remove(alarm)

        return Ring()

    def move(self, seconds: float) -> None:
        self.now += seconds
        for alarm in [alarm for alarm in self.alarms if alarm[0] <= self.now]:
            self.alarms.remove(alarm)
            alarm[1]()


class Gate:
    """A turnstile and its world."""

    def __init__(self, rules: Rules | None = None, **limits: int) -> None:
        self.clock = HandClock()
        self.start = start(1, **limits)
        self.turnstile = Turnstile(rules or Rules(), self.clock, lambda: self.start)

    def come(self, adapter: str | None = None, **fields: Any) -> tuple[Ticket, asyncio.Task[None]]:
        ticket = Ticket(Ask("t", adapter, 10, **fields), self.clock.now)
        return ticket, asyncio.create_task(self.turnstile.wait(ticket))


async def test_turns_are_given_back_and_passed_on() -> None:
    gate = Gate(max_num_seqs=1)
    first, entered = gate.come()
    await entered
    _, waiting = gate.come()
    await settle()
    assert (gate.turnstile.queued, waiting.done()) == (1, False)
    gate.turnstile.leave(first, (10, 10))
    await waiting
    assert gate.turnstile.queued == 0


async def test_cancelled_waiter_leaves_the_queue_also_when_its_turn_had_just_come() -> None:
    gate = Gate(max_num_seqs=1)
    first, entered = gate.come()
    await entered
    _, waiting = gate.come()
    _, next_one = gate.come()
    await settle()
    gate.turnstile.leave(first, None)  # the turn is the second's, who does not know it yet
    waiting.cancel()
    await next_one
    assert gate.turnstile.queued == 0
    assert waiting.cancelled()


async def test_deadline_rings_by_itself() -> None:
    gate = Gate(max_num_seqs=1)
    await gate.come()[1]
    _, waiting = gate.come(deadline_at=103.0)
    await settle()
    gate.clock.move(2.9)
    await settle()
    assert not waiting.done()
    gate.clock.move(0.1)
    with pytest.raises(DeadlineError, match=r"after 3\.0 s in the queue; it did not reach the engine"):
        await waiting


async def test_deadline_that_is_over_on_arrival_is_told_at_once() -> None:
    gate = Gate()
    with pytest.raises(DeadlineError):
        await gate.come(deadline_at=99.0)[1]


async def test_new_start_of_the_engine_has_its_own_limits_and_nothing_in_it() -> None:
    gate = Gate(max_num_seqs=1)
    old, entered = gate.come()
    await entered
    gate.start = start(2, max_num_seqs=2, max_loras=3)
    for _ in range(2):
        await gate.come()[1]
    assert gate.turnstile.limits == Limits(3, 2)
    _, waiting = gate.come()
    await settle()
    gate.turnstile.leave(old, None)  # of the start before: it frees nothing in this one
    await settle()
    assert not waiting.done()
    waiting.cancel()


async def test_pin_waits_for_a_slot_and_a_cancelled_one_is_taken_back() -> None:
    gate = Gate(max_loras=2)
    running = [gate.come(adapter) for adapter in ("a", "b")]
    await asyncio.gather(*(entered for _, entered in running))
    pinning = asyncio.create_task(gate.turnstile.pin("p"))
    await settle()
    assert not pinning.done()
    gate.turnstile.leave(running[0][0], None)
    await pinning
    await gate.turnstile.pin("p")
    assert gate.turnstile.pins == ("p",)
    with pytest.raises(ConflictError, match="1 of 2 slots are pinned, and one must stay free"):
        await gate.turnstile.pin("q")
    gate.turnstile.unpin("p")
    assert not gate.turnstile.pins
    _, again = gate.come("c")
    await again
    given_up = asyncio.create_task(gate.turnstile.pin("p"))
    await settle()
    given_up.cancel()
    await settle()
    assert not gate.turnstile.pins


@pytest.mark.parametrize(
    ("status", "limits"),
    [
        ({"max_loras": 4, "max_num_seqs": 16}, Limits(4, 16)),
        ({"max_loras": 0, "max_num_seqs": 16}, Limits(UNLIMITED, 16)),
        ({}, Limits()),
        ({"max_loras": None, "max_num_seqs": "many"}, Limits()),
    ],
)
def test_limits_are_what_the_engine_says(status: dict[str, Any], limits: Limits) -> None:
    assert limits_of(start_of(status)) == limits


def start_of(status: dict[str, Any]) -> EngineStart:
    return EngineStart(1, RecordedClient(), EngineStatus("cpu", "x", True, (), status))


def test_engine_without_a_status_has_no_limits() -> None:
    assert limits_of(EngineStart(1, RecordedClient(), None)) == Limits()


async def test_turnstile_is_forgotten_with_its_engine() -> None:
    turnstiles = Turnstiles(Rules())
    engine = RecordedEngine("x", [])
    assert turnstiles.of(engine) is turnstiles.of(engine)
    del engine
    gc.collect()
    assert len(turnstiles._all) == 0


async def test_request_that_comes_too_late_does_not_take_the_turns_of_others_along() -> None:
    gate = Gate(Rules(max_wait_s=1.0), max_num_seqs=2)
    await gate.come()[1]
    _, large = gate.come(seats=2, deadline_at=103.0)
    await settle()
    gate.clock.move(2.0)  # the large one is overdue: the free seat is kept for it
    _, small = gate.come()
    await settle()
    assert not small.done()
    gate.clock.now = 103.0  # the alarm has not rung yet when the next one comes
    with pytest.raises(DeadlineError):
        await gate.come(deadline_at=102.0)[1]
    await settle()
    assert (small.done(), isinstance(large.exception(), DeadlineError)) == (True, True)


@pytest.mark.parametrize(
    ("deadline_at", "reason"), [(100.005, "deadline"), (160.0, "client_gone"), (None, "client_gone")]
)
async def test_waiter_that_is_cancelled_at_its_deadline_is_counted_as_that(
    deadline_at: float | None, reason: str
) -> None:
    def count() -> float:
        return metrics.REGISTRY.get_sample_value("loradock_queue_rejected_total", {"reason": reason}) or 0.0

    gate = Gate(max_num_seqs=1)
    await gate.come()[1]
    _, waiting = gate.come(deadline_at=deadline_at)
    await settle()
    before = count()
    waiting.cancel()
    await asyncio.wait([waiting])
    assert count() == before + 1
