"""The JSON Schema for editors: it takes every config that the repository holds, and marks a typo."""

import json
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest

from loradock_adapters.cli import run
from loradock_adapters.strict_config import read_yaml
from loradock_train.config import TrainConfig
from loradock_train.schema import train_schema
from loradock_train.seed_keys import OLD_KEYS

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(
    path
    for folder in ("examples", "benchmarks", "train/recipes")
    for path in (ROOT / folder).rglob("*.yaml")
    if "train_path:" in path.read_text()
)
MINIMAL = {"model_id": "org/model", "train_path": "rows.jsonl"}


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = train_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def complaints(validator: Any, **values: Any) -> list[str]:
    found = list(validator.iter_errors({**MINIMAL, **values}))
    return [".".join(str(part) for part in error.absolute_path) or error.message for error in found]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_config_of_the_repository_fits_the_schema(validator: Any, path: Path) -> None:
    assert list(validator.iter_errors(read_yaml(path))) == []


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"train_path": ["a.jsonl", "b.jsonl"]},
        {"learning_rate": 1, "num_epochs": 2.5, "valid_path": None},
        {"lora_config": {"target_modules": "all-linear", "init_lora_weights": "gaussian"}},
        {"per_device_train_batch_size": 4, "fp16": True, "optim": "adamw_bnb_8bit", "logging_dir": "logs"},
        {"report_to": "tensorboard"},
        {"report_to": ["tensorboard", "mlflow"]},
    ],
)
def test_what_the_run_takes_the_schema_takes(validator: Any, values: dict[str, Any]) -> None:
    assert complaints(validator, **values) == []


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"learning_rat": 1e-4}, "Additional properties are not allowed ('learning_rat' was unexpected)"),
        ({"lora_config": {"lora_alfa": 16}}, "lora_config"),
        ({"num_epochs": 0}, "num_epochs"),
        ({"context_length": "512"}, "context_length"),
        ({"train_path": []}, "train_path"),
        ({"optim": "adam"}, "optim"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size"),
        ({"bf16": "yes"}, "bf16"),
        ({"train_path": 3}, "train_path"),
    ],
)
def test_what_is_wrong_is_marked_where_it_stands(validator: Any, values: dict[str, Any], where: str) -> None:
    assert complaints(validator, **values) == [where]


def test_config_without_data_is_marked(validator: Any) -> None:
    assert [error.message for error in validator.iter_errors({"model_id": "a/b"})] == [
        "'train_path' is a required property"
    ]


def test_every_key_has_a_description_and_old_ones_are_deprecated() -> None:
    schema = train_schema()
    everywhere = [schema, *schema["$defs"].values()]
    assert [name for part in everywhere for name, key in part["properties"].items() if not key.get("description")] == []
    assert {name for name, key in schema["properties"].items() if key.get("deprecated")} == OLD_KEYS
    assert set(schema["properties"]) == {*TrainConfig.model_fields, *OLD_KEYS}


def test_command_prints_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == train_schema()
