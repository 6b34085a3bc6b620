"""From a model's name to its version, few models and many."""

import hashlib
import time
from pathlib import Path

import pytest

from loradock_adapters.gate import Verdict
from loradock_adapters.manifest import FileEntry, Manifest
from loradock_adapters.registry import Details, Registry
from loradock_serve import catalog as catalog_module
from loradock_serve.catalog import Catalog
from loradock_serve.errors import ConflictError, ModelNotFoundError
from loradock_serve.rewrite import Behaviour


def manifest(content: str) -> Manifest:
    return Manifest((FileEntry("adapter_config.json", 1, hashlib.sha256(content.encode()).hexdigest()),))


def publish(registry: Registry, name: str, content: str = "", details: Details | None = None) -> None:
    registry.publish(name, manifest(content or name), Verdict("lora", "shared", (), 8), details)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(f"sqlite:///{tmp_path / 'r.sqlite'}")


def test_a_hundred_models_are_listed_and_missed_in_no_time(registry: Registry) -> None:
    for number in range(100):
        publish(registry, f"customer-{number:03}")
    catalog = Catalog(registry, "m", Behaviour())
    began = time.monotonic()
    assert len(catalog.cards(catalog.current(), "ready", lambda _version: "stored")) == 101
    for _ in range(200):  # clients repeat their mistakes: only the first costs a look through all names
        with pytest.raises(ModelNotFoundError, match=r"Near names: customer-[0-9]{3}"):
            catalog.resolve("custmer-01")
    assert time.monotonic() - began < 2
    registry.close()


def test_cached_name_follows_a_change(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog_module, "MAX_CACHED", 2)
    catalog = Catalog(registry, "m", Behaviour())
    with pytest.raises(ModelNotFoundError):
        catalog.resolve("a")
    publish(registry, "a", "one")
    assert catalog.resolve("a").engine_name == manifest("one").digest
    publish(registry, "a", "two")
    assert catalog.resolve("a").engine_name == manifest("two").digest
    for ref in ("a@1", "a@2", "m"):
        catalog.resolve(ref)
    assert len(catalog._cache) <= 2
    registry.close()


def test_what_another_gateway_changes_is_seen_at_the_next_request(registry: Registry, tmp_path: Path) -> None:
    other = Registry(f"sqlite:///{tmp_path / 'r.sqlite'}")
    here, there = Catalog(registry, "m", Behaviour()), Catalog(other, "m", Behaviour())
    for publisher, content in ((other, "one"), (registry, "two"), (other, "three")):
        publish(publisher, "a", content)
        for catalog in (here, there, here):
            assert catalog.resolve("a").engine_name == manifest(content).digest
    other.delete("a")
    with pytest.raises(ModelNotFoundError):
        here.resolve("a")
    registry.close()
    other.close()


def test_name_that_does_not_change_is_looked_up_once(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(registry, "a")
    catalog = Catalog(registry, "m", Behaviour())
    first = catalog.resolve("a")
    monkeypatch.setattr(Registry, "resolve", None)
    assert catalog.resolve("a") is first
    registry.close()


def test_adapter_brings_only_what_the_base_has_not(registry: Registry) -> None:
    publish(registry, "same", details=Details("template", (2,)))
    publish(registry, "other", details=Details("own", (2, 7)))
    catalog = Catalog(registry, "m", Behaviour("template", (2,)))
    assert catalog.resolve("same").behaviour == Behaviour()
    assert catalog.resolve("other").behaviour == Behaviour("own", (7,))
    assert catalog.resolve("m").behaviour == Behaviour()
    registry.close()


def test_names_of_the_base_cannot_be_taken(registry: Registry) -> None:
    catalog = Catalog(registry, "m", Behaviour())
    catalog.check_free("n")
    for name in ("m", "base"):
        with pytest.raises(ConflictError, match=f"'{name}' is the base's own name on this server"):
            catalog.check_free(name)
    assert Catalog(registry, "base", Behaviour()).base_names == ("base",)
    registry.close()


def test_endless_name_is_not_compared_with_anything(registry: Registry) -> None:
    catalog = Catalog(registry, "m", Behaviour())
    with pytest.raises(ModelNotFoundError) as caught:
        catalog.resolve("m" * 10**7)
    assert caught.value.near == ()
    registry.close()
