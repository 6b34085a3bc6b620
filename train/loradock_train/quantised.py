"""What bitsandbytes does for a run: a base kept in 4 or 8 bits. Imports it only where it is asked for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from loradock_train.config_quantisation import QuantisationOptions
from loradock_train.errors import ModelError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_quantisation(options: QuantisationOptions | None) -> None:
    """Raises ModelError where bitsandbytes is not installed."""
    if options is not None and find_spec("bitsandbytes") is None:
        raise ModelError("quantisation needs bitsandbytes, which is not installed: pip install 'loradock[quantised]'")


def loading_options(options: QuantisationOptions | None, arithmetic: str) -> dict[str, Any]:
    """What `from_pretrained` is told, nothing without the section. arithmetic: no, bf16 or fp16."""
    if options is None:
        return {}
    from transformers import BitsAndBytesConfig

    by_arithmetic = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(arithmetic, torch.float32)
    compute = by_arithmetic if options.compute_dtype == "auto" else _DTYPES[options.compute_dtype]
    if options.load_in == "8bit":
        wanted = BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
    else:
        wanted = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type=options.quant_type,
            bnb_4bit_compute_dtype=compute,
            bnb_4bit_use_double_quant=options.double_quant,
        )
    where = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": wanted, "device_map": {"": where}}


BLOCKS = {"4bit": 64, "scales": 256}
"""Numbers that share a scale, and scales that share one of their own, as bitsandbytes divides them."""


@dataclass(frozen=True)
class FewBits:
    """What quantisation makes of a model's weights."""

    saved_bytes: int
    """How much less memory they take than in whole."""
    largest_numbers: int
    """Of one weight."""


def in_few_bits(model: nn.Module, options: QuantisationOptions) -> FewBits:
    """Of a model in whole, on torch's meta device: every linear layer is kept in few bits but the head and an
    adapter's own."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    head = inner.get_output_embeddings()
    kept = {id(module) for module in (head.modules() if head is not None else ())}
    weights = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in kept and ".lora_" not in name
    ]
    saved = sum(weight.nbytes - quantised_bytes(weight.shape, options) for weight in weights)
    return FewBits(saved, max((weight.numel() for weight in weights), default=0))


def quantised_bytes(shape: Sequence[int], options: QuantisationOptions) -> int:
    """Of a linear layer's weight of rows x columns, with its scales."""
    numbers = math.prod(shape)
    if options.load_in == "8bit":
        return numbers + 4 * shape[0]
    scales = math.ceil(numbers / BLOCKS["4bit"])
    scale_bytes = scales + 4 * math.ceil(scales / BLOCKS["scales"]) if options.double_quant else 4 * scales
    return math.ceil(numbers / 2) + scale_bytes


def keep_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes (0.49) from repacking 4-bit weights for inference.

    On CPUs with AVX512-BF16 the first forward in eval mode does so, and every later one, in training too, takes a
    kernel that has no gradient: the layers below would learn nothing, with no more than a warning.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
