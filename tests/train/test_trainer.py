"""The trainer's arithmetic: accumulation, validation, limits."""

import io
import itertools
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from loradock_testing.rows import WriteRows
from loradock_train import progress, train
from loradock_train.errors import LossError

ROWS = [
    {"prompt": f"def f{i}(x" + "y" * (i % 5) + "):", "completion": f" return {i}" + " + x" * (i % 4)} for i in range(12)
]


def options(base: Path, data: Path, **values: Any) -> dict[str, Any]:
    return {
        "model_id": str(base),
        "train_path": str(data),
        "context_length": 128,
        "learning_rate": 1e-2,
        "mixed_precision": "no",
        "logging_steps": 1,
        **values,
    }


def weights(run: Any) -> dict[str, torch.Tensor]:
    return load_file(run.checkpoint / "model.safetensors")


@pytest.mark.parametrize("steps", [1, 3])
def test_accumulating_n_batches_of_one_equals_one_batch_of_n(
    base: Path, tmp_path: Path, write_rows: WriteRows, steps: int
) -> None:
    """Rows have answers of different lengths: averaging per batch, as older trainers did, fails here."""
    data = write_rows("rows.jsonl", ROWS[:4])
    common = options(base, data, max_steps=steps, optim="sgd", group_by_length=False)
    whole = train({**common, "train_batch_size_per_device": 4}, output=tmp_path / "whole")
    parts = train(
        {**common, "train_batch_size_per_device": 1, "gradient_accumulation_steps": 4}, output=tmp_path / "parts"
    )
    ours, theirs = weights(whole), weights(parts)
    moved = 0.0
    for name, tensor in load_file(base / "model.safetensors").items():
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6, msg=name)
        moved = max(moved, float((ours[name] - tensor).abs().max()))
    assert moved > 1e-4
    assert whole.final_train_loss == pytest.approx(parts.final_train_loss, rel=1e-5)


def test_accumulation_with_a_ragged_last_window_equals_the_batch(
    base: Path, tmp_path: Path, write_rows: WriteRows
) -> None:
    data = write_rows("rows.jsonl", ROWS[:6])  # windows of 4 and 2
    common = options(base, data, num_epochs=1, optim="sgd", group_by_length=False)
    whole = train({**common, "train_batch_size_per_device": 4}, output=tmp_path / "whole")
    parts = train(
        {**common, "train_batch_size_per_device": 1, "gradient_accumulation_steps": 4}, output=tmp_path / "parts"
    )
    assert (whole.summary["steps"], parts.summary["steps"]) == (2, 2)
    ours, theirs = weights(whole), weights(parts)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6, msg=name)


def test_validation_loss_is_the_mean_over_all_answer_tokens(base: Path, tmp_path: Path, write_rows: WriteRows) -> None:
    data, valid = write_rows("rows.jsonl", ROWS), write_rows("valid.jsonl", ROWS[:5])
    run = train(
        options(base, data, valid_path=str(valid), max_steps=1, eval_batch_size_per_device=2), output=tmp_path / "run"
    )
    model: Any = AutoModelForCausalLM.from_pretrained(run.checkpoint)
    tokenizer: Any = AutoTokenizer.from_pretrained(run.checkpoint)
    total, count = 0.0, 0
    for row in ROWS[:5]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            logs = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        total -= sum(float(logs[len(prompt) + i - 1, token]) for i, token in enumerate(answer))
        count += len(answer)
    assert run.final_eval_loss == pytest.approx(total / count, rel=1e-4)


def test_time_limit_ends_the_run_and_the_rate_ends_near_zero(
    base: Path, tmp_path: Path, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(ticks) / 1000))  # each look: 1 ms
    run = train(
        options(base, write_rows("rows.jsonl", ROWS), max_time_s=1.0, learning_rate=1e-4), output=tmp_path / "run"
    )
    lines = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    assert run.summary["steps"] > 1
    assert run.summary["train_seconds"] < 1.05
    assert lines[-1]["learning_rate"] < 0.5 * lines[0]["learning_rate"]


def test_metrics_tell_steps_tokens_and_time(base: Path, tmp_path: Path, write_rows: WriteRows) -> None:
    data = write_rows("rows.jsonl", ROWS)
    run = train(options(base, data, num_epochs=2, train_batch_size_per_device=5), output=tmp_path / "run")
    lines = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["tokens"] == run.summary["tokens"] == 2 * run.summary["data"]["train"]["num_tokens"]
    assert lines[-1]["elapsed_s"] >= lines[0]["elapsed_s"] > 0


def test_loss_that_is_no_number_stops_the_run_with_the_likely_cause(
    base: Path, tmp_path: Path, write_rows: WriteRows
) -> None:
    data = write_rows("rows.jsonl", ROWS)
    wild = options(base, data, learning_rate=1e30, optim="sgd", max_grad_norm=0.0, max_steps=20)
    with pytest.raises(LossError, match=r"the loss is (nan|inf) at step \d+; usually the learning rate is too high"):
        train(wild, output=tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoint").exists()
    assert not (tmp_path / "run" / "run.json").exists()


def test_gradient_checkpointing_gives_the_same_weights(base: Path, tmp_path: Path, write_rows: WriteRows) -> None:
    common = options(base, write_rows("rows.jsonl", ROWS), max_steps=2)
    plain = train(common, output=tmp_path / "plain")
    checkpointed = train({**common, "gradient_checkpointing": True}, output=tmp_path / "checkpointed")
    assert math.isfinite(plain.final_train_loss or math.nan)
    theirs = weights(checkpointed)
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-6, msg=name)


def test_same_seed_gives_the_same_weights_and_another_seed_others(
    base: Path, tmp_path: Path, write_rows: WriteRows
) -> None:
    common = options(base, write_rows("rows.jsonl", ROWS), max_steps=2, train_batch_size_per_device=3)
    runs = [train({**common, "seed": seed}, output=tmp_path / f"run-{i}") for i, seed in enumerate((1, 1, 2))]
    first, again, other = (weights(run)["lm_head.weight"] for run in runs)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_progress_shows_steps_loss_speed_and_time_left(base: Path, tmp_path: Path, write_rows: WriteRows) -> None:
    screen = Console(file=io.StringIO(), width=200)
    train(options(base, write_rows("rows.jsonl", ROWS), max_steps=3), output=tmp_path / "run", console=screen)
    assert isinstance(screen.file, io.StringIO)
    shown = screen.file.getvalue()
    assert re.search(r"full: [\d,]+ of [\d,]+ parameters trained \(100\.000%\), 12 completion rows", shown)
    assert re.search(r"training .*step 3/3  loss \d+\.\d{3}  [\d,]+ tokens/s  0:00 left", shown)
