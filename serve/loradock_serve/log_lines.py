"""The server's log: one line for each event, on stderr, in order; lines about single requests go out a few at a time.

A write of its own for each costs as much as a good part of a request's way through the gateway. So these wait up to
`WRITE_EVERY_S` for others, and any other line takes them along. Knows nothing of what is logged.
"""

import asyncio
import contextlib
import logging
import time
from functools import lru_cache
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
        if not patient:
            self.flush()
        else:
            self._flush_later()

    def say(self, text: str) -> None:
        """A line of the patient logger as `emit` would write it, at INFO, now."""
        now_s = time.time()
        line = f"{_shown_time(now_s)} INFO {self._patient}: {text}"
        self.acquire()
        try:
            self._waiting.append(line)
        finally:
            self.release()
        self._flush_later()

    def _flush_later(self) -> None:
        if len(self._waiting) >= MAX_WAITING:
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


class RequestLog:
    """The lines about single requests: records of a logger, or, once `write_to` was called, lines without a record,
    which takes a third of the time."""

    def __init__(self, logger: logging.Logger) -> None:
        self.name = logger.name
        self._logger = logger
        self._lines: LogLines | None = None

    def write_to(self, lines: LogLines) -> None:
        """Whoever else listens to the logger hears nothing any more."""
        self._lines = lines

    def info(self, template: str, *values: object) -> None:
        """One line."""
        if self._lines is None:
            self._logger.info(template, *values)
        elif self._logger.isEnabledFor(logging.INFO):
            self._lines.say(template % values)


class _Formatter(logging.Formatter):
    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        """logging."""
        return _shown_time(record.created)


def _shown_time(now_s: float) -> str:
    """As logging's own formatter has it."""
    second = int(now_s)
    return f"{_shown_second(second)},{int((now_s - second) * 1000):03d}"


@lru_cache(maxsize=1)
def _shown_second(second: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))
