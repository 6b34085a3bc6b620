"""Merging tensor by tensor gives what PEFT's adapter computes, for every kind that it claims to know."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loradock_adapters import merge_stream
from loradock_adapters.checkpoint import read_checkpoint
from loradock_adapters.merge_plan import NotPlainError, plan_merge
from loradock_serve import merge as merging

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
safetensors_torch = pytest.importorskip("safetensors.torch")

pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore::UserWarning", "ignore::FutureWarning")

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ALL = [*LINEAR, "embed_tokens", "lm_head"]


@pytest.fixture(autouse=True)
def unbounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process goes on after the merge; and blocks so small that every matrix takes several."""
    monkeypatch.setattr(merging, "_bound_memory", lambda _limit: None)
    monkeypatch.setattr(merge_stream, "BLOCK_BYTES", 700)


def make_base(directory: Path, dtype: str = "float32", max_shard_size: str = "1GB", **changes: Any) -> Path:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 40, "tie_word_embeddings": False, **changes}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, bos_token_id=1, eos_token_id=2)
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data.normal_(1.0, 0.1)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    (directory / "tokenizer.json").write_text('{"of": "the base"}')
    return directory


def adapt(base_dir: Path, directory: Path, vocab_size: int | None = None, **settings: Any) -> Path:
    """Everything that the settings make trainable is moved."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(base_dir, dtype="auto")
    if vocab_size is not None:
        model.resize_token_embeddings(vocab_size)
    config = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "task_type": "CAUSAL_LM", **settings}
    model = peft.get_peft_model(model, peft.LoraConfig(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory, save_embedding_layers=False)
    return directory


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(36).reshape(3, 12)).logits.float()


def by_peft(base_dir: Path, adapter: Path, vocab_size: int | None = None) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    if vocab_size is not None:
        model.resize_token_embeddings(vocab_size)
    return peft.PeftModel.from_pretrained(model, str(adapter))


def merged(base_dir: Path, adapter: Path, out: Path) -> Any:
    plan_merge(base_dir, read_checkpoint(adapter))  # no falling back
    merging.merge(str(base_dir), adapter, out)
    return transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)


KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, r"layers\.1.*v_proj": 3}, "alpha_pattern": {"layers.0.mlp.up_proj": 3}},
    "embedding_and_head": {"target_modules": ALL},
    "dora": {"use_dora": True},
    "dora_rslora": {"use_dora": True, "use_rslora": True, "alpha_pattern": {"k_proj": 3}},
    "dora_embedding": {"target_modules": ALL, "use_dora": True},
    "fan_in_fan_out_is_peft_s_to_correct": {"fan_in_fan_out": True},
    "modules_to_save": {"modules_to_save": ["lm_head", "norm"]},
    "embeddings_to_save": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "bias": {"bias": "all"},
    "bias_lora_only": {"bias": "lora_only", "use_dora": True},
    "lora_bias": {"lora_bias": True},
    "tokens": {"trainable_token_indices": {"embed_tokens": [3, 7, 39]}},
    "over_rank": {"r": 128, "lora_alpha": 32},
}


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS.keys())
def test_merged_weights_are_those_of_peft_s_own_merge(tmp_path: Path, settings: dict[str, Any]) -> None:
    base_dir = make_base(tmp_path / "base", attention_bias=True, mlp_bias=True, max_shard_size="8KB")
    assert (base_dir / "model.safetensors.index.json").is_file()
    adapter = adapt(base_dir, tmp_path / "adapter", **settings)
    ours = merged(base_dir, adapter, tmp_path / "out").state_dict()
    original = by_peft(base_dir, adapter)
    expected = logits(original)
    theirs = original.merge_and_unload(safe_merge=True).state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, atol=2e-6, rtol=1e-5), name
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(model), expected, atol=5e-5)
    base = transformers.AutoModelForCausalLM.from_pretrained(base_dir)
    assert not torch.allclose(logits(base), expected, atol=2e-3)


TIED: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "both": {"target_modules": ALL},
    "dora_both": {"target_modules": ALL, "use_dora": True},
    "head_to_save": {"modules_to_save": ["lm_head"]},
    "embedding_to_save": {"modules_to_save": ["embed_tokens"]},
    "tokens": {"trainable_token_indices": [3, 7]},
    "linear": {},
}


@pytest.mark.parametrize("settings", TIED.values(), ids=TIED.keys())
def test_tied_base_is_untied_where_the_adapter_changes_one_of_the_two(tmp_path: Path, settings: dict[str, Any]) -> None:
    """PEFT's own merge is no measure here: what it merges into the one goes into the other, too."""
    base_dir = make_base(tmp_path / "base", tie_word_embeddings=True)
    adapter = adapt(base_dir, tmp_path / "adapter", **settings)
    expected = logits(by_peft(base_dir, adapter))
    assert torch.allclose(logits(merged(base_dir, adapter, tmp_path / "out")), expected, atol=5e-5)
    still_tied = json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    assert still_tied == (settings in (TIED["tokens"], TIED["linear"]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_base_is_rounded_once(tmp_path: Path, dtype: str) -> None:
    base_dir = make_base(tmp_path / "base", dtype)
    adapter = adapt(base_dir, tmp_path / "adapter", target_modules=ALL, use_dora=True)
    merged(base_dir, adapter, tmp_path / "out")
    ours = safetensors_torch.load_file(tmp_path / "out" / "model.safetensors")
    exact = by_peft(base_dir, adapter).merge_and_unload(safe_merge=True).state_dict()
    step = {"bfloat16": 2**-8, "float16": 2**-11}[dtype]
    for name, tensor in ours.items():
        assert str(tensor.dtype) == f"torch.{dtype}"
        assert torch.allclose(tensor.float(), exact[name], rtol=step, atol=1e-6), name


@pytest.mark.parametrize("tied", [False, True])
def test_resized_vocabulary_is_merged_with_its_own_tokenizer(tmp_path: Path, tied: bool) -> None:
    base_dir = make_base(tmp_path / "base", tie_word_embeddings=tied)
    adapter = adapt(base_dir, tmp_path / "adapter", vocab_size=48, modules_to_save=["embed_tokens", "lm_head"])
    (adapter / "tokenizer.json").write_text('{"of": "the adapter"}')
    model = merged(base_dir, adapter, tmp_path / "out")
    assert model.config.vocab_size == 48
    assert torch.allclose(logits(model), logits(by_peft(base_dir, adapter, 48)), atol=5e-5)
    assert "the adapter" in (tmp_path / "out" / "tokenizer.json").read_text()


@pytest.mark.parametrize("prefix", [True, False])
def test_gpt2_keeps_its_matrices_the_other_way_round(tmp_path: Path, prefix: bool) -> None:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 40}
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
    base_dir = tmp_path / "base"
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(base_dir)
    if not prefix:  # as on the hub
        path = base_dir / "model.safetensors"
        tensors = {n.removeprefix("transformer."): t for n, t in safetensors_torch.load_file(path).items()}
        safetensors_torch.save_file(tensors, path, metadata={"format": "pt"})
    targets = ["c_attn", "c_proj", "c_fc"]
    adapter = adapt(base_dir, tmp_path / "adapter", target_modules=targets, fan_in_fan_out=True, use_dora=True)
    expected = logits(by_peft(base_dir, adapter))
    assert torch.allclose(logits(merged(base_dir, adapter, tmp_path / "out")), expected, atol=5e-5)


def test_what_is_not_plain_goes_to_peft_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base_dir = make_base(tmp_path / "base")
    adapter = adapt(base_dir, tmp_path / "adapter", use_dora=True)
    monkeypatch.setattr(merging, "plan_merge", _not_plain)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda _base: _NoTokenizer())
    merging.merge(str(base_dir), adapter, tmp_path / "out")
    assert "merging with PEFT, the base in memory: something new" in capsys.readouterr().out
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(model), logits(by_peft(base_dir, adapter)), atol=5e-5)


def _not_plain(*_: Any) -> None:
    raise NotPlainError("something new")


class _NoTokenizer:
    def save_pretrained(self, _directory: str) -> None:
        pass


@pytest.mark.parametrize("setting", ["ensure_weight_tying", "target_parameters", "layer_replication"])
def test_settings_that_are_not_known_are_not_plain(tmp_path: Path, setting: str) -> None:
    base_dir = make_base(tmp_path / "base")
    adapter = adapt(base_dir, tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {setting: [[0, 1]]}))
    with pytest.raises(NotPlainError, match=setting):
        plan_merge(base_dir, read_checkpoint(adapter))


def test_own_chat_template_and_stop_tokens_come_along(tmp_path: Path) -> None:
    base_dir = make_base(tmp_path / "base")
    adapter = adapt(base_dir, tmp_path / "adapter")
    (adapter / "chat_template.jinja").write_text("mine")
    passport = {"format": 1, "base": {"model_id": "base"}, "stop_token_ids": [2, 17]}
    (adapter / "loradock.json").write_text(json.dumps(passport))
    merging.merge(str(base_dir), adapter, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "mine"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [2, 17]
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"of": "the base"}'
    assert not (tmp_path / "out" / "loradock.json").exists()


def test_merge_that_gives_nan_is_no_merge(tmp_path: Path) -> None:
    base_dir = make_base(tmp_path / "base")
    adapter = adapt(base_dir, tmp_path / "adapter", use_dora=True)
    path = adapter / "adapter_model.safetensors"
    tensors = safetensors_torch.load_file(path)
    name = next(name for name in tensors if "magnitude" in name)
    tensors[name][0] = float("inf")
    safetensors_torch.save_file(tensors, path)
    with pytest.raises(merge_stream.BrokenAdapterError, match="is not finite"):
        merging.merge(str(base_dir), adapter, tmp_path / "out")


def test_memory_of_a_merge_has_an_end(tmp_path: Path) -> None:
    script = (
        "from loradock_serve import merge\nmerge._bound_memory(1 << 30)\n"
        "try:\n    bytearray(2 << 30)\nexcept MemoryError:\n    print('bounded')"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120, check=True
    )
    assert done.stdout.strip() == "bounded"
