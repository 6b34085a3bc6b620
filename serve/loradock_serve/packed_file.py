"""An adapter rewritten into the form that an engine reads fastest: a PEFT directory that needs no work to be read.

    synced                       empty; there once the others are on the disk for certain
    adapter_config.json          as it was, with every scaling 1
    adapter_model.safetensors    every tensor in the engine's `lora_dtype`, B's already multiplied by their scaling and,
                                 where the metadata says `{"b": "transposed"}`, transposed: (r, o), as they lie in the
                                 slots of our CPU kernel; the tensors begin on a page, and lie 64-byte aligned

It is mapped as it lies: no conversion, no private copy for vLLM's `lora_b *= scaling`. The values are bit for bit what
vLLM makes of the original. Written under another name and renamed by the caller (packing.py). No torch: numpy,
in small chunks. Knows nothing of digests or engines.
"""

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from loradock_adapters.errors import LoradockError
from loradock_adapters.lora_keys import LoraKey, Numbers, RankPatterns, parse_key
from loradock_adapters.safetensors_header import DTYPE_BITS, TensorInfo, read_header

VERSION = 1
"""Of what this module writes: to be raised when the same adapter would be written differently, so that nobody reads
what an older Loradock made."""
WEIGHTS, CONFIG, SYNCED = "adapter_model.safetensors", "adapter_config.json", "synced"
DTYPES: Mapping[str, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Number formats of engines, as safetensors calls them."""
FORMS = tuple(f"{dtype}{device}" for dtype in DTYPES for device in ("", "-cpu"))
"""Packed forms: the engine's `lora_dtype`, and whether B's are transposed for slots on CPU."""
TRANSPOSED = {"b": "transposed"}
PAGE_BYTES, ALIGN_BYTES = 4096, 64
CHUNK_VALUES = 1 << 16
"""Values converted at once: they stay in a core's cache."""

Floats = npt.NDArray[np.float32]


class Recipe:
    """What an adapter needs to be rewritten in one of FORMS: each tensor's place and scaling."""

    def __init__(self, directory: Path, form: str) -> None:
        """Reads the config and the header. NotPackableError where the adapter is not plain LoRA of linear layers and
        embeddings; HeaderError, OSError or ValueError where its files are not what the gate let pass."""
        self.source = directory / WEIGHTS
        self.config: dict[str, Any] = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        dtype, _, device = form.partition("-")
        self.dtype = DTYPES[dtype]
        self.transposes = device == "cpu"
        self.tensors = read_header(self.source)
        keys = [parse_key(name) for name in self.tensors]
        if any(key.part not in ("A", "B", "embedding_A", "embedding_B") or ".experts" in key.module for key in keys):
            raise NotPackableError("only A's and B's of linear layers and embeddings are packed")
        if any(tensor.dtype not in DTYPES.values() for tensor in self.tensors.values()):
            raise NotPackableError("its tensors are in another number format than float32, bfloat16 and float16")
        self.scalings = dict(zip(self.tensors, self._scalings(keys), strict=True))

    @property
    def is_needed(self) -> bool:
        """Whether anything would change but where the tensors begin."""
        return (
            self.transposes
            or any(tensor.dtype != self.dtype for tensor in self.tensors.values())
            or any(scaling != 1 for scaling in self.scalings.values())
        )

    def _scalings(self, keys: list[LoraKey]) -> Iterator[float]:
        """What vLLM multiplies each tensor with (vllm/lora/peft_helper.py get_rank_and_scaling)."""
        config = self.config
        ranks = RankPatterns(config["r"], config.get("rank_pattern") or {})
        alphas = Numbers(config["lora_alpha"], config.get("alpha_pattern") or {})
        for key in keys:
            rank = ranks.rank_of(key.module)
            by = math.sqrt(rank) if config.get("use_rslora") else rank
            yield alphas.of(key.module) / by if key.part in ("B", "embedding_B") else 1.0

    def write(self, directory: Path) -> None:
        """Write both files into an empty directory. They are on the disk for certain only after `sync`."""
        rank = self.config["r"]
        patterns = self.config.get("rank_pattern") or {}
        neutral = {"lora_alpha": rank, "alpha_pattern": patterns, "use_rslora": False}
        _write(directory / CONFIG, [json.dumps(self.config | neutral, indent=2).encode()])
        # Odd sizes last, so that every other tensor is aligned: safetensors has no room between tensors.
        order = sorted(self.tensors, key=lambda name: (self._size_bytes(name) % ALIGN_BYTES != 0, name))
        with self.source.open("rb") as file:
            _write(directory / WEIGHTS, self._parts(order, file))

    def _size_bytes(self, name: str) -> int:
        return math.prod(self.tensors[name].shape) * DTYPE_BITS[self.dtype] // 8

    def _parts(self, order: list[str], file: BinaryIO) -> Iterator[bytes]:
        header: dict[str, Any] = {"__metadata__": TRANSPOSED} if self.transposes else {}
        position = 0
        for name in order:
            end = position + self._size_bytes(name)
            shape = self.tensors[name].shape[:: -1 if self._is_transposed(name) else 1]
            header[name] = {"dtype": self.dtype, "shape": list(shape), "data_offsets": [position, end]}
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % PAGE_BYTES)
        yield struct.pack("<Q", len(text)) + text
        for name in order:
            tensor = self.tensors[name]
            values = _values(file, tensor)
            if self._is_transposed(name):
                whole = np.concatenate([np.empty(0, "<f4"), *values]).reshape(tensor.shape)
                values = iter([np.ascontiguousarray(whole.T).reshape(-1)])
            for chunk in values:
                yield _encoded(chunk, self.scalings[name], self.dtype)

    def _is_transposed(self, name: str) -> bool:
        return self.transposes and parse_key(name).part in ("B", "embedding_B")


class NotPackableError(ValueError):
    """The adapter is of a kind that is left as it is."""


def sync(directory: Path) -> None:
    """Have a packed directory on the disk, and leave a mark that says so. OSError, also where it is gone."""
    for path in (directory / CONFIG, directory / WEIGHTS, directory, directory.parent):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    (directory / SYNCED).touch()


def is_whole(directory: Path) -> bool:
    """Whether a packed directory was synced, and has both its files, and its weights the size that the header says."""
    try:
        if not (directory / SYNCED).is_file():
            return False
        json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        read_header(directory / WEIGHTS)
    except (OSError, ValueError, LoradockError):
        return False
    return True


def _values(file: BinaryIO, tensor: TensorInfo) -> Iterator[Floats]:
    """The values of a tensor in chunks, as float32, which holds each format's values exactly."""
    file.seek(tensor.offsets[0])
    value_bytes = DTYPE_BITS[tensor.dtype] // 8
    left = tensor.size_bytes
    while left:
        chunk = file.read(min(left, CHUNK_VALUES * value_bytes))
        if not chunk:
            raise ValueError(f"{left} bytes of a tensor are missing")
        left -= len(chunk)
        yield _decoded(chunk, tensor.dtype)


def _decoded(chunk: bytes, dtype: str) -> Floats:
    match dtype:
        case "F32":
            return np.frombuffer(chunk, "<f4")
        case "F16":
            return np.frombuffer(chunk, "<f2").astype("<f4")
        case _:
            return (np.frombuffer(chunk, "<u2").astype("<u4") << 16).view("<f4")


def _encoded(values: Floats, scaling: float, dtype: str) -> bytes:
    """As vLLM does it: first into the engine's format, then multiplied in it (which computes in float32)."""
    rounded = _rounded(values, dtype)
    if scaling != 1:
        rounded = _rounded(_decoded(rounded.tobytes(), dtype) * np.float32(scaling), dtype)
    return rounded.tobytes()


def _rounded(values: Floats, dtype: str) -> npt.NDArray[Any]:
    """To the nearest value of the format, ties to even. The gate lets no NaN pass."""
    match dtype:
        case "F32":
            return values
        case "F16":
            with np.errstate(over="ignore"):
                return values.astype("<f2")
        case _:
            bits = values.view("<u4")
            upper: npt.NDArray[np.uint16] = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype("<u2")
            return upper


def _write(path: Path, parts: Iterable[bytes]) -> None:
    with path.open("xb") as file:
        for part in parts:
            file.write(part)
