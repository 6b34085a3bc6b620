"""docs/python-api.md: its snippets run as they stand, and it names everything that the package offers."""

import re
from pathlib import Path

import pytest

import loradock_train
from loradock_testing.rows import WriteRows

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "python-api.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_snippets_run_one_after_the_other(
    base: Path,
    tmp_path: Path,
    write_rows: WriteRows,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_rows("rows.jsonl", [{"prompt": f"def f{i}():", "completion": f" return {i}"} for i in range(4)])
    (tmp_path / "base").symlink_to(base)
    monkeypatch.chdir(tmp_path)
    known: dict[str, object] = {}
    assert len(SNIPPETS) == 5
    for snippet in SNIPPETS:
        if "duel(" in snippet:  # its legs are processes of their own, which test_duel.py starts
            compile(snippet, "docs/python-api.md", "exec")
            continue
        exec(compile(snippet, "docs/python-api.md", "exec"), known)
    assert (tmp_path / "runs.png").is_file()
    assert "full-parameter" in capsys.readouterr().out


@pytest.mark.parametrize("name", loradock_train.__all__)
def test_every_public_name_is_documented_and_there(name: str) -> None:
    assert f"`{name}" in TEXT
    assert callable(getattr(loradock_train, name))


def test_public_names_are_no_modules_once_all_is_imported() -> None:
    """A module of a public name would take its place as soon as something imports it."""
    folder = Path(loradock_train.__file__).parent
    assert {path.stem for path in folder.glob("*.py")} & set(loradock_train.__all__) == set()
