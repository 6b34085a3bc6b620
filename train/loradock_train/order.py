"""Chance, as a function of the seed and of where the run stands: which rows an epoch takes in which order, and the
random numbers of a step (dropout).

Nothing here depends on what was drawn before. So a run that goes on from a save draws what the uninterrupted run
draws, whatever happened between: a validation, a loader that was made anew, another version of the loop around it.
(transformers' Trainer shuffles from torch's global generator at the moment when an epoch begins; resumed in the middle
of an epoch it begins that epoch in another order.)
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Sampler

MEGABATCH_UNITS = 50
"""Steps whose rows are sorted by length together. More pads less, and mixes less."""
_ORDER, _STEP, _BLOCK, _SHARDS = 1, 2, 3, 4  # so that no epoch shares its numbers with a step


@dataclass(frozen=True)
class Order:
    """How the rows of a run are shuffled."""

    lengths: Sequence[int]
    """Tokens of each row."""
    rows_per_step: int
    by_length: bool
    """Put rows of like length in a step."""
    seed: int

    def of_epoch(self, epoch: int) -> list[int]:
        """A permutation of the rows. by_length: the step with the longest row comes first, so that a batch that does
        not fit into memory fails at once; steps of fewer rows come last."""
        chance = np.random.default_rng((self.seed, _ORDER, epoch))
        rows = chance.permutation(len(self.lengths))
        return [int(row) for row in (self._by_length(rows, chance) if self.by_length else rows)]

    def of_block(self, epoch: int, block: int, before: int) -> list[int]:
        """The same for a part of a stream. before: rows that the run took before it; the first rows here fill up the
        step that those left ragged, so that later steps begin where rows of like length do."""
        chance = np.random.default_rng((self.seed, _BLOCK, epoch, block))
        rows = chance.permutation(len(self.lengths))
        if self.by_length:
            lead = -before % self.rows_per_step
            rows = np.concatenate([rows[:lead], self._by_length(rows[lead:], chance)])
        return [int(row) for row in rows]

    def _by_length(self, rows: np.ndarray, chance: np.random.Generator) -> np.ndarray:
        if not len(rows):
            return rows
        lengths = np.asarray(self.lengths)
        size = self.rows_per_step * max(1, min(len(rows) // (4 * self.rows_per_step), MEGABATCH_UNITS))
        steps: list[np.ndarray] = []
        for start in range(0, len(rows), size):
            mega = rows[start : start + size]
            mega = mega[np.argsort(-lengths[mega], kind="stable")]
            steps.extend(mega[at : at + self.rows_per_step] for at in range(0, len(mega), self.rows_per_step))
        whole = [step for step in steps if len(step) == self.rows_per_step]
        ragged = [step for step in steps if len(step) < self.rows_per_step]
        whole = [whole[int(index)] for index in chance.permutation(len(whole))]
        whole.sort(key=lambda step: int(lengths[step].max()) < int(lengths.max()))  # stable: only the longest move
        return np.concatenate([*whole, *ragged])


def shard_order(num_shards: int, seed: int, epoch: int) -> list[int]:
    """In which order a pass reads the files of a stream."""
    chance = np.random.default_rng((seed, _SHARDS, epoch))
    return [int(shard) for shard in chance.permutation(num_shards)]


FILLER = -1
"""Stands for no row: a process that has none left in a batch computes something without a label, since the others
wait for it."""


@dataclass(frozen=True)
class Shares:
    """Which rows each of several processes takes, so that a step has the rows of one process with a batch as large
    as theirs together.

    A batch of all processes is dealt out row by row: each gets as many as the others, or one less.
    """

    batch_size: int
    """Rows that one process takes at once."""
    num_processes: int
    process: int

    def num_batches(self, num_rows: int) -> int:
        """The same for every process."""
        return -(-num_rows // (self.batch_size * self.num_processes))

    def batches(self, rows: Sequence[int]) -> Iterator[list[int]]:
        """This process's batches. The last ones may hold fewer rows, or nothing but FILLER."""
        together = self.batch_size * self.num_processes
        for start in range(0, len(rows), together):
            mine = rows[start : start + together][self.process :: self.num_processes]
            yield list(mine) or [FILLER]


class ShareSampler(Sampler[list[int]]):
    """A process's batches of what a sampler says about all rows."""

    def __init__(self, rows: Sampler[int] | Sequence[int], shares: Shares) -> None:
        self._rows, self._shares = rows, shares

    def __len__(self) -> int:
        return self._shares.num_batches(len(self._rows))  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[int]]:
        return self._shares.batches(list(self._rows))


class EpochSampler(Sampler[int]):
    """The order of the epoch that the run is in, asked for whenever an iteration begins."""

    def __init__(self, order: Order, epoch: Callable[[], int]) -> None:
        self._order, self._epoch = order, epoch

    def __len__(self) -> int:
        return len(self._order.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(self._order.of_epoch(self._epoch()))


def seed_step(seed: int, step: int, process: int = 0) -> None:
    """Set the generators of Python, numpy and torch to those of this optimiser step (0-based) of this process."""
    words = np.random.SeedSequence((seed, _STEP, step, process)).generate_state(2, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(int(words[0]) % 2**32)
    torch.manual_seed(int(words[1]) % 2**63)
