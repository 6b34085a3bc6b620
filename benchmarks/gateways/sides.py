"""The gateways of the comparison, each a process in front of the same mock engine.

The others are installed in throw-away environments, at the versions below, and never share one with the project. Their
settings are the leanest they document: one worker, no logging, no telemetry, no balancing among engines that are not
there.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MOCK, OURS, ROUTER, LITELLM = "mock", "loradock", "vllm-router", "litellm"
TUNED_ROUTER = "vllm-router, tuned"
"""Spread blindly and silent but for errors; `ROUTER` does what it does by default, as ours, log lines included."""
REQUIREMENTS = {ROUTER: "vllm-router==0.1.17", LITELLM: "litellm[proxy]==1.106.2"}
START_TIMEOUT_S = 120
TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")
BASE_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


@dataclass(frozen=True)
class Side:
    """A running process that answers on a port of this machine."""

    name: str
    port: int
    pid: int
    command: tuple[str, ...]
    version: str

    def cpu_s(self) -> float:
        """Processor time of the process and of all below it, so far."""
        parents: dict[int, tuple[int, int]] = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # one that has just ended
                fields = path.read_text().rpartition(")")[2].split()
                parents[int(path.parent.name)] = int(fields[1]), int(fields[11]) + int(fields[12])
        found = {self.pid}
        for _ in range(8):  # generations
            found |= {pid for pid, (parent, _) in parents.items() if parent in found}
        ticks = sum(parents[pid][1] for pid in found if pid in parents)
        return ticks / TICKS_A_SECOND


@contextlib.contextmanager
def running(place: Path, others: Path | None) -> Iterator[list[Side]]:
    """The mock alone, our gateway, and the others where `others` says in which directory their environments are."""
    with contextlib.ExitStack() as stack:
        mock = stack.enter_context(_mock(place))
        sides = [mock, stack.enter_context(_loradock(place))]
        if others is not None:
            python = {name: _environment(others, name) for name in REQUIREMENTS}
            sides.append(stack.enter_context(_router(place, python[ROUTER], mock, ROUTER)))
            tuning = ("--policy", "round_robin", "--log-level", "error")
            sides.append(stack.enter_context(_router(place, python[ROUTER], mock, TUNED_ROUTER, *tuning)))
            sides.append(stack.enter_context(_litellm(place, python[LITELLM], mock)))
        yield sides


def _environment(others: Path, name: str) -> Path:
    """The interpreter of an environment that holds this gateway and nothing else; made where it is not there."""
    directory = others.absolute() / name
    stamp = directory / "installed"
    requirement = REQUIREMENTS[name]
    if not stamp.exists() or stamp.read_text() != requirement:
        print(f"installing {requirement} into {directory}", file=sys.stderr)
        shutil.rmtree(directory, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", directory], check=True)
        subprocess.run([directory / "bin" / "python", "-m", "pip", "install", "-qq", requirement], check=True)
        stamp.write_text(requirement)
    return directory / "bin" / "python"


@contextlib.contextmanager
def _process(command: list[str], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    inherited = {key: value for key, value in os.environ.items() if key not in ("LORADOCK_ADMIN_KEY", "PYTHONPATH")}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=inherited | environment)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def _mock(place: Path) -> Iterator[Side]:
    command = [sys.executable, str(Path(__file__).with_name("mock_engine.py")), str(place / "mock.sock")]
    with _process(command, place / "mock.log") as process:
        port = _said_port(process, place / "mock.log", r"(\d+)\n")
        yield Side(MOCK, port, process.pid, tuple(command), "")


@contextlib.contextmanager
def _loradock(place: Path) -> Iterator[Side]:
    (place / "base").mkdir()
    (place / "base" / "config.json").write_text(json.dumps(BASE_CONFIG))
    config = place / "serve.yaml"
    config.write_text(
        f"base: {place}/base\nport: 0\ndata_dir: {place}/data\nengine: {{url: 'unix://{place}/mock.sock'}}\n"
    )
    command = [sys.executable, "-c", "from loradock_adapters.cli import main; main()", "serve", str(config)]
    log = place / "loradock.log"
    with _process(command, log, PYTHONPATH=os.environ.get("PYTHONPATH", "")) as process:
        port = _said_port(process, log, r"listening on http://127\.0\.0\.1:(\d+)")
        yield Side(OURS, port, process.pid, tuple(command), _version(Path(sys.executable), "loradock"))


@contextlib.contextmanager
def _router(place: Path, python: Path, mock: Side, name: str, *tuning: str) -> Iterator[Side]:
    port, log = _free_port(), place / f"{name}.log"
    command = [str(python.with_name("vllm-router")), "--worker-urls", f"http://127.0.0.1:{mock.port}"]
    command += ["--port", str(port), "--prometheus-port", str(_free_port()), *tuning]
    with _process(command, log) as process:
        _until_healthy(process, log, f"http://127.0.0.1:{port}/health")
        yield Side(name, port, process.pid, tuple(command), _version(python, "vllm-router"))


@contextlib.contextmanager
def _litellm(place: Path, python: Path, mock: Side) -> Iterator[Side]:
    port = _free_port()
    config = place / "litellm.yaml"
    config.write_text(
        f"""
model_list:
  - model_name: base
    litellm_params: {{model: openai/base, api_base: "http://127.0.0.1:{mock.port}/v1", api_key: none}}
litellm_settings: {{telemetry: false, set_verbose: false}}
general_settings: {{disable_spend_logs: true}}
"""
    )
    command = [str(python.with_name("litellm")), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--num_workers", "1", "--telemetry", "False"]
    settings = {"LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MODE": "PRODUCTION"}
    settings["LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY"] = "true"  # ours has no key to look at either
    with _process(command, place / "litellm.log", **settings) as process:
        _until_healthy(process, place / "litellm.log", f"http://127.0.0.1:{port}/health/liveliness")
        yield Side(LITELLM, port, process.pid, tuple(command), _version(python, "litellm"))


def _version(python: Path, distribution: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({distribution!r}))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _said_port(process: subprocess.Popen[bytes], log: Path, pattern: str) -> int:
    while process.poll() is None:
        if found := re.search(pattern, log.read_text()):
            return int(found[1])
        time.sleep(0.05)
    raise RuntimeError(log.read_text())


def _until_healthy(process: subprocess.Popen[bytes], log: Path, url: str) -> None:
    until = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=1) as answer:
            if answer.status == 200:
                return
        time.sleep(0.1)
    raise RuntimeError(f"not healthy at {url}: {log.read_text()}")
