"""What unknown names may cost: remembered answers and the bucket of lookups, on a clock of the test's own."""

import pytest

from loradock_serve.lookup_limits import Bucket, Remembered


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_answer_is_kept_until_its_time_is_over() -> None:
    clock = Clock()
    answers: Remembered[str] = Remembered(10, clock)
    answers.put("a", "no", 60)
    clock.now = 45
    assert answers.get("a") == ("no", 15)
    clock.now = 60
    assert answers.get("a") is None
    assert len(answers) == 0


def test_oldest_answer_goes_where_there_is_no_room() -> None:
    answers: Remembered[int] = Remembered(3, Clock())
    for number in range(1000):
        answers.put(f"name{number}", number, 60)
    answers.put("name997", 0, 60)  # anew: the newest one now
    answers.put("more", 1, 60)
    assert len(answers) == 3
    assert [answers.get(name) is not None for name in ("name998", "name999", "name997", "more")] == [
        False,
        True,
        True,
        True,
    ]


def test_bucket_gives_a_minutes_worth_at_once_and_then_as_it_fills() -> None:
    clock = Clock()
    bucket = Bucket(30, clock)
    assert [bucket.take() for _ in range(30)] == [0.0] * 30
    assert bucket.take() == pytest.approx(2.0)
    clock.now = 1.0
    assert bucket.take() == pytest.approx(1.0)
    clock.now = 2.0
    assert bucket.take() == 0.0
    clock.now = 10_000
    assert sum(bucket.take() == 0.0 for _ in range(100)) == 30
