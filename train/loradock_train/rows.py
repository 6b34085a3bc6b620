"""Reading data files into rows, and saying exactly which line is wrong.

Five formats: chat ({"messages": […]}, the OpenAI shape, images too), instruction ({"instruction", "input",
"output"}), completion ({"prompt", "completion"}), preference (two answers to one prompt, preference_rows.py) and raw
text ({"text"}, or .txt files, one document each). The format is decided by the keys of *every* row, never by the first
alone. Knows nothing of tokens.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from loradock_train.chat import check_chat, has_functions
from loradock_train.errors import DataError, Problem
from loradock_train.files import DataFile, data_files, passed_over
from loradock_train.images import image_files, sources_of
from loradock_train.preference_rows import check_preference, is_preference

Format: TypeAlias = Literal["chat", "instruction", "completion", "text", "preference"]

READ_KEYS: dict[Format, frozenset[str]] = {
    "chat": frozenset({"messages", "tools", "parallel_tool_calls", "functions"}),
    "instruction": frozenset({"instruction", "input", "output"}),
    "completion": frozenset({"prompt", "completion"}),
    "text": frozenset({"text", "label"}),
    "preference": frozenset(
        {"input", "preferred_output", "non_preferred_output", "prompt", "chosen", "rejected", "tools"}
    ),
}
"""Keys of a row that something reads (`label`: a classification head)."""
MAX_UNREAD = 6
_MARKS: dict[str, Format] = {"messages": "chat", "instruction": "instruction", "prompt": "completion", "text": "text"}


@dataclass(frozen=True, slots=True)
class Row:
    """One row of data and where it stands."""

    file: str
    line: int
    """1-based; 0 for a .txt file, which is one document as a whole."""
    values: dict[str, Any]
    is_continued: bool = False
    """A piece of a text that goes on in the next row: no end-of-text token stands behind it."""

    @property
    def where(self) -> str:
        """The place, for messages."""
        return f"{self.file}, line {self.line}" if self.line else self.file

    @property
    def images(self) -> list[str]:
        """The images of a chat row, in order: data: URLs and paths."""
        return sources_of(self.values.get("messages", ()), self.file)


@dataclass(frozen=True)
class Rows:
    """All rows of one split, checked, of one format."""

    format: Format
    rows: tuple[Row, ...]
    sha256: str
    """Hash over the bytes of all files (decompressed), in order."""
    files: tuple[tuple[str, str], ...] = ()
    """Path and sha256 of every file, in order; then of the images beside them."""
    notices: tuple[str, ...] = ()
    """What was read otherwise than it is written."""

    @property
    def has_images(self) -> bool:
        """Whether any row shows one."""
        return any(row.images for row in self.rows)


def read_rows(paths: Sequence[str], wanted: Format | Literal["auto"], key: str) -> Rows:
    """Read and check every row. `key` is the config key, for messages. Raises DataError with all problems."""
    problems: list[Problem] = []
    rows: list[Row] = []
    digest = hashlib.sha256()
    files: list[tuple[str, str]] = []
    for file in data_files(paths, key):
        content, sha256 = file.read()
        digest.update(content)
        files.append((file.name, sha256))
        rows.extend(_read_file(file, content, problems))
    if problems:
        raise DataError(f"{key} has {count_of(len(problems), 'broken line')}:", problems)
    if not rows:
        raise DataError(f"{key} has no data:", [Problem(path, "no rows") for path in paths])
    found = decide_format(rows, wanted, key)
    problems = [problem for row in rows for problem in check_row(row, found)]
    if problems:
        raise DataError(f"{key} has {count_of(len(problems), 'problem')}:", problems)
    images = image_files([source for row in rows for source in row.images])
    for _, sha256 in images:
        digest.update(bytes.fromhex(sha256))
    old = sum(found == "chat" and has_functions(row.values) for row in rows)
    notices = (*passed_over(paths, key), *unread_keys(rows, found, key))
    if old:
        told = f"{key}: {count_of(old, 'row')} with the old functions and function_call read as tools and tool_calls"
        notices = (told, *notices)
    return Rows(found, tuple(rows), digest.hexdigest(), (*files, *images), notices)


def unread_keys(rows: Sequence[Row], row_format: Format, key: str) -> tuple[str, ...]:
    """A notice of what stands in the rows and reaches no model: metadata, or a misspelt key."""
    known = READ_KEYS[row_format]
    counts = Counter(name for row in rows for name in row.values if name not in known)
    if not counts:
        return ()
    named = ", ".join(f"{name} ({count_of(number, 'row')})" for name, number in counts.most_common(MAX_UNREAD))
    more = f" and {len(counts) - MAX_UNREAD} more" if len(counts) > MAX_UNREAD else ""
    return (f"{key}: keys that {row_format} rows do not have, and that are not learnt: {named}{more}",)


def count_of(number: int, noun: str) -> str:
    """`3 problems`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _read_file(file: DataFile, content: bytes, problems: list[Problem]) -> Iterator[Row]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        problems.append(Problem(f"{file.name}, line {line}", "not valid UTF-8"))
        return
    if file.is_text:
        if text.strip():
            yield Row(file.name, 0, {"text": text})
        return
    for number, line_text in enumerate(text.split("\n"), start=1):
        if line_text.strip() and (row := parse_line(file.name, number, line_text, problems)) is not None:
            yield row


def parse_line(file: str, number: int, line: str, problems: list[Problem]) -> Row | None:
    """One line of JSON Lines; None where it is added to the problems."""
    try:
        values = json.loads(line, object_pairs_hook=_unique)
        problem = None if isinstance(values, dict) else f"expected a JSON object, found {type(values).__name__}"
        if problem is None and "\\u" in line:
            json.dumps(values, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        problem = f"not valid JSON: {error.msg} at column {error.colno}"
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        problem = f"not valid Unicode: \\u{half:04x} is half of a character, and the other half is missing"
    except _TwiceError as error:
        problem = f"the key {error.key!r} stands twice, with different values"
    except RecursionError:
        problem = "not valid JSON: brackets within brackets, too deep to be read"
    except ValueError:  # Python's own limit: 4,300 digits
        problem = "not valid JSON: a number of more digits than can be read"
    if problem is not None:
        problems.append(Problem(f"{file}, line {number}", problem))
        return None
    return Row(file, number, values)


class _TwiceError(Exception):
    """A key that an object has twice, so that one of its values would be lost."""

    def __init__(self, key: str) -> None:
        self.key = key
        super().__init__(key)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        for key, value in pairs:
            if values[key] != value:
                raise _TwiceError(key)
    return values


def decide_format(rows: Sequence[Row], wanted: Format | Literal["auto"], key: str) -> Format:
    """The one format that all rows share. Mixed files are an error that names the first row of each sort."""
    if wanted != "auto":
        return wanted
    first: dict[Format, Row] = {}
    problems: list[Problem] = []
    for row in rows:
        marks = [name for name in _MARKS if name in row.values]
        if is_preference(row.values):
            first.setdefault("preference", row)
        elif len(marks) == 1:
            first.setdefault(_MARKS[marks[0]], row)
        elif marks:
            problems.append(Problem(row.where, f"has keys of several formats ({', '.join(marks)}); set format:"))
        else:
            keys = ", ".join(sorted(row.values)) or "none"
            problems.append(Problem(row.where, f"no messages, instruction, prompt or text key (its keys: {keys})"))
    if problems:
        raise DataError(f"{key} has {count_of(len(problems), 'row')} of unknown format:", problems)
    if len(first) > 1:
        raise DataError(
            f"{key} mixes formats; all rows must share one:",
            [Problem(row.where, f"the first {name} row") for name, row in first.items()],
        )
    return next(iter(first))


# ---- rows ----------------------------------------------------------------------------------------------------------


def check_row(row: Row, row_format: Format) -> list[Problem]:
    """All that is wrong with it."""
    return [Problem(row.where, message) for message in _check(row.values, row_format, row.file)]


def _check(values: dict[str, Any], row_format: Format, file: str) -> Iterator[str]:
    if row_format == "chat":
        yield from check_chat(values, file)
    elif row_format == "preference":
        yield from check_preference(values)
    elif row_format == "instruction":
        yield from _check_strings(values, required=("instruction", "output"), optional=("input", "system"))
        if values.get("output") == "":
            yield "output is empty: there is nothing to learn"
    elif row_format == "completion":
        yield from _check_strings(values, required=("prompt", "completion"), optional=())
        if values.get("completion") == "":
            yield "completion is empty: there is nothing to learn"
    else:
        yield from _check_strings(values, required=("text",), optional=())


def _check_strings(values: dict[str, Any], required: Sequence[str], optional: Sequence[str]) -> Iterator[str]:
    for name in required:
        if name not in values:
            yield f"missing key '{name}'"
        elif not isinstance(values[name], str):
            yield f"'{name}' must be a string, found {type(values[name]).__name__}"
    for name in optional:
        if not isinstance(values.get(name, ""), str):
            yield f"'{name}' must be a string, found {type(values[name]).__name__}"
