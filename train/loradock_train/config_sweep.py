"""The entries of `sweep:`: what sets one adapter of several apart.

Knows keys and bounds; sweep.py trains them.
"""

from typing import Annotated

from pydantic import Field

from loradock_train.config_sections import Names, Section


class SweepEntry(Section):
    """One adapter of a sweep. What is not given is as in the rest of the config."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Name of the adapter, and of its run directory below that of the sweep."""

    learning_rate: float | None = Field(default=None, gt=0)
    """See learning_rate."""

    seed: int | None = Field(default=None, ge=0, lt=2**32)
    """See seed."""

    r: int | None = Field(default=None, ge=1, le=4096)
    """See lora_config.r."""

    lora_alpha: float | None = Field(default=None, gt=0)
    """See lora_config.lora_alpha."""

    lora_dropout: float | None = Field(default=None, ge=0, lt=1)
    """See lora_config.lora_dropout."""

    target_modules: Annotated[Names, Field(min_length=1)] | None = None
    """See lora_config.target_modules."""

    use_rslora: bool | None = None
    """See lora_config.use_rslora."""
