"""Scores of the validation rows by the model itself: the likeliest label, or a written answer against the true one.

    scorer = make_scorer(config, valid_rows, encoder, tokenizer)
    scores = scorer.score(model, "bf16")      # scores.metrics, scores.predictions

Greedy, without chance, and without a trace on the model: weights, gradients, generators and the training's own loss
stay as they are, so that a run with a task has the bits of one without. With several processes each scores all rows.
Legend: B rows of a batch, T tokens of the longest, A tokens of the longest answer, V vocabulary.
"""

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from loradock_train.config import TrainConfig
from loradock_train.config_task import TaskOptions
from loradock_train.encode import Encoder, stop_token_ids
from loradock_train.errors import ModelError
from loradock_train.model import inner_model
from loradock_train.rows import Rows
from loradock_train.task_metrics import best_constant, classification, mean_scores, scores_of
from loradock_train.task_rows import Question, questions_of
from loradock_train.tokenizer import padding_id


@dataclass(frozen=True)
class Scores:
    """What became of the questions."""

    metrics: dict[str, float]
    predictions: list[dict[str, Any]]
    """For each question: row, prompt, answer, truth, right, and what else is known of it."""


class Scorer(Protocol):
    """Scores a model on the rows of one task."""

    task: TaskOptions
    notices: list[str]

    def score(self, model: nn.Module, arithmetic: str) -> Scores:
        """All questions. `arithmetic`: no, bf16 or fp16."""

    def constant(self) -> dict[str, Any]:
        """What the best answer that is always the same would score."""


def make_scorer(config: TrainConfig, rows: Rows, encoder: Encoder, tokenizer: PreTrainedTokenizerBase) -> Scorer:
    """The scorer of `config.task` over these validation rows. Raises DataError."""
    assert config.task is not None
    task = config.task
    questions, told = questions_of(rows, task, encoder, config.context_length)
    if task.labels:
        return LabelScorer(task, told, questions, tokenizer, config.eval_batch_size_per_device)
    return AnswerScorer(task, told, questions, tokenizer, config.eval_batch_size_per_device)


def check_fits(scorer: Scorer, model: nn.Module) -> None:
    """Raises ModelError where a generated answer could run past the model's last position."""
    positions = getattr(inner_model(model).config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(scorer, AnswerScorer) or not isinstance(positions, int):
        return
    longest, new = max(len(question.prompt_ids) for question in scorer.questions), scorer.task.max_new_tokens
    if longest + new > positions:
        raise ModelError(
            f"task.max_new_tokens: {new} after a prompt of {longest} tokens is over the model's "
            f"max_position_embeddings {positions}; set it to {max(1, positions - longest)} at most"
        )


# ---- the model, as it answers ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def as_it_answers(model: nn.Module, arithmetic: str) -> Iterator[None]:
    """The model as it will be served while the block runs: its own forward instead of the training's loss, no
    dropout, no gradients."""
    parts = {id(part): part for part in (model, inner_model(model))}.values()
    held = [(part, part.__dict__.pop("forward")) for part in parts if "forward" in part.__dict__]
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device.type
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(arithmetic, torch.bfloat16)
    try:
        with torch.no_grad(), torch.autocast(device, dtype=kind, enabled=arithmetic != "no"):
            yield
    finally:
        model.train(was_training)
        for part, forward in held:
            part.__dict__["forward"] = forward


def without_adapter(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """The base alone while the block runs."""
    return model.disable_adapter() if isinstance(model, PeftModel) else contextlib.nullcontext()


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask, both B, T: every row ends at the right, where answers begin."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = torch.tensor(row)
        mask[index, width - len(row) :] = 1
    return ids.to(device), mask.to(device)


def log_likelihoods(
    model: nn.Module, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], pad: int
) -> list[float]:
    """For each prompt, the log-probability of its answer: the sum over the answer's tokens."""
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    ids, mask = left_padded(rows, pad, next(model.parameters()).device)
    known = inspect.signature(inner_model(model).forward).parameters
    longest = max(len(answer) for answer in answers)
    options: dict[str, Any] = {}
    if "position_ids" in known:
        options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    if "logits_to_keep" in known:
        options["logits_to_keep"] = longest + 1  # of a long prompt they would fill the memory
    logits = cast(Any, model(input_ids=ids, attention_mask=mask, use_cache=False, **options)).logits
    logs = logits[:, -longest - 1 : -1].float().log_softmax(-1)  # B, A, V
    picked = logs.gather(2, ids[:, -longest:, None])[..., 0]  # B, A
    learnt = torch.zeros_like(picked, dtype=torch.bool)
    for index, answer in enumerate(answers):
        learnt[index, longest - len(answer) :] = True
    totals: list[float] = (picked.double() * learnt).sum(1).tolist()
    return totals


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stops: Sequence[int],
    pad: int,
    pixels: Mapping[str, Tensor] | None = None,
) -> list[list[int]]:
    """Greedy answers, each without what follows its stop token (nor that token). The base's own sampling defaults and
    penalties are put aside: they would score something else than the weights. `pixels` are those of the prompts'
    images."""
    ids, mask = left_padded(prompts, pad, next(model.parameters()).device)
    plain = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=list(stops), pad_token_id=pad, use_cache=True
    )
    inner = cast(Any, inner_model(model))
    shown = {name: value.to(ids.device) for name, value in (pixels or {}).items()}
    own, inner.generation_config = inner.generation_config, plain
    try:
        found = cast(Any, model).generate(input_ids=ids, attention_mask=mask, generation_config=plain, **shown)
    finally:
        inner.generation_config = own
    answers: list[list[int]] = []
    for row in found[:, ids.shape[1] :].tolist():
        end = next((place for place, token in enumerate(row) if token in stops), len(row))
        answers.append(row[:end])
    return answers


# ---- the two ways to score -------------------------------------------------------------------------------------------


class _Asked:
    """What both have: questions, taken in batches of like length."""

    def __init__(
        self,
        task: TaskOptions,
        notices: list[str],
        questions: Sequence[Question],
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
    ) -> None:
        self.task, self.notices = task, notices
        self.questions = list(questions)
        self._tokenizer, self._batch_size = tokenizer, batch_size
        self._pad = padding_id(tokenizer)

    def constant(self) -> dict[str, Any]:
        """See Scorer."""
        truths = [question.truth for question in self.questions]
        return best_constant(self.task.kind, truths, self.task.labels, self.task.chosen_metric)

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        for start in range(0, len(order), self._batch_size):
            yield order[start : start + self._batch_size]

    def _prediction(self, question: Question, answer: str, right: bool, more: dict[str, Any]) -> dict[str, Any]:
        prompt = self._tokenizer.decode(question.prompt_ids)
        told = {"row": question.row.where, "prompt": prompt, "answer": answer, "truth": question.truth}
        return {**told, "right": right, **more}


class LabelScorer(_Asked):
    """Classification by tokens: every label is put in the answer's place, and the likeliest one is the answer."""

    def score(self, model: nn.Module, arithmetic: str) -> Scores:
        """See Scorer."""
        labels = self.task.labels
        pairs = [(q.prompt_ids, choice) for q in self.questions for choice in q.choices]
        logs = [0.0] * len(pairs)
        with as_it_answers(model, arithmetic):
            for batch in self._batches([len(prompt) + len(choice) for prompt, choice in pairs]):
                found = log_likelihoods(model, [pairs[i][0] for i in batch], [pairs[i][1] for i in batch], self._pad)
                for index, value in zip(batch, found, strict=True):
                    logs[index] = value
        predictions = []
        for place, question in enumerate(self.questions):
            mine = logs[place * len(labels) : (place + 1) * len(labels)]
            answer = labels[max(range(len(labels)), key=mine.__getitem__)]
            told = {"log_likelihoods": {label: round(value, 5) for label, value in zip(labels, mine, strict=True)}}
            predictions.append(self._prediction(question, answer, answer == question.truth, told))
        metrics = classification([q.truth for q in self.questions], [str(p["answer"]) for p in predictions], labels)
        return Scores(metrics, predictions)


class AnswerScorer(_Asked):
    """Summaries and free answers: generated, then compared with the true ones."""

    def score(self, model: nn.Module, arithmetic: str) -> Scores:
        """See Scorer."""
        written: list[list[int]] = [[] for _ in self.questions]
        stops = stop_token_ids(self._tokenizer)
        with as_it_answers(model, arithmetic):
            for batch in self._batches([len(question.prompt_ids) for question in self.questions]):
                prompts = [self.questions[index].prompt_ids for index in batch]
                found = generate(model, prompts, self.task.max_new_tokens, stops, self._pad)
                for index, tokens in zip(batch, found, strict=True):
                    written[index] = tokens
        predictions, scores = [], []
        for question, tokens in zip(self.questions, written, strict=True):
            answer = str(self._tokenizer.decode(tokens, skip_special_tokens=True)).strip()
            mine = scores_of(self.task.kind, question.truth, answer)
            right = answer == question.truth
            predictions.append(self._prediction(question, answer, right, {k: round(v, 5) for k, v in mine.items()}))
            scores.append(mine)
        return Scores(mean_scores(scores), predictions)
