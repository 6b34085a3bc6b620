"""What an order of admission is worth, without an engine: policies on a model of one, in simulated time.

    python benchmarks/admission_simulation.py [--seconds 300]

The engine gives every running sequence one token a step; a step takes 5 ms, 0.25 ms a sequence, and where adapters
run 5 ms and 0.35 ms for each (fitted to the tokens/s measured on two cores, see docs/decisions.md). Clients ask again
as soon as they are answered. The policies: `stock` is vLLM's own order (oldest first, skipping whom no slot can take),
`fifo` the oldest alone, `longest` gives a free slot to the adapter with the most requests; `ours` is
`serve/loradock_serve/admission.py`. Prints a table for each traffic, then what a decision of ours costs in CPU time,
then one JSON line.
"""

import argparse
import heapq
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from loradock_serve.admission import Admission
from loradock_serve.config import AdmissionConfig
from loradock_serve.tickets import Ask, Begin, Limits, Ticket

PROMPT_TOKENS = 16


@dataclass(eq=False)
class Request:
    """One request, of the client that asks again when it is answered."""

    tenant: str
    adapter: str
    tokens: int
    arrived_at: float
    begun_at: float = 0.0
    left: int = 0
    ticket: Ticket | None = None


class Policy(Protocol):
    """Who goes when."""

    def arrive(self, request: Request, at: float) -> list[Request]: ...
    def finish(self, request: Request, at: float) -> list[Request]: ...
    def tick(self, at: float) -> list[Request]: ...


class InOrder:
    """The baselines: a list of those who wait, walked in some order."""

    def __init__(self, slots: int, seats: int, kind: str) -> None:
        self.slots, self.seats, self.kind = slots, seats, kind
        self.waiting: list[Request] = []
        self.running: Counter[str] = Counter()
        self.count = 0

    def arrive(self, request: Request, at: float) -> list[Request]:
        self.waiting.append(request)
        return self._go()

    def finish(self, request: Request, at: float) -> list[Request]:
        self.count -= 1
        self.running[request.adapter] -= 1
        if not self.running[request.adapter]:
            del self.running[request.adapter]
        return self._go()

    def tick(self, at: float) -> list[Request]:
        return []

    def _go(self) -> list[Request]:
        begun = []
        order = self.waiting
        if self.kind == "longest":
            lengths = Counter(request.adapter for request in self.waiting)
            order = sorted(self.waiting, key=lambda request: (-lengths[request.adapter], request.adapter))
        for request in order:
            if self.count >= self.seats:
                break
            if request.adapter in self.running or len(self.running) < self.slots:
                self.running[request.adapter] += 1
                self.count += 1
                begun.append(request)
            elif self.kind == "fifo":
                break
        gone = set(map(id, begun))
        self.waiting = [request for request in self.waiting if id(request) not in gone]
        return begun


class Ours:
    """The gateway's policy."""

    def __init__(self, slots: int, seats: int, **config: float) -> None:
        self.policy = Admission(AdmissionConfig(**config), Limits(slots, seats))  # type: ignore[arg-type]
        self.requests: dict[Ticket, Request] = {}

    def arrive(self, request: Request, at: float) -> list[Request]:
        ask = Ask(request.tenant, request.adapter, PROMPT_TOKENS)
        request.ticket = Ticket(ask, at)
        self.requests[request.ticket] = request
        return self._begun(self.policy.arrive(request.ticket, at))

    def finish(self, request: Request, at: float) -> list[Request]:
        assert request.ticket is not None
        del self.requests[request.ticket]
        return self._begun(self.policy.finish(request.ticket, at, (PROMPT_TOKENS, request.tokens)))

    def tick(self, at: float) -> list[Request]:
        wake_at = self.policy.wake_at
        return self._begun(self.policy.tick(at)) if wake_at is not None and wake_at <= at else []

    def _begun(self, decisions: list[Any]) -> list[Request]:
        return [self.requests[decision.ticket] for decision in decisions if isinstance(decision, Begin)]


def step_s(running: int, adapters: int) -> float:
    """How long the engine takes for one token of each."""
    return (5 + 0.25 * running + (5 + 0.35 * adapters if adapters else 0)) / 1000


@dataclass
class Outcome:
    """What a policy made of a traffic."""

    tokens: int = 0
    waits: dict[str, list[float]] = field(default_factory=dict)
    served: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Traffic:
    """Clients, as (tenant, adapters to choose from, pause between requests), and the engine's room."""

    name: str
    clients: list[tuple[str, list[str], float]]
    slots: int
    seats: int


def simulate(traffic: Traffic, policy: Policy, seconds: float, seed: int = 1) -> Outcome:
    """Run it; the first tenth does not count."""
    choose, outcome = random.Random(seed), Outcome()
    now, number = 0.0, 0
    coming: list[tuple[float, int, int]] = [(choose.random(), client, client) for client in range(len(traffic.clients))]
    heapq.heapify(coming)
    running: list[Request] = []
    clients: dict[int, int] = {}

    def begin(begun: list[Request]) -> None:
        for request in begun:
            request.begun_at, request.left = now, request.tokens
            running.append(request)

    while now < seconds:
        while coming and coming[0][0] <= now:
            _, _, client = heapq.heappop(coming)
            tenant, adapters, _ = traffic.clients[client]
            request = Request(tenant, choose.choice(adapters), choose.randint(16, 80), now)
            clients[id(request)] = client
            begin(policy.arrive(request, now))
        begin(policy.tick(now))
        if not running:
            now = max(now + 0.001, min(coming[0][0], now + 0.01) if coming else 0.0)
            continue
        now += step_s(len(running), len({request.adapter for request in running}))
        for request in running:
            request.left -= 1
        ended = [request for request in running if not request.left]
        running = [request for request in running if request.left]
        for request in ended:
            if request.arrived_at > seconds / 10:
                outcome.waits.setdefault(request.tenant, []).append(request.begun_at - request.arrived_at)
            if now > seconds / 10:
                outcome.tokens += request.tokens
                outcome.served[request.tenant] += request.tokens
            number += 1
            client = clients.pop(id(request))
            heapq.heappush(coming, (now + traffic.clients[client][2], len(clients) + number, client))
            begin(policy.finish(request, now))
    return outcome


def traffics() -> list[Traffic]:
    """The cases of the table."""
    names = [f"a{n}" for n in range(64)]
    flood = [("flood", ["a0"], 0.0)] * 200 + [("other", ["a1"], 1.0)]
    wide_flood = [("flood", names, 0.0)] * 200 + [("other", ["b"], 1.0)]
    return [
        Traffic("64 in flight, 8 adapters, 4 slots", [("t", names[:8], 0.0)] * 64, 4, 64),
        Traffic("64 in flight, 16 adapters, 4 slots", [("t", names[:16], 0.0)] * 64, 4, 64),
        Traffic("64 in flight, 64 adapters, 4 slots", [("t", names, 0.0)] * 64, 4, 64),
        Traffic("flood of 200 on one adapter, 64 slots", flood, 64, 64),
        Traffic("flood of 200 on 64 adapters, 4 slots", wide_flood, 4, 64),
    ]


POLICIES: dict[str, Callable[[Traffic], Policy]] = {
    "stock": lambda traffic: InOrder(traffic.slots, traffic.seats, "stock"),
    "fifo": lambda traffic: InOrder(traffic.slots, traffic.seats, "fifo"),
    "longest": lambda traffic: InOrder(traffic.slots, traffic.seats, "longest"),
    "ours": lambda traffic: Ours(traffic.slots, traffic.seats),
    "ours, max_wait_s 2": lambda traffic: Ours(traffic.slots, traffic.seats, max_wait_s=2.0),
    "ours, never drains": lambda traffic: Ours(traffic.slots, traffic.seats, max_wait_s=1e9),
    "ours, gather_s 0.2": lambda traffic: Ours(traffic.slots, traffic.seats, gather_s=0.2),
    "ours, gather_s 1": lambda traffic: Ours(traffic.slots, traffic.seats, gather_s=1.0),
}


def row(traffic: Traffic, name: str, outcome: Outcome, seconds: float) -> dict[str, Any]:
    """One policy on one traffic."""
    waits = sorted(wait for tenant in outcome.waits.values() for wait in tenant)
    others = sorted(outcome.waits.get("other", []))
    return {
        "traffic": traffic.name,
        "policy": name,
        "tokens_per_s": round(outcome.tokens / (0.9 * seconds)),
        "median_wait_s": round(waits[len(waits) // 2], 2),
        "p99_wait_s": round(waits[int(len(waits) * 0.99)], 2),
        "longest_wait_s": round(waits[-1], 2),
        "other_p99_wait_s": round(others[int(len(others) * 0.99)], 2) if others else None,
    }


def cost_us(tenants: int, max_wait_s: float, events: int = 10_000) -> dict[str, float]:
    """CPU time of an arrival and of an end (with what begins instead), 4,000 requests for 1,000 adapters waiting for 64
    slots and 256 seats."""
    choose = random.Random(0)
    config = AdmissionConfig(max_wait_s=max_wait_s, max_queue=10**6, max_queue_per_tenant=10**6)
    policy, running = Admission(config, Limits(64, 256)), list[Ticket]()
    took_ns = {"arrive": 0, "finish": 0}

    def one(kind: str, event: Callable[..., list[Any]], *arguments: Any) -> None:
        began = time.thread_time_ns()
        decisions = event(*arguments)
        took_ns[kind] += time.thread_time_ns() - began
        running.extend(decision.ticket for decision in decisions if isinstance(decision, Begin))

    def arrive(now: float) -> None:
        ticket = Ticket(Ask(f"t{choose.randrange(tenants)}", f"a{choose.randrange(1000)}", 100), now)
        one("arrive", policy.arrive, ticket, now)

    now = 0.0
    while policy.queued < 4000:
        now += 0.001
        arrive(now)
    took_ns.update(arrive=0, finish=0)
    for _ in range(events):
        now += 0.001
        one("finish", policy.finish, running.pop(choose.randrange(len(running))), now, (100, 50))
        arrive(now)
    return {kind: round(ns / 1000 / events, 1) for kind, ns in took_ns.items()}


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=300.0, help="simulated seconds for each cell, at least 60")
    seconds = parser.parse_args().seconds
    if seconds < 60:
        parser.error(f"--seconds {seconds:g}: the longest waits are 40 s, so below 60 some cells would be empty")
    rows = []
    for traffic in traffics():
        print(f"\n{traffic.name}\n{'policy':<20} tokens/s  median wait  p99 wait  longest  other's p99")
        for name, make in POLICIES.items():
            cell = row(traffic, name, simulate(traffic, make(traffic), seconds), seconds)
            rows.append(cell)
            print(
                f"{name:<20}{cell['tokens_per_s']:>9}{cell['median_wait_s']:>13}{cell['p99_wait_s']:>10}"
                f"{cell['longest_wait_s']:>9}{cell['other_p99_wait_s']!s:>13}"
            )
    print("\nµs of CPU time, 4,000 requests for 1,000 adapters waiting for 64 slots")
    costs = []
    for what, tenants, max_wait_s in (("1 tenant", 1, 1e9), ("100 tenants", 100, 1e9), ("100, all overdue", 100, 2.0)):
        costs.append({"case": what} | cost_us(tenants, max_wait_s))
        print(f"{what:<20}{costs[-1]['arrive']:>8} an arrival{costs[-1]['finish']:>8} an end")
    print(json.dumps({"benchmark": "admission_simulation", "seconds": seconds, "rows": rows, "cost_us": costs}))


if __name__ == "__main__":
    main()
