"""How fast we train, and in how much memory, beside TRL's SFTTrainer: same model, data, lengths and LoRA.

    make bench BENCH=train                     # 4 layers x 256 and 8 layers x 512
    make bench BENCH=train ARGS="--quick"      # the small one, one round, without the ladder

Each leg runs in a process of its own, ours and TRL's by turns; medians over the rounds. Tokens are those that are not
padding. Float32 on the CPU. Where others use the machine, `others` says how much of the busy time was theirs; the
ratio by processor time (`per cpu`) does not care for them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from training_speed.material import Size, make_base, write_rows
from training_speed.settings import COMPARED, LEGS, Leg, config_of

SIZES = (Size(4, 256), Size(8, 512))
Figures = dict[str, float]


def main() -> None:
    """Prints tables and configs, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small model, one round, the first comparison only")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--length", type=int, default=256, help="tokens of the longest row")
    parser.add_argument("--sizes", default="0,1", help="which models: 0 the small, 1 the large")
    parser.add_argument("--only", default="", help="comparisons whose name has one of these in it (a;b)")
    parser.add_argument("--threads", type=int, default=1, help="for torch; more wait for each other")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.sizes, options.only, options.steps = 1, "0", "same batches", 8
    sizes = [SIZES[int(index)] for index in options.sizes.split(",")]
    legs = [leg for leg in LEGS if any(part in leg.name for part in options.only.split(";"))]
    results = {size.name: measure(size, legs, options) for size in sizes}
    print(json.dumps({"length": options.length, "threads": options.threads, "ratios": results}))


def measure(size: Size, legs: list[Leg], options: argparse.Namespace) -> dict[str, Any]:
    """All legs on one model, by turns."""
    with tempfile.TemporaryDirectory() as folder:
        base = str(make_base(Path(folder) / "base", size, 2 * options.length))
        data = str(write_rows(Path(folder) / "rows.jsonl", 1200))
        specs = {
            leg: {"trainer": leg.trainer, "order": leg.order, "threads": options.threads,
                  "config": config_of(leg, base, data, options.length, options.steps)}
            for leg in legs
        }  # fmt: skip
        rounds: dict[Leg, list[Figures]] = {leg: [] for leg in legs}
        for _ in range(options.rounds):
            for leg in legs:
                rounds[leg].append(run_leg(specs[leg]))
                print(f"{size.name}: {leg.trainer}, {leg.name}: {shown(rounds[leg][-1])}", flush=True)
    for leg in legs[:2]:
        print(f"{leg.trainer}, {leg.name}: {json.dumps(specs[leg]['config'])}")
    medians = {(leg.trainer, leg.name): median(rounds[leg]) for leg in legs}
    print("\n".join(table(size, medians)))
    return ratios(medians)


def run_leg(spec: dict[str, Any]) -> Figures:
    """In a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "training_speed.leg"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        input=json.dumps(spec), capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(f"{spec['trainer']} failed with {json.dumps(spec['config'])}:\n{done.stderr[-3000:]}")
    figures: Figures = json.loads(done.stdout.strip().rsplit("\n", 1)[-1])
    return figures


def median(rounds: list[Figures]) -> Figures:
    """Of each figure."""
    return {name: statistics.median(figures[name] for figures in rounds) for name in rounds[0]}


def table(size: Size, medians: dict[tuple[str, str], Figures]) -> list[str]:
    """One line a leg."""
    lines = [f"{size.name:<28} {'':4} tokens/s  per cpu s  peak MB  padding  others"]
    for (trainer, name), figures in medians.items():
        lines.append(f"{name:<28} {trainer:4} {shown(figures)}")
    return lines


def shown(figures: Figures) -> str:
    """The columns of the table."""
    return (
        f"{figures['tokens_per_s']:8,.0f}  {figures['tokens_per_cpu_s']:9,.0f}"
        f"  {figures['peak_bytes'] / 1e6:7,.0f}  {figures['padding']:7.1%}  {figures['others_share']:6.1%}"
    )


def ratios(medians: dict[tuple[str, str], Figures]) -> dict[str, Any]:
    """Ours over TRL's, where both were run; what the ladder gives; LoRA's memory over the full run's."""
    found: dict[str, Any] = {}
    for name in COMPARED:
        ours, theirs = medians.get(("ours", name)), medians.get(("trl", name))
        if ours is not None and theirs is not None:
            compared = ("tokens_per_s", "tokens_per_cpu_s", "peak_bytes")
            found[name] = {key: round(ours[key] / theirs[key], 3) for key in compared}
    plain = medians.get(("ours", "LoRA, same batches"))
    for (trainer, name), figures in medians.items():
        if trainer == "ours" and plain is not None and figures is not plain:
            keys = ("tokens_per_s", "peak_bytes")
            found[f"ours: {name} / LoRA, same batches"] = {key: round(figures[key] / plain[key], 3) for key in keys}
    return found


if __name__ == "__main__":
    main()
