"""After a run has trained: the checkpoint, written, proven from its files, and only then named."""

from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from loradock_adapters.passport import write_passport
from loradock_train.before import RunData
from loradock_train.card import model_card
from loradock_train.config import TrainConfig
from loradock_train.export import save_adapter, save_full, write_atomically
from loradock_train.model import (
    Precision,
    inner_model,
)
from loradock_train.proof import Proof, prove, reload_logits
from loradock_train.report import make_passport


def export(
    config: TrainConfig,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: RunData,
    precision: Precision,
    directory: Path,
    summary: dict[str, Any],
    logits: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor],
) -> Proof:
    """Write the checkpoint, prove it from its files, and only then give it its name.

    logits: of the base, of the adapter that training went on from, and of the trained model.
    """
    base_logits, began_logits, trained_logits = logits
    if config.has_head and isinstance(model, PeftModel):
        # No served base has the head, so an adapter of it has nothing to be hot-swapped on: the merged model is served.
        model = cast(Any, model).merge_and_unload()
    proofs: list[Proof] = []

    def fill(temporary: Path) -> None:
        if isinstance(model, PeftModel):
            save_adapter(model, tokenizer, temporary, precision.saved)
        else:
            save_full(model, tokenizer, temporary, precision.saved)
            if data.processor is not None:
                data.processor.save_pretrained(str(temporary))
        reloaded = reload_logits(model, temporary, data.probes, data.probe_pixels)
        proofs.append(
            prove(
                data.probes,
                base_logits,
                trained_logits,
                reloaded,
                precision.saved,
                config.kind,
                next(inner_model(model).parameters()).dtype,
                data.probe_pixels.keys(),
                began_logits,
            )
        )
        write_passport(temporary, make_passport(config, tokenizer, data.splits["train"].sha256, summary, proofs[0]))
        write_text(temporary / "README.md", model_card(config, directory.resolve().name, summary))

    write_atomically(directory / "checkpoint", fill)
    return proofs[0]


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
