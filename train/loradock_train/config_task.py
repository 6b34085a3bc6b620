"""The sections of a task: what a run's answers are scored by, and when it has learnt enough.

Knows keys, units, defaults and bounds; task.py scores, best.py decides.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from loradock_train.config_sections import Names, Section
from loradock_train.task_metrics import ANSWER_METRICS, CLASS_METRICS, SUMMARY_METRICS

METRICS = {
    "classification": CLASS_METRICS,
    "sequence_classification": CLASS_METRICS,
    "summarisation": SUMMARY_METRICS,
    "generation": ANSWER_METRICS,
}
"""The metrics of each kind; the first is its default."""


class TaskOptions(Section):
    """What the validation rows are scored by, at every validation and at the end."""

    kind: Literal["classification", "sequence_classification", "summarisation", "generation"]
    """`classification`: the likeliest of `labels` as the answer. `sequence_classification`: a classification head
    instead of the language model's. `summarisation`: ROUGE. `generation`: exact match and token F1."""

    labels: Names = ()
    """The classes. Required for the two classifications; every row's answer must be one of them."""

    metric: Literal["accuracy", "macro_f1", "rougeL", "rouge1", "rouge2", "exact_match", "token_f1"] | None = None
    """The score of the run. Default: accuracy, rougeL or exact_match, by the kind."""

    max_rows: int = Field(default=200, ge=1)
    """Validation rows that are scored, evenly spaced over all of them. Default 200, minimum 1."""

    max_new_tokens: int = Field(default=64, ge=1)
    """Tokens of an answer that is generated (greedily). Default 64, minimum 1."""

    score_base: bool = True
    """Score the base too, before training. Default true; a model from scratch and a new head have none."""

    @property
    def has_head(self) -> bool:
        """Whether the model has a classification head instead of the language model's."""
        return self.kind == "sequence_classification"

    @property
    def chosen_metric(self) -> str:
        """The metric given, or the kind's own."""
        return self.metric if self.metric is not None else METRICS[self.kind][0]

    @model_validator(mode="after")
    def _labels_fit(self) -> Self:
        if "classification" not in self.kind:
            if self.labels:
                raise ValueError(f"labels belong to classification; a {self.kind} task has none")
            return self
        if len(self.labels) < 2:
            raise ValueError(f"task.kind {self.kind} needs labels: at least 2, got {len(self.labels)}")
        twice = sorted({label for label in self.labels if self.labels.count(label) > 1})
        if twice:
            raise ValueError(f"labels stand twice: {', '.join(twice)}")
        odd = [label for label in self.labels if not label or label != label.strip()]
        if odd:
            raise ValueError(
                f"labels are compared without white space around them; none may be empty or have any: {odd[0]!r}"
            )
        return self

    @model_validator(mode="after")
    def _metric_fits(self) -> Self:
        if self.metric is not None and self.metric not in METRICS[self.kind]:
            raise ValueError(f"metric {self.metric} is not one of {self.kind}: {', '.join(METRICS[self.kind])}")
        return self


class EarlyStopping(Section):
    """End the run when it no longer gets better."""

    patience: int = Field(default=3, ge=1)
    """Validations in a row without a new best after which the run ends. Default 3, minimum 1."""

    min_delta: float = Field(default=0.0, ge=0)
    """By how much a validation must be better than the best before it to count, in the metric's own unit. Default 0."""
