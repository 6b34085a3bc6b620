"""Every code that a Problem can have: what it means, what becomes of the upload, and the way out.

    python -m loradock_adapters.codes        the table of docs/adapters.md

One table (tables/codes.json) for the code, the documentation and the tests, which hold the three together. A problem
that says no fix of its own gets the one of its code, so that no refusal leaves its reader without a next step.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True, slots=True)
class Code:
    """One kind of finding."""

    outcome: str
    """`refused`, `dedicated`, `remark` or `repaired`."""
    meaning: str
    fix: str
    """What the publisher can do about it; empty only where there is nothing to do."""


@cache
def codes() -> Mapping[str, Code]:
    """All codes, by name."""
    document = json.loads(files("loradock_adapters.tables").joinpath("codes.json").read_text(encoding="utf-8"))
    return {code: Code(**fields) for code, fields in document.items()}


def fix_of(code: str) -> str:
    """The general way out; empty for codes of other programs and versions."""
    found = codes().get(code)
    return found.fix if found is not None else ""


def markdown() -> str:
    """The table as the documentation has it."""
    rows = [f"| `{name}` | {code.outcome} | {code.meaning} | {code.fix} |" for name, code in codes().items()]
    return "\n".join(["| code | outcome | meaning | fix |", "| --- | --- | --- | --- |", *rows])


if __name__ == "__main__":
    sys.stdout.write(markdown() + "\n")
