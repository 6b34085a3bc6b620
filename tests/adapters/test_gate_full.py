"""The gate on full models: complete, startable, and served by an engine of their own."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from loradock_adapters.checkpoint import read_checkpoint
from loradock_adapters.gate import EngineLimits, Verdict, judge
from loradock_testing.checkpoints import (
    GPT2,
    LLAMA,
    Tensor,
    f32,
    full_tensors,
    safetensors_bytes,
    write_full,
    write_json,
)


def verdict_of(directory: Path) -> Verdict:
    return judge(read_checkpoint(directory), None, EngineLimits())


def codes(verdict: Verdict) -> list[str]:
    return [reason.code for reason in verdict.reasons]


def write_tensors(directory: Path, changes: Mapping[str, Tensor | None]) -> Path:
    tensors = {name: tensor for name, tensor in {**full_tensors(), **changes}.items() if tensor is not None}
    (write_full(directory) / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    return directory


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_complete_model_is_dedicated(tmp_path: Path, shards: int) -> None:
    verdict = verdict_of(write_full(tmp_path, shards=shards))
    assert (verdict.kind, verdict.placement, codes(verdict), verdict.rank) == (
        "full",
        "dedicated",
        ["full_weights"],
        None,
    )


@pytest.mark.parametrize("config", [GPT2, {**LLAMA, "tie_word_embeddings": True}], ids=["gpt2", "tied_llama"])
def test_complete_tied_model_is_dedicated(tmp_path: Path, config: Mapping[str, Any]) -> None:
    verdict = verdict_of(write_full(tmp_path, config))
    assert (verdict.placement, codes(verdict)) == ("dedicated", ["full_weights"])


def test_any_listed_architecture_of_an_unknown_family_is_dedicated(tmp_path: Path) -> None:
    config = {**LLAMA, "architectures": ["MambaForCausalLM"], "model_type": "mamba"}
    write_json(write_full(tmp_path) / "config.json", config)
    assert verdict_of(tmp_path).placement == "dedicated"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"architectures": ["UnheardOf"]}, "architecture_unknown"),
        ({"architectures": []}, "architectures_missing"),
        ({"architectures": "LlamaForCausalLM"}, "architectures_missing"),
        ({"architectures": [1]}, "architectures_missing"),
        ({"architectures": None}, "architectures_missing"),
        ({"hidden_size": 32}, "shape_mismatch"),
        ({"vocab_size": 41}, "shape_mismatch"),
        ({"num_hidden_layers": 3}, "weights_missing"),
    ],
)
def test_config_that_does_not_fit_is_rejected(tmp_path: Path, change: dict[str, Any], code: str) -> None:
    write_json(write_full(tmp_path) / "config.json", {**LLAMA, **change})
    verdict = verdict_of(tmp_path)
    assert verdict.placement == "rejected"
    assert codes(verdict)[0] == code


def test_config_that_is_no_json_is_rejected(tmp_path: Path) -> None:
    (write_full(tmp_path) / "config.json").write_text("{")
    verdict = verdict_of(tmp_path)
    assert (verdict.placement, codes(verdict)[0]) == ("rejected", "config_not_json")


@pytest.mark.parametrize(
    ("changes", "code", "where"),
    [
        ({"model.layers.1.mlp.up_proj.weight": None}, "weights_missing", "model.layers.1.mlp.up_proj"),
        ({"lm_head.weight": None}, "weights_missing", "lm_head"),
        ({"lm_head.weight": f32(48, 16)}, "shape_mismatch", "lm_head"),
        ({"model.layers.0.lora_A.weight": f32(4)}, "not_merged", "model.layers.0.lora_A.weight"),
        ({"model.x.base_layer.weight": f32(4)}, "not_merged", "model.x.base_layer.weight"),
        ({"model.norm.weight": f32(16, value=float("nan"))}, "not_finite", "model.safetensors: model.norm.weight"),
    ],
)
def test_weights_that_do_not_fit_are_rejected(
    tmp_path: Path, changes: dict[str, Tensor | None], code: str, where: str
) -> None:
    verdict = verdict_of(write_tensors(tmp_path, changes))
    assert verdict.placement == "rejected"
    assert [(reason.code, reason.where) for reason in verdict.reasons[:-1]] == [(code, where)]


def test_quantised_weights_shapes_are_left_to_the_engine(tmp_path: Path) -> None:
    write_json(
        write_tensors(tmp_path, {"lm_head.weight": f32(2)}) / "config.json", {**LLAMA, "quantization_config": {}}
    )
    assert verdict_of(tmp_path).placement == "rejected"  # empty: not quantised
    write_json(tmp_path / "config.json", {**LLAMA, "quantization_config": {"quant_method": "awq"}})
    assert verdict_of(tmp_path).placement == "dedicated"


def test_weights_missing_altogether_are_rejected(tmp_path: Path) -> None:
    (write_full(tmp_path) / "model.safetensors").unlink()
    verdict = verdict_of(tmp_path)
    assert (verdict.placement, codes(verdict)[0]) == ("rejected", "weights_missing")


def test_pickled_model_is_rejected_with_the_reason(tmp_path: Path) -> None:
    (write_full(tmp_path) / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    verdict = verdict_of(tmp_path)
    assert (verdict.placement, codes(verdict)) == ("rejected", ["pickle_refused", "weights_missing", "full_weights"])


def test_tokenizer_missing_is_rejected_with_the_way_out(tmp_path: Path) -> None:
    (write_full(tmp_path) / "tokenizer.json").unlink()
    verdict = verdict_of(tmp_path)
    assert (verdict.placement, codes(verdict)) == ("rejected", ["tokenizer_missing", "full_weights"])
    assert "tokenizer.save_pretrained" in verdict.reasons[0].fix


def test_shard_missing_is_rejected_by_its_name(tmp_path: Path) -> None:
    (write_full(tmp_path, shards=3) / "model-00002-of-00003.safetensors").unlink()
    verdict = verdict_of(tmp_path)
    assert verdict.placement == "rejected"
    assert ("shard_missing", "model-00002-of-00003.safetensors") in [(r.code, r.where) for r in verdict.reasons]


def test_shards_without_index_are_rejected(tmp_path: Path) -> None:
    (write_full(tmp_path, shards=2) / "model.safetensors.index.json").unlink()
    verdict = verdict_of(tmp_path)
    assert (verdict.placement, codes(verdict)[0]) == ("rejected", "index_missing")


def test_index_that_disagrees_with_the_shards_is_rejected_both_ways(tmp_path: Path) -> None:
    path = write_full(tmp_path, shards=2) / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    weight_map["lm_head.weight"] = {first: second, second: first}[weight_map["lm_head.weight"]]
    del weight_map["model.norm.weight"]
    write_json(path, {"weight_map": weight_map})
    verdict = verdict_of(tmp_path)
    assert (verdict.placement, codes(verdict)) == ("rejected", ["index_disagrees", "index_disagrees", "full_weights"])
    assert "lm_head.weight" in verdict.reasons[0].where
    assert verdict.reasons[1].where == "model.norm.weight"


def test_tensor_in_two_shards_is_rejected(tmp_path: Path) -> None:
    write_full(tmp_path, shards=2)
    shard = tmp_path / "model-00001-of-00002.safetensors"
    tensors = {**dict(list(full_tensors().items())[0::2]), **dict(list(full_tensors().items())[1:2])}
    shard.write_bytes(safetensors_bytes(tensors))
    assert "tensor_twice" in codes(verdict_of(tmp_path))


def test_cut_shard_is_rejected_and_no_shape_is_missed_twice(tmp_path: Path) -> None:
    shard = write_full(tmp_path, shards=2) / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    verdict = verdict_of(tmp_path)
    assert (verdict.placement, codes(verdict)) == ("rejected", ["tensor_out_of_file", "full_weights"])


def test_idefics2_is_refused_and_its_successors_are_named(tmp_path: Path) -> None:
    config = {"architectures": ["Idefics2ForConditionalGeneration"], "model_type": "idefics2", "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes({"model.x.weight": f32(2, 2)}))
    (tmp_path / "tokenizer.json").write_text("{}")
    verdict = judge(read_checkpoint(tmp_path), None, EngineLimits())
    (reason,) = [reason for reason in verdict.reasons if reason.code == "architecture_unknown"]
    assert verdict.placement == "rejected"
    assert "vLLM 0.32.0 does not list 'Idefics2ForConditionalGeneration'" in reason.message
    assert "Idefics3ForConditionalGeneration" in reason.fix
    assert "SmolVLMForConditionalGeneration" in reason.fix
