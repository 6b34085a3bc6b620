"""Adapters that a worker reads on threads of its own, so that its step need not.

    stage ──▶ reading (a thread) ──▶ ready ──first request──▶ in vLLM's cache ──evicted, asked for──▶ as it was kept
                     └──▶ failed: vLLM's own words

vLLM reads an adapter inside the engine's loop, while everyone waits. Here a thread has vLLM read, check and merge it;
`WorkerLoRAManager.add_adapter`, in the step that schedules the adapter's first request, is handed the result and only
copies it into a slot. What is mapped from a packed file costs no memory of its own and is kept after that, for the
day that vLLM evicts the adapter and wants it again; anything else is kept until it is first used.

One owner: only the engine's loop calls `Staging`; a thread touches nothing but its own entry. Private touches, of
`worker.model_runner.lora_manager`: `_load_adapter`, which is replaced on the instance, and of its `_adapter_manager`
`_create_merged_loras_inplace` (which changes nothing the second time), `modules`, `_is_moe` and `capacity`; of the
layers `lora_a_stacked`, `lora_b_stacked` and `tp_size`. It does not know names, requests or slots.
"""

import ctypes
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open

from loradock_serve.packed_file import TRANSPOSED, WEIGHTS

log = logging.getLogger("loradock.staging")

State = Literal["reading", "ready", "unproven", "failed", "unknown"]
"""`unproven`: read, but only vLLM's activation tells whether it fits (mixtures of experts)."""
READERS = 2
"""Threads a worker; one that hangs on a sick disk leaves another."""
READER_NICENESS = 10
"""The step's threads come first: a tenth of a core is left to a reader where the step wants them all."""
MAX_MAPPED = 2048
"""Adapters kept mapped. Each is a mapping, of which Linux gives a process 65,530, and about 100 KB of objects."""
MADV_POPULATE_READ = 22


@dataclass(eq=False)
class Entry:
    """One adapter, from its staging until it is unloaded."""

    request: Any
    """vLLM's LoRARequest; its `lora_path` is the adapter's identity, and what vLLM would read."""
    packed: str | None
    """A directory with the same adapter, ready to be mapped (packing.py)."""
    reading: "Future[None] | None" = None
    model: Any = None
    """The `LoRAModel`, as long as it is kept."""
    mapped: bool = False


class Staging:
    """Adapters of one worker that are being read, or were. See the top of the file."""

    def __init__(self, lora_manager: Any) -> None:
        self._manager = lora_manager
        self._stock: Callable[[Any], Any] = lora_manager._load_adapter
        lora_manager._load_adapter = self._load
        self._entries: dict[int, Entry] = {}
        self._kept: dict[bool, OrderedDict[int, Entry]] = {True: OrderedDict(), False: OrderedDict()}  # by `mapped`
        self._readers = ThreadPoolExecutor(READERS, "loradock-reader", initializer=_step_back)

    def begin(self, request: Any, packed: str | None) -> None:
        """Start to read an adapter, unless it is known; returns at once."""
        if request.lora_int_id not in self._entries:
            entry = self._entries[request.lora_int_id] = Entry(request, packed)
            entry.reading = self._readers.submit(self._read, entry)

    def look(self, adapter_id: int) -> tuple[State, str]:
        """How far it is, and what was wrong with it where it failed. A failed one is forgotten with this."""
        entry = self._entries.get(adapter_id)
        if entry is None or entry.reading is None:
            return "unknown", ""
        if not entry.reading.done():
            return "reading", ""
        error = entry.reading.exception()
        if error is None:
            self._keep(entry)
            return "unproven" if self._manager._adapter_manager._is_moe else "ready", ""
        if entry.packed is not None:  # what counts is the adapter itself
            log.warning("%s cannot be used, so %s is read: %s", entry.packed, entry.request.lora_path, error)
            entry.packed = None
            entry.reading = self._readers.submit(self._read, entry)
            return "reading", ""
        self.drop(adapter_id)
        return "failed", str(error) or type(error).__name__

    def drop(self, adapter_id: int) -> bool:
        """Forget an adapter; whether its weights were at hand. What a thread still reads of it goes when it is done."""
        entry = self._entries.pop(adapter_id, None)
        for kept in self._kept.values():
            kept.pop(adapter_id, None)
        return entry is not None and entry.model is not None

    def held(self) -> list[int]:
        """Adapters whose weights are at hand."""
        return sorted(adapter_id for adapter_id, entry in self._entries.items() if entry.model is not None)

    def _load(self, request: Any) -> Any:
        """In vLLM's place, inside the step: what was read ahead, else the packed directory, else vLLM's own way."""
        entry = self._entries.get(request.lora_int_id)
        if entry is None or request.load_inplace or entry.request.lora_path != request.lora_path:
            return self._stock(request)
        model = entry.model
        if model is None:
            model, entry.mapped = self._read_now(entry)
        if entry.mapped:
            entry.model = model
            self._keep(entry)
        else:
            entry.model = None
            self._kept[False].pop(request.lora_int_id, None)
        return model

    def _read_now(self, entry: Entry) -> tuple[Any, bool]:
        """As `_read_either`; a packed directory that goes or breaks at this moment must not end the step."""
        try:
            return self._read_either(entry)
        except Exception as error:  # safetensors and PyTorch raise their own kinds
            if entry.packed is None:
                raise
            log.warning("%s cannot be used, so %s is read: %s", entry.packed, entry.request.lora_path, error)
            return self._stock(entry.request), False

    def _keep(self, entry: Entry) -> None:
        """The entry's weights are the newest of their kind; the oldest go where there are too many."""
        if entry.model is None:
            return
        kept = self._kept[entry.mapped]
        kept[entry.request.lora_int_id] = entry
        kept.move_to_end(entry.request.lora_int_id)
        while len(kept) > (MAX_MAPPED if entry.mapped else self._manager._adapter_manager.capacity):
            kept.popitem(last=False)[1].model = None

    def _read(self, entry: Entry) -> None:
        """On a reader's thread. Raises whatever vLLM raises for an adapter that it refuses."""
        model, entry.mapped = self._read_either(entry)
        manager = self._manager._adapter_manager
        manager._create_merged_loras_inplace(model)
        check_shapes(model, manager)
        if entry.mapped:
            populate(model)
        entry.model = model

    def _read_either(self, entry: Entry) -> tuple[Any, bool]:
        """The model, and whether it is mapped: from the packed directory while it is there."""
        from vllm.utils.torch_utils import PIN_MEMORY

        own = entry.request
        if entry.packed is None or not Path(entry.packed).is_dir():
            return self._stock(own), False
        request = type(own)(own.lora_name, own.lora_int_id, entry.packed, is_3d_lora_weight=own.is_3d_lora_weight)
        model = self._stock(request)
        if entry.packed != own.lora_path and _is_transposed(Path(entry.packed)):  # uploads may say what they like
            for layer in model.loras.values():
                layer.lora_b = layer.lora_b.T
        return model, not PIN_MEMORY


def _step_back() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), READER_NICENESS)


def _is_transposed(packed: Path) -> bool:
    """Whether a packed directory holds its B's as (r, o)."""
    with safe_open(packed / WEIGHTS, framework="pt") as file:
        return bool(file.metadata() == TRANSPOSED)


def matrices(model: Any) -> Iterator[tuple[str, list[torch.Tensor | None], list[torch.Tensor | None]]]:
    """Of every layer of a `LoRAModel` its name, its A's (r, h) and its B's (o, r)."""
    for name, layer in model.loras.items():
        if isinstance(layer.lora_a, list):
            yield name, layer.lora_a, layer.lora_b
        else:
            yield name, [layer.lora_a], [layer.lora_b]


def check_shapes(model: Any, manager: Any) -> None:
    """ValueError where a matrix is larger than its place in a slot: to copy it there would end the engine's step."""
    if manager._is_moe:
        return
    for name, all_a, all_b in matrices(model):
        layer = manager.modules.get(name)
        for kind, found in (("a", all_a), ("b", all_b)):
            for matrix, place in zip(found, _places(layer, kind), strict=False):
                room = [size * getattr(layer, "tp_size", 1) for size in place]  # a worker of several keeps a share
                if matrix is not None and any(size > most for size, most in zip(matrix.shape, room, strict=True)):
                    raise ValueError(
                        f"lora_{kind.upper()} of {name} has the shape {list(matrix.shape)}, and a slot of this engine "
                        f"has room for {room}"
                    )


def _places(layer: Any, kind: str) -> list[tuple[int, int]]:
    """Rows and columns that a slot has for each of a layer's A's or B's."""
    stacked = getattr(layer, f"lora_{kind}_stacked", ())
    if isinstance(stacked, torch.Tensor):
        stacked = (stacked,)
    # (slots, 1, rows, columns); the A of an embedding lies there transposed, (slots, columns, rows)
    return [(part.shape[-2], part.shape[-1]) if part.dim() == 4 else (part.shape[2], part.shape[1]) for part in stacked]


def populate(model: Any) -> None:
    """Have the kernel read a mapped model's file and fill the page tables, so that the step's copy waits for neither.

    Advice: a kernel before 5.14 refuses, and the step then takes the page faults.
    """
    tensors = [part for _, all_a, all_b in matrices(model) for part in (*all_a, *all_b) if part is not None]
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    begin = min(tensor.data_ptr() for tensor in tensors) // page_bytes * page_bytes
    end = max(tensor.data_ptr() + tensor.nbytes for tensor in tensors)
    libc = ctypes.CDLL(None)  # its functions let other threads run meanwhile
    libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_POPULATE_READ)
