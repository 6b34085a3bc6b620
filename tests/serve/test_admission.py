"""The admission policy, one situation at a time."""

import pytest

from loradock_testing.admission_world import Rules, World


def test_request_that_has_room_begins_at_once() -> None:
    world = World(slots=1, seats=2)
    assert world.ask("a") in world.running
    assert world.ask(None) in world.running
    assert world.ask(None) in world.queued


def test_request_larger_than_the_engine_counts_as_the_engine() -> None:
    world = World(seats=4)
    small = world.ask()
    large = world.ask(seats=1000)
    assert large in world.queued
    assert world.end(small) == [large]
    assert large.seats == 4


def test_idle_slot_goes_to_whoever_needs_it_and_stays_until_then() -> None:
    world = World(slots=2)
    first, second = world.ask("a"), world.ask("b")
    world.end(first)
    assert world.ask("c") in world.running
    assert world.ask("a") in world.queued
    assert world.ask("b") in world.running
    assert second in world.running


# Fairness


def test_newcomer_is_next_and_does_not_get_what_it_missed() -> None:
    world = World(seats=1)
    running = world.ask(tenant="old")
    for _ in range(6):
        world.ask(tenant="old")
    for _ in range(3):
        (running,) = world.end(running)
    for _ in range(3):
        world.ask(tenant="new")
    order = []
    while world.running:
        (running,) = world.running
        order.append(running.ask.tenant)
        world.end(running)
    assert order == ["old", "new", "old", "new", "old", "new", "old"]


def test_adapters_of_one_tenant_take_turns() -> None:
    world = World(seats=1)
    world.ask("a")
    for adapter in "aaaab":
        world.ask(adapter)
    order = []
    while world.running:
        (running,) = world.running
        order.append(running.ask.adapter)
        world.end(running)
    assert order.index("b") <= 2


def test_answer_that_nobody_counted_is_charged_by_its_time() -> None:
    """A client that hangs up just before the end has been served all the same."""
    world = World(seats=1)
    honest = world.ask(tenant="honest")
    for tenant in ("sly", "honest", "sly", "honest"):
        world.ask(tenant=tenant)
    world.now += 10
    (sly,) = world.end(honest, (10, 100))
    world.now += 50
    assert [ticket.ask.tenant for ticket in world.end(sly, None)] == ["honest"]
    (honest,) = world.running
    world.now += 1
    assert [ticket.ask.tenant for ticket in world.end(honest, (10, 10))] == ["honest"]


# Priorities, waits, drains


def test_lower_priority_is_first_also_of_a_tenant_that_was_served_more() -> None:
    world = World(seats=1)
    running = world.ask(tenant="x", tokens=1000)
    low = world.ask(tenant="y", priority=1)
    high = world.ask(tenant="x", priority=0)
    assert world.end(running, (1000, 1)) == [high]
    assert world.end(high) == [low]


def test_request_that_waited_too_long_beats_priority() -> None:
    world = World(Rules(max_wait_s=5), seats=1)
    running = world.ask()
    low = world.ask("a", priority=9)
    world.wait(5)
    high = world.ask("b", priority=-9)
    assert world.end(running) == [low]
    assert world.end(low) == [high]


def test_slot_is_drained_for_who_waited_too_long_and_its_own_adapter_waits_too() -> None:
    world = World(Rules(max_wait_s=5), slots=2)
    older, newer = world.ask("a"), world.ask("b")
    world.now += 1
    world.ask("b")
    waiting = world.ask("c")
    assert world.ask("a") in world.running
    world.end(older)
    world.wait(4.9)
    (on_a,) = [ticket for ticket in world.running if ticket.ask.adapter == "a"]
    world.ask("b")
    world.wait(0.1)
    closed_out = world.ask("a")
    assert closed_out in world.queued, "its slot began longest ago, so it is the one that is drained"
    assert world.ask("b") in world.running, "the other goes on"
    assert world.end(on_a) == [waiting]
    assert newer in world.running
    assert closed_out in world.queued


def test_several_who_waited_too_long_drain_several_slots() -> None:
    world = World(Rules(max_wait_s=5), slots=3)
    running = [world.ask(adapter) for adapter in "abc"]
    waiting = [world.ask(adapter) for adapter in "de"]
    world.wait(5)
    open_still = [adapter for adapter in "abc" if world.ask(adapter) in world.running]
    assert len(open_still) == 1
    begun = [ticket for one in running if one.ask.adapter not in open_still for ticket in world.end(one)]
    assert begun == waiting


def test_drain_ends_when_nobody_needs_it_any_more() -> None:
    world = World(Rules(max_wait_s=5), slots=1)
    world.ask("a")
    waiting = world.ask("b")
    world.wait(5)
    held_back = world.ask("a")
    assert held_back in world.queued
    assert world.hang_up(waiting) == [held_back]


def test_seats_are_kept_for_a_large_request_that_waited_too_long() -> None:
    world = World(Rules(max_wait_s=5), seats=3)
    first, second, third = (world.ask() for _ in range(3))
    large = world.ask("a", seats=3)
    world.wait(5)
    world.end(first)
    small = world.ask("b")
    assert small in world.queued
    assert world.end(second) == []
    assert world.end(third) == [large]


def test_flood_that_waits_too_long_all_together_does_not_hold_up_who_was_served_less() -> None:
    world = World(Rules(max_wait_s=5), seats=1)
    running = world.ask(tenant="flood")
    flood = [world.ask(tenant="flood") for _ in range(50)]
    world.wait(20)
    (running,) = world.end(running)
    other = world.ask(tenant="other")
    assert other in world.queued
    (running,) = world.end(running)
    begun = [running, *world.end(running)]
    assert other in begun
    assert flood[2] in world.queued


# Deadlines and limits


def test_request_expires_at_its_deadline_and_one_that_comes_late_at_once() -> None:
    world = World(seats=1)
    world.ask()
    waiting = world.ask(deadline_at=3.0)
    world.wait(2.9)
    assert world.expired == []
    world.wait(0.1)
    assert world.expired == [waiting]
    late = world.ask(deadline_at=2.0)
    assert world.expired == [waiting, late]


def test_retry_after_is_the_time_in_which_the_queue_will_have_been_answered() -> None:
    world = World(Rules(max_queue=40, max_queue_per_tenant=20), seats=2)
    for _ in range(2):
        world.ask(tenant="x")
    for _ in range(120):  # two answers a second
        world.now += 0.5
        world.end(next(iter(world.running)))
        world.ask(tenant="x")
    for tenant in "xy":
        for _ in range(20):
            world.ask(tenant=tenant)
    world.ask(tenant="x")
    world.ask(tenant="z")
    by_tenant, by_all = world.refused
    assert (by_tenant.reason, by_tenant.waiting) == ("tenant_queue_full", 20)
    assert by_tenant.retry_after_s == pytest.approx(20, abs=1), "two a second, shared by two"
    assert (by_all.reason, by_all.waiting) == ("queue_full", 40)
    assert by_all.retry_after_s == pytest.approx(20, abs=1)


def test_retry_after_of_an_engine_that_was_idle_before_is_no_longer_than_of_a_busy_one() -> None:
    world = World(Rules(max_queue=40), seats=2)
    for _ in range(2):  # each takes a second, and then there is nothing to do for a long time
        first, second = world.ask(), world.ask()
        world.now += 1.0
        world.end(first)
        world.end(second)
        world.now += 10_000.0
    for _ in range(43):
        world.ask()
    assert [refused.retry_after_s for refused in world.refused] == [20]


def test_retry_after_of_an_engine_that_answered_nothing_yet_is_a_guess() -> None:
    world = World(Rules(max_queue=1), seats=1)
    for _ in range(3):
        world.ask()
    assert world.refused[0].retry_after_s == 10


def test_full_queue_does_not_refuse_what_needs_not_wait() -> None:
    world = World(Rules(max_queue=1), slots=1)
    world.ask("a")
    world.ask("b")
    assert world.ask("a") in world.running
    assert world.refused == []


# Pins and restarts


def test_pin_takes_a_slot_for_ever_and_unpin_gives_it_back() -> None:
    world = World(slots=2)
    world.pin("p")
    assert world.pinned == {"p"}
    first = world.ask("a")
    waiting = world.ask("b")
    assert waiting in world.queued
    assert world.ask("p") in world.running
    assert world.unpin("q") == []
    world.end(next(ticket for ticket in world.running if ticket.ask.adapter == "p"))
    assert world.unpin("p") == [waiting]
    assert first in world.running


def test_pin_drains_a_slot_before_all_requests_and_one_slot_always_stays() -> None:
    world = World(slots=2)
    first, second = world.ask("a"), world.ask("b")
    waiting = world.ask("c")
    world.pin("p")
    assert world.pinned == set()
    assert world.ask("a") in world.queued, "its slot is being drained for the pin"
    world.end(first)
    assert world.pinned == {"p"}
    assert not world.policy.can_pin("q")
    with pytest.raises(ValueError, match="1 of 2 slots are pinned: one must stay free"):
        world.pin("q")
    world.pins_wanted.clear()
    begun = world.end(second)
    assert waiting in begun or waiting in world.queued
    assert len(world.running) == 1


def test_restart_forgets_what_ran_and_keeps_who_waits_and_the_pins() -> None:
    world = World(slots=2, seats=2)
    world.pin("p")
    lost = [world.ask("a"), world.ask("p")]
    waiting = [world.ask("b"), world.ask("c", seats=2)]
    assert world.restart(2, 1) == waiting[:1]
    assert world.pinned == {"p"}
    assert world.end(waiting[0]) == waiting[1:], "two seats are as many as there are now"
    assert all(ticket.state == "gone" for ticket in lost)


def test_restart_with_fewer_slots_drops_the_latest_pins() -> None:
    world = World(slots=4)
    for name in "pqr":
        world.pin(name)
    world.restart(2, 10)
    assert world.policy.pins == ("p",)


# Gathering


def test_adapter_gathers_before_it_takes_a_scarce_slot_and_no_longer_than_it_may() -> None:
    world = World(Rules(gather_s=1.0), slots=1)
    first = world.ask("a")
    waiting = world.ask("b")
    assert world.end(first) == [waiting], "nobody else wanted the slot: it was not scarce any more"
    third = world.ask("c")
    world.ask("d")
    assert world.end(waiting) == [], "two want it, and both gather"
    assert world.wait(0.9) == []
    assert world.wait(0.1) == [third]
