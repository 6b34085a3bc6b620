"""Intervals given as shares of a run, as a person meets them: in a run, its resume, `check` and `--plan`."""

import json
from pathlib import Path
from typing import Any

import pytest

from loradock_adapters.cli import run as loradock
from loradock_testing.rows import WriteRows
from loradock_testing.worlds import run_legs
from loradock_train import train
from loradock_train.planning import plan_of_config

ROWS = [{"prompt": f"def f{i}():", "completion": f" return {i}"} for i in range(9)]
TOLD = ["logging_steps 0.1 of 14 steps: every 2", "eval_steps 0.4 of 14 steps: every 6", "save_steps 0.3 of 14 steps"]


@pytest.fixture
def options(base: Path, write_rows: WriteRows) -> dict[str, Any]:
    data = str(write_rows("rows.jsonl", ROWS))
    return {
        "model_id": str(base), "train_path": data, "valid_path": data, "context_length": 64, "learning_rate": 1e-2,
        "mixed_precision": "no", "train_batch_size_per_device": 2, "max_steps": 14, "lora_config": {"r": 2},
        "logging_steps": 0.1, "eval_steps": 0.4, "save_steps": 0.3,
    }  # fmt: skip


def test_run_logs_validates_and_saves_at_the_steps_that_its_shares_are(options: dict[str, Any], tmp_path: Path) -> None:
    run = train(options, output=tmp_path / "run")
    lines = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 4, 6, 8, 10, 12, 14]
    assert [line["step"] for line in lines if "eval_loss" in line] == [6, 12, 14]
    assert all(any(notice.startswith(told) for notice in run.summary["notices"]) for told in TOLD)
    killed = {"config": options, "output": str(tmp_path / "killed"), "resume": False, "kill_at_batch": 13}
    assert run_legs([killed]) == [-9]
    assert [path.name for path in (tmp_path / "killed" / "saves").iterdir()] == ["step-00000010"]
    again = train(options, output=tmp_path / "killed", resume=True)
    names = [each.checkpoint / "adapter_model.safetensors" for each in (run, again)]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_check_and_plan_know_the_steps(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(options))
    assert loradock(["check", str(config), "--json"]) == 0
    notices = json.loads(capsys.readouterr().out)["notices"]
    assert all(any(notice.startswith(told) for notice in notices) for told in TOLD)
    plan = plan_of_config(config)
    assert (plan.steps, plan.eval_batches) == (14, 3)


def test_share_of_an_unknown_number_of_steps_is_refused_by_all(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({**options, "max_steps": None, "streaming": True, "num_epochs": 1}))
    for words in (["train"], ["train", "--plan"], ["check"]):
        assert loradock([words[0], str(config), *words[1:]]) == 2
        told = " ".join(capsys.readouterr().err.split())
        assert "is a share of the run's steps, and how many a stream has is not known before" in told
