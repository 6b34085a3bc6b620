"""Where each token of a step goes in the KV cache: vLLM's own operator for CPUs, on one thread where a step is small.

The touch is `vllm.utils.cpu_triton_utils._compute_slot_mapping_kernel_impl`, which vLLM's CPU platform puts in the
Triton kernel's place in every worker, right after plug-ins are loaded.
"""

import functools
from typing import Any

from vllm.utils import cpu_triton_utils

from loradock_serve.inside.one_thread import on_one_thread


def use_small_slot_mapping() -> None:
    """Put it in place, once per process."""
    stock = cpu_triton_utils._compute_slot_mapping_kernel_impl
    if stock.__module__ != cpu_triton_utils.__name__ or hasattr(stock, "__wrapped__"):
        return

    @functools.wraps(stock)  # vLLM hands arguments over in the order of the signature
    def slot_mapping(num_tokens: int, *arguments: Any, **named: Any) -> None:
        on_one_thread(num_tokens, functools.partial(stock, num_tokens, *arguments, **named))

    cpu_triton_utils._compute_slot_mapping_kernel_impl = slot_mapping
