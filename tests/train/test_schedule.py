"""Length and learning rate: pure arithmetic."""

from typing import Any

import pytest
from pydantic import ValidationError
from transformers import TrainerState, TrainingArguments

from loradock_train.config import TrainConfig
from loradock_train.schedule import (
    Intervals,
    Length,
    intervals_of,
    learning_rate_factor,
    length_of,
    shares_told,
    without_effect,
)


def config(**values: Any) -> TrainConfig:
    return TrainConfig.model_validate({"model_id": "a/b", "train_path": "x", **values})


@pytest.mark.parametrize(
    ("values", "rows", "steps"),
    [
        ({"num_epochs": 1, "train_batch_size_per_device": 4}, 10, 3),
        ({"num_epochs": 2, "train_batch_size_per_device": 4, "gradient_accumulation_steps": 2}, 10, 4),
        ({"num_epochs": 0.5, "train_batch_size_per_device": 1}, 10, 5),
        ({"train_batch_size_per_device": 10}, 10, 3),
        ({"max_steps": 7}, 10, 7),
        ({"max_steps": 7, "num_epochs": 1, "train_batch_size_per_device": 5}, 10, 2),
    ],
)
def test_number_of_steps_follows_the_nearest_limit(values: dict[str, Any], rows: int, steps: int) -> None:
    length = length_of(config(**values), rows, num_devices=1)
    assert (length.max_steps, length.is_clock_bound) == (steps, False)


def test_time_limit_alone_leaves_the_steps_open() -> None:
    length = length_of(config(max_time_s=60), 10, num_devices=1)
    assert length.is_clock_bound
    assert length.progress(step=10, elapsed_s=15) == pytest.approx(0.25)


def test_progress_is_that_of_the_nearer_limit() -> None:
    length = Length(10, max_steps=100, max_time_s=100)
    assert length.progress(50, 10) == 0.5
    assert length.progress(10, 70) == 0.7
    assert length.progress(10, 700) == 1.0


def factors(steps: int, **values: Any) -> list[float]:
    made = config(**values)
    return [round(learning_rate_factor(made, Length(1, steps, None), step, 0.0), 4) for step in range(steps)]


def test_linear_falls_evenly_to_zero() -> None:
    assert factors(4, lr_scheduler_type="linear") == [1.0, 0.75, 0.5, 0.25]


def test_cosine_is_half_way_at_half_time() -> None:
    assert factors(4, lr_scheduler_type="cosine") == [1.0, 0.8536, 0.5, 0.1464]


def test_constant_stays() -> None:
    assert factors(3, lr_scheduler_type="constant") == [1.0, 1.0, 1.0]


def test_warmup_in_steps_never_starts_at_zero() -> None:
    assert factors(6, lr_scheduler_type="linear", warmup_steps=2) == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_warmup_as_a_share_follows_the_clock() -> None:
    made, length = config(lr_scheduler_type="linear", warmup_steps=0.1), Length(1, 10**9, max_time_s=100)
    at = [round(learning_rate_factor(made, length, 5, elapsed_s), 4) for elapsed_s in (0, 5, 10, 55, 100)]
    assert at == [0.01, 0.5, 1.0, 0.5, 0.0]


def test_single_step_run_learns_at_the_peak() -> None:
    assert factors(1) == [1.0]


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (
            {"max_steps": 10, "warmup_steps": 10},
            "warmup_steps 10 is the whole run of 10 steps: learning_rate 1e-05 is not",
        ),
        ({"max_steps": 10, "warmup_steps": 9}, ""),
        ({"max_steps": 10, "warmup_steps": 0.9}, ""),
        ({"max_steps": 10, "eval_steps": 2}, "eval_steps 2 has no effect: without valid_path nothing is validated"),
        ({"max_steps": 10, "eval_steps": 2, "valid_path": "v.jsonl"}, ""),
    ],
)
def test_what_has_no_effect_is_told(keys: dict[str, Any], told: str) -> None:
    made = config(**keys)
    notices = without_effect(made, length_of(made, 100, num_devices=1))
    assert [notice.startswith(told) for notice in notices] == ([True] if told else [])


@pytest.mark.parametrize("share", [0.1, 0.07, 1 / 3, 0.999, 1e-9])
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_share_of_the_run_is_the_number_that_transformers_makes_of_it(share: float, steps: int) -> None:
    made = config(logging_steps=share, eval_steps=share, save_steps=share, max_steps=steps)
    theirs = TrainerState(max_steps=steps)
    arguments = TrainingArguments(
        output_dir="x", use_cpu=True, logging_steps=share, eval_steps=share, save_steps=share, eval_strategy="steps"
    )  # fmt: skip
    theirs.compute_steps(arguments, steps)  # type: ignore[no-untyped-call]
    found = intervals_of(made, Length(10, steps, None))
    assert found == Intervals(theirs.logging_steps, theirs.eval_steps, theirs.save_steps)
    assert found.evaluation >= 1


def test_whole_numbers_and_defaults_of_intervals() -> None:
    assert intervals_of(config(), Length(12, 36, None)) == Intervals(10, 12, None)
    whole = config(logging_steps=3.0, eval_steps=4, save_steps=1)
    assert intervals_of(whole, Length(12, 36, None)) == Intervals(3, 4, 1)
    assert '"logging_steps":3,' in whole.model_dump_json()
    stream = config(streaming=True, max_steps=25)
    assert intervals_of(stream, Length(10**9, 25, None)).evaluation == 3
    assert shares_told(whole, Length(12, 36, None)) == []


def test_shares_are_told_as_steps() -> None:
    told = shares_told(config(eval_steps=0.25, save_steps=0.1, valid_path="y"), Length(500, 1500, None))
    assert told == ["eval_steps 0.25 of 1,500 steps: every 375", "save_steps 0.1 of 1,500 steps: every 150"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eval_steps": 0.5, "streaming": True, "num_epochs": 1}, "eval_steps 0.5 is a share .* how many a stream has"),
        (
            {"save_steps": 0.5, "max_time_s": 9},
            "save_steps 0.5 is a share .* fit into max_time_s is not known",
        ),
        ({"eval_steps": 1.5}, "must be a whole number of steps"),
        ({"eval_steps": 0}, "must be a whole number of steps"),
        ({"logging_steps": -0.5}, "must be a whole number of steps"),
        ({"logging_steps": True}, "must be a whole number of steps"),
        ({"save_steps": "ten"}, "must be a whole number of steps"),
        ({"logging_steps": None}, "logging_steps"),
    ],
)
def test_share_of_what_is_not_known_and_odd_numbers_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**values)


@pytest.mark.parametrize("values", [{"max_time_s": 9, "num_epochs": 1}, {"streaming": True, "max_steps": 5}, {}])
def test_share_of_what_is_known_is_taken(values: dict[str, Any]) -> None:
    assert config(eval_steps=0.5, **values).eval_steps == 0.5
