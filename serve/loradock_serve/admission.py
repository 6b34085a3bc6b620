"""Which request may go to an engine next: a pure policy. Events in, decisions out; time comes in with the events.

What holds at every moment:

- Never more distinct adapters in the engine than it has slots, pinned ones counted always; never more sequences than
  it runs at once. (A request that alone is larger than that counts as that.)
- Capacity idles only while it is kept for a request that waited longer than `max_wait_s` (or for a pin), or, where
  `gather_s` says so, while adapters gather requests before they take one of too few slots.
- Among what could go, lower `priority` first; then the tenant that was served least (`fair_share.py`); of that tenant
  the adapter that was served least; of that adapter the oldest request.

**Bounded waiting.** A request that waited `max_wait_s` is overdue. Its priority counts no more, no newer request of its
own tenant is put before it, and none of a tenant that was served as much or more. If its adapter has no slot, one is
drained for it: the slot whose latest request began longest ago is closed, for its own adapter's requests too; and as
many slots at once as overdue adapters need. Other slots go on meanwhile. Once it has a slot, free seats are kept for it
until there are enough. Let S be the longest time a request runs. With nobody before it, it begins within
`max_wait_s + S`. In general, in every 2 S after it became overdue (3 S where requests need several seats) it begins, or
an older one does, or one of a tenant that was served less, or a pin is made.

Tenants that were served less are let past on purpose. With more work than the engine can do, *every* request of whoever
sends most is overdue; strictly oldest first would then turn fairness into first come, first served. Whoever is let past
is charged, so that this ends.

**The service gap.** Let U = max(wp · longest prompt, wq · M), M being the most tokens the engine has in flight. Where
slots are not short, two tenants that wait all the while are served, in any interval and divided by their weights, the
same but for 2 U (the paper's bound; charges that come late, at a request's end, are in M, as are estimates that were
too high). Slots force more: a tenant whose adapters have none waits up to `max_wait_s + S` for one, however little
it was served, while others are served at the engine's rate R. So the gap is at most 2 U + R · (max_wait_s + S) for
each time that happens, and the counters give it back afterwards.

A pinned adapter holds its slot for ever. `pin` drains one if need be, before all requests; at most slots − 1 are
pinned. Decisions are carried out elsewhere (`turnstile.py`).
"""

import math
from collections.abc import Callable
from typing import TypeVar

from loradock_serve import fair_share
from loradock_serve.draining import drain
from loradock_serve.fair_share import FairShare, Tenant
from loradock_serve.lazy_heap import LazyHeap
from loradock_serve.lines import Line
from loradock_serve.pace import Pace
from loradock_serve.slots import UNLIMITED, Adapter, Slots
from loradock_serve.tickets import Begin, Decision, Expire, Limits, PinHolds, Refuse, Rules, Ticket

T = TypeVar("T")
NEVER = math.inf


class Admission:
    """The policy of one engine. Every event returns what is to be done now, in this order.

    Nothing happens between events but what `tick` at `wake_at` sees: becoming overdue, deadlines, the end of gathering.
    """

    def __init__(self, rules: Rules, limits: Limits) -> None:
        self._rules = rules
        self._share = FairShare(rules.weights)
        self._pace = Pace()
        self._generation = 0
        self._number = 0
        self._pins: dict[str, None] = {}
        self._tickets: dict[Ticket, None] = {}
        self._gathering: LazyHeap[Adapter] = LazyHeap()
        self._patience: LazyHeap[Ticket] = LazyHeap()
        self._deadlines: LazyHeap[Ticket] = LazyHeap()
        self._wake_at = NEVER
        self._begin_anew(limits)

    def _begin_anew(self, limits: Limits) -> None:
        self.limits = limits
        self.used_seats = 0
        self._fresh, self._overdue = Line(overdue=False), Line(overdue=True)
        self._slots = Slots(limits.slots, self._moved)
        self._pins_wanted: dict[str, None] = {}

    def _moved(self, adapter: Adapter) -> None:
        self._fresh.moved(adapter)
        self._overdue.moved(adapter)

    # What can be seen

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return len(self._tickets)

    @property
    def pins(self) -> tuple[str, ...]:
        """Adapters that are pinned, or are going to be."""
        return tuple(self._pins)

    @property
    def wake_at(self) -> float | None:
        """A time before which nothing happens by itself, and at which to `tick`; None where nothing will."""
        return self._wake_at if self._wake_at < NEVER else None

    # Events

    def arrive(self, ticket: Ticket, at: float) -> list[Decision]:
        """A request wants a turn."""
        ask = ticket.ask
        ticket.tenant = self._share.tenant(ask.tenant)
        ticket.adapter = self._slots.adapter(ask.adapter)
        ticket.seats = min(ask.seats, self.limits.seats)
        self._number += 1
        ticket.number = self._number
        if not self._tickets and self._goes_at_once(ticket, at):
            return [Begin(ticket)]
        self._enqueue(ticket)
        if ask.deadline_at is not None:
            self._deadlines.put(ticket, (ask.deadline_at,))
            self._wake_at = min(self._wake_at, ask.deadline_at)
        decided = self._decide(at)
        if ticket.state == "queued" and not ticket.returns and (refusal := self._refusal(ticket)) is not None:
            self._dequeue(ticket)
            decided.append(refusal)
        elif ticket.state == "queued" and ticket.line is self._fresh:
            self._gather_perhaps(ticket.adapter, at)
        return decided

    def finish(self, ticket: Ticket, at: float, usage: tuple[int, int] | None = None) -> list[Decision]:
        """A request ended, or its client went away while it ran. `usage`: prompt and output tokens, if the engine said.

        Where it did not, the tokens of the prompt stay estimated, and those of the answer follow from the time it ran.
        """
        if ticket.state == "queued":
            return self.cancel(ticket, at)
        if ticket.state != "running":
            return []
        ticket.state = "gone"
        tenant = ticket.tenant
        tenant.running -= 1
        took_s = at - ticket.begun_at
        self._pace.ended(at, took_s, usage[1] if usage is not None else None)
        if usage is None:
            outputs = ticket.seats * self._pace.output_tokens(took_s)
            usage_cost = fair_share.cost(ticket.ask.prompt_tokens, outputs)
        else:
            usage_cost = fair_share.cost(*usage)
        self._charge(ticket, usage_cost - ticket.charged)
        if ticket.generation == self._generation:
            self.used_seats -= ticket.seats
            self._slots.ended(ticket.adapter)
            self._slots.let_go(ticket.adapter)
        return self._decide(at)

    def cancel(self, ticket: Ticket, at: float) -> list[Decision]:
        """A client that waits went away."""
        if ticket.state != "queued":
            return self.finish(ticket, at)
        self._dequeue(ticket)
        return self._decide(at)

    def tick(self, at: float) -> list[Decision]:
        """Time went by."""
        return self._decide(at)

    def restart(self, limits: Limits, at: float) -> list[Decision]:
        """The engine was started anew: nothing runs on it, and nothing lies in its slots. Who waits goes on waiting.

        Pins are taken again, in the order they were made, as far as the new limits allow (`pins` tells).
        """
        waiting = list(self._tickets)
        pins = list(self._pins)[: max(0, limits.slots - 1)]
        self._generation += 1
        self._begin_anew(limits)
        self._gathering = LazyHeap()
        self._pins = dict.fromkeys(pins)
        self._pins_wanted = dict.fromkeys(pins)
        for ticket in waiting:
            overdue = ticket not in self._patience
            ticket.adapter = self._slots.adapter(ticket.ask.adapter)
            ticket.adapter.queued += 1
            ticket.seats = min(ticket.ask.seats, limits.seats)
            (self._overdue if overdue else self._fresh).add(ticket)
        return self._decide(at)

    def can_pin(self, adapter: str) -> bool:
        """Whether one more pin leaves a slot to everybody else."""
        return adapter in self._pins or len(self._pins) + 1 < self.limits.slots

    def pin(self, adapter: str, at: float) -> list[Decision]:
        """Keep a slot for an adapter; `PinHolds` says when it has it. ValueError where not `can_pin`."""
        if not self.can_pin(adapter):
            raise ValueError(f"{len(self._pins)} of {self.limits.slots} slots are pinned: one must stay free")
        if adapter not in self._pins:
            self._pins[adapter] = self._pins_wanted[adapter] = None
        elif adapter not in self._pins_wanted:
            return [PinHolds(adapter)]
        return self._decide(at)

    def unpin(self, adapter: str, at: float) -> list[Decision]:
        """As any other from now on; nothing happens where it was not pinned."""
        if adapter not in self._pins:
            return []
        del self._pins[adapter]
        if adapter in self._pins_wanted:
            del self._pins_wanted[adapter]
            self._slots.let_go(self._slots.adapter(adapter))
        else:
            self._slots.unpin(self._slots.adapter(adapter))
        return self._decide(at)

    # The queue

    def _goes_at_once(self, ticket: Ticket, at: float) -> bool:
        """Begin a request that nobody waits before, if there is room: the same as below, without the queue."""
        adapter, tenant, ask = ticket.adapter, ticket.tenant, ticket.ask
        if ticket.seats > self.limits.seats - self.used_seats:
            return False
        if ask.deadline_at is not None and ask.deadline_at <= at:
            return False
        if adapter.place != "open":
            if adapter.place == "closed" or self._pins_wanted or not self._slots.available:
                return False
            self._slots.take(adapter)
        self._share.passes(tenant)
        service = fair_share.cost(ask.prompt_tokens, 0)
        self._share.charge(tenant, service)
        self._runs(ticket, service, at)
        return True

    def _enqueue(self, ticket: Ticket) -> None:
        ticket.state = "queued"
        self._tickets[ticket] = None
        self._share.joins(ticket.tenant)
        ticket.adapter.queued += 1
        self._fresh.add(ticket)
        overdue_at = ticket.arrived_at + self._rules.max_wait_s
        self._patience.put(ticket, (overdue_at,))
        if overdue_at < self._wake_at:
            self._wake_at = overdue_at

    def _dequeue(self, ticket: Ticket, service: float = 0.0) -> None:
        """Out of the queue, whatever becomes of it."""
        line = ticket.line
        assert line is not None, "what is queued stands in a line"
        ticket.state = "gone"
        del self._tickets[ticket]
        self._patience.drop(ticket)
        self._deadlines.drop(ticket)
        line.remove(ticket, service)
        adapter = ticket.adapter
        adapter.queued -= 1
        self._share.leaves(ticket.tenant)
        if not adapter.queued:
            if adapter.place == "gathering":
                self._ripen(adapter)
            self._slots.let_go(adapter)

    def _refusal(self, ticket: Ticket) -> Refuse | None:
        tenant, rules = ticket.tenant, self._rules
        others, own = self.queued - 1, tenant.queued - 1
        if own >= rules.max_queue_per_tenant:
            share = tenant.weight / max(tenant.weight, self._share.waiting_weight)
            return Refuse(ticket, "tenant_queue_full", own, self._pace.retry_after_s(own, share))
        if others >= rules.max_queue:
            return Refuse(ticket, "queue_full", others, self._pace.retry_after_s(others, 1.0))
        return None

    def _gather_perhaps(self, adapter: Adapter, at: float) -> None:
        gathers = self._rules.gather_s > 0 and adapter.place == "waiting" and adapter.queued == 1
        if gathers and self._slots.are_scarce and not self._overdue.waits_for(adapter):
            self._slots.gather(adapter, gathers=True)
            self._gathering.put(adapter, (at + self._rules.gather_s,))
            self._wake_at = min(self._wake_at, at + self._rules.gather_s)

    def _ripen(self, adapter: Adapter) -> None:
        self._gathering.drop(adapter)
        if adapter.place == "gathering":
            self._slots.gather(adapter, gathers=False)

    # Deciding

    def _decide(self, at: float) -> list[Decision]:
        decided: list[Decision] = []
        if at >= self._wake_at:
            self._age(at, decided)
        while self._gathering and not self._slots.are_scarce:
            self._ripen_first()
        while True:
            if self._pins_wanted:
                self._pin_what_fits(decided)
            while self._tickets and (ticket := self._next()) is not None:
                self._begin(ticket, at)
                decided.append(Begin(ticket))
            may_drain = self._overdue.claims or self._slots.closing or self._pins_wanted
            if not may_drain or not drain(self._slots, self._overdue, len(self._pins_wanted)):
                return decided

    def _age(self, at: float, decided: list[Decision]) -> None:
        def expire(ticket: Ticket) -> None:
            self._dequeue(ticket)
            decided.append(Expire(ticket))

        _due(self._deadlines, at, expire)
        _due(self._patience, at, self._becomes_overdue)
        _due(self._gathering, at, self._ripen)
        heaps: tuple[LazyHeap[Ticket] | LazyHeap[Adapter], ...] = (self._patience, self._deadlines, self._gathering)
        self._wake_at = min((key[0] for heap in heaps if (key := heap.first_key()) is not None), default=NEVER)

    def _ripen_first(self) -> None:
        adapter = self._gathering.first()
        assert adapter is not None, "somebody gathers"
        self._ripen(adapter)

    def _becomes_overdue(self, ticket: Ticket) -> None:
        self._patience.drop(ticket)
        self._fresh.remove(ticket)
        self._overdue.add(ticket)

    def _next(self) -> Ticket | None:
        """The request that is to begin now."""
        free = self.limits.seats - self.used_seats
        if free <= 0:
            return None
        slot = self._slots.available > 0
        fresh = self._fresh.first(free, slot=slot)
        if self._overdue:
            late = self._overdue.first(UNLIMITED, slot=slot)
            if late is not None and (fresh is None or late.tenant.counter <= fresh.tenant.counter):
                return late if late.seats <= free else None  # what is free is kept for it
        return fresh

    def _begin(self, ticket: Ticket, at: float) -> None:
        adapter, tenant = ticket.adapter, ticket.tenant
        if adapter.place != "open":
            self._ripen(adapter)
            self._slots.take(adapter)
        service = fair_share.cost(ticket.ask.prompt_tokens, 0)
        was_overdue = ticket.line is self._overdue
        self._share.charge(tenant, service)
        self._dequeue(ticket, service / tenant.weight)
        if tenant.queued:
            if was_overdue:
                self._fresh.charge(tenant, adapter, service / tenant.weight)
            self._rank(tenant)
        self._runs(ticket, service, at)

    def _runs(self, ticket: Ticket, service: float, at: float) -> None:
        ticket.charged = service
        ticket.state, ticket.begun_at, ticket.generation = "running", at, self._generation
        ticket.tenant.running += 1
        self._pace.began()
        self.used_seats += ticket.seats
        self._slots.begins(ticket.adapter, at)

    def _charge(self, ticket: Ticket, service: float) -> None:
        tenant = ticket.tenant
        self._share.charge(tenant, service)
        if tenant.queued:
            self._fresh.charge(tenant, ticket.adapter, service / tenant.weight)
            self._rank(tenant)

    def _rank(self, tenant: Tenant) -> None:
        self._fresh.rank(tenant)
        if self._overdue:
            self._overdue.rank(tenant)

    # Slots for those who waited too long

    def _pin_what_fits(self, decided: list[Decision]) -> None:
        for name in list(self._pins_wanted):
            adapter = self._slots.adapter(name)
            if adapter.place != "open":
                if adapter.place != "closed" and not self._slots.available:
                    continue
                self._ripen(adapter)
                self._slots.take(adapter)
            self._slots.pin(adapter)
            del self._pins_wanted[name]
            decided.append(PinHolds(name))


def _due(heap: LazyHeap[T], at: float, then: Callable[[T], None]) -> None:
    """Do it to every item whose time has come; it takes the item out."""
    while (key := heap.first_key()) is not None and key[0] <= at:
        item = heap.first()
        assert item is not None, "there is a first key"
        then(item)
