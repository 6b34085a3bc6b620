"""The launcher: whatever ends first, nothing of the engine stays. Real processes, no engine."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loradock_serve import launcher

# An engine with a child of its own, as vLLM has: prints both ids once it stands, and outlives a SIGHUP.
ENGINE = """
import os, signal, subprocess, sys, time
memory, shared = [], ()
if "shares" in sys.argv:
    from multiprocessing import resource_tracker, shared_memory
    memory.append(shared_memory.SharedMemory(create=True, size=4096))
    shared = (resource_tracker.getfd(),)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], pass_fds=shared)
def stop(*_):
    print("asked to stop", flush=True)
    sys.exit(7)
signal.signal(signal.SIGTERM, signal.SIG_IGN if "stubborn" in sys.argv else stop)
print(os.getpid(), child.pid, *(block.name for block in memory), flush=True)
if "exits" in sys.argv:
    sys.exit(3)
time.sleep(600)
"""


class Launched:
    """A launcher with an engine below it."""

    def __init__(self, *how: str, socket: Path | None = None, grace_s: float = 10.0) -> None:
        run = f"import sys, loradock_serve.launcher as l; l.GRACE_S = {grace_s}; sys.exit(l.main(sys.argv[1:]))"
        flags = ["--uds", str(socket)] if socket is not None else []
        self.process = subprocess.Popen(
            [sys.executable, "-c", run, sys.executable, "-c", textwrap.dedent(ENGINE), *how, *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        engine, child, *self.memory = self.process.stdout.readline().split()
        self.engine, self.child = int(engine), int(child)

    def members(self) -> list[int]:
        """Processes of the group that still run."""
        return [pid for pid in launcher._processes() if launcher._group_of(pid) == self.process.pid]

    def close(self) -> None:
        """Leave nothing of this test behind."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        self.process.wait()


@pytest.fixture
def launch() -> Iterator[Callable[..., Launched]]:
    launched: list[Launched] = []

    def start(*how: str, socket: Path | None = None, grace_s: float = 10.0) -> Launched:
        launched.append(Launched(*how, socket=socket, grace_s=grace_s))
        return launched[-1]

    yield start
    for one in launched:
        one.close()


def wait_until_empty(one: Launched) -> None:
    deadline = time.monotonic() + 15
    while one.members():
        assert time.monotonic() < deadline, one.members()
        time.sleep(0.02)  # another process's end: there is nothing to wait on but its group


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_launcher_told_to_stop_lets_the_engine_finish_and_passes_its_status(
    launch: Callable[..., Launched], number: int
) -> None:
    one = launch()
    one.process.send_signal(number)
    output, _ = one.process.communicate(timeout=15)
    assert output == "asked to stop\n"
    assert one.process.returncode == 7
    wait_until_empty(one)


def test_engine_that_will_not_stop_is_killed_after_the_grace(launch: Callable[..., Launched]) -> None:
    one = launch("stubborn", grace_s=0.2)
    one.process.terminate()
    assert one.process.wait(15) == 128 + signal.SIGKILL
    wait_until_empty(one)


def test_engine_that_exits_takes_its_children_along(launch: Callable[..., Launched]) -> None:
    one = launch("exits")
    assert one.process.wait(15) == 3
    wait_until_empty(one)


def test_engine_killed_ends_the_group_and_says_by_which_signal(launch: Callable[..., Launched]) -> None:
    one = launch()
    os.kill(one.engine, signal.SIGKILL)
    assert one.process.wait(15) == 128 + signal.SIGKILL
    wait_until_empty(one)


def test_engine_killed_leaves_no_shared_memory(launch: Callable[..., Launched]) -> None:
    one = launch("shares")
    memory = Path("/dev/shm") / one.memory[0]
    assert memory.exists()
    os.kill(one.engine, signal.SIGKILL)
    one.process.wait(15)
    wait_until_empty(one)
    assert not memory.exists()


def test_group_killed_from_outside_leaves_no_shared_memory(launch: Callable[..., Launched]) -> None:
    one = launch("shares")
    launcher.kill_group(one.process.pid)
    one.process.wait(15)
    assert one.members() == []
    assert not (Path("/dev/shm") / one.memory[0]).exists()


def test_gateway_that_is_gone_ends_the_engine_and_its_socket(launch: Callable[..., Launched], tmp_path: Path) -> None:
    place = tmp_path / "loradock-x"
    place.mkdir()
    socket = place / "1.sock"
    socket.touch()
    (place / "1").mkdir()
    (place / "1" / "inner").touch()
    one = launch(socket=socket)
    assert one.process.stdin is not None
    one.process.stdin.close()  # what a gateway's SIGKILL looks like from here
    assert one.process.wait(15) == 7
    wait_until_empty(one)
    assert not place.exists()


def test_launcher_that_stops_while_the_gateway_lives_leaves_it_its_directory(
    launch: Callable[..., Launched], tmp_path: Path
) -> None:
    one = launch(socket=tmp_path / "x" / "1.sock")
    (tmp_path / "x").mkdir()
    one.process.terminate()
    one.process.wait(15)
    assert (tmp_path / "x").is_dir()


def test_bytes_on_standard_input_are_no_end(launch: Callable[..., Launched]) -> None:
    one = launch()
    assert one.process.stdin is not None
    one.process.stdin.write("x")
    one.process.stdin.flush()
    with pytest.raises(subprocess.TimeoutExpired):
        one.process.wait(3 * launcher.POLL_S)
    one.process.stdin.close()
    assert one.process.wait(15) == 7


def test_launcher_needs_nothing_but_the_standard_library() -> None:
    check = (
        f"import runpy, sys; runpy.run_path({launcher.__file__!r}); print([m for m in sys.modules if 'loradock' in m])"
    )
    output = subprocess.run([sys.executable, "-I", "-S", "-c", check], capture_output=True, text=True, check=True)
    assert output.stdout == "[]\n"


def test_group_of_a_process_that_is_gone_is_none() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.DEVNULL)
    gone.wait()
    assert launcher._group_of(gone.pid) is None
    assert launcher._group_of(os.getpid()) == os.getpgrp()
