"""Tokens/s and latency over the number of adapters in traffic: the table of the small base, and the wide base."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from against_stock import bars
from against_stock.checkpoints import SMALL, WIDE, Shape, make_adapters, make_base
from against_stock.duel import duel, effective, models_of, require_alike
from against_stock.figures import OURS, STOCK, table
from against_stock.options import IN_FLIGHT, KV_CACHE_GIB, MAX_TOKENS, Options, progress
from against_stock.servers import Setup, both

WIDE_SLOTS = 16


def table_scenario(options: Options, place: Path) -> dict[str, Any]:
    """The small base, for each number of slots."""
    base = make_base(place / "base", SMALL)
    adapters = make_adapters(place / "adapters", SMALL, [f"adapter-{n}" for n in range(1, max(options.adapters) + 1)])
    blocks = []
    for slots in options.slots:
        cells = [
            (k, 384 if k == 0 else 256 if k <= slots else 192, bars.TABLE.get(slots, {}).get(k))
            for k in options.adapters
        ]
        blocks.append(_block(options, place, SMALL, base, adapters, slots, cells))
    return {
        "scenario": "table",
        "shape": SMALL.name,
        "in_flight": IN_FLIGHT,
        "max_tokens": MAX_TOKENS,
        "blocks": blocks,
    }


def wide_scenario(options: Options, place: Path) -> dict[str, Any]:
    """A base and adapters of which matrix products, not calls, take the time."""
    base = make_base(place / "base", WIDE)
    chosen = [k for k in options.adapters if k in bars.WIDE] or list(bars.WIDE)
    adapters = make_adapters(place / "adapters", WIDE, [f"adapter-{n}" for n in range(1, max(chosen) + 1)])
    cells = [(k, IN_FLIGHT * (2 if k == 0 else 1), bars.WIDE[k]) for k in chosen]  # stock needs a minute or two for 64
    blocks = [_block(options, place, WIDE, base, adapters, WIDE_SLOTS, cells)]
    return {"scenario": "wide", "shape": WIDE.name, "in_flight": IN_FLIGHT, "max_tokens": MAX_TOKENS, "blocks": blocks}


def _block(
    options: Options,
    place: Path,
    shape: Shape,
    base: Path,
    adapters: dict[str, Path],
    slots: int,
    cells: Sequence[tuple[int, int, float | None]],
) -> dict[str, Any]:
    """All cells (adapters, requests, bar) of one number of slots, on one start of both engines."""
    arguments = {
        "dtype": options.dtype,
        "max_loras": slots,
        "max_cpu_loras": max(slots, len(adapters)),
        "max_lora_rank": shape.rank,
        "max_model_len": 256,
        "max_num_seqs": IN_FLIGHT,
    }
    setup = Setup(base, arguments, options.cores, KV_CACHE_GIB, options.serve)
    progress(f"{shape.name} base, {slots} slots: both engines start")
    with both(setup, setup, place / f"{slots}-slots") as sides:
        configs = effective(sides)
        require_alike(configs)
        for side in sides:
            side.register(adapters)
        rows = []
        for count, requests, bar in cells:
            progress(f"{slots} slots, {count or 'no'} adapters")
            models = models_of(list(adapters), count)
            cell = duel(
                sides, models, requests=options.requests(requests), max_tokens=MAX_TOKENS, rounds=options.rounds
            )
            rows.append({"adapters": count, "bar": bar, **cell})
            progress(f"  ratio {cell['ratio']} (bar {bar})")
    return {"slots": slots, "effective": configs, "cells": rows}


def shown(result: dict[str, Any]) -> str:
    """The result as tables for people."""
    parts = []
    columns = ["adapters", "ratio", "bar", "stock tok/s", "ours tok/s", "stock p50 s", "ours p50 s"]
    columns += ["stock p99 s", "ours p99 s", "stock longest s", "ours longest s", "same answers"]
    for block in result["blocks"]:
        rows = []
        for cell in block["cells"]:
            stock, ours = cell[STOCK], cell[OURS]
            row = [cell["adapters"] or "none", cell["ratio"], cell["bar"]]
            for key in ("tokens_per_s", "p50_s", "p99_s", "longest_s"):
                row += [stock[key], ours[key]]
            rows.append([*row, cell["same_answers"]])
        parts.append(f"{result['shape']} base, {block['slots']} slots\n{table(columns, rows)}")
    return "\n\n".join(parts)
