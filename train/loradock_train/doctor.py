"""What a look at the data finds before a minute of training is spent: lengths, what is learnt, what is there twice.

Counts and shows; refuses nothing (training does, with the same rows). Knows nothing of models and prints nothing.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from loradock_train.encode import IGNORED, Encoder, Example
from loradock_train.rows import Rows

BINS = 10
CONTEXT_STEP = 64
"""Context lengths are suggested in multiples of it."""
MAX_NAMED = 5
ANSWERS = ("preferred", "other")


@dataclass(frozen=True)
class Finding:
    """Rows that share a peculiarity, the first few by name."""

    message: str
    num_rows: int
    first: tuple[str, ...]


@dataclass(frozen=True)
class Examination:
    """One split, looked at."""

    format: str
    num_rows: int
    num_tokens: int
    num_trained_tokens: int
    percentiles: dict[str, int]
    """Tokens of a row: the least, p50, p95, p99 and the most."""
    histogram: tuple[tuple[int, int, int], ...]
    """Of each bin: least and most tokens, and rows."""
    suggested_context_length: int
    """Holds the p95 of the rows whole."""
    share_held: float
    """Of the rows, by the context length suggested."""
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens that are all learnt, or all not."""

    token_ids: tuple[int, ...]
    is_learnt: bool


def examine(
    rows: Rows, encoder: Encoder, context_length: int, splits_long: bool, others: Rows | None = None
) -> Examination:
    """Look at every row. `others`: rows of the other split, that should not be here as well. `splits_long`: long rows
    are split (packed raw text), so that nothing is cut off. Raises DataError for a row that cannot be encoded."""
    examples, places = encoded(rows, encoder)
    lengths = [len(example.input_ids) for example in examples]
    stops = encoder.stop_ids()
    met: set[tuple[tuple[int, ...], tuple[int, ...], tuple[str, ...]]] = set()
    elsewhere = (
        {(tuple(example.input_ids), example.images) for example in encoded(others, encoder)[0]} if others else set()
    )
    named: dict[str, list[str]] = {}
    for place, example, length in zip(places, examples, lengths, strict=True):
        tokens = tuple(example.input_ids)
        content = (tokens, tuple(example.labels), example.images)
        kept = example if splits_long else Example(example.input_ids[:context_length], example.labels[:context_length])
        marks = {
            f"over context_length {context_length}": length > context_length,
            "without a token that is learnt": not example.num_trained_tokens,
            f"whose answer is cut away at context_length {context_length}": bool(example.num_trained_tokens)
            and not kept.num_trained_tokens,
            "there more than once (copies after the first)": content in met,
            "with a stop token within an answer (it would learn to stop there)": any(
                span.is_learnt and not stops.isdisjoint(span.token_ids[:-1]) for span in spans(example)
            ),
            "in the other split as well": (tokens, example.images) in elsewhere,
            "that never learn to stop (no stop token is learnt)": not stops.intersection(example.labels),
        }
        met.add(content)
        for message, is_so in marks.items():
            if is_so:
                named.setdefault(message, []).append(place)
    suggested = math.ceil(_percentiles(lengths)["p95"] / CONTEXT_STEP) * CONTEXT_STEP
    return Examination(
        format=rows.format,
        num_rows=len(rows.rows),
        num_tokens=sum(lengths),
        num_trained_tokens=sum(example.num_trained_tokens for example in examples),
        percentiles=_percentiles(lengths),
        histogram=_histogram(lengths),
        suggested_context_length=suggested,
        share_held=sum(length <= suggested for length in lengths) / len(lengths),
        findings=tuple(Finding(text, len(found), tuple(found[:MAX_NAMED])) for text, found in named.items()),
    )


def encoded(rows: Rows, encoder: Encoder) -> tuple[list[Example], list[str]]:
    """Every example and its place. A pair is two."""
    if rows.format != "preference":
        return [encoder.encode(row, rows.format) for row in rows.rows], [row.where for row in rows.rows]
    pairs = [(row, encoder.pair(row)) for row in rows.rows]
    examples = [example for _, pair in pairs for example in pair]
    return examples, [f"{row.where} ({side})" for row, _ in pairs for side in ANSWERS]


def spans(example: Example) -> list[Span]:
    """The row as a person should see it. The first token is never learnt: nothing comes before it."""
    learnt = [index > 0 and label != IGNORED for index, label in enumerate(example.labels)]
    pairs = zip(learnt, example.input_ids, strict=True)
    return [
        Span(tuple(token for _, token in group), is_learnt)
        for is_learnt, group in groupby(pairs, key=lambda pair: pair[0])
    ]


def _percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """Nearest rank: each is the length of some row."""
    ordered = sorted(lengths)
    shares = {"min": 0.0, "p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
    return {name: ordered[max(0, math.ceil(share * len(ordered)) - 1)] for name, share in shares.items()}


def _histogram(lengths: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    low, high = min(lengths), max(lengths)
    width = math.ceil((high - low + 1) / BINS)
    counts = Counter((length - low) // width for length in lengths)
    return tuple(
        (low + index * width, min(high, low + (index + 1) * width - 1), counts[index])
        for index in range((high - low) // width + 1)
    )
