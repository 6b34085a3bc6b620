"""The package's own rules: what it may import, and where."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import loradock_adapters

ROOT = Path(loradock_adapters.__file__).parent
LIGHT = {"typer", "rich", "httpx", "pydantic", "yaml"}
MIGRATIONS = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("migrations/versions/0*.py")}
REGISTRY = {f"registry{part}.py" for part in ("", "_changes", "_rows", "_schema", "_url")} | {
    f"{table}_table.py" for table in ("splits", "tags", "traffic")
}
HEAVY_HOMES = {
    "numpy": {"values.py", "repair_bases.py", "touched.py"},
    "sqlalchemy": REGISTRY | MIGRATIONS,
    "fsspec": {"blob_store.py"},
    "psycopg": {"registry_changes.py"},
    "torch": {"merge_stream.py", "merge_peft.py"},
    "peft": {"merge_peft.py"},
    "transformers": {"merge_peft.py"},
    "alembic": {"registry_schema.py", "migrations/env.py"} | MIGRATIONS,
}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """The top-level packages that a file imports, and whether it does so as it is loaded."""
    tree = ast.parse(path.read_text())
    at_load = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
        for name in names:
            yield name.partition(".")[0], id(node) in at_load


def files() -> list[tuple[str, Path]]:
    return [(path.relative_to(ROOT).as_posix(), path) for path in sorted(ROOT.rglob("*.py"))]


def test_package_imports_only_what_the_light_client_has() -> None:
    found = set()
    for name, path in files():
        for package, _ in imports(path):
            allowed = LIGHT | sys.stdlib_module_names | {"loradock_adapters"}
            if package not in allowed and name not in HEAVY_HOMES.get(package, set()):
                found.add((name, package))
    assert found == set()


def test_commands_import_nothing_heavy_as_they_are_loaded() -> None:
    found = set()
    for name, path in files():
        if name.startswith("commands/") or name == "cli.py":
            allowed = sys.stdlib_module_names | {"typer", "loradock_adapters"}
            found |= {(name, package) for package, at_load in imports(path) if at_load and package not in allowed}
    assert found == set()


def test_every_file_says_what_it_is_and_stays_short() -> None:
    for name, path in files():
        text = path.read_text()
        assert ast.get_docstring(ast.parse(text)), name
        assert len(text.splitlines()) < 400, name


def test_functions_stay_under_sixty_lines() -> None:
    for name, path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{name}: {node.name}"
