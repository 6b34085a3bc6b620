"""A run with a task, a best validation and early stopping, killed on its way: the same end as the run left alone."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loradock_testing.rows import WriteRows

LABELS = ["yes", "no"]
ROWS = [{"prompt": f"is {'abcdefghijkl'[i]}?", "completion": f" {LABELS[i % 2]}"} for i in range(12)]
WRONG = [{**row, "completion": f" {LABELS[(i + 1) % 2]}"} for i, row in enumerate(ROWS)]


@pytest.fixture
def config(base: Path, write_rows: WriteRows) -> dict[str, Any]:
    """Its validation loss falls, and rises soon: 4 batches an epoch, a validation every 2 steps, a save every 3."""
    return {
        "model_id": str(base),
        "train_path": str(write_rows("rows.jsonl", ROWS)),
        "valid_path": str(write_rows("wrong.jsonl", WRONG)),
        "lora_config": {"r": 4, "lora_dropout": 0.1},
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "mixed_precision": "no",
        "context_length": 64,
        "num_epochs": 20,
        "train_batch_size_per_device": 3,
        "eval_steps": 2,
        "save_steps": 3,
        "task": {"kind": "classification", "labels": LABELS},
        "best_by": "eval_loss",
        "early_stopping": {"patience": 3},
    }


def ended(legs: list[dict[str, Any]]) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "loradock_testing.train_legs"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        input=json.dumps(legs), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    codes: list[int] = json.loads(done.stdout)
    return codes


def test_killed_run_ends_early_at_the_same_step_and_exports_the_same_best(
    config: dict[str, Any], tmp_path: Path
) -> None:
    """Killed three times: while a save is written, and in steps just before and just after validations that a save
    does not know of."""
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    common = {"config": config, "output": str(killed), "resume": True}
    codes = ended(
        [
            {"config": config, "output": str(alone), "resume": False},
            common | {"kill_at_save": 1},
            common | {"kill_at_batch": 6},
            common | {"kill_at_batch": 6},
            common,
        ]
    )
    assert codes == [0, -9, -9, -9, 0]
    weights = [(run / "checkpoint" / "adapter_model.safetensors").read_bytes() for run in (alone, killed)]
    assert weights[0] == weights[1]
    mine, theirs = (json.loads((run / "run.json").read_text()) for run in (alone, killed))
    for key in ("steps", "exported_step", "best", "score", "task", "final_eval_loss"):
        assert mine[key] == theirs[key]
    assert mine["exported_step"] < mine["steps"]
    assert mine["task"]["base"] is not None
    assert timeless(alone) == timeless(killed)


def timeless(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, but for what a clock says."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("elapsed_s", "tokens_per_s")} for line in lines]
