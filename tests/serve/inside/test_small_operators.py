"""Rotary embeddings, writes into the KV cache and slot mappings in place of vLLM's: the same numbers, and one thread
where a step is small."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm._custom_ops as ops
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.llama3_rope import Llama3RotaryEmbedding
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from loradock_serve.inside.cpu_attention import SmallWrites, SmallWritesBackend
from loradock_serve.inside.cpu_rotary import (
    SmallLlama3RotaryEmbedding,
    SmallRotaryEmbedding,
    use_small_rotary_embeddings,
)
from loradock_serve.inside.one_thread import SMALL_ELEMENTS

HEADS, HEAD = 2, 32
PLAIN: dict[str, Callable[[], RotaryEmbedding]] = {
    "plain": lambda: RotaryEmbedding(HEAD, HEAD, 512, 10_000, True, torch.float32),
    "llama3": lambda: Llama3RotaryEmbedding(HEAD, HEAD, 512, 10_000, True, torch.float32, 8.0, 1.0, 4.0, 256),
}
KINDS = {"plain": SmallRotaryEmbedding, "llama3": SmallLlama3RotaryEmbedding}
SIZES = {"small": 5, "large": SMALL_ELEMENTS // (HEADS * HEAD) + 1}


pytestmark = pytest.mark.usefixtures("two_threads")


def noting_threads(operator: Callable[..., Any], noted: list[int]) -> Callable[..., Any]:
    def run(*arguments: Any, **named: Any) -> Any:
        noted.append(torch.get_num_threads())
        return operator(*arguments, **named)

    return run


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("size", SIZES)
def test_rotary_embedding_in_place_of_vllms_equals_it(kind: str, size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for plain in (RotaryEmbedding, Llama3RotaryEmbedding):
        monkeypatch.delitem(op_registry_oot, plain.__name__, raising=False)
    with set_current_vllm_config(VllmConfig()):
        theirs = PLAIN[kind]()
        use_small_rotary_embeddings()
        use_small_rotary_embeddings()  # every process loads plug-ins, some twice
        ours = PLAIN[kind]()
    rows, noted = SIZES[size], list[int]()
    positions = torch.arange(rows) % 300
    query, key = torch.randn(2, rows, HEADS * HEAD)
    wanted = theirs.forward_native(positions, query.clone(), key.clone())
    monkeypatch.setattr(ops, "rotary_embedding", noting_threads(ops.rotary_embedding, noted))

    got = ours.forward_cpu(positions, query.clone(), key.clone())

    assert type(ours) is KINDS[kind]
    assert type(theirs) is not KINDS[kind]
    assert noted == [1 if size == "small" else 2]
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("size", SIZES)
def test_write_into_the_cache_equals_vllms(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, block = SIZES[size], 32
    key, value = torch.randn(2, rows, HEADS, HEAD)
    slots = torch.randperm(2 * rows + block)[:rows]
    layer = SimpleNamespace(isa="vec", _k_scale_float=1.0, _v_scale_float=1.0)
    caches = [torch.zeros((2 * rows) // block + 2, HEADS, block, 2 * HEAD) for _ in range(2)]
    config = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.float32))
    monkeypatch.setattr(cpu_attn, "get_current_vllm_config", lambda: config)
    theirs, ours = (
        kind(HEADS, HEAD, 1.0, HEADS, None, None, "auto") for kind in (CPUAttentionBackendImpl, SmallWrites)
    )
    theirs.do_kv_cache_update(layer, key, value, caches[0], slots)  # type: ignore[arg-type]
    noted: list[int] = []
    monkeypatch.setattr(ops, "cpu_attn_reshape_and_cache", noting_threads(ops.cpu_attn_reshape_and_cache, noted))

    ours.do_kv_cache_update(layer, key, value, caches[1], slots)  # type: ignore[arg-type]

    assert noted == [1 if size == "small" else 2]
    assert torch.equal(*caches)
    assert caches[1].count_nonzero() == 2 * rows * HEADS * HEAD


def test_backend_is_vllms_but_for_its_writes() -> None:
    assert SmallWritesBackend.get_impl_cls() is SmallWrites
    assert SmallWritesBackend.get_name() == CPUAttentionBackend.get_name()
    assert SmallWritesBackend.get_builder_cls() is CPUAttentionBackend.get_builder_cls()


# As a worker does: the platform's own functions come after the plug-ins, and must not undo ours.
WORKER = """
import torch
from loradock_serve.inside.plugin import register
from vllm.platforms import current_platform
register(); register()
current_platform.register_triton_kernel_overrides()
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.block_table import ComputeSlotMappingKernel
current_platform.import_kernels()
torch.set_num_threads(2)
torch.get_num_threads()  # a thread's first look sets the number anew
noted = []
stock = torch.ops._C.compute_slot_mapping_kernel_impl
def noting(*arguments):
    noted.append(torch.get_num_threads())
    stock(*arguments)
torch.ops._C.compute_slot_mapping_kernel_impl = noting
mapping = torch.full((8,), -1)
ComputeSlotMappingKernel.kernel[(3,)](
    num_tokens=5, max_num_tokens=8, query_start_loc_ptr=torch.tensor([0, 2, 5], dtype=torch.int32),
    positions_ptr=torch.tensor([40, 41, 3, 4, 5]), block_table_ptr=torch.tensor([[4, 7], [9, 0]], dtype=torch.int32),
    block_table_stride=2, slot_mapping_ptr=mapping, KV_CACHE_BLOCK_SIZE=32, TOTAL_CP_WORLD_SIZE=1, TOTAL_CP_RANK=0,
    CP_KV_CACHE_INTERLEAVE_SIZE=1, PAD_ID=-1, BLOCK_SIZE=1024,
)
print(mapping[:5].tolist(), noted, torch.get_num_threads())
print(AttentionBackendEnum.CPU_ATTN.get_class().__name__)
"""


def test_worker_with_the_plugin_writes_and_maps_slots_by_ours() -> None:
    openmp = Path(torch.__file__).parent / "lib" / "libgomp.so.1"  # which vLLM preloads
    environment = {**os.environ, "LD_PRELOAD": str(openmp) if openmp.exists() else ""}
    done = subprocess.run([sys.executable, "-c", WORKER], capture_output=True, text=True, check=True, env=environment)

    assert done.stdout.splitlines()[-2:] == ["[232, 233, 291, 292, 293] [1] 2", "SmallWritesBackend"]
