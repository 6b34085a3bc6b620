"""Tiny real models for tests: a tokenizer, a Llama, LoRA adapters, and what transformers + PEFT answer with them.

Everything is random but seeded, and made on the spot in a second or two: nothing is downloaded. The models say
nonsense, but each says its own nonsense, without hesitating: answers of two models differ almost always, and the
gap between the two best logits is almost always large. Knows nothing of vLLM and nothing of Loradock.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEAR_MODULES = (*ATTENTION_MODULES, "gate_proj", "up_proj", "down_proj")
ALL_MODULES = (*LINEAR_MODULES, "embed_tokens", "lm_head")
"""The whole list of the seed's template: every linear layer, the embedding and the head."""

GAP_LIMIT = 1e-3
"""Two engines may disagree where the two best logits are no further apart than this."""


@dataclass(frozen=True)
class Answer:
    """One greedy continuation."""

    tokens: tuple[int, ...]
    """New tokens only; the stop token, where it was reached, is the last."""
    gaps: tuple[float, ...]
    """For each token: how far the best logit was above the second."""
    text: str

    def is_contradicted_by(self, tokens: Sequence[int], gap_limit: float = GAP_LIMIT) -> bool:
        """Whether other tokens are wrong, and not merely on the other side of a near tie."""
        for mine, gap, other in zip(self.tokens, self.gaps, tokens, strict=False):
            if mine != other:
                return gap > gap_limit
        return len(tokens) != len(self.tokens)


def make_tokenizer(directory: Path, vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """Train a BPE on a source file of the standard library and save it, with a chat template.

    Its alphabet is ASCII, not bytes: whatever a random model says is text that can be read and streamed.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False)
    text = Path(argparse.__file__).read_text(encoding="utf-8").encode("ascii", "ignore").decode()
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    fast: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    directory.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(directory)
    return fast


def make_llama(
    directory: Path,
    seed: int = 0,
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 2,
    kv_heads: int = 1,
    vocab_size: int = 512,
    max_positions: int = 512,
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
) -> Path:
    """Save a random Llama with its tokenizer, and return the directory.

    Heads are `hidden / heads` wide: vLLM's CPU attention wants a multiple of 32.
    """
    tokenizer = make_tokenizer(directory, vocab_size)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=max_positions,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        # Wide enough that every layer matters and the logits spread over several units.
        initializer_range=1.5 * hidden**-0.5,
        dtype=dtype,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        model.lm_head.weight[: len(SPECIAL_TOKENS)] *= 0.05  # no answer ends early, nor holds special tokens
    model.to(dtype).save_pretrained(directory)
    return directory


def make_adapter(
    directory: Path,
    base_dir: Path,
    seed: int,
    *,
    rank: int = 8,
    target_modules: Sequence[str] = LINEAR_MODULES,
    alpha: int | None = None,
    strong: bool = True,
    **lora_options: Any,
) -> Path:
    """Save a random LoRA adapter (adapter weights only, no base matrices), and return the directory.

    `strong`: its updates are about as large as the base's own weights, so greedy answers differ from the base's and
    from other seeds' at once. Otherwise they are a hundred times smaller.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules=list(target_modules),
        task_type="CAUSAL_LM",
        **lora_options,
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_dir), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoraLayer):
                _randomise(module, generator, 0.5 if strong else 0.005)
    model.save_pretrained(str(directory), save_embedding_layers=False)
    return directory


def _randomise(layer: Any, generator: torch.Generator, size: float) -> None:
    """Fill A and B so that scaling * B @ A has about `size` times the spread of the layer's own weight."""
    is_embedding = len(layer.lora_embedding_A) > 0
    pairs = (layer.lora_embedding_A, layer.lora_embedding_B) if is_embedding else (layer.lora_A, layer.lora_B)
    a, b = ((part if is_embedding else part.weight) for part in (pairs[0]["default"], pairs[1]["default"]))
    rank = a.shape[0]
    spread = float(layer.get_base_layer().weight.float().std())
    a.normal_(0.0, 1.0, generator=generator)
    b.normal_(0.0, size * spread / (layer.scaling["default"] * rank**0.5), generator=generator)
    if not is_embedding and b.shape[0] > 256 and layer.get_base_layer().weight.shape[0] == b.shape[0]:
        b[: len(SPECIAL_TOKENS)] *= 0.05  # the head of make_llama keeps special tokens out of answers, and so do we


def reference(
    base_dir: Path,
    adapter_dir: Path | None,
    prompts: Sequence[str | Sequence[int]],
    max_tokens: int,
    *,
    ignore_eos: bool = False,
) -> list[Answer]:
    """What transformers + PEFT answer, greedily, in the checkpoint's own dtype: the truth that an engine is held to."""
    tokenizer: Any = AutoTokenizer.from_pretrained(base_dir)
    model = _load(base_dir, adapter_dir)
    ids = [tokenizer(prompt).input_ids if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    answers: dict[int, Answer] = {}
    for length in sorted({len(prompt) for prompt in ids}):  # batches of one length need no padding
        rows = [row for row, prompt in enumerate(ids) if len(prompt) == length]
        tokens, gaps = _greedy(model, torch.tensor([ids[row] for row in rows]), max_tokens)
        for row, row_tokens, row_gaps in zip(rows, tokens.tolist(), gaps.tolist(), strict=True):
            end = max_tokens
            if not ignore_eos and tokenizer.eos_token_id in row_tokens:
                end = row_tokens.index(tokenizer.eos_token_id) + 1
            text = tokenizer.decode(row_tokens[:end], skip_special_tokens=True)
            answers[row] = Answer(tuple(row_tokens[:end]), tuple(row_gaps[:end]), text)
    return [answers[row] for row in range(len(ids))]


def _load(base_dir: Path, adapter_dir: Path | None) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(base_dir, dtype="auto")
    if adapter_dir is not None:
        model = PeftModel.from_pretrained(model, adapter_dir)
    return model.eval()


@torch.inference_mode()
def _greedy(model: torch.nn.Module, ids: torch.Tensor, max_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens and top-2 gaps, both (rows, max_tokens), for prompts of one length (rows, length)."""
    tokens, gaps = [], []
    cache = None
    for _ in range(max_tokens):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        best = output.logits[:, -1].float().topk(2)  # (rows, 2)
        ids = best.indices[:, :1]  # (rows, 1)
        tokens.append(ids)
        gaps.append(best.values[:, :1] - best.values[:, 1:])
    return torch.cat(tokens, dim=1), torch.cat(gaps, dim=1)


@torch.inference_mode()
def prompt_logprobs(base_dir: Path, adapter_dir: Path | None, prompt: str) -> list[float]:
    """The log-probability of each token of the prompt but the first, by transformers + PEFT."""
    tokenizer: Any = AutoTokenizer.from_pretrained(base_dir)
    model = _load(base_dir, adapter_dir)
    ids = torch.tensor([tokenizer(prompt).input_ids])
    logprobs = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)  # (length - 1, vocabulary)
    picked: list[float] = logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist()
    return picked
