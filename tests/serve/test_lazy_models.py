"""`"model": "hf://org/repo"`: fetched at the first request, remembered, looked at anew; misses cost nothing."""

import asyncio
import gc
import hashlib
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import pytest
import pytest_asyncio

from loradock_adapters.registry import Registry
from loradock_adapters.source_ref import parse_source
from loradock_serve.lazy_models import name_of
from loradock_serve.proxy import OpenAIProxy
from loradock_testing.gateway import Served, serving
from loradock_testing.hub_server import Hub, hub_server
from loradock_testing.tiny_checkpoints import write_adapter
from loradock_testing.waiting import until

Start = Callable[..., AbstractAsyncContextManager[Served]]


pytestmark = pytest.mark.asyncio(loop_scope="module")
seeds = itertools.count(1)
LAZY: dict[str, Any] = {"lazy": ["hf://org"], "miss_ttl_s": 600.0}  # however slow the machine is


@pytest.fixture(scope="module")
def one_hub() -> Iterator[Hub]:
    with pytest.MonkeyPatch.context() as monkeypatch, hub_server() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


@pytest.fixture
def hub(one_hub: Hub) -> Iterator[Hub]:
    """The Hub, empty."""
    one_hub.clear()
    yield one_hub
    one_hub.clear()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(one_hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """One gateway that takes org's models from the Hub; each test has a repository of its own."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        async with serving(tmp_path_factory.mktemp("lazy"), monkeypatch, sources=LAZY) as running:
            await running.until_ready()
            yield running


@pytest.fixture
def start(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Starts a gateway of the test's own, with these settings of `sources`."""

    def starting(**sources: Any) -> AbstractAsyncContextManager[Served]:
        return serving(tmp_path, monkeypatch, sources=LAZY | sources)

    return starting


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter that no other test has: what the store holds already is not downloaded."""
    return write_adapter(tmp_path / "adapter", seed=next(seeds))


@pytest.fixture
def repo(request: pytest.FixtureRequest) -> str:
    """A repository for this test alone."""
    return f"org/{hashlib.sha256(request.node.name.encode()).hexdigest()[:12]}"


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    return error


async def test_first_request_fetches_and_the_next_ones_do_not(
    served: Served, hub: Hub, adapter: Path, repo: str
) -> None:
    hub.commit(repo, adapter)
    first = await served.complete(f"hf://{repo}", "hi")
    assert first.status_code == 200, first.text
    assert first.json()["model"] == f"hf://{repo}"
    asked = hub.count()
    for _ in range(5):
        assert (await served.complete(f"hf://{repo}", "hi")).json()["choices"] == first.json()["choices"]
    assert hub.count() == asked


async def test_it_is_listed_under_a_name_of_its_own_with_its_source(served: Served, hub: Hub, adapter: Path) -> None:
    commit = hub.commit("org/My.Bot", adapter)
    await served.complete("hf://org/My.Bot", "hi")
    name = name_of(parse_source("hf://org/My.Bot"))
    (card,) = [card for card in (await served.client.get("/v1/models")).json()["data"] if card["id"] == name]
    assert card["id"].startswith("hf--org-my.bot--")
    assert card["loradock"]["source"] == f"hf://org/My.Bot@{commit}"
    assert (await served.complete(card["id"], "hi")).status_code == 200


async def test_many_first_requests_make_one_fetch(served: Served, hub: Hub, adapter: Path, repo: str) -> None:
    hub.commit(repo, adapter)
    answers = await asyncio.gather(*(served.complete(f"hf://{repo}", "hi") for _ in range(40)))
    assert {answer.status_code for answer in answers} == {200}
    assert (hub.count("/api/"), hub.count("/lfs/")) == (1, 1)


async def test_restarted_gateway_knows_it_still(start: Start, hub: Hub, adapter: Path) -> None:
    hub.commit("org/bot", adapter)
    async with start() as served:
        assert (await served.complete("hf://org/bot", "hi")).status_code == 200
    downloads = hub.count("/resolve/")
    async with start() as served:
        assert (await served.complete("hf://org/bot", "hi")).status_code == 200
    assert hub.count("/resolve/") == downloads


# What costs nothing


async def test_thousand_requests_for_one_unknown_name_ask_the_hub_once(served: Served, hub: Hub, repo: str) -> None:
    for _ in range(10):
        answers = await asyncio.gather(*(served.complete(f"hf://{repo}", "hi") for _ in range(100)))
        assert {(answer.status_code, error_of(answer)["code"]) for answer in answers} == {(404, "source_not_found")}
    assert hub.count() == 1


async def test_thousand_different_unknown_names_ask_the_hub_as_often_as_the_bucket_allows(
    start: Start, hub: Hub, adapter: Path
) -> None:
    hub.commit("org/bot", adapter)
    async with start(lazy_lookups_a_minute=20) as served:
        assert (await served.complete("hf://org/bot", "hi")).status_code == 200
        statuses: list[int] = []
        for batch in range(10):
            names = [f"hf://org/nothing-{batch}-{number}" for number in range(100)]
            answers = await asyncio.gather(*(served.complete(name, "hi") for name in names))
            statuses += [answer.status_code for answer in answers]
            assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers if answer.status_code == 429)
        looked = hub.count("nothing")
        # 19 at once, and what the bucket gained meanwhile: one in three seconds.
        assert 19 <= looked <= 40
        assert (statuses.count(404), statuses.count(429)) == (looked, 1000 - looked)
        assert (await served.complete("hf://org/bot", "hi")).status_code == 200  # what is known is not held up


async def test_remembered_miss_keeps_nothing_of_the_requests_that_met_it(served: Served, hub: Hub, repo: str) -> None:
    for _ in range(2):  # the first learns it, the second is told
        assert (await served.complete(f"hf://{repo}", "hi")).status_code == 404
    gc.collect()
    code = OpenAIProxy._answer.__code__
    # An error holds the frames that it came through, and with them a body of perhaps 64 MiB.
    assert not [frame for frame in gc.get_objects() if type(frame) is FrameType and frame.f_code is code]


async def test_registry_is_never_waited_for_in_the_event_loop(
    start: Start, hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit("org/bot", adapter)
    async with start() as served:
        loop = threading.get_ident()
        asked_by: list[int] = []
        for method in ("resolve", "route"):
            asks = getattr(Registry, method)

            def watched(self: Registry, what: Any, asks: Callable[..., Any] = asks) -> Any:
                asked_by.append(threading.get_ident())
                return asks(self, what)

            monkeypatch.setattr(Registry, method, watched)
        assert (await served.complete("hf://org/bot", "hi")).status_code == 200
        assert (await served.complete("hf://org/none", "hi")).status_code == 404
        assert (await served.push(adapter, "other")).status_code == 201  # from now on names are looked up anew
        assert (await served.complete("hf://org/bot", "hi")).status_code == 200
        assert len(asked_by) > 3
        assert loop not in asked_by


async def test_unknown_prefix_never_reaches_the_network(served: Served, hub: Hub) -> None:
    for model in ("hf://other/bot", "s3://bucket/x", "hf://org-2/bot"):
        answer = await served.complete(model, "hi")
        assert (answer.status_code, error_of(answer)["code"]) == (403, "source_not_allowed")
        assert "`sources.lazy`" in error_of(answer)["message"]
    for model in ("hf://", "hf://org", "http://127.0.0.1:1/x", "hf://org/bot@../../x", "hf://org/" + "x" * 5000):
        assert (await served.complete(model, "hi")).status_code == 400
    assert hub.asked == []


async def test_no_source_is_taken_from_requests_unless_the_operator_says_so(
    hub: Hub, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit("org/bot", adapter)
    async with serving(tmp_path, monkeypatch) as served:
        assert (await served.complete("hf://org/bot", "hi")).status_code == 403
    assert hub.asked == []


async def test_miss_is_asked_for_again_after_its_time(start: Start, hub: Hub, adapter: Path) -> None:
    async with start(miss_ttl_s=0.05) as served:
        assert (await served.complete("hf://org/bot", "hi")).status_code == 404
        hub.commit("org/bot", adapter)

        async def answers() -> bool:
            return (await served.complete("hf://org/bot", "hi")).status_code == 200

        async with asyncio.timeout(20):
            while not await answers():
                pass


async def test_refused_adapter_is_answered_with_its_reasons_and_not_fetched_again(
    start: Start, hub: Hub, tmp_path: Path
) -> None:
    hub.commit("org/bad", write_adapter(tmp_path / "bad", seed=next(seeds), peft_type="LOHA"))
    async with start(miss_ttl_s=0.01) as served:
        first = await served.complete("hf://org/bad", "hi")
        assert first.status_code == 422
        reasons = error_of(first)["problems"]
        assert reasons
        downloads = hub.count("/resolve/")
        async with asyncio.timeout(20):
            while hub.count("/api/") < 4:  # each time that the miss is forgotten, one look at the commit
                again = await served.complete("hf://org/bad", "hi")
                assert (again.status_code, error_of(again)["problems"]) == (422, reasons)
        assert hub.count("/resolve/") == downloads
        (card,) = (await served.client.get("/v1/models")).json()["data"]
        assert card["loradock"]["kind"] == "base"


# What takes time


async def test_request_that_waits_too_long_gets_503_and_a_later_one_the_answer(
    start: Start, hub: Hub, adapter: Path
) -> None:
    hub.hold = threading.Event()
    hub.commit("org/bot", adapter)
    async with start(lazy_wait_s=0.05) as served:
        answer = await served.complete("hf://org/bot", "hi")
        assert (answer.status_code, error_of(answer)["code"]) == (503, "source_pending")
        assert int(answer.headers["retry-after"]) >= 1
        hub.hold.set()

        async def status() -> int:
            return (await served.complete("hf://org/bot", "hi")).status_code

        async with asyncio.timeout(20):
            while (now := await status()) != 200:
                assert now == 503
        assert hub.count("/lfs/") == 1


async def test_own_timeout_of_a_request_ends_its_wait(served: Served, hub: Hub, adapter: Path, repo: str) -> None:
    hub.hold = threading.Event()
    hub.commit(repo, adapter)
    body = {"model": f"hf://{repo}", "prompt": "hi"}
    answer = await served.client.post("/v1/completions", json=body, headers={"x-request-timeout": "0.2"})
    assert answer.status_code == 504
    hub.hold.set()
    assert (await served.complete(f"hf://{repo}", "hi")).status_code == 200
    assert hub.count("/lfs/") == 1


async def test_other_models_answer_while_fetches_hang(start: Start, hub: Hub, adapter: Path) -> None:
    hub.hold = threading.Event()
    for number in range(6):
        hub.commit(f"org/bot{number}", write_adapter(adapter.parent / f"{number}", seed=next(seeds)))
    async with start(max_running=2) as served:
        await served.until_ready()
        hanging = [asyncio.create_task(served.complete(f"hf://org/bot{n}", "hi")) for n in range(6)]
        await until(lambda: hub.count("/lfs/") == 2, "as many downloads as there may be")
        assert (await served.push(adapter, "local")).status_code == 201
        assert (await served.complete("local", "hi")).status_code == 200
        assert hub.count("/lfs/") == 2
        hub.hold.set()
        assert {answer.status_code for answer in await asyncio.gather(*hanging)} == {200}


async def test_branch_that_moved_is_fetched_behind_the_old_version_s_back(
    start: Start, hub: Hub, adapter: Path
) -> None:
    hub.commit("org/bot", adapter)
    async with start(lazy_recheck_s=0.05) as served:
        old = await served.text("hf://org/bot", "hi")
        hub.hold = threading.Event()
        hub.commit("org/bot", write_adapter(adapter.parent / "new", seed=next(seeds)))

        async def downloading() -> bool:
            assert await served.text("hf://org/bot", "hi") == old
            return hub.count("/lfs/") == 2

        async with asyncio.timeout(20):
            while not await downloading():
                pass
        assert await served.text("hf://org/bot", "hi") == old
        hub.hold.set()
        async with asyncio.timeout(20):
            while await served.text("hf://org/bot", "hi") == old:
                pass


async def test_branch_that_was_set_back_is_answered_by_its_older_version(start: Start, hub: Hub, adapter: Path) -> None:
    before = hub.commit("org/bot", adapter)
    async with start(lazy_recheck_s=0.02) as served:
        old = await served.text("hf://org/bot", "hi")
        hub.commit("org/bot", write_adapter(adapter.parent / "new", seed=next(seeds)))
        async with asyncio.timeout(20):
            while await served.text("hf://org/bot", "hi") == old:
                pass
        downloads = hub.count("/resolve/")
        hub.repos["org/bot"].branches["main"] = before
        async with asyncio.timeout(20):
            while await served.text("hf://org/bot", "hi") != old:
                pass
        assert hub.count("/resolve/") == downloads


async def test_known_version_answers_while_the_hub_is_gone(start: Start, hub: Hub, adapter: Path) -> None:
    hub.commit("org/bot", adapter)
    async with start(lazy_recheck_s=0.01) as served:
        old = await served.text("hf://org/bot", "hi")
        hub.statuses = [500] * 1000
        asked = hub.count()
        async with asyncio.timeout(20):
            while hub.count() < asked + 3:
                assert await served.text("hf://org/bot", "hi") == old


async def test_commit_is_never_looked_at_again(start: Start, hub: Hub, adapter: Path) -> None:
    model = f"hf://org/bot@{hub.commit('org/bot', adapter)}"
    async with start(lazy_recheck_s=0.01) as served:
        await served.text(model, "hi")
        asked = hub.count()
        for _ in range(10):
            await served.text(model, "hi")
        assert hub.count() == asked


async def test_something_else_under_its_name_does_not_answer_for_it(
    served: Served, hub: Hub, adapter: Path, repo: str
) -> None:
    hub.commit(repo, adapter)
    name = name_of(parse_source(f"hf://{repo}"))
    other = (await served.push(write_adapter(adapter.parent / "other", seed=next(seeds)), name)).json()["digest"]
    assert other not in await served.text(f"hf://{repo}", "hi")
    moved = await served.client.post(f"/v1/adapters/{name}/promote", json={"version": 1})
    assert moved.status_code == 200, moved.text
    assert other not in await served.text(f"hf://{repo}", "hi")


async def test_removed_one_is_fetched_again_when_it_is_asked_for(
    served: Served, hub: Hub, adapter: Path, repo: str
) -> None:
    hub.commit(repo, adapter)
    before = await served.text(f"hf://{repo}", "hi")
    name = name_of(parse_source(f"hf://{repo}"))
    assert (await served.client.delete(f"/v1/adapters/{name}")).status_code == 200
    assert await served.text(f"hf://{repo}", "hi") == before


async def test_stream_of_a_source_is_a_stream(served: Served, hub: Hub, adapter: Path, repo: str) -> None:
    hub.commit(repo, adapter)
    answer = await served.complete(f"hf://{repo}", "one two", stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.rstrip().endswith("data: [DONE]")
