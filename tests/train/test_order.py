"""The order of rows and the random numbers of a step follow from the seed and the position alone."""

import random
from itertools import pairwise

import numpy as np
import pytest
import torch

from loradock_train.order import EpochSampler, Order, seed_step

LENGTHS = [5 + (7 * row) % 40 for row in range(103)]


@pytest.mark.parametrize("by_length", [True, False])
def test_epoch_takes_every_row_once_in_an_order_of_its_own(by_length: bool) -> None:
    order = Order(LENGTHS, 4, by_length, seed=1)
    epochs = [order.of_epoch(epoch) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(103)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert order.of_epoch(1) == epochs[1], "whatever was asked before"
    assert Order(LENGTHS, 4, by_length, seed=2).of_epoch(1) != epochs[1]


def test_rows_of_like_length_share_a_step_the_longest_first_and_the_ragged_step_last() -> None:
    rows = Order(LENGTHS, 4, True, seed=1).of_epoch(0)
    steps = [[LENGTHS[row] for row in rows[at : at + 4]] for at in range(0, len(rows), 4)]
    padding = sum(max(step) * len(step) - sum(step) for step in steps)
    plain = Order(LENGTHS, 4, False, seed=1).of_epoch(0)
    plain_steps = [[LENGTHS[row] for row in plain[at : at + 4]] for at in range(0, len(plain), 4)]
    assert padding < 0.4 * sum(max(step) * len(step) - sum(step) for step in plain_steps)
    assert max(LENGTHS) in steps[0]
    assert [len(step) for step in steps] == [4] * 25 + [3]


def test_steps_of_like_length_are_not_sorted_among_themselves() -> None:
    rows = Order(LENGTHS, 4, True, seed=1).of_epoch(0)
    longest = [max(LENGTHS[row] for row in rows[at : at + 4]) for at in range(4, 100, 4)]
    falls = sum(first > second for first, second in pairwise(longest))
    assert 6 <= falls <= 18


def test_fewer_rows_than_a_step_are_one_step() -> None:
    assert sorted(Order([3, 9], 4, True, seed=1).of_epoch(0)) == [0, 1]


def test_sampler_asks_for_the_epoch_when_it_begins() -> None:
    epoch = [0]
    order = Order(LENGTHS, 4, True, seed=1)
    sampler = EpochSampler(order, lambda: epoch[0])
    epoch[0] = 5
    assert (len(sampler), list(sampler)) == (103, order.of_epoch(5))


def test_random_numbers_of_a_step_follow_from_seed_step_and_process() -> None:
    def drawn(*position: int) -> tuple[float, float, float]:
        seed_step(*position)
        return random.random(), float(np.random.random()), float(torch.rand(()))

    first = drawn(1, 7)
    others = [drawn(1, 8), drawn(2, 7), drawn(1, 7, 1)]
    assert drawn(1, 7) == first
    for other in others:
        assert all(mine != theirs for mine, theirs in zip(first, other, strict=True))
