"""Our counters and histograms are shown just as prometheus_client's own."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from loradock_serve.tallies import CounterTally, HistogramTally

BUCKETS = (0.5, 1, 10)


def shown(registry: CollectorRegistry) -> list[str]:
    """Without the times at which the library's series were made, which ours do not tell."""
    return [line for line in generate_latest(registry).decode().splitlines() if not re.search(r"_created\b", line)]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 100) | st.sampled_from([0.5, 1.0, 10.0]))))
def test_text_is_the_librarys(events: list[tuple[str, float]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    count = CounterTally("x_total", "X.", ["who"], ours)
    spread = HistogramTally("y", "Y.", ["who"], ours, buckets=BUCKETS)
    counter = Counter("x_total", "X.", ["who"], registry=theirs)
    histogram = Histogram("y", "Y.", ["who"], buckets=BUCKETS, registry=theirs)
    for who, amount in events:
        count.labels(who).inc(amount)
        spread.labels(who).observe(amount)
        counter.labels(who).inc(amount)
        histogram.labels(who).observe(amount)
    assert shown(ours) == shown(theirs)


def test_histogram_without_labels_is_shown_from_the_start() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    HistogramTally("y", "Y.", [], ours, buckets=BUCKETS)
    Histogram("y", "Y.", buckets=BUCKETS, registry=theirs)
    assert shown(ours) == shown(theirs)


def test_wrong_number_of_labels_is_refused() -> None:
    tally = CounterTally("x_total", "X.", ["who"], CollectorRegistry())
    with pytest.raises(ValueError, match="who"):
        tally.labels("a", "b")


def test_two_of_one_name_are_refused() -> None:
    registry = CollectorRegistry()
    CounterTally("x_total", "X.", [], registry).labels().inc()
    with pytest.raises(ValueError, match="Duplicated"):
        CounterTally("x_total", "X.", [], registry)
