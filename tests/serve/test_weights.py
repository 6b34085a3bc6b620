"""Where full weights come from: the store, or one merge however many ask. The merge itself is a stand-in here."""

import asyncio
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from loradock_adapters.store import LocalStore
from loradock_serve.directories import LocalDirectories
from loradock_serve.errors import EngineStartError
from loradock_serve.weights import StoredWeights
from loradock_testing.engines import group_members
from loradock_testing.recorded_fleet import LORA, A
from loradock_testing.waiting import until

DORA = replace(LORA, placement="dedicated")


@pytest.fixture
def weights(tmp_path: Path) -> StoredWeights:
    return StoredWeights(LocalDirectories(LocalStore(tmp_path / "store")), lambda: "the-base", tmp_path / "merged")


def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    """Runs `script` for `python -m loradock_serve.merge BASE ADAPTER OUT`."""
    program = tmp_path / "merge"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr("loradock_serve.weights.MERGE", (str(program),))


async def test_full_model_is_read_from_the_store_itself(weights: StoredWeights, tmp_path: Path) -> None:
    expected = tmp_path / "store" / "versions" / A.digest.removeprefix("sha256:")
    assert await weights.full_weights_dir(A) == expected
    assert await weights.adapter_dir(A) == expected


async def test_merge_is_made_once_and_kept(
    weights: StoredWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, tmp_path, f'echo "$1 $2" >> {tmp_path}/calls; mkdir "$3"; touch "$3/model.safetensors"')
    first, second = await asyncio.gather(weights.full_weights_dir(DORA), weights.full_weights_dir(DORA))
    assert first == second == await weights.full_weights_dir(DORA)
    assert [path.name for path in first.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "calls").read_text() == f"the-base {await weights.adapter_dir(DORA)}\n"


async def test_merge_that_fails_says_why_is_not_kept_and_is_tried_again(
    weights: StoredWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, tmp_path, 'mkdir "$3"; echo out of memory; exit 1')
    with pytest.raises(EngineStartError, match=r"'lora' cannot be merged into the base: status 1:\nout of memory"):
        await weights.full_weights_dir(DORA)
    assert list((tmp_path / "merged").iterdir()) == [], "half a merge is gigabytes on a disk that is perhaps full"
    stand_in(monkeypatch, tmp_path, 'mkdir "$3"')
    assert (await weights.full_weights_dir(DORA)).is_dir()


async def test_merges_of_two_gateways_do_not_meet_and_those_of_dead_ones_go(
    weights: StoredWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, tmp_path, 'mkdir "$3"; echo "$3" > "$3/mine"')
    first = await weights.full_weights_dir(DORA)
    gone = await asyncio.create_subprocess_exec("true")
    await gone.wait()
    left_over, others = (first.with_name(f"{first.name}.{pid}.partial") for pid in (gone.pid, os.getppid()))
    shutil.rmtree(first)
    for path in (left_over, others):
        path.mkdir()
    # While this one merges, the other gateway puts its own merge in place.
    stand_in(monkeypatch, tmp_path, f'mkdir "$3"; mkdir {first}; touch {first}/theirs')
    assert await weights.full_weights_dir(DORA) == first
    assert sorted(path.name for path in first.parent.iterdir()) == sorted([first.name, others.name])
    assert [path.name for path in first.iterdir()] == ["theirs"]


async def test_merge_into_another_base_is_another_merge(
    weights: StoredWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, tmp_path, 'mkdir "$3"; echo "$1" > "$3/base"')
    base = tmp_path / "base"
    base.mkdir()
    (base / "model.safetensors").write_text("one")
    local = StoredWeights(LocalDirectories(LocalStore(tmp_path / "store")), lambda: str(base), tmp_path / "merged")
    before = await local.full_weights_dir(DORA)
    assert await weights.full_weights_dir(DORA) != before
    assert await local.full_weights_dir(DORA) == before
    (base / "model.safetensors").write_text("trained anew")
    assert await local.full_weights_dir(DORA) != before


async def test_merge_goes_on_when_the_request_that_began_it_is_gone(
    weights: StoredWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, tmp_path, f'while [ ! -e {tmp_path}/go ]; do sleep 0.02; done; mkdir "$3"')
    first = asyncio.create_task(weights.full_weights_dir(DORA))
    await asyncio.sleep(0)
    second = asyncio.create_task(weights.full_weights_dir(DORA))
    await asyncio.sleep(0)
    first.cancel()
    (tmp_path / "go").touch()
    assert (await second).is_dir()


async def test_merge_killed_for_memory_says_so_and_the_admin_key_is_not_in_its_environment(
    weights: StoredWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORADOCK_ADMIN_KEY", "s3cret")
    monkeypatch.setenv("LORADOCK_OTHER", "kept")
    stand_in(monkeypatch, tmp_path, f"env > {tmp_path}/environment; kill -9 $$")
    with pytest.raises(EngineStartError, match=r"status 137 \(killed by signal 9, perhaps out of memory\)"):
        await weights.full_weights_dir(DORA)
    environment = (tmp_path / "environment").read_text()
    assert "LORADOCK_OTHER=kept" in environment
    assert "s3cret" not in environment


MERGES = """
import asyncio, sys
from pathlib import Path
from loradock_serve import weights
asyncio.run(weights._run(["sh", "-c", f"echo $$ > {sys.argv[1]}.new; mv {sys.argv[1]}.new {sys.argv[1]}; sleep 600"]))
"""


async def test_merge_ends_with_a_gateway_that_is_killed(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    gateway = await asyncio.create_subprocess_exec(sys.executable, "-c", MERGES, str(told))
    try:
        await until(told.is_file, "the merge")
        merge = int(told.read_text())
        group = os.getpgid(merge)
        assert merge in group_members(group)
    finally:
        gateway.kill()
        await gateway.wait()
    await until(lambda: group_members(group) == [], "the merge's end")
