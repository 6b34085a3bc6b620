"""An adapter of three layers written by hand: a linear one, a narrow one and an embedding."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from loradock_serve.packed_file import CHUNK_VALUES, CONFIG, WEIGHTS

Q, DOWN, EMBED = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.embed_tokens"


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """An adapter of three layers, with a tensor of several chunks and one of an odd size."""
    generator = torch.Generator().manual_seed(1)
    prefix = "base_model.model."
    shapes = {
        f"{prefix}{Q}.lora_A.weight": (8, CHUNK_VALUES // 8 + 3),
        f"{prefix}{Q}.lora_B.weight": (5, 8),
        f"{prefix}{DOWN}.lora_A.weight": (4, 64),
        f"{prefix}{DOWN}.lora_B.weight": (64, 4),
        f"{prefix}{EMBED}.lora_embedding_A": (8, 50),
        f"{prefix}{EMBED}.lora_embedding_B": (16, 8),
    }
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def adapter_at(directory: Path, saved: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    directory.mkdir()
    save_file(tensors() if saved is None else saved, directory / WEIGHTS)
    plain = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"], "peft_type": "LORA"}
    (directory / CONFIG).write_text(json.dumps(plain | config))
    return directory
