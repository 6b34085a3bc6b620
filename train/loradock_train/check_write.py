"""The rewritten config as a file: the user's own text, comments and all, with other values where that was proposed."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import yaml

from loradock_adapters.errors import UsageError
from loradock_adapters.strict_config import parse_value
from loradock_train.check import Report, apply_changes
from loradock_train.config import TrainConfig
from loradock_train.config_file import config_from
from loradock_train.signed import KEYS, hidden, signed_keys
from loradock_train.yaml_edit import set_value


def write_rewritten(source: Path, overrides: Sequence[str], report: Report, destination: Path) -> list[str]:
    """Write the config with all changes that it needs; comments stay. Returns notices.

    The file is read again and compared: what could not be changed in place is written anew, without comments.
    Raises UsageError where another file is there already.
    """
    if destination.exists() and not (source.exists() and destination.samefile(source)):
        raise UsageError(f"--write {destination}: there is a file already; give another name, or remove it")
    text = source.read_text(encoding="utf-8")
    for override in overrides:
        key, _, value = override.partition("=")
        text = set_value(text, key.strip().split("."), parse_value(value))
    for change in report.needed:
        text = set_value(text, change.key.split("."), change.new)
    wanted = apply_changes(report.config, report.needed) if report.needed else report.config
    signed = signed_keys(wanted.model_dump())
    for keys in KEYS:
        if ".".join(keys) in signed:
            section = wanted if len(keys) == 1 else getattr(wanted, keys[0])
            text = set_value(text, list(keys), list(getattr(section, keys[-1])))
    text = hidden(text)  # in a comment, say
    if destination.resolve().parent != source.resolve().parent:
        text = _with_whole_paths(text, wanted)
    try:
        is_same = config_from(parse_value(text), destination.resolve().parent)[0] == wanted
    except (UsageError, ValueError):
        is_same = False
    if not is_same:
        values = json.loads(wanted.model_dump_json(exclude_unset=True))
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(destination)
    told = [] if is_same else [f"{destination}: written anew, without the comments of {source}"]
    return told + [f"{destination}: {key} stands there without its signature" for key in signed]


def _with_whole_paths(text: str, config: TrainConfig) -> str:
    """Paths that were relative to the old file's folder, as they are from everywhere."""
    text = set_value(text, ["train_path"], list(config.train_path))
    if config.valid_path is not None:
        text = set_value(text, ["valid_path"], list(config.valid_path))
    if config.model_id is not None:
        text = set_value(text, ["model_id"], config.model_id)
    if config.tokenizer is not None and config.tokenizer.path is not None:
        text = set_value(text, ["tokenizer", "path"], config.tokenizer.path)
    return text if config.chat_template is None else set_value(text, ["chat_template"], config.chat_template)
