"""A real vLLM on CPU for tests: its OpenAI server on a fresh Unix socket, gone with all its processes at the end.

Knows nothing of Loradock's own supervision of engines: what is tested with it is what runs *inside* vLLM.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

OUR_PLUGINS = "loradock,loradock_endpoints"
STOCK = ""
"""Value of VLLM_PLUGINS under which nothing of ours is loaded."""


@dataclass(frozen=True)
class VllmServer:
    """A running server."""

    socket: Path
    log: Path
    base: str
    """The name under which it serves the base model."""
    pid: int

    def client(self, timeout_s: float = 120) -> httpx.AsyncClient:
        """An HTTP client for its socket; close it in the loop that used it."""
        # The server closes a connection after 5 idle seconds: who keeps it as long may lose a request to that.
        limits = httpx.Limits(max_connections=256, keepalive_expiry=2)
        transport = httpx.AsyncHTTPTransport(uds=str(self.socket), limits=limits)
        return httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=timeout_s)

    def request(self, method: str, path: str, **options: object) -> httpx.Response:
        """One request, synchronously."""
        with httpx.Client(
            transport=httpx.HTTPTransport(uds=str(self.socket)), base_url="http://engine", timeout=120
        ) as client:
            return client.request(method, path, **options)  # type: ignore[arg-type]


@contextmanager
def vllm_server(
    model: Path,
    *arguments: str,
    plugins: str = OUR_PLUGINS,
    cores: str = "0-1",
    environment: Mapping[str, str] | None = None,
    start_timeout_s: float = 240,
) -> Iterator[VllmServer]:
    """Start vLLM on a model, wait until it is healthy, and end its whole process group afterwards.

    Raises:
        RuntimeError: It ended or did not become healthy in time; the message has the end of its log.
    """
    directory = Path(tempfile.mkdtemp(prefix="ld-"))  # short: a socket's path has at most 107 bytes
    log = directory / "vllm.log"
    command = _command(model, directory / "vllm.sock", arguments)
    variables = {
        **os.environ,
        "VLLM_PLUGINS": plugins,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600",  # a request on a connection that is just being closed would fail
        # Else the first request for logprobs compiles a kernel for half a minute, and everyone waits.
        "TORCH_COMPILE_DISABLE": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        **(environment or {}),
    }
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=variables, start_new_session=True)
    try:
        server = VllmServer(directory / "vllm.sock", log, str(model), process.pid)
        _wait_until_healthy(server, process, start_timeout_s)
        yield server
        if process.poll() is not None:
            raise RuntimeError(f"vLLM ended by itself with {process.returncode}:\n{tail(server.log)}")
    finally:
        _end_group(process)
        shutil.rmtree(directory, ignore_errors=True)


def tail(log: Path, lines: int = 200) -> str:
    """The end of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _command(model: Path, server_socket: Path, arguments: Sequence[str]) -> list[str]:
    fixed = {"--model": str(model), "--uds": str(server_socket), "--dtype": "float32", "--max-model-len": "256"}
    flags = [part for flag, value in fixed.items() if flag not in arguments for part in (flag, value)]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags, "--enforce-eager", *arguments]


def _wait_until_healthy(server: VllmServer, process: subprocess.Popen[bytes], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"vLLM ended with {process.returncode}:\n{tail(server.log)}")
        if _accepts(server.socket) and server.request("GET", "/health").status_code == 200:
            return
        time.sleep(0.2)
    raise RuntimeError(f"vLLM was not healthy after {timeout_s} s:\n{tail(server.log)}")


def _accepts(path: Path) -> bool:
    """Whether someone listens; vLLM binds the socket long before it does."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ask the group to end, then make it: the engine core is a child in the same session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=10)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
