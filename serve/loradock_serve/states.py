"""The one word that `/v1/models` and `/v1/adapters` say about where a version is."""

from loradock_adapters.registry import Version
from loradock_serve.fleet import Fleet


class States:
    """Reads the fleet; changes nothing."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

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
