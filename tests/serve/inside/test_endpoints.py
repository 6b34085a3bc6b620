"""The engine's private routes: in front of a fake registry of models, and in a real engine."""

import asyncio
import json
import shutil
from argparse import Namespace
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from vllm.utils.counter import AtomicCounter

from loradock_adapters.engine_rules import architecture_rules
from loradock_serve import sizing
from loradock_serve.base import find_base
from loradock_serve.inside.endpoints import LoradockEndpoints
from loradock_serve.inside.plugin import CORRECTED_WRAPPER, STOCK_WRAPPER
from loradock_serve.plan import adapter_shapes
from loradock_testing.isolation import BASE, MAX_LORA_RANK, SLOTS, World
from loradock_testing.tiny_models import make_adapter
from loradock_testing.vllm_server import VllmServer
from loradock_testing.waiting import until


class FakeModels:
    """vLLM's registry of served models."""

    def __init__(self) -> None:
        self.lora_requests: dict[str, Any] = {}
        self.lora_id_counter = AtomicCounter(0)

    def is_base_model(self, name: str) -> bool:
        return name == BASE

    async def unload_lora_adapter(self, request: Any) -> str:
        del self.lora_requests[request.lora_name]
        return "Success"


class FakeEngine:
    """vLLM's engine client, of two workers that read adapters: they refuse any path with `bad` in it."""

    def __init__(self, *, lora: bool = True, wrapper: str = CORRECTED_WRAPPER) -> None:
        self.errored = False
        self.dies = False
        self.state = "ready"
        self.slow: set[int] = set()
        """Adapters that the second worker is still reading."""
        self.staged: dict[int, tuple[str, str | None]] = {}
        self.added: list[int] = []
        self.removed: list[int] = []
        self.pinned: list[int] = []
        self.counts = {"reads": 2, "activations": 5, "slot_evictions": 3, "cpu_evictions": 0}
        self.stages = 0
        self.worker: dict[str, Any] = {"device": "cpu", "wrappers": [wrapper], "active": [1, None, 9], "loaded": [1, 9]}
        self.worker |= {"pinned": self.pinned, "counts": self.counts, "adapters": {1: self.counts, 9: self.counts}}
        self.worker |= {"slot_bytes": 640, "staged": [2]}
        config = SimpleNamespace(max_loras=3, max_cpu_loras=6, max_lora_rank=16, lora_dtype="torch.bfloat16")
        self.vllm_config = SimpleNamespace(
            lora_config=config if lora else None,
            device_config=SimpleNamespace(device="cpu"),
            scheduler_config=SimpleNamespace(max_num_seqs=64),
            model_config=SimpleNamespace(
                max_model_len=256,
                dtype="torch.float32",
                max_logprobs=5,
                quantization=None,
                runner_type="generate",
                logprobs_mode="raw_logprobs",
            ),
        )
        self.asked: list[tuple[Any, Any, Any]] = []
        """Prompt, parameters and adapter of each generation."""
        self.answer: dict[int, float] = {7: -0.5, 3: -0.1, 9: float("nan")}

    async def generate(
        self, prompt: Any, params: Any, request_id: str, *, lora_request: Any = None
    ) -> AsyncIterator[Any]:
        self.asked.append((prompt, params, lora_request))
        if prompt["prompt_token_ids"] == [404]:
            raise ValueError("token 404 is out of vocabulary")
        logprobs = [{token: SimpleNamespace(logprob=value) for token, value in self.answer.items()}]
        yield SimpleNamespace(outputs=[SimpleNamespace(logprobs=logprobs)])

    async def add_lora(self, adapter: Any) -> bool:
        if "unfit" in adapter.lora_path:
            raise RuntimeError("the experts do not fit")
        self.added.append(adapter.lora_int_id)
        return True

    async def remove_lora(self, lora_id: int) -> bool:
        self.removed.append(lora_id)
        return False

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        assert self.vllm_config.lora_config is not None, "an engine without LoRA has no such method"
        return [getattr(self, method)(*args, worker=worker) for worker in range(2)]

    def loradock_status(self, worker: int) -> dict[str, Any]:
        return self.worker

    def loradock_stage(self, adapter_id: int, name: str, path: str, packed: str | None, worker: int) -> None:
        self.stages += worker == 0
        self.staged[adapter_id] = (path, packed)

    def loradock_staged(self, adapter_ids: list[int], worker: int) -> list[tuple[str, str]]:
        if self.dies:
            self.errored = True
            raise RuntimeError("EngineCore died")
        return [self._look(adapter_id, worker) for adapter_id in adapter_ids]

    def _look(self, adapter_id: int, worker: int) -> tuple[str, str]:
        if "bad" in self.staged[adapter_id][0] and worker == 1:
            return "failed", "rank 64 is over max_lora_rank 16"
        return ("reading", "") if worker == 1 and adapter_id in self.slow else (self.state, "")

    def loradock_unstage(self, adapter_id: int, worker: int) -> bool:
        return self.staged.pop(adapter_id, None) is not None

    def loradock_pin(self, adapter_id: int, worker: int) -> str:
        if worker == 0:
            if len(self.pinned) == self.vllm_config.lora_config.max_loras - 1:
                return "full"
            self.pinned.append(adapter_id)
        return "pinned"

    def loradock_unpin(self, adapter_id: int, worker: int) -> bool:
        was_pinned = worker == 1 or adapter_id in self.pinned
        self.pinned[:] = [number for number in self.pinned if number != adapter_id]
        return was_pinned


async def app_client(engine: FakeEngine, models: FakeModels) -> httpx.AsyncClient:
    app = FastAPI()
    endpoints = LoradockEndpoints()
    endpoints.attach_router(app)
    app.state.openai_serving_models = models
    await endpoints.init_state(engine, app.state, Namespace())
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://engine")


@pytest.fixture
def fake_engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def models() -> FakeModels:
    return FakeModels()


@pytest.fixture
async def client(fake_engine: FakeEngine, models: FakeModels) -> AsyncIterator[httpx.AsyncClient]:
    async with await app_client(fake_engine, models) as client:
        yield client


def adapter_at(directory: Path) -> str:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text("{}")
    return str(directory)


async def test_load_makes_the_name_served(client: httpx.AsyncClient, models: FakeModels, tmp_path: Path) -> None:
    path = adapter_at(tmp_path)

    response = await client.post("/loradock/adapters/load", json={"name": "a", "path": path})

    assert response.json() == {"name": "a", "path": path, "created": True}
    assert models.lora_requests["a"].lora_path == path


async def test_load_tells_the_workers_where_the_packed_form_is(
    client: httpx.AsyncClient, fake_engine: FakeEngine, tmp_path: Path
) -> None:
    path = adapter_at(tmp_path)

    await client.post("/loradock/adapters/load", json={"name": "a", "path": path, "packed": "/packed/a"})

    assert fake_engine.staged == {1: (path, "/packed/a")}
    assert fake_engine.added == []  # nothing was activated


async def test_load_waits_for_every_worker_and_not_for_other_adapters(
    client: httpx.AsyncClient, fake_engine: FakeEngine, models: FakeModels, tmp_path: Path
) -> None:
    fake_engine.slow = {1}
    path = adapter_at(tmp_path)
    slow = asyncio.create_task(client.post("/loradock/adapters/load", json={"name": "slow", "path": path}))
    await until(lambda: 1 in fake_engine.staged, "the first load")

    await client.post("/loradock/adapters/load", json={"name": "quick", "path": path})

    assert list(models.lora_requests) == ["quick"]
    fake_engine.slow = set()
    assert (await slow).status_code == 200
    assert list(models.lora_requests) == ["quick", "slow"]


async def test_load_that_only_activation_can_prove_is_activated(
    client: httpx.AsyncClient, fake_engine: FakeEngine, tmp_path: Path
) -> None:
    fake_engine.state = "unproven"
    unfit = adapter_at(tmp_path / "unfit")

    good = await client.post("/loradock/adapters/load", json={"name": "a", "path": adapter_at(tmp_path)})
    refused = await client.post("/loradock/adapters/load", json={"name": "b", "path": unfit})

    assert good.status_code == 200
    assert fake_engine.added == [1]
    assert refused.status_code == 422
    assert "the experts do not fit" in refused.json()["error"]["message"]
    assert fake_engine.removed == [2]  # vLLM registers an adapter and takes a slot for it before it finds out


async def test_load_when_the_engine_dies_is_503_for_all_who_wait(
    client: httpx.AsyncClient, fake_engine: FakeEngine, tmp_path: Path
) -> None:
    fake_engine.state = "reading"
    path = adapter_at(tmp_path)
    loads = [
        asyncio.create_task(client.post("/loradock/adapters/load", json={"name": name, "path": path})) for name in "ab"
    ]
    await until(lambda: len(fake_engine.staged) == 2, "both loads")

    fake_engine.dies = True

    assert [response.status_code for response in await asyncio.gather(*loads)] == [503, 503]


async def test_load_of_the_same_twice_at_once_loads_once(
    client: httpx.AsyncClient, fake_engine: FakeEngine, tmp_path: Path
) -> None:
    body = {"name": "a", "path": adapter_at(tmp_path)}

    responses = await asyncio.gather(*(client.post("/loradock/adapters/load", json=body) for _ in range(8)))

    assert {response.status_code for response in responses} == {200}
    assert sum(response.json()["created"] for response in responses) == 1
    assert fake_engine.stages == 1


async def test_load_of_a_loaded_name_from_elsewhere_conflicts(client: httpx.AsyncClient, tmp_path: Path) -> None:
    await client.post("/loradock/adapters/load", json={"name": "a", "path": adapter_at(tmp_path / "1")})

    response = await client.post("/loradock/adapters/load", json={"name": "a", "path": adapter_at(tmp_path / "2")})

    assert response.status_code == 409
    assert str(tmp_path / "1") in response.json()["error"]["message"]


async def test_load_under_the_bases_name_conflicts(client: httpx.AsyncClient, tmp_path: Path) -> None:
    response = await client.post("/loradock/adapters/load", json={"name": BASE, "path": adapter_at(tmp_path)})

    assert response.status_code == 409


@pytest.mark.parametrize("path", ["org/adapter", "/nowhere/at/all"])
async def test_load_of_what_is_no_adapter_directory_never_reaches_vllm(
    client: httpx.AsyncClient, fake_engine: FakeEngine, path: str
) -> None:
    response = await client.post("/loradock/adapters/load", json={"name": "a", "path": path})

    assert response.status_code == 400
    assert fake_engine.stages == 0


async def test_load_that_one_worker_refuses_is_the_clients_error_with_its_reason(
    client: httpx.AsyncClient, fake_engine: FakeEngine, models: FakeModels, tmp_path: Path
) -> None:
    response = await client.post("/loradock/adapters/load", json={"name": "a", "path": adapter_at(tmp_path / "bad")})

    assert response.status_code == 422
    assert "rank 64 is over max_lora_rank 16" in response.json()["error"]["message"]
    assert fake_engine.staged == {}
    assert models.lora_requests == {}


async def test_unload_forgets_the_name_and_removes_the_weights(
    client: httpx.AsyncClient, fake_engine: FakeEngine, models: FakeModels, tmp_path: Path
) -> None:
    await client.post("/loradock/adapters/load", json={"name": "a", "path": adapter_at(tmp_path)})

    response = await client.post("/loradock/adapters/unload", json={"name": "a"})

    assert response.json() == {"name": "a", "freed": True}
    assert fake_engine.removed == [1]
    assert fake_engine.staged == {}
    assert not models.lora_requests


async def test_unload_of_an_unknown_name_is_404(client: httpx.AsyncClient) -> None:
    response = await client.post("/loradock/adapters/unload", json={"name": "a"})

    assert response.status_code == 404


async def test_routes_of_a_dead_engine_answer_503(
    client: httpx.AsyncClient, fake_engine: FakeEngine, tmp_path: Path
) -> None:
    fake_engine.errored = True
    body = {"name": "a", "path": adapter_at(tmp_path)}

    assert (await client.post("/loradock/adapters/load", json=body)).status_code == 503
    assert (await client.get("/loradock/status")).status_code == 503


async def test_status_names_what_lies_in_the_slots(client: httpx.AsyncClient, tmp_path: Path) -> None:
    await client.post("/loradock/adapters/load", json={"name": "a", "path": adapter_at(tmp_path)})

    status = (await client.get("/loradock/status")).json()

    assert status["active"] == ["a", None, "unnamed:9"]
    assert status["staged"] == ["unnamed:2"]
    assert status["registered"] == ["a"]
    assert status["lora_dtype"] == "bfloat16"
    assert (status["quantised"], status["top_logprobs"]) == (False, 5)
    assert status["lora_wrapper"] == CORRECTED_WRAPPER
    assert status["corrected"] is True
    assert (status["max_loras"], status["max_num_seqs"], status["dtype"]) == (3, 64, "float32")


async def test_status_with_the_stock_wrapper_on_cpu_is_not_corrected(models: FakeModels) -> None:
    async with await app_client(FakeEngine(wrapper=STOCK_WRAPPER), models) as client:
        status = (await client.get("/loradock/status")).json()

    assert status["corrected"] is False


async def test_status_without_lora_has_nothing_to_correct(models: FakeModels, tmp_path: Path) -> None:
    async with await app_client(FakeEngine(lora=False), models) as client:
        status = (await client.get("/loradock/status")).json()
        load = await client.post("/loradock/adapters/load", json={"name": "a", "path": adapter_at(tmp_path)})

    assert (status["lora_wrapper"], status["corrected"], status["max_loras"]) == (None, True, 0)
    assert load.status_code == 409


async def test_status_names_what_was_counted_and_leaves_out_what_has_no_name(
    client: httpx.AsyncClient, fake_engine: FakeEngine, tmp_path: Path
) -> None:
    await client.post("/loradock/adapters/load", json={"name": "a", "path": adapter_at(tmp_path)})
    await client.post("/loradock/adapters/pin", json={"name": "a"})

    status = (await client.get("/loradock/status")).json()

    assert (status["pinned"], status["slot_bytes"]) == (["a"], 640)
    assert (status["counts"], status["adapters"]) == (fake_engine.counts, {"a": fake_engine.counts})


async def test_pin_reads_what_left_host_memory_first(
    client: httpx.AsyncClient, fake_engine: FakeEngine, tmp_path: Path
) -> None:
    await client.post("/loradock/adapters/load", json={"name": "a", "path": adapter_at(tmp_path)})

    response = await client.post("/loradock/adapters/pin", json={"name": "a"})

    assert response.json() == {"name": "a", "pinned": True}
    assert (fake_engine.added, fake_engine.pinned) == ([1], [1])
    freed = await client.post("/loradock/adapters/unpin", json={"name": "a"})
    assert freed.json() == {"name": "a", "pinned": False, "was_pinned": True}


async def test_pin_of_the_last_slot_is_refused_with_both_numbers(client: httpx.AsyncClient, tmp_path: Path) -> None:
    answers = []
    for name in "abc":
        await client.post("/loradock/adapters/load", json={"name": name, "path": adapter_at(tmp_path / name)})
        answers.append(await client.post("/loradock/adapters/pin", json={"name": name}))

    assert [answer.status_code for answer in answers] == [200, 200, 409]
    assert answers[2].json()["error"]["message"] == "2 of the 3 slots may be pinned, and are already"


@pytest.mark.parametrize("verb", ["pin", "unpin"])
async def test_pin_of_an_unknown_name_is_404(client: httpx.AsyncClient, verb: str) -> None:
    assert (await client.post(f"/loradock/adapters/{verb}", json={"name": "a"})).status_code == 404


@pytest.mark.engine
async def test_real_engine_reports_the_corrected_wrapper(engine: VllmServer) -> None:
    async with engine.client() as client:
        status = (await client.get("/loradock/status")).json()

    assert status["lora_wrapper"] == CORRECTED_WRAPPER
    assert status["corrected"] is True
    assert (status["device"], status["max_loras"], len(status["active"])) == ("cpu", SLOTS, SLOTS)
    assert (status["dtype"], status["lora_dtype"]) == ("float32", "float32")


@pytest.mark.engine
async def test_real_engine_allocates_what_the_plan_says_a_slot_costs(engine: VllmServer, world: World) -> None:
    base = find_base(str(world.base_dir))
    rules = [rule for name in base.facts.architectures if (rule := architecture_rules(name)) is not None]
    expected = sizing.slot_bytes(adapter_shapes(base, rules), MAX_LORA_RANK, bytes_per_value=4)
    async with engine.client() as client:
        status = (await client.get("/loradock/status")).json()

    assert status["slot_bytes"] == expected


@pytest.mark.engine
async def test_real_engine_unload_frees_the_weights(engine: VllmServer, world: World) -> None:
    body = {"name": "leaving", "path": str(world.adapters["a2"])}
    completion = {"model": "leaving", "prompt": "def", "max_tokens": 1}
    async with engine.client() as client:
        await client.post("/loradock/adapters/load", json=body)
        before = (await client.get("/loradock/status")).json()

        response = await client.post("/loradock/adapters/unload", json={"name": "leaving"})

        after = (await client.get("/loradock/status")).json()
        asked = await client.post("/v1/completions", json=completion)
    assert response.json()["freed"] is True
    assert "leaving" in before["staged"]
    assert len(after["staged"]) == len(before["staged"]) - 1
    assert not {"leaving"} & {*after["registered"], *after["active"], *after["loaded"], *after["staged"]}
    assert asked.status_code == 404


@pytest.mark.engine
async def test_real_engine_lets_go_of_an_adapter_that_answered_and_lives_without_its_files(
    engine: VllmServer, world: World, tmp_path: Path
) -> None:
    """What collecting does: unload, then remove the files; the slot and the host memory are free, others go on."""
    copy = tmp_path / "copy"
    shutil.copytree(world.adapters["a2"], copy)
    async with engine.client() as client:

        async def status() -> dict[str, Any]:
            return dict((await client.get("/loradock/status")).json())

        async def ask(model: str) -> httpx.Response:
            return await client.post("/v1/completions", json={"model": model, "prompt": "def", "max_tokens": 4})

        for name, path in (("going", copy), ("staying", world.adapters["a2"])):
            await client.post("/loradock/adapters/load", json={"name": name, "path": str(path)})
        assert (await ask("going")).status_code == 200
        before = await status()
        response = await client.post("/loradock/adapters/unload", json={"name": "going"})
        after = await status()
        shutil.rmtree(copy)
        answers = [await ask(model) for model in ("staying", BASE, "going")]
        await client.post("/loradock/adapters/unload", json={"name": "staying"})
    assert response.json()["freed"] is True
    assert "going" in before["active"]
    assert "going" in before["loaded"]
    assert after["active"].count(None) == before["active"].count(None) + 1, "its slot is free"
    assert len(after["loaded"]) == len(before["loaded"]) - 1
    assert not {"going"} & {*after["registered"], *after["active"], *after["loaded"], *after["staged"]}
    assert [answer.status_code for answer in answers] == [200, 200, 404]


@pytest.mark.engine
async def test_real_engine_keeps_a_pinned_adapter_in_its_slot_and_lives_through_batches_of_all_slots(
    engine: VllmServer, world: World
) -> None:
    others = [f"p{number}" for number in range(1, SLOTS + 3)]
    async with engine.client() as client:
        for number, name in enumerate(["pinned", *others]):
            path = str(world.adapters[f"a{number}"])
            await client.post("/loradock/adapters/load", json={"name": name, "path": path})
        assert (await client.post("/loradock/adapters/pin", json={"name": "pinned"})).status_code == 200
        first = (await client.get("/loradock/status")).json()

        for few in (others[: SLOTS - 1], others[2 : SLOTS + 1]):
            await all_complete(client, few)
            assert "pinned" in (await client.get("/loradock/status")).json()["active"]
        # What ends stock vLLM: as many others in one batch as there are slots.
        await all_complete(client, others * 4)
        await all_complete(client, others[:1])
        last = (await client.get("/loradock/status")).json()

        await client.post("/loradock/adapters/unpin", json={"name": "pinned"})
        for name in others:
            await all_complete(client, [name])
        unpinned = (await client.get("/loradock/status")).json()
        for name in ["pinned", *others]:
            await client.post("/loradock/adapters/unload", json={"name": name})
    assert (first["pinned"], first["slot_bytes"] > 0) == (["pinned"], True)
    assert "pinned" in first["active"]
    assert "pinned" in last["active"]
    assert last["adapters"]["p1"]["activations"] >= 1
    assert last["counts"]["slot_evictions"] > first["counts"]["slot_evictions"]
    assert (unpinned["pinned"], "pinned" in unpinned["active"]) == ([], False)


async def all_complete(client: httpx.AsyncClient, models: list[str]) -> None:
    """One completion of each model, all at once."""
    body = {"prompt": "def", "max_tokens": 8, "ignore_eos": True}
    asked = (client.post("/v1/completions", json=body | {"model": model}) for model in models)
    assert {answer.status_code for answer in await asyncio.gather(*asked)} == {200}


@pytest.mark.engine
async def test_real_engine_refuses_bad_adapters_as_the_clients_error_and_lives(
    engine: VllmServer, world: World, tmp_path: Path
) -> None:
    too_large = make_adapter(tmp_path / "rank64", world.base_dir, 1, rank=64)
    unsupported = make_adapter(tmp_path / "dora", world.base_dir, 1, rank=4)
    config = json.loads((unsupported / "adapter_config.json").read_text())
    (unsupported / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    async with engine.client() as client:
        for path, reason in ((too_large, "64"), (unsupported, "DoRA")):
            response = await client.post("/loradock/adapters/load", json={"name": "bad", "path": str(path)})

            assert response.status_code == 422
            assert reason in response.json()["error"]["message"]
        assert (await client.get("/health")).status_code == 200
        assert "bad" not in (await client.get("/loradock/status")).json()["registered"]


async def test_probe_tells_the_likeliest_first_and_what_is_no_number_as_none(
    client: httpx.AsyncClient, fake_engine: FakeEngine
) -> None:
    answer = await client.post("/loradock/probe", json={"prompts": [[1, 2], [3]]})
    assert answer.json() == {"answers": [[[3, -0.1], [7, -0.5], [9, None]]] * 2}
    (first, params, adapter), _ = fake_engine.asked
    assert (first, adapter) == ({"prompt_token_ids": [1, 2]}, None)
    assert (params.max_tokens, params.logprobs, params.temperature) == (1, 5, 0.0)
    assert (params.skip_reading_prefix_cache, params.logprob_token_ids) == (True, None)


async def test_probe_of_an_adapter_runs_with_it(
    client: httpx.AsyncClient, fake_engine: FakeEngine, tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    await client.post("/loradock/adapters/load", json={"name": "a", "path": str(tmp_path)})
    await client.post("/loradock/probe", json={"name": "a", "prompts": [[1]]})
    assert fake_engine.asked[-1][2].lora_name == "a"


@pytest.mark.parametrize("max_logprobs", [-1, 100])
async def test_probe_asks_for_twenty_tokens_and_no_more(
    client: httpx.AsyncClient, fake_engine: FakeEngine, max_logprobs: int
) -> None:
    fake_engine.vllm_config.model_config.max_logprobs = max_logprobs
    await client.post("/loradock/probe", json={"prompts": [[1]]})
    assert fake_engine.asked[-1][1].logprobs == 20


@pytest.mark.parametrize(
    ("setting", "body", "status", "kind"),
    [
        ({}, {"prompts": [[404]]}, 400, "bad_prompt"),
        ({}, {"prompts": [[1]], "name": "absent"}, 404, "unknown_adapter"),
        ({"logprobs_mode": "raw_logits"}, {"prompts": [[1]]}, 409, "cannot_probe"),
        ({"runner_type": "pooling"}, {"prompts": [[1]]}, 409, "cannot_probe"),
    ],
)
async def test_probe_that_cannot_be_answered_says_why(
    client: httpx.AsyncClient, fake_engine: FakeEngine, setting: Any, body: Any, status: int, kind: str
) -> None:
    vars(fake_engine.vllm_config.model_config).update(setting)
    answer = await client.post("/loradock/probe", json=body)
    assert (answer.status_code, answer.json()["error"]["type"]) == (status, kind)
