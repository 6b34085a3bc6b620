"""Requests that wait, ordered so that the next one is found without looking at the others.

A flow is what one tenant has waiting for one adapter, first come first served within a priority. Flows stand in
pools: those whose adapter is open, and those that need a slot, by the seats that their first request needs. In each
pool tenants are ordered by priority and counter, and each tenant's flows by priority and their own count of service.
One `Line` holds the requests that wait in the ordinary way, another those that have waited too long, in which
priorities count no more and a tenant's oldest request is its first. Decides nothing; has no clock.
"""

from heapq import heapify, heappop, heappush
from typing import Literal

from loradock_serve.fair_share import Tenant
from loradock_serve.lazy_heap import SLACK, Key, LazyHeap
from loradock_serve.slots import UNLIMITED, Adapter
from loradock_serve.tickets import Ticket


class _Flow:
    __slots__ = ("adapter", "heap", "key", "pool", "served", "size", "tenant")

    def __init__(self, tenant: Tenant, adapter: Adapter) -> None:
        self.tenant = tenant
        self.adapter = adapter
        self.heap: list[tuple[int, int, Ticket]] = []
        self.size = 0
        self.served = tenant.flow_clock
        self.pool: _Pool | None = None
        self.key: Key = ()

    def order(self) -> Key:
        """What flows of different tenants are compared by."""
        return (self.key[0], self.tenant.counter, self.key[1])


class _Pool:
    """Flows between which only the order decides."""

    __slots__ = ("flows", "kind", "seats", "tenants")

    def __init__(self, kind: str, seats: int) -> None:
        self.kind = kind
        self.seats = seats
        self.flows: dict[Tenant, LazyHeap[_Flow]] = {}
        self.tenants: LazyHeap[Tenant] = LazyHeap()

    def put(self, flow: _Flow) -> None:
        self.flows.setdefault(flow.tenant, LazyHeap()).put(flow, flow.key)
        self.rank(flow.tenant)

    def drop(self, flow: _Flow) -> None:
        self.flows[flow.tenant].drop(flow)
        self.rank(flow.tenant)

    def rank(self, tenant: Tenant) -> None:
        """Put a tenant where its counter and its best flow say."""
        key = self.flows[tenant].first_key()
        if key is None:
            del self.flows[tenant]
            self.tenants.drop(tenant)
        else:
            self.tenants.put(tenant, (key[0], tenant.counter, key[2]))

    def first(self) -> _Flow | None:
        tenant = self.tenants.first()
        return None if tenant is None else self.flows[tenant].first()


class Line:
    """See the top of the file."""

    def __init__(self, *, overdue: bool) -> None:
        self._overdue = overdue
        self._pools: dict[str, dict[int, _Pool]] = {"open": {}, "waiting": {}}
        self._flows: dict[Adapter, dict[Tenant, _Flow]] = {}
        self._homes: dict[Tenant, dict[_Pool, int]] = {}
        self._size = 0
        self.claims: dict[Adapter, None] = {}
        """Adapters that are waited for here and cannot be begun without a slot."""

    def __len__(self) -> int:
        return self._size

    def waits_for(self, adapter: Adapter) -> bool:
        """Whether anything here waits for the adapter."""
        return adapter in self._flows

    def add(self, ticket: Ticket) -> None:
        """One more."""
        tenant, adapter = ticket.tenant, ticket.adapter
        flows = self._flows.get(adapter)
        if flows is None:
            flows = self._flows[adapter] = {}
            if adapter.place != "open":
                self.claims[adapter] = None
        flow = flows.get(tenant)
        if flow is None:
            flow = flows[tenant] = _Flow(tenant, adapter)
        heappush(flow.heap, (0 if self._overdue else ticket.ask.priority, ticket.number, ticket))
        flow.size += 1
        self._size += 1
        ticket.line = self
        if flow.heap[0][2] is ticket:
            self._place(flow)

    def remove(self, ticket: Ticket, service: float = 0.0) -> None:
        """Take one out, charging its flow with the service that it is about to have."""
        flow = self._flows[ticket.adapter][ticket.tenant]
        ticket.line = None
        flow.size -= 1
        self._size -= 1
        if service:
            flow.tenant.flow_clock = max(flow.tenant.flow_clock, flow.served)
            flow.served += service
        heap = flow.heap
        while heap and heap[0][2].line is not self:
            heappop(heap)
        if len(heap) > 2 * flow.size + SLACK:
            flow.heap = [entry for entry in heap if entry[2].line is self]
            heapify(flow.heap)
        if flow.size:
            self._place(flow)
        else:
            self._end(flow)

    def charge(self, tenant: Tenant, adapter: Adapter, service: float) -> None:
        """Count service for a flow, if there is one."""
        flow = self._flows.get(adapter, {}).get(tenant)
        if flow is not None:
            flow.served += service
            self._place(flow)

    def moved(self, adapter: Adapter) -> None:
        """The adapter's place changed."""
        flows = self._flows.get(adapter)
        if flows is None:
            return
        if adapter.place == "open":
            self.claims.pop(adapter, None)
        else:
            self.claims[adapter] = None
        for flow in flows.values():
            self._place(flow)

    def rank(self, tenant: Tenant) -> None:
        """The tenant's counter changed."""
        for pool in self._homes.get(tenant, ()):
            pool.rank(tenant)

    def first(self, seats: int, *, slot: bool) -> Ticket | None:
        """Who is next among those that need at most so many seats, and no slot, or a `slot` that there is.

        On equal terms one that needs none.
        """
        best = self._first("open", seats)
        if slot:
            other = self._first("waiting", seats)
            if other is not None and (best is None or other.order() < best.order()):
                best = other
        return None if best is None else best.heap[0][2]

    def first_claim(self) -> Ticket | None:
        """Who is next among those that need a slot, of overdue requests."""
        flow = self._first("waiting", UNLIMITED)
        return None if flow is None else flow.heap[0][2]

    def _first(self, kind: Literal["open", "waiting"], seats: int) -> _Flow | None:
        best: _Flow | None = None
        for pool in self._pools[kind].values():
            if pool.seats <= seats:
                flow = pool.first()
                if flow is not None and (best is None or flow.order() < best.order()):
                    best = flow
        return best

    def _place(self, flow: _Flow) -> None:
        """Put a flow into the pool that its adapter's place and its first request ask for."""
        priority, number, head = flow.heap[0]
        flow.key = (priority, number if self._overdue else flow.served, number)
        place = flow.adapter.place
        kind: str | None = place
        if self._overdue:
            kind = "open" if place == "open" else "waiting"
        elif place in ("gathering", "closed"):
            kind = None
        seats = 0 if self._overdue else head.seats
        old = flow.pool
        if old is not None and (old.kind != kind or old.seats != seats):
            self._leave(flow, old)
        if kind is not None:
            self._enter(flow, kind, seats)

    def _enter(self, flow: _Flow, kind: str, seats: int) -> None:
        pool = self._pools[kind].get(seats)
        if pool is None:
            pool = self._pools[kind][seats] = _Pool(kind, seats)
        if flow.pool is None:
            homes = self._homes.setdefault(flow.tenant, {})
            homes[pool] = homes.get(pool, 0) + 1
            flow.pool = pool
        pool.put(flow)

    def _leave(self, flow: _Flow, pool: _Pool) -> None:
        flow.pool = None
        pool.drop(flow)
        homes = self._homes[flow.tenant]
        homes[pool] -= 1
        if not homes[pool]:
            del homes[pool]
            if not homes:
                del self._homes[flow.tenant]
        if not pool.flows:
            del self._pools[pool.kind][pool.seats]

    def _end(self, flow: _Flow) -> None:
        if flow.pool is not None:
            self._leave(flow, flow.pool)
        flows = self._flows[flow.adapter]
        del flows[flow.tenant]
        if not flows:
            del self._flows[flow.adapter]
            self.claims.pop(flow.adapter, None)
