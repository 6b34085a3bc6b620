"""Names that point at immutable versions, in SQL.

A name's pointer moves in one transaction, and only after the version that it will point at is written. Numbers count up
for a name and are never given out twice, not even after the name was deleted: `name@3` means one thing for ever. Does
not know where the bytes are (store.py).
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from loradock_adapters.base_identity import BaseIdentity
from loradock_adapters.errors import InUseError, NotFoundError
from loradock_adapters.gate import Verdict
from loradock_adapters.manifest import Manifest
from loradock_adapters.names import ModelRef, check_name, parse_ref
from loradock_adapters.registry_changes import WRITES, changes_of
from loradock_adapters.registry_rows import (
    Details,
    Version,
    lock_name,
    new_row,
    read_version,
    rejudge,
    require_version,
    version_of,
    version_query,
)
from loradock_adapters.registry_schema import insert_into, models, open_database, pins, splits, tags, versions
from loradock_adapters.splits_table import SplitsTable, read_weights
from loradock_adapters.tags_table import TagsTable
from loradock_adapters.traffic_table import TrafficTable

__all__ = ["Counts", "Details", "Registry", "Route", "Version"]


@dataclass(frozen=True, slots=True)
class Route:
    """Which versions answer for a name."""

    current: Version
    shares: tuple[tuple[Version, int], ...] = ()
    """Where its traffic is split: the versions that share it, by number, with their weights."""


@dataclass(frozen=True, slots=True)
class Counts:
    names: int
    versions: int
    digests: int


class Registry:
    """The registry at a database URL. Threads may share it, and processes may share the database."""

    def __init__(self, url: str) -> None:
        self._engine = open_database(url)
        self._changes = changes_of(self._engine)
        self._writer = self._engine.execution_options(**{WRITES: True})
        self.traffic = TrafficTable(self._engine, self._writer)
        """How much each version was asked."""
        self.tags = TagsTable(self._engine, self._writer)
        self.splits = SplitsTable(self._engine, self._writer)

    def close(self) -> None:
        self._changes.close()
        self._engine.dispose()

    def generation(self) -> int:
        """A number that is another one once anybody, also another process, has changed something; cheap to ask."""
        return self._changes.generation()

    def publish(
        self,
        name: str,
        manifest: Manifest,
        verdict: Verdict,
        details: Details | None = None,
        base: BaseIdentity | None = None,
    ) -> Version:
        """Makes the next version of a name, judged for a base, and points the name at it.

        The same bytes as any version of the name are no new version: that one is returned, with `created` False, and
        with the new verdict and base (they and the engine's settings may have changed since). The pointer then stays
        where it is, and so it does while the name's traffic is split.
        """
        check_name(name)
        details = details or Details()
        if verdict.placement == "rejected":
            raise ValueError("a rejected checkpoint has no version")
        with self._writer.begin() as connection:
            unknown = insert_into(connection, models).values(name=name, current_number=None, last_number=0)
            connection.execute(unknown.on_conflict_do_nothing())  # another gateway may publish it at this moment
            model = lock_name(connection, name)
            assert model is not None
            if (known := read_version(connection, name, versions.c.digest == manifest.digest)) is not None:
                return rejudge(connection, known, verdict, details, base)
            number = model.last_number + 1
            row = new_row(name, number, manifest, verdict, details, base)
            connection.execute(sa.insert(versions).values(row))
            current = model.current_number if read_weights(connection, name) else number
            pointers = {"current_number": current, "last_number": number}
            connection.execute(sa.update(models).where(models.c.name == name).values(pointers))
            return version_of(row, current, created=True)

    def resolve(self, ref: ModelRef | str) -> Version:
        """The version that a reference means now. Raises NotFoundError, InvalidNameError for text that is none."""
        if isinstance(ref, str):
            ref = parse_ref(ref)
        if ref.version is not None:
            which = versions.c.number == ref.version
        elif ref.digest is not None:
            which = versions.c.digest == ref.digest
        elif ref.tag is not None:
            tagged = sa.select(tags.c.number).where(tags.c.name == ref.name, tags.c.tag == ref.tag)
            which = versions.c.number == tagged.scalar_subquery()
        else:
            which = versions.c.number == models.c.current_number
        with self._engine.connect() as connection:
            version = read_version(connection, ref.name, which)
        if version is None:
            raise NotFoundError(_missing(ref))
        return version

    def route(self, name: str) -> Route:
        """Which versions answer for a name that is followed, as of one moment. Raises NotFoundError."""
        share = (splits.c.name == versions.c.name) & (splits.c.number == versions.c.number)
        query = version_query().add_columns(splits.c.weight).outerjoin(splits, share).order_by(versions.c.number)
        wanted = sa.or_(versions.c.number == models.c.current_number, splits.c.weight.is_not(None))
        with self._engine.connect() as connection:
            rows = connection.execute(query.where(versions.c.name == name, wanted)).all()
        found = [(version_of(row._mapping, row.current_number), row.weight) for row in rows]
        current = next((version for version, _ in found if version.current), None)
        if current is None:
            raise NotFoundError(f"there is no model {name}")
        return Route(current, tuple((version, weight) for version, weight in found if weight is not None))

    def models(self) -> list[Version]:
        """The current version of every name, by name."""
        with self._engine.connect() as connection:
            query = version_query().where(versions.c.number == models.c.current_number).order_by(versions.c.name)
            return [version_of(row._mapping, row.current_number) for row in connection.execute(query)]

    def versions(self, name: str) -> list[Version]:
        """All versions of a name, the newest first. Raises NotFoundError if there are none."""
        with self._engine.connect() as connection:
            query = version_query().where(versions.c.name == name).order_by(versions.c.number.desc())
            found = [version_of(row._mapping, row.current_number) for row in connection.execute(query)]
        if not found:
            raise NotFoundError(f"there is no model {name}")
        return found

    def manifest(self, version: Version) -> Manifest:
        """The files of a version."""
        where = (versions.c.name == version.name) & (versions.c.number == version.number)
        with self._engine.connect() as connection:
            document = connection.execute(sa.select(versions.c.manifest).where(where)).scalar_one_or_none()
        if document is None:
            raise NotFoundError(f"there is no model {version.ref}")
        return Manifest.from_json(document)

    def set_current(self, name: str, number: int) -> Version:
        """Points a name at one of its versions, and ends its split: all that follows the name goes there."""
        with self._writer.begin() as connection:
            lock_name(connection, name)
            version = require_version(connection, name, number)
            connection.execute(sa.delete(splits).where(splits.c.name == name))
            connection.execute(sa.update(models).where(models.c.name == name).values(current_number=number))
            return replace(version, current=True)

    def delete_version(self, name: str, number: int) -> Version:
        """Removes one version of a name, and returns it. Its bytes stay where they are.

        Raises NotFoundError; InUseError with what to do where the name, a tag or a split points at it.
        """
        with self._writer.begin() as connection:
            lock_name(connection, name)
            version = require_version(connection, name, number)
            tagged = connection.execute(sa.select(tags.c.tag).where(tags.c.name == name, tags.c.number == number))
            _refuse_used(version, sorted(tagged.scalars()), read_weights(connection, name))
            where = (versions.c.name == name) & (versions.c.number == number)
            connection.execute(sa.delete(versions).where(where))
            return version

    def delete(self, name: str) -> list[Version]:
        """Removes a name and its versions, and returns these. Their bytes stay where they are."""
        with self._writer.begin() as connection:
            lock_name(connection, name)
            query = version_query().where(versions.c.name == name).order_by(versions.c.number.desc())
            removed = [version_of(row._mapping, row.current_number) for row in connection.execute(query)]
            if not removed:
                raise NotFoundError(f"there is no model {name}")
            for table in (tags, splits, pins, versions):
                connection.execute(sa.delete(table).where(table.c.name == name))
            connection.execute(sa.update(models).where(models.c.name == name).values(current_number=None))
            return removed

    def pin(self, name: str) -> None:
        """Remembers that a name's current version, whichever it is, keeps its slot. Raises NotFoundError."""
        with self._writer.begin() as connection:
            lock_name(connection, name)
            if read_version(connection, name, versions.c.number == models.c.current_number) is None:
                raise NotFoundError(f"there is no model {name}")
            pin = insert_into(connection, pins).values(name=name, created_at=datetime.now(UTC))
            connection.execute(pin.on_conflict_do_nothing())

    def unpin(self, name: str) -> bool:
        """Forgets that; False if it was not pinned."""
        with self._writer.begin() as connection:
            return connection.execute(sa.delete(pins).where(pins.c.name == name)).rowcount > 0

    def pins(self) -> list[Version]:
        """The current versions of the pinned names, in the order of their pinning."""
        query = version_query().join(pins, pins.c.name == versions.c.name)
        query = query.where(versions.c.number == models.c.current_number).order_by(pins.c.created_at, pins.c.name)
        with self._engine.connect() as connection:
            return [version_of(row._mapping, row.current_number) for row in connection.execute(query)]

    def set_proof(self, digest: str, proof: Mapping[str, Any]) -> int:
        """Remembers what an engine showed about the versions with these bytes; returns how many these are.

        What was published with force stays as its publisher wants it.
        """
        with self._writer.begin() as connection:
            known = sa.select(versions.c.name, versions.c.number, versions.c.proof).where(versions.c.digest == digest)
            open_ones = [row for row in connection.execute(known) if not (row.proof or {}).get("forced")]
            for row in open_ones:
                where = (versions.c.name == row.name) & (versions.c.number == row.number)
                connection.execute(sa.update(versions).where(where).values(proof=dict(proof)))
            return len(open_ones)

    def claim(self, base: BaseIdentity) -> int:
        """Takes versions of which nobody said their base for this one's; returns how many."""
        query = sa.update(versions).where(versions.c.base.is_(sa.null())).values(base=base.to_json())
        with self._writer.begin() as connection:
            return connection.execute(query).rowcount

    def bases(self) -> dict[BaseIdentity, int]:
        """The bases that adapters were published for, each with the number of their versions."""
        query = sa.select(versions.c.base).where(versions.c.kind == "lora")
        with self._engine.connect() as connection:
            known = [BaseIdentity.from_json(document) for document in connection.execute(query).scalars()]
        return dict(Counter(base for base in known if base is not None))

    def older_ranks(self) -> set[tuple[int, BaseIdentity | None]]:
        """The ranks of shared adapters' versions that are not current, with the base of each."""
        joined = versions.join(models, models.c.name == versions.c.name)
        older = sa.or_(models.c.current_number.is_(None), versions.c.number != models.c.current_number)
        query = sa.select(versions.c.rank, versions.c.base).select_from(joined)
        query = query.where(older, versions.c.placement == "shared", versions.c.rank.is_not(None))
        with self._engine.connect() as connection:
            return {(rank, BaseIdentity.from_json(base)) for rank, base in connection.execute(query)}

    def digests(self) -> set[str]:
        """The digests of all versions: what the store must keep."""
        with self._engine.connect() as connection:
            return set(connection.execute(sa.select(versions.c.digest).distinct()).scalars())

    def blobs(self) -> set[str]:
        """The sha256 of every content of every version."""
        with self._engine.connect() as connection:
            manifests = connection.execute(sa.select(versions.c.manifest)).scalars()
            return {entry["sha256"] for manifest in manifests for entry in manifest["files"]}

    def counts(self) -> Counts:
        query = sa.select(
            sa.func.count(sa.distinct(versions.c.name)), sa.func.count(), sa.func.count(sa.distinct(versions.c.digest))
        ).select_from(versions)
        with self._engine.connect() as connection:
            names, numbers, digests = connection.execute(query).one()
        return Counts(names, numbers, digests)


def _missing(ref: ModelRef) -> str:
    if ref.version is not None:
        return f"there is no version {ref.version} of {ref.name}"
    return f"there is no model {ref}" if ref.tag is None else f"{ref.name} has no version with the tag {ref.tag!r}"


def _refuse_used(version: Version, tagged: list[str], split: dict[int, int]) -> None:
    name, ref = version.name, version.ref
    if version.current:
        raise InUseError(
            f"{ref} is the current version of {name}: point the name at another one first (`loradock promote {name} "
            f"VERSION`), or remove the name with all its versions (`loradock rm {name}`)"
        )
    if version.number in split:
        raise InUseError(
            f"{ref} has a share in the split of {name}: give its share to others (`loradock split {name} …`), or end "
            f"the split (`loradock split {name} --off`)"
        )
    if tagged:
        raise InUseError(
            f"{ref} has the tag {tagged[0]!r}: move it (`loradock tag {name}@VERSION {tagged[0]}`), or remove it "
            f"(`loradock untag {name} {tagged[0]}`)"
        )
