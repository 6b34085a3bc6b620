"""transformers' Trainer, with what it lacks: validation weighted by tokens, our schedule, an order of rows and random
numbers that follow from seed and step, saves that are whole or absent, and no clutter.

What to do with the trained model is export.py's and run.py's work; what a save holds is said in saves.py.
"""

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from loradock_train.agree import Agreement, share_loader
from loradock_train.config import TrainConfig
from loradock_train.encode import IGNORED
from loradock_train.feed import Feed
from loradock_train.loss import own_loss
from loradock_train.memory import first_line, is_out_of_memory, pieces_of
from loradock_train.model import Precision
from loradock_train.optimiser import quicken_b
from loradock_train.order import EpochSampler, Order, seed_step
from loradock_train.processes import broadcast_object, gather_objects, is_main, on_main, rank, world_size
from loradock_train.progress import Meter, Reporter
from loradock_train.saves import Position, Save, load_weights, trained_state
from loradock_train.schedule import Length, intervals_of
from loradock_train.shard import divided_state, gathered_state, is_divided
from loradock_train.stop import Saver
from loradock_train.trouble import Facts

Write = Callable[[Position, Mapping[str, Tensor], Callable[[Path], None]], Path]


class LoradockTrainer(Trainer):
    """Trains; `meter` counts time and tokens.

    Gradient accumulation is right by construction: the loss of every micro-batch is divided by the learnt tokens of
    the whole step (`num_items_in_batch`), not by its own (transformers issues 34191 and 35203 tell what happens
    otherwise).
    """

    def __init__(
        self,
        *,
        rate: Callable[[int], float],
        order: Order,
        steps_per_epoch: int,
        meter: Meter,
        reporter: Reporter,
        saver: Saver,
        agreement: Agreement,
        write: Write,
        score: Callable[[nn.Module], dict[str, float]] | None = None,
        keeper: TrainerCallback | None = None,
        feed: Feed | None = None,
        b_ratio: float | None = None,
        **options: Any,
    ) -> None:
        """score: metrics of the run's task. keeper: told of every validation. b_ratio: learning rate of B over A's."""
        self.meter = meter
        self._score, self._b_ratio = score, b_ratio
        self.last_save: tuple[int, Path] | None = None
        """Step and directory."""
        self._rate, self._order, self._steps_per_epoch = rate, order, steps_per_epoch
        self._reporter, self._agreement, self._write = reporter, agreement, write
        self.feed = feed
        """Of a stream, instead of order and train_dataset."""
        self.may_cut = False
        """Whether batches are cut into pieces where memory does not suffice (on_out_of_memory: adapt)."""
        self.pieces = 1
        self.facts: Facts | None = None
        self.notices: list[str] = []
        self.show: Callable[[str], None] = lambda text: None
        self._window: list[dict[str, Any]] = []
        self._positions = self._real_positions = 0
        self._resumed: Position | None = None
        callbacks = [reporter, saver, _Hooks(self), *([] if keeper is None else [keeper]), agreement]
        self._is_sharded = is_divided(options["model"])
        super().__init__(**options, callbacks=callbacks)
        self.remove_callback(PrinterCallback)
        if self._is_sharded:
            # transformers' word for a model that brings its own placement and reduction of gradients.
            self.is_distributed_loading_by_transformers = True
            self._mixed_mesh_grads = True  # its norm of gradients then is that of all parts together

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not self._is_sharded:
            super()._move_model_to_device(model, device)

    # ---- exact resume ------------------------------------------------------------------------------------------------

    def go_on(self, save: Save) -> None:
        """Train from where the save stands."""
        self._resumed = save.position
        self.pieces = save.position.pieces
        self.train(resume_from_checkpoint=str(save.directory))

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        return EpochSampler(self._order, lambda: self.state.global_step // self._steps_per_epoch)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """A stream's feed as it is: accelerate's loader would be a batch ahead of the step, and of its save. Several
        processes: ours, since accelerate fills a ragged last batch with rows that were learnt already."""
        if self.feed is not None:
            return cast(DataLoader[Any], self.feed)
        if world_size() == 1:
            return super().get_train_dataloader()
        sampler = self._get_train_sampler()
        return share_loader(self.train_dataset, sampler, self.args.train_batch_size, self.data_collator)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Several processes: every row in one of them, once."""
        if world_size() == 1:
            return super().get_eval_dataloader(eval_dataset)
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        return share_loader(rows, range(len(rows)), self.args.eval_batch_size, self.data_collator)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        loss_sums = gather_objects(float(self._tr_loss))
        position = Position(
            step=self.state.global_step,
            tokens=self.meter.tokens,
            elapsed_s=self.meter.elapsed_s,
            loss_sum=loss_sums[0],
            logged_step=self._globalstep_last_logged,
            history=self._reporter.history,
            loss_sums=loss_sums,
            pieces=self.pieces,
            stream=None if self.feed is None else asdict(self.feed.place),
        )
        asks = self._is_sharded or is_main()
        weights = trained_state(cast(nn.Module, self.model)) if asks else {}
        optimizer = gathered_state(cast(Optimizer, self.optimizer)) if self._is_sharded else None
        path = on_main(lambda: self._write(position, weights, lambda directory: self._fill(directory, optimizer)))
        self.last_save = (position.step, path)

    def _fill(self, directory: Path, optimizer: dict[str, Any] | None) -> None:
        if optimizer is None:
            self._save_optimizer_and_scheduler(str(directory))
        else:
            torch.save(optimizer, directory / "optimizer.pt")
            torch.save(cast(LambdaLR, self.lr_scheduler).state_dict(), directory / "scheduler.pt")
        self._save_scaler(str(directory))
        self.state.save_to_json(str(directory / "trainer_state.json"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(Path(resume_from_checkpoint), cast(nn.Module, self.model))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self._is_sharded:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer = cast(Optimizer, self.optimizer)
        whole = torch.load(Path(checkpoint) / "optimizer.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(divided_state(whole, optimizer))
        cast(LambdaLR, self.lr_scheduler).load_state_dict(
            torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True)
        )

    def restore_sums(self) -> None:
        """The loss since the last log, which transformers begins anew on resume."""
        if self._resumed is not None:
            sums = self._resumed.loss_sums
            self._tr_loss.fill_(sums[rank()] if len(sums) > 1 else self._resumed.loss_sum)
            self._globalstep_last_logged = self._resumed.logged_step

    # ---- steps and validation ----------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """transformers' own; with LoRA+, B learns faster."""
        is_new = self.optimizer is None
        made = super().create_optimizer(model)
        if is_new and self._b_ratio is not None:
            quicken_b(made, cast(nn.Module, self.model if model is None else model), self._b_ratio)
        return made

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LambdaLR:
        """Ours: it follows the clock where the run has a time limit."""
        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(cast(Optimizer, optimizer or self.optimizer), self._rate)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Counts tokens; for want of memory it cuts batches into pieces, where it may. Else transformers' own."""
        self.meter.count(int(inputs["num_tokens"]))
        self._positions += inputs["input_ids"].numel()
        self._real_positions += int(inputs["num_tokens"])
        batch = _for_model(inputs)
        if not self.may_cut:
            return super().training_step(model, batch, num_items_in_batch)
        self._window.append(batch)
        try:
            return self._in_pieces(model, batch, num_items_in_batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or num_items_in_batch is None:
                raise
            reason = first_line(error)  # the error itself holds on to what is to be freed
        return self._again(model, num_items_in_batch, reason)

    def _in_pieces(self, model: Any, batch: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        """The batch, or one piece after the other: gradients add up to the same, since each loss is divided by the
        tokens of the whole step."""
        losses = [
            super(LoradockTrainer, self).training_step(model, piece, num_items_in_batch)
            for piece in pieces_of(batch, self.pieces)
        ]
        return torch.stack(losses).sum()

    def _again(self, model: Any, num_items_in_batch: Any, reason: str) -> Tensor:
        """The step so far once more, in smaller pieces; the loss of its last batch."""
        while True:
            rows = max(len(batch["input_ids"]) for batch in self._window)
            if self.pieces >= rows:
                raise torch.OutOfMemoryError(f"{reason} (with one row at a time)")
            self.pieces *= 2
            model.zero_grad()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            seed_step(self.args.seed, self.state.global_step, self.args.process_index)
            try:
                losses = [self._in_pieces(model, batch, num_items_in_batch) for batch in self._window]
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_line(error)
                continue
            size, steps = (
                -(-self.args.per_device_train_batch_size // self.pieces),
                self.args.gradient_accumulation_steps,
            )
            text = (
                f"out of memory at step {self.state.global_step}: on with batches of {size} and accumulation "
                f"{steps * self.pieces} instead of {self.args.per_device_train_batch_size} and {steps} (the same steps)"
            )
            self.notices.append(text)
            self.show(f"note: {text}")
            return losses[-1]

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """The last steps' loss is logged, too, wherever they end between two logs; but not where the run is to go on:
        its lines are those of a run left alone."""
        was_over = self.control.should_training_stop
        if was_over and not self._agreement.pauses:
            self.control.should_log = True
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.control.should_training_stop and not was_over:  # by a validation: early_stopping
            self.control.should_log = True
            super()._maybe_log_save_evaluate(*args, **kwargs)

    def padded_share(self) -> float:
        """Of all that the model computed in this process, what was padding."""
        return 1.0 - self._real_positions / self._positions if self._positions else 0.0

    def begin_step(self) -> None:
        """Its random numbers follow from seed and step."""
        self._window.clear()
        seed_step(self.args.seed, self.state.global_step, self.args.process_index)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss over all learnt tokens of the validation rows. (transformers averages batch means: rows of few
        tokens weigh more.)"""
        loader = self.get_eval_dataloader(eval_dataset)
        model = cast(nn.Module, self.model)
        was_training = model.training
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)  # loss, learnt tokens
        with torch.no_grad():
            for inputs in loader:
                batch = self._prepare_inputs(_for_model(inputs))
                count = (batch["labels"][:, 1:] != IGNORED).sum()
                with self.compute_loss_context_manager():  # nothing learnt here: the others may wait for this forward
                    loss = self.model_wrapped(**batch).loss.double()
                if int(count):
                    sums[0] += loss * count
                    sums[1] += count
        model.train(was_training)
        total, tokens = self.accelerator.reduce(sums, reduction="sum").tolist()
        mean = total / tokens if tokens else math.nan
        metrics = {
            f"{metric_key_prefix}_loss": mean,
            f"{metric_key_prefix}_perplexity": math.exp(min(mean, 700.0)),
            f"{metric_key_prefix}_tokens": int(tokens),
        }
        if self._score is not None:
            found = broadcast_object(self._score(model))  # the last bits may differ, and decide who stops
            metrics.update((f"{metric_key_prefix}_{name}", value) for name, value in found.items())
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _for_model(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name != "num_tokens"}


class _Hooks(TrainerCallback):
    """What must happen at a moment of the loop that only callbacks are told of."""

    def __init__(self, trainer: LoradockTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.restore_sums()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.begin_step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        feed = self._trainer.feed
        if feed is not None:
            state.epoch = feed.place.passes
            control.should_training_stop = control.should_training_stop or feed.is_over
        return control


def training_arguments(
    config: TrainConfig,
    length: Length,
    precision: Precision,
    directory: Path,
    kind: type[TrainingArguments] = TrainingArguments,
    **more: Any,
) -> TrainingArguments:
    """Our config in transformers' words. Nothing is reported, saved or measured that we do not ask for.

    kind, more: the class of the arguments, and what it knows beyond transformers' own.
    """
    intervals = intervals_of(config, length)
    if config.valid_path is None:
        evaluation: dict[str, Any] = {"eval_strategy": "no"}
    else:
        evaluation = {"eval_strategy": "steps", "eval_steps": intervals.evaluation}
    has_gpu = torch.cuda.is_available()
    checkpoints = config.gradient_checkpointing or (config.fsdp is not None and config.fsdp.activation_checkpointing)
    arguments = kind(
        output_dir=str(directory),
        max_steps=length.max_steps,
        per_device_train_batch_size=config.train_batch_size_per_device,
        per_device_eval_batch_size=config.eval_batch_size_per_device,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        gradient_checkpointing=checkpoints,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpoints else None,
        learning_rate=config.peak_learning_rate,
        weight_decay=config.weight_decay,
        adam_beta2=config.adam_beta2,
        max_grad_norm=config.max_grad_norm,
        optim=config.optim,
        seed=config.seed,
        bf16=precision.arithmetic == "bf16",
        fp16=precision.arithmetic == "fp16",
        use_cpu=not has_gpu,
        logging_steps=intervals.logging,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a loss that is no number must be seen, not smoothed away
        save_strategy="no",  # ours decides (stop.py)
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,  # would look for them at every step; all that is trained is used
        ignore_data_skip=config.streaming,  # its feed goes on by itself
        dataloader_pin_memory=has_gpu,
        **evaluation,
        **more,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs without a launcher would mean the old DataParallel
    return arguments


def loss_context(model: PreTrainedModel, use_own: bool) -> contextlib.AbstractContextManager[None]:
    """Our loss while the block runs, or nothing."""
    return own_loss(model) if use_own else contextlib.nullcontext()
