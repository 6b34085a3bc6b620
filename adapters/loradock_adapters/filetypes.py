"""Which files of a directory make a checkpoint, by their names alone.

Kept (uploaded and served), skipped (harmless, left behind), or refused: a pickle runs
code when it is read, and foreign formats cannot be served. The server asks again for every manifest it is sent.
"""

import re
from typing import Literal

from loradock_adapters.problems import Problem

Role = Literal["kept", "skipped", "pickle", "foreign"]

MAX_PATH_CHARS = 200

# A component starts with a letter, digit or underscore: no "..", nothing hidden, no control characters, no separators.
_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*(/[A-Za-z0-9_][A-Za-z0-9._+-]*)?")
_KEPT_SUFFIXES = (".safetensors", ".json", ".txt", ".jinja", ".model", ".tiktoken")
_KEPT_NAMES = frozenset({"README.md", "LICENSE", "NOTICE"})
_KEPT_FOLDERS = frozenset({"additional_chat_templates"})
INITIAL_FOLDERS = ("initial_adapter", "pissa_init", "olora_init", "corda_init", "lora_ga_init")
"""Folders that may hold an adapter as it was before training, which some initialisations need to be undone."""
_INITIAL_FILES = frozenset({"adapter_config.json", "adapter_model.safetensors"})
_TRAINING_STATE = re.compile(
    r"training_args\.bin|(optimizer|scheduler|scaler|sampler)(_\d+)?\.(pt|bin)|rng_state(_\d+)?\.pth|trainer_state\.json"
)
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
_FOREIGN_SUFFIXES = (".gguf", ".ggml", ".h5", ".msgpack", ".ot", ".onnx", ".npz", ".zip", ".tar", ".gz", ".tgz", ".7z")


def role_of(path: str) -> Role:
    """What a file is to a checkpoint. `path` is relative, with forward slashes."""
    folder, _, name = path.rpartition("/")
    if _TRAINING_STATE.fullmatch(name):
        return "skipped"
    if name.endswith(_PICKLE_SUFFIXES):
        return "pickle"
    if name.endswith(_FOREIGN_SUFFIXES):
        return "foreign"
    if folder in INITIAL_FOLDERS:
        return "kept" if name in _INITIAL_FILES else "skipped"
    if folder and folder not in _KEPT_FOLDERS:
        return "skipped"
    return "kept" if name in _KEPT_NAMES or name.endswith(_KEPT_SUFFIXES) else "skipped"


def is_kept_folder(name: str) -> bool:
    """Whether a folder may hold files of a checkpoint."""
    return name in _KEPT_FOLDERS or name in INITIAL_FOLDERS


def is_safe_path(path: str) -> bool:
    return len(path) <= MAX_PATH_CHARS and _PATH.fullmatch(path) is not None


def safetensors_twin(name: str) -> str | None:
    """The file that holds the same weights as a pickle where a library wrote both side by side; None if none does."""
    if name == "adapter_model.bin":
        return "adapter_model.safetensors"
    if re.fullmatch(r"pytorch_model(-\d+-of-\d+)?\.bin", name):
        return "model.safetensors"
    return None


def pickle_refused(path: str) -> Problem:
    return Problem(
        code="pickle_refused",
        message="a pickle: reading it runs whatever code its author put inside, so only safetensors is accepted",
        where=path,
        fix="save with safe_serialization=True, or convert: safetensors.torch.save_file(torch.load(path, "
        "weights_only=True), 'adapter_model.safetensors')",
    )


def foreign_refused(path: str) -> Problem:
    return Problem(
        code="format_refused",
        message="weights or an archive in a format that is not served",
        where=path,
        fix="publish safetensors files; leave archives and other formats out of the directory",
    )
