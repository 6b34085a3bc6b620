"""`loradock serve` as a process of its own: what it announces, how it stops, and what a kill leaves behind."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import yaml

from loradock_serve import server
from loradock_serve.config import load_config
from loradock_serve.errors import ServeConfigError
from loradock_testing.engines import SUPPORT, group_members
from loradock_testing.tiny_checkpoints import write_base
from loradock_testing.waiting import until

# The command line with the fake engine in vLLM's place.
RUN = """
from loradock_serve import engine_command
engine_command.ENGINE_MODULE = "loradock_testing.fake_engine"
from loradock_adapters.cli import main
main()
"""


class Serving:
    """A running `loradock serve`."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.process = process
        self.log_path = log
        self.url = ""

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    async def until_listening(self) -> None:
        """Sets `url`."""
        await until(lambda: "listening on" in self.log or self.process.returncode is not None, "the announcement")
        found = re.search(r"listening on (http://\S+)", self.log)
        assert found, self.log
        self.url = found[1]

    async def engine_group(self) -> int:
        """The process group of the base's engine, once it is healthy."""
        async with httpx.AsyncClient(base_url=self.url, timeout=60) as client:

            async def healthy() -> bool:
                return (await client.get("/health")).status_code == 200

            await until(healthy, "the engine")
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        (launcher,) = children
        return int(launcher)


@asynccontextmanager
async def serve(tmp_path: Path, *flags: str, **environment: str) -> AsyncIterator[Serving]:
    config = tmp_path / "serve.yaml"
    base = write_base(tmp_path / "tiny-base")
    config.write_text(yaml.safe_dump({"base": str(base), "port": 0, "data_dir": str(tmp_path / "data")}))
    (tmp_path / "tmp").mkdir(exist_ok=True)
    log = tmp_path / "log"
    with log.open("w") as file:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", RUN, "serve", str(config), *flags),
            stderr=file,
            stdout=subprocess.DEVNULL,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join([str(SUPPORT), *sys.path]), "TMPDIR": str(tmp_path / "tmp")}
            | environment,
        )
    running = Serving(process, log)
    try:
        yield running
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_server_told_to_stop_leaves_no_process_and_no_socket_and_status_0(tmp_path: Path, number: int) -> None:
    async with serve(tmp_path) as running:
        await running.until_listening()
        group = await running.engine_group()
        assert len(group_members(group)) == 2
        running.process.send_signal(number)
        assert await asyncio.wait_for(running.process.wait(), 60) == 0
        assert group_members(group) == []
        assert list((tmp_path / "tmp").glob("loradock.*")) == []
        assert "Traceback" not in running.log
        assert "alembic" not in running.log


async def test_second_server_on_one_data_dir_ends_with_status_2_and_names_the_first(tmp_path: Path) -> None:
    async with serve(tmp_path) as first:
        await first.until_listening()
        (tmp_path / "second").mkdir()
        async with serve(tmp_path / "second", "--data-dir", str(tmp_path / "data")) as second:
            assert await asyncio.wait_for(second.process.wait(), 60) == 2
            assert f"in use by another gateway, process {first.process.pid}" in " ".join(second.log.split())
            assert "Traceback" not in second.log


async def test_server_that_is_killed_leaves_no_engine_and_no_socket(tmp_path: Path) -> None:
    async with serve(tmp_path) as running:
        await running.until_listening()
        group = await running.engine_group()
        assert len(group_members(group)) == 2
        assert len(list((tmp_path / "tmp").glob("loradock.*/*.sock"))) == 1
        running.process.kill()
        await running.process.wait()
        await until(lambda: group_members(group) == [], "the engine's end")
        await until(lambda: not list((tmp_path / "tmp").glob("loradock.*")), "the socket's end")


async def test_server_removes_the_sockets_of_one_that_was_killed_with_its_launchers(tmp_path: Path) -> None:
    left = tmp_path / "tmp" / "loradock.gone"
    left.mkdir(parents=True)
    (left / "1-1.sock").touch()
    async with serve(tmp_path) as running:
        await running.until_listening()
        assert not left.exists()
        assert len(list((tmp_path / "tmp").glob("loradock.*"))) == 1


async def test_announcement_says_what_is_served_to_whom_and_never_the_key(tmp_path: Path) -> None:
    async with serve(tmp_path, LORADOCK_ADMIN_KEY="s3cret-key") as running:
        await running.until_listening()
        await until(lambda: "its log is" in running.log, "the whole announcement")
        assert "(with an admin key)" in running.log
        assert "base tiny-base or base from " in running.log
        assert re.search(r"\d+ adapter slots \(.+\) of rank 64 \(.+\): .* MiB each", running.log)
        assert "s3cret" not in running.log
        async with httpx.AsyncClient(base_url=running.url, timeout=60) as client:
            assert (await client.get("/v1/models")).status_code == 401


async def test_other_address_without_a_key_does_not_start(tmp_path: Path) -> None:
    async with serve(tmp_path, "--host", "0.0.0.0", LORADOCK_ADMIN_KEY="") as running:
        assert await asyncio.wait_for(running.process.wait(), 60) == 2
        assert "is reachable from other machines" in " ".join(running.log.split())
        assert "Traceback" not in running.log


async def test_port_that_is_taken_is_told_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        config = load_config(None, {"base": "x", "port": port})
        with pytest.raises(ServeConfigError, match=rf"cannot listen on 127\.0\.0\.1:{port}: Address already in use"):
            server._listen(config)
