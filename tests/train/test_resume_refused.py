"""What a run may go on from, and how it is stopped: by a signal, with the command that goes on."""

import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState, TrainingArguments
from typer.testing import CliRunner

from loradock_adapters.errors import UsageError
from loradock_testing.rows import WriteRows
from loradock_testing.tiny_models import make_llama
from loradock_train import train
from loradock_train.commands.train import train as train_command
from loradock_train.config import TrainConfig
from loradock_train.errors import OutputError, ResumeError, RunStopped
from loradock_train.saves import Identity, Position, newest_save, remove_leftovers, write_save
from loradock_train.stop import Saver, StopRequest
from loradock_train.trainer import LoradockTrainer

app = typer.Typer()
app.command()(train_command)

ROWS = [{"prompt": f"def f{i}():", "completion": f" return {i}"} for i in range(8)]


@pytest.fixture
def options(base: Path, write_rows: WriteRows) -> dict[str, Any]:
    return {
        "model_id": str(base),
        "train_path": str(write_rows("rows.jsonl", ROWS)),
        "context_length": 64,
        "learning_rate": 1e-2,
        "mixed_precision": "no",
        "train_batch_size_per_device": 2,
        "max_steps": 6,
        "save_steps": 2,
        "lora_config": {"r": 2},
    }


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Send this process the signal while it is in that step (1-based, counted from the start of the run)."""
    original = LoradockTrainer.training_step

    def stopped(self: LoradockTrainer, *arguments: Any) -> torch.Tensor:
        if self.state.global_step + 1 == step:
            os.kill(os.getpid(), number)
        return original(self, *arguments)

    monkeypatch.setattr(LoradockTrainer, "training_step", stopped)


def stopped_run(options: dict[str, Any], output: Path, monkeypatch: pytest.MonkeyPatch, step: int = 3) -> Path:
    with monkeypatch.context() as patched:
        stop_at(patched, step)
        with pytest.raises(RunStopped, match=f"stopped at step {step}"):
            train(options, output=output)
    return output


# ---- stopping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_at_the_next_whole_step_and_the_run_goes_on_from_there(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    with monkeypatch.context() as patched:
        stop_at(patched, 3, number)
        with pytest.raises(RunStopped) as stopped:
            train(options, output=tmp_path / "run")
    assert (stopped.value.step, stopped.value.save) == (3, tmp_path / "run" / "saves" / "step-00000003")
    assert signal.getsignal(number) == before
    screen = Console(file=io.StringIO(), width=200)
    resumed = train(options, output=tmp_path / "run", resume=True, console=screen)
    assert isinstance(screen.file, io.StringIO)
    assert "resuming at step 3" in screen.file.getvalue()
    alone = train(options, output=tmp_path / "alone")
    ours, theirs = (load_file(run.checkpoint / "adapter_model.safetensors") for run in (resumed, alone))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_command_that_is_stopped_exits_with_0_and_tells_how_to_go_on(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "my run.yaml"
    config.write_text(json.dumps(options))
    words = [str(config), "--set", "seed=7", "--output", str(tmp_path / "run")]
    with monkeypatch.context() as patched:
        stop_at(patched, 3)
        result = CliRunner().invoke(app, words)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "stopped at step 3, saved in" in result.stderr
    assert f"loradock train '{config}' --set seed=7 --output {tmp_path / 'run'} --resume" in result.stderr
    again = CliRunner().invoke(app, [*words, "--resume"])
    assert (again.exit_code, again.stdout.strip()) == (0, str(tmp_path / "run" / "checkpoint"))


def test_signal_in_the_last_step_lets_the_run_finish(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, 6)
    assert train(options, output=tmp_path / "run").summary["steps"] == 6


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_unfinished_run_is_neither_replaced_nor_gone_on_with_unasked(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stopped_run(options, tmp_path / "run", monkeypatch)
    with pytest.raises(OutputError, match="holds an unfinished run, saved at step 3; go on with --resume"):
        train(options, output=run)
    with pytest.raises(UsageError, match="give one of the two"):
        train(options, output=run, resume=True, overwrite=True)
    anew = train(options, output=run, overwrite=True)
    assert next(entry["step"] for entry in history(run)) == 1
    assert not (anew.directory / "saves").exists()


def test_resume_before_anything_was_saved_begins(options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    screen = Console(file=io.StringIO(), width=200)
    run = train(options, output=tmp_path / "run", resume=True, console=screen)
    assert isinstance(screen.file, io.StringIO)
    assert "nothing was saved: beginning at step 0" in screen.file.getvalue()
    assert run.summary["steps"] == 6


def test_changed_config_and_data_are_refused_with_all_that_differs(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_rows: WriteRows
) -> None:
    run = stopped_run(options, tmp_path / "run", monkeypatch)
    write_rows("rows.jsonl", [*ROWS[:-1], {"prompt": "def g():", "completion": " pass"}])
    with pytest.raises(ResumeError) as caught:
        train({**options, "learning_rate": 1e-3, "lora_config": {"r": 4}, "keep": 2}, output=run, resume=True)
    told = [str(problem) for problem in caught.value.problems]
    assert "learning_rate: 0.01 when the run began, 0.001 now" in told
    assert any(line.startswith('lora_config: {"r": 2') and '{"r": 4' in line for line in told)
    assert any(line.startswith("train_path: rows.jsonl has changed (sha256 ") for line in told)
    assert len(told) == 3
    assert caught.value.exit_code == 2
    assert (run / "saves" / "step-00000003").is_dir(), "a refusal touches nothing"


def test_data_that_was_moved_is_the_same_data(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_rows: WriteRows
) -> None:
    run = stopped_run(options, tmp_path / "run", monkeypatch)
    moved = {**options, "train_path": str(write_rows("moved.jsonl", ROWS))}
    assert train(moved, output=run, resume=True).summary["steps"] == 6


def test_other_base_at_the_same_path_is_refused(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = make_llama(tmp_path / "base")
    run = stopped_run({**options, "model_id": str(here)}, tmp_path / "run", monkeypatch)
    make_llama(here, seed=5)
    with pytest.raises(ResumeError, match=r"the base is another model now:\n  model: its answers to the probes differ"):
        train({**options, "model_id": str(here)}, output=run, resume=True)


def test_save_with_a_file_cut_short_is_refused_by_name(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stopped_run(options, tmp_path / "run", monkeypatch)
    file = run / "saves" / "step-00000003" / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ResumeError, match=r"step-00000003 is damaged .*\n  optimizer.pt: its size is not"):
        train(options, output=run, resume=True)


# ---- when saves are due ----------------------------------------------------------------------------------------------


def write(run: Path, step: int, keep: int = 1, fill: Callable[[Path], None] = lambda _: None) -> Path:
    position = Position(step=step, tokens=0, elapsed_s=0.0, loss_sum=0.0, logged_step=0, history=[])
    parts: dict[str, Any] = {"base_logits": torch.zeros(1, 3), "keep": keep}
    return write_save(run, position, {"weight": torch.zeros(2, 2)}, fill, identity=Identity({}, {}, None, {}), **parts)


def test_newest_saves_are_kept(tmp_path: Path) -> None:
    for step in (9, 10, 11):
        write(tmp_path, step, keep=2)
    assert sorted(path.name for path in (tmp_path / "saves").iterdir()) == ["step-00000010", "step-00000011"]
    newest = newest_save(tmp_path)
    assert newest is not None
    assert newest.position.step == 11


def test_save_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    def fail(directory: Path) -> None:
        raise OSError(28, "No space left on device")

    write(tmp_path, 4)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, 5, fill=fail)
    assert [path.name for path in (tmp_path / "saves").iterdir()] == ["step-00000004"]


def test_what_a_kill_left_of_a_save_is_no_save_and_is_swept_away(tmp_path: Path) -> None:
    write(tmp_path, 4)
    (tmp_path / "saves" / ".step-00000005.17.tmp").mkdir()
    newest = newest_save(tmp_path)
    assert newest is not None
    assert newest.position.step == 4
    remove_leftovers(tmp_path)
    assert [path.name for path in (tmp_path / "saves").iterdir()] == ["step-00000004"]


def test_saves_are_due_by_the_clock_counted_from_the_last_one() -> None:
    now = [0.0]
    config = TrainConfig(model_id="m", train_path=("x",), save_every_s=10.0)
    saver = Saver(config, StopRequest(), save_steps=None, clock=lambda: now[0])
    arguments, state = TrainingArguments(output_dir="x", use_cpu=True), TrainerState(max_steps=100)
    due: list[int] = []
    for step, at in enumerate([4.0, 9.0, 12.0, 15.0, 21.0, 22.5], start=1):
        now[0], state.global_step = at, step
        control = saver.on_step_end(arguments, state, TrainerControl())
        if control.should_save:
            due.append(step)
            saver.on_save(arguments, state, control)
    assert due == [3, 6]


def history(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
