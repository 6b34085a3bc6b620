"""Runs with a task: what is scored is what transformers computes row by row, and nothing of the training changes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from loradock_testing.rows import WriteRows
from loradock_train import train
from loradock_train.errors import DataError, ModelError
from loradock_train.run import Run

LABELS = ["yes", "no", "maybe so"]
ROWS = [
    {"prompt": f"is {'x' * (1 + i % 5)} {'abcdefghijkl'[i]}?", "completion": f" {LABELS[i % 3]}"} for i in range(12)
]
Trains = Callable[..., Run]


@pytest.fixture
def trains(base: Path, tmp_path: Path, write_rows: WriteRows) -> Trains:
    """Trains an adapter on ROWS, or on others, with some keys."""

    def run(rows: list[dict[str, Any]] | None = None, name: str = "run", **keys: Any) -> Run:
        data = str(write_rows(f"{name}.jsonl", rows if rows is not None else ROWS))
        config = {
            "model_id": str(base),
            "train_path": data,
            "valid_path": data,
            "lora_config": {"r": 4},
            "learning_rate": 1e-2,
            "mixed_precision": "no",
            "context_length": 128,
            "num_epochs": 3,
            "train_batch_size_per_device": 4,
            "eval_batch_size_per_device": 5,
        }
        return train(config | keys, output=tmp_path / name)

    return run


def predictions(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.directory / "predictions.jsonl").read_text().splitlines()]


def metrics(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]


def adapter(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.checkpoint / "adapter_model.safetensors")


def loaded(base: Path, run: Run) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    return PeftModel.from_pretrained(model, run.checkpoint).eval()


def test_classification_scores_are_each_rows_own_log_likelihoods(base: Path, trains: Trains) -> None:
    """Batched and padded on the left; the reference is one row at a time, not padded."""
    run = trains(task={"kind": "classification", "labels": LABELS})
    model = loaded(base, run)
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    for row, told in zip(ROWS, predictions(run), strict=True):
        sums = {}
        for label in LABELS:
            prompt = tokenizer(row["prompt"])["input_ids"]
            ids = [*prompt, *tokenizer(f" {label}", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            with torch.no_grad():
                logs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            sums[label] = sum(float(logs[at - 1, ids[at]]) for at in range(len(prompt), len(ids)))
        assert told["log_likelihoods"] == pytest.approx(sums, abs=2e-3)
        assert told["answer"] == max(sums, key=sums.__getitem__)
        assert told["truth"] == row["completion"].strip()
        assert told["right"] == (told["answer"] == told["truth"])
        assert told["prompt"].endswith(row["prompt"])


def test_classification_run_tells_base_constant_and_classes(trains: Trains) -> None:
    run = trains(task={"kind": "classification", "labels": LABELS}, num_epochs=12)
    score, told = run.summary["score"], run.summary["task"]
    right = sum(row["right"] for row in predictions(run))
    assert score == {
        "metric": "accuracy", "value": right / 12, "best": "high", "base": told["base"]["accuracy"], "constant": 4 / 12,
    }  # fmt: skip
    assert score["value"] > score["constant"]
    assert metrics(run)[0] == {"step": 0, "base_accuracy": score["base"], "base_macro_f1": told["base"]["macro_f1"]}
    last = [line for line in metrics(run) if "eval_loss" in line][-1]
    assert last["eval_accuracy"] == score["value"]
    confusion = json.loads((run.directory / "confusion.json").read_text())
    assert confusion["labels"] == LABELS
    assert sum(confusion["matrix"][i][i] for i in range(3)) == right
    assert (run.directory / "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert "| accuracy | " in (run.checkpoint / "README.md").read_text()
    assert {row["support"] for row in told["classes"].values()} == {4}


@pytest.mark.parametrize("arithmetic", ["no", "bf16"])
@pytest.mark.parametrize("lora", [{"r": 4, "lora_dropout": 0.2}, None])
def test_task_changes_nothing_about_the_training(trains: Trains, arithmetic: str, lora: dict[str, Any] | None) -> None:
    keys = {"mixed_precision": arithmetic, "lora_config": lora, "eval_steps": 2, "num_epochs": 2}
    plain = trains(name="plain", **keys)
    scored = trains(name="scored", task={"kind": "generation", "max_new_tokens": 4}, **keys)
    file = "adapter_model.safetensors" if lora is not None else "model.safetensors"
    assert (plain.checkpoint / file).read_bytes() == (scored.checkpoint / file).read_bytes()
    losses = [
        [(line["step"], line["eval_loss"]) for line in metrics(run) if "eval_loss" in line] for run in (plain, scored)
    ]
    assert losses[0] == losses[1]


def test_generated_answers_are_those_of_one_row_at_a_time(base: Path, trains: Trains) -> None:
    """Left padding changes no token; a sampling default of the base changes none either."""
    file = base / "generation_config.json"
    before = file.read_text()
    file.write_text(
        json.dumps({**json.loads(before), "do_sample": True, "temperature": 5.0, "repetition_penalty": 1.7})
    )
    try:
        run = trains(task={"kind": "generation", "max_new_tokens": 6}, num_epochs=1)
    finally:
        file.write_text(before)
    model = loaded(base, run)
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    for row, told in zip(ROWS, predictions(run), strict=True):
        ids = tokenizer(row["prompt"])["input_ids"]
        start = len(ids)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert told["answer"] == tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def test_learnt_answers_are_matched_exactly_and_base_is_far_below(trains: Trains) -> None:
    run = trains(
        [{"prompt": f"say {word}", "completion": f" {word}"} for word in ("red", "blue", "green", "grey")],
        task={"kind": "generation", "max_new_tokens": 8, "metric": "token_f1"},
        lora_config=None,
        num_epochs=30,
    )
    assert run.summary["score"]["metric"] == "token_f1"
    assert run.summary["task"]["exact_match"] == 1.0
    assert run.summary["score"]["base"] < 0.5
    assert run.summary["score"]["constant"] == 0.25


def test_summaries_of_chats_are_scored_by_rouge(trains: Trains) -> None:
    chats = [
        {
            "messages": [
                {"role": "user", "content": "hello"},
                {"role": "assistant", "content": "hi"},
                {"role": "user", "content": f"sum up {name}"},
                {"role": "assistant", "content": f"text {name} is short"},
            ]
        }
        for name in "abcd"
    ]
    run = trains(chats, task={"kind": "summarisation", "max_new_tokens": 5, "max_rows": 3}, num_epochs=1)
    assert run.summary["score"]["metric"] == "rougeL"
    assert [row["truth"] for row in predictions(run)] == [f"text {name} is short" for name in "abc"]
    assert "hi" in predictions(run)[0]["prompt"], "earlier turns are context"
    assert "task: 3 of 4 validation rows are scored (task.max_rows)" in run.summary["notices"]


def test_answer_outside_the_labels_is_named_with_its_line(trains: Trains) -> None:
    with pytest.raises(DataError, match=r"run.jsonl, line 3: the answer ' maybe so' is not one of task.labels"):
        trains(task={"kind": "classification", "labels": ["yes", "no"]})


def test_raw_text_has_no_answers_to_score(trains: Trains) -> None:
    with pytest.raises(DataError, match="rows of raw text have no answer"):
        trains([{"text": "some words"}] * 3, task={"kind": "generation"})


def test_answers_past_the_last_position_are_refused(trains: Trains) -> None:
    with pytest.raises(ModelError, match=r"task.max_new_tokens: 600 after a prompt of \d+ tokens is over .* 512; set"):
        trains(task={"kind": "generation", "max_new_tokens": 600})


# ---- the best validation --------------------------------------------------------------------------------------------


@pytest.fixture
def overfit(trains: Trains, write_rows: WriteRows) -> Callable[..., Run]:
    """Learns what the validation rows contradict: their loss falls, then rises."""
    wrong = [{"prompt": row["prompt"], "completion": f" {LABELS[(i + 1) % 3]}"} for i, row in enumerate(ROWS)]

    def run(name: str, **keys: Any) -> Run:
        valid = str(write_rows("wrong.jsonl", wrong))
        return trains(name=name, valid_path=valid, eval_steps=2, num_epochs=12, **keys)

    return run


def test_best_by_loss_exports_the_weights_of_that_step(overfit: Callable[..., Run]) -> None:
    best = overfit("best", best_by="eval_loss", lr_scheduler_type="constant")
    losses = {line["step"]: line["eval_loss"] for line in metrics(best) if "eval_loss" in line}
    step = min(losses, key=losses.__getitem__)
    assert step < max(losses), "the last step is not the best here"
    assert best.summary["best"] == {"by": "eval_loss", "step": step, "value": losses[step]}
    assert best.summary["exported_step"] == step
    assert best.final_eval_loss == losses[step]
    until = overfit("until", max_steps=step, lr_scheduler_type="constant")
    assert all(torch.equal(tensor, adapter(until)[name]) for name, tensor in adapter(best).items())
    assert until.summary["exported_step"] == step
    assert not (best.directory / "saves").exists()


def test_early_stopping_ends_the_run_and_exports_the_best(overfit: Callable[..., Run]) -> None:
    whole = overfit("whole", best_by="eval_loss", lr_scheduler_type="constant")
    stopped = overfit("stopped", early_stopping={"patience": 2}, lr_scheduler_type="constant")
    assert stopped.summary["steps"] == stopped.summary["exported_step"] + 4, "two validations of two steps"
    assert stopped.summary["steps"] < whole.summary["steps"]
    assert any(notice.startswith("stopped early at step") for notice in stopped.summary["notices"])
    assert all(torch.equal(tensor, adapter(whole)[name]) for name, tensor in adapter(stopped).items())


def test_best_by_a_metric_of_the_task_is_the_score_of_the_export(
    overfit: Callable[..., Run], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    keys = {"task": {"kind": "classification", "labels": LABELS, "max_rows": 9}, "early_stopping": {"patience": 2}}
    run = overfit("run", best_by="macro_f1", **keys)
    printed = capsys.readouterr().err
    values = {line["step"]: line["eval_macro_f1"] for line in metrics(run) if "eval_loss" in line}
    step = max(values, key=values.__getitem__)
    assert run.summary["best"] == {"by": "eval_macro_f1", "step": step, "value": values[step]}
    assert run.summary["task"]["macro_f1"] == values[step]
    first, score = metrics(run)[2], run.summary["score"]
    assert f"accuracy {first['eval_accuracy']:.4g}, macro_f1 {first['eval_macro_f1']:.4g}\n" in printed
    assert f"exported: the weights of step {step}, the best validation (eval_macro_f1 {values[step]:.4g})" in printed
    told = f"the base {score['base']:.4g}, the best constant answer {score['constant']:.4g}"
    assert f"score: accuracy {score['value']:.4g} on 9 rows ({told})" in printed
    stopped = [notice for notice in run.summary["notices"] if notice.startswith("stopped early at step")]
    assert len(stopped) == 1
    assert f"note: {stopped[0]}\n" in printed
