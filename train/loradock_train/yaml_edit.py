"""Changing one value in a YAML text, and nothing else in it: comments, order and spacing stay as they are.

For configs: mappings of mappings. What cannot be edited in place (an anchor that two keys share) shows when the result
is read again, which callers must do.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

import yaml

_PLAIN = re.compile(r"[A-Za-z_./][\w./-]*")


def set_value(text: str, keys: Sequence[str], value: Any) -> str:
    """The text with the value at this path of keys; sections and keys that are missing are added."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        return text.rstrip("\n") + f"\n{_entry(keys, value)}\n"
    section, rest = root, list(keys)
    while True:
        entry = _find(section, rest[0])
        if entry is None:
            return _add(text, section, rest, value)
        key, inner = entry
        if len(rest) == 1 or not isinstance(inner, yaml.MappingNode):
            return _replace(text, key, inner, _entry(rest, value).partition(":")[2].strip())
        section, rest = inner, rest[1:]


def _find(section: yaml.MappingNode, name: str) -> tuple[yaml.Node, yaml.Node] | None:
    return next(((key, value) for key, value in section.value if key.value == name), None)


def _replace(text: str, key: yaml.Node, old: yaml.Node, new: str) -> str:
    start, end = old.start_mark.index, _end(old)
    if isinstance(old, yaml.ScalarNode) and end > start and old.start_mark.line == key.start_mark.line:
        return text[:start] + new + text[end:]
    return text[: key.end_mark.index] + ": " + new + text[max(end, text.index(":", key.end_mark.index) + 1) :]


def _add(text: str, section: yaml.MappingNode, keys: Sequence[str], value: Any) -> str:
    if section.flow_style:
        end = section.end_mark.index - 1  # its closing brace
        comma = ", " if section.value else ""
        return text[:end].rstrip() + comma + _entry(keys, value) + text[end:]
    last = _end(section.value[-1][1]) if section.value else section.end_mark.index
    last = max(last, section.value[-1][0].end_mark.index + 1) if section.value else last  # `key:` without a value
    line_end = text.find("\n", last)
    line_end = len(text) if line_end < 0 else line_end
    indent = " " * (section.value[0][0].start_mark.column if section.value else 0)
    return f"{text[:line_end]}\n{indent}{_entry(keys, value)}{text[line_end:]}"


def _end(node: yaml.Node) -> int:
    """Where a value ends. A block collection says it ends where the next thing begins, comments before it included."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    return int(node.end_mark.index)


def _entry(keys: Sequence[str], value: Any) -> str:
    for key in reversed(keys[1:]):
        value = {key: value}
    return f"{keys[0]}: {_flow(value)}"


def _flow(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_flow(key)}: {_flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_flow(inner) for inner in value) + "]"
    if isinstance(value, str) and _PLAIN.fullmatch(value) and yaml.safe_load(value) == value:
        return value
    return json.dumps(value, ensure_ascii=False)
