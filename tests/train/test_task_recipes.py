"""The recipes of tasks and of a domain, run as they stand on tiny data and a tiny base."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from loradock_adapters.passport import read_passport, weights_sha256
from loradock_train import train

RECIPES = Path(__file__).parents[2] / "train" / "recipes"
TINY = ["context_length=400", "mixed_precision='no'", "max_steps=2", "train_batch_size_per_device=4"]
TEXTS = [{"text": f"The parser reads the {word} option. " * 4} for word in ("help", "file", "group", "usage")]
ROWS: dict[str, list[dict[str, Any]]] = {
    "classification": [
        {"prompt": f"{word} please", "completion": f" {label}"}
        for word, label in (("money back", "refund"), ("where is it", "delivery"), ("hello", "other"))
    ],
    "summarisation": [
        {"instruction": "Sum up.", "input": f"the {word} is long", "output": word} for word in ("help", "file")
    ],
}
TASK = [{"prompt": f"what is {word}?", "completion": f" an option {word}"} for word in ("help", "file")]


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    """A copy with a place for data beside it."""
    folder = tmp_path / "train" / "recipes"
    shutil.copytree(RECIPES, folder)
    (folder / "data").mkdir()
    return folder


def write(folder: Path, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
    (folder / "data" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("name", ["classification", "summarisation"])
def test_task_recipe_trains_and_is_scored_as_it_says(base: Path, tmp_path: Path, recipes: Path, name: str) -> None:
    for split in ("train", "valid"):
        write(recipes, f"{split}.jsonl", ROWS[name])
    overrides = [*TINY, f"model_id={base}", "task.max_new_tokens=4"]
    run = train(recipes / f"{name}.yaml", overrides=overrides, output=tmp_path / "run")
    assert run.summary["score"]["metric"] == {"classification": "macro_f1", "summarisation": "rougeL"}[name]
    assert run.summary["best"]["by"] == f"eval_{run.summary['score']['metric']}"
    assert len((run.directory / "predictions.jsonl").read_text().splitlines()) == len(ROWS[name])


def test_domain_recipes_train_a_base_on_text_and_an_adapter_on_that_base(
    base: Path, tmp_path: Path, recipes: Path
) -> None:
    for name, rows in (("domain", TEXTS), ("domain-valid", TEXTS), ("task", TASK), ("task-valid", TASK)):
        write(recipes, f"{name}.jsonl", rows)
    first = train(
        recipes / "domain-1-text.yaml",
        overrides=[*TINY, f"model_id={base}"],
        output=tmp_path / "runs" / "domain-1-text",
    )
    assert (first.kind, first.summary["best"]["by"]) == ("full", "eval_loss")
    second = train(
        recipes / "domain-2-task.yaml", overrides=[*TINY, "task.max_new_tokens=4"], output=tmp_path / "runs" / "two"
    )
    passport = read_passport(second.checkpoint)
    assert passport is not None
    assert passport.base.weights_sha256 == weights_sha256(first.checkpoint) != weights_sha256(base)
    assert second.summary["best"]["by"] == "eval_token_f1"
