"""What is learnt, of every data format, token by token, as a table that a person can check.

Each row gives the tokens of a conversation or document as texts, and under them by hand a `+` (learnt) or a `-` (not).
The tokens are words: special tokens and what stands between them, cut at spaces and newlines, which are tokens of
their own. The chat templates are those of the families, written down here without what they do not need.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import pytest
from jinja2 import Environment

from loradock_train.dataset import Collator, build_dataset
from loradock_train.encode import IGNORED, Encoder
from loradock_train.errors import DataError
from loradock_train.rows import Format, Row, Rows

LLAMA3 = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}"
    '<|end_header_id|>\n\n{% if m.tool_calls %}{% for c in m.tool_calls %}{"name": "{{ c.function.name }}", '
    '"parameters": {{ c.function.arguments | tojson }}}{% endfor %}{% else %}{{ m.content }}{% endif %}<|eot_id|>'
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN = (
    "{% if tools %}<|im_start|>system\nTools:{% for t in tools %} {{ t.function.name }}{% endfor %}<|im_end|>\n"
    "{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>{{ m.content }}</tool_response>"
    "<|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>{% endfor %}'
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "<bos>{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% elif m.role == 'tool' %}"
    "[TOOL_RESULTS] {{ m.content }} [/TOOL_RESULTS]{% elif m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}{% endfor %}]</s>'
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
THINKING = (  # drops the reasoning of all turns but the last, as some templates of reasoning models do
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
)
SPECIAL = re.compile(r"(<\|?\w+\|?>|</\w+>|\[/?[A-Z_]+\])|( |\n+|[^\s<\[{}]+|.)")


class Words:
    """A tokenizer whose tokens are the pieces of SPECIAL, numbered as they come. Runs of newlines are one token."""

    def __init__(self, template: str | None, end: str) -> None:
        self.chat_template = template
        self._ids: dict[str, int] = {}
        self.eos_token_id: int | None = self._id(end)

    def _id(self, piece: str) -> int:
        return self._ids.setdefault(piece, len(self._ids))

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [self._id(match.group()) for match in SPECIAL.finditer(text)]}

    def apply_chat_template(self, conversation: Any, **options: Any) -> str:
        return Environment().from_string(self.chat_template or "").render(messages=conversation, **options)

    def get_added_vocab(self) -> dict[str, int]:
        marks = [piece for piece in self._ids if SPECIAL.fullmatch(piece) and piece[0] in "<[" and len(piece) > 2]
        return {piece: self._ids[piece] for piece in marks}

    def texts(self, ids: Any) -> list[str]:
        names = {number: piece for piece, number in self._ids.items()}
        return [names[int(number)] for number in ids]


@dataclass(frozen=True)
class Case:
    """One row of the table. `expected`: lines of tokens, each followed by a line of marks, one mark a token."""

    name: str
    format: Format
    values: dict[str, Any]
    expected: str
    template: str | None = None
    end: str = "</s>"
    options: dict[str, Any] = field(default_factory=dict)


def says(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def call(name: str, arguments: str, number: str = "c1") -> dict[str, Any]:
    return {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}


TURNS = [says("system", "be kind"), says("user", "hi"), says("assistant", "yo you"), says("user", "bye"),
         says("assistant", "ok")]  # fmt: skip
CALLS = {
    "tools": [tool("add")],
    "messages": [
        says("user", "sum"),
        says("assistant", None, tool_calls=[call("add", '{"a": 1}')]),
        says("tool", "3", tool_call_id="c1"),
        says("assistant", "three"),
    ],
}

# `·` is a space, `¶` a newline; tokens are parted by spaces.
TABLE = [
    Case("text", "text", {"text": "one two"}, """
        one · two </s>
        -   + +   +"""),
    Case("completion", "completion", {"prompt": "one ", "completion": "two three"}, """
        one · two · three </s>
        -   - +   + +     +"""),
    Case("completion without an end", "completion", {"prompt": "one ", "completion": "two"}, """
        one · two
        -   - +""", options={"append_eos": False}),
    Case("instruction", "instruction", {"instruction": "say", "input": "it", "output": "it it"}, """
        Q: · say · it ¶ A: · it · it </s>
        -  - -   - -  - -  - +  + +  +""", options={"prompt_template": "Q: {instruction} {input}\nA: "}),
    Case("chatml, several turns", "chat", {"messages": TURNS}, """
        <|im_start|> system ¶ be · kind <|im_end|> ¶
        -            -      - -  - -    -          -
        <|im_start|> user ¶ hi <|im_end|> ¶ <|im_start|> assistant ¶ yo · you <|im_end|> ¶
        -            -    - -  -          - -            -         - +  + +   +          -
        <|im_start|> user ¶ bye <|im_end|> ¶ <|im_start|> assistant ¶ ok <|im_end|> ¶
        -            -    - -   -          - -            -         - +  +          -""", QWEN, "<|endoftext|>"),
    Case("chatml, weight 0", "chat", {"messages": [*TURNS[1:2], {**TURNS[2], "weight": 0}, *TURNS[3:]]}, """
        <|im_start|> user ¶ hi <|im_end|> ¶ <|im_start|> assistant ¶ yo · you <|im_end|> ¶
        -            -    - -  -          - -            -         - -  - -   -          -
        <|im_start|> user ¶ bye <|im_end|> ¶ <|im_start|> assistant ¶ ok <|im_end|> ¶
        -            -    - -   -          - -            -         - +  +          -""", QWEN, "<|endoftext|>"),
    Case("chatml, tools", "chat", CALLS, """
        <|im_start|> system ¶ Tools: · add <|im_end|> ¶ <|im_start|> user ¶ sum <|im_end|> ¶
        -            -      - -      - -   -          - -            -    - -   -          -
        <|im_start|> assistant ¶
        -            -         -
        <tool_call> { "name": · "add", · "arguments": · { "a": · 1 } } </tool_call> <|im_end|> ¶
        +           + +       + +      + +            + + +    + + + + +            +          -
        <|im_start|> user ¶ <tool_response> 3 </tool_response> <|im_end|> ¶
        -            -    - -               - -                -          -
        <|im_start|> assistant ¶ three <|im_end|> ¶
        -            -         - +     +          -""", QWEN, "<|endoftext|>"),
    Case("chatml, an answer that begins with the generation prompt's own newline", "chat",
         {"messages": [says("user", "q"), says("assistant", "\na")]}, """
        <|im_start|> user ¶ q <|im_end|> ¶ <|im_start|> assistant ¶ ¶ a <|im_end|> ¶
        -            -    - - -          - -            -         - + + +          -""", QWEN, "<|endoftext|>"),
    Case("llama 3, several turns", "chat", {"messages": TURNS}, """
        <|begin_of_text|> <|start_header_id|> system <|end_header_id|> ¶¶ be · kind <|eot_id|>
        -                 -                   -      -                 -  -  - -    -
        <|start_header_id|> user <|end_header_id|> ¶¶ hi <|eot_id|>
        -                   -    -                 -  -  -
        <|start_header_id|> assistant <|end_header_id|> ¶¶ yo · you <|eot_id|>
        -                   -         -                 -  +  + +   +
        <|start_header_id|> user <|end_header_id|> ¶¶ bye <|eot_id|>
        -                   -    -                 -  -   -
        <|start_header_id|> assistant <|end_header_id|> ¶¶ ok <|eot_id|>
        -                   -         -                 -  +  +""", LLAMA3, "<|end_of_text|>"),
    Case("llama 3, tools", "chat", CALLS, """
        <|begin_of_text|> <|start_header_id|> user <|end_header_id|> ¶¶ sum <|eot_id|>
        -                 -                   -    -                 -  -   -
        <|start_header_id|> assistant <|end_header_id|> ¶¶
        -                   -         -                 -
        { "name": · "add", · "parameters": · { "a": · 1 } } <|eot_id|>
        + +       + +      + +             + + +    + + + + +
        <|start_header_id|> ipython <|end_header_id|> ¶¶ 3 <|eot_id|>
        -                   -       -                 -  - -
        <|start_header_id|> assistant <|end_header_id|> ¶¶ three <|eot_id|>
        -                   -         -                 -  +     +""", LLAMA3, "<|end_of_text|>"),
    Case("gemma, several turns", "chat", {"messages": TURNS[1:]}, """
        <bos> <start_of_turn> user ¶ hi <end_of_turn> ¶ <start_of_turn> model ¶ yo · you <end_of_turn> ¶
        -     -               -    - -  -             - -               -     - +  + +   +             -
        <start_of_turn> user ¶ bye <end_of_turn> ¶ <start_of_turn> model ¶ ok <end_of_turn> ¶
        -               -    - -   -             - -               -     - +  +             -""", GEMMA, "<eos>"),
    Case("mistral, several turns", "chat", {"messages": TURNS[1:]}, """
        <s> [INST] · hi · [/INST] · yo · you </s> [INST] · bye · [/INST] · ok </s>
        -   -      - -  - -       + +  + +   +    -      - -   - -       + +  +""", MISTRAL),
    Case("mistral, tools", "chat", {"messages": CALLS["messages"]}, """
        <s> [INST] · sum · [/INST]
        -   -      - -   - -
        [TOOL_CALLS] · [ { "name": · "add", · "arguments": · { "a": · 1 } } ] </s>
        +            + + + +       + +      + +            + + +    + + + + + +
        [TOOL_RESULTS] · 3 · [/TOOL_RESULTS] · three </s>
        -              - - - -               + +     +""", MISTRAL),
]  # fmt: skip


def read(expected: str) -> tuple[list[str], str]:
    """Tokens and marks. Each mark must stand below the beginning of its token."""
    lines = [line for line in expected.splitlines() if line.strip()]
    tokens: list[str] = []
    marks = ""
    for text, below in zip(lines[::2], lines[1::2], strict=True):
        places = [match.start() for match in re.finditer(r"\S+", text)]
        assert [match.start() for match in re.finditer(r"\S", below)] == places, f"marks do not stand below: {text}"
        tokens += [piece.replace("·", " ").replace("¶", "\n") for piece in text.split()]
        marks += "".join(below.split())
    return tokens, marks


def rows_of(case: Case, copies: int = 1) -> Rows:
    return Rows(case.format, tuple(Row("rows.jsonl", line, case.values) for line in range(1, copies + 1)), "0" * 64)


def shown(tokenizer: Words, input_ids: Any, labels: Any) -> tuple[list[str], str]:
    """What the trainer would learn of these: a token is learnt where its label is itself."""
    marks = ""
    for index, (token, label) in enumerate(zip(input_ids, labels, strict=True)):
        assert label in (token, IGNORED)
        marks += "+" if index and label != IGNORED else "-"
    return tokenizer.texts(input_ids), marks


@pytest.fixture(params=TABLE, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


def encoder_of(case: Case) -> tuple[Words, Encoder]:
    tokenizer = Words(case.template, case.end)
    for token in read(case.expected)[0]:  # the vocabulary, of which the stop tokens are looked for
        tokenizer(token)
    return tokenizer, Encoder(tokenizer, **case.options)


def test_tokens_and_labels_are_those_of_the_table(case: Case) -> None:
    tokenizer, encoder = encoder_of(case)
    dataset, _ = build_dataset(rows_of(case), encoder, 256, "error", False, "train_path")
    assert shown(tokenizer, dataset[0]["input_ids"], dataset[0]["labels"]) == read(case.expected)


def test_packed_row_learns_what_each_learns_alone_and_begins_anew(case: Case) -> None:
    tokenizer, encoder = encoder_of(case)
    tokens, marks = read(case.expected)
    dataset, _ = build_dataset(rows_of(case, 2), encoder, 2 * len(tokens), "error", True, "train_path")
    assert shown(tokenizer, dataset[0]["input_ids"], dataset[0]["labels"]) == (tokens * 2, marks * 2)
    assert dataset[0]["position_ids"].tolist() == [*range(len(tokens))] * 2


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_row_learns_what_it_learns_alone(case: Case, side: Any) -> None:
    tokenizer, encoder = encoder_of(case)
    tokens, marks = read(case.expected)
    dataset, _ = build_dataset(rows_of(case), encoder, 256, "error", False, "train_path")
    longer = {"input_ids": [0] * (len(tokens) + 3), "labels": [IGNORED] * (len(tokens) + 3)}
    batch = Collator(tokenizer.eos_token_id or 0, side)([dataset[0], longer])
    padding = batch["input_ids"].shape[1] - len(tokens)
    held = slice(padding, None) if side == "left" else slice(0, len(tokens))
    assert shown(tokenizer, batch["input_ids"][0].tolist()[held], batch["labels"][0].tolist()[held]) == (tokens, marks)
    assert int((batch["labels"][0] != IGNORED).sum()) == marks.count("+"), "padding is never learnt"
    assert batch["attention_mask"][0].tolist()[held] == [1] * len(tokens)
    assert int(batch["attention_mask"][0].sum()) == len(tokens)


def test_truncated_row_learns_what_is_left(case: Case) -> None:
    tokenizer, encoder = encoder_of(case)
    tokens, marks = read(case.expected)
    length = marks.index("+") + 1  # only the first learnt token is left
    dataset, report = build_dataset(rows_of(case), encoder, length, "truncate", False, "train_path")
    if case.format == "text" or length < len(tokens):
        assert report.num_truncated == 1
    assert shown(tokenizer, dataset[0]["input_ids"], dataset[0]["labels"]) == (tokens[:length], marks[:length])


def test_template_that_drops_reasoning_of_earlier_turns_is_refused_with_the_way_out() -> None:
    tokenizer = Words(THINKING, "<|endoftext|>")
    turns = [says("user", "q"), says("assistant", "t</think>a"), says("user", "r"), says("assistant", "u</think>b")]
    with pytest.raises(DataError, match="rewrites earlier turns") as caught:
        Encoder(tokenizer).encode(Row("rows.jsonl", 3, {"messages": turns}), "chat")
    assert "rows.jsonl, line 3: rendering up to messages[1] is not a prefix" in str(caught.value)
    assert "weight: 0" in str(caught.value)
    turns[1]["weight"] = 0
    example = Encoder(tokenizer).encode(Row("rows.jsonl", 3, {"messages": turns}), "chat")
    learnt = [token for token in example.labels if token != IGNORED]
    assert tokenizer.texts(learnt) == ["u", "</think>", "b", "<|im_end|>"]
