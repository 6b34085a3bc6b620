"""What a config asks of this machine that it does not have.

Told before an engine is started: vLLM would die of it a minute later, with a word from its depths, again and again.
Pure; the machine is a value.
"""

from loradock_serve.config import EngineConfig
from loradock_serve.core_list import parse_cores
from loradock_serve.engine_command import GIB, Machine
from loradock_serve.errors import ServeConfigError
from loradock_serve.sizing import Advice


def check_machine(config: EngineConfig, machine: Machine, advice: Advice | None) -> None:
    """Raises ServeConfigError with everything that the base's engine cannot have here.

    `advice` is None where the base takes no adapters. An engine that something else runs (`url`) is its own affair.
    """
    if config.url is not None:
        return
    problems = _cpu_problems(config, machine) if machine.device == "cpu" else []
    if advice is not None:
        problems += _adapter_problems(config, machine, advice)
    if problems:
        raise ServeConfigError("\n".join(problems))


def _adapter_problems(config: EngineConfig, machine: Machine, advice: Advice) -> list[str]:
    problems = []
    # vLLM's LoRA kernels for GPUs assert 16-bit types in their first run, and say no more than `AssertionError`.
    if machine.device == "gpu" and config.dtype == "float32":
        problems.append(
            "engine.dtype: adapters cannot be served in float32 on a GPU, where vLLM computes them in bfloat16 or "
            "float16 only; leave it out, or say bfloat16"
        )
    if advice.slots_bytes >= machine.memory_bytes:
        sized = advice.sizing
        problems.append(
            f"engine.max_loras: {sized.max_loras} slots of rank {sized.max_lora_rank} take "
            f"{_gib(advice.slots_bytes)}, and {'the GPU' if machine.device == 'gpu' else 'this machine'} has "
            f"{_gib(machine.memory_bytes)}; leave it out, and as many are taken as there is room for"
        )
    return problems


def _cpu_problems(config: EngineConfig, machine: Machine) -> list[str]:
    problems = []
    named = parse_cores(config.cpu_cores) if config.cpu_cores is not None else []
    missing = [core for core in named if core not in machine.cores]
    if missing:
        problems.append(
            f"engine.cpu_cores: {config.cpu_cores} names core {_shortened(missing)}, which this process may not use "
            f"(it may use {_shortened(list(machine.cores))}); leave it out to use all of those"
        )
    if config.kv_cache_gib is not None and config.kv_cache_gib * GIB >= machine.host_bytes:
        problems.append(
            f"engine.kv_cache_gib: {config.kv_cache_gib:g} GiB are not there: this machine has "
            f"{_gib(machine.host_bytes)}, and the base needs some of them"
        )
    return problems


def _shortened(cores: list[int]) -> str:
    """Runs of numbers as "2-99"."""
    runs: list[list[int]] = []
    for core in cores:
        if runs and core == runs[-1][-1] + 1:
            runs[-1].append(core)
        else:
            runs.append([core])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.1f} GiB"
