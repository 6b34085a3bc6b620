"""The gateway as a client sees it, over real HTTP, with a fake engine process behind it."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from loradock_adapters.passport import Passport, PassportBase, weights_sha256, write_passport
from loradock_serve import packed_file
from loradock_serve.app import build_gateway
from loradock_serve.config import ServeConfig
from loradock_serve.engine_command import Machine
from loradock_serve.errors import ServeConfigError
from loradock_testing.gateway import Served, serving
from loradock_testing.tiny_checkpoints import write_adapter, write_base, write_full_model
from loradock_testing.waiting import until


@pytest.fixture
async def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Served]:
    async with serving(tmp_path, monkeypatch) as running:
        yield running


async def test_base_answers_under_its_own_name_and_base(served: Served) -> None:
    assert await served.text("tiny-base", "one two") == "base:one base:two"
    answer = (await served.complete("base", "one")).json()
    assert answer["model"] == "base"


async def test_adapter_pushed_while_running_answers_under_its_name(served: Served, tmp_path: Path) -> None:
    await served.until_ready()
    pushed = await served.push(write_adapter(tmp_path / "a"), "first")
    assert pushed.status_code == 201
    body = pushed.json()
    assert (body["version"], body["placement"], body["state"]) == (1, "shared", "ready")
    answer = (await served.complete("first", "hello")).json()
    assert answer["model"] == "first"
    assert answer["choices"][0]["text"] == f"{body['digest']}:hello"


async def test_adapter_is_packed_for_the_engine_when_it_is_pushed_and_unpacked_when_it_is_removed(
    served: Served, tmp_path: Path
) -> None:
    await served.until_ready()
    digest = (await served.push(write_adapter(tmp_path / "a"), "first")).json()["digest"]

    packed = Path((await served.seen())["packed"][digest])
    assert packed == served.data_dir / "packed" / f"{digest.removeprefix('sha256:')}-float32-cpu.{packed_file.VERSION}"
    files = {path.name for path in packed.iterdir()} - {packed_file.SYNCED}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}

    await served.client.delete("/v1/adapters/first")
    await until(lambda: not packed.exists(), "the removal of the packed form")


async def test_adapter_is_not_packed_where_there_is_to_be_no_room_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path, monkeypatch, engine={"packed_adapters_gib": 0.0}) as served:
        await served.until_ready()
        digest = (await served.push(write_adapter(tmp_path / "a"), "first")).json()["digest"]

        assert (await served.seen())["packed"] == {digest: None}
        assert list((served.data_dir / "packed").iterdir()) == []


async def test_stream_passes_events_and_hides_usage_that_was_not_asked_for(served: Served, tmp_path: Path) -> None:
    answer = await served.complete("base", "a b", stream=True)
    events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["base:a ", "base:b "]
    asked = await served.complete("base", "a b", stream=True, stream_options={"include_usage": True})
    assert '"usage":{"prompt_tokens":2' in asked.text


async def test_full_model_gets_an_engine_of_its_own(served: Served, tmp_path: Path) -> None:
    pushed = (await served.push(write_full_model(tmp_path / "full"), "whole")).json()
    assert pushed.get("placement") == "dedicated", pushed
    assert await served.text("whole", "x") == f"{pushed['digest']}:x"


async def test_gateway_on_a_gpu_refuses_float32_before_an_engine_dies_of_it(tmp_path: Path) -> None:
    config = {"base": str(write_base(tmp_path / "base")), "data_dir": str(tmp_path), "engine": {"dtype": "float32"}}
    gpu = Machine("gpu", 80 * 1024**3, (0,))
    with pytest.raises(ServeConfigError, match="float32 on a GPU"):
        build_gateway(ServeConfig.model_validate(config), None, gpu)


async def test_adapter_whose_passport_names_other_base_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_full_model(tmp_path / "weights")
    async with serving(tmp_path, monkeypatch, base=str(base)) as served:
        ours = write_adapter(tmp_path / "ours")
        write_passport(ours, Passport(base=PassportBase(model_id="x/checkpoint", weights_sha256=weights_sha256(base))))
        pushed = await served.push(ours, "ours")
        assert (pushed.status_code, pushed.json()["reasons"]) == (201, []), "equal weights need no remark about names"
        other = write_adapter(tmp_path / "other", seed=2)
        write_passport(other, Passport(base=PassportBase(model_id="other", weights_sha256="0" * 64)))
        refused = await served.push(other, "other")
        assert refused.status_code == 422
        assert [problem["code"] for problem in refused.json()["error"]["problems"]] == ["base_weights_differ"]


async def test_publish_with_an_unknown_option_is_refused_and_not_ignored(served: Served) -> None:
    answer = await served.client.post("/v1/adapters/some/versions", json={"files": [], "forced": True})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")
    assert "'forced'" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/v1/tokenize", "/v1/chat/completions/render"])
async def test_routes_that_would_render_a_clients_template_do_not_exist(served: Served, path: str) -> None:
    body = {"model": "base", "messages": [{"role": "user", "content": "x"}], "chat_template": "{{ 1 }}"}
    answer = await served.client.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_route")
    assert (await served.seen())["requests"] == []


async def test_passports_template_and_stop_tokens_reach_the_engine(served: Served, tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "a")
    passport = Passport(base=PassportBase(model_id="x"), chat_template="[{{ messages }}]", stop_token_ids=(5, 6))
    write_passport(directory, passport)
    (await served.push(directory, "own")).raise_for_status()
    messages = [{"role": "user", "content": "hello"}]
    body = {"model": "own", "messages": messages, "stop_token_ids": [9]}
    (await served.client.post("/v1/chat/completions", json=body)).raise_for_status()
    (asked,) = (await served.seen())["requests"]
    assert (asked["body"]["chat_template"], asked["body"]["stop_token_ids"]) == ("[{{ messages }}]", [5, 6, 9])
    refused = await served.client.post("/v1/chat/completions", json=body | {"chat_template": "{{ 7 * 7 }}"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "chat_template")
    through = await served.client.post("/v1/responses", json={"model": "own", "input": "x"})
    assert (through.status_code, through.json()["error"]["code"]) == (400, "chat_template_unsupported")
    assert len((await served.seen())["requests"]) == 1
