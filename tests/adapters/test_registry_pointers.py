"""The registry: tags, splits, and removing single versions."""

import threading
from collections.abc import Iterator

import pytest

from loradock_adapters.errors import InUseError, InvalidNameError, NotFoundError, UsageError
from loradock_adapters.gate import Verdict
from loradock_adapters.manifest import FileEntry, Manifest
from loradock_adapters.registry import Registry
from loradock_adapters.splits_table import MAX_SHARES

SHARED = Verdict("lora", "shared", (), 8)


def manifest(seed: int) -> Manifest:
    return Manifest((FileEntry("adapter_config.json", seed, f"{seed:064x}"),))


@pytest.fixture
def registry(url: str) -> Iterator[Registry]:
    """With versions 1 to 4 of `sql`, and one of `other`."""
    registry = Registry(url)
    for seed in range(1, 5):
        registry.publish("sql", manifest(seed), SHARED)
    registry.publish("other", manifest(1), SHARED)
    yield registry
    registry.close()


def numbers(registry: Registry, name: str = "sql") -> list[int]:
    return [version.number for version in registry.versions(name)]


# Tags


def test_tag_names_a_version_until_it_is_moved(registry: Registry) -> None:
    assert registry.tags.set("sql", "prod", 2) is None
    assert registry.resolve("sql@prod").number == 2
    registry.publish("sql", manifest(5), SHARED)
    registry.set_current("sql", 1)
    assert registry.resolve("sql@prod").number == 2
    assert registry.tags.set("sql", "prod", 3) == 2
    assert registry.tags.set("sql", "prod", 3) == 3
    assert registry.resolve("sql@prod").digest == manifest(3).digest


def test_tags_belong_to_their_name(registry: Registry) -> None:
    registry.tags.set("sql", "prod", 2)
    registry.tags.set("sql", "beta", 4)
    registry.tags.set("other", "prod", 1)
    assert registry.tags.of("sql") == {"beta": 4, "prod": 2}
    assert registry.tags.all() == {"sql": {"beta": 4, "prod": 2}, "other": {"prod": 1}}
    assert registry.resolve("other@prod").name == "other"
    assert (registry.tags.remove("sql", "prod"), registry.tags.remove("sql", "prod")) == (True, False)
    assert registry.tags.all() == {"sql": {"beta": 4}, "other": {"prod": 1}}


@pytest.mark.parametrize(("name", "number"), [("sql", 9), ("none", 1), ("other", 2)])
def test_tag_of_a_version_that_is_not_there_refused(registry: Registry, name: str, number: int) -> None:
    with pytest.raises(NotFoundError, match=f"no version {number} of {name}"):
        registry.tags.set(name, "prod", number)


@pytest.mark.parametrize("tag", ["7", "", "Prod", "sha256:" + "a" * 64])
def test_tag_that_could_be_a_number_or_a_digest_refused(registry: Registry, tag: str) -> None:
    with pytest.raises(InvalidNameError):
        registry.tags.set("sql", tag, 1)


# Splits


def test_route_of_a_name_without_a_split_is_its_current_version(registry: Registry) -> None:
    route = registry.route("sql")
    assert (route.current.number, route.shares) == (4, ())
    with pytest.raises(NotFoundError):
        registry.route("none")


def test_split_shares_the_route_and_moves_no_pointer(registry: Registry) -> None:
    assert registry.splits.set("sql", {3: 90, 2: 10}) == {}
    route = registry.route("sql")
    assert (route.current, route.current.number) == (registry.resolve("sql"), 4)
    assert [(version.number, weight) for version, weight in route.shares] == [(2, 10), (3, 90)]
    assert registry.splits.set("sql", {3: 1, 4: 1}) == {2: 10, 3: 90}
    assert [(version.number, version.current) for version, _ in registry.route("sql").shares] == [(3, False), (4, True)]
    assert registry.splits.all() == {"sql": {3: 1, 4: 1}}
    assert registry.route("other").shares == ()
    assert registry.splits.remove("sql") == {3: 1, 4: 1}
    assert (registry.splits.remove("sql"), registry.route("sql").shares) == ({}, ())


@pytest.mark.parametrize(
    "weights",
    [{}, {3: 100}, {3: 0, 4: 100}, {3: -1, 4: 2}, {3: 1_000_001, 4: 1}, dict.fromkeys(range(1, MAX_SHARES + 2), 1)],
)
def test_split_that_is_none_refused_and_the_old_one_kept(registry: Registry, weights: dict[int, int]) -> None:
    registry.splits.set("sql", {1: 1, 2: 1})
    with pytest.raises(UsageError):
        registry.splits.set("sql", weights)
    assert registry.splits.of("sql") == {1: 1, 2: 1}


def test_split_over_a_version_that_is_not_there_refused_and_the_old_one_kept(registry: Registry) -> None:
    registry.splits.set("sql", {1: 1, 2: 1})
    with pytest.raises(NotFoundError, match="version 9"):
        registry.splits.set("sql", {3: 90, 9: 10})
    assert registry.splits.of("sql") == {1: 1, 2: 1}


def test_pointing_a_name_somewhere_ends_its_split(registry: Registry) -> None:
    registry.splits.set("sql", {1: 1, 2: 1})
    assert registry.set_current("sql", 3).current
    assert registry.splits.of("sql") == {}
    assert registry.route("sql").current.number == 3


def test_publish_beside_a_split_waits_for_somebody_to_send_traffic_there(registry: Registry) -> None:
    registry.splits.set("sql", {3: 90, 4: 10})
    version = registry.publish("sql", manifest(5), SHARED)
    assert (version.number, version.created, version.current) == (5, True, False)
    assert (registry.resolve("sql").number, registry.splits.of("sql")) == (4, {3: 90, 4: 10})
    registry.splits.remove("sql")
    assert registry.publish("sql", manifest(6), SHARED).current


# Removing


def test_version_is_removed_alone_and_its_number_never_used_again(registry: Registry) -> None:
    assert registry.delete_version("sql", 2).digest == manifest(2).digest
    assert numbers(registry) == [4, 3, 1]
    with pytest.raises(NotFoundError):
        registry.resolve("sql@2")
    again = registry.publish("sql", manifest(2), SHARED)
    assert (again.number, again.created) == (5, True)
    with pytest.raises(NotFoundError, match="no version 2 of sql"):
        registry.delete_version("sql", 2)


def test_version_that_something_points_at_is_kept_with_what_to_do(registry: Registry) -> None:
    registry.tags.set("sql", "prod", 1)
    registry.splits.set("sql", {2: 1, 3: 1})
    advice = {4: r"loradock promote sql VERSION.*loradock rm sql", 1: r"loradock untag sql prod", 2: r"split sql --off"}
    for number, what_to_do in advice.items():
        with pytest.raises(InUseError, match=what_to_do):
            registry.delete_version("sql", number)
    assert numbers(registry) == [4, 3, 2, 1]
    registry.splits.remove("sql")
    registry.tags.remove("sql", "prod")
    for number in (1, 2, 3):
        registry.delete_version("sql", number)
    with pytest.raises(InUseError):
        registry.delete_version("sql", 4)


def test_name_goes_with_its_tags_and_its_split(registry: Registry) -> None:
    registry.tags.set("sql", "prod", 1)
    registry.splits.set("sql", {2: 1, 3: 1})
    registry.delete("sql")
    assert (registry.tags.all(), registry.splits.all()) == ({}, {})
    registry.publish("sql", manifest(9), SHARED)
    with pytest.raises(NotFoundError):
        registry.resolve("sql@prod")
    assert registry.route("sql").shares == ()


def test_route_is_whole_while_pointers_splits_and_versions_move(registry: Registry) -> None:
    """No reader ever sees a share of a version that is gone, or half of a split."""
    done = threading.Event()
    seen: list[tuple[int, dict[int, int]]] = []

    def read() -> None:
        while not done.is_set():
            route = registry.route("sql")
            seen.append((route.current.number, {version.number: weight for version, weight in route.shares}))

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for turn in range(15):
        registry.splits.set("sql", {3: 90, 4: 10})
        removable = registry.publish("sql", manifest(100 + turn), SHARED)
        registry.splits.set("sql", {1: 50, 4: 50, removable.number: 5})
        registry.set_current("sql", 1)
        registry.delete_version("sql", removable.number)
        registry.set_current("sql", 4)
    done.set()
    for reader in readers:
        reader.join()
    newest = {4 + turn + 1 for turn in range(15)}
    whole = [(4, {}), (1, {}), (4, {3: 90, 4: 10}), *((4, {1: 50, 4: 50, number: 5}) for number in newest)]
    assert [route for route in seen if route not in whole] == []
    assert len(seen) > 3
