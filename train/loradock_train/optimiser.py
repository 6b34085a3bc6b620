"""LoRA+ (arXiv 2402.12354): B learns faster than A. Knows nothing of schedules: they scale what is set here."""

from torch import nn
from torch.optim import Optimizer


def quicken_b(optimizer: Optimizer, model: nn.Module, ratio: float) -> None:
    """Give the B matrices of an adapter groups of their own, with `ratio` times the learning rate.

    To be called before the schedule is made and before the first step. Matrices of adapted embeddings keep the plain
    rate, as in the paper.
    """
    quick = {id(p) for name, p in model.named_parameters() if ".lora_B." in name}
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in quick]
        if moved:
            group["params"] = [p for p in group["params"] if id(p) not in quick]
            options = {key: value for key, value in group.items() if key != "params"}
            optimizer.add_param_group({**options, "params": moved, "lr": group["lr"] * ratio})
