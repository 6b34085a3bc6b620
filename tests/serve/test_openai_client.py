"""The official client on the gateway: what it retries, what it raises, what it reads."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI, AsyncStream

from loradock_testing.gateway import Served
from loradock_testing.tiny_checkpoints import write_adapter

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(shared: Served) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{shared.url}/v1", api_key="none", max_retries=1, timeout=30) as client:
        yield client


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def ready(shared: Served) -> None:
    await shared.until_ready()


async def collect(stream: AsyncStream[Any]) -> list[Any]:
    return [chunk async for chunk in stream]


async def asked(shared: Served) -> int:
    return len((await shared.seen())["requests"])


async def test_chat_answers_whole_and_streamed(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="base", messages=[{"role": "user", "content": "a b"}])
    assert answer.choices[0].message.content == "base:a base:b"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2
    stream = await client.chat.completions.create(
        model="base", messages=[{"role": "user", "content": "a b"}], stream=True
    )
    chunks = [chunk async for chunk in stream]
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["base:a", "base:b"]
    assert {chunk.model for chunk in chunks} == {"base"}


async def test_usage_that_was_asked_for_comes_last(client: AsyncOpenAI) -> None:
    stream = await client.completions.create(
        model="base", prompt="a b", stream=True, stream_options={"include_usage": True}
    )
    *_, last = [chunk async for chunk in stream]
    assert last.usage is not None
    assert last.usage.total_tokens == 4


async def test_dead_engine_is_tried_again_after_what_retry_after_says_and_then_told(
    client: AsyncOpenAI, shared: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []

    async def record(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr("anyio.sleep", record)
    before = shared.gateway.fleet.base.starts
    with pytest.raises(openai.InternalServerError) as caught:
        await client.completions.create(model="base", prompt="!exit")
    assert (caught.value.status_code, caught.value.code) == (503, "engine_unavailable")
    assert slept == [5.0]
    await shared.until_ready()
    assert shared.gateway.fleet.base.starts == before + 2


async def test_conflict_is_not_tried_again(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.ConflictError, match="is the base of this server and cannot be deleted") as caught:
        await client.models.delete("base")
    assert caught.value.response.request.headers["x-stainless-retry-count"] == "0"


async def test_unknown_model_raises_not_found_with_near_names(client: AsyncOpenAI, shared: Served) -> None:
    before = await asked(shared)
    with pytest.raises(openai.NotFoundError, match=r"Near names: tiny-base") as caught:
        await client.completions.create(model="tiny-bas", prompt="x")
    assert (caught.value.code, caught.value.param, caught.value.type) == ("model_not_found", "model", "not_found_error")
    assert await asked(shared) == before


async def test_request_that_the_engine_refuses_raises_bad_request(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="max_tokens must be at least 1"):
        await client.completions.create(model="base", prompt="!400")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a !error b", "boom"),
        ("a !cut b", "The engine ended the stream before it was complete"),
        ("a !die b", "went away while it was answering"),
    ],
)
async def test_stream_that_breaks_raises_after_what_came(client: AsyncOpenAI, prompt: str, message: str) -> None:
    stream = await client.completions.create(model="base", prompt=prompt, stream=True)
    assert (await anext(stream)).choices[0].text == "base:a "
    with pytest.raises(openai.APIError, match=message):
        await collect(stream)


async def test_models_are_listed_retrieved_and_deleted(client: AsyncOpenAI, shared: Served, tmp_path: Path) -> None:
    await shared.push(write_adapter(tmp_path / "a"), "mine")
    assert [model.id async for model in client.models.list()] == ["tiny-base", "mine"]
    model = await client.models.retrieve("mine@1")
    assert (model.id, model.model_dump()["loradock"]["version"]) == ("mine@1", 1)
    with pytest.raises(openai.NotFoundError, match="The model 'org/none' does not exist"):
        await client.models.retrieve("org/none")
    assert (await client.models.delete("mine")).deleted


async def test_key_that_is_wrong_raises_authentication_error(shared: Served) -> None:
    from loradock_serve.auth import Doorkeeper

    door = shared.gateway.app
    assert isinstance(door, Doorkeeper)
    door._key = b"right"
    try:
        async with AsyncOpenAI(base_url=f"{shared.url}/v1", api_key="wrong") as client:
            with pytest.raises(openai.AuthenticationError, match="not one of this server's"):
                await client.models.list()
        async with AsyncOpenAI(base_url=f"{shared.url}/v1", api_key="right") as client:
            assert [model.id async for model in client.models.list()] == ["tiny-base"]
    finally:
        door._key = None
