"""The quickstart's data, from text that every machine has: the Python standard library's own source.

    python examples/quickstart/data.py .quickstart/data

One question, two tasks. The question is a few lines of a standard-library function whose last line has its keyword
blanked out; `packages` asks which package the lines come from, `keywords` which keyword is missing. Nothing in the
prompt says which of the two is asked for: that is what an adapter knows.

A tenth of all functions is held out before anything else is made: they are cut out of the base's text, and the
held-out rows come from them alone. Knows nothing of models or tokens. The same Python makes the same bytes.
"""

import argparse
import ast
import hashlib
import json
import random
import re
import sysconfig
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

BLANK = "____"
SUFFIX = "\n# answer:"
"""Ends every prompt. The base has never seen it, so it goes on writing code instead of answering."""

KEYWORDS = ("if", "return", "raise", "for", "while", "with")
CANDIDATE_PACKAGES = ("asyncio", "decimal", "email", "logging", "unittest", "xml", "multiprocessing", "http", "urllib")
"""In order of preference: each is written in words of its own. Distributions leave out parts of the standard library,
so the first NUM_PACKAGES that are here in earnest are taken."""
NUM_PACKAGES = 6
MIN_PACKAGE_ROWS = 150

HELD_OUT_SHARE = 0.1
MAX_TRAIN_ROWS_PER_CLASS = 700
MAX_HELD_OUT_ROWS_PER_CLASS = 25
MIN_HELD_OUT_ROWS = 100
MAX_WINDOW_CHARS = 200
MIN_WINDOW_LINES = 3

# What is not the library itself, what some distributions leave out, and what is data written as code.
SKIPPED = frozenset(
    {
        *("site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "distutils", "tkinter"),
        *("turtledemo", "ensurepip", "encodings", "pydoc_data", "__pycache__"),
    }
)
KEYWORD_LINE = re.compile(rf"^(\s*)({'|'.join(KEYWORDS)})\b(?=.*\w)")


class DataError(Exception):
    """This machine's standard library does not hold what the quickstart is made from."""


@dataclass(frozen=True)
class Function:
    """A top-level function or a method, decorators included. Functions inside it are part of it."""

    package: str
    source: str
    statement_lines: frozenset[int]
    """Lines of `source` (from 0) on which a statement begins."""

    @property
    def key(self) -> str:
        """The source without its layout: copies of one function share it, and so share a side of the split."""
        return squeezed(self.source)


@dataclass(frozen=True)
class Window:
    """Some lines of a function up to a statement whose keyword is blanked out."""

    package: str
    keyword: str
    code: str
    """The lines as they stand in the library."""
    prompt: str


@dataclass(frozen=True)
class Row:
    """One row as `loradock train` reads it."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Quickstart:
    """All that the quickstart trains and asks."""

    base_texts: tuple[str, ...]
    """Files of the library, without the held-out functions."""
    train: dict[str, tuple[Row, ...]]
    held_out: dict[str, tuple[Row, ...]]


def squeezed(text: str) -> str:
    """The text with every run of white space as one blank."""
    return re.sub(r"\s+", " ", text).strip()


def library_files(root: Path) -> list[Path]:
    """The library's files, sorted, so that every run sees them in one order."""
    files = (path for path in root.rglob("*.py") if not SKIPPED.intersection(path.relative_to(root).parts))
    return sorted(path for path in files if not path.relative_to(root).parts[0].startswith("config-"))


def package_of(path: Path, root: Path) -> str:
    """`asyncio` for asyncio/tasks.py, `decimal` for _pydecimal.py."""
    name = path.relative_to(root).parts[0].removesuffix(".py")
    return name.removeprefix("_py") if name.startswith("_py") else name


# ---- from files to functions ---------------------------------------------------------------------------------------


def functions_of(text: str, package: str) -> Iterator[tuple[int, int, Function]]:
    """First line, line after the last (from 0), and the function, for every top-level function and method."""
    lines = text.splitlines()
    for node in _defined(ast.parse(text).body):
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
        end = node.end_lineno or node.lineno
        starts = frozenset(part.lineno - 1 - first for part in ast.walk(node) if isinstance(part, ast.stmt))
        yield first, end, Function(package, textwrap.dedent("\n".join(lines[first:end])), starts)


def _defined(body: Sequence[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from _defined(node.body)


def is_held_out(function: Function, seed: int) -> bool:
    """Decided by the function's own text: the same on every machine that has the function."""
    digest = hashlib.sha256(f"{seed} {function.key}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def split_file(text: str, package: str, seed: int) -> tuple[str, list[Function], list[Function]]:
    """The text without its held-out functions, the functions left in it, and those taken out."""
    lines = text.splitlines()
    kept: list[Function] = []
    held_out: list[Function] = []
    cut: set[int] = set()
    for first, end, function in functions_of(text, package):
        if is_held_out(function, seed):
            held_out.append(function)
            cut.update(range(first, end))
        else:
            kept.append(function)
    return "\n".join(line for number, line in enumerate(lines) if number not in cut) + "\n", kept, held_out


# ---- from functions to rows ------------------------------------------------------------------------------------------


def windows_of(function: Function) -> Iterator[Window]:
    """Every statement of the function that begins with one of KEYWORDS, with the lines before it."""
    lines = function.source.splitlines()
    for number, line in enumerate(lines):
        match = KEYWORD_LINE.match(line)
        if match is None or number not in function.statement_lines:
            continue
        first, length = number, len(line)
        while first > 0 and length + len(lines[first - 1]) + 1 <= MAX_WINDOW_CHARS:
            first -= 1
            length += len(lines[first]) + 1
        if number - first + 1 < MIN_WINDOW_LINES:
            continue
        blanked = line[: match.end(1)] + BLANK + line[match.end(2) :]
        code = "\n".join(lines[first : number + 1])
        prompt = textwrap.dedent("\n".join([*lines[first:number], blanked])) + SUFFIX
        yield Window(function.package, match[2], code, prompt)


def windows_in(functions: Sequence[Function]) -> list[Window]:
    """The windows of all functions, each prompt once, in an order that no file system decides."""
    unique: dict[str, Window] = {}
    for function in sorted(functions, key=lambda function: (function.key, function.package)):
        for window in windows_of(function):
            unique.setdefault(squeezed(window.prompt), window)
    return list(unique.values())


def balanced(
    windows: Sequence[Window], label: Callable[[Window], str], classes: Sequence[str], most: int, rng: random.Random
) -> tuple[Row, ...]:
    """Rows of each class, at most `most`, shuffled."""
    rows: list[Row] = []
    for name in classes:
        of_class = [window for window in windows if label(window) == name]
        rows += [Row(window.prompt, f" {name}") for window in rng.sample(of_class, min(most, len(of_class)))]
    rng.shuffle(rows)
    return tuple(rows)


def even_balanced(
    windows: Sequence[Window], label: Callable[[Window], str], classes: Sequence[str], rng: random.Random
) -> tuple[Row, ...]:
    """As `balanced`, with equally many rows of each class: the best constant answer scores 1 / classes."""
    scarcest = min(sum(label(window) == name for window in windows) for name in classes)
    return balanced(windows, label, classes, min(scarcest, MAX_HELD_OUT_ROWS_PER_CLASS), rng)


# ---- all of it -------------------------------------------------------------------------------------------------------


def build(root: Path, seed: int = 0) -> Quickstart:
    """Everything from the library at `root`. Raises DataError where it holds too little."""
    texts: list[str] = []
    kept: list[Function] = []
    held_out: list[Function] = []
    for path in library_files(root):
        try:
            text, stays, goes = split_file(path.read_text("utf-8"), package_of(path, root), seed)
        except (SyntaxError, UnicodeDecodeError):
            continue  # a few files of some distributions are there to be broken
        texts.append(text)
        kept += stays
        held_out += goes
    train_windows, held_windows = windows_in(kept), _unseen(windows_in(held_out), texts)
    packages = _packages(train_windows)
    rng = random.Random(seed)
    labels: dict[str, tuple[Callable[[Window], str], Sequence[str]]] = {
        "packages": (lambda window: window.package, packages),
        "keywords": (lambda window: window.keyword, KEYWORDS),
    }
    data = Quickstart(
        tuple(texts),
        {
            task: balanced(train_windows, label, classes, MAX_TRAIN_ROWS_PER_CLASS, rng)
            for task, (label, classes) in labels.items()
        },
        {task: even_balanced(held_windows, label, classes, rng) for task, (label, classes) in labels.items()},
    )
    for task, rows in data.held_out.items():
        if len(rows) < MIN_HELD_OUT_ROWS:
            raise DataError(f"{root} gives {len(rows)} held-out rows for {task}; {MIN_HELD_OUT_ROWS} are needed")
    return data


def _unseen(windows: Sequence[Window], texts: Sequence[str]) -> list[Window]:
    """The windows whose lines stand nowhere in the base's text: short stretches are copied between functions."""
    everything = squeezed("\n".join(texts))
    return [window for window in windows if squeezed(window.code) not in everything]


def _packages(windows: Sequence[Window]) -> list[str]:
    count = Counter(window.package for window in windows)
    found = [package for package in CANDIDATE_PACKAGES if count[package] >= MIN_PACKAGE_ROWS][:NUM_PACKAGES]
    if len(found) < NUM_PACKAGES:
        raise DataError(
            f"only {len(found)} of the {NUM_PACKAGES} packages needed are in this Python's standard library "
            f"({', '.join(found) or 'none'}); install the whole of it (Debian, Ubuntu: apt install python3-full)"
        )
    return found


def write(data: Quickstart, directory: Path) -> None:
    """base.jsonl, and TASK-train.jsonl and TASK-heldout.jsonl for both tasks."""
    directory.mkdir(parents=True, exist_ok=True)
    _write_lines(directory / "base.jsonl", ({"text": text} for text in data.base_texts if text.strip()))
    for name, tasks in (("train", data.train), ("heldout", data.held_out)):
        for task, rows in tasks.items():
            lines = ({"prompt": row.prompt, "completion": row.completion} for row in rows)
            _write_lines(directory / f"{task}-{name}.jsonl", lines)


def _write_lines(path: Path, documents: Iterator[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")


def best_constant(rows: Sequence[Row]) -> tuple[str, float]:
    """The answer that, given to every question, scores best; and its score."""
    answer, count = Counter(row.completion for row in rows).most_common(1)[0]
    return answer.strip(), count / len(rows)


def describe(data: Quickstart) -> Iterator[str]:
    """What was made, for people."""
    yield f"base: {len(data.base_texts)} files, {sum(map(len, data.base_texts)) / 1e6:.1f} MB of source"
    for task in data.train:
        counts = Counter(row.completion.strip() for row in data.train[task]).most_common()
        _, constant = best_constant(data.held_out[task])
        yield (
            f"{task}: {len(data.train[task])} rows to train on ({', '.join(f'{name} {n}' for name, n in counts)}), "
            f"{len(data.held_out[task])} held out (the best constant answer scores {constant:.2f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the quickstart's data from the Python standard library.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="another seed holds out other functions")
    arguments = parser.parse_args()
    try:
        data = build(Path(sysconfig.get_path("stdlib")), arguments.seed)
    except DataError as error:
        raise SystemExit(f"error: {error}") from None
    write(data, arguments.directory)
    print("\n".join(describe(data)))


if __name__ == "__main__":
    main()
