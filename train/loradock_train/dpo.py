"""TRL's DPO trainer with our order of rows, saves, validation and schedule. Needs TRL, an extra: preference.py imports
it, for a run that has `preference` only."""

import json
import math
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from trl.trainer.dpo_trainer import DPOTrainer

from loradock_train.saves import Save
from loradock_train.trainer import LoradockTrainer

METRICS_FILE = "preference.json"


class PreferenceTrainer(LoradockTrainer, DPOTrainer):  # type: ignore[misc,unused-ignore]
    """TRL's loss; our order, saves, validation and schedule."""

    def _prepare_dataset(self, dataset: Any, *unused: Any) -> Any:
        return dataset  # encoded by us already

    def _fill(self, directory: Path, optimizer: dict[str, Any] | None) -> None:
        super()._fill(directory, optimizer)
        text = json.dumps({"metrics": self._metrics["train"], "tokens": self._total_train_tokens})
        (directory / METRICS_FILE).write_text(text, encoding="utf-8")

    def go_on(self, save: Save) -> None:
        """The rewards since the last log are part of where a run stands."""
        held = json.loads((save.directory / METRICS_FILE).read_text(encoding="utf-8"))
        self._metrics["train"].update(held["metrics"])
        self._total_train_tokens = held["tokens"]
        super().go_on(save)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss over the pairs of the validation rows; the rewards come with the log."""
        network = cast(nn.Module, self.model)
        was_training = network.training
        network.eval()
        total, pairs = 0.0, 0
        with torch.no_grad():
            for inputs in self.get_eval_dataloader(eval_dataset):
                batch = self._prepare_inputs({name: value for name, value in inputs.items() if name != "num_tokens"})
                count = len(batch["input_ids"]) // 2
                with self.compute_loss_context_manager():
                    loss = cast(Any, self).compute_loss(self.model_wrapped, batch)
                total += float(loss) * count
                pairs += count
        metrics = {f"{metric_key_prefix}_loss": total / pairs if pairs else math.nan}
        self.log(metrics)  # while the model is in eval: TRL adds the rewards of validation to it
        network.train(was_training)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
