"""Out of the box: stock vLLM with its own defaults, which are one adapter slot, and `loradock serve` told nothing.

Stock gets four things that are not its defaults, in its favour or needed: threads bound to all cores (by itself it
leaves one idle), a KV cache of a stated size (by itself it wants nearly all memory, and another engine is there), no
compilation, and adapters loaded beforehand.
"""

from pathlib import Path
from typing import Any

from against_stock.bars import DEFAULTS
from against_stock.checkpoints import SMALL, make_adapters, make_base
from against_stock.duel import duel, effective
from against_stock.figures import OURS, STOCK, table
from against_stock.options import IN_FLIGHT, MAX_TOKENS, Options, progress
from against_stock.servers import Setup, both

ADAPTERS = 64
REQUESTS = 128
STOCK_KV_CACHE_GIB = 2
ROUNDS = 2
"""At most: stock needs a minute for each."""


def defaults_scenario(options: Options, place: Path) -> dict[str, Any]:
    """64 adapters, 64 in flight, nothing configured."""
    base = make_base(place / "base", SMALL)
    adapters = make_adapters(place / "adapters", SMALL, [f"adapter-{n}" for n in range(1, ADAPTERS + 1)])
    progress("defaults: both engines start")
    with both(Setup(base, kv_cache_gib=STOCK_KV_CACHE_GIB), Setup(base), place / "servers") as sides:
        configs = effective(sides)
        for side in sides:
            side.register(adapters)
        cell = duel(
            sides,
            list(adapters),
            requests=options.requests(REQUESTS),
            max_tokens=MAX_TOKENS,
            rounds=min(options.rounds, ROUNDS),
        )
    progress(f"  ratio {cell['ratio']} (bar {DEFAULTS})")
    cell = {"adapters": ADAPTERS, "bar": DEFAULTS, **cell}
    return {"scenario": "defaults", "in_flight": IN_FLIGHT, "max_tokens": MAX_TOKENS, "effective": configs, **cell}


def shown(result: dict[str, Any]) -> str:
    """The result as a table for people."""
    columns = ["side", "slots", "dtype", "tokens/s", "p50 s", "p99 s", "longest s", "ratio", "bar"]
    rows = []
    for side in (STOCK, OURS):
        config, figures = result["effective"][side], result[side]
        row = [side, config["max_loras"], config["dtype"].removeprefix("torch.")]
        row += [figures[key] for key in ("tokens_per_s", "p50_s", "p99_s", "longest_s")]
        rows.append([*row, *((result["ratio"], result["bar"]) if side == OURS else (None, None))])
    return f"out of the box, {result['adapters']} adapters\n{table(columns, rows)}"
