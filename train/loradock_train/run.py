"""One training run from beginning to end: data, model, training, checkpoint, proof, report.

    run = train("lora.yaml", output="runs/lora")

The run directory holds config.yaml (resolved), metrics.jsonl, loss.png, run.json (written last: its presence says
the run is complete) and checkpoint/ (what `loradock push` publishes); while the run lasts, saves/ (what `resume` goes
on from).
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import torch
import yaml
from peft import PeftModel
from rich.console import Console
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from loradock_adapters.errors import UsageError
from loradock_adapters.passport import write_passport
from loradock_train.card import model_card
from loradock_train.config import LoraOptions, TrainConfig
from loradock_train.config_file import config_from, load_config
from loradock_train.dataset import Collator, DataReport, build_dataset
from loradock_train.encode import Encoder
from loradock_train.errors import ModelError, RunStopped
from loradock_train.export import save_adapter, save_full, write_atomically
from loradock_train.loss import can_own_loss
from loradock_train.model import (
    Precision,
    add_adapter,
    base_config,
    check_base,
    check_machine,
    count_parameters,
    decide_precision,
    inner_model,
    load_model,
    make_model,
)
from loradock_train.order import Order
from loradock_train.packing import can_pack
from loradock_train.plot import plot_loss
from loradock_train.progress import Meter, Reporter
from loradock_train.proof import MAX_PROMPT_TOKENS, Proof, probe_logits, prove, reload_logits
from loradock_train.report import Outcome, make_passport, summarise, versions
from loradock_train.rows import Rows, read_rows
from loradock_train.rundir import check_output, prepare_output
from loradock_train.saves import FOLDER, Position, Save, check_same, check_same_base, identity_of, write_save
from loradock_train.schedule import learning_rate_factor, length_of
from loradock_train.stop import Saver, StopRequest
from loradock_train.tokenizer import make_tokenizer, padding_id, tokenizer_sha256
from loradock_train.trainer import LoradockTrainer, loss_context, training_arguments


@dataclass(frozen=True)
class Run:
    """A finished run. `summary` is what run.json holds."""

    directory: Path
    kind: str
    summary: dict[str, Any] = field(repr=False)

    @property
    def checkpoint(self) -> Path:
        """What is pushed."""
        return self.directory / "checkpoint"

    @property
    def final_train_loss(self) -> float | None:
        """Mean of the last logged steps, nats per token."""
        value: float | None = self.summary["final_train_loss"]
        return value

    @property
    def final_eval_loss(self) -> float | None:
        """On the validation rows, nats per token; None without them."""
        value: float | None = self.summary["final_eval_loss"]
        return value


@dataclass(frozen=True)
class _Data:
    """Both splits, ready for the trainer."""

    splits: dict[str, Rows]
    train: datasets.Dataset
    valid: datasets.Dataset | None
    reports: dict[str, DataReport]
    probes: list[list[int]]


def train(
    config: TrainConfig | Mapping[str, Any] | str | Path,
    *,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    console: Console | None = None,
) -> Run:
    """Train what the config says.

    config: path of a YAML, a mapping with its keys (paths relative to the working directory), or a TrainConfig.
    overrides: `key=value` texts, as for `--set`; only with a path.
    output: run directory; default the config's output_dir, else runs/<name of the YAML>.
    overwrite: replace a run that is already there.
    resume: go on from the newest save of an unfinished run; where nothing was saved, begin.
    console: where progress is shown; default stderr.
    Raises UsageError and its kin for bad input, TrainError when training or its proof fails, RunStopped when SIGTERM
    or Ctrl-C ended it early and it saved where it stood.
    """
    console = console if console is not None else Console(stderr=True)
    config, notices, name = _resolve(config, overrides)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("training with several processes is not there yet; start `loradock train` without a launcher")
    directory = Path(output if output is not None else config.output_dir or Path("runs") / name)
    save = check_output(directory, overwrite, resume)
    started_s = time.monotonic()
    set_seed(config.seed)

    check_machine(config)
    architecture = None if config.model_id is None else base_config(config)
    rows = read_rows(config.train_path, config.format, "train_path")
    tokenizer = make_tokenizer(config, rows)
    if architecture is not None:
        check_base(architecture, len(tokenizer), config.context_length)
    data = _load_data(config, rows, tokenizer)
    for key, report in data.reports.items():
        notices.extend(report.notices(key, config.context_length))

    identity = identity_of(config, data.splits, tokenizer_sha256(tokenizer), versions())
    if save is not None:
        notices.extend(check_same(save, identity))
    precision, model, base_logits = _prepare_model(config, architecture, tokenizer, data)
    if config.lora_config is not None:
        notices.extend(_placement_notices(config.lora_config))

    _check_packing(model, data, tokenizer)
    if save is not None:
        check_same_base(save, base_logits)
    prepare_output(directory, save)
    _write_text(directory / "config.yaml", yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False))
    _announce(console, config, model, data, precision, notices)
    if resume:
        where = f"resuming at step {save.position.step}" if save else "nothing was saved: beginning at step 0"
        console.print(where, markup=False, highlight=False)
    write = partial(write_save, directory, identity=identity, model=model, base_logits=base_logits, keep=config.keep)
    outcome = _fit(config, model, tokenizer, data, precision, directory, console, save, write)

    trained_logits = probe_logits(model, data.probes)
    summary = summarise(config, model, data.reports, precision, outcome, notices)
    proof = _export(config, model, tokenizer, data, precision, directory, summary, (base_logits, trained_logits))
    plot_loss(outcome.history, directory / "loss.png", f"{name}: {config.kind}")
    return _finish(directory, config.kind, summary, proof, started_s)


# ---- before --------------------------------------------------------------------------------------------------------


def _resolve(
    config: TrainConfig | Mapping[str, Any] | str | Path, overrides: Sequence[str]
) -> tuple[TrainConfig, list[str], str]:
    if isinstance(config, TrainConfig):
        return config, [], config.kind
    if isinstance(config, Mapping):
        resolved, notices = config_from(config, folder=Path.cwd())
        return resolved, notices, resolved.kind
    resolved, notices = load_config(config, overrides)
    return resolved, notices, Path(config).stem


def _load_data(config: TrainConfig, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> _Data:
    packing = config.packing if config.packing is not None else rows.format == "text"
    encoder = Encoder(tokenizer, config.append_eos, config.prompt_template)
    options = (encoder, config.context_length, config.on_long_rows, packing)
    train_set, report = build_dataset(rows, *options, "train_path")
    reports = {"train": report}
    valid_set, valid_rows = None, None
    if config.valid_path is not None:
        valid_rows = read_rows(config.valid_path, rows.format, "valid_path")
        valid_set, reports["valid"] = build_dataset(valid_rows, *options, "valid_path")
    probed = (valid_rows if valid_rows is not None else rows).rows[: config.num_probe_prompts]
    probes = [encoder.prompt_ids(row, rows.format)[:MAX_PROMPT_TOKENS] for row in probed]
    splits = {"train": rows} if valid_rows is None else {"train": rows, "valid": valid_rows}
    return _Data(splits, train_set, valid_set, reports, probes)


def _prepare_model(
    config: TrainConfig, architecture: Any, tokenizer: PreTrainedTokenizerBase, data: _Data
) -> tuple[Precision, Any, torch.Tensor]:
    """The model with its adapter, its types, and what it said to the probes before either was trained."""
    base_dtype = None if architecture is None else getattr(architecture, "dtype", None) or torch.float32
    precision = decide_precision(config, base_dtype)
    model: Any = make_model(config, tokenizer, precision) if config.kind == "scratch" else load_model(config, precision)
    if torch.cuda.is_available():
        model.to("cuda")
    base_logits = probe_logits(model, data.probes)
    if config.lora_config is not None:
        model = add_adapter(model, config.lora_config)
    return precision, model, base_logits


def _placement_notices(options: LoraOptions) -> list[str]:
    wants = [
        text
        for text, is_set in (
            ("modules_to_save", bool(options.modules_to_save)),
            ("use_dora", options.use_dora),
            (f"bias: {options.bias}", options.bias != "none"),
        )
        if is_set
    ]
    return (
        [f"lora_config has {', '.join(wants)}: it will be served by a dedicated engine, not hot-swapped"]
        if wants
        else []
    )


def _check_packing(model: nn.Module, data: _Data, tokenizer: PreTrainedTokenizerBase) -> None:
    """ModelError where documents of one row would see each other."""
    if "position_ids" in data.train.column_names and not can_pack(inner_model(model), len(tokenizer)):
        raise ModelError(
            f"packing: {type(inner_model(model)).__name__} with this attention lets packed documents see each other; "
            "set packing: false, or attn_implementation: sdpa"
        )


def _announce(
    console: Console,
    config: TrainConfig,
    model: nn.Module,
    data: _Data,
    precision: Precision,
    notices: Sequence[str],
) -> None:
    for notice in notices:
        console.print(f"note: {notice}", markup=False, highlight=False)
    count, report = count_parameters(model), data.reports["train"]
    is_packed = "position_ids" in data.train.column_names
    packed = f" packed into {report.num_examples:,}" if is_packed else ""
    console.print(
        f"{config.kind}: {count.trainable:,} of {count.total:,} parameters trained ({count.share:.3%}), "
        f"{report.num_documents:,} {report.format} rows{packed}, {report.num_trained_tokens:,} tokens with a loss, "
        f"arithmetic {precision.arithmetic}, learning rate {config.peak_learning_rate:g}",
        markup=False,
        highlight=False,
    )


# ---- training ------------------------------------------------------------------------------------------------------


def _fit(
    config: TrainConfig,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: _Data,
    precision: Precision,
    directory: Path,
    console: Console,
    save: Save | None,
    write: Callable[[Position, Callable[[Path], None]], Path],
) -> Outcome:
    """Train to the end. Raises RunStopped where a signal ends it earlier."""
    collate = Collator(padding_id(tokenizer))
    use_own = can_own_loss(inner_model(model), torch.as_tensor(data.train[0]["input_ids"]).to(model.device))
    length = length_of(config, len(data.train), num_devices=1)
    meter = Meter() if save is None else Meter(save.position.tokens, save.position.elapsed_s)
    history = [] if save is None else save.position.history
    reporter = Reporter(directory / "metrics.jsonl", length, meter, console, history)
    request = StopRequest()
    with loss_context(inner_model(model), use_own), request.on_signals():
        trainer = LoradockTrainer(
            rate=lambda step: learning_rate_factor(config, length, step, meter.elapsed_s),
            order=_order(config, data.train),
            steps_per_epoch=length.steps_per_epoch,
            meter=meter,
            reporter=reporter,
            saver=Saver(config, request),
            write=write,
            model=model,
            args=training_arguments(config, length, precision, directory),
            data_collator=collate,
            train_dataset=data.train,
            eval_dataset=data.valid,
        )
        try:
            if save is None:
                trainer.train()
            else:
                trainer.go_on(save)
            meter.stop()
            steps = trainer.state.global_step
            if request.is_set and trainer.last_save is not None and trainer.last_save[0] == steps:
                raise RunStopped(*trainer.last_save)
            if data.valid is not None and not (reporter.history and "eval_loss" in reporter.history[-1]):
                trainer.evaluate()
        finally:
            reporter.close()
    model.__dict__.pop("forward", None)  # accelerate's autocast wrapper: proof and export want the bare model
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return Outcome(
        steps, steps / length.steps_per_epoch, meter.elapsed_s, meter.tokens, reporter.history, use_own, device
    )


def _order(config: TrainConfig, rows: datasets.Dataset) -> Order:
    lengths = [int(length) for length in rows["length"]]
    rows_per_step = config.train_batch_size_per_device * config.gradient_accumulation_steps
    return Order(lengths, rows_per_step, config.group_by_length, config.seed)


# ---- after ---------------------------------------------------------------------------------------------------------


def _export(
    config: TrainConfig,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: _Data,
    precision: Precision,
    directory: Path,
    summary: dict[str, Any],
    logits: tuple[torch.Tensor, torch.Tensor],
) -> Proof:
    """Write the checkpoint, prove it from its files, and only then give it its name."""
    base_logits, trained_logits = logits
    proofs: list[Proof] = []

    def fill(temporary: Path) -> None:
        if isinstance(model, PeftModel):
            save_adapter(model, tokenizer, temporary, precision.saved)
        else:
            save_full(model, tokenizer, temporary, precision.saved)
        reloaded = reload_logits(model, temporary, data.probes)
        proofs.append(
            prove(
                data.probes,
                base_logits,
                trained_logits,
                reloaded,
                precision.saved,
                config.kind,
                next(inner_model(model).parameters()).dtype,
            )
        )
        write_passport(temporary, make_passport(config, tokenizer, data.splits["train"].sha256, summary, proofs[0]))
        _write_text(temporary / "README.md", model_card(config, directory.resolve().name, summary))

    write_atomically(directory / "checkpoint", fill)
    return proofs[0]


def _finish(directory: Path, kind: str, summary: dict[str, Any], proof: Proof, started_s: float) -> Run:
    """Say in run.json what became of it; only then are its saves of no use."""
    differences = {"reloaded": proof.reloaded_difference, "base": proof.base_difference}
    summary["proof"] = differences | {"prompts": len(proof.prompts)}
    summary["checkpoint_bytes"] = sum(file.stat().st_size for file in (directory / "checkpoint").iterdir())
    summary["total_seconds"] = round(time.monotonic() - started_s, 2)
    _write_text(directory / "run.json", json.dumps(summary, indent=2) + "\n")
    shutil.rmtree(directory / FOLDER, ignore_errors=True)
    return Run(directory, kind, summary)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
