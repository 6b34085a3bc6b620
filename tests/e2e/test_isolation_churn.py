"""Isolation under churn: a thousand adapters, and every answer is that of the version that its header names.

A real `loradock serve` with few slots and little host memory, 48 requests in flight for names chosen by Zipf's law and
for the base, chats and completions, streamed and whole; the prefix cache off (a salt of its own for every request: vLLM
then shares no block) and on. Meanwhile versions are pushed and rolled back, names are pinned, removed and brought
back, and clients hang up. The truth is transformers in float32 with the adapter on (`churn_truth`, held against PEFT in
`test_churn_truth.py`).

    LORADOCK_CHURN_REQUESTS   answers in each of the two runs, by default 5000
"""

import asyncio
import logging
import os
import time
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer

from loradock_testing.churn import Asked, Churn, Report, judge, weights_of
from loradock_testing.churn_api import Api, api_session
from loradock_testing.churn_models import MAX_RANK
from loradock_testing.churn_truth import Truth
from loradock_testing.churn_world import BASE, MOVING, NAMES, make_world
from loradock_testing.engine_look import EngineLook
from loradock_testing.loradock_server import LoradockServer, loradock_server
from loradock_testing.waiting import until

pytestmark = pytest.mark.engine

log = logging.getLogger("churn")

ANSWERS = int(os.environ.get("LORADOCK_CHURN_REQUESTS", "5000"))
SLOTS, CPU_ADAPTERS = 8, 16
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "max_loras": SLOTS,
    "max_cpu_loras": CPU_ADAPTERS,
    "max_lora_rank": MAX_RANK,
    "max_model_len": 256,
    "kv_cache_gib": 1,
    "block_size": 32,
}


@pytest.fixture(scope="module")
def churn(tmp_path_factory: pytest.TempPathFactory) -> Churn:
    return Churn(make_world(tmp_path_factory.mktemp("world")))


@pytest.fixture(scope="module")
def server(churn: Churn, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoradockServer]:
    async def register(url: str) -> None:
        async with api_session(url) as session:
            began = time.monotonic()
            await churn.register(Api(session))
            log.info("%d adapters registered in %.0f s", len(NAMES), time.monotonic() - began)

    data_dir = tmp_path_factory.mktemp("churn") / "data"
    # Registered while the engine starts: that costs no time, and most adapters are then loaded by their first request.
    with loradock_server(churn.world.base_dir, data_dir, healthy=False, engine=ENGINE) as running:
        asyncio.run(register(running.url))
        running.wait_healthy()
        yield running


@pytest.fixture(scope="module")
def truth(churn: Churn) -> Truth:
    return Truth(churn.world.base_dir)


def test_thousand_adapters_are_registered(server: LoradockServer) -> None:
    listed = httpx.get(f"{server.url}/v1/adapters", timeout=60).raise_for_status().json()["data"]
    assert {entry["name"] for entry in listed} == set(NAMES)


@pytest.mark.parametrize("share_cache", [False, True], ids=["prefix-cache-off", "prefix-cache-on"])
async def test_every_answer_in_churn_is_its_versions_own(
    server: LoradockServer, churn: Churn, truth: Truth, share_cache: bool
) -> None:
    before = EngineLook(server)
    async with api_session(server.url) as session:
        report = await churn.run(Api(session), ANSWERS, seed=1 + share_cache, share_cache=share_cache)
    assert report.failures == [], server.logs()
    await require_quiet(server)
    after = EngineLook(server)

    judged = judge(churn, AutoTokenizer.from_pretrained(churn.world.base_dir), truth, report.asked)
    wrong = [
        f"{asked.model} version {asked.reply.version} ({weights_of(churn, asked)}), prompt {asked.request.prompt}, "
        f"{'chat' if asked.request.chat else 'completion'}: {asked.reply.tokens}; token {verdict.differs_at} is to be "
        f"{verdict.expected} by {verdict.gap:.4f}"
        for asked, verdict in judged
        if verdict.is_wrong
    ]
    near_ties = sum(verdict.is_near_tie for _, verdict in judged)
    counts = {key: after.status["counts"][key] - value for key, value in before.status["counts"].items()}
    hits = after.metric("prefix_cache_hits_total") - before.metric("prefix_cache_hits_total")
    log.info(
        "%d answers in %.0f s: %d wrong, %d stale, %d near ties; %s, each switch %.1f s at the median, %.1f at most; "
        "engine: %s; prefix cache: %d tokens",
        *(len(judged), report.seconds, len(wrong), len(report.stale), near_ties, dict(report.happened)),
        *(median(report.switch_s), max(report.switch_s), counts, hits),
    )
    assert wrong == []
    assert report.stale == [], server.logs()
    assert all(len(asked.reply.tokens) == asked.request.max_tokens for asked in report.asked)
    assert near_ties <= 0.01 * len(judged)
    require_churn(report, churn, counts)
    assert (hits > 0) == share_cache


def left_behind(server: LoradockServer) -> dict[str, Any]:
    """What runs, waits or is pinned still; empty where those who hung up or removed names left nothing behind."""
    look = EngineLook(server)
    gateway = httpx.get(f"{server.url}/metrics", timeout=30).raise_for_status().text
    in_flight = next(line for line in gateway.splitlines() if line.startswith("loradock_requests_in_flight "))
    found = {
        "running": look.metric("num_requests_running"),
        "waiting": look.metric("num_requests_waiting"),
        "pinned": look.status["pinned"],
        "in the gateway": float(in_flight.split()[1]),
    }
    return {what: count for what, count in found.items() if count}


async def require_quiet(server: LoradockServer) -> None:
    """AssertionError with what is left in the engine or the gateway."""
    try:
        await until(lambda: not left_behind(server), "an engine without requests or pins", timeout_s=30)
    except AssertionError as error:
        raise AssertionError(f"{error}: {left_behind(server)}\n{server.logs()}") from error


def require_churn(report: Report, churn: Churn, counts: dict[str, int]) -> None:
    """The run was what it is meant to be: else all answers being right would prove little.

    How often things happen meanwhile depends on the machine: where it is busy, a push takes longer beside the answers.
    """
    asked, happened = report.asked, report.happened
    assert len(asked) >= ANSWERS
    assert like_share(churn, asked) <= 0.1
    assert happened["switches"] >= ANSWERS / 250
    assert happened["pins"] >= ANSWERS / 500
    assert happened["hang-ups"] >= ANSWERS / 100
    assert happened["removals"] >= ANSWERS // 1500
    assert len({one.request.name for one in asked}) >= min(300, ANSWERS / 10)
    assert counts["activations"] >= ANSWERS / 10
    assert counts["slot_evictions"] >= ANSWERS / 10
    assert counts["cpu_evictions"] >= ANSWERS / 10
    assert len({(one.request.chat, one.request.stream) for one in asked}) == 4
    assert sum(one.request.name == BASE for one in asked) >= ANSWERS / 20
    versions: dict[str, set[int | None]] = {name: set() for name in MOVING}
    for one in asked:
        if one.request.name in versions:
            versions[one.request.name].add(one.reply.version)
    assert sum(len(seen) >= 2 for seen in versions.values()) >= len(MOVING) / 2


def like_share(churn: Churn, asked: Sequence[Asked]) -> float:
    """How often two models that were asked the same answered the same, as far as both go."""
    answers: dict[tuple[int, bool], dict[Path | None, tuple[int, ...]]] = {}
    for one in asked:
        answers.setdefault((one.request.prompt, one.request.chat), {})[weights_of(churn, one)] = one.reply.tokens
    alike = total = 0
    for by_weights in answers.values():
        for a, b in combinations(by_weights.values(), 2):
            total += 1
            alike += all(x == y for x, y in zip(a, b, strict=False))
    assert total > 0
    return alike / total
