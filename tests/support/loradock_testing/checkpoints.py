"""Checkpoints and bases of a few kilobytes, written byte by byte: no torch, and every fault on demand."""

import json
import math
import random
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loradock_adapters.base_shapes import derived_modules
from loradock_adapters.safetensors_header import DTYPE_BITS

Tensor = tuple[str, tuple[int, ...], bytes]
"""dtype, shape, bytes"""

PREFIX = "base_model.model."

LLAMA: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 40,
    "tie_word_embeddings": False,
}
GPT2: Mapping[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_embd": 16,
    "n_layer": 2,
    "n_positions": 32,
    "vocab_size": 40,
    "tie_word_embeddings": True,
}
TARGETS = ("q_proj", "v_proj")


def f32(*shape: int, value: float | None = None, seed: int = 0) -> Tensor:
    """A float32 tensor: of one value, or of small random ones."""
    count = math.prod(shape)
    source = random.Random(seed)
    values = [value] * count if value is not None else [source.uniform(-0.1, 0.1) for _ in range(count)]
    return "F32", shape, struct.pack(f"<{count}f", *values)


def zeros(dtype: str, *shape: int) -> Tensor:
    return dtype, shape, bytes(math.prod(shape) * DTYPE_BITS[dtype] // 8)


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata is not None else {}
    position = 0
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + len(raw)]}
        position += len(raw)
    return with_header(json.dumps(header).encode(), b"".join(raw for _, _, raw in tensors.values()))


def with_header(header: bytes, data: bytes = b"") -> bytes:
    """A safetensors file with exactly this header, right or wrong."""
    return struct.pack("<Q", len(header)) + header + data


def write_json(path: Path, document: object) -> None:
    path.write_text(json.dumps(document), encoding="utf-8")


def lora_tensors(
    config: Mapping[str, Any] = LLAMA, rank: int = 4, targets: tuple[str, ...] = TARGETS, seed: int = 0
) -> dict[str, Tensor]:
    """The tensors that PEFT saves for an adapter of this rank on these targets."""
    tensors: dict[str, Tensor] = {}
    for module, (out_features, in_features) in derived_modules(config).items():
        name = module.rpartition(".")[2]
        if name not in targets:
            continue
        if name in ("embed_tokens", "wte"):
            tensors[f"{PREFIX}{module}.lora_embedding_A"] = f32(rank, out_features, seed=seed)
            tensors[f"{PREFIX}{module}.lora_embedding_B"] = f32(in_features, rank, seed=seed + 1)
        else:
            tensors[f"{PREFIX}{module}.lora_A.weight"] = f32(rank, in_features, seed=seed)
            tensors[f"{PREFIX}{module}.lora_B.weight"] = f32(out_features, rank, seed=seed + 1)
    return tensors


def dora_magnitudes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The magnitude vectors that DoRA has beside these factors, under the name that PEFT saves them by."""
    ends = (".lora_B.weight", ".lora_embedding_B")
    modules = [name.removesuffix(end) for name in tensors for end in ends if name.endswith(end)]
    return {f"{module}.lora_magnitude_vector": f32(16) for module in modules}


def lora_config(rank: int = 4, targets: tuple[str, ...] = TARGETS, **settings: Any) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(targets),
        "bias": "none",
        "base_model_name_or_path": "somewhere/base",
        **settings,
    }


def write_adapter(
    directory: Path,
    tensors: Mapping[str, Tensor] | None = None,
    *,
    rank: int = 4,
    targets: tuple[str, ...] = TARGETS,
    seed: int = 0,
    **settings: Any,
) -> Path:
    """An adapter for the LLAMA base; `tensors` stand in for the right ones, `settings` go into its config."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "adapter_config.json", lora_config(rank, targets, **settings))
    chosen = tensors if tensors is not None else lora_tensors(rank=rank, targets=targets, seed=seed)
    if tensors is None and settings.get("use_dora"):
        chosen = {**chosen, **dora_magnitudes(chosen)}
    (directory / "adapter_model.safetensors").write_bytes(safetensors_bytes(chosen))
    return directory


def full_tensors(config: Mapping[str, Any] = LLAMA) -> dict[str, Tensor]:
    """All matrices that a config asks for, and one norm."""
    tensors = {f"{module}.weight": f32(*shape) for module, shape in derived_modules(config).items()}
    if config.get("tie_word_embeddings"):
        del tensors["lm_head.weight"]
    tensors["model.norm.weight"] = f32(16, value=1.0)
    return tensors


def write_full(directory: Path, config: Mapping[str, Any] = LLAMA, shards: int = 1) -> Path:
    """A full model with a tokenizer, in one file or in several with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", config)
    write_json(directory / "tokenizer.json", {"version": "1.0"})
    tensors = full_tensors(config)
    if shards == 1:
        (directory / "model.safetensors").write_bytes(safetensors_bytes(tensors))
        return directory
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        weight_map |= dict.fromkeys(part, file)
        (directory / file).write_bytes(safetensors_bytes(part))
    write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return directory
