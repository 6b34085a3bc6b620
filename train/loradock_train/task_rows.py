"""The rows of a task as questions with a true answer: what is asked, what is right, and which rows are asked.

Knows formats and tokens; scores nothing and knows no model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loradock_train.config_task import TaskOptions
from loradock_train.encode import IGNORED, Encoder, prompt_and_answer
from loradock_train.errors import DataError, Problem
from loradock_train.rows import Format, Row, Rows


@dataclass(frozen=True)
class Question:
    """One row of validation data."""

    row: Row
    prompt_ids: list[int]
    truth: str
    choices: tuple[list[int], ...] = ()
    """Of a classification by tokens: the tokens of each label as the answer."""


def truth_of(row: Row, row_format: Format) -> str:
    """The answer that a row teaches; of a chat, the last turn that is learnt."""
    if row_format == "chat":
        answer: str = row.values["messages"][_last_learnt(row)].get("content") or ""
        return answer
    return prompt_and_answer(row, row_format, None)[1]


def answered(row: Row, row_format: Format, answer: str) -> Row:
    """The row with another answer. Of a chat, what follows its last learnt turn goes, and earlier turns are context."""
    values = dict(row.values)
    if row_format == "chat":
        last = _last_learnt(row)
        turns = [dict(message) for message in row.values["messages"][: last + 1]]
        for turn in turns[:-1]:
            if turn["role"] == "assistant":
                turn["weight"] = 0
        turns[-1]["content"] = answer
        values["messages"] = turns
    else:
        values["output" if row_format == "instruction" else "completion"] = answer
    return replace(row, values=values)


def _last_learnt(row: Row) -> int:
    messages = row.values["messages"]
    return max(
        index
        for index, message in enumerate(messages)
        if message["role"] == "assistant" and message.get("weight", 1) == 1
    )


def check_answers(rows: Rows, task: TaskOptions, key: str) -> None:
    """Raises DataError, naming every row, where the rows do not fit the task."""
    if task.has_head:
        problems = list(_label_problems(rows, task.labels))
    elif rows.format == "text":
        problems = [Problem("format", f"rows of raw text have no answer, and task.kind {task.kind} scores answers")]
    elif task.labels:
        problems = [
            Problem(row.where, f"the answer {_short(truth)} is not one of task.labels")
            for row in rows.rows
            if (truth := truth_of(row, rows.format)).strip() not in task.labels
        ]
    else:
        problems = []
    if problems:
        raise DataError(f"{key} has {len(problems)} problem{'s' if len(problems) != 1 else ''}:", problems)


def _label_problems(rows: Rows, labels: Sequence[str]) -> Iterator[Problem]:
    """Of rows for a classification head: {"text", "label"}."""
    if rows.format != "text":
        yield Problem("format", f'a classification head learns from rows {{"text", "label"}}, these are {rows.format}')
        return
    for row in rows.rows:
        label = row.values.get("label")
        if label is None:
            yield Problem(row.where, "missing key 'label'")
        elif label not in labels:
            yield Problem(row.where, f"the label {_short(label)} is not one of task.labels")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def scored_rows(rows: Sequence[Row], max_rows: int) -> list[Row]:
    """At most that many, evenly spaced: files are often sorted."""
    if len(rows) <= max_rows:
        return list(rows)
    return [rows[number * len(rows) // max_rows] for number in range(max_rows)]


def questions_of(
    rows: Rows, task: TaskOptions, encoder: Encoder, context_length: int
) -> tuple[list[Question], list[str]]:
    """The questions of a task without a head, and what the user must hear about them."""
    chosen = scored_rows(rows.rows, task.max_rows)
    questions, too_long = [], 0
    for row in chosen:
        truth = truth_of(row, rows.format)
        lead = truth[: len(truth) - len(truth.lstrip())]
        asked = [answered(row, rows.format, lead + label) for label in task.labels]
        examples = [encoder.encode(each, rows.format) for each in asked or [answered(row, rows.format, truth)]]
        starts = [next(i for i, label in enumerate(each.labels) if label != IGNORED) for each in examples]
        prompt_ids = examples[0].input_ids[: min(starts)]
        longest = max(len(each.input_ids) for each in examples) if task.labels else len(prompt_ids)
        if longest > context_length:
            too_long += 1
            continue
        choices = tuple(_until_ignored(each.input_ids, each.labels, min(starts)) for each in examples)
        questions.append(Question(row, prompt_ids, truth.strip(), choices if task.labels else ()))
    told = []
    if len(chosen) < len(rows.rows):
        told.append(f"task: {len(chosen)} of {len(rows.rows)} validation rows are scored (task.max_rows)")
    if too_long:
        told.append(f"task: {too_long} of {len(chosen)} validation rows are over context_length and are not scored")
    if not questions:
        problem = Problem("context_length", f"every row is over {context_length} tokens")
        raise DataError("valid_path has nothing to score:", [problem])
    return questions, told


def _until_ignored(ids: Sequence[int], labels: Sequence[int], start: int) -> list[int]:
    """The answer's tokens: from the prompt's end to the last that is learnt."""
    end = max(index for index, label in enumerate(labels) if label != IGNORED) + 1
    return list(ids[start:end])
