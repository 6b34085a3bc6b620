"""Who may wait for an engine that is not ready."""

import pytest

from loradock_serve.errors import QueueFullError
from loradock_serve.waiting_room import WaitingRoom


def test_requests_beyond_the_limit_are_refused_until_one_reaches_its_engine() -> None:
    room = WaitingRoom(2, 1000)
    with room.place(10) as first, room.place(10) as second, room.place(10) as third:
        first.take()
        second.take()
        with pytest.raises(QueueFullError, match="2 requests wait for engines or adapters") as refused:
            third.take()
        assert (refused.value.code, refused.value.retry_after_s > 0) == ("queue_full", True)
        second.reach_engine()
        third.take()
    assert (room.before_engine, room.waiting_bytes) == (0, 0)


def test_bytes_count_until_the_turn_begins() -> None:
    room = WaitingRoom(10, 1000)
    with room.place(600) as first, room.place(600) as second:
        first.take()
        first.reach_engine()
        with pytest.raises(
            QueueFullError, match="600 bytes, and with these 600 they would be more than 1000"
        ) as refused:
            second.take()
        assert refused.value.code == "queue_bytes_full"
        first.leave()
        second.take()
        second.leave()
        second.leave()
        assert room.waiting_bytes == 0


def test_single_body_over_the_limit_may_wait_alone() -> None:
    room = WaitingRoom(10, 1000)
    with room.place(5000) as place:
        place.take()
    assert (room.before_engine, room.waiting_bytes) == (0, 0)


def test_request_that_fails_gives_its_place_back() -> None:
    room = WaitingRoom(10, 1000)

    def fails() -> None:
        with room.place(10) as place:
            place.take()
            raise RuntimeError("the engine did not start")

    with pytest.raises(RuntimeError, match="engine"):
        fails()
    assert (room.before_engine, room.waiting_bytes) == (0, 0)
