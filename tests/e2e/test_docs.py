"""What the documents say can be run: commands exist, options exist, keys exist, links lead somewhere."""

import re
import shlex
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import typer.main

from loradock_adapters import cli
from loradock_serve.config import ServeConfig
from loradock_train.config import TrainConfig

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*/README.md"))]
DOCUMENTS += sorted(ROOT.glob("examples/*/README.md"))
COMMAND = re.compile(r"(?:^|\$ |\.venv/bin/)(loradock [a-z][^#`\n|]*)")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def commands() -> list[str]:
    """Every `loradock …` line of an indented or fenced block."""
    found: list[str] = []
    for document in DOCUMENTS:
        for line in document.read_text().splitlines():
            if (
                line.startswith(("    ", "$ ", "loradock "))
                and (match := COMMAND.search(line.strip()))
                and "──" not in line
            ):
                found.append(match.group(1).strip())
    return found


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_command_in_documents_is_one_that_the_program_takes(command: str) -> None:
    words = shlex.split(command)[1:]
    group = typer.main.get_group(cli._application(list(entry_points(group=cli.GROUP))))
    sub = group.commands.get(words[0])
    assert sub is not None, f"no such command: {words[0]}"
    if "…" not in command and "[" not in command:
        sub.make_context(words[0], words[1:])


def test_documents_hold_commands_at_all() -> None:
    assert len(commands()) > 8


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_to_files(document: Path) -> None:
    missing = [link for link in LINK.findall(document.read_text()) if not (document.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_rows_stand_below_the_head_of_their_table(document: Path) -> None:
    """A blank line within a table ends it: what follows is shown as text with bars."""
    lines = ["", *document.read_text().splitlines(), ""]
    heads = [n for n in range(1, len(lines)) if lines[n].startswith("| ") and not lines[n - 1].startswith("|")]
    assert [lines[n] for n in heads if not re.fullmatch(r"\|( ?:?-+:? ?\|)+", lines[n + 1])] == []


def test_make_targets_in_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"^ +make ([a-z-]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert named
    assert {target for target in named if not re.search(rf"^{target}:", makefile, re.MULTILINE)} == set()


def test_every_serving_key_is_documented() -> None:
    text = (ROOT / "docs" / "serving.md").read_text()
    undocumented = []
    for key, field in ServeConfig.model_fields.items():
        section: dict[str, object] = getattr(field.annotation, "model_fields", {})
        names = [[f"`{key}.{inner}", f"`{inner}`"] for inner in section] or [[f"`{key}`"]]
        undocumented += [ways[0] for ways in names if not any(way in text for way in ways)]
    assert undocumented == []
    assert len(ServeConfig.model_fields) > 10


def test_every_training_key_is_documented() -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    assert [key for key in TrainConfig.model_fields if f"`{key}`" not in text] == []
