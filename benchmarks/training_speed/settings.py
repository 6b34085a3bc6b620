"""What the legs differ in: the same training said to each trainer in its own words."""

from dataclasses import dataclass, field
from typing import Any

BATCH = 8
LEARNING_RATE = 1e-4
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0}


@dataclass(frozen=True, eq=False)
class Leg:
    """One setting of one trainer."""

    trainer: str
    name: str
    order: str = "as written"
    """`as written`: both take the same rows in the same order, so that both pad alike. `own`: as the trainer likes."""
    options: dict[str, Any] = field(default_factory=dict)
    """Beyond what all have; None takes away."""


TRL_EQUAL = {"train_sampling_strategy": "sequential"}

LEGS = (
    Leg("ours", "LoRA, same batches"),
    Leg("trl", "LoRA, same batches", options=TRL_EQUAL),
    Leg("ours", "LoRA, rows of like length", "own", {"group_by_length": True}),
    Leg("trl", "LoRA, rows of like length", "own", {"train_sampling_strategy": "group_by_length"}),
    Leg("ours", "LoRA, packed", "own", {"packing": True}),
    Leg("trl", "LoRA, packed", "own", {"packing": True}),
    Leg("ours", "full, same batches", options={"lora_config": None}),
    Leg("trl", "full, same batches", options={**TRL_EQUAL, "lora": None}),
    Leg("ours", "LoRA, checkpointing", options={"gradient_checkpointing": True}),
    Leg("trl", "LoRA, checkpointing", options={**TRL_EQUAL, "gradient_checkpointing": True}),
    Leg("ours", "LoRA, compiled", options={"torch_compile": True}),
    Leg("trl", "LoRA, compiled", options={**TRL_EQUAL, "torch_compile": True}),
)

COMPARED = tuple(leg.name for leg in LEGS if leg.trainer == "ours")


def config_of(leg: Leg, base: str, data: str, length: int, steps: int) -> dict[str, Any]:
    """The trainer's own config."""
    common = {"learning_rate": LEARNING_RATE, "max_steps": steps, "logging_steps": 10}
    if leg.trainer == "ours":
        config: dict[str, Any] = common | {
            "model_id": base, "train_path": data, "format": "text", "context_length": length,
            "on_long_rows": "truncate", "packing": False, "group_by_length": False,
            "train_batch_size_per_device": BATCH, "mixed_precision": "no", "dtype": "float32", "lora_config": LORA,
            "save_every_s": None,
        }  # fmt: skip
    else:
        config = common | {
            "model": base, "data": data, "max_length": length, "per_device_train_batch_size": BATCH, "bf16": False,
            "packing": False, "gradient_checkpointing": False, "use_cpu": True, "report_to": "none",
            "save_strategy": "no", "disable_tqdm": True, "lora": LORA | {"target_modules": "all-linear"},
            "lr_scheduler_type": "cosine",
        }  # fmt: skip
    return {key: value for key, value in (config | leg.options).items() if value is not None}
