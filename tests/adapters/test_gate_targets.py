"""The gate on what was targeted and what was saved."""

from pathlib import Path
from typing import Any

import pytest

from loradock_adapters.base import base_from
from loradock_testing.checkpoints import LLAMA, PREFIX, f32, lora_tensors, write_adapter, write_full, write_json
from loradock_testing.verdicts import codes, verdict_of, with_tensors

V1 = "model.layers.1.self_attn.v_proj"


def test_target_that_the_base_lacks_is_remarked(tmp_path: Path) -> None:
    verdict = verdict_of(write_adapter(tmp_path, target_modules=["q_proj", "v_proj", "c_attn"]))
    assert (verdict.placement, codes(verdict)) == ("shared", ["target_not_in_base"])
    assert verdict.reasons[0].where == "c_attn"


def test_target_of_which_nothing_was_saved_is_rejected(tmp_path: Path) -> None:
    verdict = verdict_of(write_adapter(tmp_path, target_modules=["q_proj", "v_proj", "o_proj"]))
    assert (verdict.placement, codes(verdict)) == ("rejected", ["target_without_tensors"])
    assert verdict.reasons[0].where == "o_proj"


def test_target_that_was_saved_for_some_layers_is_remarked_with_the_first_that_lacks_it(tmp_path: Path) -> None:
    gone = {f"{PREFIX}{V1}.lora_{factor}.weight": None for factor in "AB"}
    verdict = verdict_of(write_adapter(tmp_path, with_tensors(gone)))
    assert (verdict.placement, codes(verdict)) == ("shared", ["target_layers_missing"])
    assert verdict.reasons[0].where == V1


@pytest.mark.parametrize(
    "settings",
    [
        {"layers_to_transform": [0]},
        {"layers_to_transform": 0},
        {"exclude_modules": [V1]},
        {"exclude_modules": ".*1.*v"},
    ],
    ids=["layers", "one_layer", "excluded", "excluded_by_pattern"],
)
def test_module_that_the_config_leaves_out_is_not_missed(tmp_path: Path, settings: dict[str, Any]) -> None:
    tensors = {name: tensor for name, tensor in lora_tensors().items() if ".1.self_attn.v_proj" not in name}
    if "layers_to_transform" in settings:
        tensors = {name: tensor for name, tensor in tensors.items() if "layers.1." not in name}
    assert codes(verdict_of(write_adapter(tmp_path, tensors, **settings))) == []


def test_tensors_that_the_config_does_not_target_are_remarked(tmp_path: Path) -> None:
    verdict = verdict_of(write_adapter(tmp_path, target_modules=["v_proj"]))
    assert (verdict.placement, codes(verdict)) == ("shared", ["tensor_not_targeted"])


def test_pattern_of_targets_is_left_to_its_trainer(tmp_path: Path) -> None:
    assert codes(verdict_of(write_adapter(tmp_path, target_modules=r"(.*\.)*(q|v)_proj"))) == []


def test_module_of_a_layer_past_the_last_is_rejected_even_where_the_weights_hold_it(tmp_path: Path) -> None:
    """The layers for speculative decoding lie there: an engine serves the model without them."""
    base = write_full(tmp_path / "base", {**LLAMA, "num_hidden_layers": 3})
    write_json(base / "config.json", LLAMA)
    last = "model.layers.2.self_attn.q_proj"
    pair = {f"{PREFIX}{last}.lora_A.weight": f32(4, 16), f"{PREFIX}{last}.lora_B.weight": f32(16, 4)}
    verdict = verdict_of(write_adapter(tmp_path / "adapter", with_tensors(pair)), base_from(base))
    assert (verdict.placement, codes(verdict)[0], verdict.reasons[0].where) == ("rejected", "layer_beyond_base", last)
    assert verdict.reasons[0].message == "the base has 2 layers, from 0 on"
