"""The tokenizer of a run: the model's own, another's, or a byte-level BPE trained on the run's data; and its chat
template."""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from loradock_train.config import TrainConfig
from loradock_train.encode import prompt_and_answer
from loradock_train.errors import ModelError
from loradock_train.images import flat
from loradock_train.rows import Rows

END_OF_TEXT, PADDING, TURN_START, TURN_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(config: TrainConfig, rows: Rows) -> PreTrainedTokenizerBase:
    """The run's tokenizer, its chat template set. Raises ModelError when it cannot be loaded or has no template for
    chat rows."""
    options = config.tokenizer
    if options is not None and options.train_vocab_size is not None:
        tokenizer: PreTrainedTokenizerBase = train_tokenizer(_texts(rows, config), options.train_vocab_size)
    else:
        source = options.path if options is not None and options.path is not None else config.model_id
        assert source is not None  # the config's validators saw to it
        tokenizer = load_tokenizer(source)
        if not tokenizer.chat_template:
            tokenizer.chat_template = _processor_template(source)
    if config.chat_template is not None:
        tokenizer.chat_template = config.chat_template
        _check_template(tokenizer)
    if rows.format == "chat" and not tokenizer.chat_template:
        if TURN_END not in tokenizer.get_vocab():
            raise ModelError(
                f"the rows are chats, but the tokenizer of {config.model_id} has no chat template; "
                "set chat_template: to a Jinja template or the path of a .jinja file"
            )
        tokenizer.chat_template = CHATML
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no end-of-text token (eos_token): a model trained with it would never stop")
    return tokenizer


def _check_template(tokenizer: Any) -> None:
    """ModelError for what Jinja cannot read. What a template refuses is known when it gets the rows."""
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
    except TemplateSyntaxError as error:
        raise ModelError(f"chat_template, line {error.lineno} of it: not valid Jinja: {error.message}") from error
    except (TemplateError, TypeError, ValueError, LookupError):  # it may ask for more than this chat
        return


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """A tokenizer by path or hub id."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"no tokenizer could be loaded from {source}: {_first_line(error)}") from error
    return tokenizer


def _processor_template(source: str) -> str | None:
    """The chat template of an older model that sees, which lies with its processor alone."""
    file = cached_file(
        source, "chat_template.json", _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False, _raise_exceptions_for_gated_repo=False,
    )  # fmt: skip
    template = json.loads(Path(file).read_text(encoding="utf-8")).get("chat_template") if file is not None else None
    return template if isinstance(template, str) else None


def padding_id(tokenizer: Any) -> int:
    """The id that fills short rows. Where the tokenizer has none, EOS: it is masked by position, never by its value."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with the special tokens of ChatML. Deterministic for the same texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        extra_special_tokens=[TURN_START, TURN_END],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def _texts(rows: Rows, config: TrainConfig) -> Iterator[str]:
    for row in rows.rows:
        if rows.format == "text":
            yield row.values["text"]
        elif rows.format == "chat":
            yield from (flat(message)["content"] for message in row.values["messages"] if message.get("content"))
        else:
            yield "".join(prompt_and_answer(row, rows.format, config.prompt_template))


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """The tokenizer's files, chat template included."""
    tokenizer.save_pretrained(str(directory))


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Hash of tokenizer.json as it is saved; None for a tokenizer that has no such file."""
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(tokenizer, Path(folder))
        file = Path(folder) / "tokenizer.json"
        return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
