"""Adapters rewritten for an engine: the values are those that torch would make, and lie where they can be mapped."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from loradock_adapters.errors import HeaderError
from loradock_adapters.safetensors_header import read_header
from loradock_serve.packed_file import CONFIG, TRANSPOSED, WEIGHTS, NotPackableError, Recipe, is_whole, sync
from loradock_testing.three_layers import DOWN, EMBED, Q, adapter_at, tensors

TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def packed(source: Path, target: Path, dtype: str) -> dict[str, torch.Tensor]:
    target.mkdir()
    Recipe(source, dtype).write(target)
    return load_file(target / WEIGHTS)


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("stored", TORCH)
def test_values_are_those_of_torch_bit_for_bit(tmp_path: Path, stored: str, dtype: str) -> None:
    saved = tensors(TORCH[stored])
    source = adapter_at(tmp_path / "a", saved, lora_alpha=11)  # 11/8 is not exact in 16 bits' products

    found = packed(source, tmp_path / "packed", dtype)

    assert found.keys() == saved.keys()
    for name, tensor in saved.items():
        expected = tensor.to(TORCH[dtype])
        if "_B" in name:
            expected *= 11 / 8
        assert torch.equal(found[name], expected), name


@pytest.mark.parametrize(
    ("config", "scalings"),
    [
        ({}, (2.0, 2.0, 2.0)),
        ({"use_rslora": True}, (16 / 8**0.5,) * 3),
        ({"rank_pattern": {"down_proj": 4}}, (2.0, 4.0, 2.0)),
        ({"alpha_pattern": {"layers.0.mlp.down_proj": 2.5}}, (2.0, 2.5 / 8, 2.0)),
        ({"rank_pattern": {r".*mlp\.\w+": 4}, "alpha_pattern": {"q_proj": 4, "down_proj": 1}}, (0.5, 0.25, 2.0)),
        ({"rank_pattern": None, "alpha_pattern": None, "lora_alpha": 8}, (1.0, 1.0, 1.0)),
    ],
)
def test_scaling_moves_from_the_config_into_the_values(
    tmp_path: Path, config: dict[str, Any], scalings: tuple[float, ...]
) -> None:
    found = packed(adapter_at(tmp_path / "a", **config), tmp_path / "packed", "float32")

    written = json.loads((tmp_path / "packed" / CONFIG).read_text())
    ranks = written.get("rank_pattern") or {}
    assert (written["lora_alpha"], written["use_rslora"], written["alpha_pattern"]) == (8, False, ranks)
    assert written["target_modules"] == ["q_proj", "down_proj"]  # whatever else it says stays
    parts = ("lora_B.weight", "lora_B.weight", "lora_embedding_B")
    for module, part, scaling in zip((Q, DOWN, EMBED), parts, scalings, strict=True):
        name = f"base_model.model.{module}.{part}"
        assert torch.equal(found[name], tensors()[name] * scaling), module


@pytest.mark.parametrize("dtype", TORCH)
def test_form_for_slots_on_cpu_has_the_same_values_with_bs_transposed(tmp_path: Path, dtype: str) -> None:
    source = adapter_at(tmp_path / "a", lora_alpha=11)

    plain, turned = packed(source, tmp_path / "plain", dtype), packed(source, tmp_path / "turned", f"{dtype}-cpu")

    assert plain.keys() == turned.keys()
    for name, tensor in plain.items():
        assert torch.equal(turned[name], tensor.T if "_B" in name else tensor), name
    for place, metadata in (("plain", None), ("turned", TRANSPOSED)):
        with safe_open(tmp_path / place / WEIGHTS, framework="pt") as file:
            assert file.metadata() == metadata


def test_tensors_begin_on_a_page_and_lie_aligned(tmp_path: Path) -> None:
    packed(adapter_at(tmp_path / "a"), tmp_path / "packed", "bfloat16")

    header = read_header(tmp_path / "packed" / WEIGHTS)
    (length,) = struct.unpack("<Q", (tmp_path / "packed" / WEIGHTS).read_bytes()[:8])
    assert (8 + length) % 4096 == 0
    begins = sorted((tensor.offsets[0], tensor.size_bytes) for tensor in header.values())
    assert begins[0][0] == 8 + length
    odd = [size for _, size in begins if size % 64]
    assert odd
    assert all(begin % 64 == 0 for begin, _ in begins[: len(begins) - len(odd) + 1])


def test_adapter_that_would_not_change_needs_no_packing(tmp_path: Path) -> None:
    as_it_is = adapter_at(tmp_path / "a", tensors(torch.bfloat16), lora_alpha=8)

    assert not Recipe(as_it_is, "bfloat16").is_needed
    assert Recipe(as_it_is, "float16").is_needed
    assert Recipe(as_it_is, "bfloat16-cpu").is_needed
    assert Recipe(adapter_at(tmp_path / "b", tensors(torch.bfloat16), lora_alpha=4), "bfloat16").is_needed


@pytest.mark.parametrize(
    "extra",
    [
        {"base_model.model.score.weight": torch.ones(2, 2)},
        {"base_model.model.model.layers.0.mlp.experts.lora_A.weight": torch.ones(2, 2)},
        {f"base_model.model.{Q}.lora_magnitude_vector": torch.ones(2)},
        {f"base_model.model.{Q}.lora_A.weight": torch.ones(8, 8, dtype=torch.float64)},
    ],
)
def test_adapter_of_another_kind_is_left_alone(tmp_path: Path, extra: dict[str, torch.Tensor]) -> None:
    source = adapter_at(tmp_path / "a", tensors() | extra)

    with pytest.raises(NotPackableError):
        Recipe(source, "float32")


def test_source_that_was_cut_off_is_never_written(tmp_path: Path) -> None:
    source = adapter_at(tmp_path / "a")
    recipe = Recipe(source, "float32")
    weights = source / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-4])

    with pytest.raises(HeaderError):
        Recipe(source, "float32")
    (tmp_path / "packed").mkdir()
    with pytest.raises(ValueError, match="4 bytes of a tensor are missing"):
        recipe.write(tmp_path / "packed")


def test_damaged_directory_is_not_whole(tmp_path: Path) -> None:
    packed(adapter_at(tmp_path / "a"), tmp_path / "packed", "float32")
    weights, config = tmp_path / "packed" / WEIGHTS, tmp_path / "packed" / CONFIG
    whole, text = weights.read_bytes(), config.read_text()

    assert not is_whole(tmp_path / "packed")
    sync(tmp_path / "packed")
    assert is_whole(tmp_path / "packed")
    weights.write_bytes(whole[:-1])
    assert not is_whole(tmp_path / "packed")
    weights.write_bytes(whole)
    config.write_text(text[:20])
    assert not is_whole(tmp_path / "packed")
    config.unlink()
    assert not is_whole(tmp_path / "packed")
