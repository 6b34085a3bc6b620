"""An admission policy, its events, and a plain model of what must hold after each of them.

The model knows every request and looks at all of them after every event: slow, and with none of the policy's own
structures in it.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from loradock_serve.admission import Admission
from loradock_serve.fair_share import cost
from loradock_serve.slots import UNLIMITED
from loradock_serve.tickets import Ask, Begin, Decision, Expire, Limits, PinHolds, Refuse, Ticket


@dataclass(frozen=True)
class Rules:
    """An `AdmissionConfig` without a config."""

    max_wait_s: float = 10.0
    max_queue: int = 10**6
    max_queue_per_tenant: int = 10**6
    weights: Mapping[str, float] = field(default_factory=dict)
    gather_s: float = 0.0


class World:
    """Time, the policy, and what is where."""

    def __init__(self, rules: Rules | None = None, slots: int = UNLIMITED, seats: int = UNLIMITED) -> None:
        self.rules = rules or Rules()
        self.policy = Admission(self.rules, Limits(slots, seats))
        self.now = 0.0
        self.queued: dict[Ticket, None] = {}
        self.running: dict[Ticket, None] = {}
        self.begun: list[Ticket] = []
        self.expired: list[Ticket] = []
        self.refused: list[Refuse] = []
        self.pinned: set[str] = set()
        self.pins_wanted: set[str] = set()
        self.served: Counter[str] = Counter()

    # Events

    def ask(
        self,
        adapter: str | None = None,
        tenant: str = "t",
        *,
        tokens: float = 10,
        seats: int = 1,
        priority: int = 0,
        deadline_at: float | None = None,
    ) -> Ticket:
        """A request arrives."""
        ticket = Ticket(Ask(tenant, adapter, tokens, seats, priority, deadline_at), self.now)
        self.queued[ticket] = None
        self._do(self.policy.arrive(ticket, self.now))
        return ticket

    def end(self, ticket: Ticket, usage: tuple[int, int] | None = (10, 10)) -> list[Ticket]:
        """A request that runs ends; what begins instead."""
        del self.running[ticket]
        self.served[ticket.ask.tenant] += int(cost(*usage)) if usage else 0
        return self._do(self.policy.finish(ticket, self.now, usage))

    def hang_up(self, ticket: Ticket) -> list[Ticket]:
        """The client of one that waits goes away."""
        del self.queued[ticket]
        return self._do(self.policy.cancel(ticket, self.now))

    def wait(self, seconds: float) -> list[Ticket]:
        """Time goes by, with every alarm that the policy asks for; what begins meanwhile."""
        until, begun = self.now + seconds, []
        while (wake_at := self.policy.wake_at) is not None and wake_at <= until:
            self.now = max(self.now, wake_at)
            begun += self._do(self.policy.tick(self.now))
        self.now = until
        return begun

    def pin(self, adapter: str) -> list[Ticket]:
        self.pins_wanted.add(adapter)
        return self._do(self.policy.pin(adapter, self.now))

    def unpin(self, adapter: str) -> list[Ticket]:
        self.pins_wanted.discard(adapter)
        self.pinned.discard(adapter)
        return self._do(self.policy.unpin(adapter, self.now))

    def restart(self, slots: int, seats: int) -> list[Ticket]:
        """The engine starts anew; what ran on it is gone."""
        lost = list(self.running)
        self.running = {}
        self.pins_wanted, self.pinned = self.pins_wanted | self.pinned, set()
        begun = self._do(self.policy.restart(Limits(slots, seats), self.now))
        self.pins_wanted &= set(self.policy.pins)
        for ticket in lost:
            begun += self._do(self.policy.finish(ticket, self.now))
        return begun

    def _do(self, decisions: list[Decision]) -> list[Ticket]:
        begun = []
        for decision in decisions:
            if isinstance(decision, PinHolds):
                self.pins_wanted.remove(decision.adapter)
                self.pinned.add(decision.adapter)
                continue
            del self.queued[decision.ticket]  # KeyError: decided twice, or about a request that is gone
            if isinstance(decision, Begin):
                assert decision.ticket.ask.deadline_at is None or decision.ticket.ask.deadline_at > self.now
                self.running[decision.ticket] = None
                begun.append(decision.ticket)
            elif isinstance(decision, Expire):
                self.expired.append(decision.ticket)
            else:
                self.refused.append(decision)
        self.begun += begun
        self.check()
        return begun

    # What must hold

    @property
    def adapters(self) -> set[str]:
        """Those that have a slot because something runs on them, or because they are pinned."""
        return {ticket.ask.adapter for ticket in self.running if ticket.ask.adapter is not None} | self.pinned

    @property
    def used_seats(self) -> int:
        return sum(ticket.seats for ticket in self.running)

    def is_overdue(self, ticket: Ticket) -> bool:
        return ticket.arrived_at + self.rules.max_wait_s <= self.now

    def check(self) -> None:
        """Slots and seats; nothing lost; and that capacity idles only for somebody who waited too long, or a pin."""
        limits = self.policy.limits
        assert len(self.adapters) <= limits.slots
        assert self.used_seats <= limits.seats
        assert self.policy.queued == len(self.queued)
        assert all(ticket.state == "queued" for ticket in self.queued)
        if self.rules.gather_s or self.pins_wanted or any(map(self.is_overdue, self.queued)):
            return
        heads: dict[object, Ticket] = {}
        for ticket in self.queued:
            flow = (ticket.ask.tenant, ticket.ask.adapter)
            head = heads.setdefault(flow, ticket)
            if (ticket.ask.priority, ticket.number) < (head.ask.priority, head.number):
                heads[flow] = ticket
        assert not any(map(self.could_go, heads.values())), "capacity idles"

    def could_go(self, ticket: Ticket) -> bool:
        """Whether there is room for a request, whoever else wants it."""
        adapter = ticket.ask.adapter
        has_slot = adapter is None or adapter in self.adapters or len(self.adapters) < self.policy.limits.slots
        return has_slot and self.used_seats + ticket.seats <= self.policy.limits.seats
