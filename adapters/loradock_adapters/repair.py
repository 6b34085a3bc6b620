"""What is wrong with an adapter's files and can be put right, provably without changing the function it stands for.

In this order: names that drifted (repair_keys.py), copies of the base's matrices (repair_bases.py), initialisations
that changed the base (repair_inits.py). Planning reads headers, and values only where there is something to compare;
`write_repaired` makes the new files. The same upload on the same base gives the same bytes. Judges nothing: what comes
out goes through the gate like everything else.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loradock_adapters.base import BaseModel
from loradock_adapters.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Checkpoint
from loradock_adapters.errors import HeaderError
from loradock_adapters.filetypes import INITIAL_FOLDERS
from loradock_adapters.findings import Findings
from loradock_adapters.problems import Problem
from loradock_adapters.repair_bases import BaseWeights, copies_of_the_base
from loradock_adapters.repair_inits import converted_config, converted_tensors, is_convertible, why_not
from loradock_adapters.repair_keys import Renaming, plan_renaming, renamed_config
from loradock_adapters.safetensors_header import read_header
from loradock_adapters.tensor_files import TensorStream, stream_of, write_safetensors


@dataclass
class Repair:
    """What would be changed, and what stands in the way of sharing that only the values tell."""

    checkpoint: Checkpoint
    config: dict[str, Any]
    tensors: dict[str, TensorStream]
    done: list[Problem] = field(default_factory=list)
    """What was repaired, for the publisher and the registry."""
    findings: Findings = field(default_factory=Findings)
    """For the gate: what values tell against sharing, and repairs that were asked for and cannot be made."""

    def __bool__(self) -> bool:
        """Whether there is anything to write."""
        return bool(self.done)

    def note(self, code: str, message: str, places: list[str]) -> None:
        more = f" (and {len(places) - 1} more like it)" if len(places) > 1 else ""
        self.done.append(Problem(code, message + more, places[0]))


def plan_repair(checkpoint: Checkpoint, base: BaseModel | None, base_dir: Path | None) -> Repair:
    """What is to be repaired of an adapter. `base_dir` holds the base's weights, where they are local."""
    path = checkpoint.directory / ADAPTER_WEIGHTS
    streams = {name: stream_of(path, info) for name, info in checkpoint.tensors.items()}
    repair = Repair(checkpoint, dict(checkpoint.config), streams)
    if checkpoint.kind != "lora" or base is None or not streams or not _is_sound(checkpoint):
        return repair
    _rename(repair, base)
    if base_dir is not None:
        _strip(repair, base, BaseWeights(base_dir))
    _convert(repair, base)
    return repair


def write_repaired(repair: Repair, directory: Path) -> None:
    """Writes the repaired checkpoint into an empty directory."""
    for name in sorted(repair.checkpoint.file_names - {ADAPTER_CONFIG, ADAPTER_WEIGHTS}):
        if name.partition("/")[0] in INITIAL_FOLDERS and "initial_adapter_subtracted" in _codes(repair):
            continue
        (directory / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(repair.checkpoint.directory / name, directory / name)
    text = json.dumps(repair.config, indent=2, sort_keys=True, ensure_ascii=True)
    (directory / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")
    write_safetensors(directory / ADAPTER_WEIGHTS, repair.tensors)


def _codes(repair: Repair) -> set[str]:
    return {problem.code for problem in repair.done}


def _is_sound(checkpoint: Checkpoint) -> bool:
    """Whether the parts that a repair builds on could be read; else there is nothing to build on."""
    broken = {problem.where.partition(":")[0] for problem in checkpoint.problems}
    return bool(checkpoint.config) and not broken & {ADAPTER_CONFIG, ADAPTER_WEIGHTS}


def _rename(repair: Repair, base: BaseModel) -> None:
    renaming = plan_renaming(repair.tensors, base)
    if renaming is None or not renaming.changed:
        return
    first = renaming.changed[0]
    repair.note("tensors_renamed", f"renamed to {renaming.names[first]}", renaming.changed)
    repair.tensors = _renamed(repair.tensors, renaming)
    repair.config = renamed_config(repair.config, renaming)


def _renamed(tensors: Mapping[str, TensorStream], renaming: Renaming) -> dict[str, TensorStream]:
    return {renaming.names[name]: tensor for name, tensor in tensors.items()}


def _strip(repair: Repair, base: BaseModel, weights: BaseWeights) -> None:
    equal, different = copies_of_the_base(repair.tensors, repair.config, base, weights)
    if equal:
        repair.note("base_matrix_stripped", "left out: the base's own matrix, equal to the served base's", equal)
        repair.tensors = {name: tensor for name, tensor in repair.tensors.items() if name not in equal}
    for name in different:
        message = "the base's matrix was saved beside the adapter, and is another than the served base's"
        repair.findings.detour("base_matrix_differs", message, name, "serve the base that it was trained on")


def _convert(repair: Repair, base: BaseModel) -> None:
    folder = initial_folder(repair.checkpoint)
    if folder is None or not is_convertible(repair.config) or not _has_sizes(repair.config):
        return
    where = f"{folder}/{ADAPTER_WEIGHTS}"
    path = repair.checkpoint.directory / where
    try:
        initial = {name: stream_of(path, info) for name, info in read_header(path).items()}
    except HeaderError as error:
        repair.findings.refusals.extend(Problem(p.code, p.message, where, p.fix) for p in error.problems)
        return
    renaming = plan_renaming(initial, base)
    if renaming is not None:
        initial = _renamed(initial, renaming)
    if (reason := why_not(repair.tensors, initial, repair.config)) is not None:
        fix = "save the adapter before training, and publish that as the folder initial_adapter"
        repair.findings.refuse("initial_adapter_unfit", reason, where, fix)
        return
    init = ascii(repair.config["init_lora_weights"])[1:-1][:40]
    message = f"{init} made a plain LoRA: the initial adapter was subtracted, which doubles the rank"
    repair.tensors = converted_tensors(repair.tensors, initial)
    repair.config = converted_config(repair.config)
    repair.note("initial_adapter_subtracted", message, [where])


def initial_folder(checkpoint: Checkpoint) -> str | None:
    """The folder with the adapter as it was before training; None where there is none."""
    return next((name for name in INITIAL_FOLDERS if f"{name}/{ADAPTER_WEIGHTS}" in checkpoint.file_names), None)


def _has_sizes(config: Mapping[str, Any]) -> bool:
    """Whether rank and alpha are numbers that can be doubled; the gate says what is wrong with them otherwise."""

    def numbers(values: object) -> bool:
        return (
            all(isinstance(v, int | float) and not isinstance(v, bool) for v in values.values())
            if isinstance(values, Mapping)
            else not values
        )

    alpha = config.get("lora_alpha")
    return (
        type(config.get("r")) is int
        and isinstance(alpha, int | float)
        and not isinstance(alpha, bool)
        and numbers(config.get("rank_pattern"))
        and numbers(config.get("alpha_pattern"))
    )
