"""Learning from preference pairs: TRL's DPO within our trainer, with its order of rows, exact resume and reports.

TRL brings the loss and the rewards; rows are encoded and padded by us, so that what is learnt is what is served, and
nothing is cut unsaid. The reference is the base: with LoRA the adapter is turned off for it, a full run holds a copy.
TRL is an extra: only a run that has `preference` imports dpo.py.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, cast

import datasets  # type: ignore[import-untyped]
import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments

from loradock_train.config import TrainConfig
from loradock_train.config_preference import PreferenceOptions
from loradock_train.dataset import Collator, DataReport
from loradock_train.encode import IGNORED, Encoder, Example
from loradock_train.errors import DataError, ModelError, Problem
from loradock_train.rows import Row, Rows
from loradock_train.trainer import LoradockTrainer


def check_preference_run(config: TrainConfig, row_format: str) -> None:
    """Refuse, before anything is loaded, what cannot be. Raises ModelError and DataError."""
    if config.preference is None:
        if row_format == "preference":
            told = "the rows are preference pairs: add a section preference: {} to the config, or set format:"
            raise DataError("train_path cannot be trained on:", [Problem("preference", told)])
        return
    if row_format != "preference":
        told = f"needs rows with two answers (preferred_output or chosen), and these are {row_format} rows"
        raise DataError("train_path cannot be trained on:", [Problem("preference", told)])
    if find_spec("trl") is None:
        raise ModelError("preference needs TRL, which is not installed: pip install 'loradock[preference]'")
    targets = () if config.lora_config is None else config.lora_config.target_modules
    if "lm_head" in targets:
        raise ModelError("preference: TRL does not train an adapter on lm_head; remove it from target_modules")


# ---- data ------------------------------------------------------------------------------------------------------------


def build_pairs(
    rows: Rows, encoder: Encoder, context_length: int, policy: str, key: str
) -> tuple[datasets.Dataset, DataReport]:
    """Encode every pair. Both answers must fit; `policy` is on_long_rows. Raises DataError."""
    kept: list[tuple[Example, Example]] = []
    problems: list[Problem] = []
    longest = cut = dropped = 0
    for row in rows.rows:
        pair = encoder.pair(row)
        num_tokens = max(len(example.input_ids) for example in pair)
        longest = max(longest, num_tokens)
        if num_tokens > context_length and policy == "drop":
            dropped += 1
            continue
        if num_tokens > context_length and policy == "truncate":
            cut += 1
            pair = cast(Any, tuple(Example(e.input_ids[:context_length], e.labels[:context_length]) for e in pair))
        problems.extend(_problems(row, pair, num_tokens, context_length, policy))
        kept.append(pair)
    if problems or not kept:
        raise DataError(
            f"{key} has rows that cannot be trained on:",
            problems or [Problem(key, f"no row fits into {context_length} tokens")],
        )
    both = [example for pair in kept for example in pair]
    report = DataReport(
        format="preference",
        num_rows=len(rows.rows),
        num_examples=len(kept),
        num_tokens=sum(len(example.input_ids) for example in both),
        num_trained_tokens=sum(example.num_trained_tokens for example in both),
        longest_tokens=longest,
        num_truncated=cut,
        num_dropped=dropped,
        num_split=0,
        num_documents=len(kept),
        sha256=rows.sha256,
    )
    return _as_dataset(kept), report


def _problems(row: Row, pair: tuple[Example, Example], tokens: int, limit: int, policy: str) -> list[Problem]:
    if tokens > limit and policy == "error":
        told = f"{tokens} tokens are over context_length {limit} (raise it, or set on_long_rows: truncate or drop)"
        return [Problem(row.where, told)]
    if not all(example.num_trained_tokens for example in pair):
        return [Problem(row.where, f"nothing of an answer is left at context_length {limit} ({tokens} tokens)")]
    if pair[0] == pair[1]:
        return [Problem(row.where, f"both answers are the same at context_length {limit}")]
    return []


def _as_dataset(pairs: Sequence[tuple[Example, Example]]) -> datasets.Dataset:
    columns: dict[str, Any] = {"length": [max(len(example.input_ids) for example in pair) for pair in pairs]}
    for index, side in enumerate(("chosen", "rejected")):
        columns[f"{side}_ids"] = [np.asarray(pair[index].input_ids, dtype=np.int32) for pair in pairs]
        columns[f"{side}_labels"] = [np.asarray(pair[index].labels, dtype=np.int32) for pair in pairs]
    dataset = datasets.Dataset.from_dict(columns)
    dataset.set_format("numpy")
    return dataset


@dataclass(frozen=True)
class PairCollator:
    """A batch of pairs as TRL's loss wants it: the preferred answers, then the others; which tokens are an answer."""

    rows: Collator

    def __call__(self, pairs: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [
            {"input_ids": pair[f"{side}_ids"], "labels": pair[f"{side}_labels"]}
            for side in ("chosen", "rejected")
            for pair in pairs
        ]
        batch = self.rows(rows)
        batch["completion_mask"] = (batch.pop("labels") != IGNORED).long()
        batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
        return batch


# ---- training --------------------------------------------------------------------------------------------------------


def preference_trainer(
    preference: PreferenceOptions,
    tokenizer: PreTrainedTokenizerBase,
    make_arguments: Callable[..., TrainingArguments],
    rows: Collator,
    **options: Any,
) -> LoradockTrainer:
    """The trainer of a preference run.

    make_arguments: the run's arguments, of the class and with the further values that it is given. options: those of
    LoradockTrainer.
    """
    from trl.trainer.dpo_config import DPOConfig

    from loradock_train.dpo import PreferenceTrainer

    model = options["model"]
    trainer = PreferenceTrainer(
        args=make_arguments(DPOConfig, beta=preference.beta, loss_type=[preference.loss_type], max_length=None),
        data_collator=PairCollator(rows),
        ref_model=None if isinstance(model, PeftModel) else _frozen_copy(model),
        processing_class=copy.deepcopy(tokenizer),  # TRL gives it a padding token, and ours is exported
        **options,
    )
    if isinstance(model, PeftModel) and "ref" in model.peft_config and _is_nothing(model):
        model.delete_adapter("ref")  # the adapter begins as nothing: turned off, it is the reference
    return trainer


def _frozen_copy(model: nn.Module) -> nn.Module:
    """The base, before a step was made (on resume too: saved weights are loaded later)."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def _is_nothing(model: nn.Module) -> bool:
    """Whether the adapter changes nothing yet."""
    return all(
        not bool(parameter.any())
        for name, parameter in model.named_parameters()
        if ".default" in name and ("lora_B" in name or "lora_embedding_B" in name)
    )
