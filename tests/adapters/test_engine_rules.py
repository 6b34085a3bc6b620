"""The engine's rules, held against the installed vLLM: they must change together."""

import ast
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from loradock_adapters.engine_rules import (
    FEATURES,
    KNOWN_SETTINGS,
    LORA_RANKS,
    MAX_LM_HEAD_VOCAB,
    PLAIN_INITS,
    VLLM_VERSION,
    architecture_rules,
    known_architectures,
    ladder_rank,
)
from loradock_adapters.lora_keys import parse_key
from loradock_adapters.tables.make_engine_rules import dump, make_table, table_path, vllm_root

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.mark.parametrize(
    ("rank", "step"), [(1, 1), (2, 8), (8, 8), (12, 16), (65, 128), (257, 320), (512, 512), (513, None)]
)
def test_ladder_rank_next_step(rank: int, step: int | None) -> None:
    assert ladder_rank(rank) == step


def test_architecture_rules_known_cases() -> None:
    llama = architecture_rules("LlamaForCausalLM")
    assert llama is not None
    assert llama.lora
    assert llama.embedding_modules == {"embed_tokens", "lm_head"}
    gpt2 = architecture_rules("GPT2LMHeadModel")
    assert gpt2 is not None
    assert not gpt2.lora
    qwen2 = architecture_rules("Qwen2ForCausalLM")
    assert qwen2 is not None
    assert (qwen2.lora, qwen2.embedding_modules) == (True, frozenset())
    assert architecture_rules("UnheardOf") is None
    assert len(known_architectures()) > 300


@needs_vllm
def test_table_is_what_the_installed_vllm_says() -> None:
    table = make_table(vllm_root())
    assert table["vllm_version"] == VLLM_VERSION
    assert table_path(VLLM_VERSION).read_text() == dump(table)


@needs_vllm
def test_ranks_and_vocabulary_limit_are_those_of_the_installed_vllm() -> None:
    config = (vllm_root() / "config" / "lora.py").read_text()
    ladder = next(
        node.value
        for node in ast.parse(config).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MaxLoRARanks"
    )
    assert isinstance(ladder, ast.Subscript)
    assert ast.literal_eval(ladder.slice) == LORA_RANKS
    processor = (vllm_root() / "lora" / "layers" / "logits_processor.py").read_text()
    assert f"vocab_size > {MAX_LM_HEAD_VOCAB}" in processor


_PROBE = """
import json, sys
from types import SimpleNamespace
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.utils import is_base_embedding_weights, parse_fine_tuned_lora_name
from vllm.model_executor.models.interfaces import supports_lora
from vllm.model_executor.models import llama, qwen2, qwen3, gpt2, mistral
from vllm.model_executor.models.transformers import TransformersForCausalLM

def legal(settings):
    config = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], **settings}
    try:
        PEFTHelper.from_dict(config).validate_legal(SimpleNamespace(max_lora_rank=16))
    except (ValueError, TypeError) as error:
        return str(error)
    return None

def parsed(name):
    if is_base_embedding_weights(name):
        return "ignored"
    try:
        return parse_fine_tuned_lora_name(name)
    except ValueError:
        return "refused"

classes = [llama.LlamaForCausalLM, qwen2.Qwen2ForCausalLM, qwen3.Qwen3ForCausalLM, gpt2.GPT2LMHeadModel,
           mistral.MistralForCausalLM, TransformersForCausalLM]
print(json.dumps({
    "legal": [legal(settings) for settings in json.loads(sys.argv[1])],
    "parsed": [parsed(name) for name in json.loads(sys.argv[2])],
    "classes": {c.__name__: [bool(supports_lora(c)), sorted(getattr(c, "embedding_modules", {}))] for c in classes},
}))
"""

_REFUSED: list[dict[str, Any]] = [
    {"use_dora": True},
    {"bias": "all"},
    {"lora_bias": True},
    {"modules_to_save": ["lm_head"]},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "olora"},
    {"init_lora_weights": "corda"},
    {"init_lora_weights": "loftq"},
    {"alora_invocation_tokens": [1]},
    {"layer_replication": [[0, 1]]},
    {"use_bdlora": {"nblocks": 2}},
    {"use_qalora": True},
    {"r": 17},
    {"rank_pattern": {"q_proj": 17}},
    {"rank_pattern": {"q_proj": 0}},
    {"r": 0},
]
_ACCEPTED: list[dict[str, Any]] = [
    {},
    {"r": 12},
    {"use_rslora": True},
    {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 1.5}},
    {"init_lora_weights": False},
    *({"init_lora_weights": init} for init in sorted(PLAIN_INITS)),
]


_Q = "model.layers.0.self_attn.q_proj"
_TENSORS = [
    f"base_model.model.{_Q}.lora_A.weight",
    f"base_model.model.{_Q}.lora_B.weight",
    f"{_Q}.lora_B.weight",
    "base_model.model.model.embed_tokens.lora_embedding_A",
    "base_model.model.model.embed_tokens.lora_embedding_B",
    "base_model.model.lm_head.lora_A.weight",
    "base_model.model.model.embed_tokens.base_layer.weight",
    "base_model.model.lm_head.base_layer.weight",
    f"base_model.model.{_Q}.base_layer.weight",
    f"base_model.model.{_Q}.lora_A.default.weight",
    f"base_model.model.{_Q}.lora_magnitude_vector",
    f"base_model.model.{_Q}.lora_B.bias",
    f"base_model.model.{_Q}.bias",
    "base_model.model.lm_head.weight",
    "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
]


@needs_vllm
def test_features_and_tensor_names_are_taken_as_by_the_installed_vllm() -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _PROBE, json.dumps([*_REFUSED, *_ACCEPTED]), json.dumps(_TENSORS)],
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    found = json.loads(ran.stdout.splitlines()[-1])
    refused, accepted = found["legal"][: len(_REFUSED)], found["legal"][len(_REFUSED) :]
    assert all(refused), [settings for settings, message in zip(_REFUSED, refused, strict=True) if not message]
    assert not any(accepted), accepted
    for settings in _REFUSED[:12]:
        ((setting, value),) = settings.items()
        assert any(feature.used(value) for feature in FEATURES if feature.setting == setting)
    for tensor, engine in zip(_TENSORS, found["parsed"], strict=True):
        key = parse_key(tensor)
        if key.part in ("A", "B", "embedding_A", "embedding_B"):
            assert engine == [key.module, key.part.endswith("A")]
        else:
            of_embedding = tensor.endswith(("embed_tokens.base_layer.weight", "lm_head.base_layer.weight"))
            assert engine == ("ignored" if of_embedding else "refused")
    for name, (lora, embeddings) in found["classes"].items():
        rules = architecture_rules(name)
        assert rules is not None
        assert (rules.lora, sorted(rules.embedding_modules)) == (lora, embeddings if lora else [])


def test_settings_are_those_of_the_installed_peft() -> None:
    spec = find_spec("peft")
    assert spec is not None, "the locks bring PEFT"
    assert spec.origin is not None
    tree = ast.parse((Path(spec.origin).parent / "tuners" / "lora" / "config.py").read_text())
    cls = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "LoraConfig")
    fields = {
        node.target.id for node in cls.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert fields <= KNOWN_SETTINGS
