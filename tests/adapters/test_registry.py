"""The registry: names point at versions, pointers move at once or not at all."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext

from loradock_adapters import registry_schema
from loradock_adapters.base_identity import BaseIdentity
from loradock_adapters.errors import InvalidNameError, NotFoundError, RegistryError
from loradock_adapters.gate import Verdict
from loradock_adapters.manifest import FileEntry, Manifest
from loradock_adapters.names import ModelRef
from loradock_adapters.problems import Problem
from loradock_adapters.registry import Counts, Details, Registry
from loradock_adapters.registry_changes import PostgresChanges
from loradock_adapters.registry_schema import versions
from loradock_adapters.registry_url import parse_url

SHARED = Verdict("lora", "shared", (), 8)
DEDICATED = Verdict("full", "dedicated", (Problem("full_weights", "complete weights", "here", "nothing"),), None)


def manifest(seed: int = 0) -> Manifest:
    return Manifest((FileEntry("adapter_config.json", seed, f"{seed:064x}"),))


@pytest.fixture
def registry(url: str) -> Iterator[Registry]:
    registry = Registry(url)
    yield registry
    registry.close()


def test_publish_first_version_is_current_and_whole(registry: Registry) -> None:
    details = Details(chat_template="{{ x }}", stop_token_ids=(2, 5))
    version = registry.publish("sql", manifest(7), DEDICATED, details)
    assert (version.name, version.number, version.created, version.current) == ("sql", 1, True, True)
    assert (version.kind, version.placement, version.reasons) == ("full", "dedicated", DEDICATED.reasons)
    assert (version.digest, version.size_bytes) == (manifest(7).digest, 7)
    assert (version.chat_template, version.stop_token_ids, version.rank) == ("{{ x }}", (2, 5), None)
    assert datetime.now(UTC) - version.created_at < timedelta(seconds=30)
    read = registry.resolve("sql")
    assert (read.created, read.created_at) == (False, version.created_at)
    assert read.created_at.tzinfo is UTC
    assert registry.manifest(read) == manifest(7)


def test_publish_other_bytes_count_up_and_move_the_pointer(registry: Registry) -> None:
    numbers = [registry.publish("sql", manifest(seed), SHARED).number for seed in range(3)]
    assert numbers == [1, 2, 3]
    assert registry.resolve("sql").number == 3
    assert [(v.number, v.current) for v in registry.versions("sql")] == [(3, True), (2, False), (1, False)]


def test_publish_same_bytes_as_current_is_no_new_version(registry: Registry) -> None:
    first = registry.publish("sql", manifest(), SHARED)
    again = registry.publish("sql", manifest(), SHARED)
    assert (again.number, again.created, again.digest) == (1, False, first.digest)
    assert registry.counts() == Counts(names=1, versions=1, digests=1)


def test_publish_same_bytes_under_new_engine_settings_takes_the_new_verdict(registry: Registry) -> None:
    registry.publish("sql", manifest(), DEDICATED)
    again = registry.publish("sql", manifest(), SHARED)
    assert (again.number, again.created, again.placement, again.reasons) == (1, False, "shared", ())
    assert registry.resolve("sql") == again


def test_publish_same_bytes_as_an_older_version_changes_nothing_and_returns_that_one(registry: Registry) -> None:
    for seed in (1, 2, 1):
        version = registry.publish("sql", manifest(seed), SHARED)
    assert (version.number, version.created, version.current) == (1, False, False)
    assert registry.resolve("sql").number == 2
    assert registry.counts() == Counts(names=1, versions=2, digests=2)


def test_digest_with_several_numbers_from_an_older_registry_means_the_current_one(registry: Registry) -> None:
    for seed in (1, 2, 3):
        registry.publish("sql", manifest(seed), SHARED)
    with registry._writer.begin() as connection:
        connection.execute(sa.update(versions).values(digest=manifest(9).digest))
    pinned = ModelRef("sql", digest=manifest(9).digest)
    assert registry.resolve(pinned).number == 3
    registry.set_current("sql", 2)
    assert registry.resolve(pinned).number == 2
    again = registry.publish("sql", manifest(9), SHARED)
    assert (again.number, again.created, again.current) == (2, False, True)


def test_publish_after_rollback_counts_on_from_the_last(registry: Registry) -> None:
    for seed in (1, 2):
        registry.publish("sql", manifest(seed), SHARED)
    registry.set_current("sql", 1)
    assert registry.publish("sql", manifest(3), SHARED).number == 3


@pytest.mark.parametrize("name", ["base", "A", "../x", "", "x" * 97])
def test_publish_bad_name_refused(registry: Registry, name: str) -> None:
    with pytest.raises(InvalidNameError):
        registry.publish(name, manifest(), SHARED)
    assert registry.counts().names == 0


def test_publish_rejected_checkpoint_never_stored(registry: Registry) -> None:
    with pytest.raises(ValueError, match="rejected"):
        registry.publish("sql", manifest(), Verdict("lora", "rejected", (), 8))
    assert registry.models() == []


def test_resolve_name_number_and_digest(registry: Registry) -> None:
    for seed in (1, 2):
        registry.publish("sql", manifest(seed), SHARED)
    assert registry.resolve("sql").number == 2
    assert registry.resolve("sql@1").digest == manifest(1).digest
    assert registry.resolve(f"sql@{manifest(1).digest}").number == 1
    assert registry.resolve(ModelRef("sql", version=1)).current is False


@pytest.mark.parametrize("ref", ["other", "sql@3", "sql@sha256:" + "0" * 64, "sql@prod", "base"])
def test_resolve_what_is_not_there_not_found(registry: Registry, ref: str) -> None:
    registry.publish("sql", manifest(), SHARED)
    with pytest.raises(NotFoundError):
        registry.resolve(ref)


def test_resolve_another_names_digest_not_found(registry: Registry) -> None:
    registry.publish("a", manifest(1), SHARED)
    registry.publish("b", manifest(2), SHARED)
    with pytest.raises(NotFoundError):
        registry.resolve(f"a@{manifest(2).digest}")


def test_models_current_versions_by_name(registry: Registry) -> None:
    for name, seed in [("b", 1), ("a", 2), ("b", 3)]:
        registry.publish(name, manifest(seed), SHARED)
    assert [(version.name, version.number) for version in registry.models()] == [("a", 1), ("b", 2)]


def test_set_current_moves_the_pointer_back(registry: Registry) -> None:
    for seed in (1, 2):
        registry.publish("sql", manifest(seed), SHARED)
    version = registry.set_current("sql", 1)
    assert (version.number, version.current) == (1, True)
    assert registry.resolve("sql").number == 1
    with pytest.raises(NotFoundError, match="version 9"):
        registry.set_current("sql", 9)
    assert registry.resolve("sql").number == 1


def test_delete_name_is_gone_and_its_numbers_are_never_used_again(registry: Registry) -> None:
    for seed in (1, 2):
        registry.publish("sql", manifest(seed), SHARED)
    assert [version.number for version in registry.delete("sql")] == [2, 1]
    for gone in (registry.resolve, registry.versions, registry.delete):
        with pytest.raises(NotFoundError):
            gone("sql")
    assert registry.digests() == set()
    assert registry.publish("sql", manifest(1), SHARED).number == 3
    with pytest.raises(NotFoundError):
        registry.resolve("sql@1")


def test_digests_are_those_of_all_versions(registry: Registry) -> None:
    for name, seed in [("a", 1), ("b", 1), ("b", 2)]:
        registry.publish(name, manifest(seed), SHARED)
    assert registry.digests() == {manifest(1).digest, manifest(2).digest}


def test_reopened_registry_has_everything(url: str) -> None:
    first = Registry(url)
    first.publish("sql", manifest(1), DEDICATED, Details("t", (1,)))
    before = first.resolve("sql")
    first.close()
    second = Registry(url)
    assert second.resolve("sql") == before
    second.close()


def test_threads_publishing_to_one_name_get_a_number_each(registry: Registry) -> None:
    barrier = threading.Barrier(8)
    numbers: list[int] = []

    def publish(seed: int) -> None:
        barrier.wait()
        numbers.extend(registry.publish("sql", manifest(10 * seed + i), SHARED).number for i in range(5))

    threads = [threading.Thread(target=publish, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(1, 41))
    assert registry.resolve("sql").number == 40


def test_readers_see_the_old_or_the_new_version_while_pointers_move(registry: Registry) -> None:
    registry.publish("sql", manifest(0), SHARED)
    done = threading.Event()
    seen: list[int] = []

    def read() -> None:
        while not done.is_set():
            version = registry.resolve("sql")
            assert version.current
            assert version.digest == manifest(version.number - 1).digest
            seen.append(version.number)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for seed in range(1, 30):
        registry.publish("sql", manifest(seed), SHARED)
    done.set()
    for reader in readers:
        reader.join()
    assert seen
    assert max(seen) <= 30


_WRITERS = """
import os, sys
from loradock_adapters.gate import Verdict
from loradock_adapters.manifest import FileEntry, Manifest
from loradock_adapters.registry import Registry
url, count, versions = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
gate, starter = os.pipe()
children = []
for child in range(count):
    if not (pid := os.fork()):
        os.close(starter)
        os.read(gate, 1)
        registry = Registry(url)
        for i in range(versions):
            file = FileEntry("a.json", i, f"{(child + 1) * 1000 + i:064x}")
            version = registry.publish("sql", Manifest((file,)), Verdict("lora", "shared", (), 8))
            os.write(1, f"{version.number}\\n".encode())
        registry.close()
        os._exit(0)
    children.append(pid)
os.close(starter)
sys.exit(sum(os.waitpid(pid, 0)[1] != 0 for pid in children))
"""


def writers(url: str, count: int, versions: int) -> subprocess.Popen[str]:
    """Processes that all open the same registry at the same moment and publish to one name; with the one that
    started them they are a process group."""
    command = [sys.executable, "-c", _WRITERS, url, str(count), str(versions)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def test_processes_opening_a_fresh_database_at_once_all_succeed(url: str) -> None:
    process = writers(url, 8, 5)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    assert sorted(map(int, printed.split())) == list(range(1, 41))
    registry = Registry(url)
    assert registry.counts() == Counts(names=1, versions=40, digests=40)
    registry.close()


def older_database(url: str) -> None:
    """Tables of the first schema, with a name in them that has had four versions."""
    config = Config()
    config.set_main_option("script_location", str(Path(registry_schema.__file__).with_name("migrations")))
    engine = sa.create_engine(parse_url(url))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.execute(sa.text("INSERT INTO models VALUES ('sql', NULL, 4)"))
    engine.dispose()


def test_processes_opening_a_database_of_the_first_schema_at_once_all_succeed(url: str) -> None:
    older_database(url)
    process = writers(url, 8, 2)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    assert sorted(map(int, printed.split())) == list(range(5, 21))
    registry = Registry(url)
    with registry._engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), registry_schema.metadata) == []
    registry.close()


def test_process_killed_while_publishing_leaves_a_whole_registry(url: str) -> None:
    process = writers(url, 1, 100_000)
    assert process.stdout is not None
    acknowledged = [int(process.stdout.readline()) for _ in range(20)]
    os.killpg(process.pid, signal.SIGKILL)
    acknowledged += [int(line) for line in process.stdout.read().split() if line]
    process.wait()
    process.stdout.close()
    registry = Registry(url)
    registry.pin("sql")  # waits for a commit that PostgreSQL may still have under way
    stored = registry.versions("sql")
    assert [version.number for version in reversed(stored)] == list(range(1, len(stored) + 1))
    assert len(stored) in (acknowledged[-1], acknowledged[-1] + 1)  # one may have been stored and not yet said
    assert registry.resolve("sql").number == len(stored)
    assert registry.publish("sql", manifest(99), SHARED).number == len(stored) + 1
    registry.close()


BASE = BaseIdentity("m", "a" * 64, "b" * 64)
OTHER = BaseIdentity("m", "a" * 64, "c" * 64)


def test_version_remembers_its_base_and_the_same_bytes_take_the_base_of_today(registry: Registry) -> None:
    assert registry.publish("sql", manifest(), SHARED, base=BASE).base == BASE
    assert registry.resolve("sql").base == BASE
    assert registry.publish("sql", manifest(), SHARED, base=OTHER).base == OTHER
    assert registry.resolve("sql").base == OTHER
    registry.publish("full", manifest(2), Verdict("full", "dedicated", (), None), base=BASE)
    assert registry.bases() == {OTHER: 1}, "full models need no base"


def test_pin_follows_its_name_to_another_version_and_goes_with_it(registry: Registry) -> None:
    for name, seed in (("late", 1), ("early", 2), ("early", 3), ("other", 4)):
        registry.publish(name, manifest(seed), SHARED)
    for name in ("early", "late", "early"):
        registry.pin(name)
    assert [(version.name, version.number) for version in registry.pins()] == [("early", 2), ("late", 1)]
    registry.set_current("early", 1)
    assert [version.number for version in registry.pins()] == [1, 1]
    registry.delete("early")
    registry.publish("early", manifest(5), SHARED)
    assert [version.name for version in registry.pins()] == ["late"]
    assert (registry.unpin("late"), registry.unpin("late"), registry.pins()) == (True, False, [])


def test_pin_of_an_unknown_name_refused(registry: Registry) -> None:
    registry.publish("gone", manifest(), SHARED)
    registry.delete("gone")
    for name in ("gone", "never"):
        with pytest.raises(NotFoundError):
            registry.pin(name)


def test_older_ranks_are_those_of_versions_that_can_still_be_asked_for(registry: Registry) -> None:
    for seed, rank in enumerate((32, 32, 4)):
        registry.publish("sql", manifest(seed), Verdict("lora", "shared", (), rank), base=BASE)
    registry.publish("full", manifest(7), DEDICATED)
    registry.publish("full", manifest(8), DEDICATED)
    assert registry.older_ranks() == {(32, BASE)}


def test_versions_without_a_base_are_claimed_once(registry: Registry) -> None:
    registry.publish("old", manifest(1), SHARED)
    registry.publish("new", manifest(2), SHARED, base=OTHER)
    assert registry.bases() == {OTHER: 1}
    assert registry.claim(BASE) == 1
    assert (registry.resolve("old").base, registry.resolve("new").base) == (BASE, OTHER)
    assert registry.claim(OTHER) == 0


def next_generation(registry: Registry, last: int) -> int:
    """The first other generation than the last one."""
    deadline = time.monotonic() + 15
    while (generation := registry.generation()) == last:
        assert time.monotonic() < deadline, "the change was not seen"
        time.sleep(0.001)
    return generation


def test_generation_changes_with_every_commit_also_of_another_process(registry: Registry, url: str) -> None:
    if isinstance(registry._changes, PostgresChanges):
        assert registry._changes.wait_until_listening(10)
    other = Registry(url)
    seen = [registry.generation()]
    assert registry.generation() == seen[0]
    for publisher in (other, registry, other):
        publisher.publish("sql", manifest(len(seen)), SHARED)
        seen.append(next_generation(registry, seen[-1]))
    other.close()


def test_file_that_is_no_database_refused(tmp_path: Path) -> None:
    (tmp_path / "registry.db").write_text("not a database at all, but long enough to be looked at")
    with pytest.raises(RegistryError, match="cannot be opened"):
        Registry(f"sqlite:///{tmp_path}/registry.db")


def test_folder_that_is_missing_refused(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="cannot be opened"):
        Registry(f"sqlite:///{tmp_path}/none/registry.db")


@pytest.mark.parametrize("memory", ["sqlite://", "sqlite:///:memory:"])
def test_in_memory_database_refused(memory: str) -> None:
    with pytest.raises(RegistryError, match="needs a file"):
        Registry(memory)


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_proof_and_repairs_are_kept_and_the_same_bytes_take_the_proof_of_today(registry: Registry) -> None:
    repairs = (Problem("rekeyed", "the prefix was wrong", "model.x"),)
    first = Details(proof={"state": "unproven"}, repairs=repairs, source="hf://o/r@abc", publisher="ada")
    registry.publish("sql", manifest(), SHARED, first)
    assert registry.publish("sql", manifest(), SHARED, Details(publisher="bob")).proof == {"state": "unproven"}
    again = registry.publish("sql", manifest(), SHARED, Details(proof={"state": "proven", "gap": 0.5}))
    assert (again.created, again.proof) == (False, {"state": "proven", "gap": 0.5})
    assert registry.resolve("sql") == again
    assert (again.repairs, again.source, again.publisher) == (repairs, "hf://o/r@abc", "ada")


def test_proof_found_later_is_remembered_for_all_versions_with_these_bytes(registry: Registry) -> None:
    for name, seed in (("a", 1), ("b", 1), ("b", 2)):
        registry.publish(name, manifest(seed), DEDICATED)
    assert registry.set_proof(manifest(1).digest, {"state": "failed"}) == 2
    states = [version.proof for name in "ab" for version in registry.versions(name)]
    assert states == [{"state": "failed"}, None, {"state": "failed"}]


def test_proof_that_fails_later_takes_nothing_from_whoever_published_with_force(registry: Registry) -> None:
    forced = {"state": "unproven", "forced": True}
    registry.publish("forced", manifest(), DEDICATED, Details(proof=forced))
    registry.publish("open", manifest(), DEDICATED, Details(proof={"state": "unproven"}))
    assert registry.set_proof(manifest().digest, {"state": "failed"}) == 1
    assert (registry.resolve("forced").proof, registry.resolve("open").proof) == (forced, {"state": "failed"})
