"""Who asks what: the same seeded list of requests for both sides. Pure; knows nothing of servers or clocks."""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

TEXT = (
    "the parser takes every option that a user may give and returns one namespace with all of them as attributes "
    "of an object whose help message lists what each argument means when it is given more than once or not at all"
)
WORDS = TEXT.split(" ")
PROMPT_WORDS = 12


@dataclass(frozen=True)
class Call:
    """One request for a completion."""

    model: str
    prompt: str
    max_tokens: int
    user: str | None = None
    """The tenant, where no API keys tell tenants apart."""


def prompt(seed: int) -> str:
    """A few words that no other seed has in this order: prefix caches find nothing to share."""
    shuffle = random.Random(seed)
    return f"{seed} " + " ".join(shuffle.choice(WORDS) for _ in range(PROMPT_WORDS))


def shuffled(models: Sequence[str], requests: int, max_tokens: int, seed: int) -> list[Call]:
    """Every model equally often (as far as the number allows), in random order."""
    order = list(itertools.islice(itertools.cycle(models), requests))
    random.Random(seed).shuffle(order)
    return _calls(order, max_tokens, seed)


def zipf(models: Sequence[str], requests: int, max_tokens: int, seed: int, exponent: float = 1.0) -> list[Call]:
    """The n-th model is asked for in proportion to 1 / n^exponent."""
    weights = [1 / rank**exponent for rank in range(1, len(models) + 1)]
    return _calls(random.Random(seed).choices(models, weights, k=requests), max_tokens, seed)


def uneven(model: str, mean_tokens: int, seed: int, user: str) -> Iterator[Call]:
    """Requests without end, of half to one and a half times `mean_tokens`."""
    chance = random.Random(seed)
    for number in itertools.count():
        tokens = chance.randint(mean_tokens // 2, mean_tokens + mean_tokens // 2)
        yield Call(model, prompt(1_000_000 * seed + number), tokens, user)


def _calls(order: Sequence[str], max_tokens: int, seed: int) -> list[Call]:
    return [Call(model, prompt(1_000_000 * seed + number), max_tokens) for number, model in enumerate(order)]
