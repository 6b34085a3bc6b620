"""The admission policy under random traffic: every event is checked against a plain model (`admission_world.py`)."""

import random
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loradock_serve.fair_share import cost
from loradock_serve.tickets import Ticket
from loradock_testing.admission_world import Rules, World

EVENTS = ["ask", "wait", "hang up", "pin", "unpin", "deadline", "restart"]
SEEDS = st.integers(0, 2**32)


class Traffic:
    """Random requests that run for random times of at most `longest_s`, on a world."""

    def __init__(self, world: World, seed: int, longest_s: float = 5.0) -> None:
        self.world = world
        self.random = random.Random(seed)
        self.longest_s = longest_s
        self.ends: dict[Ticket, float] = {}
        self.adapters = [None, *"abcdefgh"]
        self.tenants = list("xyz")
        self.most_seats = 1
        self.priorities = [0]

    def ask(self) -> Ticket:
        choose = self.random
        ticket = self.world.ask(
            choose.choice(self.adapters),
            choose.choice(self.tenants),
            tokens=choose.choice([1, 10, 100]),
            seats=choose.randint(1, self.most_seats),
            priority=choose.choice(self.priorities),
        )
        self._note(self.world.begun)
        return ticket

    def _note(self, begun: list[Ticket]) -> None:
        for ticket in begun:
            if ticket in self.world.running and ticket not in self.ends:
                self.ends[ticket] = self.world.now + self.random.uniform(0, self.longest_s)

    def go_on(self, seconds: float) -> None:
        """Time goes by: requests end when they do."""
        until = self.world.now + seconds
        while self.ends and min(self.ends.values()) <= until:
            ticket = min(self.ends, key=self.ends.__getitem__)
            self._note(self.world.wait(max(0.0, self.ends[ticket] - self.world.now)))
            del self.ends[ticket]
            if ticket in self.world.running:
                tokens = self.random.randint(1, 50)
                self._note(self.world.end(ticket, (tokens, tokens) if self.random.random() < 0.9 else None))
        self._note(self.world.wait(until - self.world.now))


@settings(max_examples=60)
@given(SEEDS, st.integers(2, 4), st.integers(1, 6), st.sampled_from([0.0, 0.5]), st.integers(1, 9))
def test_anything_may_happen_and_every_event_keeps_the_rules(
    seed: int, slots: int, seats: int, gather_s: float, most_seats: int
) -> None:
    world = World(Rules(max_wait_s=3.0, max_queue=40, max_queue_per_tenant=20, gather_s=gather_s), slots, seats)
    traffic = Traffic(world, seed, longest_s=2.0)
    traffic.most_seats, traffic.priorities = most_seats, [-1, 0, 0, 3]
    choose = traffic.random
    for _ in range(120):
        match choose.choices(
            ["ask", "wait", "hang up", "pin", "unpin", "deadline", "restart"], [8, 4, 1, 0.4, 0.5, 1, 0.1]
        )[0]:
            case "ask":
                traffic.ask()
            case "wait":
                traffic.go_on(choose.uniform(0, 1.5))
            case "hang up" if world.queued:
                world.hang_up(choose.choice(list(world.queued)))
            case "pin":
                adapter = choose.choice("abcdefgh")
                if world.policy.can_pin(adapter) and adapter not in world.policy.pins:
                    world.pin(adapter)
            case "unpin" if world.policy.pins:
                world.unpin(choose.choice(world.policy.pins))
            case "deadline":
                world.ask(choose.choice("abc"), deadline_at=world.now + choose.uniform(-0.5, 2))
            case "restart":
                world.restart(slots, seats)
        traffic._note(world.begun)
    for adapter in world.policy.pins:
        world.unpin(adapter)
    traffic._note(world.begun)
    traffic.go_on(1000)
    assert not world.queued, "somebody was forgotten"
    assert not world.running
    assert not world.policy._slots.closing
    assert world.policy.wake_at is None or world.policy.wake_at > world.now


@settings(max_examples=60)
@given(SEEDS, st.integers(1, 4), st.integers(2, 8), st.integers(1, 4), st.integers(1, 3), st.floats(0.02, 0.5))
def test_who_waited_max_wait_s_is_overtaken_no_more(
    seed: int, slots: int, seats: int, most_seats: int, tenants: int, pause_s: float
) -> None:
    """In every window after a request became overdue it begins, or an older one, or one of a tenant served less.

    The window is the longest service S where all are of one tenant and need one seat; one S more where counters of
    several tenants may change meanwhile, one more where seats have to be collected. From this the wait follows:
    `max_wait_s` and a window for each of those.
    """
    longest_s = 2.0
    world = World(Rules(max_wait_s=1.5), slots, seats)
    traffic = Traffic(world, seed, longest_s)
    traffic.most_seats, traffic.priorities = most_seats, [0, 0, 0, -5, 5]
    traffic.tenants = traffic.tenants[:tenants]
    window_s = longest_s * (1 + (tenants > 1) + (most_seats > 1))
    last_progress_at: dict[Ticket, float] = {}
    begin = world.policy._begin

    def begin_and_watch(ticket: Ticket, at: float) -> None:
        for late in [late for late in world.queued if late.state == "queued" and late.arrived_at + 1.5 <= at]:
            before = late is ticket or ticket.number < late.number or ticket.tenant.counter < late.tenant.counter
            if before:
                assert at - last_progress_at.get(late, late.arrived_at + 1.5) <= window_s + 1e-6
                last_progress_at[late] = at
        begin(ticket, at)

    world.policy._begin = begin_and_watch  # type: ignore[method-assign]
    for _ in range(80):
        traffic.ask()
        traffic.go_on(traffic.random.expovariate(1 / pause_s))
        for late in world.queued:
            since = last_progress_at.get(late, late.arrived_at + 1.5)
            assert world.now - since <= window_s + 1e-6, "nothing that may go first did, and neither did it"
    traffic.go_on(1000)
    assert not world.queued


@settings(max_examples=15)
@given(SEEDS, st.integers(1, 4), st.integers(0, 6))
def test_lone_adapter_among_steady_traffic_waits_max_wait_s_and_one_service(seed: int, slots: int, others: int) -> None:
    """The starvation that vLLM's own scheduler knows: all slots always busy with other adapters."""
    longest_s = 2.0
    world = World(Rules(max_wait_s=3.0), slots, seats=64)
    traffic = Traffic(world, seed, longest_s)
    traffic.adapters, traffic.tenants = [f"busy-{n}" for n in range(slots)], ["x"]
    traffic.priorities = [-1]
    for _ in range(100):
        traffic.ask()
        traffic.go_on(0.03)
    lone = [world.ask(f"lone-{n}", "x") for n in range(min(slots, others + 1))]
    while any(ticket in world.queued for ticket in lone):
        traffic.ask()
        traffic.go_on(0.03)
        assert world.now <= lone[0].arrived_at + 3.0 + longest_s + 0.03
    assert min(ticket.begun_at - ticket.arrived_at for ticket in lone) > 2.9, "nothing would have starved"


def backlogged_run(
    seed: int,
    weights: dict[str, float],
    tokens: dict[str, int],
    *,
    slots: int = 64,
    max_wait_s: float = 1e9,
    backlog: int = 8,
    events: int = 400,
) -> tuple[World, dict[str, list[float]]]:
    """Tenants that always have requests waiting; their service (by weight) after every event."""
    world = World(Rules(max_wait_s=max_wait_s, weights=weights), slots, seats=8)
    adapters = 4
    choose = random.Random(seed)
    served: dict[str, float] = defaultdict(float)
    history: dict[str, list[float]] = defaultdict(list)

    def fill() -> None:
        for tenant in weights:
            while sum(ticket.ask.tenant == tenant for ticket in world.queued) < backlog:
                world.ask(f"{choose.randrange(adapters)}", tenant, tokens=choose.uniform(0, 2) * tokens[tenant])

    fill()
    for _ in range(events):
        world.now += choose.random()
        ticket = choose.choice(list(world.running))
        tenant = ticket.ask.tenant
        usage = (choose.randint(1, tokens[tenant]), choose.randint(1, tokens[tenant]))
        world.end(ticket, usage)
        served[tenant] += cost(*usage) / weights[tenant]
        fill()
        for name in weights:
            history[name].append(served[name])
    return world, history


@settings(max_examples=40)
@given(SEEDS, st.sampled_from([1, 10, 100]), st.sampled_from([0.5, 1.0, 3.0]))
def test_two_backlogged_tenants_drift_apart_by_no_more_than_the_bound(seed: int, size: int, weight: float) -> None:
    tokens, weights = {"x": 10, "y": 10 * size}, {"x": 1.0, "y": weight}
    _, history = backlogged_run(seed, weights, tokens)
    # U: the most that 8 seats hold of one tenant, as charged when they end, or estimated when they begin (2 times).
    bound = max(8 * cost(tokens[name], tokens[name]) / weights[name] for name in weights)
    gaps = [one - other for one, other in zip(history["x"], history["y"], strict=True)]
    assert max(gaps) - min(gaps) <= 2 * bound


@pytest.mark.parametrize(("slots", "max_wait_s"), [(64, 1e9), (2, 3.0)])
def test_service_follows_the_weights(slots: int, max_wait_s: float) -> None:
    weights = {"x": 1.0, "y": 2.0, "z": 4.0}
    tokens = dict.fromkeys(weights, 20)
    _, history = backlogged_run(7, weights, tokens, slots=slots, max_wait_s=max_wait_s, backlog=48, events=3000)
    normalised = [history[name][-1] for name in weights]
    assert max(normalised) <= 1.1 * min(normalised), normalised


@settings(max_examples=60)
@given(SEEDS)
def test_of_one_tenant_adapter_and_priority_the_first_comes_first(seed: int) -> None:
    world = World(Rules(max_wait_s=2.0), slots=2, seats=3)
    traffic = Traffic(world, seed, longest_s=1.0)
    traffic.priorities = [0, 1]
    for _ in range(100):
        traffic.ask()
        traffic.go_on(traffic.random.uniform(0, 0.3))
    flows: dict[object, list[int]] = defaultdict(list)
    for ticket in world.begun:
        flows[(ticket.ask.tenant, ticket.ask.adapter, ticket.ask.priority)].append(ticket.number)
    assert len(world.begun) > 20
    assert all(numbers == sorted(numbers) for numbers in flows.values())
