"""Merging and exporting: the same answers, the right base, and files that other tools load."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from loradock_adapters.checkpoint import read_checkpoint
from loradock_adapters.cli import run as command
from loradock_adapters.errors import RefusedError, UsageError
from loradock_adapters.passport import read_passport, weights_sha256
from loradock_testing.tiny_models import ALL_MODULES, make_adapter, make_llama, reference
from loradock_train import merging_proof, train
from loradock_train.errors import ModelError, OutputError, ProofError
from loradock_train.merging import export_checkpoint, merge
from loradock_train.proof import probe_logits

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
PROMPTS = ["import return", "while yield", "class lambda"]


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run with a passport, on the whole list of modules."""
    folder = tmp_path_factory.mktemp("run")
    rows = [{"prompt": f"def f{i}():", "completion": f" return {i}"} for i in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model_id": str(base), "train_path": str(folder / "rows.jsonl"), "context_length": 64, "max_steps": 3,
        "learning_rate": 1e-2, "mixed_precision": "no", "lora_config": {"r": 4, "target_modules": list(ALL_MODULES)},
    }  # fmt: skip
    return train(config, output=folder / "lora").directory


def test_merged_run_answers_as_base_and_adapter_do(run: Path, base: Path, tmp_path: Path) -> None:
    made = merge(run, tmp_path / "merged")
    assert made["how"] == "tensor by tensor"
    assert made["changed"] == 2 * 7 + 2
    assert made["proof"]["difference"] < 1e-3 < made["proof"]["from_base"]
    truth = reference(base, run / "checkpoint", PROMPTS, 12)
    for ours, theirs in zip(reference(tmp_path / "merged", None, PROMPTS, 12), truth, strict=True):
        assert not theirs.is_contradicted_by(ours.tokens)


def test_merged_model_has_tokenizer_template_and_a_passport_of_its_own(run: Path, base: Path, tmp_path: Path) -> None:
    merge(run, tmp_path / "merged", base=str(base))
    checkpoint = read_checkpoint(tmp_path / "merged")
    assert (checkpoint.kind, checkpoint.problems) == ("full", ())
    passport, own = read_passport(tmp_path / "merged"), read_passport(run / "checkpoint")
    assert passport is not None
    assert own is not None
    assert passport.probe is not None
    assert own.probe is not None
    assert passport.base == own.base
    assert passport.base.weights_sha256 == weights_sha256(base)
    assert passport.data_sha256 == own.data_sha256
    assert passport.metrics["merged_adapter"] == "checkpoint"
    assert [p.prompt_token_ids for p in passport.probe.prompts] == [p.prompt_token_ids for p in own.probe.prompts]
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == checkpoint.chat_template


def test_merge_into_bfloat16_is_within_rounding_and_half_the_size(run: Path, tmp_path: Path) -> None:
    made = merge(run, tmp_path / "half", dtype="bfloat16")
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert made["bytes"] == sum(tensor.numel() * 2 for tensor in tensors.values())
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert made["proof"]["difference"] > 0


def test_dry_run_counts_and_writes_nothing(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["merge", str(run), str(tmp_path / "merged"), "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "nothing was written\n"
    assert "16 of 21 tensors changed" in printed.err
    assert not (tmp_path / "merged").exists()


def test_another_base_is_refused_with_both_hashes(run: Path, tmp_path: Path) -> None:
    other = make_llama(tmp_path / "other", seed=5)
    with pytest.raises(ModelError, match=r"trained on another base: its passport names .* weights [0-9a-f]{12}…"):
        merge(run, tmp_path / "merged", base=str(other))
    assert command(["merge", str(run), str(tmp_path / "merged"), "--base", str(other)]) == 2


def test_quantised_base_is_refused(base: Path, tmp_path: Path) -> None:
    quantised = make_llama(tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    adapter = make_adapter(tmp_path / "adapter", quantised, 1)
    (quantised / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"is quantised \(bitsandbytes\).*unquantised"):
        merge(adapter, tmp_path / "merged", base=str(quantised))


def test_adapter_that_does_not_fit_is_refused_by_the_gate(tmp_path: Path, base: Path) -> None:
    wide = make_llama(tmp_path / "wide", hidden=128)
    with pytest.raises(RefusedError, match=r"\b(64|128)\b"):
        merge(make_adapter(tmp_path / "adapter", wide, 1), tmp_path / "merged", base=str(base))


def test_merge_that_answers_otherwise_is_not_kept(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = probe_logits
    calls: list[int] = []

    def drifting(model: Any, prompts: Any) -> torch.Tensor:
        calls.append(1)
        return real(model, prompts) + (0.5 if len(calls) == 3 else 0.0)

    monkeypatch.setattr(merging_proof, "probe_logits", drifting)
    with pytest.raises(ProofError, match=r"0\.5 logits apart, at most 0\.0\d+ is rounding"):
        merge(run, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_full_model_and_a_directory_that_is_there_are_refused(run: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="full model already"):
        merge(base, tmp_path / "merged")
    with pytest.raises(OutputError, match="is there already"):
        merge(run, tmp_path)
    with pytest.raises(UsageError, match="float8"):
        merge(run, tmp_path / "merged", dtype="float8")


# ---- export ---------------------------------------------------------------------------------------------------------


def test_exported_adapter_has_no_base_matrix_and_loads_elsewhere(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, 3, target_modules=ALL_MODULES)
    truth = reference(base, adapter, PROMPTS, 8)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.lm_head.base_layer.weight"] = torch.zeros(512, 64)
    save_file(tensors, path, metadata={"format": "pt"})
    made = export_checkpoint(adapter, tmp_path / "out", base_name="org/base")
    assert (made["left_out"], made["base"]) == (1, "org/base")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    assert load_file(tmp_path / "out" / "adapter_model.safetensors").keys() == tensors.keys() - {
        "base_model.model.lm_head.base_layer.weight"
    }
    for ours, theirs in zip(reference(base, tmp_path / "out", PROMPTS, 8), truth, strict=True):
        assert not theirs.is_contradicted_by(ours.tokens)


def test_export_merged_is_bfloat16_in_files_of_the_size_asked_for(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert command(["export", str(run), str(out), "--format", "merged", "--shard-gb", "0.00007", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    files = sorted(out.glob("*.safetensors"))
    assert made["files"] == len(files) > 1
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(file.stat().st_size < 80_000 for file in files)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == made["bytes"]
    model: Any = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert next(model.parameters()).dtype == torch.bfloat16


def test_full_run_is_exported_merged_by_itself_and_never_as_an_adapter(base: Path, tmp_path: Path) -> None:
    made = export_checkpoint(base, tmp_path / "out", dtype="float32")
    assert made["changed"] == 0
    ours, theirs = load_file(tmp_path / "out" / "model.safetensors"), load_file(base / "model.safetensors")
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    with pytest.raises(UsageError, match="loradock extract"):
        export_checkpoint(base, tmp_path / "adapter", form="peft")


def test_other_formats_are_refused_with_the_way_there(run: Path, tmp_path: Path) -> None:
    assert command(["export", str(run), str(tmp_path / "out"), "--format", "gguf"]) == 2
