"""The facts behind a server's plan: what the registry, the base, the machine and the config say."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loradock_adapters.base_identity import BaseIdentity
from loradock_adapters.gate import Verdict
from loradock_adapters.manifest import FileEntry, Manifest
from loradock_adapters.problems import Problem
from loradock_adapters.registry import Registry
from loradock_adapters.traffic import HourTraffic
from loradock_serve.base import ServedBase, find_base
from loradock_serve.config import ServeConfig
from loradock_serve.engine_command import Machine
from loradock_serve.plan import hour_of, make_plan, plan_json
from loradock_serve.sizing import Advice
from loradock_testing.tiny_checkpoints import write_base

GIB = 1024**3
MACHINE = Machine("cpu", 8 * GIB, (0, 1))
OVER = (Problem("rank_over_limit", "rank 128 is over 64"),)
# Two layers 16 wide with 32 inside: q 16+16, k and v 8+16, o 16+16, three of the MLP 32+16; and both embeddings 64+16.
VALUES_A_RANK = 2 * (32 + 24 + 24 + 32 + 3 * 48) + 2 * 80


@pytest.fixture
def base(tmp_path: Path) -> ServedBase:
    return find_base(str(write_base(tmp_path / "base")))


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    registry = Registry(f"sqlite:///{tmp_path}/registry.db")
    yield registry
    registry.close()


def config(**settings: Any) -> ServeConfig:
    return ServeConfig.model_validate({"base": "x"} | settings)


def plan(base: ServedBase, registry: Registry | None, machine: Machine = MACHINE, **settings: Any) -> Advice:
    advice = make_plan(config(**settings), base, machine, registry)
    assert advice is not None
    return advice


def publish(registry: Registry, name: str, rank: int, *, base: BaseIdentity | None = None, **verdict: Any) -> str:
    found = Verdict("lora", verdict.get("placement", "shared"), verdict.get("reasons", ()), rank)
    number = sum(ord(letter) for letter in name) + rank
    manifest = Manifest((FileEntry("adapter_config.json", 10**6, f"{number:064x}"),))
    return registry.publish(name, manifest, found, base=base).digest


def test_slots_count_every_module_that_the_engine_wraps(base: ServedBase) -> None:
    assert plan(base, None).sizing.slot_bytes == VALUES_A_RANK * 64 * 2


def test_float32_doubles_them_unless_adapters_are_kept_in_16_bits(base: ServedBase) -> None:
    wide = {"dtype": "float32"}
    assert plan(base, None, engine=wide).sizing.slot_bytes == VALUES_A_RANK * 64 * 4
    assert plan(base, None, engine=wide | {"lora_dtype": "bfloat16"}).sizing.slot_bytes == VALUES_A_RANK * 64 * 2


def test_ranks_of_this_base_count_and_those_of_others_do_not(base: ServedBase, registry: Registry) -> None:
    publish(registry, "other", 256, base=BaseIdentity("other", "a" * 64, "b" * 64))
    publish(registry, "mine", 16, base=base.identity)
    assert plan(base, registry).reasons["max_lora_rank"].startswith("the largest published rank is 16;")
    publish(registry, "unclaimed", 100)
    assert plan(base, registry).sizing.max_lora_rank == 128


def test_older_version_keeps_its_rank_served(base: ServedBase, registry: Registry) -> None:
    publish(registry, "mine", 100, base=base.identity)
    publish(registry, "mine", 8, base=base.identity)
    assert plan(base, registry).sizing.max_lora_rank == 128


def test_recent_traffic_counts_and_old_does_not(base: ServedBase, registry: Registry) -> None:
    digest = publish(registry, "mine", 8, base=base.identity)
    now = hour_of(time.time())
    registry.traffic.add([HourTraffic(now - 8 * 24, {digest: 5}, 200)])
    assert plan(base, registry).sizing.max_loras == 64
    registry.traffic.add([HourTraffic(now - 1, {digest: 5}, 100)])
    assert plan(base, registry).sizing.max_loras == 100
    assert plan(base, registry, engine={"max_num_seqs": 80}).sizing.max_loras == 80


def test_adapter_that_only_its_rank_keeps_from_sharing_is_named(base: ServedBase, registry: Registry) -> None:
    publish(registry, "big", 128, base=base.identity, placement="dedicated", reasons=OVER)
    publish(registry, "dora", 128, base=base.identity, placement="dedicated", reasons=(*OVER, Problem("dora", "x")))
    (note,) = plan(base, registry).notes
    assert note.startswith("'big' (rank 128) has an engine of its own, for the rank; with engine.max_lora_rank: 128")


def test_gpu_machine_keeps_adapters_in_its_hosts_memory(base: ServedBase) -> None:
    slot_bytes = VALUES_A_RANK * 64 * 2
    gpu = Machine("gpu", 1000 * slot_bytes, (0,), beside_gpu_bytes=4 * 20 * (VALUES_A_RANK * 16 * 2))
    sized = plan(base, None, gpu, engine={"max_loras": 8}).sizing
    assert sized.max_cpu_loras == 20, "a quarter of it, beside a GPU"
    assert plan(base, None, gpu).sizing.max_loras == 20


def test_architecture_without_adapters_has_no_plan(base: ServedBase, tmp_path: Path) -> None:
    path = tmp_path / "base" / "config.json"
    path.write_text(path.read_text().replace("LlamaForCausalLM", "GPT2LMHeadModel"))
    assert make_plan(config(), find_base(str(tmp_path / "base")), MACHINE, None) is None


def test_plan_as_json_has_every_choice_with_its_reason(base: ServedBase) -> None:
    document = plan_json(plan(base, None))
    assert set(document["reasons"]) == {"max_loras", "max_cpu_loras", "max_lora_rank"} < set(document)
    assert document["slots_bytes"] == document["max_loras"] * document["slot_bytes"]
