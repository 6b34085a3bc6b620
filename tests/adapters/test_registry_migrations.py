"""The registry's database: every schema that there ever was is brought up to date with what is in it, or not at all.

`registry_dumps/` holds a small database of each older schema, as it was released: whoever adds a migration adds the
dump of the schema before it.
"""

import shutil
import sqlite3
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from loradock_adapters import registry_schema
from loradock_adapters.base_identity import BaseIdentity
from loradock_adapters.errors import RegistryError
from loradock_adapters.gate import Verdict
from loradock_adapters.manifest import FileEntry, Manifest
from loradock_adapters.problems import Problem
from loradock_adapters.registry import Details, Registry
from loradock_adapters.registry_schema import metadata, open_database
from loradock_adapters.traffic import Traffic

DUMPS = Path(__file__).with_name("registry_dumps")
OLDER = sorted(path.stem for path in DUMPS.glob("*.sql"))
BASE = BaseIdentity("m", "a" * 64, "b" * 64)
SHARED = Verdict("lora", "shared", (), 8)


def manifest(seed: int) -> Manifest:
    return Manifest((FileEntry("adapter_config.json", seed, f"{seed:064x}"),))


def digest(seed: int) -> str:
    return f"sha256:{seed:064x}"


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/registry.db"


def older_database(path: Path, revision: str) -> None:
    with sqlite3.connect(path) as raw:
        raw.executescript((DUMPS / f"{revision}.sql").read_text())
    raw.close()


def schema_of(engine: sa.Engine) -> list[object]:
    """How the database's schema differs from what the code expects."""
    with engine.connect() as connection:
        return list(compare_metadata(MigrationContext.configure(connection), metadata))


def test_every_older_schema_has_a_dump() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(registry_schema.__file__).with_name("migrations")))
    scripts = ScriptDirectory.from_config(config)
    older = sorted(script.revision for script in scripts.walk_revisions() if not script.is_head)
    assert older == OLDER


def test_fresh_database_has_the_schema_that_the_code_expects(url: str) -> None:
    engine = open_database(url)
    assert schema_of(engine) == []
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar_one() == "0004"
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "wal"
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar_one() == 1
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar_one() == 2
    engine.dispose()


@pytest.mark.parametrize("revision", OLDER)
def test_database_of_an_older_schema_is_upgraded_with_all_that_is_in_it(
    revision: str, url: str, tmp_path: Path
) -> None:
    older_database(tmp_path / "registry.db", revision)
    registry = Registry(url)
    first, second = registry.resolve("sql@1"), registry.resolve("sql@2")
    assert (first.current, second.current, registry.resolve("sql")) == (True, False, first)
    assert (first.digest, first.rank, first.chat_template, first.stop_token_ids) == (digest(1), 8, "{{ x }}", (2, 5))
    assert first.created_at == datetime(2026, 10, 1, 12, tzinfo=UTC)
    assert registry.manifest(second) == manifest(2)
    full = registry.resolve("full")
    assert (full.placement, full.reasons) == ("dedicated", (Problem("full_weights", "complete weights"),))
    assert first.base == (BASE if revision >= "0002" else None)
    assert registry.claim(BASE) == (1 if revision >= "0002" else 3)
    assert [version.name for version in registry.pins()] == (["sql"] if revision >= "0003" else [])
    asked = registry.traffic.between(0, 1_000_000)
    assert asked == (Traffic({digest(1): 17}, 2, 1) if revision >= "0003" else Traffic({}, 0, 0))
    assert {(v.proof, v.repairs, v.source, v.publisher) for v in (first, second, full)} == {(None, (), None, None)}
    assert registry.publish("gone", manifest(9), SHARED, base=BASE).number == 5
    registry.close()
    engine = sa.create_engine(url)
    assert schema_of(engine) == []
    engine.dispose()


@pytest.mark.parametrize("revision", OLDER)
def test_upgraded_database_keeps_what_only_the_newest_schema_has_room_for(
    revision: str, url: str, tmp_path: Path
) -> None:
    older_database(tmp_path / "registry.db", revision)
    registry = Registry(url)
    repairs = (Problem("rekeyed", "the prefix was wrong", "model.x"),)
    details = Details(proof={"state": "proven"}, repairs=repairs, source="hf://o/r@abc", publisher="ada")
    made = registry.publish("sql", manifest(8), SHARED, details, BASE)
    assert registry.resolve("sql") == registry.versions("sql")[0]
    read = registry.resolve("sql")
    assert (read.number, read.proof, read.repairs) == (3, {"state": "proven"}, repairs)
    assert (read.source, read.publisher, made.source) == ("hf://o/r@abc", "ada", "hf://o/r@abc")
    registry.close()


def test_older_database_opened_by_several_at_once_is_upgraded_once(url: str, tmp_path: Path) -> None:
    older_database(tmp_path / "registry.db", "0001")
    barrier = threading.Barrier(4)
    numbers: list[int] = []

    def open_it() -> None:
        barrier.wait()
        registry = Registry(url)
        numbers.append(registry.resolve("sql").number)
        registry.close()

    threads = [threading.Thread(target=open_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert numbers == [1] * 4


def test_upgrade_that_fails_leaves_the_older_database_as_it_was(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alembic import op

    def broken(*_arguments: object, **_settings: object) -> None:
        raise sa.exc.OperationalError("CREATE TABLE", {}, Exception("disk full"))

    older_database(tmp_path / "registry.db", "0003")
    shutil.copy(tmp_path / "registry.db", tmp_path / "before.db")
    with monkeypatch.context() as patch:
        patch.setattr(op, "create_table", broken)  # by then the first columns of 0004 are added
        with pytest.raises(RegistryError, match="disk full"):
            Registry(url)
    for statement in ("SELECT sql FROM sqlite_master", "SELECT * FROM versions", "SELECT * FROM alembic_version"):
        with sqlite3.connect(tmp_path / "registry.db") as now, sqlite3.connect(tmp_path / "before.db") as before:
            assert now.execute(statement).fetchall() == before.execute(statement).fetchall()
        now.close()
        before.close()
    registry = Registry(url)
    assert registry.resolve("sql").number == 1
    registry.close()


def test_half_migrated_database_is_impossible(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from alembic import op

    def broken(*_arguments: object, **_settings: object) -> None:
        raise sa.exc.OperationalError("CREATE INDEX", {}, Exception("disk full"))

    with monkeypatch.context() as patch:
        patch.setattr(op, "create_index", broken)
        with pytest.raises(RegistryError, match="disk full"):
            Registry(url)
    engine = sa.create_engine(url)
    assert sa.inspect(engine).get_table_names() == []
    engine.dispose()
    Registry(url).close()


def test_database_of_a_newer_loradock_refused_and_untouched(url: str, tmp_path: Path) -> None:
    Registry(url).close()
    with sqlite3.connect(tmp_path / "registry.db") as raw:
        raw.execute("UPDATE alembic_version SET version_num = '9999'")
    raw.close()
    with pytest.raises(RegistryError, match="newer Loradock"):
        Registry(url)
