"""The isolation scenario: many models on one engine at once, each answer held against that model's answer alone.

A mixed stream over the base and its adapters, more adapters than slots, while other adapters are being loaded. The
truth is transformers + PEFT. Knows the OpenAI API, and of the engine only a client and a way to load an adapter.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TypeVar

import httpx

from loradock_testing.tiny_models import (
    ALL_MODULES,
    ATTENTION_MODULES,
    LINEAR_MODULES,
    Answer,
    make_adapter,
    make_llama,
    reference,
)

BASE = "base"
MAX_TOKENS = 16
SLOTS = 4
MAX_LORA_RANK = 16
# Longer than a block of the prefix cache at --block-size 32, so that answers without a salt do share blocks.
PREFIX = "The options of the parser, their defaults, and what the help says of each of them when it is asked:\n"
PROMPTS = tuple(f"{PREFIX}add_argument('--{'x' * (i % 5)}{i}', default={i * 37 % 101})" for i in range(40))
_SHAPES = ((8, ALL_MODULES), (4, LINEAR_MODULES), (16, ATTENTION_MODULES), (12, ALL_MODULES), (8, LINEAR_MODULES))


Result = TypeVar("Result")


class WrongAnswersError(AssertionError):
    """Answers that are not the model's own."""


@dataclass(frozen=True)
class World:
    """A base, its adapters, and the truth about each."""

    base_dir: Path
    adapters: dict[str, Path]
    extra: tuple[Path, ...]
    """Adapters that nobody asks for: they are loaded meanwhile."""
    truth: dict[str, list[Answer]]
    """Model name -> its answer to each of PROMPTS; the base is BASE."""

    def like_share(self) -> float:
        """The largest share of prompts that any two models answer alike."""
        return max(
            sum(a.tokens == b.tokens for a, b in zip(self.truth[one], self.truth[other], strict=True)) / len(PROMPTS)
            for one, other in combinations(self.truth, 2)
        )


def make_world(directory: Path, adapters: int = 8, extra: int = 6) -> World:
    """Adapters of several ranks and target lists; the first targets the seed's whole list."""
    base_dir = make_llama(directory / "base")
    paths = []
    for i in range(adapters + extra):
        rank, modules = _SHAPES[i % len(_SHAPES)]
        paths.append(make_adapter(directory / f"a{i}", base_dir, 100 + i, rank=rank, target_modules=modules))
    named = {path.name: path for path in paths[:adapters]}
    truth = {
        name: reference(base_dir, path, PROMPTS, MAX_TOKENS, ignore_eos=True)
        for name, path in ({BASE: None} | named).items()
    }
    return World(base_dir, named, tuple(paths[adapters:]), truth)


@dataclass(frozen=True)
class Asked:
    """One request of the stream and its answer."""

    model: str
    prompt: int
    tokens: tuple[int, ...]


async def mixed_stream(
    client: httpx.AsyncClient, models: Sequence[str], *, requests: int = 400, in_flight: int = 32, share_cache: bool
) -> list[Asked]:
    """Ask all models in shuffled order, so many at a time; `share_cache`: may use each other's prefix blocks."""
    plan = [(models[i % len(models)], (i // len(models)) % len(PROMPTS)) for i in range(requests)]
    random.Random(7).shuffle(plan)
    room = asyncio.Semaphore(in_flight)

    async def ask(number: int, model: str, prompt: int) -> Asked:
        body = {
            "model": model,
            "prompt": PROMPTS[prompt],
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        if not share_cache:
            body["cache_salt"] = f"request-{number}"
        async with room:
            response = await client.post("/v1/completions", json=body)
        response.raise_for_status()
        return Asked(model, prompt, tuple(response.json()["choices"][0]["token_ids"]))

    return list(await asyncio.gather(*(ask(number, *pair) for number, pair in enumerate(plan))))


async def while_loading(
    work: Callable[[], Awaitable[list[Result]]],
    load: Callable[[str, Path], Awaitable[None]],
    extra: Sequence[Path],
    least: int,
) -> tuple[list[Result], int]:
    """Do the work while adapters are loaded under ever new names, and again until at least so many were; its results,
    and how many were loaded."""
    loaded = 0

    async def again() -> list[Result]:
        results = await work()
        while loaded < least:
            results += await work()
        return results

    task = asyncio.ensure_future(again())
    while not task.done():
        await load(f"extra-{loaded}", extra[loaded % len(extra)])
        loaded += 1
        await asyncio.wait([task], timeout=0.05)
    return await task, loaded


def wrong_answers(world: World, answers: Sequence[Asked], names: dict[str, str]) -> list[str]:
    """A line for each answer that the truth contradicts. `names`: what the engine calls the model -> its name here."""
    return [
        f"{names[asked.model]}, prompt {asked.prompt}: {asked.tokens} instead of {truth.tokens}"
        for asked in answers
        if (truth := world.truth[names[asked.model]][asked.prompt]).is_contradicted_by(asked.tokens)
    ]


def require_right(world: World, answers: Sequence[Asked], names: dict[str, str]) -> None:
    """Raise WrongAnswersError, with the number of wrong answers and some of them, unless all are right."""
    wrong = wrong_answers(world, answers, names)
    if wrong:
        raise WrongAnswersError(f"{len(wrong)} of {len(answers)} answers are wrong:\n" + "\n".join(wrong[:20]))
