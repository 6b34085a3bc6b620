"""A model divided over the processes of a run, by torch's fully_shard, and put together again.

accelerate would do it on GPUs, and on CPUs ignores it without a word; here both take one way. Each process holds an
equal part of every parameter, its gradient and its optimiser state; a block's parameters are gathered when it computes.
What is saved is always whole, in the form in which an undivided run saves it. Knows nothing of rows or steps.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from loradock_train.config import TrainConfig
from loradock_train.config_fsdp import FsdpOptions
from loradock_train.errors import ModelError
from loradock_train.model import inner_model
from loradock_train.processes import is_main, world_size


def check_shardable(config: TrainConfig, processes: int) -> None:
    """Raises ModelError for what that many processes cannot do, and for what cannot be divided."""
    alone = "preference:" if config.preference is not None else "a classification head" if config.has_head else None
    if processes > 1 and alone is not None:
        raise ModelError(f"{alone} trains in one process: its loss is no mean over tokens; leave out --nproc")
    if not config.is_sharded or config.fsdp is None:
        return
    told = {
        "several processes: start it with --nproc N, or set num_devices": processes == 1,
        "bf16 or float32 arithmetic: set mixed_precision: bf16": config.mixed_precision == "fp16",
        "an optimiser that knows divided tensors: set optim: adamw_torch_fused": "8bit" in config.optim,
        "a run without task: (its scores need the whole model in one process)": config.task is not None,
        "a run without best_by and early_stopping (the best weights are kept by one process)": (
            config.chosen_best_by is not None
        ),
        "float weights: remove quantisation": getattr(config, "quantisation", None) is not None,
    }
    for need, is_missing in told.items():
        if is_missing:
            raise ModelError(f"fsdp needs {need}")
    if config.fsdp.cpu_offload and not torch.cuda.is_available():
        raise ModelError("fsdp.cpu_offload needs GPUs: on a CPU there is nothing to take off; remove it")


def shard(model: nn.Module, options: FsdpOptions) -> nn.Module:
    """The same model with every parameter divided over the processes. The one given holds no weights from now on,
    until `unshard`. Raises ModelError where no block of it is known."""
    blocks = tuple(options.wrap) or tuple(getattr(inner_model(model), "_no_split_modules", None) or ())
    if not any(type(module).__name__ in blocks for module in model.modules()):
        architecture = type(inner_model(model)).__name__
        raise ModelError(
            f"fsdp.wrap: no module of class {', '.join(blocks) or '(none given)'} in {architecture}; "
            "name the class of its blocks, for example wrap: [LlamaDecoderLayer]"
        )
    for parameter in model.parameters():
        if parameter.requires_grad:
            distributed.broadcast(parameter.data, src=0)  # each began with its own random numbers
    whole = {id(parameter): parameter for parameter in model.parameters()}
    divided = copy.deepcopy(model, cast(Any, dict(whole)))  # a copy of the modules, not of the parameters
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (world_size(),))
    policy = CPUOffloadPolicy() if options.cpu_offload else OffloadPolicy()
    for module in list(divided.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, reshard_after_forward=options.reshard_after_forward, offload_policy=policy)
    fully_shard(divided, mesh=mesh, reshard_after_forward=False, offload_policy=policy)
    for parameter in model.parameters():
        parameter.data = torch.empty(0, dtype=parameter.dtype)
    return divided


def is_divided(model: nn.Module) -> bool:
    """Whether `shard` made it."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def unshard(divided: nn.Module, model: nn.Module) -> None:
    """Put the weights back into the model that was given to `shard`, on the CPU of process 0. In the others it stays
    empty."""
    for (name, whole), (other, part) in zip(model.named_parameters(), divided.named_parameters(), strict=True):
        assert name == other
        full = gathered(part.detach())
        whole.data = full.cpu() if is_main() else whole.data
    for whole_buffer, buffer in zip(model.buffers(), divided.buffers(), strict=True):
        whole_buffer.data = buffer.data.cpu()


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a divided tensor. Every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def put(target: Tensor, whole: Tensor) -> None:
    """Write a whole tensor into one that may be divided."""
    if isinstance(target, DTensor):
        target.to_local().copy_(_part(whole, target).to_local())
    else:
        target.copy_(whole)


def _part(whole: Tensor, like: DTensor) -> DTensor:
    local = whole.to(like.to_local().device)
    return distribute_tensor(local, like.device_mesh, like.placements, src_data_rank=None)


# ---- optimiser states -----------------------------------------------------------------------------------------------


def gathered_state(optimizer: Optimizer) -> dict[str, Any]:
    """Its state_dict as an undivided run has it. Every process must ask."""
    state = optimizer.state_dict()
    whole = {
        index: {name: _gathered_cpu(value) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": whole}


def _gathered_cpu(value: Any) -> Any:
    return gathered(value).cpu() if isinstance(value, Tensor) else value


def divided_state(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """What `gathered_state` returned, divided as the optimiser's parameters are."""
    parameters = dict(enumerate(_parameters(optimizer)))
    divided = {
        index: {name: _like(value, parameters[index]) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": divided}


def _like(value: Any, parameter: Tensor) -> Any:
    if isinstance(value, Tensor) and isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return _part(value, parameter)
    return value


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
