"""`loradock train --nproc`: real processes are started, hear of signals, and leave nothing behind."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest

from loradock_adapters.errors import UsageError
from loradock_testing.rows import WriteRows
from loradock_testing.waiting import until
from loradock_train import launch
from loradock_train.ending import Ending, chosen, describe, raised
from loradock_train.errors import DataError, Problem, RunStopped, TrainError
from loradock_train.launch import Machines, environments

ROWS = [{"prompt": f"def f{i}():", "completion": f" return {i}"} for i in range(6)]


@pytest.fixture
def config(base: Path, tmp_path: Path, write_rows: WriteRows) -> Path:
    write_rows("rows.jsonl", ROWS)
    path = tmp_path / "lora.yaml"
    path.write_text(
        f"model_id: {base}\ntrain_path: rows.jsonl\ncontext_length: 64\nmax_steps: 2\nlearning_rate: 1e-2\n"
        "mixed_precision: 'no'\nlora_config: {r: 2}\nnum_devices: 2\n"
    )
    return path


@contextmanager
def started(config: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """The command, as a person runs it. Ends with the block, and its workers with it."""
    with subprocess.Popen(
        [sys.executable, "-c", "from loradock_adapters.cli import main; main()", "train", str(config), *options],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def workers_of(launcher: int) -> list[int]:
    """The processes that this launcher has started and that still run."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            words = (directory / "cmdline").read_bytes().split(b"\0")
            order = Path(words[-2].decode()) / "order.json"
            is_worker = b"loradock_train.worker" in words and json.loads(order.read_text())["launcher"] == launcher
        except (OSError, IndexError, ValueError):
            continue
        if is_worker:
            found.append(int(directory.name))
    return found


@pytest.mark.parametrize("code", [0, 1])
def test_worker_ends_without_taking_python_down(code: int) -> None:
    """A thread of torch's that wants the interpreter's lock while Python is taken down aborts the process, after all is
    written: a run that was done counted as failed."""
    script = (
        "import atexit, sys; from loradock_train.worker import leave; atexit.register(print, 'taken down'); "
        f"sys.stdout.write('said'); sys.stderr.write('told'); leave({code})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (code, "said", "told")


async def until_training(run: Path) -> None:
    """Until the first step has been logged."""
    metrics = run / "metrics.jsonl"
    await until(lambda: metrics.is_file() and metrics.stat().st_size > 0, "a first step", timeout_s=180.0)


def test_two_processes_train_and_speak_once(config: Path, tmp_path: Path) -> None:
    with started(config, "--output", str(tmp_path / "run"), "--json") as process:
        out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert json.loads(out) == json.loads((tmp_path / "run" / "run.json").read_text())
    assert json.loads(out)["num_devices"] == 2
    assert err.count("parameters trained") == 1


async def test_sigterm_is_passed_on_and_the_run_saves_and_ends_well(config: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "run")
    with started(config, "--output", output, "--set", "max_steps=100000", "--set", "num_epochs=1e6") as process:
        await until_training(tmp_path / "run")
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert "--resume" in err
    assert len(list((tmp_path / "run" / "saves").glob("step-*"))) == 1


@pytest.mark.parametrize("who", ["launcher", "worker"])
async def test_no_process_is_left_where_one_is_killed(config: Path, tmp_path: Path, who: str) -> None:
    with started(config, "--output", str(tmp_path / "run"), "--set", "max_steps=100000") as process:
        await until_training(tmp_path / "run")
        workers = workers_of(process.pid)
        assert len(workers) == 2
        os.kill(process.pid if who == "launcher" else max(workers), signal.SIGKILL)
        _, err = process.communicate(timeout=180)  # ends when nobody holds its stderr any longer
        # The kernel kills them; process 1 holds nothing that `communicate` waits for.
        await until(lambda: all(is_dead(worker) for worker in workers), "the end of every process", timeout_s=60)
    if who == "worker":
        assert process.returncode == 1
        assert "was killed by SIGKILL; the machine may have run out of memory" in err


def is_dead(process: int) -> bool:
    """Gone, or waiting for somebody to read its exit code."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


# ---- what processes are told, and tell ------------------------------------------------------------------------------


def test_machines_number_their_processes_one_after_the_other() -> None:
    told = environments(2, Machines(3, 1, "head:29500"), Path("/unused"))
    assert [each["RANK"] for each in told] == ["2", "3"]
    assert [each["LOCAL_RANK"] for each in told] == ["0", "1"]
    assert {(each["WORLD_SIZE"], each["MASTER_ADDR"], each["MASTER_PORT"]) for each in told} == {("6", "head", "29500")}


@pytest.mark.parametrize(
    ("machines", "message"),
    [
        (Machines(2, 2, "head:1"), "--node-rank 2: with --nodes 2 it must be 0 to 1"),
        (Machines(2, 0, None), "--nodes 2 needs --master-address HOST:PORT of machine 0, got None"),
        (Machines(2, 0, "head"), "got 'head'"),
    ],
)
def test_machines_that_cannot_meet_are_refused(machines: Machines, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        machines.check()


def ending(rank: int, at_s: float, error: Exception) -> Ending:
    return describe(rank, at_s, error, f"Traceback: {error}")


@pytest.mark.parametrize(
    ("endings", "rank"),
    [
        ([ending(0, 1.0, RuntimeError("connection closed")), ending(1, 2.0, TrainError("mine"))], 1),
        ([ending(0, 2.0, RuntimeError("connection closed")), ending(1, 1.0, KeyError("mine"))], 1),
        ([ending(0, 2.0, RuntimeError("connection closed")), Ending(1, 3.0, None, code=-signal.SIGSEGV)], 1),
        ([ending(0, 1.0, TrainError("both")), ending(1, 0.5, TrainError("both"))], 0),
    ],
)
def test_reason_is_the_failure_and_not_what_follows_from_it(endings: Sequence[Ending], rank: int) -> None:
    assert chosen(endings).rank == rank


def test_process_that_we_killed_after_another_failed_is_not_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Process 0 may wait in a step for the dead one, and have no time to say so."""
    told = json.dumps(asdict(ending(1, 0.0, KeyError("mine"))))
    scripts = {
        "0": "import time; time.sleep(600)",
        "1": f"import pathlib, sys; pathlib.Path(sys.argv[1], 'end-1.json').write_text({told!r}); sys.exit(1)",
    }

    def start_process(folder: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        local = environment["LOCAL_RANK"]
        (folder / f"log-{local}.txt").touch()
        return subprocess.Popen([sys.executable, "-c", scripts[local], str(folder)])

    monkeypatch.setattr(launch, "start_process", start_process)
    monkeypatch.setattr(launch, "GRACE_S", 0.1)
    with pytest.raises(TrainError, match=r"process 1 of 2 failed:\n.*mine"):
        launch.launch(launch.WorkOrder({}, [], "run", str(tmp_path), False, False, os.getpid()), 2, Machines())


def test_error_of_a_process_is_raised_as_its_own_type_and_names_the_process() -> None:
    data_error = DataError("rows are wrong:", [Problem("a.jsonl:3", "no prompt")])
    again = raised(ending(1, 0.0, data_error), 4, 2)
    assert isinstance(again, DataError)
    assert (again.exit_code, again.problems) == (2, data_error.problems)
    assert str(again) == f"process 3 of 4: {data_error}"
    assert str(raised(ending(0, 0.0, data_error), 4, 0)) == str(data_error)


def test_stop_of_a_process_is_a_stop_of_the_run(tmp_path: Path) -> None:
    stop = raised(ending(0, 0.0, RunStopped(7, tmp_path)), 2, 0)
    assert isinstance(stop, RunStopped)
    assert (stop.step, stop.save, stop.exit_code) == (7, tmp_path, 0)
