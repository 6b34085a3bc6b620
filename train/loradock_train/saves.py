"""Saves: what a run needs to go on after it was stopped or killed, complete or absent.

    RUN/saves/step-00000120/
        weights.safetensors   what is trained, in the type in which it is trained (and buffers)
        optimizer.pt, scheduler.pt, scaler.pt (fp16), trainer_state.json    as transformers writes them
        base.safetensors      what the base said to the probes before training
        save.json             where the run stood, and what it was made from; written last
    RUN/saves/best-00000080/  weights of the best validation (best.py)

Random states are not here: those of a step follow from seed and step (order.py). A save is written under a temporary
name, synced and renamed. Knows nothing of the loop that calls it.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loradock_train.config import TrainConfig
from loradock_train.cost import UNKNOWN, Spent
from loradock_train.errors import Problem, ResumeError, TrainError
from loradock_train.export import write_atomically
from loradock_train.processes import gather_objects, world_size
from loradock_train.rows import Rows
from loradock_train.shard import gathered, put

FOLDER = "saves"
FREE_KEYS = frozenset(
    {
        "output_dir",
        "similarity",
        "adapter_path",
        "save_steps",
        "save_every_s",
        "keep",
        "num_devices",
        "train_path",
        "valid_path",
        "worker_resources",
        "trainer_resources",
        *("samples", "expected", "on_out_of_memory"),
        *("price_per_hour", "power_watts", "report_to"),
    }
)
"""Keys that may differ on resume. Data is compared by its content, not by where it lies."""
BASE_TOLERANCE = 5e-2
"""Relative difference of the base's logits up to which it counts as the same model (on another machine)."""


@dataclass(frozen=True)
class Identity:
    """What a run is made from, in JSON's types."""

    config: dict[str, Any]
    data: dict[str, list[list[str]]]
    """For each split, name and sha256 of every file, in order."""
    tokenizer_sha256: str | None
    versions: dict[str, str]
    num_processes: int = 1


@dataclass(frozen=True)
class Position:
    """Where the run stood, beyond what transformers saves."""

    step: int
    tokens: int
    elapsed_s: float
    loss_sum: float
    """Of the steps since the last log."""
    logged_step: int
    history: list[dict[str, Any]]
    """The lines of metrics.jsonl."""
    loss_sums: list[float] = field(default_factory=list)
    """loss_sum of every process, where there are several."""
    pieces: int = 1
    """Into which batches were cut for want of memory."""
    stream: dict[str, Any] | None = None
    """Where in the stream (feed.Place); None for data in memory."""


@dataclass(frozen=True)
class Save:
    """A complete save on disk."""

    directory: Path
    position: Position
    identity: Identity
    spent: Spent = UNKNOWN

    @property
    def base_logits(self) -> Tensor:
        """prompts, V: what the base said when the run began."""
        return load_file(self.directory / "base.safetensors")["logits"]


def identity_of(
    config: TrainConfig, splits: Mapping[str, Rows], tokenizer_sha256: str | None, versions: Mapping[str, str]
) -> Identity:
    """What decides the weights of this run."""
    data = {key: [[Path(file).name, digest] for file, digest in rows.files] for key, rows in splits.items()}
    if config.adapter_path is not None:
        file = Path(config.adapter_path) / "adapter_model.safetensors"
        data["adapter"] = [[file.name, hashlib.sha256(file.read_bytes()).hexdigest()]]
    return Identity(json.loads(config.model_dump_json()), data, tokenizer_sha256, dict(versions), world_size())


# ---- writing --------------------------------------------------------------------------------------------------------


def write_save(
    run: Path,
    position: Position,
    weights: Mapping[str, Tensor],
    fill: Callable[[Path], None],
    *,
    identity: Identity,
    base_logits: Tensor,
    keep: int,
    spent: Callable[[], Spent] = Spent,
) -> Path:
    """Write one save, then remove all but the newest `keep`. `fill` adds the files of optimiser and schedule."""
    directory = run / FOLDER / f"step-{position.step:08d}"

    def write(temporary: Path) -> None:
        save_file(dict(weights), temporary / "weights.safetensors")
        save_file({"logits": base_logits.contiguous()}, temporary / "base.safetensors")
        fill(temporary)
        files = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        parts = {"position": asdict(position), "identity": asdict(identity), "spent": asdict(spent()), "files": files}
        text = json.dumps(parts, indent=1)
        (temporary / "save.json").write_text(text + "\n", encoding="utf-8")

    if not directory.exists():  # a stop may come at a step that was just saved
        write_atomically(directory, write)
    for old in _directories(run)[keep:]:
        remove_save(old)
    return directory


def remove_save(directory: Path) -> None:
    """Renamed before it is removed: half a save must not bear the name of a whole one."""
    doomed = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    directory.rename(doomed)
    shutil.rmtree(doomed)


def remove_leftovers(run: Path) -> None:
    """What a killed process left of saves that it was writing or removing."""
    for path in (run / FOLDER).glob(".*.tmp"):
        shutil.rmtree(path)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: the trained parameters (tied ones once) and the buffers that belong to the state. Where
    the model is divided over the processes, every one must ask."""
    kept = set(model.state_dict())
    state = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    state.update((name, buffer) for name, buffer in model.named_buffers() if name in kept)  # type: ignore[misc]
    return {name: gathered(tensor.detach()).to("cpu").contiguous() for name, tensor in state.items()}


# ---- reading --------------------------------------------------------------------------------------------------------


def newest_save(run: Path) -> Save | None:
    """The save to go on from; None where nothing was saved. Raises ResumeError for one that is not whole."""
    directories = _directories(run)
    if not directories:
        return None
    directory = directories[0]
    try:
        values = json.loads((directory / "save.json").read_text(encoding="utf-8"))
        position, identity = Position(**values["position"]), Identity(**values["identity"])
        spent = Spent(**values["spent"]) if "spent" in values else replace(UNKNOWN, seconds=position.elapsed_s)
        sizes = values["files"]
        wrong = [name for name, size in sizes.items() if (directory / name).stat().st_size != size]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResumeError(_damaged(directory), [Problem("save.json", f"{type(error).__name__}: {error}")]) from error
    if wrong:
        raise ResumeError(_damaged(directory), [Problem(name, "its size is not the one saved") for name in wrong])
    return Save(directory, position, identity, spent)


def saved_histories(run: Path) -> list[list[dict[str, Any]]]:
    """Of every save that is there, the lines of metrics.jsonl up to it."""
    texts = [(directory / "save.json").read_text(encoding="utf-8") for directory in _directories(run)]
    return [json.loads(text)["position"]["history"] for text in texts]


def common_save(save: Save | None) -> Save | None:
    """The save that process 0 has found. Raises ResumeError where this process cannot see it."""
    if save is not None and not (save.directory / "save.json").is_file():
        told = "not there for every process: they need a run directory that all machines share"
        raise ResumeError(f"{save.directory} cannot be resumed:", [Problem(str(save.directory), told)])
    return save


def check_alike(identity: Identity) -> None:
    """Raises TrainError where the processes of this run are not about to train the same thing."""
    values = asdict(identity)
    values["config"] = {key: value for key, value in identity.config.items() if key not in FREE_KEYS}
    digests = gather_objects(hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest())
    other = [index for index, digest in enumerate(digests) if digest != digests[0]]
    if other:
        raise TrainError(
            f"process {other[0]} of {len(digests)} has another config, data, tokenizer or library version than "
            "process 0; every machine needs the same ones"
        )


def changed_keys(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Problem]:
    """The keys of a config, in JSON's types, that make another run."""
    return [
        Problem(key, f"{_shown(then.get(key))} when the run began, {_shown(now.get(key))} now")
        for key in sorted({*then, *now} - FREE_KEYS)
        if then.get(key) != now.get(key)
    ]


def check_same(save: Save, now: Identity) -> list[str]:
    """Notices about what may differ. Raises ResumeError with everything that may not: config, data, tokenizer."""
    then = save.identity
    problems = changed_keys(then.config, now.config)
    for split in sorted({*then.data, *now.data}):
        problems.extend(_changed_files(f"{split}_path", then.data.get(split, []), now.data.get(split, [])))
    if then.tokenizer_sha256 != now.tokenizer_sha256:
        problems.append(Problem("tokenizer", "another one than when the run began (tokenizer.json differs)"))
    if then.num_processes != now.num_processes:
        told = f"{then.num_processes} processes when the run began, {now.num_processes} now"
        problems.append(Problem("num_devices", f"{told}: a step would take other rows, and draw other random numbers"))
    if problems:
        raise ResumeError(
            f"{save.directory} cannot be resumed, since what it was made from has changed "
            "(undo that, or start anew with --overwrite):",
            problems,
        )
    other = [
        f"{name} {then.versions.get(name)} then, {version} now"
        for name, version in now.versions.items()
        if then.versions.get(name) != version
    ]
    return [f"resumed with other versions: {'; '.join(other)}; results may differ in the last bits"] if other else []


def check_same_base(save: Save, base_logits: Tensor) -> None:
    """Raises ResumeError where the base model answers the probes unlike it did when the run began."""
    then = save.base_logits
    if then.shape == base_logits.shape:
        difference = float((then - base_logits).abs().max())
        if difference <= BASE_TOLERANCE * max(1.0, float(then.abs().max())):
            return
        told = f"its answers to the probes differ by {difference:.4g} logits from those when the run began"
    else:
        told = f"its answers have the shape {tuple(base_logits.shape)}, and had {tuple(then.shape)} when the run began"
    raise ResumeError(f"{save.directory} cannot be resumed: the base is another model now:", [Problem("model", told)])


def load_weights(directory: Path, model: nn.Module) -> None:
    """Put the saved weights into the model. Raises ResumeError where they are not this model's."""
    saved = load_file(directory / "weights.safetensors")
    here: dict[str, Tensor] = dict(model.named_parameters())
    here.update((name, buffer) for name, buffer in model.named_buffers())
    wanted = trained_state(model).keys()
    odd = sorted(saved.keys() ^ wanted) or [name for name in wanted if saved[name].shape != here[name].shape]
    if odd:
        raise ResumeError(
            f"{directory} holds other weights than this model trains:", [Problem(name, "differs") for name in odd]
        )
    with torch.no_grad():
        for name, tensor in saved.items():
            put(here[name], tensor)


def _directories(run: Path) -> list[Path]:
    """Newest first."""
    return sorted((run / FOLDER).glob("step-*"), reverse=True)


def _damaged(directory: Path) -> str:
    return f"{directory} is damaged (remove it to go on from an older one, or start anew with --overwrite):"


def _changed_files(key: str, then: list[list[str]], now: list[list[str]]) -> list[Problem]:
    if len(then) != len(now):
        return [Problem(key, f"{len(then)} files when the run began, {len(now)} now")]
    return [
        Problem(key, f"{name} has changed (sha256 {before[:12]}… when the run began, {after[:12]}… now)")
        for (_, before), (name, after) in zip(then, now, strict=True)
        if before != after
    ]


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "…"
