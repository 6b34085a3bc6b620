"""Exact resume of several processes: whichever of them was killed, the run that went on ends with the same bits."""

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from loradock_testing.worlds import run_worlds

ROWS = [
    {"prompt": f"def f{i}(x" + "y" * (i % 5) + "):", "completion": f" return {i}" + " + x" * (i % 4)} for i in range(21)
]
BATCHES = 12  # of each process: 21 rows, 2 processes, 2 a batch; 2 epochs; 2 batches a step, so 3 steps an epoch
COMMON: dict[str, Any] = {
    "context_length": 64,
    "learning_rate": 1e-2,
    "mixed_precision": "no",
    "num_epochs": 2,
    "train_batch_size_per_device": 2,
    "gradient_accumulation_steps": 2,
    "logging_steps": 3,
    "save_steps": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"lora_config": {"r": 4, "lora_dropout": 0.2, "target_modules": ["q_proj", "down_proj", "lm_head"]}},
    "packed": {
        "packing": True,
        "train_batch_size_per_device": 1,
        "context_length": 32,
        "lora_config": {"r": 4, "lora_dropout": 0.2},
    },
}


@dataclass(frozen=True)
class Story:
    """One kind of run: alone, and killed twice before it could end."""

    alone: Path
    killed: Path
    endings: list[list[dict[str, Any]]]


@pytest.fixture(scope="module")
def stories(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Story]:
    chance = random.Random(f"{sys.version_info.minor} processes")
    folder = tmp_path_factory.mktemp("stories")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    legs: list[dict[str, Any]] = []
    for kind, extra in KINDS.items():
        config = {**COMMON, **extra, "model_id": str(base), "train_path": str(data), "valid_path": str(data)}
        # The first save is at step 2, after 4 batches.
        one, all_ = chance.randint(5, BATCHES - 4), chance.randint(1, 6)
        sys.stdout.write(f"{kind}: one killed at micro-batch {one}, all at {all_}\n")  # pytest shows it on failure
        killed = {"config": config, "output": str(folder / f"{kind}-killed"), "processes": 2}
        legs += [
            {**killed, "output": str(folder / f"{kind}-alone")},
            {**killed, "die": {"1": one}},
            {**killed, "resume": True, "die": {"0": all_, "1": all_}},
            {**killed, "resume": True, "processes": 1},  # refused
            {**killed, "resume": True, "stop": {"1": 1}},  # one of them hears SIGTERM: both save and stop
            {**killed, "resume": True},
        ]
    endings = run_worlds(legs)
    return {
        kind: Story(folder / f"{kind}-alone", folder / f"{kind}-killed", endings[6 * at : 6 * at + 6])
        for at, kind in enumerate(KINDS)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_killed_processes_that_went_on_have_the_bits_of_those_left_alone(stories: dict[str, Story], kind: str) -> None:
    story = stories[kind]
    assert [[each["code"] == 0 for each in leg] for leg in story.endings] == [
        [True, True], [False, False], [False, False], [False], [False, False], [True, True],
    ]  # fmt: skip
    assert story.endings[1][1]["code"] == -9
    name = Path("checkpoint") / "adapter_model.safetensors"
    assert (story.killed / name).read_bytes() == (story.alone / name).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_killed_processes_that_went_on_tell_the_same_story(stories: dict[str, Story], kind: str) -> None:
    timeless = {"elapsed_s", "tokens_per_s"}
    alone, killed = (
        [
            {key: value for key, value in json.loads(line).items() if key not in timeless}
            for line in (run / "metrics.jsonl").read_text().splitlines()
        ]
        for run in (stories[kind].alone, stories[kind].killed)
    )
    assert killed == alone


@pytest.mark.parametrize("kind", KINDS)
def test_signal_to_one_process_stops_all_at_one_step_with_a_save(stories: dict[str, Story], kind: str) -> None:
    told = [each["error"] for each in stories[kind].endings[4]]
    assert told[0] == told[1]
    assert told[0].startswith("RunStopped: stopped at step ")


def test_another_number_of_processes_is_refused(stories: dict[str, Story]) -> None:
    for story in stories.values():
        (ending,) = story.endings[3]
        assert ending["error"].startswith("ResumeError")
        assert "num_devices: 2 processes when the run began, 1 now" in ending["error"]
