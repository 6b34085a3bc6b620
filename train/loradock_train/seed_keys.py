"""Keys of other trainers' files, in our words: the LoRA-vs-full template's, and transformers' `TrainingArguments`.

Every key that is read here is told with a notice that says what became of it; nothing is dropped in silence. A key
that stands beside its new name is a problem, not a choice. Pure: knows nothing of files, lines or models.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

RENAMED = {
    "num_checkpoints_to_keep": "keep",
    "save_total_limit": "keep",
    "num_train_epochs": "num_epochs",
    "per_device_train_batch_size": "train_batch_size_per_device",
    "per_device_eval_batch_size": "eval_batch_size_per_device",
    "max_seq_length": "context_length",
    "max_length": "context_length",
    "warmup_ratio": "warmup_steps",
    "initial_adapter_model_ckpt_path": "adapter_path",
    "torch_dtype": "dtype",
}
UNUSED = {
    "dataset_size_scaling_factor": "nothing here is sized by it: every row is read, and counted",
    "logging_dir": "the run directory holds metrics.jsonl and loss.png",
    "overwrite_output_dir": "to replace a run, give --overwrite on the command line",
    "remove_unused_columns": "rows are read by our own rules, which name what is wrong with them",
    "use_cache": "training never keeps a cache of keys and values",
    "save_safetensors": "weights are never saved in another way",
    "ddp_find_unused_parameters": "what is trained is known before training starts",
}
OPTIMISERS = {"adamw_bnb_8bit": "adamw_8bit", "adamw_hf": "adamw_torch", "paged_adamw": "paged_adamw_32bit"}
SPECIAL = (
    "initial_base_model_ckpt_path",
    "flash_attention_2",
    "fp16",
    "bf16",
    "eval_strategy",
    "evaluation_strategy",
    "save_strategy",
    "gradient_checkpointing_kwargs",
    "deepspeed",
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
)
BEST_BY = {
    "loss": "eval_loss",
    "perplexity": "eval_loss",
    "accuracy": "accuracy",
    "macro_f1": "macro_f1",
    "f1_macro": "macro_f1",
    "rougel": "rougeL",
    "rouge_l": "rougeL",
    "rouge1": "rouge1",
    "rouge2": "rouge2",
    "exact_match": "exact_match",
    "token_f1": "token_f1",
}
"""By the metric's name there, in small letters and without eval_. A bare f1 may be macro_f1 or token_f1."""
TRACKERS = ("tensorboard", "wandb", "mlflow")
BOOLEANS = frozenset({"flash_attention_2", "fp16", "bf16"})
OLD_KEYS = frozenset({*RENAMED, *UNUSED, *SPECIAL})


@dataclass
class Translation:
    """A mapping in our words."""

    values: dict[str, Any]
    notices: list[str] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    """By the key as it stands in the file."""
    origins: dict[str, str] = field(default_factory=dict)
    """Our key to the one that stands in the file instead."""

    def move(self, old: str, new: str, value: Any, told: str) -> None:
        """Take `old` as `new`; a problem where that is given, too."""
        del self.values[old]
        if new in self.values:
            first = self.origins.get(new, new)
            self.problems[old] = f"read as {new}, which {first} gives already; remove one of the two"
            return
        self.values[new] = value
        self.origins[new] = old
        self.notices.append(told)

    def drop(self, old: str, told: str) -> None:
        """Take `old` away, and say why nothing is lost."""
        value = self.values.pop(old)
        self.notices.append(f"{old}: {_shown(value)} is not needed: {told}")


def translate(values: Mapping[str, Any]) -> Translation:
    """A config's keys and values, those of other trainers in our words."""
    done = Translation(dict(values))
    for old, new in RENAMED.items():
        if old in done.values:
            value = done.values[old]
            more = " (below 1 it is a share of the run)" if new == "warmup_steps" else ""
            done.move(old, new, value, f"{old}: {_shown(value)} is read as {new}: {_shown(value)}{more}")
    for old, why in UNUSED.items():
        if old in done.values:
            done.drop(old, why)
    for rule in _RULES:
        rule(done)
    return done


# ---- one rule each ---------------------------------------------------------------------------------------------------


def _flash_attention(done: Translation) -> None:
    wanted = done.values.get("flash_attention_2")
    if "flash_attention_2" not in done.values:
        return
    if not isinstance(wanted, bool):
        done.problems["flash_attention_2"] = f"must be true or false, got {wanted!r}"
        del done.values["flash_attention_2"]
    elif not wanted:
        done.drop("flash_attention_2", "attn_implementation is auto, which takes it nowhere by itself")
    else:
        has_it = find_spec("flash_attn") is not None
        kernel = "flash_attention_2" if has_it else "sdpa"
        why = "" if has_it else ": flash-attn is not installed here (the results are the same but for rounding)"
        done.move(
            "flash_attention_2",
            "attn_implementation",
            kernel,
            f"flash_attention_2: true is read as attn_implementation: {kernel}{why}",
        )


def _half_precision(done: Translation) -> None:
    for old in ("bf16", "fp16"):
        value = done.values.get(old)
        if old not in done.values:
            continue
        if not isinstance(value, bool):
            done.problems[old] = f"must be true or false, got {value!r}"
            del done.values[old]
        elif value:
            done.move(old, "mixed_precision", old, f"{old}: true is read as mixed_precision: {old}")
        else:
            done.drop(old, "mixed_precision says which type is used")


def _optimiser(done: Translation) -> None:
    name = done.values.get("optim")
    if isinstance(name, str) and name in OPTIMISERS:
        done.values["optim"] = OPTIMISERS[name]
        done.notices.append(f"optim: {name} is read as optim: {OPTIMISERS[name]}")


def _scheduler(done: Translation) -> None:
    if done.values.get("lr_scheduler_type") == "constant_with_warmup":
        done.values["lr_scheduler_type"] = "constant"
        done.notices.append(
            "lr_scheduler_type: constant_with_warmup is read as constant (warmup_steps warms every one)"
        )


def _strategies(done: Translation) -> None:
    for old in ("eval_strategy", "evaluation_strategy"):
        if old not in done.values:
            continue
        value = done.values[old]  # YAML reads a bare `no` as false
        if value in ("no", False) and done.values.get("valid_path") is not None:
            done.problems[old] = "no, beside valid_path: rows that are given are validated on; remove one of the two"
            del done.values[old]
        elif value == "steps" and "eval_steps" not in done.values:
            done.problems[old] = "steps, but no eval_steps; give it, or remove this key (an epoch is then the default)"
            del done.values[old]
        elif value == "epoch" and "eval_steps" in done.values:
            done.problems[old] = "epoch, beside eval_steps; remove one of the two"
            del done.values[old]
        else:
            done.drop(old, "with valid_path a run validates every eval_steps, or at the end of every epoch")
    if "save_strategy" in done.values:
        done.drop("save_strategy", "a run saves every save_steps and every save_every_s; its end is always exported")


def _initial_base(done: Translation) -> None:
    """There `model_id` says what the model is, and this where its weights lie; here a path is a model_id, too."""
    path = done.values.get("initial_base_model_ckpt_path")
    if path is None:
        done.values.pop("initial_base_model_ckpt_path", None)
        return
    was = done.values.pop("model_id", None)
    beside = f" (in place of {was})" if was is not None else ""
    told = f"initial_base_model_ckpt_path: {path} is read as model_id: {path}{beside}"
    done.move("initial_base_model_ckpt_path", "model_id", path, told)


def _deepspeed(done: Translation) -> None:
    """DeepSpeed's ZeRO in torch's own words: stage 3 divides everything over the processes, 1 and 2 not the parameters
    between the passes. The rest of such a file (batches, types, clipping) has keys of its own here."""
    if done.values.get("deepspeed") is None:
        return
    section = done.values["deepspeed"]
    zero = section.get("zero_optimization", {}) if isinstance(section, dict) else None
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    if stage not in (0, 1, 2, 3):
        done.problems["deepspeed"] = (
            "expected {config_path: FILE.json}, or DeepSpeed's own keys with zero_optimization.stage"
        )
        del done.values["deepspeed"]
    elif stage == 0:
        done.drop("deepspeed", "without a ZeRO stage every process holds the whole model, as it does here without fsdp")
    else:
        assert isinstance(zero, dict)  # stage was read from it
        offload = any(
            isinstance(part := zero.get(name), dict) and part.get("device") == "cpu"
            for name in ("offload_param", "offload_optimizer")
        )
        fsdp = {"reshard_after_forward": stage == 3, "cpu_offload": offload}
        words = ", ".join(f"{key}: {_shown(value)}" for key, value in fsdp.items())
        told = f"deepspeed: ZeRO stage {stage} is read as fsdp: {{{words}}}; batches and types are those of this config"
        done.move("deepspeed", "fsdp", fsdp, told)


def _best_model(done: Translation) -> None:
    """Which weights are exported: there a switch and a metric, here best_by alone."""
    switch, metric_key, direction = "load_best_model_at_end", "metric_for_best_model", "greater_is_better"
    wanted, metric, is_high = (done.values.get(key) for key in (switch, metric_key, direction))
    if switch in done.values and not isinstance(wanted, bool):
        done.problems[switch] = f"must be true or false, got {wanted!r}"
    if wanted is not True:
        if wanted is False:
            done.drop(switch, "the last step's weights are exported where no best_by is given")
        for key in (metric_key, direction):
            if key in done.values and switch not in done.problems:
                done.drop(key, f"it chooses weights only beside {switch}: true; here best_by does")
    else:
        _choose_best(done, switch, metric_key, direction, "loss" if metric is None else str(metric), is_high)
    for key in (switch, metric_key, direction):
        done.values.pop(key, None)


def _choose_best(done: Translation, switch: str, metric_key: str, direction: str, metric: str, is_high: object) -> None:
    given, name = done.values.get("best_by"), metric.lower().removeprefix("eval_")
    best_by = BEST_BY.get(name)
    words = f"{switch}: true" + (f" and {metric_key}: {metric}" if metric_key in done.values else "")
    if best_by is None:
        known = ", ".join(dict.fromkeys(BEST_BY.values()))
        done.problems[metric_key] = f"{metric} is no metric of best_by ({known}); give best_by instead"
    elif isinstance(is_high, bool) and is_high == (best_by == "eval_loss"):
        way = "less" if best_by == "eval_loss" else "more"
        done.problems[direction] = f"{_shown(is_high)}, but of {metric} {way} is better; remove this key"
    elif given is not None and given != best_by and metric_key in done.values:
        done.problems[metric_key] = f"read as best_by: {best_by}, beside best_by: {given}; remove one of the two"
    elif given is not None:
        done.notices.append(f"{words} is what best_by: {given} says")
    elif done.values.get("valid_path") is None:
        done.problems[switch] = "true, but no valid_path: the best weights are those of a validation; give it"
    else:
        done.values["best_by"] = best_by
        done.origins["best_by"] = metric_key if metric_key in done.values else switch
        done.notices.append(f"{words} is read as best_by: {best_by}")


def _padding(done: Translation) -> None:
    if done.values.get("padding") == "longest":
        done.notices.append("padding: longest is what happens anyway: a batch is as wide as its longest row")
    elif done.values.get("padding") == "max_length":
        done.notices.append(
            "padding: max_length makes every batch context_length wide: for measuring the worst case, slower otherwise"
        )


def _resources(done: Translation) -> None:
    if done.values.get("worker_resources"):
        done.notices.append(
            "worker_resources: asked of Ray for every worker (--ray); a run that Ray does not start takes this machine "
            "as it is"
        )
    if done.values.get("trainer_resources"):
        done.notices.append(
            "trainer_resources: not asked for: what leads the workers only waits for them, and needs next to nothing"
        )


def _checkpointing(done: Translation) -> None:
    if "gradient_checkpointing_kwargs" in done.values:
        done.drop("gradient_checkpointing_kwargs", "checkpointing is never reentrant here")


def _trackers(done: Translation) -> None:
    """transformers' two words: `none`, and `all` that are installed."""
    value = done.values.get("report_to")
    word = value[0] if isinstance(value, list) and len(value) == 1 else value
    if word == "none":
        done.drop("report_to", "the lines of metrics.jsonl go nowhere else by themselves")
    elif word == "all":
        found = [name for name in TRACKERS if find_spec(name) is not None]
        done.values["report_to"] = found
        done.notices.append(f"report_to: all is read as report_to: [{', '.join(found)}], those that are installed")


_RULES: tuple[Callable[[Translation], None], ...] = (
    _flash_attention,
    _half_precision,
    _optimiser,
    _scheduler,
    _strategies,
    _initial_base,
    _deepspeed,
    _best_model,
    _padding,
    _resources,
    _checkpointing,
    _trackers,
)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
