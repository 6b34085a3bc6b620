"""Exact resume: a run that was killed, and went on, ends with the same bits as one that was left alone."""

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from loradock_testing.worlds import run_legs

ROWS = [
    {"prompt": f"def f{i}(x" + "y" * (i % 5) + "):", "completion": f" return {i}" + " + x" * (i % 4)} for i in range(22)
]
BATCHES_PER_EPOCH, EPOCHS = 8, 3  # 22 rows, 3 a batch; 2 batches a step, so 4 steps an epoch
COMMON: dict[str, Any] = {
    "context_length": 64,
    "learning_rate": 1e-2,
    "mixed_precision": "no",
    "num_epochs": EPOCHS,
    "train_batch_size_per_device": 3,
    "gradient_accumulation_steps": 2,
    "logging_steps": 2,
    "warmup_steps": 2,
    "save_steps": 3,
}
PAIRS = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " pass"} for row in ROWS]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"lora_config": {"r": 4, "lora_dropout": 0.2, "target_modules": ["q_proj", "down_proj", "lm_head"]}},
    "full": {"group_by_length": False},
    "packed": {"packing": True, "train_batch_size_per_device": 1, "trainable": ["layers.*proj", "lm_head"]},
}


@dataclass(frozen=True)
class Story:
    """One kind of run: alone, and killed three times before it could end."""

    alone: Path
    killed: Path
    codes: list[int]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny base, and the same with dropout in its attention."""
    from loradock_testing.tiny_models import make_llama

    bases = {kind: make_llama(tmp_path_factory.mktemp(kind) / "base") for kind in KINDS}
    for kind in ("full", "packed"):
        config = bases[kind] / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "attention_dropout": 0.1}))
    return bases


@pytest.fixture(scope="module")
def stories(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Story]:
    """All legs, in one process that forks."""
    chance = random.Random(f"{sys.version_info.minor} kill")
    folder = tmp_path_factory.mktemp("stories")
    files = {"rows": folder / "rows.jsonl", "pairs": folder / "pairs.jsonl"}
    for rows, path in ((ROWS, files["rows"]), (PAIRS, files["pairs"])):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    legs: list[dict[str, Any]] = []
    for kind, extra in KINDS.items():
        data = files["pairs" if kind == "preference" else "rows"]
        config = {**COMMON, **extra, "model_id": str(bases[kind]), "train_path": str(data), "valid_path": str(data)}
        # The first save is at step 3. Killed after it; then, having gone on, in the middle of its next save; and again.
        kills = [chance.randint(7, BATCHES_PER_EPOCH * EPOCHS - 8), chance.randint(2, 8)]
        sys.stdout.write(f"{kind}: killed at micro-batches {kills}\n")  # pytest shows it where a test fails
        killed = {"config": config, "output": str(folder / f"{kind}-killed")}
        legs += [
            {"config": config, "output": str(folder / f"{kind}-alone"), "resume": False},
            {**killed, "resume": False, "kill_at_batch": kills[0]},
            {**killed, "resume": True, "kill_at_save": 1},
            {**killed, "resume": True, "kill_at_batch": kills[1]},
            {**killed, "resume": True},
        ]
    codes = run_legs(legs)
    return {
        kind: Story(folder / f"{kind}-alone", folder / f"{kind}-killed", codes[5 * at : 5 * at + 5])
        for at, kind in enumerate(KINDS)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_killed_run_that_went_on_has_the_bits_of_the_run_left_alone(stories: dict[str, Story], kind: str) -> None:
    story = stories[kind]
    assert story.codes == [0, -9, -9, -9, 0]
    name = "adapter_model.safetensors" if "lora_config" in KINDS[kind] else "model.safetensors"
    alone, killed = ((run / "checkpoint" / name).read_bytes() for run in (story.alone, story.killed))
    assert killed == alone


@pytest.mark.parametrize("kind", KINDS)
def test_killed_run_that_went_on_tells_the_same_story(stories: dict[str, Story], kind: str) -> None:
    """Every log and every validation, once, and with the same numbers."""
    alone, killed = (lines(run) for run in (stories[kind].alone, stories[kind].killed))
    assert [line["step"] for line in killed] == [line["step"] for line in alone]
    assert sum("eval_loss" in line for line in alone) == EPOCHS
    for mine, theirs in zip(killed, alone, strict=True):
        timeless = {"elapsed_s", "tokens_per_s"}
        assert {k: v for k, v in mine.items() if k not in timeless} == {
            k: v for k, v in theirs.items() if k not in timeless
        }


@pytest.mark.parametrize("kind", KINDS)
def test_finished_run_keeps_no_saves(stories: dict[str, Story], kind: str) -> None:
    assert {path.name for path in stories[kind].killed.iterdir()} == {
        "checkpoint", "config.yaml", "loss.png", "metrics.jsonl", "run.json",
    }  # fmt: skip


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
