"""What the processes of a run must hold in common at every step: when to save, when to stop, how many tokens there are.

Clocks and signals differ between processes; a process that stopped a step before the others would leave them waiting.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loradock_train.encode import IGNORED
from loradock_train.order import FILLER, Shares, ShareSampler
from loradock_train.processes import broadcast_object, gather_numbers, rank, world_size
from loradock_train.progress import Meter
from loradock_train.stop import StopRequest


class Agreement(TrainerCallback):
    """The last to be called at the end of a step: what one process has decided, all do."""

    def __init__(self, meter: Meter, request: StopRequest) -> None:
        self._meter, self._request = meter, request
        self.pauses = False
        """Whether this step is the last one before a resume: it is saved as if the run went on."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self._agree(control)
        self.pauses = self._request.is_set and control.should_save
        return control

    def _agree(self, control: TrainerControl) -> None:
        if world_size() == 1:
            return
        mine = (self._meter.unshared_tokens, control.should_save, control.should_training_stop, self._request.is_set)
        everyone = gather_numbers([int(number) for number in mine])
        tokens, saves, stops, requests = (sum(numbers) for numbers in zip(*everyone, strict=True))
        self._meter.share(tokens)
        self._request.is_set = requests > 0
        control.should_save, control.should_training_stop = saves > 0, stops > 0


def common_clock(meter: Meter) -> Callable[[], float]:
    """Seconds of training by the clock of process 0, where a learning rate follows it. Every process must ask as often
    as the others."""
    return lambda: broadcast_object(meter.elapsed_s)


class _WithFiller(Dataset[Any]):
    """The rows, and for FILLER one without labels."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index != FILLER:
            row: dict[str, Any] = self._rows[index]
            return row
        row = dict(self._rows[0])
        return {**row, "labels": torch.full((len(row["labels"]),), IGNORED), "is_filler": True}


def share_loader(rows: Any, order: Sampler[int] | Sequence[int], batch_size: int, collate: Any) -> DataLoader[Any]:
    """This process's batches of the rows; as many as every other process has."""

    def collate_share(batch: Sequence[dict[str, Any]]) -> Any:
        if not batch[0].pop("is_filler", False):
            return collate(batch)
        return {**collate(batch), "num_tokens": torch.tensor(0)}

    sampler = ShareSampler(order, Shares(batch_size, world_size(), rank()))
    return DataLoader(
        _WithFiller(rows), batch_sampler=sampler, collate_fn=collate_share, pin_memory=torch.cuda.is_available()
    )
