"""A thousand versions: what resolving, listing and showing ask the database does not grow with how many there are.

How long that takes is measured by `make bench BENCH=versions`.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from loradock_adapters.gate import Verdict
from loradock_adapters.manifest import FileEntry, Manifest
from loradock_adapters.registry import Details, Registry
from loradock_adapters.registry_rows import new_row
from loradock_adapters.registry_schema import models, versions
from loradock_serve.catalog import Catalog
from loradock_serve.rewrite import Behaviour

COUNT = 1000
SHARED = Verdict("lora", "shared", (), 8)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """A thousand names with a version each, and one with a thousand versions, a split and tags."""
    registry = Registry(f"sqlite:///{tmp_path}/registry.db")
    rows = []
    for number in range(1, COUNT + 1):
        manifest = Manifest((FileEntry("adapter_config.json", number, f"{number:064x}"),))
        rows.append(new_row("one", number, manifest, SHARED, Details(), None))
        rows.append(new_row(f"m{number}", 1, manifest, SHARED, Details(), None))
    with registry._writer.begin() as connection:
        names = [{"name": row["name"], "current_number": 1, "last_number": 1} for row in rows if row["number"] == 1]
        connection.execute(sa.insert(models), [row for row in names if row["name"] != "one"])
        connection.execute(sa.insert(models), {"name": "one", "current_number": COUNT, "last_number": COUNT})
        connection.execute(sa.insert(versions), rows)
    registry.splits.set("one", {COUNT - 1: 90, COUNT: 10})
    for number in range(1, 101):
        registry.tags.set("one", f"tag{number}", number)
    yield registry
    registry.close()


def statements(registry: Registry, call: Callable[[], object]) -> list[tuple[str, Any]]:
    """What a call asks the database."""
    asked: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_more: Any) -> None:
        if not statement.startswith("BEGIN"):
            asked.append((statement, parameters))

    sa.event.listen(registry._engine, "before_cursor_execute", note)
    call()
    sa.event.remove(registry._engine, "before_cursor_execute", note)
    return asked


@pytest.mark.parametrize("ref", ["m500", "one", "one@500", "one@tag50", "one@{digest}"])
def test_reference_is_resolved_by_one_statement_that_reads_no_whole_table(registry: Registry, ref: str) -> None:
    catalog = Catalog(registry, "base-model", Behaviour())
    catalog.changed()
    ref = ref.format(digest=registry.resolve("one@7").digest)
    ((statement, parameters),) = statements(registry, lambda: catalog.resolve(ref))
    with registry._engine.connect() as connection:
        plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
    assert [step.detail for step in plan if step.detail.startswith("SCAN")] == []
    assert statements(registry, lambda: catalog.resolve(ref)) == [], "known until something changes"


QUESTIONS: dict[str, Callable[[Registry], object]] = {
    "GET /v1/adapters": lambda of: (of.models(), of.tags.all(), of.splits.all()),
    "GET /v1/models": lambda of: of.models(),
    "a start": lambda of: (of.bases(), of.older_ranks(), of.pins(), of.counts()),
    "gc": lambda of: (of.digests(), of.blobs()),
}


def test_lists_take_as_many_statements_as_for_one_name(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    small = Registry(f"sqlite:///{tmp_path}/small/registry.db")
    small.publish("only", Manifest((FileEntry("adapter_config.json", 1, f"{1:064x}"),)), SHARED)
    for what, question in QUESTIONS.items():
        many, few = (statements(of, partial(question, of)) for of in (registry, small))
        assert [statement for statement, _ in many] == [statement for statement, _ in few], what
    assert len(registry.models()) == COUNT + 1
    assert len(statements(registry, partial(registry.versions, "one"))) == 1
    small.close()
