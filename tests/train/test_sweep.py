"""Several adapters on one base: each is the bits of its run alone, and the base is in memory once."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from loradock_testing.rows import WriteRows
from loradock_train import train
from loradock_train.config_file import config_from
from loradock_train.errors import ConfigError, OutputError
from loradock_train.shared import twin
from loradock_train.sweep import best_of

ROWS = [{"prompt": f"say {word}", "completion": f" {word}"} for word in ("red", "blue", "green", "grey", "pink")]
SWEEP = [
    {"name": "small", "r": 2, "seed": 7},
    {"name": "fast", "learning_rate": 2e-2, "lora_dropout": 0.3},
    {"name": "wide", "target_modules": ["q_proj", "lm_head", "embed_tokens"], "lora_alpha": 4},
]


def options(base: Path, write_rows: WriteRows, **values: Any) -> dict[str, Any]:
    data = str(write_rows("rows.jsonl", ROWS))
    return {
        "model_id": str(base),
        "train_path": data,
        "valid_path": data,
        "lora_config": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
        "learning_rate": 5e-3,
        "mixed_precision": "no",
        "context_length": 64,
        "num_epochs": 3,
        "train_batch_size_per_device": 2,
        **values,
    }


def test_every_adapter_of_a_sweep_has_the_bits_of_its_run_alone(
    base: Path, tmp_path: Path, write_rows: WriteRows
) -> None:
    swept = train(options(base, write_rows, sweep=SWEEP), output=tmp_path / "sweep")
    for entry in SWEEP:
        own = {key: value for key, value in entry.items() if key in ("learning_rate", "seed")}
        lora = {key: value for key, value in entry.items() if key not in (*own, "name")}
        values = options(base, write_rows)
        alone = train(
            {**values, **own, "lora_config": {**values["lora_config"], **lora}}, output=tmp_path / str(entry["name"])
        )
        leg = tmp_path / "sweep" / str(entry["name"])
        files = [folder / "adapter_model.safetensors" for folder in (leg / "checkpoint", alone.checkpoint)]
        assert files[0].read_bytes() == files[1].read_bytes()
        assert json.loads((leg / "run.json").read_text())["final_eval_loss"] == alone.final_eval_loss
    told = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert told == swept.summary
    losses = {leg["name"]: leg["final_eval_loss"] for leg in told["legs"]}
    assert told["best"] == min(losses, key=losses.__getitem__)
    assert swept.checkpoint == tmp_path / "sweep" / told["best"] / "checkpoint"
    assert swept.final_eval_loss == losses[told["best"]]


def test_sweep_goes_on_with_the_adapters_that_are_missing(base: Path, tmp_path: Path, write_rows: WriteRows) -> None:
    first = train(options(base, write_rows, sweep=SWEEP[:1]), output=tmp_path / "sweep")
    before = (first.directory / "small" / "run.json").read_bytes()
    with pytest.raises(OutputError, match="already holds a run"):
        train(options(base, write_rows, sweep=SWEEP[:2]), output=tmp_path / "sweep")
    train(options(base, write_rows, sweep=SWEEP[:2]), output=tmp_path / "sweep", resume=True)
    assert (first.directory / "small" / "run.json").read_bytes() == before
    assert (first.directory / "fast" / "run.json").is_file()


def test_twin_has_modules_of_its_own_around_the_same_tensors(base: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    other: Any = twin(model)
    assert other.model.layers[0] is not model.model.layers[0]
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    others = dict(other.named_parameters()) | dict(other.named_buffers())
    assert tensors.keys() == others.keys()
    assert all(others[name] is tensor for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"lora_config": None}, "sweep trains adapters on one frozen base: give lora_config"),
        ({"sweep": [SWEEP[0], SWEEP[0]]}, "sweep has names twice: small"),
        ({"sweep": [{"name": "a", "lr": 1}]}, "sweep: unknown key lr of entry 1; known here: name, learning_rate"),
        ({"lora_config": {"bias": "all"}}, "without bias and without a new head"),
    ],
)
def test_sweep_that_cannot_be_is_refused(
    base: Path, write_rows: WriteRows, values: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from(options(base, write_rows, **{"sweep": SWEEP, **values}), folder=Path())
    assert problem in str(caught.value)


def test_best_adapter_is_by_score_before_loss() -> None:
    rows: list[dict[str, Any]] = [
        {"name": "a", "score": {"value": 0.5, "best": "high"}, "final_eval_loss": 1.0},
        {"name": "b", "score": {"value": 0.7, "best": "high"}, "final_eval_loss": 2.0},
    ]
    assert best_of(rows) == "b"
    assert best_of([{**row, "score": {**row["score"], "best": "low"}} for row in rows]) == "a"
    assert best_of([{**row, "score": None} for row in rows]) == "a"
    assert best_of([{**row, "score": None, "final_eval_loss": None} for row in rows]) is None
