"""From scratch: architectures by name, recipes with what they promise, samples on the way, a warning of little data."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from loradock_adapters.strict_config import read_yaml
from loradock_testing.rows import WriteRows
from loradock_train import train
from loradock_train.architectures import ARCHITECTURES
from loradock_train.config import TrainConfig
from loradock_train.errors import ConfigError
from loradock_train.results import few_tokens, result_lines
from loradock_train.samples import keep_samples

RECIPES = Path(__file__).resolve().parents[2] / "train" / "recipes"
COUNTS = {
    "gpt2-small": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-small-6-layers": 81_912_576,
}
TEXTS = [{"text": f"def function_{i}(value):\n    return value + {i}\n"} for i in range(40)]


@pytest.mark.parametrize("name", COUNTS)
def test_named_architecture_has_the_parameters_of_the_paper(name: str) -> None:
    fields = dict(ARCHITECTURES[name])
    fields.pop("model_type")
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(vocab_size=50257, **fields))  # type: ignore[no-untyped-call]
    assert sum(parameter.numel() for parameter in model.parameters()) == COUNTS[name]


def test_fields_beside_a_name_win_and_an_unknown_name_is_told_the_nearest(tmp_path: Path) -> None:
    scratch = {"tokenizer": {"train_vocab_size": 300}, "train_path": ("x",)}
    config = TrainConfig.model_validate({"model": {"name": "gpt2-small", "n_layer": 6}, **scratch})
    assert config.model == ARCHITECTURES["gpt2-small-6-layers"]
    with pytest.raises(ConfigError, match=r"model: unknown architecture 'gpt2-smal'; did you mean gpt2-small\?"):
        train({"model": {"name": "gpt2-smal"}, **scratch}, output=tmp_path / "run")


@pytest.mark.parametrize(("name", "loss"), [("gpt2-small", 3.2), ("gpt2-medium", 2.8), ("gpt2-large", 2.5)])
def test_recipe_fits_the_schema_and_says_what_is_expected(name: str, loss: float) -> None:
    config = TrainConfig.model_validate(read_yaml(RECIPES / f"{name}.yaml"))
    assert (config.kind, config.streaming, config.model) == ("scratch", True, ARCHITECTURES[name])
    assert config.expected is not None
    assert config.expected.loss == loss
    summary = {"final_eval_loss": None, "final_train_loss": 3.5, "train_seconds": 7200.0, "tokens": 10**9}
    mine, wanted = result_lines(config, summary)
    assert mine == "final training loss 3.5000, perplexity 33.12"
    assert wanted.startswith(f"expected: loss {loss:g}, perplexity {config.expected.perplexity:g} in ")
    assert wanted.endswith("this run took 2.00 h for 1,000,000,000 tokens")


def test_little_data_is_warned_of_with_its_count() -> None:
    scratch = TrainConfig.model_validate(
        {"model": {"name": "gpt2-small"}, "tokenizer": {"train_vocab_size": 300}, "train_path": ("x",)}
    )
    (told,) = few_tokens(scratch, 999_999, True)
    assert "train_path has 999,999 tokens: under 1,000,000" in told
    assert "lora_config" in told
    assert few_tokens(scratch, 1_000_000, True) == few_tokens(scratch, 5, False) == []
    assert few_tokens(TrainConfig(model_id="x", train_path=("x",)), 5, True) == []


@pytest.fixture
def options(write_rows: WriteRows) -> dict[str, Any]:
    text = str(write_rows("text.jsonl", TEXTS))
    return {
        "model": {"name": "gpt2-small", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
        "tokenizer": {"train_vocab_size": 300}, "train_path": text, "valid_path": text, "context_length": 32,
        "max_steps": 6, "eval_steps": 3, "learning_rate": 1e-2, "mixed_precision": "no", "save_steps": 2,
        "train_batch_size_per_device": 2,
    }  # fmt: skip


def test_samples_are_written_on_the_way_and_change_no_bit(options: dict[str, Any], tmp_path: Path) -> None:
    plain = train(options, output=tmp_path / "plain")
    samples = {"prompts": ["def function_", "x" * 90], "every_steps": 4, "max_tokens": 8}
    screen = Console(file=io.StringIO(), width=300)
    run = train({**options, "samples": samples}, output=tmp_path / "run", console=screen)
    lines = [json.loads(line) for line in (run.directory / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["prompt"][:3]) for line in lines] == [(4, "def"), (4, "xxx"), (6, "def"), (6, "xxx")]
    ours, theirs = (load_file(each.checkpoint / "model.safetensors") for each in (run, plain))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    tokenizer_and_text = generated(run.checkpoint, "def function_", 8)
    assert lines[2]["text"] == tokenizer_and_text
    assert isinstance(screen.file, io.StringIO)
    shown = screen.file.getvalue()
    assert "step 6: 'def function_' … " in shown
    assert "step 3: validation loss " in shown
    assert "final validation loss " in shown
    assert any("under 1,000,000" in notice for notice in run.summary["notices"])
    assert run.summary["final_perplexity"] > 1


def generated(checkpoint: Path, prompt: str, max_tokens: int) -> str:
    from transformers import AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
    row = tokenizer(prompt, return_tensors="pt")
    made = model.generate(**row, max_new_tokens=max_tokens, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(made[0, row["input_ids"].shape[1] :], skip_special_tokens=True))


def test_samples_after_the_save_are_left_out_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"st')
    keep_samples(path, 4)
    assert path.read_text() == '{"step": 2}\n{"step": 4}\n'
