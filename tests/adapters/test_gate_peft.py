"""The gate on what PEFT itself writes: the names and shapes of its files are PEFT's to choose, not ours to assume."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loradock_adapters.base import BaseModel, base_from
from loradock_adapters.checkpoint import read_checkpoint
from loradock_adapters.gate import EngineLimits, Verdict, judge

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

# PEFT and transformers warn about what these tests do on purpose (tied embeddings, adapters on them).
pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore::UserWarning", "ignore::FutureWarning")

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Save = Callable[..., Path]


def make_base(directory: Path, **changes: Any) -> Path:
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 40,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }
    config = transformers.LlamaConfig(**sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def base(base_dir: Path) -> BaseModel:
    return base_from(base_dir)


def save(directory: Path, base_dir: Path, saving: dict[str, Any] | None = None, **settings: Any) -> Path:
    """An adapter with random B matrices, saved by PEFT."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base_dir)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "lora_embedding" in name:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(directory, **(saving or {}))
    return directory


def verdict_of(directory: Path, base: BaseModel) -> Verdict:
    return judge(read_checkpoint(directory), base, EngineLimits(64))


def codes(verdict: Verdict) -> list[str]:
    return [reason.code for reason in verdict.reasons]


SHARED: dict[str, dict[str, Any]] = {
    "attention": {},
    "all_linear": {"target_modules": "all-linear"},
    "listed": {"target_modules": LINEAR},
    "pattern": {"target_modules": r".*layers\.1\..*(q|k)_proj"},
    "rank_12": {"r": 12},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"layers.0.self_attn.q_proj": 7}, "alpha_pattern": {"v_proj": 3}},
    "layers_to_transform": {"layers_to_transform": [1]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}
DEDICATED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "dora"),
    "bias_lora_only": ({"bias": "lora_only"}, "trained_bias"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "norms_to_save": ({"modules_to_save": ["norm"]}, "modules_to_save"),
    "trainable_tokens": ({"trainable_token_indices": {"embed_tokens": [3, 4]}}, "trainable_tokens"),
    "over_rank": ({"r": 65}, "rank_over_limit"),
}
REJECTED: dict[str, tuple[dict[str, Any], str]] = {
    "pissa": ({"init_lora_weights": "pissa"}, "init_changes_base"),
    "olora": ({"init_lora_weights": "olora"}, "init_changes_base"),
    "alora": ({"alora_invocation_tokens": [5, 6]}, "alora"),
}


@pytest.mark.parametrize("settings", SHARED.values(), ids=SHARED.keys())
def test_plain_adapter_saved_by_peft_is_shared(
    tmp_path: Path, base_dir: Path, base: BaseModel, settings: dict[str, Any]
) -> None:
    verdict = verdict_of(save(tmp_path, base_dir, **settings), base)
    assert (verdict.placement, codes(verdict)) == ("shared", [])


@pytest.mark.parametrize(("settings", "code"), DEDICATED.values(), ids=DEDICATED.keys())
def test_adapter_that_cannot_be_swapped_saved_by_peft_is_dedicated(
    tmp_path: Path, base_dir: Path, base: BaseModel, settings: dict[str, Any], code: str
) -> None:
    verdict = verdict_of(save(tmp_path, base_dir, **settings), base)
    assert (verdict.placement, codes(verdict)) == ("dedicated", [code])


@pytest.mark.parametrize(("settings", "code"), REJECTED.values(), ids=REJECTED.keys())
def test_adapter_that_cannot_be_served_saved_by_peft_is_rejected(
    tmp_path: Path, base_dir: Path, base: BaseModel, settings: dict[str, Any], code: str
) -> None:
    verdict = verdict_of(save(tmp_path, base_dir, **settings), base)
    assert (verdict.placement, codes(verdict)) == ("rejected", [code])


@pytest.mark.parametrize(("biased", "placement"), [(True, "dedicated"), (False, "rejected")])
def test_bias_beside_lora_is_dedicated_where_the_base_has_a_bias_to_merge_it_into(
    tmp_path: Path, biased: bool, placement: str
) -> None:
    base_dir = make_base(tmp_path / "tiny", attention_bias=biased)
    verdict = verdict_of(save(tmp_path / "adapter", base_dir, lora_bias=True), base_from(base_dir))
    assert verdict.placement == placement
    assert codes(verdict)[0] == ("lora_bias" if biased else "lora_bias_without_bias")


def test_seeds_whole_list_saved_without_base_matrices_is_shared_and_small(
    tmp_path: Path, base_dir: Path, base: BaseModel
) -> None:
    targets = [*LINEAR, "embed_tokens", "lm_head"]
    lean = save(tmp_path / "lean", base_dir, {"save_embedding_layers": False}, target_modules=targets)
    assert codes(verdict_of(lean, base)) == []
    fat = save(tmp_path / "fat", base_dir, target_modules=targets)
    verdict = verdict_of(fat, base)
    assert (verdict.placement, codes(verdict)) == ("shared", ["base_matrix_inside"])


def test_tied_base_takes_adapters_on_its_output_matrix(tmp_path: Path) -> None:
    tied = make_base(tmp_path / "tied", tie_word_embeddings=True)
    adapter = save(tmp_path / "adapter", tied, {"save_embedding_layers": False}, target_modules=["q_proj", "lm_head"])
    assert codes(verdict_of(adapter, base_from(tied))) == []


def test_untrained_adapter_is_rejected(tmp_path: Path, base_dir: Path, base: BaseModel) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(base_dir)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    assert codes(verdict_of(tmp_path, base)) == ["changes_nothing"]


def test_adapter_of_a_larger_base_is_rejected(tmp_path: Path, base: BaseModel) -> None:
    larger = make_base(tmp_path / "tiny", hidden_size=32, num_hidden_layers=3)
    verdict = verdict_of(save(tmp_path / "adapter", larger), base)
    assert verdict.placement == "rejected"
    assert set(codes(verdict)) == {"layer_beyond_base", "shape_mismatch"}


@pytest.mark.parametrize(
    ("modules", "placement", "code"),
    [(["embed_tokens", "lm_head"], "dedicated", "vocab_resized"), (["lm_head"], "rejected", "vocab_mismatch")],
)
def test_resized_vocabulary_is_dedicated_where_both_matrices_came_along(
    tmp_path: Path, base_dir: Path, base: BaseModel, modules: list[str], placement: str, code: str
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(base_dir)
    model.resize_token_embeddings(48)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=modules, task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(tmp_path, save_embedding_layers=False)
    verdict = verdict_of(tmp_path, base)
    assert verdict.placement == placement
    assert code in codes(verdict)


def test_adapter_saved_as_a_pickle_is_rejected(tmp_path: Path, base_dir: Path, base: BaseModel) -> None:
    save(tmp_path, base_dir)
    state = {"x": torch.zeros(1)}
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(state, tmp_path / "adapter_model.bin")
    verdict = verdict_of(tmp_path, base)
    assert (verdict.placement, codes(verdict)[0]) == ("rejected", "pickle_refused")


def test_pickle_renamed_to_safetensors_is_rejected(tmp_path: Path, base_dir: Path, base: BaseModel) -> None:
    save(tmp_path, base_dir)
    torch.save({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    verdict = verdict_of(tmp_path, base)
    assert (verdict.placement, codes(verdict)[0]) == ("rejected", "pickle_refused")


def test_gpt2_adapter_is_dedicated(tmp_path: Path) -> None:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 40}
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    adapter = save(tmp_path / "adapter", tmp_path / "base", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    verdict = verdict_of(adapter, base_from(tmp_path / "base"))
    assert (verdict.placement, codes(verdict)) == ("dedicated", ["architecture_without_lora"])


@pytest.mark.parametrize("tied", [True, False])
def test_full_model_saved_by_transformers_is_dedicated(tmp_path: Path, tied: bool) -> None:
    directory = make_base(tmp_path, tie_word_embeddings=tied)
    (directory / "tokenizer.json").write_text("{}")
    verdict = judge(read_checkpoint(directory), None, EngineLimits())
    assert (verdict.placement, codes(verdict)) == ("dedicated", ["full_weights"])


def test_sharded_model_saved_by_transformers_is_dedicated(tmp_path: Path) -> None:
    directory = make_base(tmp_path / "one")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    model.save_pretrained(tmp_path / "many", max_shard_size="8KB")
    (tmp_path / "many" / "tokenizer.json").write_text("{}")
    checkpoint = read_checkpoint(tmp_path / "many")
    assert len(checkpoint.shards) > 1
    assert codes(judge(checkpoint, None, EngineLimits())) == ["full_weights"]
