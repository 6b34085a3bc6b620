"""The parts of a training configuration that are sections of their own, and what all sections share.

Knows keys, units, defaults and bounds; config.py puts them together.
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def as_tuple(value: Any) -> Any:
    """A single path stands for a list of one; YAML lists become tuples, since the config is frozen."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def as_steps(value: Any) -> Any:
    """A whole number of steps, or, below 1, a share of the run's, as transformers means it."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (is_number and (0 < value < 1 or (value >= 1 and value % 1 == 0))):
        raise ValueError("must be a whole number of steps (1 or more), or a share of the run's steps between 0 and 1")
    return int(value) if is_number and value >= 1 else value


def list_as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Paths = Annotated[
    tuple[str, ...], BeforeValidator(as_tuple, json_schema_input_type=str | tuple[str, ...]), Field(min_length=1)
]
Steps = Annotated[
    int | float,
    BeforeValidator(as_steps, json_schema_input_type=Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)]),
]
Names = Annotated[tuple[str, ...], BeforeValidator(list_as_tuple)]


def as_pattern(value: str) -> str:
    """`all-linear`, or a regular expression; a bare name is neither, and was meant as a list of one."""
    if value != "all-linear" and re.fullmatch(r"\w+", value):
        raise ValueError(f"must be 'all-linear' or a regular expression; for all modules of a name write [{value}]")
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"must be 'all-linear' or a regular expression: {error}") from None
    return value


Pattern = Annotated[str, AfterValidator(as_pattern)]


def as_expression(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{value!r} is no regular expression: {error}") from None
    return value


Expression = Annotated[str, AfterValidator(as_expression)]


class Section(BaseModel):
    """What every part of the configuration shares: strict types, frozen, unknown keys refused."""

    model_config = ConfigDict(
        strict=True,
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )


class LoraOptions(Section):
    """The low-rank adapter. Its presence in the YAML makes the run a LoRA run. The fields are PEFT's `LoraConfig`'s."""

    r: int = Field(default=8, ge=1, le=4096)
    """Rank: the inner size of the two low-rank matrices. Default 8, minimum 1. vLLM serves up to its max_lora_rank."""

    lora_alpha: float = Field(default=16, gt=0)
    """The update is scaled by lora_alpha / r (or lora_alpha / sqrt(r) with use_rslora). Default 16."""

    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the adapter's inputs dropped during training, 0 up to 1. Default 0."""

    target_modules: Annotated[Names, Field(min_length=1)] | Pattern = "all-linear"
    """A list of names of the modules that get an adapter, or `all-linear`: every linear layer but the head.
    `embed_tokens` and `lm_head` may be named. Any other text is a regular expression that the whole name must match."""

    exclude_modules: Names = ()
    """Names that are left out although `target_modules` matches them. Default none."""

    modules_to_save: Names = ()
    """Modules trained in full and saved whole beside the adapter. Default none. Such a checkpoint needs a dedicated
    engine."""

    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained. Default none; anything else needs a dedicated engine."""

    fan_in_fan_out: bool = False
    """True where weights are stored as (in, out), as GPT-2's Conv1D does. PEFT sets it itself for such layers.
    Default false."""

    init_lora_weights: bool | Literal["gaussian", "orthogonal"] = True
    """How A and B start. True: A uniform, B zero (the adapter starts as nothing). Default true."""

    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    """The task. Only CAUSAL_LM."""

    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r): steadier at high ranks. Default false."""

    use_dora: bool = False
    """Weight-decomposed LoRA. Default false; true needs a dedicated engine."""

    loraplus_lr_ratio: float | None = Field(default=None, ge=1)
    """LoRA+: the B matrices learn with that many times the learning rate. 16 is usual. Default: like A."""

    rank_pattern: dict[Expression, Annotated[int, Field(ge=1, le=4096)]] = Field(default_factory=dict)
    """Module name (or regular expression) to a rank of its own. Default none."""

    alpha_pattern: dict[Expression, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Module name (or regular expression) to a lora_alpha of its own. Default none."""


class TokenizerOptions(Section):
    """Where the tokenizer of a from-scratch model comes from: a path or hub id, or trained on the run's own data."""

    path: str | None = None
    """Directory or hub id of an existing tokenizer. Default: none, one is trained."""

    train_vocab_size: int | None = Field(default=None, ge=300)
    """Entries of the byte-level BPE trained on the training data, special tokens included. Minimum 300."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.train_vocab_size is None):
            raise ValueError("give exactly one of path and train_vocab_size")
        return self
