"""The model card (README.md) of a checkpoint: what it is, what it was trained on, how it did, how to serve it."""

from typing import Any

import yaml

from loradock_train.config import TrainConfig

_TITLES = {"lora": "LoRA adapter", "full": "full-parameter fine-tune", "scratch": "model trained from scratch"}


def model_card(config: TrainConfig, name: str, summary: dict[str, Any]) -> str:
    """Markdown with the metadata header that model hubs read. `summary` is that of run.json."""
    header: dict[str, Any] = {
        "library_name": "peft" if config.kind == "lora" else "transformers",
        "pipeline_tag": "text-classification" if config.has_head else "text-generation",
        "tags": ["loradock", *(["lora"] if config.kind == "lora" else [])],
    }
    if config.model_id is not None and not config.model_id.startswith("/"):
        header["base_model"] = config.model_id  # hubs refuse a card whose base is a local path
    parameters, data = summary["parameters"], summary["data"]["train"]
    rows = [
        ("kind", _TITLES[config.kind]),
        ("base", _base_name(config)),
        ("trained parameters", f"{parameters['trainable']:,} of {parameters['total']:,} ({parameters['share']:.3%})"),
        (
            "training rows",
            f"{data['num_documents']:,} ({data['format']}), {data['num_trained_tokens']:,} tokens with a loss",
        ),
        ("context length", f"{config.context_length} tokens"),
        ("steps", f"{summary['steps']:,} ({summary['epochs']:.2f} epochs, {summary['train_seconds']:.0f} s)"),
        ("peak learning rate", f"{config.peak_learning_rate:g} ({config.lr_scheduler_type})"),
        ("training loss", _number(summary["final_train_loss"])),
        ("validation loss", _number(summary["final_eval_loss"])),
        *_score_rows(summary),
        ("precision", f"arithmetic {summary['precision']['arithmetic']}, saved {summary['precision']['saved']}"),
        ("seed", str(config.seed)),
    ]
    if config.lora_config is not None:
        rows.insert(3, ("rank, alpha", f"{config.lora_config.r}, {config.lora_config.lora_alpha:g}"))
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    return (
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n# {name}\n\n"
        f"A {_TITLES[config.kind]} made by Loradock.\n\n| | |\n| --- | --- |\n{table}\n\n"
        f"## Serve it\n\n```sh\nloradock push . {name}\n```\n\n"
        "`loradock.json` beside this file ties the weights to their base, tokenizer and chat template.\n"
    )


def _score_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    score = summary.get("score")
    if score is None:
        return []
    base = f", the base {score['base']:.4f}" if score.get("base") is not None else ""
    constant = f", the best constant answer {score['constant']:.4f}" if score.get("constant") is not None else ""
    return [(score["metric"], f"{score['value']:.4f}{base}{constant}")]


def _base_name(config: TrainConfig) -> str:
    if config.model_id is not None:
        return config.model_id.rsplit("/", 1)[-1] if config.model_id.startswith("/") else config.model_id
    return f"none ({(config.model or {}).get('model_type')} from scratch)"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"
