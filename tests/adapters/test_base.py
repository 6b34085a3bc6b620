"""What is known of a base model: from its weights, and derived from its config."""

from pathlib import Path
from typing import Any

import pytest

from loradock_adapters.base import base_from, find_base
from loradock_adapters.base_shapes import derived_modules
from loradock_adapters.errors import BaseModelError, NotFoundError
from loradock_testing.checkpoints import GPT2, LLAMA, f32, safetensors_bytes, write_full, write_json, zeros


def test_base_from_config_alone_derives_shapes() -> None:
    base = base_from(LLAMA)
    assert not base.exact
    assert base.modules["model.layers.1.self_attn.k_proj"] == (8, 16)
    assert base.modules["model.layers.0.mlp.down_proj"] == (16, 24)
    assert base.modules["lm_head"] == (40, 16)
    assert (base.hidden_size, base.vocab_size, base.architectures) == (16, 40, ("LlamaForCausalLM",))
    assert base.embedding_modules == {"model.embed_tokens", "lm_head"}


def test_base_from_directory_without_weights_derives_shapes(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", LLAMA)
    assert base_from(tmp_path).modules == base_from(LLAMA).modules


@pytest.mark.parametrize("shards", [1, 3])
def test_base_from_weights_same_modules_as_derived(tmp_path: Path, shards: int) -> None:
    base = base_from(write_full(tmp_path, shards=shards))
    assert base.exact
    assert base.modules == base_from(LLAMA).modules
    assert base.has("model.norm")
    assert not base.has("model.layers.0.input_layernorm")


def test_base_from_weights_they_win_over_the_config(tmp_path: Path) -> None:
    write_json(write_full(tmp_path) / "config.json", {**LLAMA, "model_type": "unheard_of", "hidden_size": 99})
    assert base_from(tmp_path).modules["lm_head"] == (40, 16)


def test_base_from_quantised_weights_modules_are_the_configs(tmp_path: Path) -> None:
    config = {**LLAMA, "quantization_config": {"quant_method": "awq"}}
    write_json(tmp_path / "config.json", config)
    packed = {"model.embed_tokens.weight": f32(40, 16), "model.layers.0.self_attn.q_proj.qweight": zeros("I32", 16, 2)}
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(packed))
    assert base_from(tmp_path).modules == base_from(LLAMA).modules


def test_base_from_tied_weights_output_matrix_is_known(tmp_path: Path) -> None:
    base = base_from(write_full(tmp_path, {**LLAMA, "tie_word_embeddings": True}))
    assert base.tied
    assert base.modules["lm_head"] == base.modules["model.embed_tokens"] == (40, 16)


def test_base_from_unknown_family_without_weights_is_unknown() -> None:
    base = base_from({**LLAMA, "model_type": "unheard_of"})
    assert not base.known


@pytest.mark.parametrize(
    "change", [{"hidden_size": "16"}, {"hidden_size": 0}, {"num_hidden_layers": 10**9}, {"vocab_size": None}]
)
def test_base_from_insane_sizes_is_unknown(change: dict[str, Any]) -> None:
    assert not base_from({**LLAMA, **change}).known


def test_base_from_run_directory_stands_for_its_checkpoint(tmp_path: Path) -> None:
    write_full(tmp_path / "checkpoint")
    write_json(tmp_path / "run.json", {})
    assert base_from(tmp_path).exact


def test_base_from_missing_or_broken_config_says_so(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"config\.json"):
        base_from(tmp_path)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(BaseModelError, match="JSON"):
        base_from(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(BaseModelError, match="object"):
        base_from(tmp_path)


def test_base_from_broken_weights_says_so(tmp_path: Path) -> None:
    (write_full(tmp_path) / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(BaseModelError, match="cannot be read"):
        base_from(tmp_path)


def test_find_base_directory_or_cached_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--org--tiny"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("abc123")
    snapshot = write_full(model / "snapshots" / "abc123")
    assert find_base("org/tiny") == snapshot
    assert find_base(str(snapshot)) == snapshot
    for text in ("org/other", "../no-such-place", "org/tiny/x"):
        with pytest.raises(NotFoundError):
            find_base(text)


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "head_dim": 8},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
    "granite": {"num_key_value_heads": 2},
    "olmo2": {},
    "smollm3": {"num_key_value_heads": 2},
    "phi3": {"num_key_value_heads": 2},
    "glm": {"num_key_value_heads": 2, "head_dim": 8},
    "glm4": {"num_key_value_heads": 2, "head_dim": 8},
    "exaone4": {"num_key_value_heads": 2},
    "cohere": {},
    "cohere2": {},
    "arcee": {},
    "helium": {"head_dim": 4},
    "ministral3": {"head_dim": 8},
    "seed_oss": {"head_dim": 8},
    "olmo": {},
    "olmo3": {},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 40},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_derived_modules_are_those_that_transformers_builds(family: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 40,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = transformers.AutoConfig.for_model(family, **({} if family == "gpt2" else sizes), **FAMILIES[family])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    linear, embedding = torch.nn.Linear, torch.nn.Embedding
    built = {name: tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, linear | embedding)}
    conv = transformers.pytorch_utils.Conv1D
    built |= {name: tuple(m.weight.shape)[::-1] for name, m in model.named_modules() if isinstance(m, conv)}
    assert derived_modules(config.to_dict()) == built


def test_base_from_gpt2_saved_without_its_prefix_has_the_models_names(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", GPT2)
    tensors = {"wte.weight": f32(40, 16), "h.0.attn.c_attn.weight": f32(16, 48)}
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    assert base_from(tmp_path).modules["transformer.h.0.attn.c_attn"] == (48, 16)


def test_base_from_gpt2_transposed_matrices_turned(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", GPT2)
    tensors = {"transformer.wte.weight": f32(40, 16), "transformer.h.0.attn.c_attn.weight": f32(16, 48)}
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    modules = base_from(tmp_path).modules
    assert modules["transformer.h.0.attn.c_attn"] == (48, 16)
    assert modules["lm_head"] == (40, 16)
