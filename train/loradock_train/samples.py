"""What the model says while it is trained: samples.jsonl and the screen.

A transformers callback. Greedy, so that no random number is drawn, and between two steps, whose random numbers follow
from the step alone: a run with samples has the bits of one without.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from loradock_train.config_scratch import SampleOptions
from loradock_train.model import inner_model
from loradock_train.tokenizer import padding_id

FILE = "samples.jsonl"


class SampleWriter(TrainerCallback):
    """Lets the model continue the prompts every few steps, and at the end."""

    def __init__(
        self,
        options: SampleOptions,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        arithmetic: str,
        path: Path | None,
        console: Console,
    ) -> None:
        """path: of samples.jsonl; None where another process writes it."""
        self._options, self._model, self._tokenizer = options, inner_model(model), tokenizer
        self._arithmetic, self._path, self._console = arithmetic, path, console
        self._last_step = -1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self._options.every_steps == 0:
            self._write(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step != self._last_step:
            self._write(state.global_step)

    def _write(self, step: int) -> None:
        self._last_step = step
        with self._as_it_is():
            texts = [(prompt, self._continue(prompt)) for prompt in self._options.prompts]
        if self._path is None:
            return
        with self._path.open("a", encoding="utf-8") as file:
            for prompt, text in texts:
                file.write(json.dumps({"step": step, "prompt": prompt, "text": text}, ensure_ascii=False) + "\n")
        for prompt, text in texts:
            self._console.print(f"step {step}: {prompt!r} … {text!r}", markup=False, highlight=False)

    def _continue(self, prompt: str) -> str:
        model: Any = self._model
        ids = self._tokenizer(prompt)["input_ids"] or [self._tokenizer.eos_token_id]
        room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        room = room if isinstance(room, int) else len(ids) + self._options.max_tokens
        max_tokens = min(self._options.max_tokens, max(1, room - 1))
        ids = ids[max(0, len(ids) - (room - max_tokens)) :]
        row = torch.tensor([ids], device=model.device)
        plan = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=max_tokens, do_sample=False, eos_token_id=self._tokenizer.eos_token_id,
            pad_token_id=padding_id(self._tokenizer),
        )  # fmt: skip
        made = model.generate(input_ids=row, attention_mask=torch.ones_like(row), generation_config=plan)
        return str(self._tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True))

    @contextlib.contextmanager
    def _as_it_is(self) -> Iterator[None]:
        """The model as it will be served: its own forward, no dropout."""
        swapped = self._model.__dict__.pop("forward", None)
        was_training = self._model.training
        self._model.train(False)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self._arithmetic)
        try:
            with torch.no_grad(), torch.autocast(self._model.device.type, dtype=dtype, enabled=dtype is not None):
                yield
        finally:
            self._model.train(was_training)
            if swapped is not None:
                self._model.__dict__["forward"] = swapped


def keep_samples(path: Path, until_step: int) -> None:
    """Leave out what was written after the save that a run goes on from: it is written again."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= until_step]
    path.write_text("".join(kept), encoding="utf-8")
