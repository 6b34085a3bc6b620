"""One engine process: start it in a session of its own, wait for its end, leave nothing behind.

The process is our small launcher, which is the parent of vLLM's own processes and ends them if this gateway dies
(`launcher.py`). Knows nothing of vLLM's HTTP, nor of readiness.
"""

import asyncio
import contextlib
import ctypes
import os
import shutil
import signal
import sys
from collections import deque
from pathlib import Path

from loradock_serve import launcher
from loradock_serve.engine_command import EngineCommand

STOP_GRACE_S = launcher.GRACE_S + 5.0
LOG_TAIL_LINES = 30
KEPT_LOGS = 5
"""Logs of earlier starts: a crash's cause must outlast the first few restarts that it leads to."""
SIGNAL_CAUSES = {
    signal.SIGKILL.value: ", perhaps out of memory",
    signal.SIGSEGV.value: ", a crash in native code",
    signal.SIGABRT.value: ", an abort",
}
ORPHAN_POLLS, ORPHAN_POLL_S = 100, 0.05
PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose own parent dies, so that none stays behind as a zombie.

    Without it they go to process 1, which in a container may be this program, or one that buries nobody.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def keep_logs(log_path: Path) -> None:
    """Make room at `log_path`: each log of an earlier start moves on by one number, the oldest goes."""
    logs = [log_path, *(log_path.with_name(f"{log_path.name}.{number}") for number in range(1, KEPT_LOGS + 1))]
    for older, newer in zip(logs[:0:-1], logs[-2::-1], strict=True):
        if newer.exists():
            newer.replace(older)


def explain_status(status: int) -> str:
    """An exit status for people: over 128 it is a signal that ended the process."""
    # The launcher's own death by a signal shows as a negative number.
    number = status - 128 if status > 128 else -status
    if number <= 0:
        return f"{status}"
    return f"{status} (killed by signal {number}{SIGNAL_CAUSES.get(number, '')})"


class EngineProcess:
    """A running engine. Make one with `await EngineProcess.start(command, log_path)`."""

    def __init__(self, process: asyncio.subprocess.Process, command: EngineCommand, log_path: Path) -> None:
        self._process = process
        self._command = command
        self.log_path = log_path

    @classmethod
    async def start(cls, command: EngineCommand, log_path: Path) -> "EngineProcess":
        """Start the engine; what it prints goes to `log_path`, where the logs of the starts before stay as `….1`
        to `….5`.

        The socket's path must be fresh: vLLM binds without unlinking, and a second start on one path fails.
        """
        log_path.parent.mkdir(parents=True, exist_ok=True)
        command.inner_sockets.mkdir(mode=0o700, exist_ok=True)
        keep_logs(log_path)
        with log_path.open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-I",
                launcher.__file__,
                *command.argv,
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
                env=dict(command.environment),
                start_new_session=True,
            )
        return cls(process, command, log_path)

    @property
    def pid(self) -> int:
        """The launcher's process id, which is also the engine's process group."""
        return self._process.pid

    @property
    def socket(self) -> Path:
        """The Unix socket that the engine listens on."""
        return self._command.socket

    async def wait(self) -> int:
        """Until the engine has ended; its exit status."""
        return await self._process.wait()

    async def stop(self) -> None:
        """Ask the engine to end, then make it; returns when the whole group and the socket are gone."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), STOP_GRACE_S)
            except TimeoutError:
                await self._kill_group()
        await self.clean_up()

    async def kill(self) -> None:
        """End the engine at once: one that is already broken has nothing to finish."""
        await self._kill_group()
        await self.clean_up()

    async def clean_up(self) -> None:
        """After the end, however it came: no process of the group and no socket stays."""
        await self._kill_group()
        await self._process.wait()
        await self._reap_orphans()
        self.socket.unlink(missing_ok=True)
        await asyncio.to_thread(shutil.rmtree, self._command.inner_sockets, ignore_errors=True)

    async def _reap_orphans(self) -> None:
        """Bury the launcher's descendants, which became ours when their parents died (`adopt_orphans`)."""
        for _ in range(ORPHAN_POLLS):
            try:
                while os.waitpid(-self.pid, os.WNOHANG)[0]:  # noqa: ASYNC222 - WNOHANG does not wait
                    pass
            except ChildProcessError:
                return
            await asyncio.sleep(ORPHAN_POLL_S)

    async def _kill_group(self) -> None:
        # The session is the launcher's own, so the group is too; its id stays taken while any member lives.
        await asyncio.to_thread(launcher.kill_group, self.pid)

    def log_tail(self) -> str:
        """The last lines that the engine printed, for an error message."""
        try:
            with self.log_path.open(encoding="utf-8", errors="replace") as log:
                return "".join(deque(log, maxlen=LOG_TAIL_LINES)).rstrip()
        except OSError as error:
            return f"(its log {self.log_path} cannot be read: {error})"
