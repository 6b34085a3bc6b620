"""Repairs of what PEFT and others wrote: the repaired adapter is the same function, by PEFT itself, exactly."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loradock_adapters.base import base_from
from loradock_adapters.checkpoint import read_checkpoint
from loradock_adapters.cli import run
from loradock_adapters.gate import EngineLimits, Verdict, judge
from loradock_adapters.repair import Repair, plan_repair, write_repaired

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
safetensors_torch = pytest.importorskip("safetensors.torch")

pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore::UserWarning", "ignore::FutureWarning")

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WEIGHTS = "adapter_model.safetensors"


def make_base(directory: Path, **changes: Any) -> Path:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 40, "tie_word_embeddings": False, **changes}
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "tiny")


def adapted(base_dir: Path, seed: int = 1, **settings: Any) -> Any:
    """A PEFT model whose LoRA matrices were trained, so to say."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(base_dir)
    config = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "task_type": "CAUSAL_LM", **settings}
    model = peft.get_peft_model(model, peft.LoraConfig(**config))
    train(model)
    return model


def train(model: Any) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(12).reshape(2, 6)).logits


def loaded_logits(base_dir: Path, adapter: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(base_dir)
    return logits(peft.PeftModel.from_pretrained(model, str(adapter)))


def repair_of(adapter: Path, base_dir: Path) -> Repair:
    return plan_repair(read_checkpoint(adapter), base_from(base_dir), base_dir)


def repaired(adapter: Path, base_dir: Path, out: Path) -> tuple[list[str], Verdict]:
    """The codes of what was repaired, and the gate's verdict on it."""
    repair = repair_of(adapter, base_dir)
    out.mkdir()
    write_repaired(repair, out)
    verdict = judge(read_checkpoint(out), base_from(base_dir), EngineLimits(64), found=repair.findings)
    return [problem.code for problem in repair.done], verdict


def renamed(adapter: Path, rename: Callable[[str], str]) -> None:
    tensors = safetensors_torch.load_file(adapter / WEIGHTS)
    safetensors_torch.save_file({rename(name): tensor for name, tensor in tensors.items()}, adapter / WEIGHTS)


DRIFTS: dict[str, Callable[[str], str]] = {
    "no_prefix": lambda name: name.removeprefix("base_model.model."),
    "prefix_twice": lambda name: "base_model.model." + name,
    "ddp": lambda name: "module." + name,
    "compiled": lambda name: "_orig_mod." + name,
    "compiled_inside": lambda name: name.replace("self_attn.", "self_attn._orig_mod."),
    "fsdp": lambda name: name.replace(".layers.0.", ".layers.0._fsdp_wrapped_module._checkpoint_wrapped_module."),
    "adapter_name": lambda name: name.replace(".weight", ".default.weight"),
    "language_model_inside": lambda name: name.replace("model.model.layers", "model.model.language_model.layers"),
    "language_model_outside": lambda name: name.replace("model.model.layers", "model.language_model.model.layers"),
    "all_at_once": lambda name: "module._orig_mod." + name.replace(".weight", ".x-1.weight"),
}


@pytest.mark.parametrize("drift", DRIFTS.values(), ids=DRIFTS.keys())
def test_drifted_names_are_put_back_and_every_tensor_is_where_it_was(
    tmp_path: Path, base_dir: Path, drift: Callable[[str], str]
) -> None:
    model = adapted(base_dir, rank_pattern={"model.layers.0.self_attn.q_proj": 3})
    model.save_pretrained(tmp_path / "a")
    before = safetensors_torch.load_file(tmp_path / "a" / WEIGHTS)
    renamed(tmp_path / "a", drift)
    codes, verdict = repaired(tmp_path / "a", base_dir, tmp_path / "out")
    assert (codes, verdict.placement, verdict.reasons) == (["tensors_renamed"], "shared", ())
    after = safetensors_torch.load_file(tmp_path / "out" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert torch.equal(loaded_logits(base_dir, tmp_path / "out"), logits(model))


def test_patterns_and_targets_in_full_move_with_the_tensors(tmp_path: Path, base_dir: Path) -> None:
    model = adapted(base_dir, rank_pattern={"model.layers.0.self_attn.q_proj": 3})
    model.save_pretrained(tmp_path / "a")
    renamed(tmp_path / "a", DRIFTS["language_model_outside"])
    path = tmp_path / "a" / "adapter_config.json"
    config = json.loads(path.read_text())
    config["rank_pattern"] = {"language_model.model.layers.0.self_attn.q_proj": 3}
    config["target_modules"] = r"language_model\..*\.(q|k|v|o|gate|up|down)_proj"
    path.write_text(json.dumps(config))
    _, verdict = repaired(tmp_path / "a", base_dir, tmp_path / "out")
    assert (verdict.placement, verdict.reasons) == ("shared", ())
    assert torch.equal(loaded_logits(base_dir, tmp_path / "out"), logits(model))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda name: name.replace("layers.1", "layers.7"),  # a layer that the base lacks
        lambda name: name.replace("k_proj", "q_proj").replace("v_proj", "q_proj"),  # shapes that do not fit, and twice
        lambda name: name.replace("layers.0", "layers.0.inner"),
        lambda name: name.replace("lora_A", "lora_a"),  # another tool's names, whose rows lie in another order
    ],
)
def test_names_that_cannot_be_told_for_sure_stay_as_they_are(
    tmp_path: Path, base_dir: Path, spoil: Callable[[str], str]
) -> None:
    adapted(base_dir).save_pretrained(tmp_path)
    renamed(tmp_path, lambda name: "module." + spoil(name))
    assert not repair_of(tmp_path, base_dir)


def test_two_adapters_in_one_file_are_not_taken_for_one(tmp_path: Path, base_dir: Path) -> None:
    adapted(base_dir).save_pretrained(tmp_path)
    renamed(tmp_path, lambda name: name.replace(".weight", ".one.weight" if "layers.0" in name else ".two.weight"))
    assert not repair_of(tmp_path, base_dir)


def test_adapter_in_peft_s_own_layout_is_left_alone(tmp_path: Path, base_dir: Path) -> None:
    adapted(base_dir).save_pretrained(tmp_path)
    assert not repair_of(tmp_path, base_dir)


@pytest.mark.parametrize(("trained_in", "tied"), [("float32", False), ("float32", True), ("bfloat16", False)])
def test_base_matrices_beside_an_adapter_on_embeddings_are_left_out(
    tmp_path: Path, trained_in: str, tied: bool
) -> None:
    base_dir = make_base(tmp_path / "base", tie_word_embeddings=tied)
    model = transformers.AutoModelForCausalLM.from_pretrained(base_dir, dtype=getattr(torch, trained_in))
    targets = ["q_proj", "embed_tokens", "lm_head"]
    config = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", ensure_weight_tying=False)
    model = peft.get_peft_model(model, config)
    train(model)
    model.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    assert any("base_layer" in name for name in safetensors_torch.load_file(tmp_path / "a" / WEIGHTS))
    codes, verdict = repaired(tmp_path / "a", base_dir, tmp_path / "out")
    assert (codes, verdict.placement, verdict.reasons) == (["base_matrix_stripped"], "shared", ())
    assert not any("base_layer" in name for name in safetensors_torch.load_file(tmp_path / "out" / WEIGHTS))
    assert torch.equal(loaded_logits(base_dir, tmp_path / "out"), loaded_logits(base_dir, tmp_path / "a")) or (
        trained_in != "float32"
    )


def test_base_matrix_that_differs_stays_and_keeps_the_adapter_off_the_shared_engine(
    tmp_path: Path, base_dir: Path
) -> None:
    model = adapted(base_dir, target_modules=["q_proj", "embed_tokens"])
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    tensors = safetensors_torch.load_file(tmp_path / WEIGHTS)
    (kept,) = [name for name in tensors if "base_layer" in name]
    tensors[kept][3, 5] += 1e-3
    safetensors_torch.save_file(tensors, tmp_path / WEIGHTS)
    repair = repair_of(tmp_path, base_dir)
    assert not repair
    verdict = judge(read_checkpoint(tmp_path), base_from(base_dir), EngineLimits(64), found=repair.findings)
    assert verdict.placement == "dedicated"
    assert verdict.reasons[0].code == "base_matrix_differs"
    assert verdict.reasons[0].where == kept


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
@pytest.mark.parametrize("rslora", [False, True])
def test_conversion_writes_what_peft_s_own_conversion_writes(
    tmp_path: Path, base_dir: Path, init: str, rslora: bool
) -> None:
    settings: dict[str, Any] = {"init_lora_weights": init, "use_rslora": rslora}
    if not rslora:  # PEFT itself does not convert patterns with rsLoRA
        settings |= {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 6}}
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_pretrained(base_dir)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR, task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(model, config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "a" / "initial_adapter")
    model.peft_config["default"].init_lora_weights = init
    train(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "a")
    codes, verdict = repaired(tmp_path / "a", base_dir, tmp_path / "out")
    assert (codes, verdict.placement, verdict.rank) == (["initial_adapter_subtracted"], "shared", 8)
    assert not (tmp_path / "out" / "initial_adapter").exists()
    model.save_pretrained(
        tmp_path / "by_peft", path_initial_model_for_weight_conversion=str(tmp_path / "a" / "initial_adapter")
    )
    ours, theirs = (safetensors_torch.load_file(tmp_path / name / WEIGHTS) for name in ("out", "by_peft"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("out", "by_peft")]
    for setting in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights"):
        assert configs[0][setting] == configs[1][setting], setting
    assert torch.allclose(loaded_logits(base_dir, tmp_path / "out"), expected, atol=1e-5)


def test_conversion_of_a_wide_adapter_is_exact_in_half_precision_too(tmp_path: Path, base_dir: Path) -> None:
    model = adapted(base_dir)
    model.save_pretrained(tmp_path / "a")
    tensors = {n: t.to(torch.bfloat16) for n, t in safetensors_torch.load_file(tmp_path / "a" / WEIGHTS).items()}
    safetensors_torch.save_file(tensors, tmp_path / "a" / WEIGHTS)
    initial = {name: torch.randn(tensor.shape).to(torch.bfloat16) for name, tensor in tensors.items()}
    (tmp_path / "a" / "initial_adapter").mkdir()
    safetensors_torch.save_file(initial, tmp_path / "a" / "initial_adapter" / WEIGHTS)
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": "corda"}))
    codes, _ = repaired(tmp_path / "a", base_dir, tmp_path / "out")
    assert codes == ["initial_adapter_subtracted"]
    for name, tensor in safetensors_torch.load_file(tmp_path / "out" / WEIGHTS).items():
        one, other = tensors[name], initial[name]
        expected = torch.cat([one, other], 0) if "lora_A" in name else torch.cat([one, -other], 1)
        assert torch.equal(tensor, expected)


def test_initial_adapter_that_is_the_trained_one_is_refused_and_so_is_one_of_other_shapes(
    tmp_path: Path, base_dir: Path
) -> None:
    adapted(base_dir).save_pretrained(tmp_path)
    adapted(base_dir).save_pretrained(tmp_path / "pissa_init")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": "pissa"}))
    first = repair_of(tmp_path, base_dir).findings.refusals
    assert [problem.code for problem in first] == ["initial_adapter_unfit"]
    assert "is the trained one" in first[0].message
    adapted(base_dir, r=2).save_pretrained(tmp_path / "pissa_init")
    (second,) = repair_of(tmp_path, base_dir).findings.refusals
    assert "F32 [4, 24], and F32 [2, 24] in the initial adapter" in second.message


def test_pissa_without_its_initial_adapter_and_loftq_say_what_to_upload(tmp_path: Path, base_dir: Path) -> None:
    adapted(base_dir).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    for init, code, way_out in (
        ("pissa", "init_changes_base", "as the folder initial_adapter"),
        ("loftq", "loftq", "publish the full weights"),
    ):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": init}))
        repair = repair_of(tmp_path, base_dir)
        verdict = judge(read_checkpoint(tmp_path), base_from(base_dir), EngineLimits(64), found=repair.findings)
        assert (verdict.placement, verdict.reasons[0].code) == ("rejected", code)
        assert way_out in verdict.reasons[0].fix


def test_same_upload_is_repaired_to_the_same_bytes(tmp_path: Path, base_dir: Path) -> None:
    adapted(base_dir).save_pretrained(tmp_path / "a")
    renamed(tmp_path / "a", DRIFTS["no_prefix"])
    for out in ("one", "two"):
        repaired(tmp_path / "a", base_dir, tmp_path / out)
    for name in (WEIGHTS, "adapter_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_inspect_says_offline_what_would_be_repaired(
    tmp_path: Path, base_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapted(base_dir).save_pretrained(tmp_path)
    renamed(tmp_path, DRIFTS["compiled"])
    assert run(["inspect", str(tmp_path), "--base", str(base_dir)]) == 0
    assert "would repair:   [tensors_renamed] _orig_mod.base_model.model." in capsys.readouterr().out
    assert run(["inspect", str(tmp_path), "--base", str(base_dir), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["placement"], found["repairs"][0]["code"]) == ("shared", "tensors_renamed")
