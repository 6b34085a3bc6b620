"""`loradock serve` as its users run it: the command line, a real engine, a free port. For engine-marked tests.

with loradock_server(base, data_dir) as server: ...
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class LoradockServer:
    """A running server."""

    url: str
    pid: int
    data_dir: Path
    log_path: Path

    def loradock(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the command line against this server."""
        command = [sys.executable, "-m", "loradock_adapters.cli", *words]
        environment = os.environ | {"LORADOCK_SERVER": self.url}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert not check or done.returncode == 0, f"{words}: {done.stdout}\n{done.stderr}\n{self.logs()}"
        return done

    def complete(self, model: str, prompt: str | list[int], max_tokens: int, **fields: Any) -> dict[str, Any]:
        """A greedy completion, with its token ids; the whole answer."""
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **fields}
        body["return_token_ids"] = True
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=300)
        assert answer.status_code == 200, f"{answer.text}\n{self.logs()}"
        result: dict[str, Any] = answer.json()
        return result

    def tokens(self, model: str, prompt: str | list[int], max_tokens: int, **fields: Any) -> list[int]:
        """The new tokens of a greedy completion."""
        tokens: list[int] = self.complete(model, prompt, max_tokens, **fields)["choices"][0]["token_ids"]
        return tokens

    def card(self, model: str) -> dict[str, Any]:
        """The `loradock` object of `/v1/models/NAME`."""
        card: dict[str, Any] = (
            httpx.get(f"{self.url}/v1/models/{model}", timeout=30).raise_for_status().json()["loradock"]
        )
        return card

    def wait_healthy(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Returns when `/health` says 200."""
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", timeout=10).status_code == 200:
                    return
            assert time.monotonic() < deadline, f"not healthy in time\n{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        """The ends of the gateway's and the engines' logs, for a failure's message."""
        paths = [self.log_path, *sorted((self.data_dir / "logs").glob("*.log"))]
        return "\n".join(f"--- {path.name}\n" + "\n".join(_tail(path)) for path in paths)


@contextlib.contextmanager
def loradock_server(
    base: Path,
    data_dir: Path,
    *,
    host: str = "127.0.0.1",
    environment: dict[str, str] | None = None,
    healthy: bool = True,
    prefix: Sequence[str] = (),
    data_elsewhere: Path | None = None,
    **config: Any,
) -> Iterator[LoradockServer]:
    """Run `loradock serve` until the block ends; `config` is the rest of its YAML.

    `prefix` are words before the command, as `nsenter`'s; with `data_elsewhere`, `data_dir` holds its own log alone.
    Healthy when the block begins, unless `healthy` is False: then it listens, and its engine may still be starting.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    run = data_dir / f"run-{time.monotonic_ns()}"  # two gateways may share a data_dir
    run.mkdir()
    yaml = run / "serve.yaml"
    # JSON is YAML: no need of a writer here.
    yaml.write_text(
        json.dumps({"base": str(base), "host": host, "port": 0, "data_dir": str(data_elsewhere or data_dir), **config})
    )
    log_path = run / "gateway.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "loradock_adapters.cli", "serve", str(yaml)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | (environment or {}),
        )
    try:
        server = LoradockServer(_url(process, log_path), process.pid, data_dir, log_path)
        if healthy:
            server.wait_healthy()
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        finally:
            process.kill()
            process.wait()


def _url(process: subprocess.Popen[bytes], log_path: Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        text = log_path.read_text(errors="replace")
        if found := re.search(r"listening on (http://\S+)", text):
            return found.group(1)
        assert process.poll() is None, f"`loradock serve` ended with {process.returncode}:\n{text}"
        time.sleep(0.1)
    raise AssertionError(f"no address in time:\n{log_path.read_text(errors='replace')}")


def _tail(path: Path, lines: int = 40) -> list[str]:
    return path.read_text(errors="replace").splitlines()[-lines:] if path.exists() else []


def group_processes(group: int) -> dict[int, str]:
    """Process id to title of every process of a group that is not a zombie."""
    found: dict[int, str] = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            state, _parent, its_group = (directory / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in ("Z", "X"):
                found[int(directory.name)] = (directory / "cmdline").read_text().replace("\0", " ").strip()
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def engine_socket(server: LoradockServer) -> Path:
    """The Unix socket of the base's engine."""
    titles = [title for launcher in children(server.pid) for title in group_processes(launcher).values()]
    (socket,) = {title.split("--uds ")[1].split()[0] for title in titles if "--served-model-name base --uds " in title}
    return Path(socket)


def children(pid: int) -> list[int]:
    """Direct children of a process, zombies included."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]
