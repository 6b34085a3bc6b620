"""Training on a Ray cluster: a local one of real processes, and what is refused before one is asked."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from loradock_adapters.cli import run
from loradock_testing.rows import WriteRows
from loradock_train.ray_run import _held_port

TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
"""What Ray lets in whom with: the cluster's and ours."""
PATH = os.pathsep.join(entry for entry in sys.path if entry)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A head of two cores on free ports; its address. It is ended with all that it started."""
    environment = (
        os.environ | {"PYTHONPATH": PATH, "RAY_DISABLE_DOCKER_CPU_WARNING": "1", "OMP_NUM_THREADS": "1"} | TOKEN
    )
    script = (
        "import ray, sys; c = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, "
        "object_store_memory=80_000_000, _temp_dir=sys.argv[1], _node_ip_address='127.0.0.1'); "
        "print(c.address_info['gcs_address'], flush=True); sys.stdin.read(); ray.shutdown()"
    )
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        head = subprocess.Popen(
            [sys.executable, "-c", script, folder], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert head.stdout is not None
        try:
            yield head.stdout.readline().strip()
        finally:
            head.communicate("")


@pytest.fixture
def config(base: Path, tmp_path: Path, write_rows: WriteRows) -> Path:
    write_rows("rows.jsonl", [{"prompt": f"n {i}: ", "completion": f"{3 * i}"} for i in range(22)])
    values = {
        "model_id": str(base), "train_path": "rows.jsonl", "lora_config": {"r": 4, "lora_dropout": 0.1},
        "context_length": 64, "train_batch_size_per_device": 2, "max_steps": 8, "learning_rate": 1e-3,
        "mixed_precision": "no", "logging_steps": 1,
    }  # fmt: skip
    path = tmp_path / "lora.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "loradock_adapters.cli", "train", *words]


def train(*words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": PATH, "OMP_NUM_THREADS": "1"} | TOKEN
    return subprocess.run(command(*words), env=environment, capture_output=True, text=True, timeout=400)


def test_run_on_ray_has_the_bits_of_two_processes_here(cluster: str, config: Path, tmp_path: Path) -> None:
    here = train(str(config), "--nproc", "2", "--output", str(tmp_path / "here"))
    assert here.returncode == 0, here.stderr
    there = train(str(config), "--ray", cluster, "--workers", "2", "--output", str(tmp_path / "there"))
    assert there.returncode == 0, there.stderr
    one, other = (load_file(tmp_path / name / "checkpoint" / "adapter_model.safetensors") for name in ("here", "there"))
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)
    assert json.loads((tmp_path / "there" / "run.json").read_text())["num_devices"] == 2
    assert list(tmp_path.glob(".loradock-*")) == []


def test_error_of_a_worker_is_told_as_it_is(cluster: str, config: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "n", "completion": 3}\n')
    done = train(str(config), "--ray", cluster, "--workers", "2", "--output", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "line 1: 'completion' must be a string, found int" in done.stderr


def test_run_that_is_stopped_saves_and_goes_on(cluster: str, config: Path, tmp_path: Path) -> None:
    words = [
        str(config),
        "--set",
        "max_steps=100000",
        "--ray",
        cluster,
        "--workers",
        "2",
        "--output",
        str(tmp_path / "run"),
    ]
    environment = os.environ | {"PYTHONPATH": PATH, "OMP_NUM_THREADS": "1"} | TOKEN
    told = tmp_path / "told.txt"
    with told.open("w") as file:  # a pipe that nobody reads would fill up
        process = subprocess.Popen(command(*words), env=environment, stderr=file)
    try:
        until_s = time.monotonic() + 300
        lines = tmp_path / "run" / "metrics.jsonl"
        while not (lines.is_file() and lines.stat().st_size):
            assert process.poll() is None, told.read_text()
            assert time.monotonic() < until_s, told.read_text()
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=300) == 0, told.read_text()
    finally:  # of a test that fails: what it leaves running would fail the next one, too
        process.kill()
        process.wait()
    assert f"--ray {cluster} --workers 2" in told.read_text()
    assert len(list((tmp_path / "run" / "saves").glob("step-*"))) == 1


def test_port_where_processes_meet_is_nobody_elses_and_torch_can_listen_there() -> None:
    with _held_port() as port:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("", port))
        store = TCPStore("127.0.0.1", port, is_master=True)
        store.set("word", "heard")
        assert TCPStore("127.0.0.1", port, is_master=False).get("word") == b"heard"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workers", "2"], "belong to --ray ADDRESS"),
        (["--ray", "auto", "--nproc", "2"], "--ray places the processes itself"),
        (["--ray", "auto", "--set", "output_dir=s3://b/run"], "as paths on storage that all machines share"),
    ],
)
def test_what_ray_cannot_do_is_refused(
    words: list[str], message: str, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.chdir(config.parent)
    assert run(["train", str(config), *words]) == 2
    assert message in capsys.readouterr().err
