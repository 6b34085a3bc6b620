"""A version as the registry's callers see it, and as a row of its table. Knows no rules about names or pointers."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from loradock_adapters.base_identity import BaseIdentity
from loradock_adapters.checkpoint import Checkpoint, Kind
from loradock_adapters.errors import NotFoundError
from loradock_adapters.gate import Placement, Verdict
from loradock_adapters.manifest import Manifest
from loradock_adapters.names import ModelRef
from loradock_adapters.problems import Problem
from loradock_adapters.registry_schema import models, versions


@dataclass(frozen=True, slots=True)
class Details:
    """What is known of a checkpoint besides its files and the gate's verdict."""

    chat_template: str | None = None
    stop_token_ids: tuple[int, ...] = ()
    proof: Mapping[str, Any] | None = None
    """What an engine showed about it, at least `{"state": "proven|unproven|failed"}`; None where nobody asked one."""
    repairs: tuple[Problem, ...] = ()
    """What was changed in the upload before it was published."""
    source: str | None = None
    """Where the server fetched it from, as `hf://org/repo@<commit>`; None for an upload. Never holds a secret."""
    publisher: str | None = None
    """Who published it; None where nobody said."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Details":
        return cls(checkpoint.chat_template, checkpoint.stop_token_ids)


@dataclass(frozen=True, slots=True)
class Version:
    """One immutable version of a name."""

    name: str
    number: int
    digest: str
    """`sha256:<64 hex>` of its manifest."""
    kind: Kind
    placement: Placement
    reasons: tuple[Problem, ...]
    rank: int | None
    size_bytes: int
    created_at: datetime
    """UTC."""
    chat_template: str | None
    stop_token_ids: tuple[int, ...]
    current: bool
    """Whether the name points at it."""
    created: bool = False
    """Whether the call that returned it made it."""
    base: BaseIdentity | None = None
    """The base that it was judged for; None where nobody said."""
    proof: Mapping[str, Any] | None = None
    """As in `Details`, and so are the three below."""
    repairs: tuple[Problem, ...] = ()
    source: str | None = None
    publisher: str | None = None

    @property
    def ref(self) -> ModelRef:
        return ModelRef(self.name, version=self.number)


_SHOWN = [column for column in versions.c if column.name != "manifest"]


def version_query() -> sa.Select[Any]:
    """Versions with their names' pointers; rows of it are for `version_of`."""
    joined = versions.join(models, models.c.name == versions.c.name)
    return sa.select(*_SHOWN, models.c.current_number).select_from(joined)


def lock_name(connection: sa.Connection, name: str) -> sa.Row[Any] | None:
    """A name's own row, which the transaction has for itself from now on: what it reads next of the name stays true."""
    return connection.execute(sa.select(models).where(models.c.name == name).with_for_update()).one_or_none()


def read_version(connection: sa.Connection, name: str, which: sa.ColumnElement[bool]) -> Version | None:
    """One version of a name. A digest may have several numbers, in registries from before schema 0004: the current one
    counts, else the newest."""
    is_current = sa.case((versions.c.number == models.c.current_number, 0), else_=1)
    query = (
        version_query().where(versions.c.name == name, which).order_by(is_current, versions.c.number.desc()).limit(1)
    )
    row = connection.execute(query).one_or_none()
    return None if row is None else version_of(row._mapping, row.current_number)


def require_version(connection: sa.Connection, name: str, number: int) -> Version:
    """One version of a name by its number. Raises NotFoundError."""
    version = read_version(connection, name, versions.c.number == number)
    if version is None:
        raise NotFoundError(f"there is no version {number} of {name}")
    return version


def new_row(
    name: str, number: int, manifest: Manifest, verdict: Verdict, details: Details, base: BaseIdentity | None
) -> dict[str, Any]:
    """The row of a version that is made now."""
    return {
        "name": name,
        "number": number,
        "digest": manifest.digest,
        "kind": verdict.kind,
        "placement": verdict.placement,
        "reasons": [reason.to_json() for reason in verdict.reasons],
        "rank": verdict.rank,
        "size_bytes": manifest.size_bytes,
        "created_at": datetime.now(UTC),
        "chat_template": details.chat_template,
        "stop_token_ids": list(details.stop_token_ids),
        "manifest": manifest.to_json(),
        "base": _base_json(base),
        "proof": _proof_json(details.proof),
        "repairs": [repair.to_json() for repair in details.repairs],
        "source": details.source,
        "publisher": details.publisher,
    }


def rejudge(
    connection: sa.Connection, version: Version, verdict: Verdict, details: Details, base: BaseIdentity | None
) -> Version:
    """The same version with the verdict, the proof and the source of today. What is not there takes nothing away."""
    fresh = replace(
        version,
        placement=verdict.placement,
        reasons=verdict.reasons,
        rank=verdict.rank,
        base=base,
        proof=details.proof if details.proof is not None else version.proof,
        source=details.source if details.source is not None else version.source,
    )
    if fresh != version:
        where = (versions.c.name == version.name) & (versions.c.number == version.number)
        reasons = [reason.to_json() for reason in fresh.reasons]
        columns = {"placement": fresh.placement, "reasons": reasons, "rank": fresh.rank, "base": _base_json(base)}
        more = {"proof": _proof_json(fresh.proof), "source": fresh.source}
        connection.execute(sa.update(versions).where(where).values(columns | more))
    return fresh


def version_of(row: Mapping[str, Any] | sa.RowMapping, current_number: int | None, *, created: bool = False) -> Version:
    """The version in a row."""
    return Version(
        name=row["name"],
        number=row["number"],
        digest=row["digest"],
        kind=row["kind"],
        placement=row["placement"],
        reasons=tuple(Problem.from_json(reason) for reason in row["reasons"]),
        rank=row["rank"],
        size_bytes=row["size_bytes"],
        created_at=row["created_at"],
        chat_template=row["chat_template"],
        stop_token_ids=tuple(row["stop_token_ids"]),
        current=row["number"] == current_number,
        created=created,
        base=BaseIdentity.from_json(row["base"]),
        proof=row["proof"],
        repairs=tuple(Problem.from_json(repair) for repair in row["repairs"] or ()),
        source=row["source"],
        publisher=row["publisher"],
    )


def _base_json(base: BaseIdentity | None) -> dict[str, str | None] | None:
    return base.to_json() if base is not None else None


def _proof_json(proof: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return dict(proof) if proof is not None else None
