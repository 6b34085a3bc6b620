"""Time of one LoRA layer on CPU, stock vLLM's wrapper against ours.

    python benchmarks/cpu_lora_kernel.py [--hidden 1024] [--max-rank 16] [--rank 8] [--slots 64] [--dtype float32]

A packed q/k/v layer; the batch is decode (one row for each of 64 requests, shuffled over k adapters, with and without
base rows) or prefill (8 requests of 64 tokens). Runs alternate and medians are compared, so a busy machine harms both
sides alike. Stock is wrong where base rows are in the batch; its time counts all the same. Prints a table, then one
JSON line.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from loradock_serve.inside.cpu_lora import CorrectedPunicaWrapperCPU

ROUNDS = 30


def batch(case: str, adapters: int, with_base: bool, slots: int) -> list[int]:
    """Adapter id of each row; 0 is the base."""
    shuffle = random.Random(adapters)
    ids = [(i * slots) // adapters + 1 for i in range(adapters)] + ([0] * max(1, adapters // 4) if with_base else [])
    requests = [ids[i % len(ids)] for i in range(64 if case == "decode" else 8)]
    shuffle.shuffle(requests)
    return requests if case == "decode" else [request for request in requests for _ in range(64)]


def alternate(sides: Sequence[Callable[[], Any]]) -> list[float]:
    """Median microseconds of a call for each side."""
    for side in sides:
        side()
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(ROUNDS):
        for side, taken in zip(sides, times, strict=True):
            started = time.perf_counter()
            side()
            taken.append((time.perf_counter() - started) * 1e6)
    return [statistics.median(taken) for taken in times]


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    dtype = getattr(torch, arguments.dtype)
    hidden, slots, max_rank, rank = arguments.hidden, arguments.slots, arguments.max_rank, arguments.rank
    outputs = (hidden, hidden // 2, hidden // 2)
    a = tuple(torch.zeros(slots, 1, max_rank, hidden, dtype=dtype) for _ in outputs)
    b = tuple(torch.zeros(slots, 1, width, max_rank, dtype=dtype) for width in outputs)
    for matrix in a:
        matrix[:, :, :rank].normal_()
    for matrix in b:
        matrix[..., :rank].normal_()
    stock, ours = PunicaWrapperCPU(4096, 256, "cpu"), CorrectedPunicaWrapperCPU(4096, 256, "cpu")
    for slot in range(slots):
        ours.slot_written(slot, rank)
    rows = []
    for case in ("decode", "prefill"):
        for with_base in (False, True):
            for adapters in (0, 1, 2, 4, 8, 16, 32, 64):
                if adapters > (slots if case == "decode" else 8):
                    continue
                ids = batch(case, adapters, with_base, slots) if adapters else [0] * (64 if case == "decode" else 512)
                mapping = LoRAMapping(tuple(ids), tuple(ids[:1]), is_prefill=True)
                x, y = torch.randn(len(ids), hidden, dtype=dtype), torch.zeros(len(ids), sum(outputs), dtype=dtype)
                for wrapper in (stock, ours):
                    wrapper.update_metadata(mapping, list(range(1, slots + 1)), slots + 1, 512)
                sides = [partial(w.add_lora_linear, y, x, a, b, 1.0, outputs) for w in (stock, ours)]
                stock_us, ours_us = alternate(sides)
                rows.append(
                    {"case": case, "base_rows": with_base, "adapters": adapters, "stock_us": round(stock_us, 1),
                     "ours_us": round(ours_us, 1)}
                )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 1024), ("max-rank", 16), ("rank", 8), ("slots", 64), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with torch.inference_mode():
        rows = measure(arguments)
    print(f"{'case':8} {'base rows':9} {'adapters':>8} {'stock us':>10} {'ours us':>10} {'times':>6}")
    for row in rows:
        times = row["stock_us"] / row["ours_us"]
        print(
            f"{row['case']:8} {row['base_rows']!s:9} {row['adapters']:8} {row['stock_us']:10.1f} "
            f"{row['ours_us']:10.1f} {times:6.1f}"
        )
    print(json.dumps({"benchmark": "cpu_lora_kernel", **vars(arguments), "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
