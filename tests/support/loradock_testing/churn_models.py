"""Hundreds of LoRA adapters in a few seconds: random, strong, in PEFT layout, written without PEFT.

`tiny_models.make_adapter` builds a whole PEFT model for each adapter, a third of a second; a thousand of them need
another way. The values follow the same rule (updates about as large as the base's own weights), so greedy answers of
two adapters differ almost always. That PEFT reads these files as meant is tested in `test_churn_truth.py`.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from transformers import LlamaConfig

from loradock_testing.tiny_models import ALL_MODULES, ATTENTION_MODULES, LINEAR_MODULES, SPECIAL_TOKENS

Floats = npt.NDArray[np.float32]

SHAPES: tuple[tuple[int, Sequence[str]], ...] = (
    (8, LINEAR_MODULES),
    (4, LINEAR_MODULES),
    (16, ATTENTION_MODULES),
    (12, ALL_MODULES),
    (2, LINEAR_MODULES),
    (8, ("q_proj", "v_proj")),
    (16, LINEAR_MODULES),
    (5, ("gate_proj", "up_proj", "down_proj")),
    (8, ("o_proj", "down_proj", "lm_head")),
    (3, ("v_proj", "embed_tokens")),
)
"""(rank, target modules); most ranks are below the engine's `max_lora_rank`, and not all are even."""
MAX_RANK = 16


@dataclass(frozen=True)
class _Module:
    """One matrix of the base that an adapter may change: W (out, in), or an embedding (vocabulary, hidden)."""

    name: str
    rows: int
    columns: int

    @property
    def is_embedding(self) -> bool:
        return self.name.endswith("embed_tokens")


def write_adapters(directory: Path, base_dir: Path, seeds: Sequence[int]) -> list[Path]:
    """One adapter directory for each seed, of the shapes in turn; a seed is an adapter, whatever else is made."""
    config = LlamaConfig.from_pretrained(base_dir)
    return [_write(directory / f"{seed:05d}", config, seed) for seed in seeds]


def _write(directory: Path, config: LlamaConfig, seed: int) -> Path:
    rank, targets = SHAPES[seed % len(SHAPES)]
    random = np.random.default_rng(seed)
    alpha = rank * (1 + seed % 2)  # scalings of 1 and 2
    tensors: dict[str, Floats] = {}
    for module in _modules(config, targets):
        tensors |= _pair(module, rank, alpha / rank, config.initializer_range, random)
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    written = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "bias": "none"}
    written |= {"target_modules": list(targets), "base_model_name_or_path": "base", "inference_mode": True}
    (directory / "adapter_config.json").write_text(json.dumps(written))
    return directory


def _modules(config: LlamaConfig, targets: Sequence[str]) -> Iterator[_Module]:
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    assert None not in (hidden, inner, vocab)
    kv = hidden // config.num_attention_heads * (config.num_key_value_heads or 0)
    sizes = {"q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, hidden)}
    sizes |= {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    for layer in range(config.num_hidden_layers):
        for target in targets:
            if target in sizes:
                part = "self_attn" if target in ATTENTION_MODULES else "mlp"
                yield _Module(f"model.layers.{layer}.{part}.{target}", *sizes[target])
    for name, target in (("model.embed_tokens", "embed_tokens"), ("lm_head", "lm_head")):
        if target in targets:
            yield _Module(name, vocab, hidden)


def _pair(module: _Module, rank: int, scaling: float, spread: float, random: np.random.Generator) -> dict[str, Floats]:
    """A and B under PEFT's names, such that scaling * B A has about the spread of the base's own weights."""
    size = spread / (scaling * rank**0.5)
    name = f"base_model.model.{module.name}"
    if module.is_embedding:
        a, b = _normal(random, 1, (rank, module.rows)), _normal(random, size, (module.columns, rank))
        return {f"{name}.lora_embedding_A": a, f"{name}.lora_embedding_B": b}
    a, b = _normal(random, 1, (rank, module.columns)), _normal(random, size, (module.rows, rank))
    if module.name == "lm_head":
        b[: len(SPECIAL_TOKENS)] *= 0.05  # the base's head keeps special tokens out of answers, and so do we
    return {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}


def _normal(random: np.random.Generator, size: float, shape: tuple[int, int]) -> Floats:
    return (random.standard_normal(shape, dtype=np.float32) * np.float32(size)).astype(np.float32)
