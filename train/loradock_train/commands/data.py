"""`loradock data CONFIG.yaml`: what the run would learn from its data. Imports nothing heavy until it is called.

loradock data lora.yaml --rows 5
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from loradock_train.doctor import Examination
    from loradock_train.encode import Encoder
    from loradock_train.rows import Rows

BAR = 40


def data(
    config: Annotated[Path, typer.Argument(help="The YAML that describes the run.", show_default=False)],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one key, dotted.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows shown token by token.", min=0)] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON, without rows.")] = False,
) -> None:
    """Show what would be learnt from the data of a config, and what is odd about it. Trains nothing."""
    from loradock_train.config_file import load_config

    loaded, notices = load_config(config, set_ or [])
    from loradock_train.quiet import quieten

    quieten()
    from dataclasses import asdict

    from rich.console import Console

    from loradock_adapters.console import note, out_json
    from loradock_train.before import open_rows
    from loradock_train.doctor import examine
    from loradock_train.model import base_config
    from loradock_train.remote import local_base
    from loradock_train.rows import read_rows
    from loradock_train.tokenizer import make_tokenizer
    from loradock_train.vision import make_encoder, make_processor

    loaded, copied = local_base(loaded, with_weights=False)
    notices.extend(copied)
    rows_of_training, stream = open_rows(loaded)
    if stream is not None:
        notices.append(f"a stream: what follows is its first block, {len(rows_of_training.rows):,} rows")
    splits = {"train": rows_of_training}
    if loaded.valid_path is not None:
        splits["valid"] = read_rows(loaded.valid_path, splits["train"].format, "valid_path")
    tokenizer = make_tokenizer(loaded, splits["train"])
    architecture = None if loaded.model_id is None else base_config(loaded)
    encoder = make_encoder(loaded, tokenizer, make_processor(loaded, architecture, splits["train"], tokenizer))
    splits_long = splits["train"].format == "text" and loaded.packing is not False
    found = {
        key: examine(
            split, encoder, loaded.context_length, splits_long, splits.get("valid") if key == "train" else None
        )
        for key, split in splits.items()
    }
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        notices.append("pad and end of text are one token: padding is masked by position here, so the end is learnt")
    for notice in (*(told for split in splits.values() for told in split.notices), *notices):
        note(f"note: {notice}")
    if as_json:
        out_json({key: asdict(examination) for key, examination in found.items()})
        return
    screen = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    for key, examination in found.items():
        _show(screen, key, examination)
    _preview(screen, splits["train"], encoder, tokenizer, rows)


def _show(screen: "Console", key: str, found: "Examination") -> None:
    screen.print(
        f"{key}: {found.num_rows:,} {found.format} rows, {found.num_tokens:,} tokens, "
        f"{found.num_trained_tokens:,} learnt ({found.num_trained_tokens / max(1, found.num_tokens):.1%})"
    )
    screen.print("  tokens a row: " + ", ".join(f"{name} {value:,}" for name, value in found.percentiles.items()))
    screen.print(
        f"  context_length {found.suggested_context_length:,} would hold {found.share_held:.1%} of them whole "
        "(their p95, rounded up)"
    )
    most = max(count for _, _, count in found.histogram)
    for low, high, count in found.histogram:
        screen.print(f"  {low:>6,} to {high:>6,} {'█' * round(BAR * count / most)} {count:,}")
    for finding in found.findings:
        more = ", …" if finding.num_rows > len(finding.first) else ""
        screen.print(f"  {finding.num_rows:,} rows {finding.message}: {', '.join(finding.first)}{more}", style="yellow")


def _preview(screen: "Console", rows: "Rows", encoder: "Encoder", tokenizer: Any, count: int) -> None:
    """Learnt tokens stand in brackets, and are green on a terminal."""
    from rich.text import Text

    from loradock_adapters.console import printable
    from loradock_train.doctor import encoded, spans

    for example, place in zip(*encoded(replace(rows, rows=rows.rows[:count]), encoder), strict=True):
        line = Text()
        for span in spans(example):
            text = printable(tokenizer.decode(list(span.token_ids)))
            line.append(f"⟦{text}⟧" if span.is_learnt else text, style="green" if span.is_learnt else "dim")
        screen.print(f"{place}: ⟦learnt⟧", style="bold")
        screen.print(line)
