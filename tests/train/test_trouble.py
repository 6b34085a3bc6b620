"""Runs that go wrong: what is said about memory, losses and slow steps, and what is done about it."""

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from loradock_testing.rows import WriteRows
from loradock_train import train
from loradock_train.errors import MemoryFullError
from loradock_train.memory import is_out_of_memory, pieces_of
from loradock_train.trainer import LoradockTrainer
from loradock_train.trouble import (
    Course,
    Facts,
    first_without_fall,
    memory_advice,
    memory_told,
    no_fall_told,
    not_finite_told,
    slow_advice,
    trend,
)

FACTS = Facts(4, 8, 1024, 124_000_000, 124_000_000, 12, 768, 4, 2, "adamw_torch_fused", "full", False, True)
COURSE = Course(200, 1e-3, 1e-3, 0, 1.0, 512)
ROWS = [{"prompt": f"def f{i}():", "completion": f" return {i}" + " + x" * (i % 4)} for i in range(16)]


# ---- the loss --------------------------------------------------------------------------------------------------------


def noise(slope: float, seed: int, count: int = 20) -> list[float]:
    chance = random.Random(seed)
    return [4.0 + slope * at + chance.gauss(0, 0.3) for at in range(count)]


def test_falling_losses_are_told_from_flat_and_rising_ones() -> None:
    assert sum(first_without_fall(noise(-0.06, seed)) is not None for seed in range(100)) <= 5
    assert sum(first_without_fall(noise(0.0, seed)) == 20 for seed in range(100)) >= 90
    assert sum(trend(noise(0.06, seed)) > 2.3 for seed in range(100)) >= 90
    assert trend([3.0, 2.0, 1.0] * 1) == -trend([1.0, 2.0, 3.0])


def test_losses_are_judged_only_when_there_are_enough_of_them_and_something_to_learn() -> None:
    assert first_without_fall([4.0] * 19) is None
    assert first_without_fall([0.01] * 40) is None
    assert first_without_fall([4.0 - 0.1 * at for at in range(20)] + [2.0] * 20) is None, "it has fallen, and is done"


@pytest.mark.parametrize(
    ("changes", "losses", "cause"),
    [
        ({}, [2.0 + at for at in range(20)], "it rises, so learning_rate 0.001 is too high; try 0.0001"),
        ({"warmup_steps": 500}, [2.0] * 20, "the warm-up is not over (warmup_steps 500)"),
        ({"learnt_share": 0.004}, [2.0] * 20, "only 0.40% of the tokens are learnt"),
        ({"learning_rate": 1e-6}, [2.0] * 20, "learning_rate 1e-06 is low, 0.001 is usual here"),
        ({"learning_rate": 0.1}, [2.0] * 20, "learning_rate 0.1 is high, 0.001 is usual here"),
        ({}, [2.0] * 20, "the data (does each prompt decide its answer?"),
    ],
)
def test_likely_cause_follows_from_the_facts(changes: dict[str, Any], losses: list[float], cause: str) -> None:
    told = no_fall_told(losses, Course(**{**COURSE.__dict__, **changes}))
    assert f"likely: {cause}" in told
    assert "at step 200 (trend z " in told


def test_run_whose_loss_does_not_fall_says_so_once_with_the_cause(
    base: Path, tmp_path: Path, write_rows: WriteRows
) -> None:
    options = {"model_id": str(base), "train_path": str(write_rows("r.jsonl", ROWS)), "context_length": 64}
    options |= {"max_steps": 41, "logging_steps": 1, "learning_rate": 1e-9, "mixed_precision": "no"}
    options |= {"train_batch_size_per_device": 2, "lora_config": {"r": 2}}
    screen = Console(file=io.StringIO(), width=300)
    run = train(options, output=tmp_path / "run", console=screen)
    told = [notice for notice in run.summary["notices"] if "does not fall" in notice]
    assert len(told) == 1
    assert "learning_rate 1e-09 is low, 0.0001 is usual here" in told[0]
    assert isinstance(screen.file, io.StringIO)
    assert screen.file.getvalue().count("does not fall") == 1


def test_loss_that_is_no_number_names_fp16_where_it_may_be_the_cause() -> None:
    assert "fp16 overflows" in not_finite_told(float("nan"), 3, 1e-3, True)
    assert "fp16" not in not_finite_told(float("inf"), 3, 1e-3, False)


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_memory_advice_names_each_change_with_its_estimate_the_largest_first() -> None:
    advice = memory_advice(FACTS)
    # 4 x 1,024 x 12 x 768 units of 34 bytes; with checkpoints 2
    assert advice == [
        "lora_config: {r: 8} (an adapter instead of all weights): about 1.49 GB less",
        "gradient_checkpointing: true (about a third slower): about 1.21 GB less",
        "optim: adamw_8bit: about 0.74 GB less",
        "train_batch_size_per_device: 2 with gradient_accumulation_steps: 16 (the same steps): about 0.64 GB less",
        "context_length: 512: about 0.64 GB less",
    ]
    told = memory_told(FACTS, 7, "tried to allocate 2 GiB")
    assert told.startswith(
        "out of memory at step 7: tried to allocate 2 GiB\n  it needs: weights and gradients 0.99 GB"
    )
    assert "on_out_of_memory: adapt" in told


def test_memory_advice_offers_nothing_that_is_set_already() -> None:
    done = Facts(1, 8, 64, 1000, 124_000_000, 12, 768, 4, 2, "adamw_8bit", "lora", True, True)
    assert memory_advice(done) == []
    assert any("a model of 6 layers" in line for line in memory_advice(Facts(**{**FACTS.__dict__, "kind": "scratch"})))


def test_want_of_memory_is_recognised_on_gpu_and_cpu() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**55)
    assert is_out_of_memory(raised.value)


def test_batch_is_cut_into_pieces_of_all_its_rows() -> None:
    batch: dict[str, Any] = {
        "input_ids": torch.arange(10).view(5, 2),
        "labels": torch.arange(10).view(5, 2),
        "flag": True,
    }
    cut = pieces_of(batch, 2)
    assert [len(piece["input_ids"]) for piece in cut] == [3, 2]
    assert torch.equal(torch.cat([piece["labels"] for piece in cut]), batch["labels"])
    assert all(piece["flag"] for piece in cut)


@pytest.fixture
def options(base: Path, write_rows: WriteRows) -> dict[str, Any]:
    return {
        "model_id": str(base), "train_path": str(write_rows("rows.jsonl", ROWS)), "context_length": 64,
        "learning_rate": 1e-2, "mixed_precision": "no", "train_batch_size_per_device": 4,
        "gradient_accumulation_steps": 2, "max_steps": 4, "optim": "sgd", "max_grad_norm": 0.0,
    }  # fmt: skip


def fail_over(rows: int) -> Callable[..., Any]:
    """A backward pass that has memory for so many rows only; it fails when gradients are half made."""
    original = LoradockTrainer.compute_loss

    def compute_loss(self: LoradockTrainer, model: Any, inputs: dict[str, Any], *arguments: Any, **more: Any) -> Any:
        loss: Any = original(self, model, inputs, *arguments, **more)
        if len(inputs["input_ids"]) > rows:
            loss.backward()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return loss

    return compute_loss


def test_run_out_of_memory_ends_with_the_numbers_and_what_to_change(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoradockTrainer, "compute_loss", fail_over(2))
    with pytest.raises(MemoryFullError, match=r"out of memory at step 0: CUDA out of memory\. Tried") as raised:
        train(options, output=tmp_path / "run")
    assert "train_batch_size_per_device: 2 with gradient_accumulation_steps: 4 (the same steps)" in str(raised.value)
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_run_that_may_adapt_makes_the_same_steps_with_smaller_batches(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(options, output=tmp_path / "whole")
    monkeypatch.setattr(LoradockTrainer, "compute_loss", fail_over(2))
    cut = train({**options, "on_out_of_memory": "adapt"}, output=tmp_path / "cut")
    told = [notice for notice in cut.summary["notices"] if "out of memory" in notice]
    assert told == [
        "out of memory at step 0: on with batches of 2 and accumulation 4 instead of 4 and 2 (the same steps)"
    ]
    assert (cut.summary["steps"], cut.summary["tokens"]) == (whole.summary["steps"], whole.summary["tokens"])
    assert cut.final_train_loss == pytest.approx(whole.final_train_loss, rel=1e-5)
    ours, theirs = (load_file(run.checkpoint / "model.safetensors") for run in (cut, whole))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-6, msg=name)


def test_run_that_has_no_memory_for_one_row_ends(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoradockTrainer, "compute_loss", fail_over(0))
    with pytest.raises(MemoryFullError, match=r"with one row at a time"):
        train({**options, "on_out_of_memory": "adapt"}, output=tmp_path / "run")


# ---- speed -----------------------------------------------------------------------------------------------------------


def test_slow_run_is_told_what_would_be_quicker() -> None:
    assert slow_advice(0.1, False, True, "bf16", True) == []
    assert "bf16 would be about twice as fast" in slow_advice(0.1, False, True, "no", True)[0]
    assert slow_advice(0.1, False, True, "no", False) == []
    assert slow_advice(0.6, False, True, "bf16", True)[0].startswith(
        "60% of what is computed is padding; packing: true"
    )
    assert "group_by_length: true" in slow_advice(0.6, False, False, "bf16", True)[0]
    assert slow_advice(0.6, True, True, "bf16", True) == []
