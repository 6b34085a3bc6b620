"""What a run tells afterwards: the summary (run.json) and the passport (loradock.json). Writes nothing itself."""

import hashlib
import resource
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from loradock_adapters.passport import Passport, PassportBase, weights_sha256
from loradock_train.config import TrainConfig
from loradock_train.dataset import DataReport
from loradock_train.encode import stop_token_ids
from loradock_train.model import Precision, base_directory, count_parameters
from loradock_train.proof import Proof

PACKAGES = ("loradock", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers")


@dataclass(frozen=True)
class Outcome:
    """What training left behind, apart from the weights."""

    steps: int
    epochs: float
    seconds: float
    tokens: int
    history: list[dict[str, Any]]
    used_own_loss: bool
    device: str


def summarise(
    config: TrainConfig,
    model: nn.Module,
    reports: dict[str, DataReport],
    precision: Precision,
    outcome: Outcome,
    notices: list[str],
) -> dict[str, Any]:
    """The contents of run.json, but for what is known only after the export."""
    count = count_parameters(model)
    losses = [entry["loss"] for entry in outcome.history if "loss" in entry]
    evals = [entry["eval_loss"] for entry in outcome.history if "eval_loss" in entry]
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _peak_memory_bytes()
    return {
        "kind": config.kind,
        "base": config.model_id,
        "steps": outcome.steps,
        "epochs": round(outcome.epochs, 4),
        "train_seconds": round(outcome.seconds, 2),
        "tokens": outcome.tokens,
        "tokens_per_s": round(outcome.tokens / outcome.seconds, 1) if outcome.seconds > 0 else None,
        "final_train_loss": losses[-1] if losses else None,
        "final_eval_loss": evals[-1] if evals else None,
        "parameters": {"trainable": count.trainable, "total": count.total, "share": count.share},
        "precision": {
            "weights": str(precision.weights).removeprefix("torch."),
            "arithmetic": precision.arithmetic,
            "saved": str(precision.saved).removeprefix("torch."),
        },
        "peak_memory_bytes": peak,
        "device": outcome.device,
        "used_own_loss": outcome.used_own_loss,
        "data": {key: asdict(report) for key, report in reports.items()},
        "notices": notices,
        "versions": {package: _version(package) for package in PACKAGES},
    }


def make_passport(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, data_sha256: str, summary: dict[str, Any], proof: Proof
) -> Passport:
    """What ties the checkpoint to its base. A model from scratch has no base: it says `scratch/<model_type>`."""
    source = config.model_id
    directory = None if source is None else base_directory(source)
    weights = None if directory is None else weights_sha256(directory)
    name = source if source is not None else f"scratch/{(config.model or {}).get('model_type')}"
    return Passport(
        base=PassportBase(model_id=name, weights_sha256=weights),
        tokenizer_sha256=_tokenizer_sha256(tokenizer),
        chat_template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
        stop_token_ids=stop_token_ids(tokenizer),
        context_length=config.context_length,
        metrics={key: summary[key] for key in ("final_train_loss", "final_eval_loss", "steps", "tokens")},
        seed=config.seed,
        data_sha256=data_sha256,
        versions=summary["versions"],
        created_at=datetime.now(UTC),
        probe=proof.passport_entry(),
    )


def _tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Hash of tokenizer.json as it is saved; None for a tokenizer that has no such file."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        file = Path(folder) / "tokenizer.json"
        return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _peak_memory_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
