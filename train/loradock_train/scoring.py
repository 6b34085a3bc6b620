"""A run's task score from its beginning to its end: the base's before training, the model's at each validation, the
exported weights' last; and which weights those are.

Joins task.py (scores) and best.py (the best validation) to the training in fit.py.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from loradock_train.best import BestKeeper
from loradock_train.config import TrainConfig
from loradock_train.plot import plot_confusion
from loradock_train.progress import Reporter
from loradock_train.task import Scorer, Scores, check_fits, without_adapter
from loradock_train.task_metrics import class_scores, confusion_matrix

FILES = ("predictions.jsonl", "confusion.json", "confusion.png")
"""What a task writes into the run directory."""


@dataclass(frozen=True)
class Scored:
    """What a run's validations come to."""

    exported_step: int
    """The step whose weights are exported."""
    summary: dict[str, Any] = field(default_factory=dict)
    """For run.json: `score`, `task`, `best`, as far as the run has them."""
    notices: tuple[str, ...] = ()
    scores: Scores | None = None
    """Of the exported weights."""


class Scoring:
    """See the top of the file."""

    def __init__(
        self, config: TrainConfig, model: nn.Module, scorer: Scorer | None, arithmetic: str, directory: Path,
        reporter: Reporter,
    ) -> None:  # fmt: skip
        self._config, self._model, self._scorer, self._arithmetic = config, model, scorer, arithmetic
        self._reporter = reporter
        by = config.chosen_best_by
        self.keeper = None if by is None else BestKeeper(config, model, directory, lambda: reporter.history)

    def begin(self, *, is_new: bool) -> None:
        """Before the first step: the base's own score. Of a run that goes on, that its best weights are there."""
        if self._scorer is not None:
            check_fits(self._scorer, self._model)
        if not is_new:
            if self.keeper is not None:
                self.keeper.check_resumable()
            return
        task = self._config.task
        if self._scorer is None or task is None or not task.score_base or task.has_head:
            return
        if self._config.kind != "scratch":
            with without_adapter(self._model):
                found = self._scorer.score(self._model, self._arithmetic).metrics
            self._reporter.note({f"base_{name}": value for name, value in found.items()})

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """The task's metrics as the model stands."""
        return {} if self._scorer is None else self._scorer.score(model, self._arithmetic).metrics

    def end(self, steps: int) -> Scored:
        """After the last step: put the best weights into the model, and score what will be exported."""
        exported = steps
        summary: dict[str, Any] = {}
        notices: list[str] = []
        if self.keeper is not None:
            now = self.keeper.now
            exported = self.keeper.restore() or steps
            summary["best"] = {"by": self.keeper.key, "step": exported, "value": now.value}
            stopping = self._config.early_stopping
            if stopping is not None and now.stale >= stopping.patience:
                notices.append(
                    f"stopped early at step {steps}: {now.stale} validations without a better {self.keeper.key} than "
                    f"{now.value:.4g} at step {exported}"
                )
        summary["exported_step"] = exported
        if self._scorer is None:
            return Scored(exported, summary, tuple(notices))
        notices.extend(self._scorer.notices)
        scores = self._scorer.score(self._model, self._arithmetic)
        summary |= self._told(self._scorer, scores)
        return Scored(exported, summary, tuple(notices), scores)

    def _told(self, scorer: Scorer, scores: Scores) -> dict[str, Any]:
        metric = scorer.task.chosen_metric
        first = self._reporter.history[0] if self._reporter.history else {}
        base = {name: first[f"base_{name}"] for name in scores.metrics if f"base_{name}" in first}
        constant = scorer.constant()
        score = {"metric": metric, "value": scores.metrics[metric], "best": "high"}
        score |= {"base": base.get(metric), "constant": constant[metric]}
        told: dict[str, Any] = {"kind": scorer.task.kind, "rows": len(scores.predictions), **scores.metrics}
        told |= {"base": base or None, "constant": constant}
        if scorer.task.labels:
            told["classes"] = class_scores(_matrix(scorer, scores), scorer.task.labels)
        return {"score": score, "task": told}


def _matrix(scorer: Scorer, scores: Scores) -> list[list[int]]:
    truths, answers = ([str(each[key]) for each in scores.predictions] for key in ("truth", "answer"))
    return confusion_matrix(truths, answers, scorer.task.labels)


def write_scores(scored: Scored, scorer: Scorer | None, directory: Path) -> None:
    """predictions.jsonl, and of classes confusion.json and confusion.png."""
    if scored.scores is None or scorer is None:
        return
    lines = (json.dumps(each, ensure_ascii=False) + "\n" for each in scored.scores.predictions)
    (directory / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")
    if scorer.task.labels:
        matrix, labels = _matrix(scorer, scored.scores), list(scorer.task.labels)
        told = {"labels": labels, "rows": "truth", "columns": "answer", "matrix": matrix}
        (directory / "confusion.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        plot_confusion(matrix, labels, directory / "confusion.png")
