"""Held-out questions, and asking them through the official OpenAI client: many models, the same moment, streaming."""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import openai
from rich.console import Console
from rich.progress import track

TASKS = ("packages", "keywords")
MAX_ANSWER_TOKENS = 8
QUESTIONS_IN_FLIGHT = 8
"""Each is asked of all models at once."""
REQUEST_TIMEOUT_S = 900.0


class NoAnswerError(Exception):
    """A stream ended without a token."""


@dataclass(frozen=True)
class Question:
    """A held-out row."""

    task: str
    prompt: str
    answer: str


Answers = dict[tuple[str, Question], str]
"""(model, question) to what the model said."""


def read_questions(data: Path) -> tuple[Question, ...]:
    questions: list[Question] = []
    for task in TASKS:
        for line in (data / f"{task}-heldout.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            questions.append(Question(task, row["prompt"], row["completion"].strip()))
    return tuple(questions)


def openai_client(address: str) -> openai.AsyncOpenAI:
    direct = openai.DefaultAsyncHttpxClient(trust_env=False)  # this machine is not behind the environment's proxy
    return openai.AsyncOpenAI(
        base_url=f"{address}/v1", api_key="none", timeout=REQUEST_TIMEOUT_S, max_retries=0, http_client=direct
    )


async def ask(client: openai.AsyncOpenAI, model: str, prompt: str) -> tuple[str, float]:
    """The model's greedy answer, streamed, and when its first token came (time.monotonic)."""
    first_s: float | None = None
    text = ""
    stream = await client.completions.create(
        model=model, prompt=prompt, max_tokens=MAX_ANSWER_TOKENS, temperature=0, stream=True
    )
    async for chunk in stream:
        first_s = time.monotonic() if first_s is None and chunk.choices else first_s
        text += "".join(choice.text for choice in chunk.choices)
    if first_s is None:
        raise NoAnswerError(f"{model} answered with no token at all")
    return text.strip(), first_s


async def ask_everyone(address: str, models: Sequence[str], questions: Sequence[Question], console: Console) -> Answers:
    """Every question to every model; the models get each question at the same moment."""
    answers: Answers = {}
    room = asyncio.Semaphore(QUESTIONS_IN_FLIGHT)
    async with openai_client(address) as client:

        async def one(question: Question) -> None:
            async with room:
                replies = await asyncio.gather(*(ask(client, model, question.prompt) for model in models))
            answers.update({(model, question): text for model, (text, _) in zip(models, replies, strict=True)})

        asked = [asyncio.ensure_future(one(question)) for question in questions]
        label = f"{len(questions)} questions, {len(models)} model{'s' if len(models) > 1 else ''}"
        for done in track(asyncio.as_completed(asked), label, total=len(asked), console=console, transient=True):
            await done
    return answers
