"""The churn test's book of versions: it would call an answer by an old version what it is."""

import time
from pathlib import Path

import pytest

from loradock_testing.churn_ledger import Ledger

NAME = "name"


def moved(ledger: Ledger, number: int | None) -> None:
    with ledger.change(NAME) as change:
        change.number = number


def test_request_after_a_confirmed_change_may_see_only_the_new_version() -> None:
    ledger = Ledger()
    moved(ledger, 1)
    moved(ledger, 2)
    began = time.monotonic()

    assert ledger.allowed(NAME, began, time.monotonic()) == {2}


def test_request_that_overlaps_a_change_may_see_both_versions() -> None:
    ledger = Ledger()
    moved(ledger, 1)
    with ledger.change(NAME) as change:
        began = time.monotonic()
        change.number = 2

    assert ledger.allowed(NAME, began, time.monotonic()) == {1, 2}


def test_request_that_ended_before_a_change_may_not_see_it() -> None:
    ledger = Ledger()
    moved(ledger, 1)
    began = ended = time.monotonic()
    moved(ledger, 2)

    assert ledger.allowed(NAME, began, ended) == {1}


def test_removed_name_has_no_version_until_it_is_back() -> None:
    ledger = Ledger()
    moved(ledger, 1)
    moved(ledger, None)
    assert (ledger.current(NAME), ledger.numbers(NAME)) == (None, [])
    moved(ledger, 2)
    assert (ledger.current(NAME), ledger.numbers(NAME)) == (2, [2])


def test_version_of_two_checkpoints_is_an_error() -> None:
    ledger = Ledger()
    ledger.published(NAME, 1, Path("a"), "sha256:1")
    with pytest.raises(AssertionError, match="name@1 was a and is b now"):
        ledger.published(NAME, 1, Path("b"), "sha256:2")
