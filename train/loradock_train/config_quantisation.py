"""The section of a base that is kept in few bits while an adapter over it is trained (QLoRA).

Knows keys, units and defaults; quantised.py loads such a base.
"""

from typing import Literal

from loradock_train.config_sections import Section


class QuantisationOptions(Section):
    """Keeps the frozen base in 4 or 8 bits, by bitsandbytes. Only for LoRA runs; the adapter itself is as ever."""

    load_in: Literal["4bit", "8bit"]
    """Bits of a weight of the base's linear layers. Embedding, head and norms stay as they are."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 4-bit numbers: for normally distributed weights, or plain floats. Default nf4."""

    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type in which 4-bit weights are multiplied. Default auto: that of the run's arithmetic."""

    double_quant: bool = False
    """Quantise the scales of 4-bit weights, too: 0.4 bits a weight less. Default false."""
