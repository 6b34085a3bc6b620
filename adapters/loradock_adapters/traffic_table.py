"""The registry's record of how much each adapter was asked, hour by hour; bounded in age and in rows.

Written by gateways every few minutes, read by whoever sizes an engine. Several gateways may write the same hour.
"""

from collections.abc import Iterable, Mapping, Sequence

import sqlalchemy as sa

from loradock_adapters.registry_schema import insert_into, traffic, traffic_hours
from loradock_adapters.traffic import HourTraffic, Traffic

KEPT_HOURS = 14 * 24
MAX_ROWS = 200_000
"""Rows of the table: beyond them the oldest hours go, whatever their age."""


class TrafficTable:
    """The two tables. Threads may share it."""

    def __init__(self, engine: sa.Engine, writer: sa.Engine) -> None:
        self._engine = engine
        self._writer = writer

    def add(self, seen: Sequence[HourTraffic]) -> None:
        """Add to what is there, and drop what is too old or too much."""
        if not seen:
            return
        rows = [
            {"hour": part.hour, "digest": digest, "requests": requests}
            for part in seen
            for digest, requests in part.requests.items()
        ]
        peaks = [{"hour": part.hour, "peak_adapters": part.peak_adapters} for part in seen]
        with self._writer.begin() as connection:
            if rows:
                _add(connection, rows)
            _raise_peaks(connection, peaks)
            _drop_before(connection, max(part.hour for part in seen) - KEPT_HOURS)
            if (oldest := _oldest_kept(connection)) is not None:
                _drop_before(connection, oldest)

    def between(self, first_hour: int, last_hour: int) -> Traffic:
        """What was asked in these hours, both included."""
        hours = traffic.c.hour.between(first_hour, last_hour)
        by_digest = sa.select(traffic.c.digest, sa.func.sum(traffic.c.requests)).where(hours).group_by(traffic.c.digest)
        an_hour = sa.select(sa.func.count().label("adapters")).where(hours).group_by(traffic.c.hour).subquery()
        peak = sa.select(sa.func.max(traffic_hours.c.peak_adapters)).where(
            traffic_hours.c.hour.between(first_hour, last_hour)
        )
        with self._engine.connect() as connection:
            requests = {digest: int(count) for digest, count in connection.execute(by_digest)}
            busiest = connection.execute(sa.select(sa.func.max(an_hour.c.adapters))).scalar()
            return Traffic(requests, connection.execute(peak).scalar() or 0, busiest or 0)


def _add(connection: sa.Connection, rows: Iterable[Mapping[str, object]]) -> None:
    insert = insert_into(connection, traffic)
    total = traffic.c.requests + insert.excluded.requests
    query = insert.on_conflict_do_update(index_elements=["hour", "digest"], set_={"requests": total})
    connection.execute(query, list(rows))


def _raise_peaks(connection: sa.Connection, peaks: Iterable[Mapping[str, int]]) -> None:
    insert = insert_into(connection, traffic_hours)
    old, new = traffic_hours.c.peak_adapters, insert.excluded.peak_adapters
    higher = sa.case((new > old, new), else_=old)
    query = insert.on_conflict_do_update(index_elements=["hour"], set_={"peak_adapters": higher})
    connection.execute(query, list(peaks))


def _oldest_kept(connection: sa.Connection) -> int | None:
    """The hour before which everything has to go for the rows to be few enough; None where they are."""
    if connection.execute(sa.select(sa.func.count()).select_from(traffic)).scalar_one() <= MAX_ROWS:
        return None
    query = sa.select(traffic.c.hour).order_by(traffic.c.hour.desc()).offset(MAX_ROWS).limit(1)
    return int(connection.execute(query).scalar_one()) + 1


def _drop_before(connection: sa.Connection, hour: int) -> None:
    for table in (traffic, traffic_hours):
        connection.execute(sa.delete(table).where(table.c.hour < hour))
