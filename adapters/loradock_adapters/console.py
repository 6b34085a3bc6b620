"""How commands speak: data on stdout, everything else on stderr.

What is printed may come from a stranger (a server's message, a file's name): nothing of it is taken for markup or for a
terminal's control sequences.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console

from loradock_adapters.errors import LoradockError, RefusedError, ServerError
from loradock_adapters.problems import Problem

err = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
"""For people: progress, remarks, errors."""


def out(text: str) -> None:
    """One line of data."""
    sys.stdout.write(printable(text) + "\n")


def out_json(document: Any) -> None:
    """The command's whole result as one JSON document."""
    sys.stdout.write(json.dumps(document, indent=2) + "\n")


def out_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Columns as wide as they need, never cut: they are read by other programs as well."""
    lines = [[printable(str(cell)) for cell in row] for row in [header, *rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        sys.stdout.write("  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() + "\n")


def note(text: str, style: str | None = None) -> None:
    """One line for people."""
    err.print(printable(text), style=style)


def note_problems(problems: Iterable[Problem], style: str | None = None) -> None:
    for line in problem_lines(problems):
        note(line, style)


def problem_lines(problems: Iterable[Problem]) -> list[str]:
    """`- code: where: message` each, and the way out below it."""
    lines = []
    for problem in problems:
        lines.append(f"- {problem.code}: {problem}")
        if problem.fix:
            lines.append(f"    {problem.fix}")
    return lines


def report(error: LoradockError) -> None:
    """An error, short and red, with everything that was found."""
    problems = error.problems if isinstance(error, RefusedError | ServerError) else ()
    if problems or isinstance(error, RefusedError):  # the message of such an error is these once more
        count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
        note(f"error: refused, {count}", "red")
    else:
        note(f"error: {error}", "red")
    note_problems(problems)


def printable(text: str) -> str:
    """The text with control characters escaped; line breaks stay."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


def when(moment: object) -> str:
    """A moment that a server sent, as seconds since 1970 or as ISO 8601, for people: UTC, to the second."""
    if isinstance(moment, int | float) and not isinstance(moment, bool):
        return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M:%S")
    return moment[:19].replace("T", " ") if isinstance(moment, str) else ""


def split(weights: Mapping[str, object]) -> str:
    """A split for people, as shares: `3 90%  4 10%`."""
    numbers = {version: weight for version, weight in weights.items() if isinstance(weight, int)}
    whole = sum(numbers.values())
    return "  ".join(f"{version} {100 * weight / whole:.4g}%" for version, weight in numbers.items() if whole)


def size(size_bytes: int) -> str:
    """A number of bytes for people, in powers of ten."""
    amount = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"
