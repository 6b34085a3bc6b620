"""A checkpoint directory, read once: its config, the headers of its weights, its template and stop tokens.

Reads structure, not values, and reports what is broken instead of stopping at it: `Checkpoint.problems` goes into the
gate's verdict with everything else. Does not know any base model or engine (base.py, engine_rules.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from loradock_adapters import strict_json
from loradock_adapters.contents import look_into
from loradock_adapters.errors import CheckpointError, HeaderError, NotFoundError
from loradock_adapters.manifest import scan
from loradock_adapters.passport import Passport, read_passport
from loradock_adapters.problems import Problem
from loradock_adapters.safetensors_header import TensorInfo, read_header

Kind = Literal["lora", "full"]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MODEL_CONFIG = "config.json"
MODEL_WEIGHTS = "model.safetensors"
MODEL_INDEX = "model.safetensors.index.json"

MAX_CONFIG_BYTES = 1 << 20
MAX_INDEX_BYTES = 64 << 20
MAX_CHAT_TEMPLATE_CHARS = 256 << 10
MAX_STOP_TOKENS = 64


@dataclass(frozen=True)
class Checkpoint:
    """A LoRA adapter in PEFT layout, or the complete weights of a model."""

    kind: Kind
    directory: Path
    config: Mapping[str, Any]
    """adapter_config.json for an adapter, config.json for a full model."""
    shards: Mapping[str, Mapping[str, TensorInfo]]
    """Weight file -> the tensors in it."""
    weight_map: Mapping[str, str] | None = None
    """Tensor -> weight file, as a full model's index says; None where there is no index."""
    chat_template: str | None = None
    stop_token_ids: tuple[int, ...] = ()
    passport: Passport | None = None
    file_names: frozenset[str] = frozenset()
    """The files that would be published, relative."""
    problems: tuple[Problem, ...] = field(default=())
    """What was found broken while reading; the gate refuses it."""

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors of all weight files. Where two files hold the same name the gate says so."""
        return {name: info for shard in self.shards.values() for name, info in shard.items()}


def resolve_checkpoint_dir(path: Path) -> Path:
    """The directory that holds the weights: a trainer's run directory stands for the checkpoint inside it."""
    if not path.is_dir():
        raise NotFoundError(f"{path} is not a directory")
    inner = path / "checkpoint"
    return inner if (path / "run.json").is_file() and inner.is_dir() else path


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint directory, or a run directory of the trainer.

    Raises NotFoundError if there is no such directory, CheckpointError if it holds neither an adapter nor a model.
    What is wrong inside a recognised checkpoint is in its `problems`.
    """
    directory = resolve_checkpoint_dir(path)
    found = scan(directory)
    names = frozenset(found.kept)
    kind = _kind(names, found.problems)
    problems = [*found.problems, *look_into(directory, names)]
    config = _json_object(directory, ADAPTER_CONFIG if kind == "lora" else MODEL_CONFIG, problems)
    weight_map = _weight_map(directory, problems) if kind == "full" and MODEL_INDEX in names else None
    shards = _shards(directory, _weight_files(kind, names), problems)
    passport: Passport | None = None
    try:
        passport = read_passport(directory)
    except CheckpointError as error:
        problems.extend(error.problems)
    return Checkpoint(
        kind=kind,
        directory=directory,
        config=config,
        shards=shards,
        weight_map=weight_map,
        chat_template=_chat_template(directory, names, passport, problems),
        stop_token_ids=_stop_token_ids(directory, names, passport, problems),
        passport=passport,
        file_names=names,
        problems=tuple(dict.fromkeys(problems)),  # two readers may have found the same
    )


def _kind(names: frozenset[str], problems: tuple[Problem, ...]) -> Kind:
    if ADAPTER_CONFIG in names or ADAPTER_WEIGHTS in names:
        return "lora"
    if MODEL_CONFIG in names:
        return "full"
    missing = Problem(
        "not_a_checkpoint",
        f"neither {ADAPTER_CONFIG} (an adapter) nor {MODEL_CONFIG} (a full model) is there",
        ADAPTER_CONFIG,
    )
    raise CheckpointError([missing, *problems])


def _weight_files(kind: Kind, names: frozenset[str]) -> list[str]:
    if kind == "lora":
        return [ADAPTER_WEIGHTS] if ADAPTER_WEIGHTS in names else []
    return sorted(name for name in names if name.endswith(".safetensors"))


def _shards(directory: Path, files: list[str], problems: list[Problem]) -> dict[str, dict[str, TensorInfo]]:
    shards: dict[str, dict[str, TensorInfo]] = {}
    for name in files:
        try:
            shards[name] = read_header(directory / name)
        except HeaderError as error:
            problems.extend(error.problems)
    return shards


def _weight_map(directory: Path, problems: list[Problem]) -> dict[str, str] | None:
    index = _json_object(directory, MODEL_INDEX, problems, MAX_INDEX_BYTES)
    weight_map = index.get("weight_map")
    if isinstance(weight_map, dict) and all(isinstance(file, str) for file in weight_map.values()):
        return weight_map
    if index:
        problems.append(Problem("index_invalid", "weight_map is not a map of tensor names to files", MODEL_INDEX))
    return None


def _chat_template(
    directory: Path, names: frozenset[str], passport: Passport | None, problems: list[Problem]
) -> str | None:
    """The passport's, else chat_template.jinja, else the tokenizer config's (its `default` where it names several)."""
    template: object = passport.chat_template if passport is not None else None
    if template is None and "chat_template.jinja" in names:
        template = _text(directory, "chat_template.jinja", problems)
    if template is None and "tokenizer_config.json" in names:
        template = _json_object(directory, "tokenizer_config.json", problems).get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        return None
    if len(template) > MAX_CHAT_TEMPLATE_CHARS:
        message = f"a chat template of {len(template)} characters is over the limit of {MAX_CHAT_TEMPLATE_CHARS}"
        problems.append(Problem("chat_template_too_long", message, "chat_template"))
        return None
    return template


def _stop_token_ids(
    directory: Path, names: frozenset[str], passport: Passport | None, problems: list[Problem]
) -> tuple[int, ...]:
    """The passport's, else the end-of-sequence tokens of generation_config.json."""
    ids: object = list(passport.stop_token_ids) if passport is not None else None
    if not ids and "generation_config.json" in names:
        ids = _json_object(directory, "generation_config.json", problems).get("eos_token_id")
    if type(ids) is int:
        ids = [ids]
    if not isinstance(ids, list):
        return ()
    if len(ids) > MAX_STOP_TOKENS or not all(type(token) is int and token >= 0 for token in ids):
        message = f"the stop tokens are not a list of up to {MAX_STOP_TOKENS} token ids"
        problems.append(Problem("stop_tokens_invalid", message, "eos_token_id"))
        return ()
    return tuple(dict.fromkeys(ids))


def _json_object(
    directory: Path, name: str, problems: list[Problem], limit_bytes: int = MAX_CONFIG_BYTES
) -> dict[str, Any]:
    """A JSON file's object. Empty, with a problem noted, where it is missing or is not one."""
    path = directory / name
    if not path.is_file():
        problems.append(Problem("file_missing", "the file is missing", name))
        return {}
    if name == "tokenizer_config.json":
        limit_bytes = MAX_INDEX_BYTES  # thousands of added tokens are described in it
    if path.stat().st_size > limit_bytes:
        message = f"{path.stat().st_size} bytes is over the limit of {limit_bytes}"
        problems.append(Problem("config_too_long", message, name))
        return {}
    try:
        # transformers writes Infinity into the configs of some models (time_step_limit), PEFT does not.
        document = strict_json.loads(path.read_bytes(), constants=name != ADAPTER_CONFIG)
    except strict_json.DuplicateKeyError as error:
        problems.append(Problem("config_duplicate_key", str(error), name))
        return {}
    except ValueError as error:
        problems.append(Problem("config_not_json", f"not valid JSON: {ascii(str(error))[1:-1][:120]}", name))
        return {}
    if not isinstance(document, dict):
        problems.append(Problem("config_not_json", "not a JSON object", name))
        return {}
    return document


def _text(directory: Path, name: str, problems: list[Problem]) -> str | None:
    path = directory / name
    if path.stat().st_size > MAX_CONFIG_BYTES:
        problems.append(Problem("config_too_long", f"over the limit of {MAX_CONFIG_BYTES} bytes", name))
        return None
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        problems.append(Problem("text_not_utf8", "not UTF-8 text", name))
        return None
