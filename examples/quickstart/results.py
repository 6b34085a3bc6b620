"""What came of the quickstart: scores, the table, the promises that were not kept, lines to copy. Reads the
runs' summaries; starts and asks nothing."""

import json
import os
import shlex
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from asking import MAX_ANSWER_TOKENS, TASKS, Answers, Question
from rich.table import Table

BASE = "base"

# What `--check` asserts.
MIN_GAIN = 0.25
LORA_BELOW_FULL = 0.25
"""LoRA of rank 4 may score this much less than full-parameter training: 0.12 was seen, and 150 rows are uncertain by
0.05."""
MIN_SIZE_RATIO = 20.0
"""The full checkpoint over LoRA's."""
NUM_COMPARED = 12
"""Held-out prompts whose served tokens are compared with those of transformers and PEFT."""
MIN_ROWS = 100
MAX_FIRST_TOKEN_S = 3.0
MIN_DIFFERENT = 0.9


@dataclass(frozen=True)
class FineTune:
    """One of the three: the name it is pushed under, its task, and its run."""

    name: str
    task: str
    run: str
    placement: str
    """Where it must end up."""


FINE_TUNES = (
    FineTune("packages", "packages", "packages/lora", "shared"),
    FineTune("keywords", "keywords", "keywords-lora", "shared"),
    FineTune("packages-full", "packages", "packages/full", "dedicated"),
)
MODELS = (BASE, *(fine_tune.name for fine_tune in FINE_TUNES))


@dataclass(frozen=True)
class Paths:
    """Where everything is, below one working directory."""

    root: Path

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def server(self) -> Path:
        return self.root / "server"

    @property
    def server_log(self) -> Path:
        return self.root / "serve.log"

    def run(self, name: str) -> Path:
        return self.root / "runs" / name

    def checkpoint(self, run: str) -> Path:
        return self.run(run) / "checkpoint"

    def clear(self) -> None:
        """Take away what an earlier run made here, and nothing else."""
        for directory in (self.data, self.root / "runs", self.server):
            if directory.exists():
                for path, _, _ in os.walk(directory):
                    Path(path).chmod(0o755)  # the server keeps published versions read-only
                shutil.rmtree(directory)
        self.root.mkdir(parents=True, exist_ok=True)


@dataclass(frozen=True)
class Result:
    """All that the table shows and --check looks at."""

    questions: tuple[Question, ...]
    before: Answers
    """The base's answers before anything was pushed."""
    after: Answers
    """Everyone's answers to everything, at the same moment."""
    first_token_s: dict[str, float]
    """Model to seconds from the start of its push to the first token of its first answer."""
    placement: dict[str, str]
    disagreements: dict[str, int] = field(default_factory=dict)
    """Model to held-out prompts whose served tokens are not those of transformers and PEFT."""
    size_ratio: float | None = None
    """The full checkpoint's bytes over LoRA's."""


def score(answers: Answers, model: str, questions: Sequence[Question], task: str) -> float:
    """Exact matches among the task's held-out rows, 0 to 1."""
    of_task = [question for question in questions if question.task == task]
    return sum(answers[model, question] == question.answer for question in of_task) / len(of_task)


def best_constant(questions: Sequence[Question], task: str) -> float:
    """What the best single answer to all of the task's questions would score."""
    of_task = [question.answer for question in questions if question.task == task]
    return max(Counter(of_task).values()) / len(of_task)


def difference(answers: Answers, one: str, other: str, questions: Sequence[Question]) -> float:
    """Share of all questions that two models answer differently, 0 to 1."""
    return sum(answers[one, question] != answers[other, question] for question in questions) / len(questions)


def size_of(directory: Path) -> str:
    size_bytes = sum(file.stat().st_size for file in directory.rglob("*.safetensors"))
    return f"{size_bytes / 1e6:.1f} MB"


def results_table(result: Result, paths: Paths) -> Table:
    count = Counter(question.task for question in result.questions)
    table = Table(title=f"Held-out rows, exact match ({', '.join(f'{task}: {count[task]}' for task in TASKS)})")
    for column in ("model", "task", "placement", "weights", "training"):
        table.add_column(column)
    for column in ("best constant", "before (base)", "after", "push to first token"):
        table.add_column(column, justify="right")
    rows = [(BASE, BASE, list(TASKS)), *((f.name, f.run, [f.task]) for f in FINE_TUNES)]
    for name, run, tasks in rows:
        seconds = json.loads((paths.run(run) / "run.json").read_text())["train_seconds"]
        cells = [name, " / ".join(tasks), result.placement.get(name, "?"), size_of(paths.checkpoint(run))]
        scores = (
            [best_constant(result.questions, task) for task in tasks],
            [score(result.before, BASE, result.questions, task) for task in tasks],
            [score(result.after, name, result.questions, task) for task in tasks],
        )
        cells += [f"{seconds:.0f} s", *(" / ".join(f"{value:.2f}" for value in values) for values in scores)]
        first_s = result.first_token_s.get(name)
        table.add_row(*cells, "" if first_s is None else f"{first_s:.1f} s")
    return table


def problems_with(result: Result) -> list[str]:
    """Each promise that was not kept, in words."""
    problems: list[str] = []
    for fine_tune in FINE_TUNES:
        name, task = fine_tune.name, fine_tune.task
        rows = sum(question.task == task for question in result.questions)
        if rows < MIN_ROWS:
            problems.append(f"{name}: {rows} held-out rows, at least {MIN_ROWS} are promised")
        reached = score(result.after, name, result.questions, task)
        against = {
            "the base before the push": score(result.before, BASE, result.questions, task),
            "the base beside it": score(result.after, BASE, result.questions, task),
            "the best constant answer": best_constant(result.questions, task),
        }
        for what, value in against.items():
            if reached < value + MIN_GAIN:
                problems.append(f"{name}: {reached:.2f} is less than {MIN_GAIN:.2f} over {what}, {value:.2f}")
        if result.placement.get(name) != fine_tune.placement:
            problems.append(f"{name}: placement is {result.placement.get(name)}, not {fine_tune.placement}")
        if fine_tune.placement == "shared" and result.first_token_s[name] > MAX_FIRST_TOKEN_S:
            took = f"{result.first_token_s[name]:.1f} s"
            problems.append(f"{name}: first token {took} after its push, {MAX_FIRST_TOKEN_S:.0f} s are promised")
    problems += _problems_between(result)
    one, other = (fine_tune.name for fine_tune in FINE_TUNES if fine_tune.placement == "shared")
    different = difference(result.after, one, other, result.questions)
    if different < MIN_DIFFERENT:
        problems.append(f"{one} and {other}: only {different:.0%} of answers differ, {MIN_DIFFERENT:.0%} are promised")
    return problems


def _problems_between(result: Result) -> list[str]:
    """LoRA against full-parameter training, and the server against transformers and PEFT."""
    problems: list[str] = []
    lora, full = (score(result.after, name, result.questions, "packages") for name in ("packages", "packages-full"))
    if lora < full - LORA_BELOW_FULL:
        problems.append(f"packages: {lora:.2f} is more than {LORA_BELOW_FULL:.2f} below full training, {full:.2f}")
    if result.size_ratio is None or result.size_ratio < MIN_SIZE_RATIO:
        told = "not known" if result.size_ratio is None else f"{result.size_ratio:.1f} times"
        problems.append(
            f"packages-full: its checkpoint is {told} that of LoRA, {MIN_SIZE_RATIO:.0f} times are promised"
        )
    for name in ("packages", "packages-full"):
        wrong = result.disagreements.get(name)
        if wrong != 0:
            told = "nobody compared them" if wrong is None else f"{wrong} of {NUM_COMPARED} differ"
            problems.append(f"{name}: tokens served against those of transformers and PEFT: {told}")
    return problems


def example_question(result: Result) -> Question:
    """A short one that everybody gets right, where there is one: it is printed and goes into a shell's quotes."""
    of_packages = [question for question in result.questions if question.task == "packages"]

    def is_right(question: Question) -> bool:
        return all(result.after[f.name, question] == question.answer for f in FINE_TUNES if f.task == question.task)

    def rank(question: Question) -> tuple[bool, bool, int]:
        return "'" in question.prompt, not is_right(question), len(question.prompt)

    return min(of_packages, key=rank)


def snippets(address: str, prompt: str) -> str:
    """Lines that work as printed."""
    body = {"model": "packages", "prompt": prompt, "max_tokens": MAX_ANSWER_TOKENS, "temperature": 0}
    return f"""\
curl {address}/v1/completions -H 'Content-Type: application/json' \\
  -d {shlex.quote(json.dumps(body))}

from openai import OpenAI

client = OpenAI(base_url="{address}/v1", api_key="none")
for model in {list(MODELS)}:
    answer = client.completions.create(model=model, prompt={prompt!r}, max_tokens={MAX_ANSWER_TOKENS}, temperature=0)
    print(model, repr(answer.choices[0].text))
"""
