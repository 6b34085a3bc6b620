"""The registry's splits: which versions share the traffic of a name that asks for none of them, and by what weights.

A name without a split sends all of it to its current version. Does not know who gets which version.
"""

from collections.abc import Mapping

import sqlalchemy as sa

from loradock_adapters.errors import UsageError
from loradock_adapters.registry_rows import lock_name, require_version
from loradock_adapters.registry_schema import splits

MAX_SHARES = 16
MAX_WEIGHT = 1_000_000

Weights = Mapping[int, int]
"""Version number -> weight; a version's share is its weight of the sum."""


class SplitsTable:
    """The table. Threads may share it, and processes may share the database."""

    def __init__(self, engine: sa.Engine, writer: sa.Engine) -> None:
        self._engine = engine
        self._writer = writer

    def set(self, name: str, weights: Weights) -> dict[int, int]:
        """Shares out a name's traffic anew, and returns how it was. Raises NotFoundError, UsageError."""
        check_weights(weights)
        with self._writer.begin() as connection:
            lock_name(connection, name)
            for number in weights:
                require_version(connection, name, number)
            before = read_weights(connection, name)
            connection.execute(sa.delete(splits).where(splits.c.name == name))
            rows = [{"name": name, "number": number, "weight": weight} for number, weight in weights.items()]
            connection.execute(sa.insert(splits), rows)
            return before

    def remove(self, name: str) -> dict[int, int]:
        """Ends a name's split, and returns it; empty if there was none."""
        with self._writer.begin() as connection:
            lock_name(connection, name)
            before = read_weights(connection, name)
            connection.execute(sa.delete(splits).where(splits.c.name == name))
            return before

    def of(self, name: str) -> dict[int, int]:
        """A name's split; empty if it has none."""
        with self._engine.connect() as connection:
            return read_weights(connection, name)

    def all(self) -> dict[str, dict[int, int]]:
        """The split of every name that has one."""
        found: dict[str, dict[int, int]] = {}
        with self._engine.connect() as connection:
            for name, number, weight in connection.execute(sa.select(splits).order_by(splits.c.name, splits.c.number)):
                found.setdefault(name, {})[number] = weight
        return found


def check_weights(weights: Weights) -> None:
    """Raises UsageError where these are no weights of a split."""
    if not 2 <= len(weights) <= MAX_SHARES:
        raise UsageError(
            f"a split is between 2 and {MAX_SHARES} versions, and this names {len(weights)}: to send everything to one "
            "version, promote it"
        )
    for number, weight in weights.items():
        if not 1 <= weight <= MAX_WEIGHT:
            raise UsageError(
                f"version {number} has the weight {weight}, and weights are from 1 to {MAX_WEIGHT}: leave out a "
                "version that is to get nothing"
            )


def read_weights(connection: sa.Connection, name: str) -> dict[int, int]:
    """A name's split, inside a transaction."""
    query = sa.select(splits.c.number, splits.c.weight).where(splits.c.name == name).order_by(splits.c.number)
    return {row.number: row.weight for row in connection.execute(query)}
