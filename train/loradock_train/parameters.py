"""Which parameters a run trains, and how many they are: chosen by name patterns, counted for each module.

Works on models without weights (the meta device) as on real ones. Knows nothing of configs, data or training.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from peft.tuners.lora import LoraLayer
from torch import nn

from loradock_train.errors import ModelError

MAX_ROWS = 12
"""Of the table: beyond it, modules are put together by the first parts of their names."""
_WRAPPERS = re.compile(
    r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|modules_to_save|original_module|base_layer|default)(?=\.|$)"
)


@dataclass(frozen=True)
class ParameterCount:
    """How much of a model, or of a part of it, is trained."""

    trainable: int
    total: int

    @property
    def share(self) -> float:
        """Trainable over total."""
        return self.trainable / self.total if self.total else 0.0


@dataclass(frozen=True)
class ModuleCount:
    """The same of the modules of one name; `*` stands for the number of a layer."""

    name: str
    trainable: int
    total: int


@dataclass(frozen=True)
class LowRank:
    """What the adapter has in the place of what it adapts: for each W of m x n, A of r x n and B of m x r."""

    matrices: int
    full: int
    """Numbers in all W."""
    low: int
    """Numbers in all A and B."""


def size_of(parameter: nn.Parameter) -> int:
    """Its numbers; those of a 4-bit matrix, which is stored packed, as before it was packed."""
    state: Any = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def count_parameters(model: nn.Module) -> ParameterCount:
    """Parameters by number; tied ones once."""
    sizes = [(size_of(p), p.requires_grad) for p in model.parameters()]
    return ParameterCount(sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes))


def select_trainable(model: nn.Module, patterns: Sequence[str]) -> None:
    """Train the parameters in whose name one of the regular expressions is found, and freeze all others.

    Raises ModelError for a pattern that finds none.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            parts = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
            raise ModelError(
                f"trainable: no parameter of this model has {pattern!r} in its name; names are made of "
                f"{', '.join(parts)}"
            )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(re.search(pattern, name) for pattern in patterns))


def count_by_module(model: nn.Module, max_rows: int = MAX_ROWS) -> list[ModuleCount]:
    """In the model's order, at most `max_rows`."""
    found = [
        (_module_of(name), size_of(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()
    ]
    depth = max((len(path) for path, _, _ in found), default=1)
    while depth > 1 and len({path[:depth] for path, _, _ in found}) > max_rows:
        depth -= 1
    counts: dict[tuple[str, ...], list[int]] = {}
    for path, size, trained in found:
        count = counts.setdefault(path[:depth], [0, 0])
        count[0] += size if trained else 0
        count[1] += size
    return [
        ModuleCount(".".join(path).removesuffix(".*"), trainable, total) for path, (trainable, total) in counts.items()
    ]


def _module_of(parameter: str) -> tuple[str, ...]:
    """`base_model.model.model.layers.3.mlp.up_proj.lora_A.default.weight` is of model.layers.*.mlp.up_proj."""
    name = _WRAPPERS.sub("", parameter.removeprefix("base_model.model."))
    parts = ["*" if part.isdigit() else part for part in name.split(".")]
    return tuple(parts[:-1] if parts[-1] in ("weight", "bias") and len(parts) > 1 else parts)


def low_rank(model: nn.Module) -> LowRank | None:
    """The arithmetic of its adapter; None where it has none."""
    matrices = full = low = 0
    for module in model.modules():
        if isinstance(module, LoraLayer) and module.r:
            matrices += 1
            full += size_of(cast(nn.Parameter, module.get_base_layer().weight))
            low += sum(
                parameter.numel()
                for name, parameter in module.named_parameters()
                if re.search(r"lora_(embedding_)?[AB]\b", name)
            )
    return LowRank(matrices, full, low) if matrices else None


# ---- as it is told -------------------------------------------------------------------------------------------------


def parameter_lines(model: nn.Module) -> list[str]:
    """A short table, where not everything is trained; and the arithmetic of low rank."""
    rows = count_by_module(model)
    lines: list[str] = []
    if any(row.trainable < row.total for row in rows):
        width = max(len(row.name) for row in rows)
        lines = [f"  {'module':<{width}} {'trained':>15} {'of':>15} {'share':>9}"]
        for row in rows:
            share = row.trainable / row.total if row.total else 0.0
            lines.append(f"  {row.name:<{width}} {row.trainable:>15,} {row.total:>15,} {share:>9.3%}")
    arithmetic = low_rank(model)
    if arithmetic is not None:
        noun = "matrix W" if arithmetic.matrices == 1 else "matrices W"
        lines.append(
            f"  low rank: {arithmetic.matrices:,} {noun} of {arithmetic.full:,} numbers, adapted by A and B of "
            f"{arithmetic.low:,} ({arithmetic.low / arithmetic.full:.3%})"
        )
    return lines


def parameter_report(model: nn.Module) -> dict[str, Any]:
    """For run.json."""
    count, arithmetic = count_parameters(model), low_rank(model)
    return {
        "trainable": count.trainable,
        "total": count.total,
        "share": count.share,
        "modules": [asdict(row) for row in count_by_module(model)],
        "low_rank": None if arithmetic is None else asdict(arithmetic),
    }
