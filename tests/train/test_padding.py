"""Padding on the left is padding on the right: the same loss and gradients, and nothing of it in the checkpoint."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from loradock_testing.rows import WriteRows
from loradock_train import train
from loradock_train.dataset import Collator
from loradock_train.encode import IGNORED
from loradock_train.loss import own_loss

VOCABULARY = 97
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_positions": 64, "n_layer": 2},  # learnt positions: a shift would be seen
}
ROWS: list[dict[str, Any]] = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [IGNORED, IGNORED, 7, 8, 9]},
    {"input_ids": list(range(20, 40)), "labels": list(range(20, 40))},
    {"input_ids": [41, 42], "labels": [41, 42]},
]
PACKED: list[dict[str, Any]] = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [IGNORED, 6, 7, IGNORED, 9], "position_ids": [0, 1, 2, 0, 1]},
    {"input_ids": list(range(20, 40)), "labels": list(range(20, 40)), "position_ids": [*range(12), *range(8)]},
]


def make(architecture: str, attention: str) -> Any:
    torch.manual_seed(0)
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    fields = {**ARCHITECTURES[architecture], "vocab_size": VOCABULARY, **special}
    made: Any = AutoModelForCausalLM
    model = made.from_config(AutoConfig.for_model(architecture, **fields), attn_implementation=attention).eval()
    model.config.use_cache = False  # as the trainer sets it: with a cache, transformers takes no row for packed
    return model


def loss_and_gradients(model: Any, rows: Any, side: Any, ours: bool) -> tuple[float, dict[str, torch.Tensor]]:
    batch = Collator(0, side)(rows)
    batch.pop("num_tokens")
    learnt = int((batch["labels"][:, 1:] != IGNORED).sum())
    model.zero_grad()
    with own_loss(model) if ours else contextlib.nullcontext():
        loss = model(**batch, num_items_in_batch=torch.tensor(learnt)).loss
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_left_padding_token_by_token() -> None:
    batch = Collator(0, "left")([ROWS[0], {"input_ids": [1] * 7, "labels": [1] * 7}])
    assert batch["input_ids"][0].tolist() == [0, 0, 5, 6, 7, 8, 9]
    assert batch["labels"][0].tolist() == [IGNORED] * 4 + [7, 8, 9]
    assert batch["labels"][1].tolist() == [IGNORED] + [1] * 6
    assert batch["attention_mask"][0].tolist() == [0, 0, 1, 1, 1, 1, 1]
    assert batch["position_ids"].tolist() == [[0, 0, 0, 1, 2, 3, 4], list(range(7))]


def test_packed_row_padded_on_the_left_keeps_its_documents() -> None:
    batch = Collator(0, "left")([PACKED[0], {"input_ids": [1] * 7, "labels": [1] * 7, "position_ids": [*range(7)]}])
    assert batch["input_ids"][0].tolist() == [0, 0, 5, 6, 7, 8, 9]
    assert batch["position_ids"][0].tolist() == [0, 1, 0, 1, 2, 0, 1]
    assert "attention_mask" not in batch


def test_first_token_of_a_short_row_is_never_learnt_on_either_side() -> None:
    for side in ("left", "right"):
        labels = Collator(0, side)([ROWS[1], ROWS[2]])["labels"][1]
        assert [label for label in labels.tolist() if label != IGNORED] == [42]


@pytest.mark.parametrize("ours", [True, False], ids=["our loss", "the model's own"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rows", [ROWS, PACKED], ids=["plain", "packed"])
def test_loss_and_gradients_are_those_of_right_padding(
    rows: Any, architecture: str, attention: str, ours: bool
) -> None:
    model = make(architecture, attention)
    right, expected = loss_and_gradients(model, rows, "right", ours)
    left, gradients = loss_and_gradients(model, rows, "left", ours)
    assert left == pytest.approx(right, rel=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) > 1e-4


def test_run_padded_on_the_left_makes_the_same_checkpoint(base: Path, tmp_path: Path, write_rows: WriteRows) -> None:
    rows = [{"prompt": f"def f{i}():", "completion": f" return {i}" + " + x" * i} for i in range(6)]
    options = {
        "model_id": str(base), "train_path": str(write_rows("rows.jsonl", rows)), "context_length": 128,
        "learning_rate": 1e-2, "mixed_precision": "no", "max_steps": 2, "optim": "sgd",
        "valid_path": str(write_rows("valid.jsonl", rows[:3])),
    }  # fmt: skip
    left, right = (train({**options, "padding_side": side}, output=tmp_path / side) for side in ("left", "right"))
    assert left.final_eval_loss == pytest.approx(right.final_eval_loss, rel=1e-5)
    ours, theirs = (load_file(run.checkpoint / "model.safetensors") for run in (left, right))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5, msg=name)
    for file in ("tokenizer_config.json", "generation_config.json", "config.json"):
        assert (left.checkpoint / file).read_text() == (right.checkpoint / file).read_text(), file
