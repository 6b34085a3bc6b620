"""The parts of benchmarks/train.py that decide what is compared, and what the figures mean."""

import argparse
import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.training_args import TrainingArguments

from loradock_train.config import TrainConfig
from training_speed.leg import Clock, busy_cpu_s, counted
from training_speed.material import MIN_CHARACTERS, docstrings
from training_speed.settings import COMPARED, LEGS, config_of


def test_every_comparison_has_both_trainers_once() -> None:
    names = [(leg.trainer, leg.name) for leg in LEGS]
    assert len(set(names)) == len(names)
    assert {name for trainer, name in names if trainer == "trl"} == set(COMPARED)


@pytest.mark.parametrize("leg", [leg for leg in LEGS if leg.trainer == "ours"], ids=lambda leg: leg.name)
def test_our_legs_are_configs_of_ours(leg: Any) -> None:
    config = TrainConfig(**{**config_of(leg, "base", "rows.jsonl", 256, 9)})
    assert (config.context_length, config.max_steps, config.mixed_precision) == (256, 9, "no")
    assert (config.lora_config is None) == leg.name.startswith("full")


@pytest.mark.parametrize("leg", [leg for leg in LEGS if leg.trainer == "trl"], ids=lambda leg: leg.name)
def test_their_legs_train_as_much_of_the_same(leg: Any) -> None:
    ours = next(other for other in LEGS if other.trainer == "ours" and other.name == leg.name)
    mine, theirs = (config_of(each, "base", "rows.jsonl", 256, 9) for each in (ours, leg))
    assert mine["train_batch_size_per_device"] == theirs["per_device_train_batch_size"]
    assert mine["context_length"] == theirs["max_length"]
    assert ("lora_config" in mine) == ("lora" in theirs)
    assert {key: mine.get("lora_config", {}).get(key) for key in ("r", "lora_alpha", "lora_dropout")} == {
        key: theirs.get("lora", {}).get(key) for key in ("r", "lora_alpha", "lora_dropout")
    }
    assert mine.get("gradient_checkpointing", False) == theirs["gradient_checkpointing"]
    assert mine["packing"] == theirs["packing"]
    known = set(TrainingArguments.__dataclass_fields__) | {"model", "data", "lora", "packing", "max_length"}
    assert not set(theirs) - known


def test_clock_counts_tokens_after_the_warm_steps_only() -> None:
    clock = Clock(tokens=[9, 9, 10, 20], width=[9, 9, 20, 30])
    clock.ended_s, clock.own_cpu_s, clock.busy_cpu_s = [0.0, 1.0, 2.0, 4.0], [0.0, 1.0, 2.0, 2.5], [0.0, 1.0, 3.0, 4.0]
    figures = clock.figures(warm=2)
    assert figures["tokens_per_s"] == 30 / 3
    assert figures["tokens_per_cpu_s"] == 30 / 1.5
    assert figures["padding"] == pytest.approx(1 - 30 / 50)
    assert figures["others_share"] == pytest.approx(0.5)
    assert figures["steps"] == 2


def test_clock_leaves_out_a_batch_that_was_fetched_and_not_trained() -> None:
    clock = Clock(tokens=[1, 2, 100], width=[1, 2, 100])
    clock.ended_s, clock.own_cpu_s, clock.busy_cpu_s = [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]
    assert clock.figures(warm=1)["tokens_per_s"] == 2


def test_collator_is_counted_without_its_padding() -> None:
    clock = Clock()
    collate = counted(lambda rows: {"input_ids": torch.zeros(2, 8)}, clock)
    assert collate([{"input_ids": [1, 2, 3]}, {"input_ids": [1] * 7}])["input_ids"].shape == (2, 8)
    assert (clock.tokens, clock.width) == ([10], [16])


def test_busy_seconds_leave_out_idle_and_waiting() -> None:
    ticks = busy_cpu_s("cpu  100 10 40 9999 8888 5 15 30 0 0\ncpu0 1 1\n")
    assert ticks == pytest.approx(200 / 100, rel=1.0)
    assert ticks == busy_cpu_s("cpu  200 0 0 1 1 0 0 0 0 0\n")


def test_texts_are_docstrings_of_the_standard_library() -> None:
    texts = docstrings(50)
    assert len(texts) == 50
    assert all(len(text) >= MIN_CHARACTERS for text in texts)
    assert texts[0] == docstrings(1)[0]
    documentation = ast.get_docstring(ast.parse(Path(argparse.__file__).read_text(encoding="utf-8")))
    assert documentation is not None
    assert documentation in docstrings(3000)
