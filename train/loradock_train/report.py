"""What a run tells afterwards: the summary (run.json) and the passport (loradock.json). Writes nothing itself."""

import hashlib
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import PreTrainedTokenizerBase

from loradock_adapters.passport import Passport, PassportBase, weights_sha256
from loradock_adapters.vocabulary import Vocabulary, read_vocabulary
from loradock_train.compiled import Tally
from loradock_train.config import TrainConfig
from loradock_train.dataset import DataReport
from loradock_train.encode import stop_token_ids
from loradock_train.model import Precision, base_directory
from loradock_train.parameters import parameter_report
from loradock_train.peak import peak_bytes
from loradock_train.processes import gather_objects, world_size
from loradock_train.proof import Proof
from loradock_train.results import perplexity_of
from loradock_train.scoring import Scored

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
    scored: Scored
    stream_report: DataReport | None = None
    """Of all rows that were read from a stream."""
    notices: tuple[str, ...] = ()
    """What was odd about the training."""
    compiled: Tally | None = None
    """Of a run whose layers are compiled."""


def summarise(
    config: TrainConfig,
    model: nn.Module,
    reports: dict[str, DataReport],
    precision: Precision,
    outcome: Outcome,
    notices: list[str],
) -> dict[str, Any]:
    """The contents of run.json, but for what is known only after the export."""
    losses = [entry["loss"] for entry in outcome.history if "loss" in entry]
    exported = outcome.scored.exported_step
    evals = [entry["eval_loss"] for entry in outcome.history if "eval_loss" in entry and entry["step"] <= exported]
    peaks = gather_objects(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_bytes())
    return {
        "kind": config.kind,
        "base": config.model_id,
        "steps": outcome.steps,
        "epochs": round(outcome.epochs, 4),
        "train_seconds": round(outcome.seconds, 2),
        "tokens": outcome.tokens,
        "learning_rate": config.peak_learning_rate,
        "tokens_per_s": round(outcome.tokens / outcome.seconds, 1) if outcome.seconds > 0 else None,
        "final_train_loss": losses[-1] if losses else None,
        "final_eval_loss": evals[-1] if evals else None,
        "final_perplexity": perplexity_of(evals[-1] if evals else losses[-1] if losses else None),
        "parameters": parameter_report(model),
        "precision": {
            "weights": str(precision.weights).removeprefix("torch."),
            "arithmetic": precision.arithmetic,
            "saved": str(precision.saved).removeprefix("torch."),
        },
        "peak_memory_bytes": max(peaks),
        "peak_memory_bytes_per_process": peaks,
        "num_devices": world_size(),
        "device": outcome.device,
        "used_own_loss": outcome.used_own_loss,
        **({"torch_compile": outcome.compiled.to_json()} if outcome.compiled is not None else {}),
        "data": {key: asdict(report) for key, report in reports.items()},
        "notices": notices,
        "versions": versions(),
        **outcome.scored.summary,
    }


def make_passport(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, data_sha256: str, summary: dict[str, Any], proof: Proof
) -> Passport:
    """What ties the checkpoint to its base. A model from scratch has no base: it says `scratch/<model_type>`."""
    source = config.model_id
    directory = None if source is None else base_directory(source)
    weights = None if directory is None else weights_sha256(directory)
    vocabulary = vocabulary_of(tokenizer, directory)
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
    name = source if source is not None else f"scratch/{(config.model or {}).get('model_type')}"
    return Passport(
        base=PassportBase(model_id=name, weights_sha256=weights),
        tokenizer_sha256=vocabulary.file_sha256 if vocabulary is not None else None,
        vocabulary_sha256=vocabulary.sha256 if vocabulary is not None else None,
        special_tokens=dict(vocabulary.special_tokens) if vocabulary is not None else {},
        chat_template=template,
        chat_template_sha256=hashlib.sha256(template.encode()).hexdigest() if template is not None else None,
        stop_token_ids=() if config.has_head else stop_token_ids(tokenizer),
        context_length=config.context_length,
        metrics={key: summary[key] for key in ("final_train_loss", "final_eval_loss", "steps", "tokens")},
        seed=config.seed,
        data_sha256=data_sha256,
        versions=summary["versions"],
        created_at=datetime.now(UTC),
        license=config.license if config.license is not None else card_license(directory),
        probe=None if config.has_head else proof.passport_entry(),  # the server asks for next tokens, which it has not
    )


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, base: Path | None) -> Vocabulary | None:
    """Of the base's own tokenizer.json where the run's tokenizer is that one, so that its hash is the file's; else of
    the file as it is saved; None for a tokenizer that has no such file."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        saved = read_vocabulary(Path(folder))
    own = read_vocabulary(base) if base is not None else None
    return own if own is not None and saved is not None and own.sha256 == saved.sha256 else saved


def card_license(base: Path | None) -> str | None:
    """The license that a model card's front matter names."""
    card = base / "README.md" if base is not None else None
    if card is None or not card.is_file():
        return None
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n")
    try:
        front = yaml.safe_load(parts[1]) if len(parts) > 2 and not parts[0].strip() else None
    except yaml.YAMLError:
        return None
    named = front.get("license") if isinstance(front, dict) else None
    return named[:200] if isinstance(named, str) else None


def versions() -> dict[str, str]:
    """Of the packages that decide the numbers."""
    return {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
