"""A classification head: trained, scored, and written as a model that transformers loads and reads the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from loradock_adapters.base import base_from
from loradock_adapters.checkpoint import read_checkpoint
from loradock_adapters.engine_rules import EngineLimits
from loradock_adapters.gate import judge
from loradock_adapters.passport import read_passport
from loradock_testing.rows import WriteRows
from loradock_train import train
from loradock_train.errors import ConfigError, DataError

LABELS = ["good", "bad", "none"]
WORDS = {"good": "nice fine great", "bad": "poor broken wrong", "none": "the help option"}
ROWS = [
    {"text": f"{word} {'parser ' * (1 + i % 4)}{other}", "label": label}
    for label, words in WORDS.items()
    for i, word in enumerate(words.split())
    for other in ("x", "group")
]


def options(base: Path, write_rows: WriteRows, **values: Any) -> dict[str, Any]:
    data = str(write_rows("rows.jsonl", ROWS))
    return {
        "model_id": str(base),
        "train_path": data,
        "valid_path": data,
        "task": {"kind": "sequence_classification", "labels": LABELS},
        "lora_config": {"r": 4, "lora_alpha": 8},
        "learning_rate": 1e-2,
        "mixed_precision": "no",
        "context_length": 64,
        "num_epochs": 8,
        "train_batch_size_per_device": 6,
        "eval_batch_size_per_device": 4,
        **values,
    }


@pytest.mark.parametrize("lora", [{"r": 4, "lora_alpha": 8}, None])
def test_head_learns_and_its_checkpoint_answers_in_transformers_as_in_the_run(
    base: Path, tmp_path: Path, write_rows: WriteRows, lora: dict[str, Any] | None
) -> None:
    run = train(options(base, write_rows, lora_config=lora), output=tmp_path / "run")
    assert run.summary["score"]["value"] == 1.0
    assert run.summary["score"]["constant"] == pytest.approx(1 / 3)
    assert run.summary["score"]["base"] is None, "a new head has no base"
    model: Any = AutoModelForSequenceClassification.from_pretrained(run.checkpoint)
    tokenizer: Any = AutoTokenizer.from_pretrained(run.checkpoint)
    assert [model.config.id2label[number] for number in range(3)] == LABELS
    lines = (run.directory / "predictions.jsonl").read_text().splitlines()
    for row, line in zip(ROWS, lines, strict=True):
        with torch.no_grad():
            probabilities = model(**tokenizer(row["text"], return_tensors="pt")).logits[0].softmax(-1).tolist()
        told = json.loads(line)
        assert [told["probabilities"][label] for label in LABELS] == pytest.approx(probabilities, abs=1e-4)
        assert told["answer"] == row["label"]
    assert (run.directory / "confusion.png").is_file()
    passport = read_passport(run.checkpoint)
    assert passport is not None
    assert (passport.probe, passport.stop_token_ids) == (None, ())
    assert "pipeline_tag: text-classification" in (run.checkpoint / "README.md").read_text()


def test_gate_gives_a_head_an_engine_of_its_own_and_says_why(base: Path, tmp_path: Path, write_rows: WriteRows) -> None:
    run = train(options(base, write_rows, num_epochs=1), output=tmp_path / "run")
    verdict = judge(read_checkpoint(run.checkpoint), base_from(base), EngineLimits())
    assert verdict.placement == "dedicated"
    reason = next(reason for reason in verdict.reasons if reason.code == "classification_head")
    assert "/classify" in reason.message


def test_head_with_accumulation_takes_the_steps_of_larger_batches(
    base: Path, tmp_path: Path, write_rows: WriteRows
) -> None:
    """A ragged last window among them: 18 rows, 4 a step."""
    common = {"num_epochs": 1, "lora_config": None, "group_by_length": False, "learning_rate": 1e-3}
    whole = train(options(base, write_rows, **common, train_batch_size_per_device=4), output=tmp_path / "whole")
    parts = train(
        options(base, write_rows, **common, train_batch_size_per_device=1, gradient_accumulation_steps=4),
        output=tmp_path / "parts",
    )
    models: list[Any] = [AutoModelForSequenceClassification.from_pretrained(run.checkpoint) for run in (whole, parts)]
    others = dict(models[1].named_parameters())
    for name, parameter in models[0].named_parameters():
        torch.testing.assert_close(parameter, others[name], atol=2e-4, rtol=0)


def test_rows_without_a_known_label_are_named(base: Path, tmp_path: Path, write_rows: WriteRows) -> None:
    broken = write_rows("broken.jsonl", [*ROWS, {"text": "a", "label": "goood"}, {"text": "b"}])
    with pytest.raises(DataError) as caught:
        train(options(base, write_rows, train_path=str(broken)), output=tmp_path / "run")
    assert "line 19: the label 'goood' is not one of task.labels" in str(caught.value)
    assert "line 20: missing key 'label'" in str(caught.value)


def test_packing_and_a_head_are_refused_together(base: Path, tmp_path: Path, write_rows: WriteRows) -> None:
    with pytest.raises(ConfigError, match="reads one class off each row; remove them"):
        train(options(base, write_rows, packing=True), output=tmp_path / "run")
