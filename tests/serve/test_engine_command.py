"""The command line and environment of engines, as a function of config and machine."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from loradock_serve import engine_command
from loradock_serve.config import DedicatedConfig, EngineConfig
from loradock_serve.engine_command import (
    EngineCommand,
    Machine,
    base_command,
    dedicated_command,
    plugins,
)
from loradock_serve.sizing import LoraSizing

GIB = 1024**3
CPU = Machine("cpu", 16 * GIB, (0, 1))
GPU = Machine("gpu", 80 * GIB, (0, 1, 2, 3))
LORA = LoraSizing(4, 64, 16, 0)
SOCKET = Path("/run/x.sock")


def base(
    machine: Machine = CPU, lora: LoraSizing | None = LORA, dedicated: DedicatedConfig | None = None, **engine: Any
) -> EngineCommand:
    return base_command("org/m", SOCKET, EngineConfig(**engine), dedicated or DedicatedConfig(), machine, lora)


def own(machine: Machine = CPU, dedicated: DedicatedConfig | None = None, **engine: Any) -> EngineCommand:
    config = EngineConfig(**engine)
    return dedicated_command(Path("/w"), "sha256:1", SOCKET, config, dedicated or DedicatedConfig(), machine)


def value(command: EngineCommand, flag: str) -> str:
    return command.argv[command.argv.index(flag) + 1]


def test_base_engine_listens_on_its_socket_and_hears_base() -> None:
    command = base(max_model_len=128, max_num_seqs=7)
    assert command.argv[:3] == (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
    flags = ("--model", "--served-model-name", "--uds", "--max-model-len", "--max-num-seqs", "--dtype")
    assert [value(command, flag) for flag in flags] == ["org/m", "base", "/run/x.sock", "128", "7", "auto"]
    assert command.socket == SOCKET
    assert "--host" not in command.argv
    assert "--port" not in command.argv


def test_sockets_inside_an_engine_lie_beside_its_own_where_their_paths_have_room() -> None:
    assert base().environment["VLLM_RPC_BASE_PATH"] == "/run/x" == str(base().inner_sockets)
    deep = Path("/" + "d" * 66) / "x.sock"
    command = base_command("org/m", deep, EngineConfig(), DedicatedConfig(), CPU, LORA)
    assert "VLLM_RPC_BASE_PATH" in command.environment
    deeper = Path("/" + "d" * 68) / "x.sock"
    command = base_command("org/m", deeper, EngineConfig(), DedicatedConfig(), CPU, LORA)
    assert "VLLM_RPC_BASE_PATH" not in command.environment


def test_base_engine_gets_its_slots_and_our_extension() -> None:
    command = base()
    assert "--enable-lora" in command.argv
    flags = ("--max-loras", "--max-cpu-loras", "--max-lora-rank", "--worker-extension-cls")
    assert [value(command, flag) for flag in flags] == ["4", "64", "16", engine_command.WORKER_EXTENSION]


def test_base_without_adapters_gets_no_adapter_flag() -> None:
    assert not [word for word in base(lora=None).argv if "lora" in word]


def test_dedicated_engine_hears_its_digest_and_nothing_of_adapters() -> None:
    command = own(max_loras=3, fully_sharded_loras=True, max_num_seqs=7)
    assert value(command, "--model") == "/w"
    assert value(command, "--served-model-name") == "sha256:1"
    assert value(command, "--max-num-seqs") == "7"
    assert not [word for word in command.argv if "lora" in word]


def test_dedicated_section_goes_over_the_engine_section() -> None:
    command = own(dedicated=DedicatedConfig(engine={"max_num_seqs": 2, "dtype": "float16"}), max_num_seqs=7)
    assert (value(command, "--max-num-seqs"), value(command, "--dtype")) == ("2", "float16")


@pytest.mark.parametrize(
    ("values", "asked"),
    [
        ({"n_positions": 128}, "128"),
        ({"max_position_embeddings": 4096}, "1024"),
        ({"text_config": {"max_position_embeddings": 512}}, "512"),
        ({"max_position_embeddings": 512, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "512"),
        ({"max_position_embeddings": 512, "rope_scaling": {"type": "yarn", "factor": 8.0}}, "1024"),
        ({}, "1024"),
    ],
)
def test_full_model_with_fewer_positions_than_the_base_is_asked_for_no_more(
    values: dict[str, Any], asked: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    config, dedicated = EngineConfig.model_validate({"max_model_len": 1024}), DedicatedConfig()
    command = dedicated_command(tmp_path, "sha256:1", SOCKET, config, dedicated, Machine("cpu", 16 * GIB, (0,)))
    assert value(command, "--max-model-len") == asked


def test_cpu_engine_does_not_compile_unless_told_to() -> None:
    assert "--enforce-eager" in base().argv
    assert "--no-enforce-eager" in base(enforce_eager=False).argv
    assert "--enforce-eager" not in base(GPU).argv


def test_gpu_is_shared_between_the_base_and_dedicated_engines() -> None:
    two = DedicatedConfig(max_engines=2, gpu_memory_utilization=0.25)
    assert value(base(GPU, dedicated=two), "--gpu-memory-utilization") == "0.42"
    assert value(own(GPU, two), "--gpu-memory-utilization") == "0.25"
    assert value(base(GPU, dedicated=two, gpu_memory_utilization=0.6), "--gpu-memory-utilization") == "0.6"
    many = DedicatedConfig(max_engines=9)
    assert value(base(GPU, dedicated=many), "--gpu-memory-utilization") == "0.1"


@pytest.mark.parametrize("dedicated", [DedicatedConfig(max_engines=0), DedicatedConfig(devices="1")])
def test_base_keeps_its_gpu_where_nobody_shares_it(dedicated: DedicatedConfig) -> None:
    assert "--gpu-memory-utilization" not in base(GPU, dedicated=dedicated).argv


def test_dedicated_devices_are_set_for_those_engines_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    config = DedicatedConfig(devices="2,3")
    assert own(GPU, config).environment["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert "CUDA_VISIBLE_DEVICES" not in base(GPU, dedicated=config).environment


def test_admin_key_stays_with_the_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORADOCK_ADMIN_KEY", "secret")
    monkeypatch.setenv("LORADOCK_REGISTRY_URL", "postgresql://u:secret@h/d")
    monkeypatch.setenv("HF_HOME", "/hf")
    environment = base().environment
    assert [name for name, value in environment.items() if "secret" in value] == []
    assert environment["HF_HOME"] == "/hf"
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in environment
    assert environment["TORCH_COMPILE_DISABLE"] == "1"


def test_kv_cache_on_cpu_is_an_eighth_of_memory_at_most_four_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    sizes = [(2 * GIB, "1"), (16 * GIB, "2"), (400 * GIB, "4")]
    for memory_bytes, share in sizes:
        command = base(Machine("cpu", memory_bytes, (0,)))
        assert command.environment["VLLM_CPU_KVCACHE_SPACE"] == share
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    assert base().environment["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert base(kv_cache_gib=0.5).environment["VLLM_CPU_KVCACHE_SPACE"] == "0.5"
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    assert "VLLM_CPU_KVCACHE_SPACE" not in base(GPU).environment


def test_threads_are_unpinned_unless_the_config_says_where() -> None:
    free = base().environment
    assert (free["VLLM_CPU_OMP_THREADS_BIND"], free["OMP_WAIT_POLICY"]) == ("0,1", "PASSIVE")
    assert base(cpu_cores="0-3").environment["VLLM_CPU_OMP_THREADS_BIND"] == "0-3"


def test_plugins_are_the_users_and_ours_but_not_vllms_resolvers() -> None:
    assert plugins("mine,loradock") == ["mine", "loradock", "loradock_endpoints"]
    assert plugins("") == ["loradock", "loradock_endpoints"]
    chosen = plugins(None)
    assert {"loradock", "loradock_endpoints"} <= set(chosen)
    assert not engine_command.UNWANTED_PLUGINS & set(chosen)


def test_this_machine_has_cores_and_memory() -> None:
    machine = engine_command.this_machine()
    assert machine.device in ("cpu", "gpu")
    assert machine.memory_bytes > 2**28
    assert machine.cores


def test_memory_of_the_smallest_gpu_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 81559\necho 40960\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert engine_command._gpu_memory_bytes() == 40960 * 1024**2
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert engine_command._gpu_memory_bytes() is None
