"""Both servers: stock vLLM's own OpenAI server, and `loradock serve` with the engine it starts. On loopback TCP.

Each runs below Loradock's small launcher in a process group of its own, which ends with this process however that ends.
What an engine was really started with is read from the running process, not from what we meant to start.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from against_stock.errors import BenchmarkError
from against_stock.processes import command_of, descendants, environment_of
from loradock_adapters.client import Client
from loradock_adapters.errors import LoradockError
from loradock_serve import engine_args, launcher
from loradock_serve.engine_command import ENGINE_MODULE

BASE = "base"
"""The name of the base on both sides."""
START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 40.0
LOG_LINES = 30
EXCEPTION = re.compile(r"\b\w+(Error|Exception|Exit)\b: ")
STOCK_WRAPPER = "PunicaWrapperCPU"
SHOWN_VARIABLES = re.compile(r"^(VLLM_|OMP_|KMP_|GOMP_|MKL_|TORCH|LD_PRELOAD|MALLOC_|ATEN_)")


@dataclass(frozen=True)
class Setup:
    """What both engines are started with."""

    base: Path
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """vLLM's own, underscores instead of dashes."""
    cores: str | None = None
    """Of the compute threads, as "0-1"; None leaves Loradock to its default, which stock gets as well."""
    kv_cache_gib: int | None = None
    serve: Mapping[str, Any] = field(default_factory=dict)
    """Sections of Loradock's config besides the engine's."""


class Server(ABC):
    """One side: a process with its log."""

    label: str

    @abstractmethod
    def start(self) -> None:
        """Begin to start; returns at once."""

    @abstractmethod
    def wait_until_ready(self) -> None:
        """Returns when requests are answered."""

    @abstractmethod
    def register(self, adapters: Mapping[str, Path]) -> list[float]:
        """Make adapters known under their names, one after the other; the seconds each call took."""

    @abstractmethod
    def effective(self) -> dict[str, Any]:
        """What its engine runs with: command, environment, config, LoRA wrapper."""

    def __init__(self, setup: Setup, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.setup, self.directory, self.url = setup, directory, ""
        self.log = directory / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    def _launch(self, command: list[str], environment: Mapping[str, str]) -> None:
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", launcher.__file__, *command],
                stdin=subprocess.PIPE,  # its end tells the launcher that we are gone
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        if self._process is None:
            raise BenchmarkError(f"{self.label} was not started")
        return self._process.pid

    def _until(self, what: str, found: Any) -> Any:
        """Poll until `found()` returns something; BenchmarkError when the process ends or the time is over."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if (result := found()) is not None:
                return result
            if self._process is None or self._process.poll() is not None:
                raise BenchmarkError(f"{self.label} ended before it was ready:\n{self.logs()}")
            time.sleep(0.2)
        raise BenchmarkError(f"{self.label}: {what} did not come within {START_TIMEOUT_S:.0f} s:\n{self.logs()}")

    def _healthy(self) -> bool | None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{self.url}/health", timeout=10).status_code == 200:
                return True
        return None

    def logs(self) -> str:
        """The ends of its logs, for a message."""
        return _end_of(self.log)

    def check_alive(self) -> None:
        """Raises BenchmarkError where the server has ended by itself."""
        if self._process is not None and self._process.poll() is not None:
            raise BenchmarkError(f"{self.label} ended with status {self._process.returncode}:\n{self.logs()}")

    def stop(self) -> None:
        """End it and everything below it."""
        if self._process is None:
            return
        process, self._process = self._process, None
        if process.stdin is not None:
            process.stdin.close()
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _engine(self) -> int:
        """The process id of the engine's API server."""
        for pid in descendants(self.pid):
            words = command_of(pid)
            if ENGINE_MODULE in words and launcher.__file__ not in words:
                return pid
        raise BenchmarkError(f"{self.label} runs no engine:\n{self.logs()}")

    def _effective(self, info: dict[str, Any], wrapper: str) -> dict[str, Any]:
        pid = self._engine()
        variables = {k: v for k, v in sorted(environment_of(pid).items()) if SHOWN_VARIABLES.match(k)}
        config = info["vllm_config"]
        lora, scheduler = config["lora_config"], config["scheduler_config"]
        return {
            "command": shlex.join(command_of(pid)),
            "environment": variables,
            "lora_wrapper": wrapper,
            "max_loras": lora["max_loras"],
            "max_cpu_loras": lora["max_cpu_loras"],
            "max_lora_rank": lora["max_lora_rank"],
            "lora_dtype": lora["lora_dtype"],
            "dtype": config["model_config"]["dtype"],
            "max_model_len": config["model_config"]["max_model_len"],
            "max_num_seqs": scheduler["max_num_seqs"],
            "max_num_batched_tokens": scheduler["max_num_batched_tokens"],
            "enforce_eager": config["model_config"]["enforce_eager"],
            "prefix_cache": config["cache_config"]["enable_prefix_caching"],
            "block_size": config["cache_config"]["block_size"],
            "threads": variables.get("VLLM_CPU_OMP_THREADS_BIND"),
        }


def _environment() -> dict[str, str]:
    """What both processes inherit. The development routes tell an engine's whole config; they change nothing else."""
    dropped = {"VLLM_PLUGINS", "LORADOCK_ADMIN_KEY"}
    return {key: value for key, value in os.environ.items() if key not in dropped} | {"VLLM_SERVER_DEV_MODE": "1"}


def all_cores() -> str:
    """The cores that this process may use, which is what `loradock serve` binds an engine's threads to."""
    return ",".join(map(str, sorted(os.sched_getaffinity(0))))


class StockServer(Server):
    """`python -m vllm.entrypoints.openai.api_server` with no plug-in of ours, threads bound as Loradock binds them."""

    label = "stock vLLM"

    def start(self) -> None:
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        arguments = {
            "model": str(self.setup.base),
            "served_model_name": BASE,
            "host": "127.0.0.1",
            "port": port,
            "enable_lora": True,
            "enforce_eager": True,
            "disable_uvicorn_access_log": True,
        }
        command = [
            sys.executable,
            "-m",
            ENGINE_MODULE,
            *engine_args.command_line(arguments | dict(self.setup.arguments)),
        ]
        environment = _environment() | {
            "VLLM_PLUGINS": "",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600",
            "VLLM_CPU_OMP_THREADS_BIND": self.setup.cores or all_cores(),
            "OMP_WAIT_POLICY": "PASSIVE",
            "TORCH_COMPILE_DISABLE": "1",
        }
        if self.setup.kv_cache_gib is not None:
            environment["VLLM_CPU_KVCACHE_SPACE"] = str(self.setup.kv_cache_gib)
        self._launch(command, environment)

    def wait_until_ready(self) -> None:
        self._until("an answer to /health", self._healthy)

    def register(self, adapters: Mapping[str, Path]) -> list[float]:
        seconds = []
        with httpx.Client(base_url=self.url, timeout=120) as client:
            for name, path in adapters.items():
                began = time.perf_counter()
                answer = client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)})
                seconds.append(time.perf_counter() - began)
                if answer.status_code != 200:
                    raise BenchmarkError(f"stock vLLM did not load {name}: {answer.text}\n{self.logs()}")
        return seconds

    def effective(self) -> dict[str, Any]:
        info = httpx.get(f"{self.url}/server_info", params={"config_format": "json"}, timeout=120).json()
        found = re.findall(r"Using (\S*Punica\S*)\.", self.log.read_text(errors="replace"))
        if set(found) != {STOCK_WRAPPER}:
            raise BenchmarkError(f"stock vLLM's log names the LoRA wrappers {found}, not {STOCK_WRAPPER}: is it stock?")
        return self._effective(info, STOCK_WRAPPER)


class LoradockServer(Server):
    """`loradock serve` with a config file, as its users run it; adapters come through its HTTP API."""

    label = "loradock serve"

    def __init__(self, setup: Setup, directory: Path) -> None:
        super().__init__(setup, directory)
        self._digests: dict[str, str] = {}

    def start(self) -> None:
        engine = dict(self.setup.arguments)
        if self.setup.cores is not None:
            engine["cpu_cores"] = self.setup.cores
        if self.setup.kv_cache_gib is not None:
            engine["kv_cache_gib"] = self.setup.kv_cache_gib
        config = {"base": str(self.setup.base), "port": 0, "data_dir": str(self.directory / "data"), **self.setup.serve}
        path = self.directory / "serve.yaml"
        path.write_text(json.dumps(config | ({"engine": engine} if engine else {})))  # JSON is YAML
        self._launch([sys.executable, "-m", "loradock_adapters.cli", "serve", str(path)], _environment())

    def wait_until_ready(self) -> None:
        def address() -> str | None:
            found = re.search(r"listening on (http://\S+)", self.log.read_text(errors="replace"))
            return found[1] if found else None

        self.url = self._until("its address", address)
        self._until("an answer to /health", self._healthy)

    def register(self, adapters: Mapping[str, Path]) -> list[float]:
        seconds = []
        with Client(self.url) as client:
            for name, path in adapters.items():
                began = time.perf_counter()
                try:
                    self._digests[name] = client.push(path, name)["digest"]
                except LoradockError as error:
                    raise BenchmarkError(f"{name} could not be pushed: {error}\n{self.logs()}") from error
                seconds.append(time.perf_counter() - began)
        return seconds

    def loaded(self, names: Sequence[str]) -> list[str]:
        """Those of the adapters whose weights are in the engine's memory."""
        with self._engine_client() as client:
            there = set(client.get("/loradock/status").json()["loaded"])
        return [name for name in names if self._digests[name] in there]

    def _engine_client(self) -> httpx.Client:
        words = command_of(self._engine())
        transport = httpx.HTTPTransport(uds=words[words.index("--uds") + 1])
        return httpx.Client(transport=transport, base_url="http://engine", timeout=120)

    def effective(self) -> dict[str, Any]:
        with self._engine_client() as client:
            info = client.get("/server_info", params={"config_format": "json"}).json()
            status = client.get("/loradock/status").json()
        wrapper = str(status["lora_wrapper"])
        if not status["corrected"] or not wrapper.startswith("loradock_serve."):
            raise BenchmarkError(f"Loradock's engine runs with the LoRA wrapper {wrapper}, which is not ours")
        gateway = shlex.join(command_of(next(pid for pid in descendants(self.pid) if pid != self.pid)))
        config = (self.directory / "serve.yaml").read_text()
        return {"gateway": gateway, "config": json.loads(config), **self._effective(info, wrapper)}

    def logs(self) -> str:
        return "\n".join([super().logs(), _end_of(self.directory / "data" / "logs" / "engine-base.log")])


def _end_of(log: Path) -> str:
    """Its last lines, and before them those that name an exception: vLLM's last words are that others failed."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    named = [line for line in lines[:-LOG_LINES] if EXCEPTION.search(line)]
    return "\n".join([f"--- {log}", *named[-10:], *lines[-LOG_LINES:]])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def both(stock: Setup, ours: Setup, directory: Path) -> Iterator[tuple[StockServer, LoradockServer]]:
    """Start both at once, and end both with the block. Ready when the block begins."""
    sides = StockServer(stock, directory / "stock"), LoradockServer(ours, directory / "loradock")
    try:
        for side in sides:
            side.start()
        for side in sides:
            side.wait_until_ready()
        try:
            yield sides
        except BenchmarkError as error:
            raise BenchmarkError("\n".join([str(error), *(side.logs() for side in sides)])) from error
        for side in sides:
            side.check_alive()
    finally:
        for side in sides:
            side.stop()
