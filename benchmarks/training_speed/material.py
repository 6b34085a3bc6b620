"""What the legs train: docstrings of the standard library, a tokenizer made of them, a Llama of random weights."""

import ast
import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 8192
MIN_CHARACTERS = 40


@dataclass(frozen=True)
class Size:
    """Of a model."""

    layers: int
    hidden: int

    @property
    def name(self) -> str:
        return f"{self.layers} layers x {self.hidden}"


def docstrings(number: int) -> list[str]:
    """The first so many of the standard library, by file name: as long and as short as they come."""
    found: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module))
        found += [text for node in nodes if (text := ast.get_docstring(node)) and len(text) >= MIN_CHARACTERS]
        if len(found) >= number:
            break
    return found[:number]


def write_rows(path: Path, number: int) -> Path:
    """A JSONL file of raw text."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in docstrings(number)), encoding="utf-8")
    return path


def make_base(directory: Path, size: Size, positions: int) -> Path:
    """A Llama of that size, float32, with its tokenizer."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(docstrings(3000), trainer)
    tokenizer: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=size.hidden, intermediate_size=8 * size.hidden // 3 // 32 * 32,
        num_hidden_layers=size.layers, num_attention_heads=size.hidden // 64, max_position_embeddings=positions,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    model.save_pretrained(directory)
    return directory
