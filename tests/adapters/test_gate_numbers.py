"""The gate on values: what is no number, and adapters that change nothing."""

from pathlib import Path
from typing import Any

import pytest

from loradock_adapters.checkpoint import read_checkpoint
from loradock_adapters.gate import EngineLimits, judge
from loradock_testing.checkpoints import PREFIX, f32, lora_tensors, write_adapter
from loradock_testing.verdicts import BASE, Q0, codes, verdict_of, with_tensors


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_value_that_is_no_number_is_rejected(tmp_path: Path, value: float) -> None:
    tensors = with_tensors({f"{PREFIX}{Q0}.lora_B.weight": f32(16, 4, value=value)})
    verdict = verdict_of(write_adapter(tmp_path, tensors))
    assert (verdict.placement, codes(verdict)) == ("rejected", ["not_finite"])
    assert verdict.reasons[0].where == f"adapter_model.safetensors: {PREFIX}{Q0}.lora_B.weight"


def test_values_are_not_read_where_they_are_not_wanted(tmp_path: Path) -> None:
    tensors = with_tensors({f"{PREFIX}{Q0}.lora_B.weight": f32(16, 4, value=float("nan"))})
    checkpoint = read_checkpoint(write_adapter(tmp_path, tensors))
    assert judge(checkpoint, BASE, EngineLimits(64), check_values=False).placement == "shared"


def with_zero_b(**settings: Any) -> dict[str, Any]:
    return {n: f32(*t[1], value=0.0) if "lora_B" in n else t for n, t in lora_tensors(**settings).items()}


def test_adapter_whose_every_b_is_zero_is_rejected_unless_forced(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(write_adapter(tmp_path, with_zero_b()))
    verdict = judge(checkpoint, BASE, EngineLimits(64))
    assert (verdict.placement, codes(verdict)) == ("rejected", ["changes_nothing"])
    assert "--force" in verdict.reasons[0].fix
    forced = judge(checkpoint, BASE, EngineLimits(64), force=True)
    assert (forced.placement, codes(forced)) == ("shared", ["changes_nothing"])


def test_force_lets_nothing_else_pass(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(write_adapter(tmp_path, with_zero_b(), alora_invocation_tokens=[1]))
    assert judge(checkpoint, BASE, EngineLimits(64), force=True).placement == "rejected"


def test_adapter_of_which_one_b_is_not_zero_is_shared(tmp_path: Path) -> None:
    tensors = {**with_zero_b(), f"{PREFIX}{Q0}.lora_B.weight": f32(16, 4)}
    assert codes(verdict_of(write_adapter(tmp_path, tensors))) == []


def test_adapter_whose_other_factor_is_zero_throughout_is_rejected(tmp_path: Path) -> None:
    tensors = {n: f32(*t[1], value=0.0) if "lora_A" in n else t for n, t in lora_tensors().items()}
    assert codes(verdict_of(write_adapter(tmp_path, tensors))) == ["changes_nothing"]


def test_adapter_with_zero_alpha_is_rejected_without_a_look_at_its_values(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(write_adapter(tmp_path, lora_alpha=0))
    verdict = judge(checkpoint, BASE, EngineLimits(64), check_values=False)
    assert (verdict.placement, codes(verdict)) == ("rejected", ["changes_nothing"])
    assert verdict.reasons[0].where == "adapter_config.json: lora_alpha"


def test_adapter_with_zero_b_beside_a_trained_bias_changes_something(tmp_path: Path) -> None:
    tensors = {**with_zero_b(), f"{PREFIX}{Q0}.bias": f32(16)}
    assert verdict_of(write_adapter(tmp_path, tensors, bias="lora_only")).placement == "dedicated"
