"""A small parent for one engine: whatever happens, the engine's whole process group ends with it.

Run by the gateway as `python -I launcher.py COMMAND…` in a process session of its own. vLLM starts children that
outlive a killed parent; this process, standard library only, stays beside them and ends the group in two cases: the
engine's first process exits (its children must not keep memory or the socket), or the gateway is gone, which shows as
end-of-file on standard input. Exits with the engine's own status.
"""

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time

GRACE_S = 10.0
"""Between asking an engine to stop and killing its group. vLLM aborts what runs and exits within a second or two."""
POLL_S = 0.5
STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}
TRACKER = b"from multiprocessing.resource_tracker import main"
"""In the command line of the process that removes the shared memory of its family once all of them have ended."""
TRACKER_LOOKS, TRACKER_LOOK_S = 150, 0.02
"""Looks and not a time: of a machine that stood still for a while, the tracker has had nothing either."""


def main(command: list[str]) -> int:
    """Run `command` until it ends or is to end; its exit status, 128 + N where signal N ended it."""
    wake_read = _wakeup_pipe()
    engine = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    stopping_since: float | None = None
    orphaned = False
    while engine.poll() is None:
        watched = [wake_read] if stopping_since is not None else [sys.stdin.fileno(), wake_read]
        readable, _, _ = select.select(watched, [], [], POLL_S)
        if stopping_since is None:
            orphaned = _gateway_gone(readable)
            if orphaned or _signalled(readable, wake_read):
                stopping_since = time.monotonic()
                engine.terminate()
        if stopping_since is not None and time.monotonic() - stopping_since > GRACE_S:
            break
    kill_group(os.getpgrp(), spare=os.getpid())
    status = engine.wait()
    if orphaned:
        _remove_sockets(command)
    return status if status >= 0 else 128 - status


def _wakeup_pipe() -> int:
    # Signals become bytes on a pipe, so that one select() waits for all three: a child, a signal, the gateway's end.
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)  # first: no signal is to be handled without its byte
    for number in (*STOP_SIGNALS, signal.SIGCHLD):
        signal.signal(number, lambda _number, _frame: None)
    return wake_read


def _gateway_gone(readable: list[int]) -> bool:
    return sys.stdin.fileno() in readable and not os.read(sys.stdin.fileno(), 1)


def _signalled(readable: list[int], wake_read: int) -> bool:
    return wake_read in readable and bool(STOP_SIGNALS & set(os.read(wake_read, 64)))


def _remove_sockets(command: list[str]) -> None:
    """The engine's socket, those between its processes, and the directory that a gateway which is gone made for all."""
    if "--uds" in command[:-1]:
        socket = command[command.index("--uds") + 1]
        shutil.rmtree(os.path.splitext(socket)[0], ignore_errors=True)  # noqa: PTH122 - plain names are wanted
        with contextlib.suppress(OSError):
            os.unlink(socket)  # noqa: PTH108
        with contextlib.suppress(OSError):
            os.rmdir(os.path.dirname(socket))  # noqa: PTH106, PTH120


def kill_group(group: int, spare: int | None = None) -> None:
    """SIGKILL every process of a group but `spare`, again until none is left (one may fork meanwhile).

    The trackers of shared memory come last: they see that the others have ended, free in /dev/shm what those left, and
    end. Killed with them, an engine leaves hundreds of megabytes there at every stop.
    """

    def members(*, trackers: bool) -> list[int]:
        found = [pid for pid in _processes() if pid != spare and _group_of(pid) == group]
        return [pid for pid in found if trackers or not _is_tracker(pid)]

    for _ in range(20):
        if not _kill(members(trackers=False)):
            break
        time.sleep(0.05)
    for _ in range(TRACKER_LOOKS):
        if not members(trackers=True):
            break
        time.sleep(TRACKER_LOOK_S)
    _kill(members(trackers=True))


def _kill(pids: list[int]) -> bool:
    """Whether there was any."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    return bool(pids)


def _is_tracker(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:  # noqa: PTH123
            return TRACKER in file.read()
    except OSError:
        return False


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208 - plain names are wanted


def _group_of(pid: int) -> int | None:
    """The process group of a process that still runs; a zombie counts as gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:  # noqa: PTH123
            state, _parent, group = file.read().rpartition(")")[2].split()[:3]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in ("Z", "X") else int(group)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
