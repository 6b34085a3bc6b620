"""Models, adapters and types: what is made, and what is refused with a reason."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from loradock_train.config import TrainConfig
from loradock_train.config_sections import LoraOptions
from loradock_train.errors import ModelError
from loradock_train.model import (
    add_adapter,
    architecture_config,
    base_config,
    base_directory,
    check_base,
    check_machine,
    count_parameters,
    decide_precision,
    has_fast_bf16,
    load_model,
)


class _Vocabulary:
    bos_token_id, eos_token_id, pad_token_id = None, 0, 1

    def __len__(self) -> int:
        return 400


def config(**values: Any) -> TrainConfig:
    return TrainConfig.model_validate({"model_id": "a/b", "train_path": "x", **values})


def tiny(**options: Any) -> Any:
    made = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, **options
    )
    return LlamaForCausalLM(made)  # type: ignore[no-untyped-call]


def architecture(**fields: Any) -> Any:
    return architecture_config(dict(fields), _Vocabulary(), context_length=64)


# ---- architecture --------------------------------------------------------------------------------------------------


def test_architecture_takes_vocabulary_and_special_tokens_from_the_tokenizer() -> None:
    made = architecture(model_type="llama", hidden_size=32, num_attention_heads=2)
    assert (made.vocab_size, made.eos_token_id, made.pad_token_id, made.bos_token_id) == (400, 0, 1, None)


def test_architecture_of_another_family_uses_its_own_names() -> None:
    made = architecture(model_type="gpt2", n_embd=32, n_layer=2, n_head=2, n_positions=128)
    assert (made.n_embd, made.num_hidden_layers) == (32, 2)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"model_type": "lama"},
            "model.model_type: 'lama' is no causal language model of transformers; did you mean llama",
        ),
        ({}, "model.model_type: None is no causal language model"),
        (
            {"model_type": "llama", "hidden_sise": 32},
            "model.hidden_sise: unknown field of llama; did you mean hidden_size?",
        ),
        ({"model_type": "llama", "vocab_size": 100}, "model.vocab_size: 100 is less than the tokenizer's 400 entries"),
        (
            {"model_type": "llama", "max_position_embeddings": 32},
            "context_length 64 is over the model's max_position_embeddings 32",
        ),
        (
            {"model_type": "llama", "hidden_size": 33, "num_attention_heads": 2},
            "model: transformers refuses this llama",
        ),
    ],
)
def test_architecture_that_cannot_be_is_refused(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(ModelError) as caught:
        architecture(**fields)
    assert expected in str(caught.value)


# ---- loading -------------------------------------------------------------------------------------------------------


def test_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model could be loaded"):
        base_config(config(model_id=str(tmp_path)))


def test_weights_that_are_not_there_are_named(base: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    chosen = config(model_id=str(tmp_path))
    with pytest.raises(ModelError, match="no model could be loaded"):
        load_model(chosen, decide_precision(chosen, torch.float32))


def test_base_whose_embedding_is_smaller_than_its_tokenizer_is_refused(base: Path) -> None:
    architecture_of_base = base_config(config(model_id=str(base)))
    with pytest.raises(ModelError, match="the tokenizer has 600 entries, but the model's embedding only 512 rows"):
        check_base(architecture_of_base, 600, 64)
    with pytest.raises(ModelError, match="context_length 1024 is over the model's max_position_embeddings 512"):
        check_base(architecture_of_base, 512, 1024)
    check_base(architecture_of_base, 512, 512)


def test_base_that_wants_to_run_its_own_code_is_refused_without_a_question(base: Path, tmp_path: Path) -> None:
    described = json.loads((base / "config.json").read_text())
    described.update(model_type="home_made", auto_map={"AutoConfig": "code.HomeMade"})
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ModelError, match="no model could be loaded"):
        base_config(config(model_id=str(tmp_path)))


def test_weights_of_a_hub_model_are_those_of_its_snapshot(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert base_directory(str(base)) == base
    monkeypatch.setattr("loradock_train.model.cached_file", lambda *_, **__: str(base / "config.json"))
    assert base_directory("org/model") == base
    monkeypatch.setattr("loradock_train.model.cached_file", lambda *_, **__: str(tmp_path / "config.json"))
    assert base_directory("org/model") is None, "no safetensors: no hash, and no crash after the training"
    monkeypatch.setattr("loradock_train.model.cached_file", lambda *_, **__: None)
    assert base_directory("org/model") is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"mixed_precision": "fp16"}, "mixed_precision: fp16 needs a GPU"),
        ({"optim": "adamw_8bit"}, "optim: adamw_8bit needs bitsandbytes, which is not installed"),
        ({"attn_implementation": "flash_attention_2"}, "attn_implementation: flash_attention_2 needs flash-attn"),
    ],
)
def test_what_this_machine_cannot_do_is_refused_first(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, str], expected: str
) -> None:
    monkeypatch.setattr("loradock_train.model.torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("loradock_train.model.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=expected):
        check_machine(config(**values))


# ---- types ---------------------------------------------------------------------------------------------------------


def test_trained_weights_are_float32_and_frozen_ones_stay_as_they_are() -> None:
    full = decide_precision(config(), torch.bfloat16)
    lora = decide_precision(config(lora_config={}), torch.bfloat16)
    assert (full.weights, full.saved) == (torch.float32, torch.bfloat16)
    assert (lora.weights, lora.saved) == (torch.bfloat16, torch.bfloat16)


def test_types_given_are_kept() -> None:
    chosen = decide_precision(config(dtype="bfloat16", mixed_precision="no", save_dtype="float16"), torch.float32)
    assert (chosen.weights, chosen.arithmetic, chosen.saved) == (torch.bfloat16, "no", torch.float16)


def test_mixed_precision_is_used_where_the_machine_is_quick_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loradock_train.model.has_fast_bf16", lambda: False)
    assert decide_precision(config(), torch.float32).arithmetic == "no"
    monkeypatch.setattr("loradock_train.model.has_fast_bf16", lambda: True)
    assert decide_precision(config(), torch.float32).arithmetic == "bf16"


def test_gpu_that_only_emulates_bf16_is_not_quick_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not has_fast_bf16()
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: True)
    assert has_fast_bf16()


# ---- adapters ------------------------------------------------------------------------------------------------------


def test_parameter_count_is_the_arithmetic_of_low_rank() -> None:
    """The textbook's case: W of 10,000, and A and B of rank 2 with 400 together."""
    model = nn.Sequential(nn.Linear(100, 100, bias=False))
    model[0].weight.requires_grad = False
    a, b = nn.Linear(100, 2, bias=False), nn.Linear(2, 100, bias=False)
    count = count_parameters(nn.ModuleList([model, a, b]))
    assert (count.trainable, count.total - count.trainable) == (400, 10_000)
    assert count.share == pytest.approx(400 / 10_400)


def test_adapter_trains_its_matrices_only() -> None:
    adapted = add_adapter(tiny(), LoraOptions(r=2, target_modules=("q_proj", "embed_tokens", "lm_head")))
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert count_parameters(adapted).trainable == 2 * (32 + 32) + 2 * (64 + 32) * 2


def test_all_linear_leaves_the_head_out() -> None:
    adapted = add_adapter(tiny(), LoraOptions())
    names = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name, p in adapted.named_parameters() if p.requires_grad}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_target_that_the_model_lacks_is_refused_with_those_it_has() -> None:
    with pytest.raises(ModelError, match=r"no module 'query' in this model; it has down_proj, embed_tokens, gate_proj"):
        add_adapter(tiny(), LoraOptions(target_modules=("q_proj", "query")))


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_adapter_on_a_tied_embedding_is_refused(target: str) -> None:
    with pytest.raises(ModelError, match="one tied matrix"):
        add_adapter(tiny(tie_word_embeddings=True), LoraOptions(target_modules=("q_proj", target)))
