"""The gate on adapter_config.json: settings that are swapped, that need an engine of their own, that are refused."""

import time
from pathlib import Path
from typing import Any

import pytest

from loradock_adapters.gate import Verdict
from loradock_testing.checkpoints import PREFIX, f32, write_adapter, write_json
from loradock_testing.verdicts import codes, verdict_of

DEDICATED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "dora"),
    "bias_all": ({"bias": "all"}, "trained_bias"),
    "bias_lora_only": ({"bias": "lora_only"}, "trained_bias"),
    "lora_bias": ({"lora_bias": True}, "lora_bias"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "trainable_tokens": ({"trainable_token_indices": [1, 2]}, "trainable_tokens"),
}


REJECTED: dict[str, tuple[dict[str, Any], str]] = {
    "alora": ({"alora_invocation_tokens": [1]}, "alora"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_changes_base"),
    "pissa_niter": ({"init_lora_weights": "pissa_niter_4"}, "init_changes_base"),
    "olora": ({"init_lora_weights": "olora"}, "init_changes_base"),
    "corda": ({"init_lora_weights": "corda"}, "init_changes_base"),
    "loftq": ({"init_lora_weights": "loftq"}, "loftq"),
    "layer_replication": ({"layer_replication": [[0, 1]]}, "layer_replication"),
    "bdlora": ({"use_bdlora": {"nblocks": 2}}, "bdlora"),
    "qalora": ({"use_qalora": True}, "qalora"),
    "peft_type": ({"peft_type": "IA3"}, "peft_type"),
    "rank_zero": ({"r": 0}, "rank"),
    "rank_text": ({"r": "8"}, "rank"),
    "rank_bool": ({"r": True}, "rank"),
    "rank_missing": ({"r": None}, "rank"),
    "alpha_text": ({"lora_alpha": "16"}, "lora_alpha"),
    "targets_number": ({"target_modules": 7}, "target_modules"),
    "rank_pattern_list": ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
    "rank_pattern_zero": ({"rank_pattern": {"o_proj": 0}}, "rank_pattern"),
    "alpha_pattern_text": ({"alpha_pattern": {"o_proj": "a"}}, "alpha_pattern"),
    "rslora_text": ({"use_rslora": "false"}, "config_type"),
    "dora_text": ({"use_dora": "no"}, "config_type"),
    "bias_unknown": ({"bias": "some"}, "config_type"),
    "init_number": ({"init_lora_weights": 1}, "config_type"),
    "dropout_two": ({"lora_dropout": 2}, "config_type"),
    "layers_text": ({"layers_to_transform": "1"}, "config_type"),
    "layers_negative": ({"layers_to_transform": [-1]}, "config_type"),
    "layers_nested": ({"layers_to_transform": [1, [2], {}]}, "config_type"),
    "modules_to_save_numbers": ({"modules_to_save": [1]}, "config_type"),
    "base_path_list": ({"base_model_name_or_path": ["a"]}, "config_type"),
    "targets_empty": ({"target_modules": []}, "target_modules"),
    "targets_mixed": ({"target_modules": ["q_proj", 1]}, "target_modules"),
    "rank_endless": ({"r": 10**30}, "rank"),
    "alpha_endless": ({"lora_alpha": 10**30}, "lora_alpha"),
    "alpha_null": ({"lora_alpha": None}, "lora_alpha"),
    "kasa": ({"kasa_config": {"beta": 1e-4}}, "kasa"),
    "monteclora": ({"monteclora_config": {"sampler": 1}}, "monteclora"),
    "target_parameters": ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
    "arrow": ({"arrow_config": {"top_k": 2}}, "arrow"),
    "pattern_hangs": ({"rank_pattern": {"(a+)+$": 8}}, "pattern_unsafe"),
    "pattern_hangs_alpha": ({"alpha_pattern": {"(.*)*x": 8}}, "pattern_unsafe"),
}


PLAIN: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 3.5}},
    "rank_pattern_null": {"rank_pattern": None},
    "init_gaussian": {"init_lora_weights": "gaussian"},
    "init_eva": {"init_lora_weights": "EVA"},
    "init_false": {"init_lora_weights": False},
    "no_dora": {"use_dora": False, "modules_to_save": None, "lora_bias": False, "trainable_token_indices": None},
    "target_pattern": {"target_modules": r".*\.(q|v)_proj"},
}


@pytest.mark.parametrize(("settings", "code"), DEDICATED.values(), ids=DEDICATED.keys())
def test_setting_that_cannot_be_swapped_is_dedicated(tmp_path: Path, settings: dict[str, Any], code: str) -> None:
    verdict = verdict_of(write_adapter(tmp_path, **settings))
    assert (verdict.placement, codes(verdict)) == ("dedicated", [code])


@pytest.mark.parametrize(("settings", "code"), REJECTED.values(), ids=REJECTED.keys())
def test_setting_that_cannot_be_served_is_rejected(tmp_path: Path, settings: dict[str, Any], code: str) -> None:
    verdict = verdict_of(write_adapter(tmp_path, **settings))
    assert (verdict.placement, codes(verdict)) == ("rejected", [code])


@pytest.mark.parametrize("settings", PLAIN.values(), ids=PLAIN.keys())
def test_setting_that_the_engine_implements_is_shared(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert verdict_of(write_adapter(tmp_path, **settings)) == Verdict("lora", "shared", (), 4)


def test_unknown_setting_is_remarked(tmp_path: Path) -> None:
    verdict = verdict_of(write_adapter(tmp_path, use_hyperlora=True))
    assert (verdict.placement, codes(verdict)) == ("shared", ["unknown_setting"])
    assert verdict.reasons[0].where == "use_hyperlora"


def test_config_of_the_wrong_shape_never_raises(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    values: tuple[Any, ...] = (None, [], {}, "x", 7, [[]], {"a": {}}, -1, True)
    for junk in values:
        for key in ("r", "lora_alpha", "target_modules", "rank_pattern", "bias", "peft_type", "init_lora_weights"):
            write_json(
                tmp_path / "adapter_config.json", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], key: junk}
            )
            assert verdict_of(tmp_path).placement in ("shared", "dedicated", "rejected")


def test_hostile_config_is_judged_in_a_moment(tmp_path: Path) -> None:
    tensors = {f"{PREFIX}m.{'x.' * 40}{i}.lora_A.weight": f32(1, 1) for i in range(4000)}
    names = [f"t{i}" for i in range(40_000)]
    patterns = {f"model.{i}": 1 for i in range(20_000)}
    started_s = time.process_time()
    verdict = verdict_of(write_adapter(tmp_path, tensors, target_modules=names, rank_pattern=patterns, rank=1))
    assert verdict.placement == "rejected"
    write_adapter(tmp_path, tensors, rank_pattern={f"a*{i}": 1 for i in range(201)}, rank=1)
    assert "too_many_patterns" in codes(verdict_of(tmp_path))
    assert time.process_time() - started_s < 10


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('{"r": 4, "r": 8}', "config_duplicate_key"),
        ('{"rank_pattern": {"a": 1, "a": 2}}', "config_duplicate_key"),
        ('{"r": 4, "lora_alpha": NaN}', "config_not_json"),
        ('{"r": 4, "lora_alpha": 1e999}', "config_not_json"),
        ('{"a": ' * 40 + "1" + "}" * 40, "config_not_json"),
        ("[" * 100_000, "config_not_json"),
        ('{"r": "\\ud800"}', "config_not_json"),
        ("[]", "config_not_json"),
        ("", "config_not_json"),
    ],
)
def test_config_that_two_readers_could_read_in_two_ways_is_rejected(tmp_path: Path, text: str, code: str) -> None:
    (write_adapter(tmp_path) / "adapter_config.json").write_text(text)
    verdict = verdict_of(tmp_path)
    assert (verdict.placement, codes(verdict)[0]) == ("rejected", code)
    assert verdict.reasons[0].where == "adapter_config.json"
