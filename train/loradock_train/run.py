"""One training run from beginning to end: data, model, training, checkpoint, proof, report.

    run = train("lora.yaml", output="runs/lora")

The run directory holds config.yaml (resolved), metrics.jsonl, loss.png, run.json (written last: its presence says
the run is complete) and checkpoint/ (what `loradock push` publishes); while the run lasts, saves/ (what `resume` goes
on from).
"""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from transformers import PretrainedConfig, PreTrainedTokenizerBase, set_seed

from loradock_train.after import export, write_text
from loradock_train.before import (
    RunData,
    adapter_notices,
    announce,
    check_packing,
    load_data,
    open_rows,
    prepare_model,
)
from loradock_train.config import TrainConfig
from loradock_train.config_file import config_from, load_config
from loradock_train.cost import SpendMeter, cost_of, told
from loradock_train.finished import Finished, finished
from loradock_train.fit import fit
from loradock_train.launch import (
    Machines,
    launch,
    make_order,
    must_launch,
    process_notices,
    read_summary,
    run_directory,
)
from loradock_train.model import (
    Precision,
    base_config,
    check_base,
)
from loradock_train.peak import PeakMeter
from loradock_train.placement import foretell
from loradock_train.planning import compared, plan_for_run, warnings_of
from loradock_train.plot import plot_loss
from loradock_train.preference import check_preference_run
from loradock_train.processes import connected, is_main, on_main, world_size
from loradock_train.proof import Proof, probe_logits
from loradock_train.remote import check_destination, copy_out, local_base
from loradock_train.report import Outcome, summarise, versions
from loradock_train.results import few_tokens, result_lines
from loradock_train.rundir import check_output, prepare_output
from loradock_train.saves import (
    FOLDER,
    Save,
    check_alike,
    check_same,
    check_same_base,
    common_save,
    identity_of,
    write_save,
)
from loradock_train.schedule import schedule_notices
from loradock_train.scoring import write_scores
from loradock_train.shared import Alone
from loradock_train.signed import signed_keys
from loradock_train.similarity import make_judge
from loradock_train.starting import check_start
from loradock_train.sweep import run_sweep
from loradock_train.tokenizer import make_tokenizer, tokenizer_sha256
from loradock_train.vision import make_processor


@dataclass(frozen=True)
class Run:
    """A finished run. `summary` is what run.json holds."""

    directory: Path
    kind: str
    summary: dict[str, Any] = field(repr=False)

    @property
    def checkpoint(self) -> Path:
        """What is pushed; of a sweep, that of the best adapter."""
        if self.kind == "sweep":
            return self.directory / str(self.summary["best"]) / "checkpoint"
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


def train(
    config: TrainConfig | Mapping[str, Any] | str | Path,
    *,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    console: Console | None = None,
    machines: Machines | None = None,
) -> Run:
    """Train what the config says.

    config: path of a YAML, a mapping with its keys (paths relative to the working directory), or a TrainConfig.
    overrides: `key=value` texts, as for `--set`; only with a path.
    output: run directory; default the config's output_dir, else runs/<name of the YAML>.
    overwrite: replace a run that is already there.
    resume: go on from the newest save of an unfinished run; where nothing was saved, begin; a finished one is returned.
    console: where progress is shown; default stderr.
    machines: which of several machines this is; default the only one.
    Raises UsageError and its kin for bad input, TrainError when training or its proof fails, RunStopped when SIGTERM
    or Ctrl-C ended it early and it saved where it stood.
    """
    config, notices, name = _resolve(config, overrides)
    directory = run_directory(config, output, name)
    check_destination(config, overwrite or resume)
    config, copied = local_base(config)
    run = _train_there(config, [*notices, *copied], name, directory, overwrite, resume, machines, console)
    if is_main():
        copy_out(config, directory)
    return run


def _train_there(
    config: TrainConfig,
    notices: list[str],
    name: str,
    directory: Path,
    overwrite: bool,
    resume: bool,
    machines: Machines | None,
    console: Console | None,
) -> Run:
    """Here, in processes that are started for it, or as a sweep."""
    if config.sweep:
        return _sweep(config, notices, directory, overwrite, resume, console)
    if must_launch(config.num_devices, machines):
        order = make_order(config, notices, name, directory, overwrite, resume)
        launch(order, config.num_devices, machines if machines is not None else Machines())
        return Run(directory, config.kind, read_summary(directory))
    console = console if console is not None else Console(stderr=True)
    return train_here(config, notices, name, directory, overwrite, resume, console)


def _sweep(
    config: TrainConfig, notices: Sequence[str], directory: Path, overwrite: bool, resume: bool, console: Console | None
) -> Run:
    """Each adapter as a run of its own, on what they share."""
    console = console if console is not None else Console(stderr=True)

    def run(leg: TrainConfig, name: str, place: Path, goes_on: bool, shared: Alone) -> dict[str, Any]:
        _say(console, f"sweep: {name}")
        return train_here(leg, notices, name, place, overwrite, goes_on, console, shared).summary

    return Run(directory, "sweep", run_sweep(config, directory, overwrite, resume, run))


def train_here(
    config: TrainConfig,
    notices: Sequence[str],
    name: str,
    directory: Path,
    overwrite: bool,
    resume: bool,
    console: Console,
    shared: Alone | None = None,
) -> Run:
    """The run in this process, or this process's part of it where there are several: then only process 0 prints and
    writes, and all return when it has."""
    with connected():
        return _train_here(
            config,
            [*notices, *process_notices(config.num_devices)],
            name,
            directory,
            overwrite,
            resume,
            console if is_main() else Console(quiet=True),
            shared if shared is not None else Alone(),
        )


def _train_here(
    config: TrainConfig,
    notices: list[str],
    name: str,
    directory: Path,
    overwrite: bool,
    resume: bool,
    console: Console,
    shared: Alone,
) -> Run:
    there = on_main(lambda: _what_is_there(config, directory, overwrite, resume))
    if isinstance(there, Finished):
        _say(console, *there.lines())
        return Run(directory, config.kind, there.summary)
    save = common_save(there)
    started_s, spending = time.monotonic(), SpendMeter(None if save is None else save.spent)
    set_seed(config.seed)

    architecture, tokenizer, data = _read(config, notices, shared)
    identity = identity_of(config, data.splits, tokenizer_sha256(tokenizer), versions())
    check_alike(identity)
    if save is not None:
        notices.extend(check_same(save, identity))
    notices.extend(adapter_notices(config))
    plan, memory = plan_for_run(config, tokenizer, data), PeakMeter.start()
    notices.extend(warnings_of(plan))
    precision, model, base_logits = prepare_model(config, architecture, tokenizer, data, shared)
    began = None if config.adapter_path is None else probe_logits(model, data.probes, data.probe_pixels)
    notices.append(_served_how(config, model, tokenizer, precision))
    check_packing(model, data, tokenizer)
    judge = make_judge(config, data, model, tokenizer, precision.arithmetic)
    if save is not None:
        check_same_base(save, base_logits)

    on_main(lambda: _begin(config, directory, save))
    announce(console, config, model, data, precision, notices)
    if resume:
        _say(console, f"resuming at step {save.position.step}" if save else "nothing was saved: beginning at step 0")
    if judge is not None and config.kind != "scratch":
        on_main(partial(judge.score, model, directory, "before"))
    write = partial(
        write_save, directory, identity=identity, base_logits=base_logits, keep=config.keep, spent=spending.so_far
    )
    outcome = fit(config, model, tokenizer, data, precision, directory, console, save, write)

    trained_logits = on_main(lambda: probe_logits(model, data.probes, data.probe_pixels))
    summary = _summary(config, model, data, precision, outcome, notices, console)
    if plan is not None:
        summary["plan"] = plan.to_json() | {"measured_bytes": memory.growth_bytes()}
        _say(console, compared(plan, summary["plan"]["measured_bytes"]))

    def finish() -> Run:
        if judge is not None:
            judge.score(model, directory, "after")
            summary.update({key: value for key, value in judge.summary().items() if key not in summary})
        logits = (base_logits, began, trained_logits)
        proof = export(config, model, tokenizer, data, precision, directory, summary, logits)
        write_scores(outcome.scored, data.scorer, directory)
        plot_loss(outcome.history, directory / "loss.png", f"{name}: {config.kind}")
        run = _finish(directory, config, summary, proof, started_s, spending)
        _say(console, *result_lines(config, summary), told(summary))
        return run

    return on_main(finish)


def _what_is_there(config: TrainConfig, directory: Path, overwrite: bool, resume: bool) -> Finished | Save | None:
    """A finished run, or the save to go on from. Raises what both raise."""
    done = finished(config, directory, world_size()) if resume and not overwrite else None
    return done if done is not None else check_output(directory, overwrite, resume)


def _say(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, markup=False, highlight=False)


def _read(
    config: TrainConfig, notices: list[str], shared: Alone
) -> tuple[PretrainedConfig | None, PreTrainedTokenizerBase, RunData]:
    """What the run is made of but its model; what cannot be is refused before the model costs anything.

    The architecture is the base's, None where there is no base. `notices` gets what there is to say of all that.
    """
    check_start(config, world_size())
    architecture = None if config.model_id is None else base_config(config)
    rows, stream = shared.once("rows", lambda: open_rows(config))
    check_preference_run(config, rows.format)
    tokenizer = make_tokenizer(config, rows)
    if architecture is not None:
        check_base(architecture, len(tokenizer), config.context_length)
    processor = make_processor(config, architecture, rows, tokenizer)
    data = shared.once("data", lambda: load_data(config, rows, tokenizer, processor, stream))
    for split in data.splits.values():
        notices.extend(split.notices)
    for key, report in data.reports.items():
        if stream is None or key != "train":
            notices.extend(report.notices(key, config.context_length))
    notices.extend(few_tokens(config, data.reports["train"].num_tokens, is_whole=stream is None))
    notices.extend(schedule_notices(config, len(data.train), stream is not None, world_size()))
    return architecture, tokenizer, data


def _served_how(config: TrainConfig, model: Any, tokenizer: PreTrainedTokenizerBase, precision: Precision) -> str:
    """What `loradock serve` will make of the checkpoint."""
    if config.has_head:
        return "a classification head: it will be served by a dedicated engine, through POST /classify"
    return foretell(model, tokenizer, config.model_id, precision.saved).line()


def _summary(
    config: TrainConfig,
    model: Any,
    data: RunData,
    precision: Precision,
    outcome: Outcome,
    notices: list[str],
    console: Console,
) -> dict[str, Any]:
    """What run.json says of the training; what is known only now, as how much a stream held, is shown at once."""
    reports, late = data.reports, list(outcome.scored.notices)
    if outcome.stream_report is not None:
        reports = reports | {"train": outcome.stream_report}
        late.extend(outcome.stream_report.notices("train_path", config.context_length))
        late.extend(few_tokens(config, outcome.stream_report.num_tokens, is_whole=True))
    _say(console, *(f"note: {notice}" for notice in late))
    notices.extend([*outcome.notices, *late])
    summary = summarise(config, model, reports, precision, outcome, notices)
    return summary | {"data_sha256": {key: rows.sha256 for key, rows in data.splits.items()}}


def _begin(config: TrainConfig, directory: Path, save: Save | None) -> None:
    prepare_output(directory, save)
    values = json.loads(config.model_dump_json())
    told = "".join(f"# {key}: fetched with a signature, which is not kept\n" for key in signed_keys(values))
    write_text(directory / "config.yaml", told + yaml.safe_dump(values, sort_keys=False))


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


def _finish(
    directory: Path,
    config: TrainConfig,
    summary: dict[str, Any],
    proof: Proof,
    started_s: float,
    spending: SpendMeter,
) -> Run:
    """Say in run.json what became of it; only then are its saves of no use."""
    differences = {"reloaded": proof.reloaded_difference, "base": proof.base_difference}
    if proof.began_difference is not None:
        differences["adapter_path"] = proof.began_difference
    summary["proof"] = differences | {"prompts": len(proof.prompts)}
    summary["checkpoint_bytes"] = sum(file.stat().st_size for file in (directory / "checkpoint").iterdir())
    summary["total_seconds"] = round(time.monotonic() - started_s, 2)
    summary["cost"] = cost_of(
        spending.so_far(),
        has_gpu=torch.cuda.is_available(),
        price_per_hour=config.price_per_hour,
        power_watts=config.power_watts,
    )
    temporary = directory / ".run.json.tmp"  # its presence says that the run is complete: it is there whole, or not
    write_text(temporary, json.dumps(summary, indent=2) + "\n")
    temporary.replace(directory / "run.json")
    shutil.rmtree(directory / FOLDER, ignore_errors=True)
    return Run(directory, config.kind, summary)
