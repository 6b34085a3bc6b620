"""The queue as clients see it: a gateway on a fake engine with two seats and two slots."""

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from loradock_serve import comments, metrics
from loradock_serve import engine as engine_module
from loradock_testing.gateway import Served, serving
from loradock_testing.tiny_checkpoints import write_adapter
from loradock_testing.waiting import until

NARROW_GIB = 1e-4

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def narrow(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """Two seats, two slots, four adapters, and a queue of four."""
    place = tmp_path_factory.mktemp("narrow")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(engine_module, "FIRST_PAUSE_S", 0.02)
        monkeypatch.setattr(engine_module, "READY_POLL_S", 0.05)
        engine = {"max_loras": 2, "max_num_seqs": 2}
        admission = {"max_queue": 4, "max_queue_per_tenant": 3, "max_wait_s": 60.0, "max_queue_gib": NARROW_GIB}
        async with serving(place, monkeypatch, engine=engine, admission=admission) as running:
            await running.until_ready()
            for n, name in enumerate(("a", "b", "c", "d")):
                (await running.push(write_adapter(place / name, seed=n), name)).raise_for_status()
            yield running


async def figure(served: Served, name: str) -> float:
    """A metric's value."""
    text = (await served.client.get("/metrics")).text
    found = re.search(rf"^loradock_{re.escape(name)} (\S+)$", text, re.MULTILINE)
    assert found is not None, name
    return float(found[1])


async def until_it_is(served: Served, name: str, value: float) -> None:
    async def is_it() -> bool:
        return await figure(served, f'{name}{{engine="base"}}') == value

    await until(is_it, f"{name} of {value:g}")


@contextlib.asynccontextmanager
async def held(served: Served, *models: str) -> AsyncIterator[list[asyncio.Task[httpx.Response]]]:
    """Requests that run until they are cancelled, or the block ends."""
    tasks = [asyncio.create_task(served.complete(model, "!wait", user="holder")) for model in models]
    try:
        await until_it_is(served, "queue_admitted", len(models))
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await until_it_is(served, "queue_admitted", 0)


async def queue_up(served: Served, model: str, prompt: str, **fields: Any) -> asyncio.Task[httpx.Response]:
    """A request that is in the queue now."""
    before = await figure(served, 'queue_length{engine="base"}')
    task = asyncio.create_task(served.complete(model, prompt, **fields))
    await until_it_is(served, "queue_length", before + 1)
    return task


async def prompts(served: Served) -> list[str]:
    """What the engine was asked, in order."""
    return [str(request["body"].get("prompt")) for request in (await served.seen())["requests"]]


async def test_engine_gets_no_more_adapters_than_slots(narrow: Served) -> None:
    async with held(narrow, "a", "b") as (on_a, _):
        waiting = await queue_up(narrow, "c", "third")
        assert "third" not in await prompts(narrow)
        on_a.cancel()
        answer = await waiting
    assert answer.json()["choices"][0]["text"].endswith(":third")
    assert int(answer.headers["x-loradock-queue-ms"]) > 0


async def test_engine_gets_no_more_sequences_than_seats_and_n_counts(narrow: Served) -> None:
    async with held(narrow, "base") as (first,):
        pair = await queue_up(narrow, "base", "pair", n=2)
        single = await narrow.complete("base", "single", user="somebody-else")
        assert single.status_code == 200
        assert "pair" not in await prompts(narrow)
        first.cancel()
        assert (await pair).status_code == 200


async def test_request_that_needs_not_wait_says_so(narrow: Served) -> None:
    answers = [await narrow.complete("base", "quick") for _ in range(5)]
    assert 0 in [int(answer.headers["x-loradock-queue-ms"]) for answer in answers]  # a process may be held up anywhere
    assert answers[0].json()["choices"][0]["text"] == "base:quick"


async def test_second_tenant_does_not_wait_behind_a_flood(narrow: Served) -> None:
    async with held(narrow, "base", "base") as (one, _):
        flood = [await queue_up(narrow, "base", f"flood-{n}", user="flood") for n in range(3)]
        other = await queue_up(narrow, "base", "other", user="other")
        one.cancel()
        await asyncio.gather(*flood, other)
    seen = await prompts(narrow)
    assert seen.index("other") < seen.index("flood-1") < seen.index("flood-2")


async def test_lower_priority_number_goes_first_and_is_not_forwarded(narrow: Served) -> None:
    async with held(narrow, "base", "base") as (one, _):
        late = await queue_up(narrow, "base", "when-there-is-time", priority=5)
        soon = await queue_up(narrow, "base", "soon", priority=-5)
        one.cancel()
        await asyncio.gather(late, soon)
    sent = {request["body"]["prompt"]: request["body"] for request in (await narrow.seen())["requests"]}
    order = list(sent)
    assert order.index("soon") < order.index("when-there-is-time")
    assert "priority" not in sent["soon"]


async def test_full_queue_is_answered_429_with_the_time_to_come_again(narrow: Served) -> None:
    def refused(reason: str) -> float:
        return float(metrics.NOT_ADMITTED.labels(reason)._value.get())

    before = refused("tenant_queue_full"), refused("queue_full")
    async with held(narrow, "base", "base"):
        mine = [await queue_up(narrow, "base", f"full-{n}", user="greedy") for n in range(3)]
        answer = await narrow.complete("base", "full-too-many", user="greedy")
        error = answer.json()["error"]
        assert (answer.status_code, error["type"], error["code"]) == (429, "rate_limit_error", "tenant_queue_full")
        assert (
            "3 requests of yours wait already, and at most 3 may (`admission.max_queue_per_tenant`)" in error["message"]
        )
        assert 1 <= int(answer.headers["retry-after"]) <= 600
        mine.append(await queue_up(narrow, "base", "full-other", user="modest"))
        answer = await narrow.complete("base", "full-too-many", user="modest")
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
        assert "4 requests of everybody wait already" in answer.json()["error"]["message"]
    assert [answer.status_code for answer in await asyncio.gather(*mine)] == [200] * 4
    assert "full-too-many" not in await prompts(narrow)
    assert (refused("tenant_queue_full"), refused("queue_full")) == (before[0] + 1, before[1] + 1)


async def test_request_for_endless_answers_is_refused_before_it_waits(narrow: Served) -> None:
    answer = await narrow.complete("base", "too-many", n=129)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "n")
    assert "129, over this server's limit of 128 (`admission.max_n`)" in error["message"]
    assert "too-many" not in await prompts(narrow)


async def test_bodies_of_those_that_wait_are_bounded(narrow: Served) -> None:
    size = int(NARROW_GIB * 1024**3)
    async with held(narrow, "base", "base"):
        waiting = await queue_up(narrow, "base", "b" * (size // 2))
        answer = await narrow.complete("base", "c" * size)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_bytes_full")
        assert int(answer.headers["retry-after"]) > 0
        small = await queue_up(narrow, "base", "still welcome")
    assert [(await request).status_code for request in (waiting, small)] == [200, 200]
    async with held(narrow, "base", "base"):
        again = await queue_up(narrow, "base", "c" * size)  # alone it may wait, whatever its size
    assert (await again).status_code == 200


async def test_request_whose_time_is_over_never_reaches_the_engine(narrow: Served) -> None:
    async with held(narrow, "base", "base"):
        body = {"model": "base", "prompt": "too-late"}
        answer = await narrow.client.post("/v1/completions", json=body, headers={"x-request-timeout": "0.1"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert "x-request-timeout" in answer.json()["error"]["message"]
        assert "it did not reach the engine" in answer.json()["error"]["message"]
        await until_it_is(narrow, "queue_length", 0)
    assert "too-late" not in await prompts(narrow)


async def test_request_that_runs_is_cut_off_at_its_own_deadline(narrow: Served) -> None:
    body = {"model": "base", "prompt": "!wait"}
    answer = await narrow.client.post("/v1/completions", json=body, headers={"x-request-timeout": "2"})
    assert answer.status_code == 504
    assert answer.json()["error"]["message"] == "The request was cut off after 2 s (`x-request-timeout`)"
    await until_it_is(narrow, "queue_admitted", 0)


@pytest.mark.parametrize("seconds", ["soon", "0", "-1", "nan", "inf"])
async def test_timeout_that_is_no_time_is_refused(narrow: Served, seconds: str) -> None:
    body = {"model": "base", "prompt": "x"}
    answer = await narrow.client.post("/v1/completions", json=body, headers={"x-request-timeout": seconds})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-request-timeout")


async def test_client_that_hangs_up_leaves_the_queue_at_once(narrow: Served) -> None:
    async with held(narrow, "base", "base"):
        waiting = await queue_up(narrow, "base", "gone")
        waiting.cancel()
        await until_it_is(narrow, "queue_length", 0)
    assert "gone" not in await prompts(narrow)


async def test_stream_that_waits_shows_life_and_then_answers(narrow: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comments, "EVERY_S", 0.01)
    async with held(narrow, "base", "base") as (one, _):
        body = {"model": "base", "prompt": "patient", "stream": True}
        async with narrow.client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.aiter_lines()
            assert await anext(lines) == ": waiting for the engine of base"
            one.cancel()
            text = "\n".join([line async for line in lines])
    assert "base:patient" in text


async def test_who_waited_while_the_engine_died_is_answered_by_its_next_start(narrow: Served) -> None:
    async with held(narrow, "a", "a") as running:
        waiting = await queue_up(narrow, "a", "survivor")
        other = await queue_up(narrow, "c", "survivor-too")
        pid = narrow.gateway.fleet.base.pid
        assert pid is not None
        os.killpg(pid, signal.SIGKILL)
        assert [answer.status_code for answer in await asyncio.gather(*running)] == [503, 503]
        answers = await asyncio.gather(waiting, other)
    assert [answer.status_code for answer in answers] == [200, 200]
    assert {"survivor", "survivor-too"} <= set(await prompts(narrow))
    await until_it_is(narrow, "queue_length", 0)


async def test_pinned_adapter_leaves_the_others_one_slot_less(narrow: Served, tmp_path: Path) -> None:
    (await narrow.client.post("/v1/adapters/d/pin")).raise_for_status()
    try:
        async with held(narrow, "a") as (on_a,):
            waiting = await queue_up(narrow, "b", "no-slot-left")
            assert (await narrow.text("d", "pinned")).endswith(":pinned")
            assert "no-slot-left" not in await prompts(narrow)
            on_a.cancel()
            assert (await waiting).status_code == 200
    finally:
        (await narrow.client.delete("/v1/adapters/d/pin")).raise_for_status()
