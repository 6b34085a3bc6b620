"""One request through the gateway, on an engine that misbehaves in every way it can."""

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import pytest_asyncio

from loradock_serve import comments, metrics
from loradock_serve.engine import Engine
from loradock_testing.gateway import Served
from loradock_testing.tiny_checkpoints import write_adapter, write_full_model
from loradock_testing.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def ready(shared: Served) -> None:
    await shared.until_ready()


def events(text: str) -> list[Any]:
    """The data of every event; `[DONE]` as it is."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def aborted(shared: Served) -> int:
    return int((await shared.seen())["aborted"])


async def stream(shared: Served, prompt: str, model: str = "base") -> httpx.Response:
    return await shared.complete(model, prompt, stream=True)


@asynccontextmanager
async def open_stream(shared: Served, prompt: str, model: str = "base") -> AsyncIterator[httpx.Response]:
    body = {"model": model, "prompt": prompt, "stream": True}
    async with shared.client.stream("POST", "/v1/completions", json=body) as answer:
        yield answer


def assert_unavailable(answer: httpx.Response, message: str) -> None:
    error = answer.json()["error"]
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5"), answer.text
    assert (error["type"], error["code"], error["source"]) == (
        "service_unavailable_error",
        "engine_unavailable",
        "gateway",
    )
    assert message in error["message"]


# What goes in and out untouched


async def test_request_and_its_trace_headers_reach_the_engine(shared: Served) -> None:
    headers = {"x-request-id": "my-id", "traceparent": "00-ab", "authorization": "Bearer client", "cookie": "a=b"}
    body = {"model": "tiny-base", "prompt": "hi", "temperature": 0, "vendor": {"x": None}}
    answer = await shared.client.post("/v1/completions", json=body, headers=headers)
    assert answer.headers["x-request-id"] == "my-id"
    sent = (await shared.seen())["requests"][-1]
    assert sent["body"] == body | {"model": "base"}
    names = {name.lower(): value for name, value in sent["headers"].items()}
    assert (names["x-request-id"], names["traceparent"]) == ("my-id", "00-ab")
    assert names["accept-encoding"] == "identity"
    assert "authorization" not in names
    assert "cookie" not in names


@pytest.mark.parametrize("request_id", ["", "x" * 129, "ä"])
async def test_request_id_that_is_not_fit_for_a_header_is_replaced(shared: Served, request_id: str) -> None:
    answer = await shared.client.post(
        "/v1/completions",
        json={"model": "base", "prompt": "hi"},
        headers=[(b"x-request-id", request_id.encode("latin-1"))],
    )
    assert answer.headers["x-request-id"].startswith("req-")


async def test_chat_and_responses_go_to_their_own_routes(shared: Served) -> None:
    messages = [{"role": "user", "content": "hello"}]
    chat = (await shared.client.post("/v1/chat/completions", json={"model": "base", "messages": messages})).json()
    assert chat["choices"][0]["message"]["content"] == "base:hello"
    response = (await shared.client.post("/v1/responses", json={"model": "tiny-base", "input": "hello"})).json()
    assert (response["output"], response["model"]) == ("base:hello", "tiny-base")


async def test_stream_says_that_it_is_not_to_be_buffered(shared: Served) -> None:
    answer = await stream(shared, "a b")
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["x-accel-buffering"] == "no"
    assert [event["choices"][0]["text"] for event in events(answer.text)[:-1]] == ["base:a ", "base:b "]


async def test_tokens_are_metered_by_the_engines_figures_streamed_or_not(shared: Served) -> None:
    def counted() -> float:
        return metrics.TOKENS.labels("base", "completion").value

    before = counted()
    await shared.complete("base", "a b c")
    assert counted() == before + 3
    await stream(shared, "a b")
    assert counted() == before + 5


# What the gateway refuses itself


@pytest.mark.parametrize(
    ("body", "status", "code", "message"),
    [
        (b"{", 400, "invalid_json", "The body is not valid JSON"),
        (b"[]", 400, "invalid_json", "The body must be a JSON object"),
        (b"{}", 400, "invalid_request", "You must name a model"),
        (b'{"model":"tiny-bass"}', 404, "model_not_found", "does not exist. Near names: tiny-base"),
        (b'{"model":"../etc"}', 404, "model_not_found", "The model '../etc' does not exist."),
        (b'{"model":"base","chat_template":"x"}', 400, "invalid_request", "cannot bring its own chat template"),
    ],
)
async def test_request_that_cannot_go_on_is_answered_at_once(
    shared: Served, body: bytes, status: int, code: str, message: str
) -> None:
    before = len((await shared.seen())["requests"])
    answer = await shared.client.post("/v1/completions", content=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["source"]) == (status, code, "gateway")
    assert message in error["message"]
    assert len((await shared.seen())["requests"]) == before


async def test_log_of_a_strange_model_stays_on_one_line(shared: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "loradock.requests"):
        await shared.complete("a\nb" + "x" * 5000, "hi")
    (line,) = [record.getMessage() for record in caplog.records]
    assert "\n" not in line
    assert len(line) < 400


@pytest.mark.parametrize(
    ("prompt", "fields", "outcome"),
    [
        ("fine", {}, r"200 \d"),
        ("!400", {}, r"400 X \d"),
        ("a !error", {"stream": True}, r"200 InternalServerError \d"),
    ],
)
async def test_log_of_a_request_has_the_code_of_its_error(
    shared: Served, caplog: pytest.LogCaptureFixture, prompt: str, fields: dict[str, Any], outcome: str
) -> None:
    with caplog.at_level(logging.INFO, "loradock.requests"):
        await shared.complete("base", prompt, **fields)
        await shared.complete("nobody", prompt)
    lines = [record.getMessage() for record in caplog.records if record.name == "loradock.requests"]
    assert re.match(rf"/v1/completions base {outcome}", lines[0]), lines
    assert lines[1].startswith("/v1/completions nobody 404 model_not_found ")


@pytest.mark.parametrize("announced", [True, False])
async def test_body_over_the_limit_is_refused(shared: Served, monkeypatch: pytest.MonkeyPatch, announced: bool) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(70):
            yield b" " * 1024**2

    answer = await shared.client.post("/v1/completions", content=b" " * (65 * 1024**2) if announced else pieces())
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "too_large"
    assert "over the limit of 67108864" in answer.json()["error"]["message"]


# The engine says no


@pytest.mark.parametrize(("prompt", "status"), [("!400", 400), ("!404", 404), ("!500", 500)])
async def test_engines_own_error_is_passed_on_as_the_engines(shared: Served, prompt: str, status: int) -> None:
    for streams in (False, True):
        answer = await shared.complete("base", prompt, stream=streams)
        assert answer.status_code == status
        assert answer.headers["content-type"] == "application/json"
        assert answer.json()["error"]["source"] == "engine"
        assert answer.json()["error"]["code"] == status


async def test_route_that_the_engine_does_not_have_is_explained(shared: Served) -> None:
    answer = await shared.client.post("/v1/embeddings", json={"model": "base", "input": "x"})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "unsupported_route"
    assert (
        answer.json()["error"]["message"] == "The engine of 'base' has no /v1/embeddings: its model does another task"
    )


async def test_adapter_that_the_engine_forgot_is_loaded_again_unnoticed(shared: Served, tmp_path: Any) -> None:
    pushed = (await shared.push(write_adapter(tmp_path / "a", seed=11), "forgotten")).json()
    current = shared.gateway.fleet.base.current
    assert current is not None
    await current.client.unload_adapter(pushed["digest"])
    assert await shared.text("forgotten", "x") == f"{pushed['digest']}:x"


async def test_404_of_another_reason_is_the_clients_and_the_adapter_stays(shared: Served, tmp_path: Any) -> None:
    pushed = (await shared.push(write_adapter(tmp_path / "a", seed=12), "kept")).json()
    loads = (await shared.seen())["loads"]
    answer = await shared.complete("kept", "!404")
    assert (answer.status_code, answer.json()["error"]["source"]) == (404, "engine")
    assert (await shared.seen())["loads"] == loads
    assert await shared.text("kept", "x") == f"{pushed['digest']}:x"


# The engine dies


@pytest.mark.parametrize("streams", [False, True])
async def test_engine_that_dies_before_its_answer_is_a_503_with_retry_after(shared: Served, streams: bool) -> None:
    answer = await shared.complete("base", "!exit", stream=streams)
    assert_unavailable(answer, "The engine of 'base' went away while it was answering; it is being restarted")
    assert await shared.text("base", "again") == "base:again"


async def test_engine_that_dies_in_a_stream_ends_it_with_one_error_event(shared: Served) -> None:
    answer = await stream(shared, "a !die b")
    assert answer.status_code == 200
    first, second, error = events(answer.text)
    assert [first["choices"][0]["text"], second["choices"][0]["text"]] == ["base:a ", "base:!die "]
    assert error["error"]["code"] == "engine_unavailable"
    assert await shared.text("base", "again") == "base:again"


async def test_error_event_of_the_engine_is_the_last_and_no_done_follows(shared: Served) -> None:
    *_, error = events((await stream(shared, "a !error")).text)
    assert error["error"] == {
        "message": "boom",
        "type": "InternalServerError",
        "param": None,
        "code": 500,
        "source": "engine",
    }


async def test_stream_that_ends_too_soon_is_an_error(shared: Served) -> None:
    *_, error = events((await stream(shared, "a !cut b")).text)
    assert error["error"]["message"] == "The engine ended the stream before it was complete"
    assert error["error"]["code"] == "engine_error"


async def test_engine_that_says_it_is_sick_is_a_503_and_restarts_with_its_other_streams_cut(shared: Served) -> None:
    engine = shared.gateway.fleet.base
    before = engine.starts
    async with open_stream(shared, "a !hang") as hanging:
        lines = hanging.aiter_lines()
        assert "base:a" in await anext(lines)
        assert_unavailable(await shared.complete("base", "!sick"), "The engine of 'base' died; it is being restarted")
        rest = [line async for line in lines]
    assert '"error"' in "".join(rest)
    assert "[DONE]" not in "".join(rest)
    await until(lambda: engine.starts == before + 1, "the restart")
    assert await shared.text("base", "again") == "base:again"


async def test_adapters_are_back_after_a_crash(shared: Served, tmp_path: Any) -> None:
    digest = (await shared.push(write_adapter(tmp_path / "a", seed=12), "survivor")).json()["digest"]
    await shared.complete("base", "!exit")
    assert await shared.text("survivor", "x") == f"{digest}:x"


async def test_dedicated_engine_that_dies_starts_again_with_the_next_request(shared: Served, tmp_path: Any) -> None:
    digest = (await shared.push(write_full_model(tmp_path / "full"), "whole")).json()["digest"]
    assert (await shared.complete("whole", "!exit")).status_code == 503
    assert await shared.text("whole", "x") == f"{digest}:x"


# The client hangs up


async def test_client_that_leaves_a_stream_aborts_it_in_the_engine(shared: Served) -> None:
    before = await aborted(shared)
    async with open_stream(shared, "a !hang") as answer:
        await anext(answer.aiter_lines())

    async def is_aborted() -> bool:
        return await aborted(shared) == before + 1

    await until(is_aborted, "the abort")
    await until(lambda: metrics.IN_FLIGHT.count == 0, "the end of the request")


@pytest.mark.parametrize("streams", [False, True])
async def test_client_that_leaves_before_the_first_byte_aborts_it_in_the_engine(shared: Served, streams: bool) -> None:
    before = await aborted(shared)
    count = len((await shared.seen())["requests"])
    asking = asyncio.create_task(shared.complete("base", "!wait", stream=streams))

    async def has_arrived() -> bool:
        return len((await shared.seen())["requests"]) > count

    await until(has_arrived, "the request")
    asking.cancel()

    async def is_aborted() -> bool:
        return await aborted(shared) == before + 1

    await until(is_aborted, "the abort")
    await until(lambda: metrics.IN_FLIGHT.count == 0, "the end of the request")


@pytest.mark.parametrize("streams", [False, True])
async def test_request_that_a_stopping_server_waits_for_no_longer_is_told_so(
    shared: Served, streams: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_start = hold_back(monkeypatch)
    monkeypatch.setattr(comments, "EVERY_S", 0.01)
    sent: list[Any] = []
    body = json.dumps({"model": "base", "prompt": "held", "stream": streams}).encode()
    news = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        return news.pop() if news else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    path = "/v1/completions"
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": path, "headers": [(b"host", b"localhost")]}
    scope["client"] = ("127.0.0.1", 1)
    request: asyncio.Future[None] = asyncio.ensure_future(shared.gateway.app(scope, receive, send))
    await until(lambda: metrics.IN_FLIGHT.count == 1 and bool(sent or not streams), "the request waits")
    request.cancel()  # as uvicorn does when its patience ends
    with pytest.raises(asyncio.CancelledError):
        await request
    may_start.set()
    head, *bodies = sent
    text = b"".join(message["body"] for message in bodies).decode()
    assert '"code": "engine_unavailable"' in text.replace('":"', '": "')
    assert "is being stopped" in text
    assert "[DONE]" not in text
    assert not bodies[-1]["more_body"]
    if not streams:
        assert head["status"] == 503
        assert (b"retry-after", b"5") in head["headers"]


async def test_client_that_leaves_while_its_engine_starts_leaves_nothing(
    shared: Served, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_start = hold_back(monkeypatch)
    asking = asyncio.create_task(shared.complete("base", "held"))
    await until(lambda: metrics.IN_FLIGHT.count == 1, "the request")
    gone = metrics.REQUESTS.labels("/v1/completions", metrics.CLIENT_GONE)
    before = gone.value
    asking.cancel()
    await until(lambda: metrics.IN_FLIGHT.count == 0, "its end")
    assert gone.value == before + 1
    may_start.set()
    assert not [sent for sent in (await shared.seen())["requests"] if sent["body"].get("prompt") == "held"]


# Waiting


async def test_held_stream_shows_life_and_then_answers(shared: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comments, "EVERY_S", 0.01)
    may_start = hold_back(monkeypatch)
    waiting = ": waiting for the engine of base"
    async with open_stream(shared, "a") as answer:
        lines = answer.aiter_lines()
        assert [await anext(lines) for _ in range(3)] == [waiting, "", waiting]
        may_start.set()
        text = "\n".join([line async for line in lines])
    assert events(text)[-1] == "[DONE]"
    assert "base:a" in text


async def test_failure_after_comments_is_one_error_event(shared: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comments, "EVERY_S", 0.01)
    may_start = hold_back(monkeypatch)
    async with open_stream(shared, "!400") as answer:
        lines = answer.aiter_lines()
        await anext(lines)
        may_start.set()
        text = "\n".join([line async for line in lines])
    (error,) = events(text)
    assert answer.status_code == 200
    assert error["error"]["message"] == "max_tokens must be at least 1"


def hold_back(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Nobody gets an engine until the event is set."""
    may_start = asyncio.Event()
    ensure_ready = Engine.ensure_ready

    async def slow(self: Engine, timeout_s: float) -> Any:
        await may_start.wait()
        return await ensure_ready(self, timeout_s)

    monkeypatch.setattr(Engine, "ensure_ready", slow)
    return may_start
