"""Models and runs at URLs that fsspec knows (s3://, gs://, memory://, …): a base is copied here before a run, a
finished run is copied there after it.

Credentials come from the environment, as each file system takes them; they are in no message, and a config refuses
them in a URL (urls.py). Data files are read where they lie (files.py).
"""

import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

from loradock_adapters.errors import UsageError
from loradock_train.config import TrainConfig
from loradock_train.errors import ModelError, OutputError, TrainError
from loradock_train.files import is_url
from loradock_train.urls import missing_told, open_system, redacted

FILES = ("config.yaml", "metrics.jsonl", "loss.png", "checkpoint", "run.json")
"""Of a run, in the order in which they are copied: run.json says that it is complete, and comes last."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")


def has_urls(config: TrainConfig) -> bool:
    """Whether a base has to be fetched before the run, or the run copied out after it."""
    return any(value is not None and is_url(value) for value in (config.model_id, config.output_dir))


def local_base(config: TrainConfig, *, with_weights: bool = True) -> tuple[TrainConfig, list[str]]:
    """The config with a `model_id` that is a URL copied to this machine, and a notice of it. Without weights: what
    tokenizer and architecture are made of. Raises ModelError."""
    if config.model_id is None or not is_url(config.model_id):
        return config, []
    directory = _fetch(config.model_id, with_weights)
    what = "was copied" if with_weights else "was copied, without its weights,"
    told = f"model_id: {config.model_id} {what} to {directory}"
    return config.model_copy(update={"model_id": str(directory)}), [told]


def check_destination(config: TrainConfig, overwrite: bool) -> None:
    """Before anything else is done: can the run be copied to its `output_dir`, and is none there? Raises UsageError."""
    if config.output_dir is None or not is_url(config.output_dir):
        return
    system, path = _open(config.output_dir, "output_dir")
    try:
        is_there = system.exists(f"{path}/run.json")
    except Exception as error:  # noqa: BLE001 (drivers raise what their libraries do)
        kind = type(error).__name__
        raise OutputError(
            f"output_dir: {config.output_dir} cannot be reached, or not with this login ({kind})"
        ) from None
    if is_there and not overwrite:
        raise OutputError(
            f"{config.output_dir} already holds a run; give another output_dir, or --overwrite to replace it"
        )


def copy_out(config: TrainConfig, directory: Path) -> None:
    """Copy a finished run to its `output_dir`, where that is a URL. Raises TrainError: the run itself is whole."""
    if config.output_dir is None or not is_url(config.output_dir):
        return
    system, path = _open(config.output_dir, "output_dir")
    try:
        for name in FILES:
            for file in [directory / name] if (directory / name).is_file() else sorted((directory / name).rglob("*")):
                if file.is_file():
                    system.put_file(str(file), f"{path}/{file.relative_to(directory)}")
    except Exception as error:  # noqa: BLE001 (as above)
        kind = type(error).__name__
        raise TrainError(
            f"the run is finished and whole in {directory}, but could not be copied to {config.output_dir} ({kind}); "
            "copy it by hand, or push its checkpoint"
        ) from None


def _fetch(url: str, with_weights: bool) -> Path:
    """A copy of a model's folder, named by what lies there: a changed one gets another name."""
    system, path = _open(url, "model_id")
    try:
        rows = system.find(path, detail=True)
        sizes = sorted((name.removeprefix(path), row.get("size"), str(row.get("ETag"))) for name, row in rows.items())
        digest = hashlib.sha256(repr((url, sizes)).encode()).hexdigest()[:16]
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "loradock" / "models"
        target = cache / f"{path.rstrip('/').rsplit('/', 1)[-1]}-{digest}"
        if not with_weights and not target.is_dir():
            target = target.with_name(f"{target.name}-without-weights")
            rows = {name: row for name, row in rows.items() if not name.endswith(WEIGHTS)}
        if rows and not target.is_dir():
            temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            for name in rows:
                file = temporary / name.removeprefix(path).lstrip("/")
                file.parent.mkdir(parents=True, exist_ok=True)
                system.get_file(name, str(file))
            temporary.rename(target)
    except Exception as error:  # noqa: BLE001 (as above)
        kind = type(error).__name__
        raise ModelError(f"model_id: {url} cannot be reached with this login ({kind})") from None
    if not rows:
        raise ModelError(f"model_id: {url} holds no file, or this login may not see it")
    return target


def _open(url: str, key: str) -> tuple[Any, str]:
    try:
        system, path = open_system(url)
    except (ImportError, ValueError) as error:
        raise UsageError(f"{key}: {url}: {missing_told(url, error)}") from error
    return system, path.rstrip("/")


def check_local(output: str | Path) -> None:
    """`--output` is where the run lives while it lasts. Raises UsageError for a URL (of which a Path lost a slash)."""
    if re.match(r"[a-z][a-z0-9+]+:/", str(output)):
        raise UsageError(
            f"--output {redacted(str(output))}: a run is written to this machine; "
            "give the URL as output_dir: it is copied"
        )
