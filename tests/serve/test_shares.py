"""Shares of traffic: who gets which version."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loradock_serve.shares import pick

CALLERS = [f"user-{number}" for number in range(20_000)]

weights_of = st.dictionaries(st.integers(1, 50), st.integers(1, 1_000_000), min_size=1, max_size=8)


def counts(weights: dict[int, int], name: str = "sql") -> dict[int, int]:
    found = dict.fromkeys(weights, 0)
    for caller in CALLERS:
        found[pick(name, list(weights.items()), caller)] += 1
    return found


@pytest.mark.parametrize("weights", [{3: 90, 4: 10}, {1: 50, 2: 50}, {1: 1, 2: 2, 3: 7}, {8: 999, 9: 1}])
def test_versions_get_their_shares_of_the_callers(weights: dict[int, int]) -> None:
    whole = sum(weights.values())
    for number, count in counts(weights).items():
        share = weights[number] / whole
        deviation = (share * (1 - share) / len(CALLERS)) ** 0.5
        assert abs(count / len(CALLERS) - share) < 5 * deviation


@given(weights_of, st.text(max_size=80))
def test_a_caller_keeps_its_version_in_whatever_order_they_are_listed(weights: dict[int, int], caller: str) -> None:
    listed = list(weights.items())
    assert pick("sql", listed, caller) == pick("sql", listed[::-1], caller)
    assert pick("sql", listed, caller) in weights


@given(weights_of, st.data(), st.integers(1, 1_000_000))
def test_a_version_that_grows_only_gains_callers_and_none_moves_between_others(
    weights: dict[int, int], data: st.DataObject, more: int
) -> None:
    grown = data.draw(st.sampled_from(sorted(weights)))
    after = weights | {grown: weights[grown] + more}
    for caller in CALLERS[:50]:
        before_it, now = pick("sql", list(weights.items()), caller), pick("sql", list(after.items()), caller)
        assert now in (before_it, grown)


@given(weights_of, st.integers(51, 60), st.integers(1, 1_000_000))
def test_a_version_that_leaves_moves_only_its_own_callers(weights: dict[int, int], left: int, weight: int) -> None:
    with_it = list((weights | {left: weight}).items())
    for caller in CALLERS[:50]:
        if (before := pick("sql", with_it, caller)) != left:
            assert pick("sql", list(weights.items()), caller) == before


def test_more_for_the_canary_moves_no_more_callers_than_it_must() -> None:
    before, after = [(3, 90), (4, 10)], [(3, 70), (4, 30)]
    moved = [caller for caller in CALLERS if pick("sql", before, caller) != pick("sql", after, caller)]
    assert abs(len(moved) / len(CALLERS) - 0.2) < 0.02
    assert {pick("sql", after, caller) for caller in moved} == {4}


def test_names_are_split_independently_so_that_nobody_is_the_canary_of_everything() -> None:
    shares = [(1, 50), (2, 50)]
    same = sum(pick("a", shares, caller) == pick("b", shares, caller) for caller in CALLERS)
    assert abs(same / len(CALLERS) - 0.5) < 0.02


def test_text_that_is_no_unicode_picks_a_version() -> None:
    assert pick("sql", [(1, 1), (2, 1)], "\ud800") in (1, 2)
