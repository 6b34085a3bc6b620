"""Who has been served how much: virtual token counters (VTC, Sheng et al., OSDI'24, arXiv 2401.00588).

Every tenant has a counter of the tokens that were computed for it, divided by its weight; whoever waits with the
lowest counter is next. A tenant that begins to wait is lifted to the lowest counter of those that wait already: being
away saves nothing up. Knows nothing of slots, seats or queues, and has no clock.
"""

from collections import OrderedDict
from collections.abc import Mapping

from loradock_serve.lazy_heap import LazyHeap

PROMPT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0
"""What a token of each kind costs; the paper's own choice (wp, wq)."""
MAX_TENANTS = 10_000
"""Tenants remembered. Names come from clients: beyond this, the longest idle are forgotten, and begin anew."""


def cost(prompt_tokens: float, output_tokens: float) -> float:
    """The service that these tokens are."""
    return PROMPT_WEIGHT * prompt_tokens + OUTPUT_WEIGHT * output_tokens


class Tenant:
    """One of those between whom the engine is shared. Compared by identity."""

    __slots__ = ("counter", "flow_clock", "name", "queued", "running", "weight")

    def __init__(self, name: str, weight: float) -> None:
        self.name = name
        self.weight = weight
        self.counter = 0.0
        """Service so far, divided by the weight."""
        self.flow_clock = 0.0
        """Where adapters that this tenant begins to ask for start, in the count among its own adapters."""
        self.queued = 0
        self.running = 0


class FairShare:
    """The counters of all tenants of one engine."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._tenants: OrderedDict[str, Tenant] = OrderedDict()
        self._waiting: LazyHeap[Tenant] = LazyHeap()
        self._last: Tenant | None = None
        self.waiting_weight = 0.0
        """The weights of all tenants that wait, together."""

    def tenant(self, name: str) -> Tenant:
        """The tenant of this name, as of now the most recently seen."""
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = Tenant(name, self._weights.get(name, 1.0))
            if len(self._tenants) > MAX_TENANTS:
                self._forget_one()
        else:
            self._tenants.move_to_end(name)
        return tenant

    def joins(self, tenant: Tenant) -> None:
        """One more of its requests waits."""
        tenant.queued += 1
        if tenant.queued > 1:
            return
        lowest = self._lowest() or self._last
        if lowest is not None and lowest.counter > tenant.counter:
            tenant.counter = lowest.counter
        self.waiting_weight += tenant.weight
        self._waiting.put(tenant, (tenant.counter,))

    def passes(self, tenant: Tenant) -> None:
        """A request that needs not wait, and nobody waits: as if it joined and left."""
        last = self._last
        if last is not None and last.counter > tenant.counter:
            tenant.counter = last.counter
        self._last = tenant

    def leaves(self, tenant: Tenant) -> None:
        """One of its requests waits no more: it runs, or its client is gone."""
        tenant.queued -= 1
        self._last = tenant
        if not tenant.queued:
            self.waiting_weight -= tenant.weight
            self._waiting.drop(tenant)

    def charge(self, tenant: Tenant, service: float) -> None:
        """Count service for it, or take back what was counted too much."""
        tenant.counter += service / tenant.weight
        if service < 0 and tenant.queued:
            self._waiting.put(tenant, (tenant.counter,))  # what only grew is found out when it is asked for

    def _lowest(self) -> Tenant | None:
        """Of those that wait, the one with the lowest counter."""
        while (tenant := self._waiting.first()) is not None and self._waiting.first_key() != (tenant.counter,):
            self._waiting.put(tenant, (tenant.counter,))
        return tenant

    def _forget_one(self) -> None:
        for name, tenant in self._tenants.items():
            if not tenant.queued and not tenant.running:
                del self._tenants[name]
                return
