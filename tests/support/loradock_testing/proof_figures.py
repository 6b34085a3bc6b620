"""Adapters with the trainer's own probe figures, many and quickly; and the same adapters spoilt in every usual way.

One PEFT model for each shape of adapter, filled with new random values for each: seconds for a hundred. Knows nothing
of engines.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from loradock_adapters.probe import Probe
from loradock_testing.isolation import _SHAPES, PROMPTS
from loradock_testing.tiny_models import _randomise
from loradock_train.proof import probe_logits, prove

STRENGTHS = (0.5, 0.15, 0.05)
"""Spread of an adapter's updates, as a share of that of the base's own weights."""

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Figured:
    """An adapter, and what its trainer's passport would say."""

    directory: Path
    probe: Probe


def prompts_of(base_dir: Path) -> list[list[int]]:
    """Four prompts of different lengths."""
    tokenizer: Any = AutoTokenizer.from_pretrained(base_dir)
    return [tokenizer(text).input_ids for text in (PROMPTS[0], PROMPTS[7], "parser.add_argument(", "import os\n\n")]


def good_adapters(root: Path, base_dir: Path, count: int, trained_on: Path | None = None) -> Iterator[Figured]:
    """Random adapters of all shapes and strengths; their figures come from the base `trained_on`, by default this."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other
    try:
        yield from _good_adapters(root, base_dir, count, trained_on)
    finally:
        torch.set_num_threads(threads)


def _good_adapters(root: Path, base_dir: Path, count: int, trained_on: Path | None) -> Iterator[Figured]:
    prompts = prompts_of(base_dir)
    source = trained_on or base_dir
    plain: Any = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    base = probe_logits(plain, prompts)
    for shape, (rank, modules) in enumerate(_SHAPES):
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(modules), task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(source, dtype="auto"), config).eval()
        for number in range(shape, count, len(_SHAPES)):
            generator = torch.Generator().manual_seed(5000 + number)
            with torch.no_grad():
                for layer in model.modules():
                    if isinstance(layer, LoraLayer):
                        _randomise(layer, generator, STRENGTHS[number % len(STRENGTHS)])
            directory = root / f"adapter-{number}"
            model.save_pretrained(str(directory), save_embedding_layers=False)
            logits = probe_logits(model, prompts)
            proof = prove(prompts, base, logits, logits, plain.dtype, "lora")
            yield Figured(directory, proof.passport_entry())


def doubled_alpha(directory: Path) -> None:
    _configure(directory, lambda config: config.update(lora_alpha=2 * config["lora_alpha"]))


def halved_alpha(directory: Path) -> None:
    _configure(directory, lambda config: config.update(lora_alpha=config["lora_alpha"] / 2))


def swapped_files(directory: Path) -> None:
    """Every A is another module's of the same shape."""

    def swap(tensors: Tensors) -> Tensors:
        alike: dict[tuple[int, ...], list[str]] = {}
        for name in sorted(tensors):
            if "lora_A" in name:
                alike.setdefault(tuple(tensors[name].shape), []).append(name)
        moved = {a: tensors[b] for names in alike.values() for a, b in zip(names, names[1:] + names[:1], strict=True)}
        return tensors | moved

    _rewrite(directory, swap)


def transposed(directory: Path) -> None:
    """A and B of square modules changed places and directions: the shapes still fit."""

    def turn(tensors: Tensors) -> Tensors:
        turned = dict(tensors)
        for name in tensors:
            other = name.replace("lora_A", "lora_B")
            if ("q_proj" in name or "o_proj" in name) and other != name:
                turned[name], turned[other] = tensors[other].T.contiguous(), tensors[name].T.contiguous()
        return turned

    _rewrite(directory, turn)


def unapplied(directory: Path) -> None:
    """Every tensor under a prefix that no module has: the engine loads them, and applies nothing."""
    _rewrite(
        directory,
        lambda tensors: {
            name.replace(".layers.", ".blocks."): tensor for name, tensor in tensors.items() if ".layers." in name
        },
    )


SPOILT: Mapping[str, Callable[[Path], None]] = {
    spoil.__name__: spoil for spoil in (doubled_alpha, halved_alpha, swapped_files, transposed, unapplied)
}


def spoilt(figured: Figured, spoil: Callable[[Path], None], target: Path) -> Figured:
    """A copy that is spoilt, with the figures of the original."""
    shutil.copytree(figured.directory, target)
    spoil(target)
    return Figured(target, figured.probe)


def _configure(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def _rewrite(directory: Path, change: Callable[[Tensors], Tensors]) -> None:
    path = directory / "adapter_model.safetensors"
    changed = change(load_file(path))
    save_file({name: tensor.clone().contiguous() for name, tensor in changed.items()}, path)
