"""A full fine-tune's change as an adapter: found again where it is of low rank, refused where it is not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from loradock_adapters.base import base_from
from loradock_adapters.checkpoint import read_checkpoint
from loradock_adapters.cli import run
from loradock_adapters.gate import EngineLimits, judge
from loradock_adapters.passport import weights_sha256
from loradock_testing.tiny_models import make_llama, reference
from loradock_train import extract as module
from loradock_train.errors import ExtractError, OutputError
from loradock_train.extract_run import extract_to

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
RANK = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("bases") / "base")


def fine_tune(base: Path, directory: Path, change: Callable[[str, Tensor], Tensor]) -> Path:
    """A copy of the base with changed tensors."""
    directory.mkdir()
    for path in base.iterdir():
        if path.name != "model.safetensors":
            (directory / path.name).write_bytes(path.read_bytes())
    tensors = load_file(base / "model.safetensors")
    torch.manual_seed(7)
    changed = {name: change(name, tensor).contiguous() for name, tensor in tensors.items()}
    save_file(changed, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def low_rank(name: str, tensor: Tensor) -> Tensor:
    """Rank 6 on every linear layer, about as large as the layer itself."""
    if "_proj" not in name:
        return tensor
    out, inner = tensor.shape
    delta: Tensor = torch.randn(out, RANK) @ torch.randn(RANK, inner)
    scale = float(tensor.std()) * 0.5 / RANK**0.5
    changed: Tensor = tensor + delta * scale
    return changed


def extracted(full: Path, base: Path, out: Path, rank: int = 8, **options: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"max_error": 0.1, "drop": [], "dtype": "float32", **options}
    return extract_to(full, str(base), rank, out, **settings)


def test_low_rank_change_is_found_again_and_answers_as_the_fine_tune(tmp_path: Path, base: Path) -> None:
    full = fine_tune(base, tmp_path / "full", low_rank)
    found = extracted(full, base, tmp_path / "out")
    assert len(found["layers"]) == 14
    assert all(layer["error"] < 1e-5 and layer["needed_rank"] <= RANK for layer in found["layers"])
    model = AutoModelForCausalLM.from_pretrained(base)
    merged = PeftModel.from_pretrained(model, str(tmp_path / "out")).merge_and_unload().state_dict()
    for name, tensor in load_file(full / "model.safetensors").items():
        assert torch.allclose(merged[name], tensor, atol=1e-5), name
    prompts = ["import return", "while yield", "class lambda"]
    for ours, theirs in zip(
        reference(base, tmp_path / "out", prompts, 12), reference(full, None, prompts, 12), strict=True
    ):
        assert not theirs.is_contradicted_by(ours.tokens)


def test_adapter_passes_the_gate_and_has_a_passport(tmp_path: Path, base: Path) -> None:
    full = fine_tune(base, tmp_path / "full", low_rank)
    extracted(full, base, tmp_path / "out", dtype="bfloat16", max_error=0.1)
    checkpoint = read_checkpoint(tmp_path / "out")
    verdict = judge(checkpoint, base_from(base), EngineLimits(64))
    assert (verdict.placement, verdict.rank, verdict.reasons) == ("shared", 8, ())
    assert {info.dtype for info in checkpoint.tensors.values()} == {"BF16"}
    assert checkpoint.passport is not None
    assert checkpoint.passport.base.weights_sha256 == weights_sha256(base)
    assert len(checkpoint.config["target_modules"]) == 7


def test_change_of_full_rank_is_refused_with_the_rank_that_would_do(tmp_path: Path, base: Path) -> None:
    full = fine_tune(base, tmp_path / "full", lambda _name, tensor: tensor + _noise(tensor))
    with pytest.raises(
        ExtractError, match=r"relative error 0\.\d+ is over --max-error 0\.1.*rank \d+ would do"
    ) as error:
        extracted(full, base, tmp_path / "out", drop=["norms", "embeddings"])
    assert len(error.value.problems) == 1
    assert not (tmp_path / "out").exists()
    kept = extracted(full, base, tmp_path / "out", rank=64, max_error=1e-4, drop=["norms", "embeddings"])
    assert kept["worst"]["error"] < 1e-4


def _noise(tensor: Tensor) -> Tensor:
    return torch.randn_like(tensor) * 0.01 if tensor.ndim == 2 else torch.randn_like(tensor) * 0.001


def test_changed_norms_and_embeddings_are_named_and_only_dropped_when_told(tmp_path: Path, base: Path) -> None:
    def change(name: str, tensor: Tensor) -> Tensor:
        return low_rank(name, tensor) + (0.01 if "layernorm" in name or "embed" in name else 0.0)

    full = fine_tune(base, tmp_path / "full", change)
    with pytest.raises(ExtractError) as error:
        extracted(full, base, tmp_path / "out")
    assert "--drop embeddings" in str(error.value)
    assert "4 changed norms" in str(error.value)
    found = extracted(full, base, tmp_path / "out", drop=["embeddings", "norms"])
    assert {kind: len(names) for kind, names in found["lost"].items()} == {"embeddings": 1, "norms": 4}


def test_only_layers_that_changed_are_in_the_adapter_and_small_ones_have_their_own_rank(
    tmp_path: Path, base: Path
) -> None:
    def change(name: str, tensor: Tensor) -> Tensor:
        return tensor + _noise(tensor) if "layers.1.self_attn.k_proj" in name else tensor

    full = fine_tune(base, tmp_path / "full", change)
    extracted(full, base, tmp_path / "out", rank=64)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.self_attn.k_proj"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {"model.layers.1.self_attn.k_proj": 32}
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "out"))
    merged = model.merge_and_unload().state_dict()
    name = "model.layers.1.self_attn.k_proj.weight"
    assert torch.allclose(merged[name], load_file(full / "model.safetensors")[name], atol=1e-5)


def test_untied_output_matrix_of_a_tied_base_is_not_lost_in_silence(tmp_path: Path) -> None:
    tied = make_llama(tmp_path / "tied", tied=True)
    full = fine_tune(tied, tmp_path / "full", low_rank)
    path = full / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 1.5
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ExtractError, match=r"lm_head\.weight: 1 changed embeddings"):
        extracted(full, tied, tmp_path / "out")


def test_model_of_another_architecture_and_one_that_did_not_change_are_refused(tmp_path: Path, base: Path) -> None:
    other = make_llama(tmp_path / "other", layers=1)
    with pytest.raises(ExtractError, match="not of one architecture: the fine-tune lacks"):
        extracted(other, base, tmp_path / "out")
    with pytest.raises(ExtractError, match="nothing to extract"):
        extracted(fine_tune(base, tmp_path / "same", lambda _, tensor: tensor), base, tmp_path / "out")


def test_randomised_svd_of_a_large_layer_is_as_good_as_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    difference = torch.randn(96, 4) @ torch.randn(4, 160) + torch.randn(96, 160) * 1e-3
    b, a, values = module.truncated_svd(difference, 4)
    exact = float((difference - b @ a).norm())
    assert values is not None
    monkeypatch.setattr(module, "EXACT_UP_TO", 16)
    b, a, values = module.truncated_svd(difference, 4)
    assert values is None
    assert float((difference - b @ a).norm()) < exact * 1.01


def test_command_prints_each_layer_and_writes_beside_the_fine_tune(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = fine_tune(base, tmp_path / "full", low_rank)
    assert run(["extract", str(full), "--base", str(base), "--rank", "8"]) == 0
    printed = capsys.readouterr().out
    assert "model.layers.1.mlp.down_proj" in printed
    assert printed.splitlines()[-1].endswith("full-r8")
    assert (tmp_path / "full-r8" / "adapter_model.safetensors").is_file()
    with pytest.raises(OutputError):
        extract_to(full, str(base), 8, None, max_error=0.1, drop=[], dtype="float32")
    assert run(["extract", str(full), "--base", str(base), "--rank", "2", "--out", str(tmp_path / "x"), "--json"]) == 1
    assert run(["extract", str(full), "--base", str(base), "--rank", "8", "--drop", "everything"]) == 2
