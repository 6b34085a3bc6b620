"""The server's log: one line for each event, on stderr, in order; lines about single requests go out a few at a time.

A write of its own for each costs as much as a good part of a request's way through the gateway. So these wait up to
`WRITE_EVERY_S` for others, and any other line takes them along. Knows nothing of what is logged.
"""

import asyncio
import contextlib
import logging
import time
from typing import TextIO

WRITE_EVERY_S = 0.2
MAX_WAITING = 1000


class LogLines(logging.StreamHandler[TextIO]):
    """Writes every record to a stream; those of the logger `patient` may wait a little, on the event loop."""

    def __init__(self, stream: TextIO, patient: str) -> None:
        super().__init__(stream)
        self.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._patient = patient
        self._waiting: list[str] = []
        self._timer: asyncio.TimerHandle | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """logging."""
        try:
            line = self.format(record)
        except (TypeError, ValueError):  # arguments that do not fit their message
            self.handleError(record)
            return
        self._waiting.append(line)
        patient = record.name == self._patient and record.levelno <= logging.INFO
        if not patient or len(self._waiting) >= MAX_WAITING:
            self.flush()
        elif self._timer is None:
            try:
                self._timer = asyncio.get_running_loop().call_later(WRITE_EVERY_S, self.flush)
            except RuntimeError:  # another thread's, or before and after the loop
                self.flush()

    def flush(self) -> None:
        """Write what waits."""
        self.acquire()
        try:
            lines, self._waiting, self._timer = self._waiting, [], None
            # A closed pipe or a full disk takes no log, and must not end whatever task has something to say.
            with contextlib.suppress(OSError, ValueError):
                if lines:
                    self.stream.write("\n".join([*lines, ""]))
                super().flush()
        finally:
            self.release()


class _Formatter(logging.Formatter):
    """The default one's time, of which all but the milliseconds is made once a second."""

    _second = -1
    _shown = ""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        """logging."""
        second = int(record.created)
        if second != self._second:
            self._second, self._shown = second, time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))
        return f"{self._shown},{int(record.msecs):03d}"
