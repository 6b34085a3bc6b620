"""What the churn test asks: a base, a thousand adapters, and requests for them without end.

Names are chosen by Zipf's law, so that some are hot and most come now and then, long after they had to leave memory.
Some names change their version all the time, some are removed and come back. Knows nothing of servers.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from loradock_testing.churn_models import write_adapters
from loradock_testing.tiny_models import make_llama

BASE = "base"
NAMES = tuple(f"a{rank:04d}" for rank in range(1000))
"""By their place in Zipf's law, the hottest first."""
MOVING = tuple(NAMES[i] for i in (0, 2, 5, 9, 14, 20, 27, 35, 50, 70, 100, 150))
FLEETING = tuple(NAMES[i] for i in (1, 7, 16, 30, 45, 60, 90, 130))
TWIN, ITS_TWIN = NAMES[16], NAMES[10]
"""Two names of the same bytes: one is removed and comes back, the other stays."""
VERSIONS = 4
"""Checkpoints of a name that changes."""

# Longer than two blocks of the prefix cache, so that answers without a salt do share blocks.
PREFIX = "The options of the parser, their defaults, and what the help says of each of them when it is asked:\n"
PROMPTS = tuple(f"{PREFIX}add_argument('--{'x' * (i % 5)}{i}', default={i * 37 % 101})" for i in range(20))
TOKENS = range(6, 9)
HANG_UP_TOKENS = 100
HANG_UPS = 0.05
BASE_SHARE = 0.1
OLD_VERSION_SHARE = 0.2
"""Of the requests for names that change: those which name a version."""


@dataclass(frozen=True)
class World:
    """A base, and the checkpoints of all names."""

    base_dir: Path
    checkpoints: dict[str, list[Path]]
    """Name -> its checkpoints, the first to be registered first."""


def make_world(directory: Path) -> World:
    """A second or two per thousand adapters."""
    base_dir = make_llama(directory / "base")
    changing = [name for name in (*MOVING, *FLEETING) for _ in range(VERSIONS - 1)]
    paths = write_adapters(directory / "adapters", base_dir, range(len(NAMES) + len(changing)))
    checkpoints = {name: [path] for name, path in zip(NAMES, paths[: len(NAMES)], strict=True)}
    for name, path in zip(changing, paths[len(NAMES) :], strict=True):
        checkpoints[name].append(path)
    checkpoints[TWIN][0] = checkpoints[ITS_TWIN][0]
    return World(base_dir, checkpoints)


@dataclass(frozen=True)
class Request:
    """One request of the stream."""

    number: int
    name: str
    prompt: int
    chat: bool
    stream: bool
    max_tokens: int
    old_version: float | None
    """Where it names a version: which of those there are, from 0 to 1."""
    hang_up: float | None
    """Where its client does not wait for the end: how soon it goes, from 0 to 1."""


def requests(seed: int) -> Iterator[Request]:
    """An endless stream, the same for the same seed."""
    chance = random.Random(seed)
    weights = list(accumulate(1 / (rank + 1) for rank in range(len(NAMES))))
    number = 0
    while True:
        is_base = chance.random() < BASE_SHARE
        name = BASE if is_base else chance.choices(NAMES, cum_weights=weights)[0]
        old = chance.random() if name in MOVING and chance.random() < OLD_VERSION_SHARE else None
        hang_up = chance.random() if chance.random() < HANG_UPS else None
        yield Request(
            number,
            name,
            chance.randrange(len(PROMPTS)),
            chance.random() < 0.5,
            chance.random() < 0.5,
            chance.choice(TOKENS) if hang_up is None else HANG_UP_TOKENS,
            old,
            hang_up,
        )
        number += 1
