"""From a stream to the batches of every step, and where in the stream a step ended.

A Place is a few numbers: where the block began that the step ended in, and how many of its rows were taken. To go on,
that block is read again, encoded, shuffled and packed as it was (chance follows from the seed and the place), and the
rows that were taken are left out: no buffer is saved. With several processes each makes the same rows and takes its
share of every step, so that all of them make the same number of steps. Knows nothing of models.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import datasets  # type: ignore[import-untyped]
import torch

from loradock_train.dataset import DataReport
from loradock_train.encode import IGNORED
from loradock_train.errors import DataError, Problem
from loradock_train.order import Order
from loradock_train.rows import Rows
from loradock_train.stream import Block, Cursor, Stream

Encode = Callable[[Rows], tuple[datasets.Dataset, DataReport]]
Collate = Callable[[list[Mapping[str, Any]]], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Batching:
    """How rows become steps."""

    rows_per_batch: int
    batches_per_step: int
    by_length: bool
    seed: int
    num_epochs: int | None
    """Passes over the stream; None: without end."""
    rank: int = 0
    world_size: int = 1

    @property
    def rows_per_step(self) -> int:
        return self.rows_per_batch * self.batches_per_step * self.world_size


@dataclass(frozen=True)
class Place:
    """Where a step ended, in JSON's types."""

    cursor: dict[str, Any] = field(default_factory=lambda: asdict(Cursor()))
    """Of the block that it ended in."""
    before: int = 0
    """Rows of training in the blocks before that one."""
    taken: int = 0
    """Rows of training of that block."""
    passes: float = 0.0
    """Over the stream."""
    report: dict[str, Any] | None = None
    """Of the rows in the blocks before."""


class Feed:
    """An endless loader for the trainer, without one batch of lookahead; iterated, it goes on behind `place`."""

    def __init__(
        self, stream: Stream, encode: Encode, collate: Collate, batching: Batching, sha256: str, place: Place
    ) -> None:
        self.place = place
        """Behind the step whose batches were handed out last."""
        self.is_over = False
        """Whether that was the last step."""
        self.report: DataReport | None = None if place.report is None else DataReport(**place.report)
        """Of all rows read so far."""
        self._stream, self._encode, self._collate, self._batching = stream, encode, collate, batching
        self._sha256 = sha256

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        size = self._batching.rows_per_step
        rows = self._rows()
        window = list(islice(rows, size))
        while window:
            following = next(rows, None)
            self.place, self.is_over = window[-1][1], following is None
            yield from self._batches([row for row, _ in window])
            window = [] if following is None else [following, *islice(rows, size - 1)]

    def _batches(self, rows: list[Mapping[str, Any]]) -> Iterator[dict[str, torch.Tensor]]:
        """This process's batches of a step. The last step may have fewer rows: they are spread, and a batch without
        any gets one that teaches nothing, since every process must make every batch."""
        batching = self._batching
        cells = batching.batches_per_step * batching.world_size
        for cell in range(batching.rank, cells, batching.world_size):
            mine = rows[len(rows) * cell // cells : len(rows) * (cell + 1) // cells]
            yield self._collate(mine) if mine else {**self._collate([_blank(rows[0])]), "num_tokens": torch.tensor(0)}

    def _rows(self) -> Iterator[tuple[Mapping[str, Any], Place]]:
        """Rows of training from the place on, each with the place behind it."""
        before, taken, report = self.place.before, self.place.taken, self.report
        epoch, rows_of_epoch = -1, 1
        for block in self._stream.blocks(Cursor(**self.place.cursor)):
            if block.cursor.epoch != epoch:
                if not rows_of_epoch:
                    why = "no row of a whole pass can be trained on (all are over context_length)"
                    raise DataError(f"{self._stream.key} has nothing to learn:", [Problem(self._stream.key, why)])
                is_resumed = epoch == -1 and taken + before > 0
                epoch, rows_of_epoch = block.cursor.epoch, int(is_resumed)
            if self._batching.num_epochs is not None and epoch >= self._batching.num_epochs:
                return
            dataset, found = self._read(block)
            told = None if report is None else asdict(report)
            report = self.report = found if report is None else report.plus(found)
            order = Order(
                dataset["length"], self._batching.rows_per_step, self._batching.by_length, self._batching.seed
            )
            rows = order.of_block(epoch, block.cursor.block, before)
            for number in range(taken, len(rows)):
                passes = block.cursor.passes + (block.ends - block.cursor.passes) * (number + 1) / len(rows)
                place = Place(asdict(block.cursor), before, number + 1, passes, told)
                yield dataset[rows[number]], place
            rows_of_epoch += len(rows)
            before, taken = before + len(rows), 0

    def _read(self, block: Block) -> tuple[datasets.Dataset, DataReport]:
        self._stream.check(block.rows)
        assert self._stream.format != "auto"
        return self._encode(Rows(self._stream.format, block.rows, self._sha256))


def _blank(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without a loss."""
    blank = {name: row[name][:2] for name in ("input_ids", "position_ids") if name in row}
    return {**blank, "labels": [IGNORED] * len(blank["input_ids"])}
