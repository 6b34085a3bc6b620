"""The server's log lines: none lost, none out of order, and those that may wait do not wait long."""

import errno
import io
import logging
import re
from collections.abc import Iterator

import pytest

from loradock_serve import log_lines
from loradock_serve.log_lines import LogLines, RequestLog
from loradock_testing.waiting import until

REQUESTS = "test.requests"


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    handler = LogLines(stream, REQUESTS)
    root = logging.getLogger("test")
    root.setLevel(logging.INFO)
    root.propagate = False
    root.addHandler(handler)
    yield stream
    root.removeHandler(handler)
    root.propagate = True


def messages(stream: io.StringIO) -> list[str]:
    return [line.split(": ", 1)[1] for line in stream.getvalue().splitlines()]


async def test_lines_about_requests_wait_for_each_other_and_not_for_long(stream: io.StringIO) -> None:
    for number in range(3):
        logging.getLogger(REQUESTS).info("request %d", number)
    assert messages(stream) == []
    await until(lambda: bool(messages(stream)), "the lines")
    assert messages(stream) == ["request 0", "request 1", "request 2"]


@pytest.mark.parametrize("level", [logging.WARNING, logging.INFO])
async def test_any_other_line_is_written_at_once_and_takes_the_waiting_along(stream: io.StringIO, level: int) -> None:
    logging.getLogger(REQUESTS).info("first")
    logging.getLogger("test.other" if level == logging.INFO else REQUESTS).log(level, "second")
    assert messages(stream) == ["first", "second"]


async def test_many_lines_do_not_pile_up(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_lines, "MAX_WAITING", 10)
    for number in range(15):
        logging.getLogger(REQUESTS).info("%d", number)
    assert messages(stream) == [str(number) for number in range(10)]


def test_without_an_event_loop_nothing_waits(stream: io.StringIO) -> None:
    logging.getLogger(REQUESTS).info("alone")
    assert messages(stream) == ["alone"]


async def test_what_waits_at_the_end_is_written_by_a_flush(stream: io.StringIO) -> None:
    logging.getLogger(REQUESTS).info("last")
    for handler in logging.getLogger("test").handlers:
        handler.flush()
    assert messages(stream) == ["last"]


def test_log_that_cannot_be_written_is_no_error_of_who_logs(
    monkeypatch: pytest.MonkeyPatch, stream: io.StringIO
) -> None:
    def full(_text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(stream, "write", full)
        logging.getLogger("test.other").warning("lost")
    logging.getLogger("test.other").warning("there is room again")
    assert messages(stream) == ["there is room again"]


def test_time_is_written_as_logging_writes_it(stream: io.StringIO) -> None:
    record = logging.LogRecord("n", logging.INFO, "p", 1, "m", None, None)
    for created, msecs in ((1_700_000_000.25, 250.0), (1_700_000_000.75, 750.0), (1_700_000_001.0, 0.0)):
        record.created, record.msecs = created, msecs
        expected = logging.Formatter("%(asctime)s").format(record)
        assert log_lines._Formatter("%(asctime)s").format(record) == expected


async def test_lines_about_requests_are_the_same_with_and_without_records(stream: io.StringIO) -> None:
    requests = RequestLog(logging.getLogger(REQUESTS))
    requests.info("%s took %.3fs", "/v1/completions", 0.25)
    handler = next(each for each in logging.getLogger("test").handlers if isinstance(each, LogLines))
    requests.write_to(handler)
    requests.info("%s took %.3fs", "/v1/completions", 0.25)
    assert stream.getvalue() == ""
    handler.flush()
    first, second = (re.sub(r"\d", "0", line) for line in stream.getvalue().splitlines())
    assert first == second == "0000-00-00 00:00:00,000 INFO test.requests: /v0/completions took 0.000s"


async def test_level_of_the_logger_holds_without_records(stream: io.StringIO) -> None:
    requests = RequestLog(logging.getLogger(REQUESTS))
    handler = next(each for each in logging.getLogger("test").handlers if isinstance(each, LogLines))
    requests.write_to(handler)
    logging.getLogger(REQUESTS).setLevel(logging.WARNING)
    try:
        requests.info("not said")
    finally:
        logging.getLogger(REQUESTS).setLevel(logging.NOTSET)
    requests.info("said")
    handler.flush()
    assert messages(stream) == ["said"]
