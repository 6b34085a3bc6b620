"""A config, looked at before a minute is spent on it: its data row by row, its base by config alone, and what a server
would make of the checkpoint, with the changes that would have it hot-swapped.

    report = check("lora.yaml")
    print(report.exit_code, report.forecast.line())

Loads no weights and writes nothing. Judges by the code that training (data) and the server (gate) judge by.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from loradock_adapters.errors import UsageError
from loradock_train.before import load_data, open_rows
from loradock_train.blueprint import blueprint
from loradock_train.config import TrainConfig
from loradock_train.config_file import load_config
from loradock_train.config_sections import LoraOptions
from loradock_train.dataset import DataReport
from loradock_train.doctor import Examination, examine
from loradock_train.errors import ConfigError, DataError, ModelError, Problem
from loradock_train.model import EMBEDDING_NAMES, base_config
from loradock_train.parameters import ParameterCount, count_parameters
from loradock_train.placement import DEFAULT_TARGET, Forecast, Target, foretell
from loradock_train.preference import check_preference_run
from loradock_train.processes import world_size
from loradock_train.remote import local_base
from loradock_train.rewrite import Change, advise_rank, propose, untie
from loradock_train.rows import Rows
from loradock_train.schedule import schedule_notices
from loradock_train.starting import start_problems
from loradock_train.stream import Stream
from loradock_train.tokenizer import make_tokenizer
from loradock_train.vision import make_encoder, make_processor

MAX_ROUNDS = 4
"""A change may bring up the next: a module that is no longer saved whole, and then cannot be adapted either."""
ROUNDED_TO = 64


@dataclass
class Report:
    """What was found."""

    config: TrainConfig
    target: str
    problems: list[Problem] = field(default_factory=list)
    """Why the run would not start."""
    notices: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)
    data: dict[str, DataReport] = field(default_factory=dict)
    examined: dict[str, Examination] = field(default_factory=dict)
    parameters: ParameterCount | None = None
    forecast: Forecast | None = None
    changes: list[Change] = field(default_factory=list)
    rewritten: Forecast | None = None
    """The verdict on the config with all changes but the optional ones."""

    @property
    def exit_code(self) -> int:
        """0: it trains and is placed as its kind wants; 1: an adapter that would not be hot-swapped, or a checkpoint
        that would be refused; 2: the run would not start."""
        if self.problems or (self.forecast is None and not self.config.has_head):
            return 2
        if self.forecast is None:
            return 0  # a classification head: its engine is its own in any case
        return 0 if self.forecast.is_as_expected else 1

    @property
    def needed(self) -> list[Change]:
        return [change for change in self.changes if not change.is_optional]

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.config.kind,
            "exit_code": self.exit_code,
            "problems": [asdict(problem) for problem in self.problems],
            "notices": self.notices,
            "advice": self.advice,
            "data": {key: asdict(report) for key, report in self.data.items()},
            "lengths": {key: found.percentiles for key, found in self.examined.items()},
            "findings": {key: [asdict(each) for each in found.findings] for key, found in self.examined.items()},
            "parameters": None if self.parameters is None else asdict(self.parameters),
            "target": self.target,
            "placement": _placement(self.forecast),
            "changes": [change.to_json() for change in self.changes],
            "rewritten": _placement(self.rewritten),
        }


def _placement(forecast: Forecast | None) -> dict[str, Any] | None:
    if forecast is None:
        return None
    return {**forecast.verdict.to_json(), "checkpoint_bytes": forecast.checkpoint_bytes}


def check(path: str | Path, overrides: Sequence[str] = (), target: Target = DEFAULT_TARGET) -> Report:
    """Look at everything. Raises ConfigError or UsageError where there is no config to look at; what is wrong beyond
    that is in the report."""
    config, notices = load_config(path, overrides)
    report = Report(config, target.name, notices=notices)
    report.problems.extend(start_problems(config, processes_of(config)))
    try:
        config, copied = local_base(config)
        report.notices.extend(copied)
        rows, stream = open_rows(config)
        check_preference_run(config, rows.format)
        tokenizer = make_tokenizer(config, rows)
        architecture = base_config(config) if config.model_id is not None else None
        processor = make_processor(config, architecture, rows, tokenizer)
    except (DataError, ModelError) as error:
        report.problems.extend(_problems(error, "model"))
        return report
    _look_at_data(config, rows, tokenizer, processor, stream, report)
    if config.has_head:
        report.notices.append("a classification head gets a dedicated engine (POST /classify): placement is not judged")
    else:
        _look_at_model(config, tokenizer, target, report)
    return report


def processes_of(config: TrainConfig) -> int:
    """Of the run, as far as its config and this process's environment say."""
    return max(config.num_devices, world_size())


def _problems(error: UsageError, where: str) -> Sequence[Problem]:
    return error.problems if isinstance(error, DataError | ConfigError) else [Problem(where, str(error))]


# ---- data -----------------------------------------------------------------------------------------------------------


def _look_at_data(
    config: TrainConfig,
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    processor: Any,
    stream: Stream | None,
    report: Report,
) -> None:
    splits_long = rows.format == "text" and config.packing is not False
    encoder = make_encoder(config, tokenizer, processor)
    try:
        report.examined["train"] = examine(rows, encoder, config.context_length, splits_long)
        report.advice.extend(_advise_length(config, report.examined["train"], splits_long))
        loaded = load_data(config, rows, tokenizer, processor, stream)
        report.data = loaded.reports
        report.notices.extend(schedule_notices(config, len(loaded.train), stream is not None, processes_of(config)))
    except (DataError, ModelError) as error:
        report.problems.extend(_problems(error, "data"))
    for key, data in report.data.items():
        report.notices.extend(data.notices(key, config.context_length))


def _advise_length(config: TrainConfig, found: Examination, splits_long: bool) -> list[str]:
    """What the lengths of the rows say of context_length."""
    now, longest, most = config.context_length, found.percentiles["max"], found.percentiles["p95"]
    if longest > now and not splits_long:
        return [
            f"context_length: {_rounded(longest)} takes every row whole; {_rounded(most)} takes 95% of them "
            f"(it is {now}, the longest row has {longest:,} tokens)"
        ]
    if _rounded(longest) < now and not splits_long and not config.packing:
        return [
            f"context_length: {_rounded(longest)} is enough: the longest row has {longest:,} tokens, 95% have at most "
            f"{most:,} (a step's memory goes by its rows, the plan's by context_length {now})"
        ]
    return []


def _rounded(tokens: int) -> int:
    return -(-tokens // ROUNDED_TO) * ROUNDED_TO


# ---- placement -------------------------------------------------------------------------------------------------------


def _look_at_model(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, target: Target, report: Report) -> None:
    """The verdict, and the changes that would make it another one."""
    options = config.lora_config
    try:
        made = blueprint(config, tokenizer)
    except ModelError as error:
        report.problems.append(Problem("model", str(error)))
        changes = _untying(config, tokenizer)
    else:
        report.parameters = count_parameters(made.model)
        report.forecast = foretell(made.model, tokenizer, config.model_id, made.precision.saved, target)
        if options is None:
            return
        if report.forecast.is_as_expected:
            report.changes = advise_rank(options, target.limits)
            return
        changes = propose(options, report.forecast.verdict.reasons, target.limits)
    if changes:
        report.changes, report.rewritten = _rewrite(config, tokenizer, target, changes)


def _rewrite(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, target: Target, changes: list[Change]
) -> tuple[list[Change], Forecast | None]:
    """All changes that it takes, and the verdict on the result; None where even that would not train."""
    made: dict[str, Change] = {}
    current, forecast = config, None
    for _ in range(MAX_ROUNDS):
        for change in changes:
            made[change.key] = replace(change, old=made[change.key].old) if change.key in made else change
        current = apply_changes(current, changes)
        assert current.lora_config is not None
        try:
            plan = blueprint(current, tokenizer)
        except ModelError:
            forecast, changes = None, _untying(current, tokenizer) or _taking_back(made, current)
        else:
            forecast = foretell(plan.model, tokenizer, config.model_id, plan.precision.saved, target)
            is_done = forecast.is_as_expected
            changes = [] if is_done else propose(current.lora_config, forecast.verdict.reasons, target.limits)
        if not changes:
            break
    return [change for change in made.values() if change.new != change.old], forecast


def apply_changes(config: TrainConfig, changes: Sequence[Change]) -> TrainConfig:
    """The config with these values of `lora_config`, validated anew."""
    values = {change.key.removeprefix("lora_config."): change.new for change in changes}
    assert config.lora_config is not None
    options = LoraOptions.model_validate(config.lora_config.model_dump() | values)
    return config.model_copy(update={"lora_config": options})


def _untying(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> list[Change]:
    """The changes for an adapter on a tied matrix; none where that is not what training refuses."""
    options = config.lora_config
    if options is None or isinstance(options.target_modules, str):
        return []
    try:
        bare = blueprint(config.model_copy(update={"lora_config": None}), tokenizer).model
    except ModelError:
        return []
    tied = EMBEDDING_NAMES.intersection(options.target_modules)
    is_rest = len(tied) < len(options.target_modules)
    return untie(options, sorted(tied)) if tied and is_rest and bare.config.tie_word_embeddings else []


def _taking_back(made: dict[str, Change], current: TrainConfig) -> list[Change]:
    """Modules that were to get an adapter instead of being trained whole, and cannot (a norm): they stay the base's."""
    change = made.get("lora_config.target_modules")
    assert current.lora_config is not None
    if change is None or current.lora_config.target_modules == change.old:
        return []
    return [replace(change, new=change.old)]
