"""What a command costs in the processor's time, so that what others do on this machine meanwhile is not in it."""

import resource
import subprocess
from collections.abc import Sequence

TRIES = 10
TIMEOUT_S = 120.0


def require_cheap(command: Sequence[str], most_s: float) -> str:
    """What the command prints. Raises AssertionError where it fails, or takes more in each of several tries.

    One try is not enough: beside other work, caches are cold and the clock is slow.
    """
    tries_s: list[float] = []
    while len(tries_s) < TRIES:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        assert done.returncode == 0, done.stdout + done.stderr
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        tries_s.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        if tries_s[-1] < most_s:
            return done.stdout
    raise AssertionError(f"never within {most_s:g} s of a processor: {[round(each_s, 2) for each_s in tries_s]}")
