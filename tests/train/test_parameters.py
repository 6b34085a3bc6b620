"""What is trained, and how much it is: published figures, on the real architectures, written as configs and
built without weights."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import nn
from transformers import Idefics2Config, Idefics2ForConditionalGeneration, LlamaConfig, LlamaForCausalLM

from loradock_train.config_sections import LoraOptions
from loradock_train.errors import ModelError
from loradock_train.model import add_adapter
from loradock_train.parameters import (
    count_by_module,
    count_parameters,
    low_rank,
    parameter_lines,
    parameter_report,
    select_trainable,
)

SEED_TARGETS = (
    "q_proj", "v_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head",
)  # fmt: skip
SEED_RULE = r"(text_model|connector).*proj"


def llama_3_8b() -> Any:
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    return model.to(torch.bfloat16)


def idefics2_8b() -> Any:
    """With the padding token that was added to its 32,003: every matrix of the published model, and no weights."""
    config = Idefics2Config(
        text_config={
            "model_type": "mistral", "vocab_size": 32_004, "hidden_size": 4096, "intermediate_size": 14_336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
            "max_position_embeddings": 32_768, "tie_word_embeddings": False,
        },
        vision_config={
            "hidden_size": 1152, "image_size": 980, "intermediate_size": 4304, "num_attention_heads": 16,
            "num_hidden_layers": 27, "patch_size": 14,
        },
        perceiver_config={
            "hidden_size": 4096, "resampler_n_latents": 64, "resampler_depth": 3, "resampler_n_heads": 16,
            "resampler_head_dim": 96, "num_key_value_heads": 4,
        },
        tie_word_embeddings=False,
        image_token_id=32_001,
    )  # fmt: skip
    with torch.device("meta"):
        return Idefics2ForConditionalGeneration(config)  # type: ignore[no-untyped-call]


def tiny() -> Any:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    return LlamaForCausalLM(config)  # type: ignore[no-untyped-call]


# ---- the arithmetic of the documents --------------------------------------------------------------------------------


def test_selective_rule_trains_the_share_of_idefics2_that_was_published() -> None:
    model = idefics2_8b()
    select_trainable(model, [SEED_RULE])
    count = count_parameters(model)
    assert (count.trainable, count.total) == (7_722_237_952, 8_402_776_304)
    assert f"{count.share:.3%}" == "91.901%"
    modules = {row.name: row for row in count_by_module(model)}
    assert {name for name, row in modules.items() if row.trainable} == {
        "model.connector.modality_projection", "model.connector.perceiver_resampler", "model.text_model.layers",
    }  # fmt: skip
    assert sum(row.total for row in modules.values()) == count.total
    assert sum(row.trainable for row in modules.values()) == count.trainable
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {"lm_head.weight", "model.text_model.embed_tokens.weight"} <= frozen
    assert all(("proj" not in name) or "vision_model" in name for name in frozen)


def test_low_rank_rule_trains_the_share_of_idefics2_that_was_published() -> None:
    options = LoraConfig(
        r=8, lora_alpha=64, use_rslora=True, lora_dropout=0.1, init_lora_weights="gaussian", task_type="CAUSAL_LM",
        target_modules=r".*(text_model|connector).*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)$",
    )  # fmt: skip
    count = count_parameters(get_peft_model(idefics2_8b(), options))
    assert (count.trainable, count.total) == (23_326_720, 8_426_103_024)
    assert f"{count.share:.4%}" == "0.2768%"


def test_adapter_of_an_8b_llama_has_46_mb_and_2_gb_with_the_base_matrices_that_are_left_out() -> None:
    adapted = add_adapter(llama_3_8b(), LoraOptions(r=8, lora_alpha=16, target_modules=SEED_TARGETS))
    assert count_parameters(adapted).trainable == 23_089_152

    ours = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    assert sum(tensor.numel() for tensor in ours.values()) == 23_089_152
    assert not [name for name in ours if "base_layer" in name]
    assert sum(tensor.numel() for tensor in ours.values()) * 2 == 46_178_304, "bytes in bf16"

    theirs = get_peft_model_state_dict(adapted, save_embedding_layers=True)
    assert sum(tensor.nbytes for tensor in theirs.values()) == 4 * 23_089_152 + 2 * 2 * 128_256 * 4096 == 2_193_702_912


def test_low_rank_of_a_matrix_of_10_000_is_400() -> None:
    """The textbook's case: W of 100 x 100, and A and B of rank 2."""
    model = nn.Sequential(nn.Linear(100, 100, bias=False))
    assert low_rank(model) is None
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))
    found = low_rank(adapted)
    assert found is not None
    assert (found.matrices, found.full, found.low) == (1, 10_000, 400)
    assert parameter_lines(adapted)[-1] == (
        "  low rank: 1 matrix W of 10,000 numbers, adapted by A and B of 400 (4.000%)"
    )


# ---- choosing --------------------------------------------------------------------------------------------------------


def test_patterns_are_searched_and_one_that_is_found_is_enough() -> None:
    model = tiny()
    select_trainable(model, [r"layers\.1\.", "lm_head"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "layers.1." in name or "lm_head" in name}
    select_trainable(model, ["norm"])
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if "norm" in name
    }


def test_pattern_that_finds_nothing_is_refused_with_the_parts_of_names() -> None:
    with pytest.raises(ModelError, match=r"trainable: no parameter of this model has 'atention' in its name; .*q_proj"):
        select_trainable(tiny(), ["norm", "atention"])


# ---- telling ---------------------------------------------------------------------------------------------------------


def test_table_names_modules_with_their_shares() -> None:
    lines = parameter_lines(add_adapter(tiny(), LoraOptions(r=2, target_modules=("q_proj", "embed_tokens"))))
    assert [line.split()[0] for line in lines] == [
        "module", "model.embed_tokens", "model.layers.*.self_attn.q_proj", "model.layers.*.self_attn.k_proj",
        "model.layers.*.self_attn.v_proj", "model.layers.*.self_attn.o_proj", "model.layers.*.mlp.gate_proj",
        "model.layers.*.mlp.up_proj", "model.layers.*.mlp.down_proj", "model.layers.*.input_layernorm",
        "model.layers.*.post_attention_layernorm", "model.norm", "lm_head", "low",
    ]  # fmt: skip
    assert lines[1].split()[1:] == ["192", "2,240", "8.571%"], "2 x (64 + 32), beside the matrix of 64 x 32"
    assert lines[2].split()[1:] == ["256", "2,304", "11.111%"]
    assert lines[-1] == "  low rank: 3 matrices W of 4,096 numbers, adapted by A and B of 448 (10.938%)"


def test_table_is_left_out_where_everything_is_trained() -> None:
    model = tiny()
    assert parameter_lines(model) == []
    report = parameter_report(model)
    assert report["share"] == 1.0
    assert report["low_rank"] is None
    assert sum(row["total"] for row in report["modules"]) == report["total"]


def test_table_stays_short() -> None:
    model = tiny()
    assert [row.name for row in count_by_module(model, max_rows=4)] == [
        "model.embed_tokens", "model.layers", "model.norm", "lm_head",
    ]  # fmt: skip
