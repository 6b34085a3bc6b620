"""Telling the same base, moved or renamed, from another one and from one trained anew."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from loradock_adapters.base_identity import BaseIdentity
from loradock_testing.tiny_checkpoints import write_full_model


def identity(directory: Path, *, with_weights: bool = True) -> BaseIdentity:
    return BaseIdentity.of(directory.name, directory, with_weights=with_weights)


def test_base_that_was_renamed_and_copied_is_the_same(tmp_path: Path) -> None:
    here, there = write_full_model(tmp_path / "here"), write_full_model(tmp_path / "there")
    os.utime(there / "model.safetensors", (1, 1))
    assert identity(here) != identity(there)
    assert identity(here).is_same(identity(there))


def test_base_trained_anew_with_the_same_config_and_name_is_another(tmp_path: Path) -> None:
    first = identity(write_full_model(tmp_path / "base", seed=1))
    second = identity(write_full_model(tmp_path / "base", seed=2))
    assert first.config_sha256 == second.config_sha256
    assert not first.is_same(second)


@pytest.mark.parametrize("place", [0.0, 0.4, 1.0])
def test_large_file_is_sampled_all_along_and_not_read_whole(tmp_path: Path, place: float) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    size_bytes = 10**9
    with weights.open("wb") as file:
        file.truncate(size_bytes)  # a hole: reading it all would take seconds
    before = identity(tmp_path)
    with weights.open("r+b") as file:
        file.seek(int((size_bytes - 64 * 1024) * place))
        file.write(b"x" * 64 * 1024)
    assert not before.is_same(identity(tmp_path))


def test_without_local_weights_the_name_and_the_config_decide(tmp_path: Path) -> None:
    local = identity(write_full_model(tmp_path / "model-1b"))
    hub = identity(tmp_path / "model-1b", with_weights=False)
    assert hub.weights_sample is None
    assert hub.is_same(local)
    assert local.is_same(hub)
    assert not hub.is_same(replace(hub, name="model-1b-instruct"))
    assert not hub.is_same(replace(hub, config_sha256="0" * 64))


def test_identity_survives_the_registry(tmp_path: Path) -> None:
    for with_weights in (True, False):
        one = identity(write_full_model(tmp_path / "m"), with_weights=with_weights)
        assert BaseIdentity.from_json(one.to_json()) == one
    assert BaseIdentity.from_json(None) is None
    assert str(one) == f"m (config {one.config_sha256[:12]})"
