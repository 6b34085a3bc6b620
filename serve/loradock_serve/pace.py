"""How fast an engine is by what it finished lately: what an honest `Retry-After` is computed from.

No clock: times come with the events, in seconds.
"""

import math

MEMORY_S = 60.0
LONGEST_RETRY_S = 600
UNKNOWN_RETRY_S = 10


class Pace:
    """Requests a second, and tokens a second of one sequence.

    Requests a second are those that run over the mean time that one takes (Little's law), of those that ended in about
    the last minute. Ends alone would not do: an engine that had nothing to do for most of a minute is not a slow one.
    """

    def __init__(self) -> None:
        self._at = 0.0
        self._ended = 0.0
        self._took_s = 0.0
        self._running = 0
        self._tokens_per_s = 0.0

    def began(self) -> None:
        """One request was given to the engine."""
        self._running += 1

    def ended(self, at: float, took_s: float, output_tokens: int | None) -> None:
        """One request ended; None for tokens that nobody told."""
        self._running -= 1
        self._ended = self._ended * math.exp(min(0.0, self._at - at) / MEMORY_S) + 1.0
        self._at = max(at, self._at)
        self._took_s += (took_s - self._took_s) / self._ended
        if output_tokens is not None and took_s > 0:
            speed = output_tokens / took_s
            self._tokens_per_s += (speed - self._tokens_per_s) * (0.05 if self._tokens_per_s else 1.0)

    def output_tokens(self, took_s: float) -> float:
        """About how many tokens one sequence was given in this time."""
        return self._tokens_per_s * took_s

    def retry_after_s(self, requests: int, share: float) -> int:
        """Whole seconds in which so many requests end, where they have this share of the engine."""
        if not self._ended:
            return UNKNOWN_RETRY_S
        seconds = requests * self._took_s / (max(1, self._running) * share)
        return min(LONGEST_RETRY_S, max(1, math.ceil(seconds)))
