"""Memory that does not suffice: how that is recognised, what the run needed, and a batch cut into pieces."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loradock_train.config import TrainConfig
from loradock_train.errors import MemoryFullError
from loradock_train.model import Precision, inner_model
from loradock_train.parameters import count_parameters
from loradock_train.trouble import Facts, memory_told

if TYPE_CHECKING:
    from loradock_train.trainer import LoradockTrainer

CPU_ALLOCATOR = "DefaultCPUAllocator"
"""torch has no type for want of memory on a CPU: its allocator raises RuntimeError, and names itself in the text."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory did not suffice."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return type(error) is RuntimeError and CPU_ALLOCATOR in str(error)


def facts_of(config: TrainConfig, model: nn.Module, precision: Precision) -> Facts:
    """What this run needs memory for."""
    text, count = inner_model(model).config.get_text_config(), count_parameters(model)
    return Facts(
        batch=config.train_batch_size_per_device,
        accumulation=config.gradient_accumulation_steps,
        context_length=config.context_length,
        trainable=count.trainable,
        total=count.total,
        layers=int(getattr(text, "num_hidden_layers", 1)),
        hidden=int(getattr(text, "hidden_size", 1)),
        weight_bytes=precision.weights.itemsize,
        activation_bytes=4 if precision.arithmetic == "no" and precision.weights.itemsize == 4 else 2,
        optim=config.optim,
        kind=config.kind,
        checkpointing=config.gradient_checkpointing,
        has_gpu=torch.cuda.is_available(),
    )


def first_line(error: BaseException) -> str:
    """Of its text, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def out_of_memory_told(trainer: "LoradockTrainer") -> Iterator[None]:
    """Raises MemoryFullError, with what to change, where the block runs out of memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or trainer.facts is None:
            raise
        raise MemoryFullError(memory_told(trainer.facts, trainer.state.global_step, first_line(error))) from error


def pieces_of(inputs: dict[str, Any], pieces: int) -> list[dict[str, Any]]:
    """A batch as smaller ones."""
    rows = len(inputs["input_ids"])
    size = max(1, -(-rows // pieces))
    return [
        {
            name: value[start : start + size] if isinstance(value, Tensor) and value.shape[:1] == (rows,) else value
            for name, value in inputs.items()
        }
        for start in range(0, rows, size)
    ]
