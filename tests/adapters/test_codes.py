"""The codes of problems: whatever the program can say stands in the table, and the documentation shows that table."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from loradock_adapters.codes import codes, markdown
from loradock_adapters.problems import Problem

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*ROOT.glob("adapters/loradock_adapters/**/*.py"), *ROOT.glob("serve/loradock_serve/**/*.py")])
SAYING = {"Problem", "refuse", "refuse_all", "detour", "detour_all", "remark", "remark_all", "_fail"}
PASSING_ON = {"findings.py", "problems.py"}
"""Files that hand on a code which somebody else chose."""


def first_arguments(path: Path) -> Iterator[ast.expr]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in SAYING and node.args:
            yield node.args[0]
        elif name == "Feature":
            yield node.args[3]
        elif name in SAYING:
            yield from (keyword.value for keyword in node.keywords if keyword.arg == "code")


def said() -> set[str]:
    """Every code that stands in the sources."""
    found = set()
    for path in SOURCES:
        if path.name not in PASSING_ON:
            for argument in first_arguments(path):
                found |= {
                    n.value for n in ast.walk(argument) if isinstance(n, ast.Constant) and isinstance(n.value, str)
                }
    return found


def test_every_code_that_the_program_says_is_in_the_table() -> None:
    assert sorted(said() - set(codes())) == []


def test_every_code_of_the_table_is_one_that_the_program_says() -> None:
    texts = "".join(path.read_text(encoding="utf-8") for path in SOURCES)
    assert [name for name in codes() if f'"{name}"' not in texts] == []


@pytest.mark.parametrize("name", codes())
def test_code_says_what_it_means_and_a_refusal_what_to_do(name: str) -> None:
    code = codes()[name]
    assert code.outcome in ("refused", "dedicated", "remark", "repaired")
    assert code.meaning.endswith(".")
    assert code.fix or code.outcome != "refused"
    assert "|" not in code.meaning + code.fix, "would break the documentation's table"


def test_documentation_has_the_table_as_it_is() -> None:
    assert markdown() in (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8"), (
        "run python -m loradock_adapters.codes and put its table into docs/adapters.md"
    )


def test_problem_without_a_fix_gets_that_of_its_code_and_keeps_its_own() -> None:
    assert Problem("not_finite", "holds NaN").fix == codes()["not_finite"].fix
    assert Problem("not_finite", "holds NaN", fix="retrain").fix == "retrain"
    assert Problem.from_json({"code": "of_a_newer_server", "message": "no"}).fix == ""
