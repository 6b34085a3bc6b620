"""Which engine goes, as a pure function."""

import pytest

from loradock_serve.fleet_policy import EngineView, idle_too_long, make_room

BUSY = EngineView("busy", 1, 0.0)
OLD = EngineView("old", 0, 10.0)
NEW = EngineView("new", 0, 20.0)
FAILED = EngineView("failed", 0, 30.0, runs=False)
LEAVING = EngineView("leaving", 0, 0.0, leaving=True)


def test_idle_engines_go_after_their_time_and_busy_ones_never() -> None:
    assert idle_too_long([BUSY, OLD, NEW, LEAVING], now_s=25.0, idle_timeout_s=15.0) == ["old"]
    assert idle_too_long([BUSY, OLD, NEW], now_s=35.0, idle_timeout_s=15.0) == ["old", "new"]
    assert idle_too_long([FAILED], now_s=45.0, idle_timeout_s=15.0) == ["failed"]


@pytest.mark.parametrize(
    ("engines", "max_engines", "decision"),
    [
        ([], 1, (True, None)),
        ([BUSY], 2, (True, None)),
        ([BUSY], 1, (False, None)),
        ([OLD], 1, (True, "old")),
        ([NEW, OLD], 2, (True, "old")),
        ([BUSY, NEW], 2, (True, "new")),
        ([OLD, FAILED], 2, (True, "failed")),  # it holds no memory, and its cache of weights is cold anyway
        ([LEAVING], 1, (False, None)),
        ([LEAVING, OLD], 2, (False, None)),  # one goes already: no second victim for one newcomer
        ([LEAVING, BUSY, OLD], 2, (True, "old")),
    ],
)
def test_room_is_made_for_one_more(
    engines: list[EngineView], max_engines: int, decision: tuple[bool, str | None]
) -> None:
    assert make_room(engines, max_engines) == decision
