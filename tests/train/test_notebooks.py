"""The notebooks of examples/ run from top to bottom, small; and are kept without outputs."""

import json
import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SMALL = {
    "lora_vs_full": {"NOTEBOOK_BASE_STEPS": "4", "NOTEBOOK_TUNE_STEPS": "4", "NOTEBOOK_FILES": "30"},
    "from_scratch": {"NOTEBOOK_STEPS": "9", "NOTEBOOK_FILES": "30"},
}
SEEN = {
    "lora_vs_full": ["| run ", "| full-parameter |", "times as large", "logits"],
    "from_scratch": ["perplexity", "def main("],
}


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning", "ignore::ResourceWarning")
def test_notebook_runs_from_top_to_bottom(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**SMALL[path.stem], "NOTEBOOK_WORK": str(tmp_path), "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    notebook = read(path)
    NotebookClient(
        notebook,
        timeout=600,
        startup_timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    told = json.dumps([cell.get("outputs") for cell in notebook.cells])
    assert [text for text in SEEN[path.stem] if text not in told] == []
    assert "image/png" in told


def test_there_are_two_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["from_scratch", "lora_vs_full"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_kept_without_outputs(path: Path) -> None:
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
