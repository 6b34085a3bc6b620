"""The registry's tags: words for versions of a name, `sql@prod`. A tag stays at its version until somebody moves it."""

import sqlalchemy as sa

from loradock_adapters.names import check_tag
from loradock_adapters.registry_rows import lock_name, require_version
from loradock_adapters.registry_schema import tags


class TagsTable:
    """The table. Threads may share it, and processes may share the database."""

    def __init__(self, engine: sa.Engine, writer: sa.Engine) -> None:
        self._engine = engine
        self._writer = writer

    def set(self, name: str, tag: str, number: int) -> int | None:
        """Puts a tag on a version, and returns the one that had it. Raises NotFoundError, InvalidNameError."""
        check_tag(tag)
        with self._writer.begin() as connection:
            lock_name(connection, name)
            require_version(connection, name, number)
            before = connection.execute(sa.select(tags.c.number).where(_is(name, tag))).scalar_one_or_none()
            if before is None:
                connection.execute(sa.insert(tags).values(name=name, tag=tag, number=number))
            else:
                connection.execute(sa.update(tags).where(_is(name, tag)).values(number=number))
            return before

    def remove(self, name: str, tag: str) -> bool:
        """Forgets a tag; False if there was none."""
        with self._writer.begin() as connection:
            return connection.execute(sa.delete(tags).where(_is(name, tag))).rowcount > 0

    def of(self, name: str) -> dict[str, int]:
        """The tags of a name, each with its version's number."""
        query = sa.select(tags.c.tag, tags.c.number).where(tags.c.name == name).order_by(tags.c.tag)
        with self._engine.connect() as connection:
            return {row.tag: row.number for row in connection.execute(query)}

    def all(self) -> dict[str, dict[str, int]]:
        """The tags of every name that has some."""
        found: dict[str, dict[str, int]] = {}
        with self._engine.connect() as connection:
            for name, tag, number in connection.execute(sa.select(tags).order_by(tags.c.name, tags.c.tag)):
                found.setdefault(name, {})[tag] = number
        return found


def _is(name: str, tag: str) -> sa.ColumnElement[bool]:
    return (tags.c.name == name) & (tags.c.tag == tag)
