"""Which dedicated engine has to go: a pure function of what is seen, without clock or effect."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class EngineView:
    """What the policy sees of one dedicated engine."""

    digest: str
    in_use: int
    """Requests that run on it or are held for it."""
    last_used_s: float
    """Monotonic time of the end of its last request, or of its creation."""
    runs: bool = True
    """False for one that failed or was never started: it holds no memory."""
    leaving: bool = False
    """It is being stopped: it cannot be chosen again, and has its room until it has ended."""


def idle_too_long(engines: Iterable[EngineView], now_s: float, idle_timeout_s: float) -> list[str]:
    """The digests of the engines that nobody used for `idle_timeout_s`."""
    return [view.digest for view in engines if _is_idle(view) and now_s - view.last_used_s >= idle_timeout_s]


def make_room(engines: Iterable[EngineView], max_engines: int) -> tuple[bool, str | None]:
    """Whether one more engine may start, and which has to stop first.

    `(True, None)`: there is room. `(True, digest)`: after stopping that one: one that failed, else the least recently
    used of the idle. `(False, None)`: wait, until one that is leaving has left, or one in use is not any more.
    """
    views = list(engines)
    if len(views) < max_engines:
        return True, None
    staying = [view for view in views if not view.leaving]
    idle = [view for view in staying if _is_idle(view)]
    if len(staying) < max_engines or not idle:
        return False, None
    return True, min(idle, key=lambda view: (view.runs, view.last_used_s)).digest


def _is_idle(view: EngineView) -> bool:
    return not view.in_use and not view.leaving
