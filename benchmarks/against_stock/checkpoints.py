"""A base, its tokenizer and its adapters, made on the spot: random and seeded, in the layouts of transformers and PEFT.

How fast an engine is depends on shapes, not on what the weights say. The adapters are strong enough, though, that each
answers differently from the base: an adapter that is silently not applied shows in the answers.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
STRENGTH = 0.3
"""Spread of an adapter's update, in spreads of the base's own weights."""


@dataclass(frozen=True)
class Shape:
    """A Llama and the adapters on all its linear layers."""

    name: str
    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab_size: int
    rank: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each linear module of a layer."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    @property
    def adapter_bytes(self) -> int:
        """Weights of one adapter in float32, which is what PEFT writes."""
        return 4 * self.layers * self.rank * sum(out + inner for out, inner in self.linears.values())


SMALL = Shape("small", hidden=256, layers=4, intermediate=704, heads=4, kv_heads=4, vocab_size=2048, rank=8)
WIDE = Shape("wide", hidden=1024, layers=8, intermediate=2816, heads=16, kv_heads=16, vocab_size=2048, rank=64)
"""Its adapters are 38.5 MiB each."""


def make_base(directory: Path, shape: Shape, seed: int = 0) -> Path:
    """Save a random Llama in float32 with its tokenizer; returns the directory."""
    vocabulary = _make_tokenizer(directory, shape.vocab_size)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        # Wide enough that every layer matters and the logits spread over several units.
        initializer_range=_spread(shape),
        dtype=torch.float32,
    )
    disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(directory)  # type: ignore[no-untyped-call]
    return directory


def make_adapters(directory: Path, shape: Shape, names: list[str]) -> dict[str, Path]:
    """Save an adapter for each name, each with a seed of its own; returns their directories by name."""
    made = {}
    for seed, name in enumerate(names, start=1):
        made[name] = directory / name
        made[name].mkdir(parents=True)
        save_file(dict(_adapter_tensors(shape, seed)), made[name] / "adapter_model.safetensors")
        (made[name] / "adapter_config.json").write_text(json.dumps(_adapter_config(shape)))
    return made


def _adapter_config(shape: Shape) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": shape.rank,
        "lora_alpha": 2 * shape.rank,
        "bias": "none",
        "target_modules": [module.partition(".")[2] for module in shape.linears],
    }


def _adapter_tensors(
    shape: Shape, seed: int
) -> Iterator[tuple[str, "np.ndarray[tuple[int, int], np.dtype[np.float32]]"]]:
    random = np.random.default_rng(seed)
    b_spread = np.float32(STRENGTH * _spread(shape) / (2 * shape.rank**0.5))  # the scaling is 2
    for layer in range(shape.layers):
        for module, (out, inner) in shape.linears.items():
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            yield f"{prefix}.lora_A.weight", random.standard_normal((shape.rank, inner), dtype=np.float32)
            yield f"{prefix}.lora_B.weight", b_spread * random.standard_normal((out, shape.rank), dtype=np.float32)


def _spread(shape: Shape) -> float:
    return float(1.5 * shape.hidden**-0.5)


def _make_tokenizer(directory: Path, vocab_size: int) -> int:
    """Train a BPE on a source file of the standard library and save it; returns the size of its vocabulary."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False)
    text = Path(argparse.__file__).read_text(encoding="utf-8").encode("ascii", "ignore").decode()
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    fast: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=2048
    )
    directory.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(directory)
    return len(fast)
