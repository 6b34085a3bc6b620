"""Rows of preference data: two answers to one prompt, one of them preferred. What is wrong with a row, and its tokens.

Two shapes: OpenAI's ({"input": {"messages", "tools"?}, "preferred_output": […], "non_preferred_output": […]}), and
{"prompt", "chosen", "rejected"}, of texts or of lists of messages. Knows nothing of training.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from loradock_train.chat import Values, check_messages, check_tools, tool_names

SIDES = ("preferred_output", "non_preferred_output")
CHOICES = ("chosen", "rejected")


def is_preference(values: Mapping[str, Any]) -> bool:
    """Whether the keys are those of a pair."""
    return any(key in values for key in (*SIDES, *CHOICES))


def check_preference(values: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a row."""
    if "preferred_output" in values or "non_preferred_output" in values:
        yield from _check_openai(values)
        return
    missing = [name for name in ("prompt", *CHOICES) if name not in values]
    for name in missing:
        yield f"missing key '{name}'"
    if missing:
        return
    kinds = {name: type(values[name]).__name__ for name in ("prompt", *CHOICES)}
    if set(kinds.values()) == {"str"}:
        for name in CHOICES:
            if values[name] == "":
                yield f"{name} is empty: there is nothing to learn"
    elif set(kinds.values()) == {"list"}:
        yield from _check_openai(_as_openai(values), ("prompt", *CHOICES))
    else:
        yield f"prompt, chosen and rejected must be three strings or three lists of messages, found {kinds}"
        return
    if values["chosen"] == values["rejected"]:
        yield "chosen and rejected are the same: there is nothing to prefer"


def _check_openai(values: Mapping[str, Any], names: tuple[str, str, str] = ("input.messages", *SIDES)) -> Iterator[str]:
    context = values.get("input")
    if not isinstance(context, dict):
        yield "missing key 'input'" if context is None else "'input' must be an object"
        return
    messages = context.get("messages")
    if not isinstance(messages, list) or not messages:
        yield f"'{names[0]}' must be a non-empty list"
        return
    yield from check_tools(context)
    allows_parallel = context.get("parallel_tool_calls") is not False
    yield from check_messages(messages, names[0], tool_names(context), allows_parallel)
    if isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
        yield f"'{names[0]}' must not end with an assistant message: the answers come after it"
    for side, name in zip(SIDES, names[1:], strict=True):
        answer = values.get(side)
        if not isinstance(answer, list) or len(answer) != 1:
            yield f"missing key '{name}'" if answer is None else f"'{name}' must be a list of one assistant message"
            continue
        yield from check_messages(answer, name, tool_names(context), allows_parallel)
        if isinstance(answer[0], dict) and answer[0].get("role") != "assistant":
            yield f"{name}[0]: role must be 'assistant', found {answer[0].get('role')!r}"
    if values.get(SIDES[0]) == values.get(SIDES[1]) and names[0] != "prompt":
        yield f"{names[1]} and {names[2]} are the same: there is nothing to prefer"


def _as_openai(values: Mapping[str, Any]) -> Values:
    return {
        "input": {"messages": values["prompt"], **({"tools": values["tools"]} if "tools" in values else {})},
        "preferred_output": values["chosen"],
        "non_preferred_output": values["rejected"],
    }


def as_two(values: Mapping[str, Any]) -> tuple[Literal["completion", "chat"], Values, Values]:
    """The row as two rows to learn from, the preferred one first: their format (completion or chat) and values.

    Of a chat only the last answer counts: those in the prompt have weight 0.
    """
    if isinstance(values.get("prompt"), str):
        chosen, rejected = ({"prompt": values["prompt"], "completion": values[name]} for name in CHOICES)
        return "completion", chosen, rejected
    row = values if "preferred_output" in values else _as_openai(values)
    context = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in row["input"]["messages"]]
    first, second = ({**row["input"], "messages": context + row[side]} for side in SIDES)
    return "chat", first, second
