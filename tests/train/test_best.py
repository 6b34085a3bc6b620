"""When a run has learnt enough: from the values of its validations alone."""

import math

import pytest

from loradock_train.best import Standing, standing


@pytest.mark.parametrize(
    ("values", "low", "min_delta", "expected"),
    [
        ([], True, 0.0, (None, 0)),
        ([3.0, 2.0, 2.5, 2.4], True, 0.0, (2, 2)),
        ([0.1, 0.4, 0.4, 0.3], False, 0.0, (2, 2)),  # an equal one is no better: the earliest stays
        ([3.0, 2.95, 2.9, 2.0], True, 0.2, (4, 0)),
        ([3.0, 2.95, 2.9], True, 0.2, (3, 2)),  # the best is exported, though it is too little to count
        ([math.nan, 2.0, math.nan], True, 0.0, (2, 1)),
        ([2.0, 3.0, 1.0, 1.5], True, 0.0, (3, 1)),
    ],
)
def test_standing_follows_from_the_values(
    values: list[float], low: bool, min_delta: float, expected: tuple[int | None, int]
) -> None:
    found = standing(list(enumerate(values, start=1)), low, min_delta)
    assert (found.step, found.stale) == expected


def test_standing_has_the_value_as_it_was() -> None:
    assert standing([(5, 3.0), (10, 2.0)], low=True) == Standing(10, 2.0, 0)
    assert standing([(5, 0.3), (10, 0.2)], low=False) == Standing(5, 0.3, 1)
