"""Loads in a real engine: read on a thread, in a slot only when asked for, back after an eviction, gone when told."""

import asyncio
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest

from loradock_serve.packing import PackedAdapters
from loradock_testing.isolation import BASE, PROMPTS, SLOTS, World, mixed_stream, require_right
from loradock_testing.vllm_server import VllmServer
from loradock_testing.waiting import until

pytestmark = pytest.mark.engine

CPU_ADAPTERS = 12
"""Of the folder's engine (conftest.py)."""


async def load(client: httpx.AsyncClient, name: str, path: Path, packed: Path | None = None) -> None:
    body = {"name": name, "path": str(path), "packed": None if packed is None else str(packed)}
    response = await client.post("/loradock/adapters/load", json=body)
    assert response.status_code == 200, response.text


async def unload(client: httpx.AsyncClient, *names: str) -> None:
    for name in names:
        response = await client.post("/loradock/adapters/unload", json={"name": name})
        assert response.status_code == 200, response.text


async def status(client: httpx.AsyncClient) -> Any:
    return (await client.get("/loradock/status")).json()


async def all_active(client: httpx.AsyncClient, names: list[str]) -> bool:
    return set((await status(client))["active"]) == set(names)


async def ask_until(client: httpx.AsyncClient, name: str, told: asyncio.Event) -> list[int]:
    """Ask for long answers one after another, so that however fast the engine is one is under way until told."""
    body = {"model": name, "prompt": PROMPTS[0], "max_tokens": 120, "ignore_eos": True, "temperature": 0}
    statuses = []
    while not told.is_set():
        statuses.append((await client.post("/v1/completions", json=body)).status_code)
    return statuses


async def require_own_answers(client: httpx.AsyncClient, world: World, names: dict[str, str], requests: int) -> None:
    """Ask for these, and hold each answer against the adapter's truth."""
    answers = await mixed_stream(client, list(names), requests=requests, in_flight=8, share_cache=False)
    require_right(world, answers, names)


async def pack(world: World, place: Path, adapter: str) -> Path:
    packed = await PackedAdapters(place, 1 << 30).directory_of(
        f"sha256:{adapter}", world.adapters[adapter], "float32-cpu"
    )
    assert packed is not None
    return packed


async def test_loads_beside_streams_take_no_slot(engine: VllmServer, world: World) -> None:
    streaming = list(world.adapters)[:SLOTS]
    names = [f"beside-{number}" for number in range(12)]
    async with engine.client() as client:
        for name in streaming:
            await load(client, name, world.adapters[name])
        loaded = asyncio.Event()
        streams = asyncio.gather(*(ask_until(client, name, loaded) for name in streaming for _ in range(2)))
        await until(lambda: all_active(client, streaming), "a slot for each stream")
        before = await status(client)

        for number, name in enumerate(names):
            await load(client, name, world.extra[number % len(world.extra)])
            during = await status(client)
            assert set(during["active"]) == set(streaming)
            assert name in during["staged"]

        assert during["counts"]["activations"] == before["counts"]["activations"]
        loaded.set()
        assert {status for statuses in await streams for status in statuses} == {200}
        await unload(client, *names)


async def test_adapter_evicted_from_vllms_cache_answers_right_when_it_is_asked_again(
    engine: VllmServer, world: World, tmp_path: Path
) -> None:
    """Both kinds: one that is kept mapped, and one that the step has to read again."""
    packed = await pack(world, tmp_path / "packed", "a1")
    crowd = {f"crowd-{number}": f"a{number % 8}" for number in range(CPU_ADAPTERS + 2)}
    async with engine.client() as client:
        await load(client, "mapped", world.adapters["a1"], packed)
        await load(client, "read", world.adapters["a2"])
        await require_own_answers(client, world, {"mapped": "a1", "read": "a2"}, 8)
        for name, adapter in crowd.items():
            await load(client, name, world.adapters[adapter])
        await require_own_answers(client, world, crowd, 3 * len(crowd))
        between = await status(client)

        await require_own_answers(client, world, {"mapped": "a1", "read": "a2", BASE: BASE}, 24)

        assert not {"mapped", "read"} & {*between["loaded"], *between["active"]}
        assert "mapped" in between["staged"]
        assert {"mapped", "read"} <= {*(await status(client))["loaded"]}
        await unload(client, "mapped", "read", *crowd)


async def test_adapter_unloaded_while_staged_is_gone_and_can_come_again(engine: VllmServer, world: World) -> None:
    async with engine.client() as client:
        await load(client, "unused", world.adapters["a3"])
        assert "unused" in (await status(client))["staged"]
        await unload(client, "unused")
        gone = await status(client)
        await load(client, "unused", world.adapters["a4"])
        await require_own_answers(client, world, {"unused": "a4"}, 4)
        await unload(client, "unused")

    assert not {"unused"} & {*gone["staged"], *gone["loaded"], *gone["registered"]}
    assert not [name for name in gone["staged"] if name.startswith("unnamed")]


@pytest.mark.parametrize("when", ["before the load", "before the first request", "after an eviction"])
async def test_packed_directory_that_is_gone_costs_no_answer(
    engine: VllmServer, world: World, tmp_path: Path, when: str
) -> None:
    packed = await pack(world, tmp_path / "packed", "a5")
    crowd = {f"others-{number}": f"a{number % 8}" for number in range(CPU_ADAPTERS)}
    async with engine.client() as client:
        if when == "before the load":
            shutil.rmtree(packed)
        await load(client, "orphan", world.adapters["a5"], packed)
        if when == "after an eviction":
            await require_own_answers(client, world, {"orphan": "a5"}, 4)
            for name, adapter in crowd.items():
                await load(client, name, world.adapters[adapter])
            await require_own_answers(client, world, crowd, len(crowd))
            await unload(client, *crowd)
        shutil.rmtree(packed, ignore_errors=True)

        await require_own_answers(client, world, {"orphan": "a5"}, 8)

        await unload(client, "orphan")


async def test_packed_adapters_of_every_kind_answer_as_their_own(
    engine: VllmServer, world: World, tmp_path: Path
) -> None:
    """Embeddings and heads too, side by side with the base and unpacked ones."""
    names = {f"packed-{adapter}": adapter for adapter in world.adapters}
    async with engine.client() as client:
        packed = {name: await pack(world, tmp_path / "packed", adapter) for name, adapter in names.items()}
        await asyncio.gather(*(load(client, name, world.adapters[names[name]], packed[name]) for name in names))

        await require_own_answers(client, world, names | {BASE: BASE}, 120)

        await unload(client, *names)
