"""The configuration of a training run: one frozen, typed object.

Knows every key, its unit, default and bounds. Does not read files (config_file.py does), and does not look at data
or models. The keys are those of the LoRA-vs-full template this project grew from; ours stand beside them. Presence
of `lora_config` alone decides between LoRA and full-parameter training.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from loradock_train.architectures import with_named
from loradock_train.config_fsdp import FsdpOptions
from loradock_train.config_preference import PreferenceOptions
from loradock_train.config_quantisation import QuantisationOptions
from loradock_train.config_rules import require_keys_that_fit
from loradock_train.config_scratch import Expected, SampleOptions
from loradock_train.config_sections import (
    LoraOptions,
    Names,
    Paths,
    Section,
    Steps,
    TokenizerOptions,
    as_tuple,
    list_as_tuple,
)
from loradock_train.config_similarity import SimilarityOptions
from loradock_train.config_sweep import SweepEntry
from loradock_train.config_task import EarlyStopping, TaskOptions

OPTIMISERS = (
    "adamw_torch_fused",
    "adamw_torch",
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "adafactor",
    "sgd",
)

Tracker = Literal["tensorboard", "wandb", "mlflow"]


class TrainConfig(Section):
    """Everything that decides a training run."""

    # ---- what to start from -------------------------------------------------------------------------------------
    model_id: str | None = None
    """Hub id, or path of a model directory (the `checkpoint` of another run, too), or its URL (s3://…). Or give `model`
    instead."""

    model: Annotated[dict[str, Any] | None, BeforeValidator(with_named)] = None
    """Architecture to train from scratch: `model_type` (llama, qwen3, gpt2, …) and any field of that transformers
    config; or `name` (gpt2-small, gpt2-medium, gpt2-large, gpt2-small-6-layers, gpt2-1b) instead of them."""

    tokenizer: TokenizerOptions | None = None
    """The tokenizer of a from-scratch model. With `model_id` the model's own is used."""

    lora_config: LoraOptions | None = None
    """The adapter. Present: LoRA. Absent: full-parameter training."""

    quantisation: QuantisationOptions | None = None
    """Keep the frozen base of a LoRA run in 4 or 8 bits (QLoRA). Default none."""

    trainable: Annotated[Names, Field(min_length=1)] | None = None
    """Which parameters a full-parameter run trains, as a list of regular expressions: each is searched for in the names
    of the parameters, one that is found is enough, and everything else stays frozen. `(text_model|connector).*proj`:
    names with text_model or connector, and proj behind it. The checkpoint is whole all the same. Default:
    everything."""

    adapter_path: str | None = None
    """Adapter (or run) whose training goes on, on the same base. Its rank, targets and scale are read from it, so
    lora_config may be left out. Default none: a new adapter."""

    sweep: Annotated[tuple[SweepEntry, ...], BeforeValidator(list_as_tuple)] = ()
    """Several adapters on one base in memory: a list of `name` and what sets each apart (learning_rate, seed, r,
    lora_alpha, lora_dropout, target_modules, use_rslora). Default none."""

    # ---- data -----------------------------------------------------------------------------------------------------
    train_path: Paths
    """Training data: a .jsonl or .txt file (also .gz, .zst), a directory of them, a URL, or a list. Relative paths are
    relative to the YAML."""

    valid_path: Paths | None = None
    """Validation data, in the same format. Default none: no validation loss."""

    streaming: bool = False
    """Read the training data while the run goes on, and never hold it as a whole. Needs max_steps, max_time_s or
    num_epochs. Default false."""

    shuffle_buffer: int = Field(default=2000, ge=1)
    """Rows of a stream that are read, shuffled and packed together (at most 8 MiB of text). Default 2000, minimum 1."""

    format: Literal["auto", "chat", "instruction", "completion", "text", "preference"] = "auto"
    """What the rows are. `auto` decides by the keys, and every row must agree. Default auto."""

    prompt_template: str | None = None
    """Prompt of an instruction row, with {instruction} and {input}. Default: the Alpaca prompt."""

    chat_template: str | None = None
    """Jinja chat template, or the path of a .jinja file. Default: the tokenizer's own, else ChatML for chat rows."""

    append_eos: bool = True
    """End each answer and document with the end-of-text token, so that the model learns to stop. Default true."""

    context_length: int = Field(default=512, ge=8)
    """Longest row, in tokens. Default 512, minimum 8."""

    on_long_rows: Literal["error", "truncate", "drop"] = "error"
    """What to do with rows over context_length: stop and name them, cut their end, or leave them out (both counted).
    Default error."""

    packing: bool | None = None
    """Put several rows of the data into one of context_length tokens, without attention across them: less padding.
    Long documents of raw text are split, not cut off. Default: on for raw text."""

    padding: Literal["longest", "max_length"] = "longest"
    """How wide a batch is: as its longest row, or context_length, which is slower and shows the memory of the worst
    case. Default longest."""

    task: TaskOptions | None = None
    """What the validation rows are scored by, beside the loss. Default none."""

    similarity: SimilarityOptions | None = None
    """Score answers against the true ones before and after training, by meaning. Default none."""

    preference: PreferenceOptions | None = None
    """Learn from pairs of answers which one was preferred (DPO). Default none."""

    padding_side: Literal["right", "left"] = "right"
    """Where short rows of a batch are filled up. The loss is the same on either side. Default right."""

    # ---- how long -------------------------------------------------------------------------------------------------
    num_epochs: float | None = Field(default=None, gt=0)
    """Passes over the training data. Default 3, or no limit when max_steps or max_time_s is given. The first limit
    reached ends the run."""

    max_steps: int | None = Field(default=None, ge=1)
    """Most optimiser steps. Default no limit."""

    max_time_s: float | None = Field(default=None, gt=0)
    """Seconds of training, without loading and export; the learning-rate schedule follows the clock. Default no
    limit."""

    early_stopping: EarlyStopping | None = None
    """End the run when `best_by` no longer gets better. Default none."""

    best_by: (
        Literal["eval_loss", "accuracy", "macro_f1", "rougeL", "rouge1", "rouge2", "exact_match", "token_f1"] | None
    ) = None
    """Export the weights of the best validation instead of the last step's: eval_loss, or a metric of the task.
    Default: the last step; with early_stopping, the task's metric, else eval_loss."""

    # ---- processes ------------------------------------------------------------------------------------------------
    num_devices: int = Field(default=1, ge=1)
    """Processes on this machine that train together, one for each GPU. A step then takes that many times
    train_batch_size_per_device rows. Default 1. Under torchrun its number counts."""

    fsdp: FsdpOptions | None = None
    """Divide parameters, gradients and optimiser states over the processes (torch's fully_shard). Default none: each
    process holds the whole model."""

    # ---- batches --------------------------------------------------------------------------------------------------
    train_batch_size_per_device: int = Field(default=16, ge=1)
    """Rows a device takes at once. Default 16."""

    eval_batch_size_per_device: int = Field(default=16, ge=1)
    """Rows a device takes at once in validation. Default 16."""

    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Batches whose gradients are added before a step. Default 1. N x batch 1 gives the same step as batch N."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third slower. Default false."""

    torch_compile: bool = False
    """Compile the model's layers with torch.compile: the first steps take half a minute more, the others less memory
    and up to a tenth less time. Needs a C++ compiler, on a GPU Triton. Default false."""

    group_by_length: bool = True
    """Put rows of like length in a batch, so that little is padded. Order stays random beyond that. Default true."""

    worker_resources: dict[str, float] = Field(default_factory=dict)
    """What Ray is asked for, for every worker, by the names of its resources (`memory` in bytes). A run that Ray does
    not start takes its machine as it is. Default none."""

    trainer_resources: dict[str, float] = Field(default_factory=dict)
    """Taken from other trainers' files, and not asked for: what leads the workers needs next to nothing. Default
    none."""

    # ---- optimisation -----------------------------------------------------------------------------------------------
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate. Default 1e-4 for LoRA, 1e-5 for full-parameter, 1e-3 from scratch; with preference a
    tenth of that."""

    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "cosine"
    """How the learning rate falls after the warm-up. Default cosine, to zero."""

    warmup_steps: float = Field(default=0, ge=0)
    """Steps over which the learning rate rises; below 1, a share of the whole run. Default 0."""

    optim: Literal[OPTIMISERS] = "adamw_torch_fused"  # type: ignore[valid-type]
    """Optimiser, by its transformers name. Default adamw_torch_fused. The 8-bit ones need bitsandbytes."""

    adam_beta2: float = Field(default=0.999, gt=0, lt=1)
    """Decay of Adam's second moment. Default 0.999; 0.95 is usual from scratch."""

    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay, on matrices only. Default 0."""

    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this norm; 0 leaves them. Default 1."""

    seed: int = Field(default=42, ge=0, lt=2**32)
    """Seed of initial weights, shuffling and dropout. Default 42."""

    # ---- precision --------------------------------------------------------------------------------------------------
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights in memory. Default auto: float32 where they are trained, the base's own where they are
    frozen."""

    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Type of the arithmetic. Default auto: bf16 where the device is quick at it (GPU, or a CPU with AMX or
    AVX512-BF16), else no."""

    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the exported weights. Default auto: the base's; from scratch bfloat16 with mixed precision, else
    float32."""

    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention kernel. Default auto: what transformers picks."""

    # ---- reports ----------------------------------------------------------------------------------------------------
    logging_steps: Steps = 10
    """Steps between two lines of metrics.jsonl; below 1, a share of the run's steps. Default 10."""

    eval_steps: Steps | None = None
    """Steps between two validations; below 1, a share of the run's steps. Default: at the end of every epoch, and at
    the end of the run."""

    save_steps: Steps | None = None
    """Optimiser steps between two saves, from which a run that was killed goes on (`--resume`); below 1, a share of the
    run's steps. Default: by time alone."""

    save_every_s: float | None = Field(default=900.0, gt=0)
    """Seconds between two saves, where no save_steps is due earlier. Default 900; null: by save_steps alone."""

    keep: int = Field(default=1, ge=1)
    """Saves kept while the run lasts, the newest; a finished run needs none. Default 1, minimum 1."""

    num_probe_prompts: int = Field(default=4, ge=1, le=16)
    """Prompts on which the exported checkpoint is compared with the trained model. Default 4."""

    price_per_hour: float | None = Field(default=None, ge=0)
    """What an hour of everything that the run occupies costs, in any currency. Default none: no cost is told."""

    power_watts: float | None = Field(default=None, gt=0)
    """Draw of the machine under load, in watts, for the energy estimate where no counter of the hardware (NVML, RAPL)
    can be read. Default none: then energy is told where it is measured, and nowhere else."""

    report_to: Annotated[
        tuple[Tracker, ...], BeforeValidator(as_tuple, json_schema_input_type=Tracker | tuple[Tracker, ...])
    ] = ()
    """Where the lines of metrics.jsonl go as well: tensorboard, wandb, mlflow; one or a list. Default nowhere."""

    samples: SampleOptions | None = None
    """What the model says while it is trained. Default none."""

    expected: Expected | None = None
    """Published results, printed beside the run's own at its end. Default none."""

    on_out_of_memory: Literal["error", "adapt"] = "error"
    """Where memory does not suffice: end and say what to change, or halve the batch, double the accumulation and go on
    (the same steps; one process). Default error."""

    license: str | None = Field(default=None, max_length=200)
    """Terms under which the checkpoint may be used, as an SPDX id or a name; written into the passport. Default: those
    that the base's model card names, if any."""

    output_dir: str | None = None
    """Where the run is written (`--output` wins). Default: runs/<name of the YAML>, below the working directory. With a
    URL (s3://…) it is written there by default, too, and copied to the URL when it is finished."""

    @model_validator(mode="after")
    def _keys_fit(self) -> Self:
        require_keys_that_fit(self)
        return self

    @property
    def has_head(self) -> bool:
        """Whether a classification head is trained instead of the language model's."""
        return self.task is not None and self.task.has_head

    @property
    def chosen_best_by(self) -> str | None:
        """By what the exported weights are chosen; None: they are the last step's."""
        if self.best_by is not None or self.early_stopping is None:
            return self.best_by
        return self.task.chosen_metric if self.task is not None else "eval_loss"

    @property
    def is_sharded(self) -> bool:
        """Whether the model is divided over the processes."""
        return self.fsdp is not None and self.fsdp.enabled

    @property
    def kind(self) -> Literal["lora", "full", "scratch"]:
        """What the run makes: an adapter, a full-parameter fine-tune, or a model from scratch."""
        if self.lora_config is not None or self.adapter_path is not None:
            return "lora"
        return "full" if self.model_id is not None else "scratch"

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate given, or the default of the run's kind."""
        if self.learning_rate is not None:
            return self.learning_rate
        usual = {"lora": 1e-4, "full": 1e-5, "scratch": 1e-3}[self.kind]
        return usual / 10 if self.preference is not None else usual

    @property
    def epoch_limit(self) -> float | None:
        """Epochs given, 3 when no limit of any sort is given, else None."""
        if self.num_epochs is not None:
            return self.num_epochs
        return 3.0 if self.max_steps is None and self.max_time_s is None else None
