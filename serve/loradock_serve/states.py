"""What `/v1/models` and `/v1/adapters` say about where a version is: one word, and the whole of its residency."""

from typing import Any

from loradock_adapters.registry import Version
from loradock_serve.fleet import Fleet
from loradock_serve.pins import Pins
from loradock_serve.residency import Look, Residency


class States:
    """Reads the fleet; changes nothing."""

    def __init__(self, fleet: Fleet, residency: Residency, pins: Pins) -> None:
        self._fleet = fleet
        self._residency = residency
        self._pins = pins

    @property
    def base(self) -> str:
        """The base's engine: starting, ready, stopping, stopped or failed."""
        return self._fleet.base.state

    def of(self, version: Version) -> str:
        """Shared: `loaded` once the engine has it, else `stored`. Dedicated: the state of its engine. Else `unfit`."""
        if version.placement == "rejected":
            return "unfit"
        if version.placement == "dedicated":
            return self._fleet.dedicated_state(version.digest)
        return "loaded" if self._fleet.loader.is_loaded(version.digest) else "stored"

    async def look(self) -> Look:
        """What the engine last said of its adapters."""
        return await self._residency.look()

    def place(self, version: Version, look: Look) -> str | None:
        """`slot`, `cpu`, `disk` or `remote`; None for what has an engine of its own, or does not fit."""
        return self._residency.place(look, version.digest) if version.placement == "shared" else None

    def residency(self, version: Version, look: Look) -> dict[str, Any] | None:
        """Everything known of where an adapter is, and of how it got there; None where `place` is."""
        if version.placement != "shared":
            return None
        state, waits_for = self._pins.state_of(version.name)
        counts = look.adapters.get(version.digest, {})
        return (
            {
                "place": self.place(version, look),
                "pin": {"state": state, "waits_for": waits_for} if state is not None else None,
            }
            | self._fleet.ledger.of(version.digest).to_json()
            | {name: counts.get(name, 0) for name in ("reads", "activations", "slot_evictions", "cpu_evictions")}
            | {"seen_seconds_ago": round(self._residency.age_s(look), 3) if look.slots else None}
        )
