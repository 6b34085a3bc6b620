"""Several processes train what one would: the same rows in a step, the same loss, the same checkpoint."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loradock_testing.worlds import run_worlds
from loradock_train.order import FILLER, Shares

ROWS = [
    {"prompt": f"def f{i}(x" + "y" * (i % 5) + "):", "completion": f" return {i}" + " + x" * (i % 4)} for i in range(21)
]
COMMON: dict[str, Any] = {
    "context_length": 64,
    "learning_rate": 1e-2,
    "mixed_precision": "no",
    "num_epochs": 2,
    "logging_steps": 1,
}
KINDS: dict[str, dict[str, Any]] = {
    "full": {"group_by_length": False, "optim": "sgd", "learning_rate": 0.1},
    "lora": {"lora_config": {"r": 4, "target_modules": ["q_proj", "down_proj", "lm_head"]}},
    "packed": {"packing": True, "context_length": 32},
    "best": {"group_by_length": False, "optim": "sgd", "learning_rate": 0.1, "best_by": "eval_loss", "eval_steps": 2},
}
# Four rows a step, 21 rows: the last step has one, so that one of two processes has none.
SHAPES: dict[str, tuple[int, int, int]] = {
    "one": (1, 4, 1),
    "accumulated": (1, 1, 4),
    "two": (2, 2, 1),
    "two-accumulated": (2, 1, 2),
}
CASES = [("full", "accumulated"), ("full", "two"), *((kind, "two-accumulated") for kind in KINDS)]
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 2e-4
"""Relative, and of what the run has changed at most: sums of float32 in another order."""
FEW, FEW_TOLERANCE = 1e-3, 1e-2
"""Adam divides by the root of a gradient's square, so that where a gradient is next to nothing its rounding is seen in
the weight: so many of a tensor's numbers may be so far off (4e-4 was seen, of one number in 8,192)."""


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[str, str], Path]:
    """Every kind of run in every shape."""
    folder = tmp_path_factory.mktemp("worlds")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    cases = [*((kind, "one") for kind in KINDS), *CASES]
    places = {(kind, shape): folder / f"{kind}-{shape}" for kind, shape in cases}
    legs: list[dict[str, Any]] = []
    for (kind, shape), output in places.items():
        processes, batch, accumulated = SHAPES[shape]
        config: dict[str, Any] = {
            **COMMON,
            **KINDS[kind],
            "model_id": str(base),
            "train_path": str(data),
            "valid_path": str(data),
            "train_batch_size_per_device": batch,
            "eval_batch_size_per_device": 2,
            "gradient_accumulation_steps": accumulated,
        }
        legs.append({"config": config, "output": str(output), "processes": processes})
    for leg, endings in zip(legs, run_worlds(legs), strict=True):
        assert [ending["code"] for ending in endings] == [0] * leg["processes"], endings
    return places


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    (file,) = (run / "checkpoint").glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_run_in_parts_has_the_loss_curve_and_the_weights_of_the_whole(
    runs: Mapping[tuple[str, str], Path], base: Path, kind: str, shape: str
) -> None:
    whole, parts = runs[kind, "one"], runs[kind, shape]
    for mine, theirs in zip(lines(parts), lines(whole), strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine.keys() & {"loss", "eval_loss"}:
            assert mine[key] == pytest.approx(theirs[key], rel=LOSS_TOLERANCE), mine["step"]
        assert (mine["step"], mine["tokens"], mine.get("eval_tokens")) == (
            theirs["step"], theirs["tokens"], theirs.get("eval_tokens"),
        )  # fmt: skip
    before = load_file(base / "model.safetensors") if kind != "lora" else {}
    for name, theirs_ in weights(whole).items():
        moved = float((theirs_ - before.get(name, torch.zeros(()))).abs().max())
        assert moved > 1e-4, name
        off = (weights(parts)[name] - theirs_).abs() / moved
        assert float(off.max()) <= FEW_TOLERANCE, name
        assert float((off > WEIGHT_TOLERANCE).double().mean()) <= FEW, name


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_write_the_same_files_as_one(runs: Mapping[tuple[str, str], Path], kind: str) -> None:
    one, two = runs[kind, "one"], runs[kind, "two-accumulated"]
    for place in (Path(), Path("checkpoint")):
        assert {path.name for path in (two / place).iterdir()} == {path.name for path in (one / place).iterdir()}


def test_summary_counts_the_processes_and_the_memory_of_each(runs: Mapping[tuple[str, str], Path]) -> None:
    summary = json.loads((runs["lora", "two-accumulated"] / "run.json").read_text())
    assert summary["num_devices"] == 2
    peaks = summary["peak_memory_bytes_per_process"]
    assert len(peaks) == 2
    assert summary["peak_memory_bytes"] == max(peaks)
    assert min(peaks) > 2**26


# ---- shares ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", range(1, 20))
@pytest.mark.parametrize(("batch", "processes"), [(1, 2), (2, 2), (3, 4)])
def test_shares_hold_every_row_once_in_the_batch_of_one_process(num_rows: int, batch: int, processes: int) -> None:
    rows = list(range(num_rows))
    dealt = [list(Shares(batch, processes, process).batches(rows)) for process in range(processes)]
    count = math.ceil(num_rows / (batch * processes))
    assert {len(batches) for batches in dealt} == {count} == {Shares(batch, processes, 0).num_batches(num_rows)}
    for at, together in enumerate(zip(*dealt, strict=True)):
        whole = rows[at * batch * processes : (at + 1) * batch * processes]
        assert sorted(row for share in together for row in share if row != FILLER) == whole
        assert all(1 <= len(share) <= batch for share in together)
