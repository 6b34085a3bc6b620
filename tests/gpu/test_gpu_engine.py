"""The whole way on a CUDA device: trained on it, pushed, served by the CUDA build of vLLM beside a dedicated engine.

    python -m pytest -m gpu

Skipped where there is no such device. Everything is bfloat16: vLLM's LoRA kernels for GPUs take no float32. The truth
is transformers + PEFT in float32 on the CPU; `loradock_testing.regret` says how bfloat16 answers are held to it.
"""

import asyncio
import json
import os
import random
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoTokenizer

from loradock_testing import gpu
from loradock_testing.isolation import PROMPTS as LONG_PROMPTS
from loradock_testing.isolation import mixed_stream
from loradock_testing.loradock_server import LoradockServer, children, group_processes, loradock_server
from loradock_testing.regret import worst_regrets
from loradock_testing.tiny_models import ALL_MODULES, LINEAR_MODULES, make_adapter, make_llama, prompt_logprobs
from loradock_testing.waiting import until

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(gpu.why_not() is not None, reason=gpu.why_not() or "")]

GPU_WRAPPER = "vllm.lora.punica_wrapper.punica_gpu.PunicaWrapperGPU"
MAX_TOKENS = 16
REGRET_LIMIT = 0.5
"""Logits. The CPU engine's answers to these tests, in bfloat16, had regrets up to 0.17 under their own weights and of
4.3 or more under another model's."""
SLOTS = 2
ADAPTERS = {"linear-8": (8, LINEAR_MODULES), "whole-list-16": (16, ALL_MODULES), "linear-4": (4, LINEAR_MODULES)}
"""One more than there are slots: mixed traffic swaps them."""
PROMPTS = [
    f"def {word}(self, {word[::-1]}):" for word in ["parse", "write", "open", "close", "start", "stop", "read", "merge"]
]
PAIRS = [("import", "else"), ("return", "with"), ("yield", "await"), ("class", "async"), ("self", "print")]
PAIRS += [("lambda", "global"), ("while", "assert"), ("raise", "def")]
LORA_OPTIONS = {"r": 8, "lora_alpha": 16, "target_modules": list(LINEAR_MODULES)}


@dataclass(frozen=True)
class World:
    """What is served: name -> where the weights are, as (full weights, adapter on them or None)."""

    root: Path
    base: Path
    pushed: Mapping[str, Path]
    """Name -> what is given to `loradock push`."""
    models: Mapping[str, tuple[Path, Path | None]]
    runs: Mapping[str, dict[str, Any]]
    """Trained model -> its run.json."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Random adapters, and two models trained on the device, before any engine measures its free memory."""
    root = tmp_path_factory.mktemp("gpu")
    # Heads of 64, as every attention kernel takes them.
    base = make_llama(root / "base-model", hidden=256, heads=4, kv_heads=2, max_positions=1024, dtype=torch.bfloat16)
    adapters = {
        name: make_adapter(root / name, base, seed, rank=rank, target_modules=modules)
        for seed, (name, (rank, modules)) in enumerate(ADAPTERS.items(), start=1)
    }
    runs = {
        "trained": _train(root, "trained", base, learning_rate=0.02, lora_config=LORA_OPTIONS),
        "full": _train(root, "full", base, learning_rate=0.005),
    }
    models = {"base": (base, None)} | {name: (base, path) for name, path in adapters.items()}
    models |= {"trained": (base, root / "trained" / "checkpoint"), "full": (root / "full" / "checkpoint", None)}
    return World(root, base, adapters | {name: root / name for name in runs}, models, runs)


def _train(root: Path, name: str, base: Path, **config: Any) -> dict[str, Any]:
    """`loradock train` in a process of its own, which gives its GPU memory back; its run.json."""
    rows = [{"prompt": a, "completion": f" {b} {a}"} for a, b in PAIRS]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config |= {"model_id": str(base), "train_path": str(root / "rows.jsonl"), "mixed_precision": "bf16"}
    config |= {"max_steps": 12, "train_batch_size_per_device": 4, "context_length": 64}
    (root / f"{name}.yaml").write_text(json.dumps(config))
    nobody = LoradockServer("http://127.0.0.1:1", 0, root, root / "no.log")
    nobody.loradock("train", str(root / f"{name}.yaml"), "--output", str(root / name))
    summary: dict[str, Any] = json.loads((root / name / "run.json").read_text())
    return summary


@pytest.fixture(scope="module")
def server(world: World) -> Iterator[LoradockServer]:
    engine = {"dtype": "bfloat16", "max_loras": SLOTS, "max_lora_rank": 16, "max_model_len": 512, "max_num_seqs": 128}
    with loradock_server(world.base, world.root / "data", engine=engine) as running:
        for name, path in world.pushed.items():
            running.loradock("push", str(path), name)
        yield running


@dataclass(frozen=True)
class EngineSeen:
    """A running engine, as the processes tell."""

    words: list[str]
    """Of its command line."""

    def flag(self, name: str) -> str:
        return self.words[self.words.index(name) + 1]

    def status(self) -> dict[str, Any]:
        """What our plug-in answers on the engine's own socket."""
        transport = httpx.HTTPTransport(uds=self.flag("--uds"))
        with httpx.Client(transport=transport, base_url="http://engine", timeout=60) as client:
            document: dict[str, Any] = client.get("/loradock/status").raise_for_status().json()
        return document


def engines(server: LoradockServer) -> dict[str, EngineSeen]:
    """What the engine calls its model -> the engine."""
    found = {}
    for launcher in children(server.pid):
        title = next((title for title in group_processes(launcher).values() if "--uds" in title), None)
        if title is not None:
            seen = EngineSeen(title.split())
            found[seen.flag("--served-model-name")] = seen
    return found


def token_ids(world: World, prompt: str) -> list[int]:
    tokenizer: Any = AutoTokenizer.from_pretrained(world.base)
    ids: list[int] = tokenizer(prompt).input_ids
    return ids


def wrong(world: World, name: str, prompts: Sequence[str], answers: Sequence[Sequence[int]]) -> list[str]:
    """A line for each answer that is not the model's own."""
    full_weights, adapter = world.models[name]
    regrets = worst_regrets(full_weights, adapter, [token_ids(world, prompt) for prompt in prompts], answers)
    return [
        f"{name}, {prompt!r}: regret {regret:.3f}"
        for prompt, regret in zip(prompts, regrets, strict=True)
        if regret > REGRET_LIMIT
    ]


def test_training_ran_on_the_gpu_in_bf16(world: World) -> None:
    for summary in world.runs.values():
        assert summary["device"] == torch.cuda.get_device_name()
        assert summary["precision"]["arithmetic"] == "bf16"
        assert summary["precision"]["saved"] == "bfloat16"
        assert 0 < summary["peak_memory_bytes"] < 2 * 1024**3
        assert summary["proof"]["base"] > 0


def test_stock_gpu_wrapper_is_left_in_place_and_counts_as_right(server: LoradockServer) -> None:
    status = engines(server)["base"].status()
    assert status["device"].startswith("cuda")
    assert status["lora_wrapper"] == GPU_WRAPPER
    assert status["corrected"] is True
    assert (status["max_loras"], status["max_lora_rank"], status["dtype"]) == (SLOTS, 16, "bfloat16")
    assert len(status["active"]) == SLOTS


@pytest.mark.parametrize("name", ["base", *ADAPTERS, "trained"])
def test_shared_model_answers_as_transformers_and_peft_do(server: LoradockServer, world: World, name: str) -> None:
    answers = [server.tokens(name, prompt, MAX_TOKENS, ignore_eos=True) for prompt in PROMPTS]
    assert wrong(world, name, PROMPTS, answers) == []
    for other in ({"base"} | ADAPTERS.keys()) - {name, "trained"}:  # else the limit would tell nothing apart
        assert len(wrong(world, other, PROMPTS, answers)) >= 0.9 * len(PROMPTS)


def test_full_model_shares_the_gpu_with_the_base(server: LoradockServer, world: World) -> None:
    answers = [server.tokens("full", prompt, MAX_TOKENS, ignore_eos=True) for prompt in PROMPTS]
    assert wrong(world, "full", PROMPTS, answers) == []
    assert server.card("full")["placement"] == "dedicated"
    both = engines(server)
    digest = server.card("full")["digest"]
    assert both.keys() == {"base", digest}
    assert both["base"].flag("--gpu-memory-utilization") == "0.62"
    assert both[digest].flag("--gpu-memory-utilization") == "0.3"
    assert 0.5 < gpu.memory_used_share() < 0.97
    again = [server.tokens("linear-8", prompt, MAX_TOKENS, ignore_eos=True) for prompt in PROMPTS]
    assert wrong(world, "linear-8", PROMPTS, again) == []


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="vLLM 0.32 on GPUs: docs/engine.md, GPUs")
def test_prompt_logprobs_of_an_adapter_on_the_head_are_its_own(server: LoradockServer, world: World) -> None:
    answer = server.complete("whole-list-16", PROMPTS[0], 1, prompt_logprobs=0)
    entries = answer["choices"][0]["prompt_logprobs"][1:]
    reported = [next(iter(entry.values()))["logprob"] for entry in entries]
    expected = prompt_logprobs(*world.models["whole-list-16"], PROMPTS[0])
    assert len(reported) == len(expected) > 5
    assert max(abs(a - b) for a, b in zip(reported, expected, strict=True)) < 0.5


@pytest.mark.parametrize("share_cache", [False, True], ids=["prefix-cache-apart", "prefix-cache-shared"])
def test_mixed_requests_on_fewer_slots_than_adapters_are_all_right(
    server: LoradockServer, world: World, share_cache: bool
) -> None:
    models = ["base", *ADAPTERS, "full"]
    random.Random(3).shuffle(models)

    async def stream() -> list[Any]:
        async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:
            return list(await mixed_stream(client, models, requests=100, in_flight=32, share_cache=share_cache))

    asked = asyncio.run(stream())
    assert len(asked) == 100
    for name in models:
        own = [one for one in asked if one.model == name]
        assert len(own) == 20
        assert wrong(world, name, [LONG_PROMPTS[one.prompt] for one in own], [one.tokens for one in own]) == []


@pytest.mark.parametrize("victim", ["EngineCore", "api_server"])
def test_killed_engine_frees_its_memory_and_comes_back(server: LoradockServer, world: World, victim: str) -> None:
    launcher = next(
        launcher
        for launcher in children(server.pid)
        if any("--served-model-name base" in title for title in group_processes(launcher).values())
    )
    pid = next(
        pid for pid, title in group_processes(launcher).items() if victim in title and "launcher.py" not in title
    )
    os.kill(pid, signal.SIGKILL)
    asyncio.run(until(lambda: not group_processes(launcher), "all processes of the killed engine end", 60))
    server.wait_healthy()  # it starts anew beside the dedicated one, in the memory that the killed one had
    for name in ("base", *ADAPTERS):
        answers = [server.tokens(name, prompt, MAX_TOKENS, ignore_eos=True) for prompt in PROMPTS]
        assert wrong(world, name, PROMPTS, answers) == []
