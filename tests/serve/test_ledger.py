"""What a gateway remembers of each adapter, and the traffic it hands on."""

from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from loradock_adapters.registry import Registry
from loradock_adapters.traffic import HourTraffic, Traffic
from loradock_serve import ledger as ledger_module
from loradock_serve.ledger import Entry, Ledger
from loradock_serve.traffic_record import TrafficRecord

A, B, C = ("sha256:" + letter * 64 for letter in "abc")
HOUR_S = 3600.0


class Clock:
    def __init__(self) -> None:
        self.now_s = 100 * HOUR_S

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(clock: Clock) -> Ledger:
    return Ledger(clock)


def ask(ledger: Ledger, digest: str, in_flight: int = 1, *, hit: bool = True) -> None:
    ledger.requested(digest, "name", in_flight, hit=hit)


def test_request_is_a_hit_where_the_engine_had_the_adapter(ledger: Ledger, clock: Clock) -> None:
    ask(ledger, A, hit=False)
    clock.now_s += 5
    ask(ledger, A)
    entry = ledger.of(A)
    assert (entry.hits, entry.misses, entry.last_used_s) == (1, 1, 100 * HOUR_S + 5)
    assert ledger.of(B) == Entry()


def test_loads_are_counted_by_how_long_they_took(ledger: Ledger) -> None:
    for seconds in (0.01, 0.02, 100.0):
        ledger.loaded(A, seconds)
    shown = ledger.of(A).to_json()
    assert (shown["loads"], shown["last_load_seconds"]) == (3, 100.0)
    counts = shown["load_seconds"]["counts"]
    assert {bound: count for bound, count in counts.items() if count} == {"0.01": 1, "0.03": 1, "+Inf": 1}
    assert shown["load_seconds"]["sum"] == pytest.approx(100.03)


def test_traffic_is_told_hour_by_hour_and_once(ledger: Ledger, clock: Clock) -> None:
    ask(ledger, A, 1)
    ask(ledger, B, 2)
    ask(ledger, A, 1)
    clock.now_s += HOUR_S
    ask(ledger, C, 1)
    assert ledger.take_traffic() == [HourTraffic(100, {A: 2, B: 1}, 2), HourTraffic(101, {C: 1}, 1)]
    assert ledger.take_traffic() == []
    ask(ledger, C, 3)
    assert ledger.take_traffic() == [HourTraffic(101, {C: 1}, 3)]


def test_adapters_beyond_the_bounds_are_forgotten_or_left_out(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "MAX_ADAPTERS", 2)
    monkeypatch.setattr(ledger_module, "MAX_DIGESTS_AN_HOUR", 2)
    for digest in (A, B, A, C):
        ask(ledger, digest)
    assert ledger.of(B) == Entry(), "the one that was not seen for longest"
    assert ledger.of(A).hits == 2
    assert ledger.take_traffic() == [HourTraffic(100, {A: 2, B: 1}, 1)]


async def test_record_writes_what_was_counted_also_at_the_end(ledger: Ledger, tmp_path: Path) -> None:
    registry = Registry(f"sqlite:///{tmp_path}/registry.db")
    record = TrafficRecord(ledger, registry)
    record.start()
    ask(ledger, A)
    await record.write()
    ask(ledger, A)
    ask(ledger, B, 2)
    await record.stop()
    assert registry.traffic.between(100, 100) == Traffic({A: 2, B: 1}, 2, 2)
    registry.close()


async def test_traffic_that_cannot_be_written_is_kept_for_the_next_time(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registry = Registry(f"sqlite:///{tmp_path}/registry.db")
    record = TrafficRecord(ledger, registry)

    def fail(_seen: object) -> None:
        raise OperationalError("INSERT", {}, Exception("database or disk is full"))

    with monkeypatch.context() as patch:
        patch.setattr(registry.traffic, "add", fail)
        ask(ledger, A)
        await record.write()
    assert "could not be recorded" in caplog.text
    ask(ledger, A)
    await record.write()
    assert registry.traffic.between(100, 100) == Traffic({A: 2}, 1, 1)
    registry.close()
