"""`loradock inspect` of an adapter of 100 MB takes under a second, Python included, with numpy or without."""

import sys
from pathlib import Path
from typing import Any

import pytest

from loradock_adapters.base_shapes import derived_modules
from loradock_testing.checkpoints import PREFIX, lora_config, safetensors_bytes, write_json
from loradock_testing.processor import require_cheap

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "tie_word_embeddings": True,
}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 33
ONE = b"\x00\x3c"
WITHOUT_NUMPY = "import sys; sys.modules['numpy'] = None; from loradock_adapters.cli import main; main()"
WITH_NUMPY = "from loradock_adapters.cli import main; main()"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base's config, and an adapter of rank 33 in float16 on all its linear layers."""
    root = tmp_path_factory.mktemp("large")
    (root / "base").mkdir()
    (root / "adapter").mkdir()
    write_json(root / "base" / "config.json", BASE)
    write_json(root / "adapter" / "adapter_config.json", lora_config(RANK, TARGETS))
    tensors = {}
    for module, (out_features, in_features) in derived_modules(BASE).items():
        if module.endswith(TARGETS):
            tensors[f"{PREFIX}{module}.lora_A.weight"] = ("F16", (RANK, in_features), ONE * RANK * in_features)
            tensors[f"{PREFIX}{module}.lora_B.weight"] = ("F16", (out_features, RANK), ONE * RANK * out_features)
    raw = safetensors_bytes(tensors)
    assert len(raw) > 100_000_000
    (root / "adapter" / "adapter_model.safetensors").write_bytes(raw)
    return root


@pytest.mark.parametrize("program", [WITH_NUMPY, WITHOUT_NUMPY], ids=["numpy", "light"])
def test_inspect_of_100_mb_takes_less_than_a_second(large: Path, program: str) -> None:
    arguments = ["inspect", str(large / "adapter"), "--base", str(large / "base")]
    assert "shared" in require_cheap([sys.executable, "-c", program, *arguments], most_s=1.0)
