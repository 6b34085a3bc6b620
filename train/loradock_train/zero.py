"""The `deepspeed:` key: what a DeepSpeed configuration asks for, done by torch's fully_shard.

ZeRO divides optimiser states and gradients (stages 1 and 2) and parameters (stage 3) over the processes; so does
fully_shard, whose saves and checkpoints we prove. What else the file says is the YAML's business: `auto` and equal
values pass, others are refused, and sections that nobody reads are named. Reads no weights and imports no torch.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loradock_train.config_fsdp import FsdpOptions
from loradock_train.errors import ConfigError, Problem

SAME_AS = {
    "train_micro_batch_size_per_gpu": "train_batch_size_per_device",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
}
"""Their key to ours."""


def read_deepspeed(given: str | Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The mapping that a path names, relative to the YAML. Raises ConfigError."""
    if isinstance(given, Mapping):
        return dict(given)
    path = folder / given
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _wrong(f"no such file: {path}") from None
    except (OSError, ValueError) as error:
        raise _wrong(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise _wrong(f"{path} holds {type(values).__name__}, expected an object with zero_optimization")
    return values


def check_deepspeed(values: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raises ConfigError where file and YAML contradict each other. `config`: our keys and values."""
    problems = [
        Problem(f"deepspeed.{key}", f"{values[key]!r}, but {ours} is {config[ours]!r}; write auto in the file")
        for key, ours in SAME_AS.items()
        if values.get(key, "auto") not in ("auto", config[ours])
    ]
    stage = _zero(values).get("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        problems.append(Problem("deepspeed.zero_optimization.stage", f"must be 0, 1, 2 or 3, got {stage!r}"))
    if problems:
        raise ConfigError("deepspeed contradicts the config:", problems)


def as_fsdp(values: Mapping[str, Any]) -> FsdpOptions | None:
    """What divides the same things; None for stage 0, which divides nothing."""
    zero = _zero(values)
    if not zero.get("stage"):
        return None
    sections = (zero.get(key) for key in ("offload_param", "offload_optimizer"))
    places = [section.get("device") for section in sections if isinstance(section, Mapping)]
    return FsdpOptions(reshard_after_forward=zero["stage"] == 3, cpu_offload="cpu" in places)


def deepspeed_notices(values: Mapping[str, Any], num_processes: int) -> list[str]:
    """What becomes of it."""
    stage = _zero(values).get("stage", 0)
    unread = sorted(values.keys() - {"zero_optimization", *SAME_AS, "train_batch_size"})
    if stage == 0 or num_processes == 1:
        told = f"deepspeed: stage {stage} divides nothing over {num_processes} process{'es' * (num_processes > 1)}"
    else:
        told = f"deepspeed: stage {stage} is run by torch's fully_shard, as fsdp:, which divides the same"
    return [told + (f"; not read: {', '.join(unread)} (the YAML's own keys count)" if unread else "")]


def _zero(values: Mapping[str, Any]) -> Mapping[str, Any]:
    section = values.get("zero_optimization", {})
    if not isinstance(section, Mapping):
        raise _wrong(f"zero_optimization is {section!r}, not a section")
    return section


def _wrong(message: str) -> ConfigError:
    return ConfigError("the config has 1 problem:", [Problem("deepspeed", message)])
