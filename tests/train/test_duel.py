"""LoRA against full from one config: what the second leg drops, what it takes, what is kept."""

import json
from pathlib import Path

import pytest

from loradock_adapters.cli import run as command
from loradock_adapters.errors import UsageError
from loradock_testing.rows import WriteRows
from loradock_train import duelling as module
from loradock_train import train
from loradock_train.duelling import DuelStopped, duel, plan_duel
from loradock_train.errors import OutputError, TrainError

ROWS = [{"prompt": f"def f{i}():", "completion": f" return {i}"} for i in range(8)]


@pytest.fixture
def config(base: Path, tmp_path: Path, write_rows: WriteRows) -> Path:
    write_rows("rows.jsonl", ROWS)
    path = tmp_path / "lora.yaml"
    path.write_text(
        f"model_id: {base}\ntrain_path: rows.jsonl\nvalid_path: rows.jsonl\ncontext_length: 64\nmax_steps: 3\n"
        "learning_rate: 1e-2\nmixed_precision: 'no'\nlora_config: {r: 2}\n"
    )
    return path


def test_second_leg_is_the_same_config_without_lora_and_a_tenth_of_the_rate(config: Path) -> None:
    (lora, full), notices = plan_duel(config, ["seed=7"])
    assert (lora.config.kind, full.config.kind) == ("lora", "full")
    changed = {key for key, value in full.config if getattr(lora.config, key) != value}
    assert changed == {"lora_config", "learning_rate"}
    assert (lora.config.peak_learning_rate, full.config.peak_learning_rate) == (1e-2, 1e-3)
    assert lora.config.seed == full.config.seed == 7
    assert notices == [
        "full: the same config without lora_config; learning rate 0.001, a tenth of LoRA's 0.01, by rule of thumb "
        "(--full-learning-rate sets another)"
    ]


def test_rate_of_the_second_leg_can_be_given_and_clocks_are_told(config: Path) -> None:
    (_, full), notices = plan_duel(config, ["max_time_s=60"], full_learning_rate=3e-4)
    assert full.config.learning_rate == 3e-4
    assert "learning rate 0.0003, as --full-learning-rate says" in notices[0]
    assert notices[1].startswith("max_time_s 60 may end the legs after different numbers of steps")


def test_default_rates_are_the_seeds_pair(config: Path) -> None:
    (lora, full), _ = plan_duel(config, ["learning_rate=null"])
    assert (lora.config.peak_learning_rate, full.config.peak_learning_rate) == (1e-4, 1e-5)


def test_config_without_lora_is_refused(config: Path) -> None:
    with pytest.raises(UsageError, match="has no lora_config"):
        plan_duel(config, ["lora_config=null"])
    assert command(["duel", str(config), "--set", "lora_config=null"]) == 2


def test_finished_leg_is_kept_and_the_other_is_trained_in_a_process_of_its_own(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = train(config, output=tmp_path / "duel" / "lora")
    before = (done.directory / "run.json").stat().st_mtime_ns
    assert command(["duel", str(config), "--output", str(tmp_path / "duel"), "--json"]) == 0
    printed = capsys.readouterr()
    assert (done.directory / "run.json").stat().st_mtime_ns == before
    assert "lora: already trained" in printed.err
    lora, full = json.loads(printed.out)["runs"]
    assert (lora["approach"], full["approach"]) == ("LoRA r=2", "full-parameter")
    assert full["steps"] == lora["steps"] == 3
    assert full["checkpoint_bytes"] > lora["checkpoint_bytes"]
    assert full["share"] == 1.0
    assert full["data_sha256"] == lora["data_sha256"]
    summary = json.loads((tmp_path / "duel" / "full" / "run.json").read_text())
    assert summary["cost"]["seconds"] >= summary["train_seconds"]
    # Its own peak: this process has more in memory by now than a small model and its optimiser take.
    assert full["peak_memory_bytes"] != lora["peak_memory_bytes"]
    with pytest.raises(OutputError, match=r"made from another config \(seed changed\).*--overwrite"):
        duel(config, overrides=["seed=3"], output=tmp_path / "duel")


def legs_that_end(status: int, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    commands: list[list[str]] = []

    def wait_for(command: list[str]) -> int:
        commands.append(command)
        return status

    monkeypatch.setattr(module, "_wait_for", wait_for)
    return commands


def test_leg_that_fails_ends_the_duel_with_its_code(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = legs_that_end(1, monkeypatch)
    with pytest.raises(TrainError, match="the leg lora failed with exit code 1"):
        duel(config, output=tmp_path / "duel")
    assert len(commands) == 1
    assert commands[0][-1] == "--resume"


def test_leg_that_was_stopped_ends_the_duel_in_order(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    legs_that_end(0, monkeypatch)
    with pytest.raises(DuelStopped, match="stopped in the leg lora"):
        duel(config, output=tmp_path / "duel", overwrite=True)
    assert command(["duel", str(config), "--output", str(tmp_path / "duel")]) == 0
    assert "the same command again goes on" in capsys.readouterr().err
