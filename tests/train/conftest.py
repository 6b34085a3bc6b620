"""Shared by the training tests: one tiny base for the whole session, and files of rows."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from loradock_testing.rows import WriteRows


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 Llama with random weights and a chat template."""
    from loradock_testing.tiny_models import make_llama, make_tokenizer

    directory = tmp_path_factory.mktemp("base") / "tiny"
    make_tokenizer(directory)
    make_llama(directory)
    return directory


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    """Writes a JSONL file into the test's folder."""

    def write(name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
