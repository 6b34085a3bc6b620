"""The gate on adapters: what is shared, what needs an engine of its own, what is refused, and every reason at once."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from loradock_adapters.base import base_from
from loradock_adapters.checkpoint import read_checkpoint
from loradock_adapters.gate import EngineLimits, Verdict, judge
from loradock_adapters.passport import Passport, PassportBase, write_passport
from loradock_testing.checkpoints import (
    GPT2,
    LLAMA,
    PREFIX,
    Tensor,
    dora_magnitudes,
    f32,
    lora_tensors,
    safetensors_bytes,
    write_adapter,
    write_json,
    zeros,
)
from loradock_testing.verdicts import BASE, Q0, codes, verdict_of, with_tensors

ALL_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head")


@pytest.mark.parametrize("rank", [1, 3, 12, 64])
def test_plain_adapter_of_any_rank_up_to_the_limit_is_shared(tmp_path: Path, rank: int) -> None:
    verdict = verdict_of(write_adapter(tmp_path, rank=rank))
    assert verdict == Verdict("lora", "shared", (), rank)


def test_adapter_on_the_seeds_whole_list_is_shared(tmp_path: Path) -> None:
    assert verdict_of(write_adapter(tmp_path, targets=ALL_TARGETS)) == Verdict("lora", "shared", (), 4)


def test_adapter_with_rank_pattern_its_largest_rank_counts(tmp_path: Path) -> None:
    tensors = with_tensors({f"{PREFIX}{Q0}.lora_A.weight": f32(80, 16), f"{PREFIX}{Q0}.lora_B.weight": f32(16, 80)})
    write_adapter(tmp_path, tensors, rank_pattern={"layers.0.self_attn.q_proj": 80})
    assert verdict_of(tmp_path, max_lora_rank=128) == Verdict("lora", "shared", (), 80)
    dedicated = verdict_of(tmp_path, max_lora_rank=64)
    assert (dedicated.placement, codes(dedicated), dedicated.rank) == ("dedicated", ["rank_over_limit"], 80)


def test_over_rank_is_dedicated_and_names_both_numbers_and_the_setting(tmp_path: Path) -> None:
    verdict = verdict_of(write_adapter(tmp_path, rank=65))
    assert verdict.placement == "dedicated"
    assert verdict.reasons[0].message == "rank 65 is over the engine's max_lora_rank 64"
    assert verdict.reasons[0].fix == "serve with engine.max_lora_rank: 128"


def test_rank_over_every_ladder_step_is_dedicated(tmp_path: Path) -> None:
    verdict = verdict_of(write_adapter(tmp_path, rank=513), max_lora_rank=512)
    assert verdict.placement == "dedicated"
    assert "512 is the last" in verdict.reasons[0].fix


STRANGE_KEYS = {
    "no_base_model": "model.layers.9.self_attn.q_proj",
    "layer_beyond": "model.layers.2.self_attn.q_proj",
    "prefix_missing": "layers.0.self_attn.q_proj",
    "prefix_doubled": "model.model.layers.0.self_attn.q_proj",
    "peft_prefix_doubled": "base_model.model.model.layers.0.self_attn.q_proj",
    "multimodal_prefix": "model.language_model.layers.0.self_attn.q_proj",
    "other_family": "transformer.h.0.attn.c_attn",
    "norm": "model.norm",
    "case": "model.layers.0.self_attn.Q_proj",
}


@pytest.mark.parametrize("module", STRANGE_KEYS.values(), ids=STRANGE_KEYS.keys())
def test_tensor_for_a_module_that_the_base_lacks_is_rejected(tmp_path: Path, module: str) -> None:
    pair = {f"{PREFIX}{module}.lora_A.weight": f32(4, 16), f"{PREFIX}{module}.lora_B.weight": f32(16, 4)}
    verdict = verdict_of(write_adapter(tmp_path, with_tensors(pair)))
    beyond = re.match(r"model\.layers\.[29]\.", module)
    assert (verdict.placement, codes(verdict)) == (
        "rejected",
        ["layer_beyond_base" if beyond else "module_not_in_base"],
    )
    assert verdict.reasons[0].where == module


def test_wrong_prefix_everywhere_is_one_problem_that_says_what_the_base_calls_it(tmp_path: Path) -> None:
    wrong = {
        name.replace("model.layers", "model.language_model.layers"): tensor for name, tensor in lora_tensors().items()
    }
    verdict = verdict_of(write_adapter(tmp_path, wrong))
    assert (verdict.placement, codes(verdict)[0]) == ("rejected", "module_not_in_base")
    assert f"it calls it {Q0}" in verdict.reasons[0].message
    assert "3 more" in verdict.reasons[0].message


def test_keys_without_the_peft_prefix_land_where_the_engine_puts_them(tmp_path: Path) -> None:
    bare = {name.removeprefix(PREFIX): tensor for name, tensor in lora_tensors().items()}
    assert verdict_of(write_adapter(tmp_path, bare)).placement == "shared"


def test_same_factor_with_and_without_prefix_is_rejected(tmp_path: Path) -> None:
    tensors = with_tensors({f"{Q0}.lora_A.weight": f32(4, 16)})
    assert codes(verdict_of(write_adapter(tmp_path, tensors))) == ["tensor_twice"]


BAD_TENSORS: dict[str, tuple[dict[str, Tensor | None], list[str]]] = {
    "a_without_b": ({f"{PREFIX}{Q0}.lora_B.weight": None}, ["factor_missing"]),
    "b_without_a": ({f"{PREFIX}{Q0}.lora_A.weight": None}, ["factor_missing"]),
    "a_of_another_base": ({f"{PREFIX}{Q0}.lora_A.weight": f32(4, 32)}, ["shape_mismatch"]),
    "b_of_another_base": ({f"{PREFIX}{Q0}.lora_B.weight": f32(32, 4)}, ["shape_mismatch"]),
    "a_rank": ({f"{PREFIX}{Q0}.lora_A.weight": f32(8, 16)}, ["rank_mismatch"]),
    "three_dimensions": ({f"{PREFIX}{Q0}.lora_A.weight": f32(4, 16, 1)}, ["shape_mismatch"]),
    "vector": ({f"{PREFIX}{Q0}.lora_A.weight": f32(64)}, ["shape_mismatch"]),
    "integers": ({f"{PREFIX}{Q0}.lora_A.weight": zeros("I8", 4, 16)}, ["adapter_dtype"]),
    "float8": ({f"{PREFIX}{Q0}.lora_A.weight": zeros("F8_E4M3", 4, 16)}, ["adapter_dtype"]),
    "unsaved_adapter_name": ({f"{PREFIX}{Q0}.lora_A.default.weight": f32(4, 16)}, ["unsupported_tensor"]),
    "unknown_parameter": ({f"{PREFIX}{Q0}.lora_C.weight": f32(4, 16)}, ["unsupported_tensor"]),
    "no_module": ({"weight": f32(4)}, ["unsupported_tensor"]),
    "linear_base_layer": ({f"{PREFIX}{Q0}.base_layer.weight": f32(16, 16)}, ["unsupported_tensor"]),
    "embedding_factors_on_a_linear_layer": (
        {f"{PREFIX}{Q0}.lora_embedding_A": f32(4, 16), f"{PREFIX}{Q0}.lora_embedding_B": f32(16, 4)},
        ["factor_kind"],
    ),
    "linear_factors_on_the_embedding": (
        {
            f"{PREFIX}model.embed_tokens.lora_A.weight": f32(4, 16),
            f"{PREFIX}model.embed_tokens.lora_B.weight": f32(40, 4),
        },
        ["factor_kind"],
    ),
    "embedding_of_another_vocabulary": (
        {
            f"{PREFIX}model.embed_tokens.lora_embedding_A": f32(4, 41),
            f"{PREFIX}model.embed_tokens.lora_embedding_B": f32(16, 4),
        },
        ["vocab_mismatch"],
    ),
    "resized_base_matrix": ({f"{PREFIX}model.embed_tokens.base_layer.weight": f32(48, 16)}, ["vocab_mismatch"]),
}


@pytest.mark.parametrize(("changes", "expected"), BAD_TENSORS.values(), ids=BAD_TENSORS.keys())
def test_tensor_that_does_not_fit_is_rejected(
    tmp_path: Path, changes: dict[str, Tensor | None], expected: list[str]
) -> None:
    verdict = verdict_of(write_adapter(tmp_path, with_tensors(changes)))
    refused = [
        code for code in codes(verdict) if code not in ("base_matrix_inside", "full_tensor", "tensor_not_targeted")
    ]
    assert (verdict.placement, refused) == ("rejected", expected)


DEDICATED_TENSORS: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "magnitude": ({f"{PREFIX}{Q0}.lora_magnitude_vector": f32(16)}, "dora"),
    "lora_bias": ({f"{PREFIX}{Q0}.lora_B.bias": f32(16)}, "lora_bias"),
    "bias": ({f"{PREFIX}{Q0}.bias": f32(16)}, "trained_bias"),
    "full_matrix": ({f"{PREFIX}lm_head.weight": f32(40, 16)}, "full_tensor"),
    "full_norm": ({f"{PREFIX}model.norm.weight": f32(16)}, "full_tensor"),
    "token_rows": (
        {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": f32(2, 16)},
        "trainable_tokens",
    ),
}


@pytest.mark.parametrize(("changes", "code"), DEDICATED_TENSORS.values(), ids=DEDICATED_TENSORS.keys())
def test_tensor_that_cannot_be_swapped_is_dedicated_even_where_the_config_is_silent(
    tmp_path: Path, changes: dict[str, Tensor | None], code: str
) -> None:
    verdict = verdict_of(write_adapter(tmp_path, with_tensors(changes)))
    assert (verdict.placement, codes(verdict)) == ("dedicated", [code])


@pytest.mark.parametrize("kept", [0, 1])
def test_dora_without_all_its_magnitudes_is_rejected(tmp_path: Path, kept: int) -> None:
    factors = lora_tensors()
    magnitudes = dora_magnitudes(factors)
    some = dict(list(magnitudes.items())[:kept])
    verdict = verdict_of(write_adapter(tmp_path, {**factors, **some}, use_dora=True))
    assert (verdict.placement, codes(verdict)) == ("rejected", ["dora_magnitude_missing", "dora"])
    more = len(magnitudes) - kept - 1
    assert verdict.reasons[0].message.endswith(f"is missing (and {more} more like it)")
    assert "set use_dora to false" in verdict.reasons[0].fix
    whole = verdict_of(write_adapter(tmp_path, {**factors, **magnitudes}, use_dora=True))
    assert (whole.placement, codes(whole)) == ("dedicated", ["dora"])


def test_base_matrices_beside_embedding_factors_are_remarked_not_refused(tmp_path: Path) -> None:
    targets = ("q_proj", "embed_tokens", "lm_head")
    bases: dict[str, Tensor | None] = {
        f"{PREFIX}model.embed_tokens.base_layer.weight": f32(40, 16),
        f"{PREFIX}lm_head.base_layer.weight": f32(40, 16),
    }
    write_adapter(tmp_path, with_tensors(bases, targets=targets), targets=targets)
    verdict = verdict_of(tmp_path)
    assert (verdict.placement, codes(verdict)) == ("shared", ["base_matrix_inside"])
    assert "save_embedding_layers=False" in verdict.reasons[0].fix


@pytest.mark.parametrize("tensors", [{}, {f"{PREFIX}model.embed_tokens.base_layer.weight": f32(40, 16)}])
def test_adapter_without_lora_tensors_is_rejected(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    verdict = verdict_of(write_adapter(tmp_path, tensors))
    assert verdict.placement == "rejected"
    assert "no_lora_tensors" in codes(verdict)


def test_adapter_without_weights_is_rejected(tmp_path: Path) -> None:
    (write_adapter(tmp_path) / "adapter_model.safetensors").unlink()
    verdict = verdict_of(tmp_path)
    assert verdict.placement == "rejected"
    assert "weights_missing" in codes(verdict)


def test_pickled_adapter_is_rejected_with_the_reason(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    verdict = verdict_of(tmp_path)
    assert (verdict.placement, codes(verdict)[0]) == ("rejected", "pickle_refused")


def test_adapter_beside_other_weights_is_rejected(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "adapter_model.safetensors").read_bytes())
    verdict = verdict_of(tmp_path)
    assert (verdict.placement, codes(verdict)) == ("rejected", ["two_checkpoints"])


def test_every_problem_is_named_at_once_the_weightiest_first(tmp_path: Path) -> None:
    tensors = with_tensors(
        {
            f"{PREFIX}{Q0}.lora_B.weight": None,
            f"{PREFIX}model.layers.1.self_attn.q_proj.lora_A.weight": f32(4, 32),
            f"{PREFIX}nowhere.q_proj.lora_A.weight": f32(4, 16),
            f"{PREFIX}nowhere.q_proj.lora_B.weight": f32(16, 4, value=float("nan")),
        }
    )
    write_adapter(tmp_path, tensors, use_dora=True, alora_invocation_tokens=[1], use_hyperlora=True)
    (tmp_path / "loradock.json").write_text("[]")
    verdict = verdict_of(tmp_path, max_lora_rank=1)
    assert (verdict.placement, codes(verdict)) == (
        "rejected",
        [
            "passport_invalid",
            "alora",
            "dora_magnitude_missing",
            "factor_missing",
            "module_not_in_base",
            "shape_mismatch",
            "not_finite",
            "dora",
            "rank_over_limit",
            "unknown_setting",
        ],
    )


def test_thousand_problems_answer_stays_short(tmp_path: Path) -> None:
    tensors = {f"{PREFIX}m{i}.lora_A.weight": f32(i + 1, 1) for i in range(300)}
    tensors |= {f"{PREFIX}m{i}.lora_B.weight": f32(1, i + 1) for i in range(300)}
    assert len(verdict_of(write_adapter(tmp_path, tensors)).reasons) <= 50


@pytest.mark.parametrize(
    ("architecture", "targets", "expected"),
    [
        ("LlamaForCausalLM", ALL_TARGETS, []),
        ("Qwen3ForCausalLM", ALL_TARGETS, []),
        ("Qwen2ForCausalLM", ("q_proj", "lm_head"), ["embedding_lora"]),
        ("Qwen2ForCausalLM", ("q_proj", "embed_tokens"), ["embedding_lora"]),
        ("Qwen2ForCausalLM", ("q_proj", "down_proj"), []),
        ("MistralForCausalLM", ("embed_tokens", "lm_head"), ["embedding_lora", "embedding_lora"]),
        ("UnheardOfForCausalLM", ("q_proj",), ["architecture_without_lora"]),
        ("MambaForCausalLM", ("q_proj",), ["architecture_without_lora"]),
    ],
)
def test_architecture_decides_what_can_be_wrapped(
    tmp_path: Path, architecture: str, targets: tuple[str, ...], expected: list[str]
) -> None:
    base = base_from({**LLAMA, "architectures": [architecture]}, model_id="base")
    verdict = verdict_of(write_adapter(tmp_path, targets=targets), base)
    assert (verdict.placement, codes(verdict)) == ("dedicated" if expected else "shared", expected)


def test_factors_outside_a_multimodal_models_language_model_are_dedicated(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    config = {"architectures": ["Idefics3ForConditionalGeneration"], "text_config": {}, "vision_config": {}}
    write_json(base / "config.json", config)
    text, tower = "model.text_model.layers.0.self_attn.q_proj", "model.vision_model.encoder.layers.0.self_attn.q_proj"
    (base / "model.safetensors").write_bytes(safetensors_bytes({f"{m}.weight": f32(16, 16) for m in (text, tower)}))
    for modules, expected in (((text,), []), ((text, tower), ["tower_lora"])):
        tensors = {f"{PREFIX}{module}.lora_A.weight": f32(4, 16) for module in modules}
        tensors |= {f"{PREFIX}{module}.lora_B.weight": f32(16, 4) for module in modules}
        write_adapter(tmp_path / "adapter", tensors, target_modules=["q_proj"])
        verdict = verdict_of(tmp_path / "adapter", base_from(base, model_id="base"))
        assert (verdict.placement, codes(verdict)) == ("dedicated" if expected else "shared", expected)


IDEFICS3: dict[str, Any] = {
    "architectures": ["Idefics3ForConditionalGeneration"],
    "text_config": {"num_hidden_layers": 1},
    "vision_config": {},
}
CONNECTOR = "model.connector.modality_projection.proj"


@pytest.mark.parametrize(
    ("architecture", "tower_lora", "expected", "fix"),
    [
        ("Idefics3ForConditionalGeneration", True, None, None),
        ("SmolVLMForConditionalGeneration", True, None, None),
        ("Idefics3ForConditionalGeneration", False, "dedicated", "serve with engine.enable_tower_connector_lora: true"),
        ("AriaForConditionalGeneration", True, "dedicated", "target the language model's modules alone"),
        ("Idefics2ForConditionalGeneration", True, "rejected", "train Idefics3ForConditionalGeneration or SmolVLM"),
    ],
)
def test_connector_is_shared_where_the_engine_is_told_to_and_can(
    tmp_path: Path, architecture: str, tower_lora: bool, expected: str | None, fix: str | None
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    write_json(base / "config.json", IDEFICS3 | {"architectures": [architecture]})
    modules = ("model.text_model.layers.0.self_attn.q_proj", CONNECTOR)
    (base / "model.safetensors").write_bytes(safetensors_bytes({f"{m}.weight": f32(16, 16) for m in modules}))
    tensors = {f"{PREFIX}{module}.lora_A.weight": f32(4, 16) for module in modules}
    tensors |= {f"{PREFIX}{module}.lora_B.weight": f32(16, 4) for module in modules}
    write_adapter(tmp_path / "adapter", tensors, target_modules=r".*(text_model|connector).*proj")
    limits = EngineLimits(64, tower_lora=tower_lora)
    verdict = judge(read_checkpoint(tmp_path / "adapter"), base_from(base, model_id="base"), limits)
    assert verdict.placement == (expected or "shared")
    assert (expected is None) == (not verdict.reasons)
    assert fix is None or fix in " ".join(reason.fix for reason in verdict.reasons)
    assert EngineLimits.from_json(limits.to_json()) == limits


def test_layer_beyond_the_text_model_is_refused(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    write_json(base / "config.json", IDEFICS3)
    (base / "model.safetensors").write_bytes(
        safetensors_bytes({"model.text_model.layers.0.self_attn.q_proj.weight": f32(16, 16)})
    )
    module = "model.text_model.layers.1.self_attn.q_proj"
    tensors = {f"{PREFIX}{module}.lora_A.weight": f32(4, 16), f"{PREFIX}{module}.lora_B.weight": f32(16, 4)}
    write_adapter(tmp_path / "adapter", tensors, target_modules=["q_proj"])
    verdict = verdict_of(tmp_path / "adapter", base_from(base, model_id="base"))
    assert (verdict.placement, codes(verdict)) == ("rejected", ["layer_beyond_base"])


def test_gpt2_base_is_dedicated(tmp_path: Path) -> None:
    tensors = lora_tensors(GPT2, targets=("c_attn",))
    write_adapter(tmp_path, tensors, targets=("c_attn",), fan_in_fan_out=True)
    verdict = verdict_of(tmp_path, base_from(GPT2))
    assert (verdict.placement, codes(verdict)) == ("dedicated", ["architecture_without_lora"])


def test_engine_without_lora_is_dedicated(tmp_path: Path) -> None:
    verdict = judge(read_checkpoint(write_adapter(tmp_path)), BASE, EngineLimits(64, enable_lora=False))
    assert (verdict.placement, codes(verdict)) == ("dedicated", ["engine_without_lora"])


def test_output_matrix_over_a_huge_vocabulary_is_dedicated(tmp_path: Path) -> None:
    config = {**LLAMA, "vocab_size": 258_049, "hidden_size": 4, "head_dim": 1}
    write_adapter(tmp_path, lora_tensors(config, rank=1, targets=("lm_head",)), rank=1, targets=("lm_head",))
    verdict = verdict_of(tmp_path, base_from(config))
    assert (verdict.placement, codes(verdict)) == ("dedicated", ["vocab_over_limit"])
    assert "258049" in verdict.reasons[0].message
    assert "258048" in verdict.reasons[0].message


def test_base_whose_modules_are_unknown_refuses_rather_than_guesses(tmp_path: Path) -> None:
    base = base_from({**LLAMA, "model_type": "unheard_of"})
    verdict = verdict_of(write_adapter(tmp_path), base)
    assert (verdict.placement, codes(verdict)) == ("rejected", ["base_unknown"])


def test_without_a_base_the_rest_is_judged(tmp_path: Path) -> None:
    verdict = verdict_of(write_adapter(tmp_path, use_dora=True), None)
    assert (verdict.placement, codes(verdict)) == ("dedicated", ["dora", "base_not_given"])


def test_base_of_another_name_is_remarked(tmp_path: Path) -> None:
    verdict = verdict_of(write_adapter(tmp_path, base_model_name_or_path="/home/me/other-base"))
    assert (verdict.placement, codes(verdict)) == ("shared", ["base_name"])


@pytest.mark.parametrize(("served", "placement"), [("aa" * 32, "shared"), ("bb" * 32, "rejected"), (None, "shared")])
def test_base_with_other_weights_than_the_passports_is_rejected(
    tmp_path: Path, served: str | None, placement: str
) -> None:
    write_adapter(tmp_path)
    write_passport(tmp_path, Passport(base=PassportBase(model_id="somewhere/base", weights_sha256="aa" * 32)))
    verdict = verdict_of(tmp_path, base_from(LLAMA, model_id="somewhere/base", weights_sha256=served))
    assert verdict.placement == placement
    assert codes(verdict) == (["base_weights_differ"] if placement == "rejected" else [])


def test_verdict_as_json_is_json(tmp_path: Path) -> None:
    document = json.loads(json.dumps(verdict_of(write_adapter(tmp_path, rank=128)).to_json()))
    assert (document["kind"], document["placement"], document["rank"]) == ("lora", "dedicated", 128)
    assert document["reasons"][0].keys() == {"code", "message", "where", "fix"}


def test_many_equal_faults_do_not_hide_the_others(tmp_path: Path) -> None:
    tensors = {n: f32(4, 32) if "lora_A" in n else t for n, t in lora_tensors().items()}
    verdict = verdict_of(write_adapter(tmp_path, tensors, use_dora=True))
    assert codes(verdict) == ["dora_magnitude_missing", "shape_mismatch", "dora"]
    assert verdict.reasons[1].message == "A takes 32 inputs, the base's module 16 (and 3 more like it)"
