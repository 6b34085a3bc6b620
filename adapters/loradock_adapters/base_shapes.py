"""Module shapes derived from a config.json alone, for the families whose layout is known.

Letters: h hidden size, i intermediate size, v vocabulary, q and k the widths of all query and all key heads. Every pair
is (out_features, in_features). Checked in the tests against models that transformers builds from the same configs.
"""

from collections.abc import Mapping
from typing import Any

_LLAMA_LIKE = frozenset(
    {
        "llama", "mistral", "ministral3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "olmo2",
        "smollm3", "helium", "arcee", "exaone4", "cohere", "cohere2", "seed_oss", "olmo", "olmo3",
    }
)  # fmt: skip
_FUSED = frozenset({"phi3", "glm", "glm4"})
"""Families that keep gate and up in one matrix; phi3 also q, k and v."""
_UNGATED = frozenset({"arcee"})
_MAX_LAYERS = 1000

Shapes = dict[str, tuple[int, int]]


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config; multimodal configs nest it."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def derived_modules(config: Mapping[str, Any]) -> Shapes:
    """Module name -> (out, in) for a known family; empty where the family or one of its sizes is not known."""
    family = config.get("model_type")
    if not isinstance(family, str):
        return {}
    try:
        if family == "gpt2":
            return _gpt2(config)
        if family in _LLAMA_LIKE or family in _FUSED:
            return _llama(config, family)
    except _MissingSizeError:
        return {}
    return {}


def _llama(config: Mapping[str, Any], family: str) -> Shapes:
    h, i, v = _size(config, "hidden_size"), _size(config, "intermediate_size"), _size(config, "vocab_size")
    heads = _size(config, "num_attention_heads")
    head_width = _size(config, "head_dim", default=h // heads)
    q = heads * head_width
    k = _size(config, "num_key_value_heads", default=heads) * head_width
    attention: Shapes = {"q_proj": (q, h), "k_proj": (k, h), "v_proj": (k, h), "o_proj": (h, q)}
    mlp: Shapes = {"gate_proj": (i, h), "up_proj": (i, h), "down_proj": (h, i)}
    if family == "phi3":
        attention = {"qkv_proj": (q + 2 * k, h), "o_proj": (h, q)}
    if family in _FUSED:
        mlp = {"gate_up_proj": (2 * i, h), "down_proj": (h, i)}
    if family in _UNGATED:
        del mlp["gate_proj"]
    shapes: Shapes = {"model.embed_tokens": (v, h)}
    for layer in range(_layers(config, "num_hidden_layers")):
        shapes |= {f"model.layers.{layer}.self_attn.{name}": shape for name, shape in attention.items()}
        shapes |= {f"model.layers.{layer}.mlp.{name}": shape for name, shape in mlp.items()}
    shapes["lm_head"] = (v, h)
    return shapes


def _gpt2(config: Mapping[str, Any]) -> Shapes:
    h, v, positions = _size(config, "n_embd"), _size(config, "vocab_size"), _size(config, "n_positions")
    i = _size(config, "n_inner", default=4 * h)
    layer_shapes: Shapes = {
        "attn.c_attn": (3 * h, h),
        "attn.c_proj": (h, h),
        "mlp.c_fc": (i, h),
        "mlp.c_proj": (h, i),
    }
    shapes: Shapes = {"transformer.wte": (v, h), "transformer.wpe": (positions, h)}
    for layer in range(_layers(config, "n_layer")):
        shapes |= {f"transformer.h.{layer}.{name}": shape for name, shape in layer_shapes.items()}
    shapes["lm_head"] = (v, h)
    return shapes


class _MissingSizeError(Exception):
    """A size that the family's shapes hang on is missing or is no number."""


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None and default is not None:
        return default
    if type(value) is not int or value <= 0:
        raise _MissingSizeError(key)
    return value


def _layers(config: Mapping[str, Any], key: str) -> int:
    layers = _size(config, key)
    if layers > _MAX_LAYERS:
        raise _MissingSizeError(key)
    return layers
