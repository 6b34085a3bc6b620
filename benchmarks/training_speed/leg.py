"""One leg: one trainer, one setting, in a process of its own. Reads a spec from stdin, prints one line of JSON.

Both trainers are timed by the same clock: at the end of every optimiser step, after the first few; both are counted
by the same collator around theirs: tokens that are not padding.
"""

import json
import os
import resource
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WARM_STEPS = 3


@dataclass
class Clock:
    """When each step ended, and what it took."""

    tokens: list[int] = field(default_factory=list)
    width: list[int] = field(default_factory=list)
    """Places of each batch, padding included."""
    ended_s: list[float] = field(default_factory=list)
    own_cpu_s: list[float] = field(default_factory=list)
    busy_cpu_s: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def step(self) -> None:
        self.ended_s.append(time.monotonic())
        self.own_cpu_s.append(time.process_time())
        self.busy_cpu_s.append(busy_cpu_s(Path("/proc/stat").read_text()))
        self.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def figures(self, warm: int = WARM_STEPS) -> dict[str, float]:
        """Of the steps after the warm ones."""
        tokens = sum(self.tokens[warm : len(self.ended_s)])
        places = sum(self.width[warm : len(self.ended_s)])
        seconds = self.ended_s[-1] - self.ended_s[warm - 1]
        own = self.own_cpu_s[-1] - self.own_cpu_s[warm - 1]
        busy = self.busy_cpu_s[-1] - self.busy_cpu_s[warm - 1]
        return {
            "tokens_per_s": tokens / seconds,
            "tokens_per_cpu_s": tokens / own,
            "padding": 1 - tokens / places,
            "peak_bytes": self.peak_bytes,
            "others_share": max(0.0, busy - own) / busy if busy else 0.0,
            "steps": len(self.ended_s) - warm,
        }


def busy_cpu_s(stat: str) -> float:
    """Seconds of all processors that were not idle since boot, of the text of /proc/stat."""
    user, nice, system, _idle, _wait, irq, softirq, steal, *_ = map(int, stat.split("\n", 1)[0].split()[1:])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def counted(collate: Any, clock: Clock) -> Any:
    """The collator, counting what it hands out. Batches are made in the order in which they are trained."""

    def call(rows: Any) -> Any:
        batch = collate(rows)
        ids = batch["input_ids"]
        clock.width.append(int(ids.numel()))
        clock.tokens.append(sum(len(row["input_ids"]) for row in rows))
        return batch

    return call


def run_ours(spec: dict[str, Any], clock: Clock) -> None:
    from rich.console import Console

    from loradock_train import fit, train
    from loradock_train.dataset import Collator
    from loradock_train.order import Order

    vars(fit)["Collator"] = lambda *arguments: counted(Collator(*arguments), clock)
    if spec["order"] == "as written":
        Order.of_epoch = lambda self, epoch: list(range(len(self.lengths)))  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        train(spec["config"], output=Path(folder) / "run", console=Console(quiet=True))


def run_trl(spec: dict[str, Any], clock: Clock) -> None:
    import torch
    from datasets import load_dataset  # type: ignore[import-untyped]
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    config = dict(spec["config"])
    rows = load_dataset("json", data_files=config.pop("data"), split="train")
    tokenizer = AutoTokenizer.from_pretrained(config["model"])
    model = AutoModelForCausalLM.from_pretrained(config.pop("model"), dtype=torch.float32)
    lora = config.pop("lora", None)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(output_dir=folder, **config)
        trainer = SFTTrainer(
            model=model, args=arguments, train_dataset=rows, processing_class=tokenizer,
            peft_config=None if lora is None else LoraConfig(**lora),
        )  # fmt: skip
        trainer.data_collator = counted(trainer.data_collator, clock)
        trainer.train()


def main() -> None:
    spec = json.load(sys.stdin)
    import torch
    from transformers.trainer_callback import CallbackHandler
    from transformers.utils import logging

    torch.set_num_threads(spec["threads"])
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    clock = Clock()
    original = CallbackHandler.on_step_end

    def timed(self: Any, *arguments: Any) -> Any:
        clock.step()
        return original(self, *arguments)

    CallbackHandler.on_step_end = timed  # type: ignore[assignment]
    {"ours": run_ours, "trl": run_trl}[spec["trainer"]](spec, clock)
    sys.stdout.write("\n" + json.dumps(clock.figures()) + "\n")


if __name__ == "__main__":
    main()
