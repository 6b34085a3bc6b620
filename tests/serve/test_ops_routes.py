"""What operators ask: livez, health, metrics; and the limits that an operator sets."""

import asyncio
from pathlib import Path

import pytest

from loradock_adapters.base import BaseModel
from loradock_adapters.base_identity import BaseIdentity
from loradock_adapters.engine_rules import EngineLimits
from loradock_serve import metrics
from loradock_serve.engine import Engine
from loradock_serve.process import EngineProcess
from loradock_testing.engines import fake_command
from loradock_testing.gateway import Served, serving
from loradock_testing.waiting import until


async def test_gateway_is_alive_before_its_engine_is_and_healthy_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_start, live = asyncio.Event(), Engine._live

    async def live_later(engine: Engine) -> None:
        await may_start.wait()
        await live(engine)

    monkeypatch.setattr(Engine, "_live", live_later)
    async with serving(tmp_path, monkeypatch) as served:
        assert (await served.client.get("/livez")).json() == {"status": "alive"}
        early = await served.client.get("/health")
        assert early.status_code == 503
        assert early.headers["retry-after"] == "5"
        assert early.json()["error"]["message"] == "The base's engine is starting"
        may_start.set()
        await served.until_ready()
        assert (await served.client.get("/health")).json() == {"status": "healthy"}
        await served.complete("base", "!sick")
        sick = await served.client.get("/health")
        assert sick.status_code == 503


@pytest.mark.parametrize("path", ["/livez", "/health", "/metrics"])
async def test_head_of_what_monitors_ask_is_the_status_without_a_body(served: Served, path: str) -> None:
    await served.until_ready()
    answer = await served.client.head(path)
    assert (answer.status_code, answer.content) == (200, b"")


async def test_engine_that_does_not_start_is_explained_by_health(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loradock_testing.tiny_checkpoints import write_base

    base = str(write_base(tmp_path / "fail-to-start"))
    async with serving(tmp_path, monkeypatch, base=base, engine={"hold_s": 0.05}) as served:
        await until(lambda: served.gateway.fleet.base.failure is not None, "the failure")
        error = (await served.client.get("/health")).json()["error"]
        state = served.gateway.fleet.base.state
        assert error["message"] == f"The base's engine is {state}: The base's engine ended with status 1"
        assert error["code"] == "engine_start_failed"
        answer = await served.complete("base", "x")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "10")
        message = answer.json()["error"]["message"]
        assert "is not ready after 0 s" in message
        assert "fake engine: this model does not load" in message, "who may ask models may know why there is none"


async def test_metrics_count_requests_by_route_and_status(served: Served) -> None:
    await served.text("base", "a b")
    await served.complete("nobody", "x")
    answer = await served.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    lines = answer.text.splitlines()
    assert "loradock_engine_up 1.0" in lines
    assert "loradock_requests_in_flight 0.0" in lines
    for status in (200, 404):
        assert any(
            line.startswith(f'loradock_requests_total{{route="/v1/completions",status="{status}"}}') for line in lines
        )
    assert any(line.startswith('loradock_tokens_total{direction="prompt",model="base"}') for line in lines)


def test_models_beyond_the_bound_share_one_label(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_labelled", set())
    monkeypatch.setattr(metrics, "MAX_MODEL_LABELS", 2)
    assert [metrics.model_label(name) for name in ("a", "b", "c", "a")] == ["a", "b", "(other)", "a"]


async def test_unknown_route_and_method_are_explained(served: Served) -> None:
    missing = await served.client.get("/v1/nothing")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "unknown_route")
    assert missing.json()["error"]["message"] == "GET /v1/nothing: Not Found"
    wrong = await served.client.get("/v1/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")


async def test_request_over_its_time_is_cut_off_and_aborted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path, monkeypatch, request_timeout_s=5.0) as served:
        await served.until_ready()
        whole, streamed = await asyncio.gather(
            served.complete("base", "!wait"), served.complete("base", "a !hang", stream=True)
        )
        assert whole.status_code == 504
        error = whole.json()["error"]
        assert (error["type"], error["code"]) == ("timeout_error", "deadline_exceeded")
        assert error["message"] == "The request was cut off after 5 s (`request_timeout_s`)"
        assert streamed.status_code == 200
        assert streamed.text.count('"deadline_exceeded"') == 1
        assert "[DONE]" not in streamed.text

        async def are_aborted() -> bool:
            return bool((await served.seen())["aborted"] == 2)

        await until(are_aborted, "both aborts")


async def test_attached_engine_runs_with_nothing_that_was_planned_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path, monkeypatch, engine={"url": "unix:///nowhere"}) as served:
        document = (await served.client.get("/v1/plan")).json()
    assert document["plan"]["max_loras"] > 0
    assert document["running"] is None


async def test_base_route_says_what_adapters_are_judged_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path, monkeypatch) as served:
        document = (await served.client.get("/v1/base")).json()
    facts = BaseModel.from_json(document)
    assert facts.modules
    assert facts.to_json() == {key: document[key] for key in ("model_id", "config", "modules", "tensor_names")}
    assert EngineLimits.from_json(document["limits"]).enable_lora
    assert BaseIdentity.from_json(document["identity"]) is not None


async def test_attached_engine_serves_and_health_follows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    socket = tmp_path / "engine.sock"
    url = f"unix://{socket}"
    async with serving(tmp_path, monkeypatch, engine={"url": url, "hold_s": 60}) as served:
        assert (await served.client.get("/health")).status_code == 503
        behind = await EngineProcess.start(fake_command(socket), tmp_path / "log")
        assert await served.text("base", "x") == "base:x"
        assert (await served.client.get("/health")).status_code == 200
        await behind.kill()
        gone = await served.client.get("/health")
        assert gone.status_code == 503
        assert str(socket) not in gone.text
        behind = await EngineProcess.start(fake_command(socket), tmp_path / "log")
        assert await served.text("base", "again") == "base:again"
        await behind.stop()
