"""The second repair: the base's own matrices, which PEFT saves beside adapters on embeddings, are left out.

Only those that are the base's, value by value, streamed from its weights. One that differs was trained, or belongs to
another base: it stays, and keeps the adapter off the shared engine, which would ignore it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loradock_adapters.base import BaseModel
from loradock_adapters.errors import HeaderError
from loradock_adapters.lora_keys import parse_key
from loradock_adapters.safetensors_header import TensorInfo, read_header
from loradock_adapters.tensor_files import TensorStream, stream_of

_ITEMS = 1 << 20
"""Values that are compared at a time."""
_TIED = {"lm_head": ("model.embed_tokens", "embed_tokens", "transformer.wte", "wte")}
"""Where a tied output matrix lies in the weights."""


@dataclass(frozen=True)
class BaseWeights:
    """The weights of a base in a local directory."""

    directory: Path

    @cached_property
    def _tensors(self) -> Mapping[str, tuple[Path, TensorInfo]]:
        found: dict[str, tuple[Path, TensorInfo]] = {}
        for path in sorted(self.directory.glob("*.safetensors")):
            try:
                found |= {name: (path, info) for name, info in read_header(path).items()}
            except HeaderError:
                return {}
        return found

    def matrix(self, module: str, parameter: str = "weight") -> TensorStream | None:
        """A module's own tensor; None where it has none here."""
        for name in (module, *_TIED.get(module, ())):
            if (place := self._tensors.get(f"{name}.{parameter}")) is not None:
                return stream_of(*place)
        return None


def copies_of_the_base(
    tensors: Mapping[str, TensorStream], config: Mapping[str, Any], base: BaseModel, weights: BaseWeights
) -> tuple[list[str], list[str]]:
    """The tensors that are the base's own, and those under such names that are not; what cannot be told is in neither.

    Whole matrices that `modules_to_save` names are neither: they were meant to be trained.
    """
    saved = config.get("modules_to_save") or []
    equal: list[str] = []
    different: list[str] = []
    for name, tensor in tensors.items():
        key = parse_key(name)
        kept = key.part == "base_layer" or (
            key.part == "full" and not any(key.module.endswith(str(module)) for module in saved)
        )
        own = weights.matrix(key.module) if kept and base.has(key.module) else None
        if own is None:
            continue
        same = is_same(tensor, own)
        if same is not None:
            (equal if same else different).append(name)
    return equal, different


def is_same(copy: TensorStream, own: TensorStream) -> bool | None:
    """Whether a copy holds the base's values: the same bits, or the same in the copy's own number format.

    Training may have held the base in a wider format than its file has (then the copy must be exactly it), or in a
    narrower (then it must be what rounding makes of it). None where telling takes numpy, and it is not there.
    """
    if copy.shape != own.shape:
        return False
    pairs = zip(copy.read(copy.item_bytes * _ITEMS), own.read(own.item_bytes * _ITEMS), strict=True)
    if copy.dtype == own.dtype:
        return all(mine == other for mine, other in pairs)
    if not {copy.dtype, own.dtype} <= {"F16", "BF16", "F32"}:
        return False
    if find_spec("numpy") is None:
        return None
    return all(mine == _cast(other, own.dtype, copy.dtype) for mine, other in pairs)


def _cast(raw: bytes, dtype: str, wanted: str) -> bytes:
    """The same values in another format, to the nearest and from a tie to the even, as torch does it."""
    import numpy as np

    if dtype == "BF16":
        values = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    else:
        values = np.frombuffer(raw, {"F16": "<f2", "F32": "<f4"}[dtype]).astype("<f4")
    if wanted == "BF16":
        bits = values.view("<u4").astype(np.uint64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    with np.errstate(over="ignore"):  # what is too large becomes infinite there, too
        return values.astype({"F16": "<f2", "F32": "<f4"}[wanted]).tobytes()
