"""What only a registry on PostgreSQL has to show: who hears of changes, what a server that goes away does, and that
passwords stay where they are."""

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
import sqlalchemy as sa

from loradock_adapters import registry_changes
from loradock_adapters.errors import RegistryError
from loradock_adapters.gate import Verdict
from loradock_adapters.manifest import FileEntry, Manifest
from loradock_adapters.registry import Registry, Version
from loradock_adapters.registry_changes import CHANNEL, PostgresChanges
from loradock_adapters.registry_url import connect_arguments, parse_url, shown
from loradock_testing.postgres import PASSWORD, PostgresServer, postgres_server

SHARED = Verdict("lora", "shared", (), 8)


def manifest(seed: int) -> Manifest:
    return Manifest((FileEntry("adapter_config.json", seed, f"{seed:064x}"),))


def changes_of(registry: Registry) -> PostgresChanges:
    """Those of a registry that hears already."""
    changes = registry._changes
    assert isinstance(changes, PostgresChanges)
    assert changes.wait_until_listening(10)
    return changes


def until_other(registry: Registry, last: int, timeout_s: float = 15.0) -> float:
    """How long it took until the generation was another one."""
    began = time.perf_counter()
    while registry.generation() == last:
        assert time.perf_counter() - began < timeout_s, "the change was not seen"
        time.sleep(0.0005)
    return time.perf_counter() - began


@pytest.fixture(scope="module")
def own_server(postgres: PostgresServer) -> Iterator[PostgresServer]:
    """A server that tests may stop."""
    with postgres_server() as server:
        yield server


def test_another_ones_change_is_heard_within_a_fraction_of_a_second(postgres: PostgresServer) -> None:
    url = postgres.new_database()
    here, there = Registry(url), Registry(url)
    changes_of(here)
    seconds = []
    for seed in range(20):
        before = here.generation()
        there.publish("sql", manifest(seed), SHARED)
        seconds.append(until_other(here, before))
    # A few milliseconds at rest; the listener would look by itself after WAIT_S.
    assert sorted(seconds)[10] < registry_changes.WAIT_S / 2, seconds
    here.close()
    there.close()


def test_asking_for_the_generation_asks_no_database(postgres: PostgresServer) -> None:
    registry = Registry(postgres.new_database())
    changes_of(registry)
    asked: list[str] = []
    sa.event.listen(registry._engine, "before_cursor_execute", lambda *args: asked.append(args[2]))
    for _ in range(10_000):
        registry.generation()
    assert asked == []
    registry.close()


def test_transaction_that_is_rolled_back_changes_nothing_for_others(postgres: PostgresServer) -> None:
    url = postgres.new_database()
    here, there = Registry(url), Registry(url)
    changes_of(here)
    before = here.generation()
    with pytest.raises(RuntimeError), there._writer.begin():
        raise RuntimeError
    there.publish("sql", manifest(1), SHARED)
    until_other(here, before)
    assert here.generation() == before + 1
    here.close()
    there.close()


def test_notices_that_do_not_come_through_are_told_and_replaced_by_looking_often(
    postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(registry_changes, "PROBE_TIMEOUT_S", 0.1)
    monkeypatch.setattr(registry_changes, "WAIT_S", 0.05)
    monkeypatch.setattr(registry_changes, "CHANNEL", "another_channel")
    registry = Registry(postgres.new_database())
    deaf = registry._changes
    assert isinstance(deaf, PostgresChanges)
    monkeypatch.setattr(deaf, "_hears", lambda _connection: False)  # as behind a pooler that hands out connections
    assert deaf.wait_until_listening(10)
    for _ in range(3):
        until_other(registry, registry.generation())
    assert "notices do not come through" in caplog.text
    registry.close()


def test_server_that_goes_away_leaves_the_generation_as_it_is_and_changes_it_when_it_is_back(
    own_server: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    registry = Registry(own_server.new_database())
    registry.publish("sql", manifest(1), SHARED)
    changes = changes_of(registry)
    before = registry.generation()
    own_server.stop()
    with pytest.raises(sa.exc.OperationalError):
        registry.resolve("sql")
    with pytest.raises(sa.exc.OperationalError):
        registry.publish("sql", manifest(2), SHARED)
    deadline = time.monotonic() + 15
    while changes._listening.is_set():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    away = registry.generation()
    assert away == before
    own_server.start()
    assert changes.wait_until_listening(10)
    until_other(registry, away)
    assert registry.resolve("sql").number == 1
    assert registry.publish("sql", manifest(2), SHARED).number == 2
    assert caplog.text.count("is not heard") == 1
    assert "is heard again" in caplog.text
    assert PASSWORD not in caplog.text
    registry.close()


def first_publish(registry: Registry, name: str, seed: int) -> Version:
    return registry.publish(name, manifest(seed), SHARED)


def test_first_publish_of_a_name_by_two_at_once_gives_each_a_number(postgres: PostgresServer) -> None:
    url = postgres.new_database()
    registries = [Registry(url), Registry(url)]
    for name in (f"n{i}" for i in range(10)):
        with ThreadPoolExecutor(2) as pool:
            made = pool.map(first_publish, registries, [name] * 2, (1, 2))
            assert sorted(version.number for version in made) == [1, 2]
    for registry in registries:
        registry.close()


def test_pinning_twice_at_once_is_pinning_once(postgres: PostgresServer) -> None:
    url = postgres.new_database()
    registry = Registry(url)
    registry.publish("sql", manifest(1), SHARED)
    barrier = threading.Barrier(4)
    errors: list[Exception] = []

    def pin() -> None:
        barrier.wait()
        try:
            registry.pin("sql")
        except sa.exc.SQLAlchemyError as error:
            errors.append(error)

    threads = [threading.Thread(target=pin) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [version.name for version in registry.pins()] == ["sql"]
    registry.close()


def test_wrong_password_is_told_without_the_password(postgres: PostgresServer) -> None:
    with pytest.raises(RegistryError, match="cannot be opened") as caught:
        Registry(postgres.url("postgres", password="s3cret-and-wrong"))
    told: BaseException | None = caught.value
    while told is not None:
        assert "s3cret" not in str(told) + repr(told)
        told = told.__cause__ or told.__context__


@pytest.mark.parametrize(
    "text", ["postgresql://u:s3cret@h:port/d", "s3cret", "postgresql+asyncpg://u:s3cret@h/d", "mysql://u:s3cret@h/d"]
)
def test_url_that_cannot_be_used_is_told_without_its_password(text: str) -> None:
    with pytest.raises(RegistryError) as caught:
        parse_url(text)
    assert "s3cret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_url_is_shown_without_password_and_settings() -> None:
    url = parse_url("postgres://u:s3cret@h:5433/d?password=s3cret&sslmode=require&connect_timeout=60")
    assert shown(url) == "postgresql+psycopg://u:***@h:5433/d"
    assert "s3cret" not in repr(url)
    arguments = connect_arguments(url)
    assert "connect_timeout" not in arguments, "what the URL says counts"
    assert arguments["tcp_user_timeout"] == 10_000


def test_listener_uses_the_channel_that_writers_tell(postgres: PostgresServer) -> None:
    url = postgres.new_database()
    registry = Registry(url)
    changes_of(registry)
    before = registry.generation()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"NOTIFY {CHANNEL}")
    until_other(registry, before)
    registry.close()
