"""From a YAML file and `--set key=value` to a TrainConfig, or to all that is wrong with it.

Every problem names its key, the line of the YAML it stands on, and for an unknown key the nearest known one.
Relative paths are resolved against the YAML's folder. Old names are translated with a notice, never silently. Knows
nothing of training.
"""

import difflib
import json
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from loradock_adapters.errors import UsageError
from loradock_adapters.strict_config import parse_value, read_yaml
from loradock_train.config import TrainConfig
from loradock_train.config_fsdp import FsdpOptions
from loradock_train.config_preference import PreferenceOptions
from loradock_train.config_quantisation import QuantisationOptions
from loradock_train.config_scratch import Expected, SampleOptions
from loradock_train.config_sections import LoraOptions, TokenizerOptions
from loradock_train.config_similarity import SimilarityOptions
from loradock_train.config_sweep import SweepEntry
from loradock_train.config_task import EarlyStopping, TaskOptions
from loradock_train.continued_options import adapter_directory, adapter_options
from loradock_train.errors import ConfigError, Problem
from loradock_train.files import is_url
from loradock_train.seed_keys import translate
from loradock_train.signed import take_signatures
from loradock_train.urls import LOGIN_TOLD, keys_with_login, redacted

Keys = tuple[str, ...]
SECTIONS: dict[str, type[BaseModel]] = {
    "lora_config": LoraOptions,
    "tokenizer": TokenizerOptions,
    "preference": PreferenceOptions,
    "quantisation": QuantisationOptions,
    "task": TaskOptions,
    "similarity": SimilarityOptions,
    "fsdp": FsdpOptions,
    "early_stopping": EarlyStopping,
    "samples": SampleOptions,
    "expected": Expected,
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> tuple[TrainConfig, list[str]]:
    """Read, override, translate, validate. Returns the config and notices for the user.

    overrides: `key=value` texts, keys dotted (`lora_config.r=16`), values in YAML.
    Raises ConfigError (all problems at once) or UsageError (no such file, broken YAML, malformed override).
    """
    path = Path(path)
    values = read_yaml(path)
    lines = _lines(yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader))
    for override in overrides:
        _apply(values, override)
        lines.pop(tuple(override.partition("=")[0].split(".")), None)
    return config_from(values, folder=path.resolve().parent, source=str(path), lines=lines)


def config_from(
    values: Mapping[str, Any], folder: Path, source: str = "the config", lines: Mapping[Keys, int] | None = None
) -> tuple[TrainConfig, list[str]]:
    """Validate a mapping with the YAML's keys. `folder` is what relative paths are relative to."""
    lines = lines if lines is not None else {}
    try:
        values, signed = take_signatures(values)
    except ValueError as error:
        raise ConfigError(f"{source} has 1 problem:", [Problem("data", str(error))]) from None
    if logins := [Problem(_where(keys, lines, {}), LOGIN_TOLD) for keys in keys_with_login(values)]:
        raise ConfigError(f"{source} holds a login:", logins)
    translated = translate(_with_deepspeed_file(values, folder, lines))
    problems = [Problem(_where((key,), lines, {}), told) for key, told in translated.problems.items()]
    config: TrainConfig | None = None
    try:
        config = TrainConfig.model_validate(translated.values)
    except ValidationError as error:
        problems.extend(_problems(error, lines, translated.origins))
    if problems or config is None:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise ConfigError(f"{source} has {count}:", problems)
    try:
        return _resolve_paths(config, folder), [*translated.notices, *signed]
    except ConfigError as error:
        located = [Problem(_where(tuple(p.where.split(".")), lines, {}), p.message) for p in error.problems]
        raise ConfigError(error.headline, located) from error


def _with_deepspeed_file(values: Mapping[str, Any], folder: Path, lines: Mapping[Keys, int]) -> Mapping[str, Any]:
    """`deepspeed: FILE` and `deepspeed: {config_path: FILE}` as what the file holds."""
    section = values.get("deepspeed")
    name = section.get("config_path") if isinstance(section, dict) else section
    if not isinstance(name, str):
        return values
    try:
        return {**values, "deepspeed": json.loads((folder / name).read_text(encoding="utf-8"))}
    except (OSError, ValueError) as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read as JSON: {error}"
        problem = Problem(_where(("deepspeed",), lines, {}), f"{why}: {folder / name}")
        raise ConfigError("the config has 1 problem:", [problem]) from error


# ---- YAML ---------------------------------------------------------------------------------------------------------


def _lines(node: yaml.Node | None, prefix: Keys = ()) -> dict[Keys, int]:
    """The 1-based line of every key, by its path."""
    if not isinstance(node, yaml.MappingNode):
        return {}
    found: dict[Keys, int] = {}
    for key_node, value_node in node.value:
        keys = (*prefix, str(key_node.value))
        found[keys] = key_node.start_mark.line + 1
        found.update(_lines(value_node, keys))
    return found


def _apply(values: dict[str, Any], override: str) -> None:
    """Set one dotted key. `--set lora_config=null` removes a section."""
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        raise UsageError(f"--set {redacted(override)!r}: expected key=value, for example --set lora_config.r=16")
    try:
        value = parse_value(text)
    except ValueError as error:
        raise UsageError(f"--set {name}: {redacted(str(error))}") from None
    *sections, last = name.strip().split(".")
    target = values
    for section in sections:
        inner = target.get(section)
        if inner is None:
            inner = target[section] = {}
        if not isinstance(inner, dict):
            raise UsageError(f"--set {name}: {section} is {redacted(repr(inner))}, not a section")
        target = inner
    target[last] = value


# ---- problems -------------------------------------------------------------------------------------------------------


def _problems(error: ValidationError, lines: Mapping[Keys, int], origins: Mapping[str, str]) -> Iterator[Problem]:
    """One problem a key: where a value may be of several types, pydantic complains once for each."""
    messages: dict[Keys, list[str]] = {}
    for detail in error.errors(include_url=False):
        keys = _key_path(detail["loc"])
        message = _message(detail, keys)
        keys = keys or _key_in(message, {*lines, *((key,) for key in origins)})
        message = message.removeprefix(f"{'.'.join(keys)}: ")
        told = messages.setdefault(keys, [])
        if message not in told:
            told.append(message)
    for keys, told in messages.items():
        yield Problem(_where(keys, lines, origins), "; or ".join(told))


def _where(keys: Keys, lines: Mapping[Keys, int], origins: Mapping[str, str]) -> str:
    """The place as it stands in the file: its line, and the key by the name that it has there."""
    if keys and keys[0] in origins:
        keys = (origins[keys[0]], *keys[1:])
    where = ".".join(keys) or "config"
    line = next((lines[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in lines), None)
    return f"line {line}, {where}" if line is not None else where


def _key_in(message: str, there: Container[Keys]) -> Keys:
    """Of a problem between keys: the first that the message names and the file has."""
    return next(((word,) for word in re.findall(r"\w+", message) if (word,) in there), ())


def _key_path(location: Sequence[str | int]) -> Keys:
    """Pydantic's location without the names of union members and positions in lists."""
    keys: list[str] = []
    for part in location:
        if not isinstance(part, str) or (keys and keys[0] not in SECTIONS) or len(keys) == 2:
            break
        keys.append(part)
    return tuple(keys)


def _message(detail: Any, keys: Keys) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden" and len(detail["loc"]) == 3 and detail["loc"][0] == "sweep":
        _, place, name = detail["loc"]
        return f"unknown key {name} of entry {place + 1}; known here: {', '.join(SweepEntry.model_fields)}"
    if kind == "extra_forbidden":
        return f"unknown key{_nearest(keys)}"
    if kind == "missing":
        return "required, but not given"
    if kind == "value_error":
        return str(context["error"])
    text = str(detail["msg"])
    text = re.sub(r"^Input should be ", "must be ", text).replace("a valid tuple", "a list")
    text = re.sub(r"a valid dictionary or instance of \w+", "a section of keys and values", text)
    value = detail["input"]
    return f"{text}, got {value!r}" if isinstance(value, str | int | float | bool | None) else text


def _nearest(keys: Keys) -> str:
    section = TrainConfig if len(keys) == 1 else SECTIONS[keys[0]]
    names = list(section.model_fields)
    near = difflib.get_close_matches(keys[-1], names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]}?"
    if len(keys) == 1 and keys[0] in LoraOptions.model_fields:
        return f"; it belongs under lora_config: (lora_config.{keys[0]})"
    return f"; known here: {', '.join(names)}" if len(names) <= 16 else ""


# ---- paths ---------------------------------------------------------------------------------------------------------


def _resolve_paths(config: TrainConfig, folder: Path) -> TrainConfig:
    """Relative data paths belong to the YAML's folder. A model_id is a path when such a directory is there, else a
    hub id."""
    update: dict[str, Any] = {"train_path": tuple(_data_path(path, folder) for path in config.train_path)}
    if config.valid_path is not None:
        update["valid_path"] = tuple(_data_path(path, folder) for path in config.valid_path)
    if config.model_id is not None:
        update["model_id"] = _path_or_hub_id(config.model_id, folder, "model_id")
    if config.tokenizer is not None and config.tokenizer.path is not None:
        path = _path_or_hub_id(config.tokenizer.path, folder, "tokenizer.path")
        update["tokenizer"] = config.tokenizer.model_copy(update={"path": path})
    if config.adapter_path is not None:
        directory = adapter_directory(config.adapter_path, folder)
        update["adapter_path"] = str(directory)
        update["lora_config"] = adapter_options(directory, config.lora_config)
    if config.chat_template is not None and config.chat_template.endswith(".jinja"):
        file = folder / config.chat_template
        if not file.is_file():
            raise ConfigError("the config has 1 problem:", [Problem("chat_template", f"no such file: {file}")])
        update["chat_template"] = file.read_text(encoding="utf-8")
    asked: tuple[str, ...] = ()
    if config.similarity is not None:
        found = _resolve_similarity(config.similarity, folder)
        update["similarity"], asked = found, found.path or ()
    named = {"train_path": update["train_path"], "valid_path": update.get("valid_path", ()), "similarity.path": asked}
    missing = [
        Problem(key, f"no such file or directory: {path}")
        for key, paths in named.items()
        for path in paths
        if not is_url(path) and not Path(path).exists()
    ]
    if missing:
        raise ConfigError("the config names files that are not there:", missing)
    return config.model_copy(update=update)


def _resolve_similarity(options: SimilarityOptions, folder: Path) -> SimilarityOptions:
    update: dict[str, Any] = {}
    if options.path is not None:
        update["path"] = tuple(_data_path(path, folder) for path in options.path)
    if options.embedder is not None:
        update["embedder"] = _path_or_hub_id(options.embedder, folder, "similarity.embedder")
    return options.model_copy(update=update)


def _data_path(path: str, folder: Path) -> str:
    return path if is_url(path) else str(folder / path)


def _path_or_hub_id(name: str, folder: Path, key: str) -> str:
    if is_url(name):
        return name
    path = folder / Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file() and (path / "checkpoint" / "config.json").is_file():
            path = path / "checkpoint"  # a run directory stands for its checkpoint
        return str(path.resolve())
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError("the config has 1 problem:", [Problem(key, f"no such directory: {path}")])
    return name
