"""How fast an engine is by what it finished lately: what an honest `Retry-After` is computed from.

No clock: times come with the events, in seconds.
"""

import math

MEMORY_S = 60.0
LONGEST_RETRY_S = 600
UNKNOWN_RETRY_S = 10


class Pace:
    """Requests a second over about the last minute, and tokens a second of one sequence."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._at = 0.0
        self._ended = 0.0
        self._tokens_per_s = 0.0

    def ended(self, at: float, took_s: float, output_tokens: int | None) -> None:
        """One request ended; None for tokens that nobody told."""
        if self._since is None:
            self._since = at - took_s
        self._fade(at)
        self._ended += 1.0
        if output_tokens is not None and took_s > 0:
            speed = output_tokens / took_s
            self._tokens_per_s += (speed - self._tokens_per_s) * (0.05 if self._tokens_per_s else 1.0)

    def output_tokens(self, took_s: float) -> float:
        """About how many tokens one sequence was given in this time."""
        return self._tokens_per_s * took_s

    def retry_after_s(self, requests: int, share: float, at: float) -> int:
        """Whole seconds in which so many requests end, where they have this share of the engine."""
        if self._since is None:
            return UNKNOWN_RETRY_S
        self._fade(at)
        seen = 1.0 - math.exp(-max(at - self._since, 0.001) / MEMORY_S)  # of a minute's weight, at first less than all
        per_s = self._ended / (MEMORY_S * seen) * share
        return min(LONGEST_RETRY_S, max(1, math.ceil(requests / per_s))) if per_s > 1e-6 else LONGEST_RETRY_S

    def _fade(self, at: float) -> None:
        self._ended *= math.exp((self._at - at) / MEMORY_S) if at > self._at else 1.0
        self._at = max(at, self._at)
