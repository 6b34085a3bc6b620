"""The gauges of where adapters are, set when somebody asks for `/metrics`.

The list of adapters is read again only after the registry changed: for thousands of names it takes long enough to be
felt by requests, if it were read at every scrape. Counts nothing itself.
"""

import asyncio
from collections import Counter

from loradock_adapters.registry import Registry
from loradock_serve import metrics
from loradock_serve.catalog import Catalog
from loradock_serve.proof import STATES, proof_state
from loradock_serve.residency import PLACES, Look, Residency


class AdapterGauges:
    """See the top of the file."""

    def __init__(self, registry: Registry, catalog: Catalog, residency: Residency) -> None:
        self._registry = registry
        self._catalog = catalog
        self._residency = residency
        self._digests: list[str] = []
        """Of the hot-swapped adapters' current versions."""
        self._generation = -1

    async def set(self) -> None:
        """Set them to what is known now."""
        look = await self._residency.look()
        places = await asyncio.to_thread(self._places, look)
        for place in PLACES:
            metrics.ADAPTERS.labels(place).set(places[place])
        pinned = len(look.pinned & look.in_slots)
        used = len(look.in_slots) - pinned
        for state, slots in {"pinned": pinned, "used": used, "free": look.slots - used - pinned}.items():
            metrics.ADAPTER_SLOTS.labels(state).set(slots)
        metrics.RESIDENCY_AGE.set(self._residency.age_s(look))

    def _places(self, look: Look) -> Counter[str]:
        """In a thread: it reads the registry, and asks the disk for each adapter that the engine does not have."""
        generation = self._registry.generation()
        if generation != self._generation:
            current = map(self._catalog.fit, self._registry.models())
            versions = list(current)
            self._digests = [version.digest for version in versions if version.placement == "shared"]
            states = Counter(proof_state(version.proof) for version in versions)
            for state in STATES:
                metrics.PROOF_STATES.labels(state).set(states[state])
            self._generation = generation
        return Counter(self._residency.place(look, digest) for digest in self._digests)
