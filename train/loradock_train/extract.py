"""What a full fine-tune changed about its base, as a LoRA adapter: the truncated SVD of each linear layer's difference.

    D = W' - W [out, in];   D ~ U·S·V',  B = U·sqrt(S) [out, rank],  A = sqrt(S)·V' [rank, in]

The best approximation of that rank there is (Eckart and Young, 1936), and its error is known: it is reported for each
layer and refused over a bound. Reads two checkpoints tensor by tensor; knows no training and no server.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from loradock_adapters.base import BaseModel, is_embedding
from loradock_adapters.errors import HeaderError
from loradock_adapters.lora_keys import PEFT_PREFIX, suffixes
from loradock_adapters.safetensors_header import read_header
from loradock_train.errors import ExtractError, Problem

Lost = Literal["embeddings", "norms", "biases"]
LOST: tuple[Lost, ...] = ("embeddings", "norms", "biases")

EXACT_UP_TO = 1024
"""A matrix whose smaller side is larger is taken apart by randomised SVD."""
_OVERSAMPLES, _PASSES = 32, 4
_OUTPUT = "lm_head.weight"
_EMBEDDINGS = ("model.embed_tokens.weight", "transformer.wte.weight", "wte.weight")
_TRANSPOSED = {"gpt2"}
"""Families whose linear layers keep their matrices as [in, out]."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One linear layer that was changed."""

    module: str
    rank: int
    error: float
    """|D - B·A| / |D|, Frobenius: 0 is exact, 1 is nothing kept."""
    change: float
    """|D| / |W|"""
    needed_rank: int | None
    """The smallest rank within the bound; None where it was not computed (large layers)."""


@dataclass(frozen=True)
class Extraction:
    """An adapter in the making."""

    layers: tuple[Layer, ...]
    lost: Mapping[Lost, tuple[str, ...]]
    """What was changed and no LoRA on linear layers can carry, by kind."""
    factors: Mapping[str, Tensor]
    """By the names of PEFT's files."""

    @property
    def worst(self) -> Layer:
        return max(self.layers, key=lambda layer: layer.error)


def extract(
    full: Path,
    base_dir: Path,
    base: BaseModel,
    rank: int,
    max_error: float,
    progress: Callable[[str], None] = lambda _module: None,
) -> Extraction:
    """Takes the difference of two checkpoints of one architecture apart.

    Raises ExtractError where they are not of one architecture, or where nothing was changed.
    """
    files, base_files = _Files(full), _Files(base_dir)
    _check_same_tensors(files, base_files)
    layers: list[Layer] = []
    factors: dict[str, Tensor] = {}
    lost: dict[Lost, list[str]] = {kind: [] for kind in LOST}
    transposed = base.config.get("model_type") in _TRANSPOSED
    for name in sorted(files.names | base_files.names):
        own, after = base_files.read(name), files.read(name)
        if torch.equal(own, after):
            continue
        kind = _lost_kind(name, own)
        if kind is not None:
            lost[kind].append(name)
            continue
        module = name.removesuffix(".weight")
        progress(module)
        difference = (after - own).T if transposed else after - own
        b, a, values = truncated_svd(difference, rank)
        size = float(difference.norm())
        error = float((difference - b @ a).norm()) / size
        needed = _needed_rank(values, size, max_error)
        layers.append(Layer(module, a.shape[0], error, size / max(float(own.norm()), 1e-30), needed))
        factors[f"{PEFT_PREFIX}{module}.lora_A.weight"] = a.contiguous()
        factors[f"{PEFT_PREFIX}{module}.lora_B.weight"] = b.contiguous()
    if not layers:
        raise ExtractError("no linear layer differs from the base's: there is nothing to extract")
    return Extraction(tuple(layers), {kind: tuple(names) for kind, names in lost.items() if names}, factors)


def truncated_svd(difference: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """B [out, rank], A [rank, in] and, where it was taken apart in full, all singular values.

    `rank` is lowered to what the matrix has at most.
    """
    rank = min(rank, *difference.shape)
    whole = min(difference.shape) <= EXACT_UP_TO
    if whole:
        u, s, vh = torch.linalg.svd(difference, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(difference, q=min(rank + _OVERSAMPLES, *difference.shape), niter=_PASSES)
        vh = v.T
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank], s if whole else None


def check(extraction: Extraction, max_error: float, dropped: Iterable[str]) -> None:
    """Raises ExtractError with everything that would be lost and nobody agreed to."""
    problems = []
    for kind in sorted(extraction.lost.keys() - set(dropped)):
        names = extraction.lost[kind]
        message = f"{len(names)} changed {kind}, which an adapter on linear layers cannot carry"
        problems.append(Problem(names[0], f"{message}; leave them as the base has them with --drop {kind}"))
    over = [layer for layer in extraction.layers if not layer.error <= max_error]
    if over:
        worst = max(over, key=lambda layer: layer.error)
        message = f"relative error {worst.error:.3g} is over --max-error {max_error:g}, as in {len(over)} layers"
        needed = [layer.needed_rank for layer in over if layer.needed_rank is not None]
        if len(needed) == len(over):
            message += f"; rank {max(needed)} would do"
        problems.append(Problem(worst.module, f"{message}; or serve the full weights by an engine of their own"))
    if problems:
        raise ExtractError("the change is not kept well enough", problems)


def adapter_config(extraction: Extraction, base_name: str, rank: int) -> dict[str, Any]:
    """adapter_config.json; scaling is 1, and layers smaller than the rank have their own."""
    modules = [layer.module for layer in extraction.layers]
    smaller = {layer.module: layer.rank for layer in extraction.layers if layer.rank < rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": smaller,
        "alpha_pattern": dict(smaller),
        "target_modules": modules,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
    }


def short_targets(modules: Iterable[str], base: BaseModel) -> list[str]:
    """The modules by the ends of their names, where all of the base's modules with that end are among them."""
    wanted = set(modules)
    ends = {module.rpartition(".")[2] for module in wanted}
    whole = {end for end in ends if {module for module in base.modules if end in suffixes(module)} <= wanted}
    return sorted(whole | {module for module in wanted if module.rpartition(".")[2] not in whole})


def _needed_rank(values: Tensor | None, size: float, max_error: float) -> int | None:
    """The smallest rank whose left-over singular values are within the bound."""
    if values is None:
        return None
    left = values.double().square().flip(0).cumsum(0).flip(0)  # [k]: what is left over if k are kept
    within = (left <= (max_error * size) ** 2).nonzero()
    return int(within[0]) if len(within) else len(values)


def _lost_kind(name: str, own: Tensor) -> Lost | None:
    """What a changed tensor is, if not a linear layer's matrix."""
    module, _, parameter = name.rpartition(".")
    if parameter == "bias":
        return "biases"
    if own.ndim == 1:
        return "norms"
    if own.ndim != 2:
        raise ExtractError(f"{name} is {list(own.shape)}: fused layers are not taken apart")
    return "embeddings" if is_embedding(module) else None


class _Files:
    """The tensors of a checkpoint directory, read one at a time in float32."""

    def __init__(self, directory: Path) -> None:
        self._places: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in sorted(directory.glob("*.safetensors")):
            try:
                header = read_header(path)
            except HeaderError as error:
                raise ExtractError(f"{path} cannot be read: {error}") from error
            self._places |= dict.fromkeys(header, path)
            self.shapes |= {name: info.shape for name, info in header.items()}
        if not self._places:
            raise ExtractError(f"{directory} holds no safetensors weights")
        self.names = self._places.keys()
        self._embedding = next((name for name in _EMBEDDINGS if name in self._places), _OUTPUT)
        """What the output matrix is where it is tied."""

    def read(self, name: str) -> Tensor:
        name = name if name in self._places or name != _OUTPUT else self._embedding
        with safe_open(self._places[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name).to(torch.float32)
        return tensor


def _check_same_tensors(full: _Files, base: _Files) -> None:
    """A tied output matrix may be in one of the two only; anything else is another architecture."""
    lonely = sorted((full.names ^ base.names) - {_OUTPUT})
    if lonely:
        missing = "the base lacks" if lonely[0] in full.names else "the fine-tune lacks"
        raise ExtractError(f"not of one architecture: {missing} {lonely[0]} (and {len(lonely) - 1} more like it)")
    for name in full.names & base.names:
        if full.shapes[name] != base.shapes[name]:
            shapes = f"{list(full.shapes[name])}, the base's is {list(base.shapes[name])}"
            raise ExtractError(f"not of one architecture: {name} is {shapes}")


def summary(extraction: Extraction, rank: int) -> dict[str, Any]:
    """What was found, for --json and the README."""
    worst = extraction.worst
    return {
        "rank": rank,
        "layers": [
            {"module": x.module, "rank": x.rank, "error": x.error, "change": x.change, "needed_rank": x.needed_rank}
            for x in extraction.layers
        ],
        "worst": {"module": worst.module, "error": worst.error},
        "lost": {kind: list(names) for kind, names in extraction.lost.items()},
    }


def write_json(path: Path, document: object) -> None:
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
