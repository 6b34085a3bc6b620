"""The lines that end a run: its perplexity, and what its recipe promised. And the warning of too little data."""

import math
from collections.abc import Mapping
from typing import Any

from loradock_train.config import TrainConfig

FEW_TOKENS = 1_000_000


def perplexity_of(loss: float | None) -> float | None:
    """exp(loss), for a loss in nats per token."""
    return None if loss is None else math.exp(min(loss, 700.0))


def result_lines(config: TrainConfig, summary: Mapping[str, Any]) -> list[str]:
    """What the run came to, beside what was expected. `summary` is that of run.json."""
    return [*_best_line(summary), *_score_line(summary), *_loss_lines(config, summary)]


def _best_line(summary: Mapping[str, Any]) -> list[str]:
    best = summary.get("best")
    if best is None:
        return []
    return [f"exported: the weights of step {best['step']}, the best validation ({best['by']} {best['value']:.4g})"]


def _score_line(summary: Mapping[str, Any]) -> list[str]:
    """A task's score beside those of the base and of the best constant answer."""
    score, task = summary.get("score"), summary.get("task")
    if score is None or task is None:
        return []
    others = [("the base", score.get("base")), ("the best constant answer", score.get("constant"))]
    beside = ", ".join(f"{name} {value:.4g}" for name, value in others if value is not None)
    return [f"score: {score['metric']} {score['value']:.4g} on {task['rows']} rows{f' ({beside})' if beside else ''}"]


def _loss_lines(config: TrainConfig, summary: Mapping[str, Any]) -> list[str]:
    kind, loss = "validation", summary["final_eval_loss"]
    if loss is None:
        kind, loss = "training", summary["final_train_loss"]
    if loss is None:
        return []
    lines = [f"final {kind} loss {loss:.4f}, perplexity {perplexity_of(loss):.2f}"]
    wanted = config.expected
    if wanted is not None:
        hours = summary["train_seconds"] / 3600
        known = [text for text in (wanted.data, wanted.hardware) if text is not None]
        where = f" ({', '.join(known)})" if known else ""
        took = f" in {wanted.hours:g} h" if wanted.hours is not None else ""
        lines.append(
            f"expected: loss {wanted.loss:g}, perplexity {wanted.perplexity:g}{took}{where}; "
            f"this run took {hours:.2f} h for {summary['tokens']:,} tokens"
        )
    return lines


def few_tokens(config: TrainConfig, num_tokens: int, is_whole: bool) -> list[str]:
    """A warning for a model from scratch that is given little. is_whole: nothing else is to come."""
    if config.kind != "scratch" or not is_whole or num_tokens >= FEW_TOKENS:
        return []
    return [
        f"train_path has {num_tokens:,} tokens: under {FEW_TOKENS:,} a model from scratch learns its data by heart and "
        "little else; fine-tune a trained one instead (model_id: …, with lora_config: {}), or give it more text"
    ]
