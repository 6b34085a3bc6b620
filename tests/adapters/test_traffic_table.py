"""How much each adapter was asked: added up, read back, and bounded."""

from collections.abc import Iterator

import pytest

from loradock_adapters import traffic_table
from loradock_adapters.registry import Registry
from loradock_adapters.traffic import HourTraffic, Traffic
from loradock_adapters.traffic_table import TrafficTable

A, B, C = ("sha256:" + letter * 64 for letter in "abc")


@pytest.fixture
def table(url: str) -> Iterator[TrafficTable]:
    registry = Registry(url)
    yield registry.traffic
    registry.close()


def test_parts_of_an_hour_add_up_and_the_highest_peak_stays(table: TrafficTable) -> None:
    table.add([HourTraffic(100, {A: 3, B: 1}, 2)])
    table.add([HourTraffic(100, {A: 4}, 1), HourTraffic(101, {C: 1}, 1)])
    assert table.between(100, 101) == Traffic({A: 7, B: 1, C: 1}, 2, 2)
    assert table.between(101, 101) == Traffic({C: 1}, 1, 1)


def test_nothing_recorded_is_no_traffic(table: TrafficTable) -> None:
    table.add([])
    assert table.between(0, 1000) == Traffic()


def test_hour_in_which_only_the_peak_is_known_is_kept(table: TrafficTable) -> None:
    table.add([HourTraffic(100, {}, 5)])
    assert table.between(100, 100) == Traffic({}, 5, 0)


def test_hours_that_are_too_old_go(table: TrafficTable) -> None:
    table.add([HourTraffic(100, {A: 1}, 9)])
    table.add([HourTraffic(100 + traffic_table.KEPT_HOURS, {B: 1}, 1)])
    assert A in table.between(0, 10_000).requests
    table.add([HourTraffic(101 + traffic_table.KEPT_HOURS, {B: 1}, 1)])
    assert table.between(0, 10_000) == Traffic({B: 2}, 1, 1)


def test_rows_beyond_the_bound_go_the_oldest_hours_first(table: TrafficTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic_table, "MAX_ROWS", 4)
    table.add([HourTraffic(hour, {A: 1, B: 1}, hour) for hour in (1, 2, 3)])
    assert table.between(0, 10) == Traffic({A: 2, B: 2}, 3, 2)
    table.add([HourTraffic(3, {C: 1}, 1)])
    assert table.between(0, 10) == Traffic({A: 1, B: 1, C: 1}, 3, 3)
