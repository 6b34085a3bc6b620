"""From a row to token ids and labels. The labels decide what is learnt, so nothing here guesses.

What the server will tokenise is what is trained: a completion's prompt is tokenised alone, special tokens as the
tokenizer adds them, exactly as `/v1/completions` does; a chat goes through the chat template, with the generation
prompt, exactly as `/v1/chat/completions` does. Answers are appended as ids of their own: no offsets, no decoding, no
search for markers.

Labels are those of transformers: one per token, -100 where nothing is learnt; models shift by one themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from loradock_train.chat import as_served
from loradock_train.errors import DataError, Problem
from loradock_train.images import flat
from loradock_train.preference_rows import as_two
from loradock_train.rows import Format, Row

IGNORED = -100

ALPACA_HEAD = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
)
ALPACA_WITH_INPUT = ", paired with an input that provides further context"


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    eos_token_id: int | None
    chat_template: Any

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Any: ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Example:
    """One row as tokens. `labels` is as long as `input_ids`."""

    input_ids: list[int]
    labels: list[int]
    images: tuple[str, ...] = ()
    """Where its images are, in order."""
    images_end: int = 0
    """The place after its last image token: a row cut before it would show half an image."""

    @property
    def num_trained_tokens(self) -> int:
        """Tokens that have a loss. The first token of a row never has: nothing comes before it."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class Encoder:
    """How this run turns rows into tokens."""

    tokenizer: Tokenizer
    append_eos: bool = True
    prompt_template: str | None = None

    def encode(self, row: Row, row_format: Format) -> Example:
        """One row. Raises DataError naming the row."""
        if row_format == "chat":
            return self._chat(row)
        if row_format == "preference":
            return self.pair(row)[0]
        if row_format == "text":
            return self._text(row.values["text"], row.is_continued)
        prompt, answer = prompt_and_answer(row, row_format, self.prompt_template)
        return self._completion(prompt, answer)

    def pair(self, row: Row) -> tuple[Example, Example]:
        """A preference row: the preferred answer and the other, each after the prompt."""
        kind, preferred, other = as_two(row.values)
        first, second = (self.encode(Row(row.file, row.line, each), kind) for each in (preferred, other))
        return first, second

    def prompt_ids(self, row: Row, row_format: Format) -> list[int]:
        """What the server would see of this row before it answers (of raw text: its first words)."""
        if row_format == "text":
            ids = self._ids(row.values["text"][:2000])
            return ids[: max(1, min(16, len(ids) // 2))]
        example = self.encode(row, row_format)
        first = next(index for index, label in enumerate(example.labels) if label != IGNORED)
        return example.input_ids[:first]

    def _ids(self, text: str, special: bool = True) -> list[int]:
        ids: list[int] = list(self.tokenizer(text, add_special_tokens=special)["input_ids"])
        return ids

    def _begun(self, text: str) -> list[int]:
        """A text with the special tokens that the tokenizer puts before it. Some (T5's kind) end every text with EOS: a
        prompt must not end so, and documents get theirs from us. An EOS that stands in the text itself stays."""
        ids, eos = self._ids(text), self.tokenizer.eos_token_id
        if len(ids) < 2 or ids[-1] != eos:
            return ids
        own = self._ids(text, special=False)
        return ids[:-1] if _count_at_end(ids, eos) > _count_at_end(own, eos) else ids

    def _ended(self, ids: list[int]) -> list[int]:
        """With EOS behind it, once: data may bring its own."""
        eos = self.tokenizer.eos_token_id
        if not self.append_eos or eos is None or (ids and ids[-1] == eos):
            return ids
        return [*ids, eos]

    def _text(self, text: str, is_continued: bool) -> Example:
        ids = self._begun(text)
        ids = ids if is_continued else self._ended(ids)
        return Example(ids, list(ids))

    def _completion(self, prompt: str, answer: str) -> Example:
        """The prompt as the server tokenises it, alone; then the answer.

        Where the ids of the whole text begin with the prompt's, the answer's are the rest (SentencePiece tokenizers
        would put a space before an answer tokenised alone). Where a merge crosses the border, the answer is
        tokenised alone.
        """
        prompt_ids, whole_ids = self._begun(prompt), self._begun(prompt + answer)
        is_prefix = len(whole_ids) > len(prompt_ids) and whole_ids[: len(prompt_ids)] == prompt_ids
        answer_ids = whole_ids[len(prompt_ids) :] if is_prefix else self._ids(answer, special=False)
        answer_ids = self._ended(answer_ids)
        return Example(prompt_ids + answer_ids, [IGNORED] * len(prompt_ids) + answer_ids)

    def _chat(self, row: Row) -> Example:
        """Render message by message: what an assistant turn adds to its generation prompt is what is learnt.

        The template must be prefix-stable: rendering more messages may only append. Templates that rewrite earlier
        turns (some drop earlier reasoning) would train on text that the server never shows the model.
        """
        self._check_images(row)
        messages, tools = as_served(row.values)
        messages = [self._message(message) for message in messages]
        whole = self._render(messages, tools, generation=False, row=row)
        turns: list[tuple[int, int]] = []  # where in the text an answer begins, and where its turn ends
        for index, message in enumerate(row.values["messages"]):
            if message["role"] != "assistant" or message.get("weight", 1) == 0:
                continue
            before = self._render(messages[:index], tools, generation=True, row=row)
            through = self._render(messages[: index + 1], tools, generation=False, row=row)
            if not (through.startswith(before) and whole.startswith(through)):
                raise DataError(_UNSTABLE, [Problem(row.where, _not_a_prefix(index))])
            turns.append((len(before), len(through)))
        return self._answers(whole, turns)

    def _answers(self, text: str, turns: Sequence[tuple[int, int]]) -> Example:
        """A rendered conversation of which the answers are learnt, each through its stop token.

        Where the ids up to an answer do not begin the ids of the whole text (an answer that begins with a newline
        merges with that of the generation prompt), the answers are tokenised alone: the server never sees the merge.
        """
        ids = self._ids(text, special=False)
        spans = [(self._as_prefix(text[:start], ids), self._as_prefix(text[:end], ids)) for start, end in turns]
        if any(place < 0 for span in spans for place in span):
            ids, spans = self._in_pieces(text, turns)
        labels = [IGNORED] * len(ids)
        for start, end in spans:
            stop = _through_stop(ids[:end], start, self.stop_ids())
            labels[start:stop] = ids[start:stop]
        return Example(ids, labels)

    def _as_prefix(self, text: str, ids: Sequence[int]) -> int:
        """How many of the ids this beginning of their text is; -1 where a token crosses its end."""
        own = self._ids(text, special=False)
        return len(own) if list(ids[: len(own)]) == own else -1

    def _in_pieces(self, text: str, turns: Sequence[tuple[int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
        """The text cut where answers begin and end: its ids, and where among them each answer stands."""
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        read = 0
        for start, end in turns:
            ids += self._ids(text[read:start], special=False)
            answer = self._ids(text[start:end], special=False)
            spans.append((len(ids), len(ids) + len(answer)))
            ids, read = ids + answer, end
        return ids + self._ids(text[read:], special=False), spans

    def stop_ids(self) -> frozenset[int]:
        """Tokens after which an answer is over, for this tokenizer and template."""
        return frozenset(stop_token_ids(self.tokenizer))

    def _check_images(self, row: Row) -> None:
        if row.images:
            raise DataError("a row shows an image, and the model sees none:", [Problem(row.where, "has an image")])

    def _message(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message as the chat template gets it."""
        return flat(message)

    def _renderer(self) -> Any:
        """What has the chat template."""
        return self.tokenizer

    def _render(self, messages: Sequence[dict[str, Any]], tools: Any, generation: bool, row: Row) -> str:
        if not messages and not generation:
            return ""
        try:
            text: str = self._renderer().apply_chat_template(
                list(messages), tools=tools, add_generation_prompt=generation, tokenize=False
            )
            return text
        except Exception as error:  # templates raise what they like (jinja's TemplateError, TypeError, …)
            raise DataError(
                "the chat template refuses a conversation:", [Problem(row.where, f"{type(error).__name__}: {error}")]
            ) from error


_UNSTABLE = (
    "the chat template cannot be trained on: it rewrites earlier turns (set chat_template: to one that only appends, "
    "or learn the last answer of each row alone, with weight: 0 on those before it):"
)


def _not_a_prefix(index: int) -> str:
    return f"rendering up to messages[{index}] is not a prefix of the whole conversation"


def _through_stop(ids: Sequence[int], start: int, stops: frozenset[int]) -> int:
    """End of the learnt span: just after the turn's stop token. What templates add behind it (a newline) is never
    generated."""
    for index in range(len(ids) - 1, start - 1, -1):
        if ids[index] in stops:
            return index + 1
    return len(ids)


def _count_at_end(ids: Sequence[int], token: int | None) -> int:
    return next((count for count, each in enumerate(reversed(ids)) if each != token), len(ids))


def prompt_and_answer(row: Row, row_format: Format, template: str | None) -> tuple[str, str]:
    """The prompt and the answer of an instruction or completion row."""
    values = row.values
    if row_format == "completion":
        return values["prompt"], values["completion"]
    extra_input = values.get("input", "")
    if extra_input and template is not None and "{input}" not in template:
        raise DataError(
            "prompt_template leaves out what rows hold:",
            [Problem(row.where, "has an input, and prompt_template has no place for it; add {input}")],
        )
    return instruction_prompt(values["instruction"], extra_input, template), values["output"]


def instruction_prompt(instruction: str, extra_input: str, template: str | None) -> str:
    """The text before the answer of an instruction row. Plain replacement: braces in the data are left alone."""
    if template is None:
        head = ALPACA_HEAD.format(ALPACA_WITH_INPUT if extra_input else "")
        block = f"### Input:\n{extra_input}\n\n" if extra_input else ""
        return f"{head}### Instruction:\n{instruction}\n\n{block}### Response:\n"
    pieces = template.split("{instruction}")
    return instruction.join(piece.replace("{input}", extra_input) for piece in pieces)


def stop_token_ids(tokenizer: Any) -> tuple[int, ...]:
    """End of text, and the end-of-turn tokens that chat templates of the known families use, where the vocabulary
    has them."""
    vocabulary = tokenizer.get_added_vocab()
    ids = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    for token in (
        "<|im_end|>",
        "<|eot_id|>",
        "<|eot|>",
        "<|eom_id|>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<|end|>",
        "<|endoftext|>",
    ):
        if token in vocabulary and (token in template) and vocabulary[token] not in ids:
            ids.append(int(vocabulary[token]))
    return tuple(ids)
