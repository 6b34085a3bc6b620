"""How much each adapter was asked: what gateways count, and what sizing looks at.

Plain figures. Does not know names (an adapter is its version's digest), nor where the figures are kept
(traffic_table.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class HourTraffic:
    """What one gateway saw in one hour, or in a part of it."""

    hour: int
    """Whole hours since 1970, UTC."""
    requests: Mapping[str, int]
    """Digest -> requests that began."""
    peak_adapters: int
    """The most adapters that had requests, in flight or held, at one moment."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """What was asked in a stretch of hours."""

    requests: Mapping[str, int] = field(default_factory=dict)
    """Digest -> requests."""
    peak_adapters: int = 0
    """The most adapters at one moment."""
    busiest_hour_adapters: int = 0
    """The most adapters within one hour."""
