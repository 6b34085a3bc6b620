"""Checkpoint directories without torch: right names and shapes, seeded values. For tests that only move them about."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

TINY_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}
SHAPES = {"q_proj": (16, 16), "k_proj": (8, 16), "v_proj": (8, 16), "o_proj": (16, 16)}
"""(out, in) of the attention modules under TINY_CONFIG."""


def write_base(directory: Path) -> Path:
    """A base: config only, no weights."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(TINY_CONFIG))
    return directory


def write_adapter(directory: Path, seed: int = 0, rank: int = 4, **config: Any) -> Path:
    """A LoRA adapter in PEFT layout on q_proj and v_proj; `config` goes over adapter_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    tensors = {}
    for layer in range(TINY_CONFIG["num_hidden_layers"]):
        for module in ("q_proj", "v_proj"):
            out, inner = SHAPES[module]
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{prefix}.lora_A.weight"] = random.standard_normal((rank, inner)).astype(np.float32)
            tensors[f"{prefix}.lora_B.weight"] = random.standard_normal((out, rank)).astype(np.float32)
    save_file(tensors, directory / "adapter_model.safetensors")
    written = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
    written |= {"target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": "base"} | config
    (directory / "adapter_config.json").write_text(json.dumps(written))
    return directory


def write_full_model(directory: Path, seed: int = 0) -> Path:
    """Full weights of the same architecture, every tensor there."""
    random = np.random.default_rng(seed)
    write_base(directory)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (64, 16), "lm_head.weight": (64, 16)}
    shapes["model.norm.weight"] = (16,)
    for layer in range(TINY_CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{module}.weight": shape for module, shape in SHAPES.items()}
        shapes |= {f"{prefix}.mlp.{module}.weight": (32, 16) for module in ("gate_proj", "up_proj")}
        shapes |= {f"{prefix}.mlp.down_proj.weight": (16, 32), f"{prefix}.input_layernorm.weight": (16,)}
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (16,)
    tensors = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors")
    (directory / "tokenizer.json").write_text("{}")  # its being there is all that is looked at
    return directory
