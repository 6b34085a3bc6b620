"""What is learnt, token by token, against expectations written by hand. `_` stands for a token without a label."""

from typing import Any

import pytest

from loradock_testing.letters import BEGIN, CHATML, END, TURN_END, TURN_START, Letters, Merging, ids
from loradock_train.encode import IGNORED, Encoder, Example, instruction_prompt, stop_token_ids
from loradock_train.errors import DataError
from loradock_train.rows import Format, Row

_ = IGNORED


def row(**values: Any) -> Row:
    return Row("rows.jsonl", 7, values)


def encode(row_format: Format, tokenizer: Letters | None = None, append_eos: bool = True, **values: Any) -> Example:
    return Encoder(tokenizer or Letters(), append_eos).encode(row(**values), row_format)


# ---- completion ----------------------------------------------------------------------------------------------------


def test_completion_learns_the_answer_and_the_end_only() -> None:
    example = encode("completion", prompt="hi ", completion="yo")
    assert example.input_ids == [BEGIN, *ids("hi "), *ids("yo"), END]
    assert example.labels == [_, _, _, _, *ids("yo"), END]
    assert example.num_trained_tokens == 3


def test_completion_without_eos_learns_the_answer_only() -> None:
    example = encode("completion", append_eos=False, prompt="hi ", completion="yo")
    assert example.input_ids == [BEGIN, *ids("hi yo")]
    assert example.labels == [_, _, _, _, *ids("yo")]


def test_completion_of_a_tokenizer_without_begin_starts_with_the_prompt() -> None:
    assert encode("completion", Letters(adds_begin=False), prompt="q", completion="a").input_ids == [*ids("qa"), END]


def test_completion_of_a_tokenizer_that_ends_texts_has_one_end() -> None:
    example = encode("completion", Letters(adds_end=True), prompt="q", completion="a")
    assert example.input_ids == [BEGIN, *ids("qa"), END]
    assert example.labels == [_, _, *ids("a"), END]


class EndInText(Letters):
    """Reads `$` as its end-of-text token, as a tokenizer reads `</s>`."""

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return super().__call__(text.replace("$", chr(END)), add_special_tokens=add_special_tokens)


@pytest.mark.parametrize("adds_end", [False, True])
def test_completion_keeps_the_end_that_stands_in_its_prompt(adds_end: bool) -> None:
    example = encode("completion", EndInText(adds_end=adds_end), prompt="q$", completion="a")
    assert example.input_ids == [BEGIN, *ids("q"), END, *ids("a"), END]
    assert example.labels == [_, _, _, *ids("a"), END], "the end of the prompt is the prompt's: it is not learnt"


@pytest.mark.parametrize("append_eos", [False, True])
@pytest.mark.parametrize("adds_end", [False, True])
def test_answer_that_brings_its_end_learns_it_once(append_eos: bool, adds_end: bool) -> None:
    example = encode("completion", EndInText(adds_end=adds_end), append_eos, prompt="q", completion="a$")
    assert example.labels == [_, _, *ids("a"), END]


@pytest.mark.parametrize("append_eos", [False, True])
@pytest.mark.parametrize("adds_end", [False, True])
def test_text_that_brings_its_end_learns_it_once(append_eos: bool, adds_end: bool) -> None:
    example = encode("text", EndInText(adds_end=adds_end), append_eos, text="ab$")
    assert example.labels == [BEGIN, *ids("ab"), END]


def test_answer_tokenised_alone_learns_its_own_end_once() -> None:
    class Both(EndInText, Merging):
        pass

    example = encode("completion", Both(), prompt="xa", completion="b$")
    assert example.labels == [_, _, _, *ids("b"), END]


def test_completion_prompt_is_tokenised_as_the_server_does_where_a_merge_crosses_the_border() -> None:
    example = encode("completion", Merging(), prompt="xa", completion="bc")
    assert example.input_ids == [BEGIN, *ids("xa"), *ids("bc"), END], "not x, ab, c: the server never sees that prompt"
    assert example.labels == [_, _, _, *ids("bc"), END]


def test_completion_prompt_of_no_letters_still_has_its_begin_token() -> None:
    example = encode("completion", prompt="", completion="a")
    assert (example.input_ids, example.labels) == ([BEGIN, *ids("a"), END], [_, *ids("a"), END])


# ---- instruction ---------------------------------------------------------------------------------------------------


def test_instruction_learns_the_output_after_the_template() -> None:
    encoder = Encoder(Letters(), prompt_template="Q:{instruction} {input}\nA:")
    example = encoder.encode(row(instruction="do", input="it", output="ok"), "instruction")
    prompt = ids("Q:do it\nA:")
    assert example.input_ids == [BEGIN, *prompt, *ids("ok"), END]
    assert example.labels == [_] * (1 + len(prompt)) + [*ids("ok"), END]


def test_instruction_default_is_the_alpaca_prompt() -> None:
    with_input = instruction_prompt("Add.", "1 2", None)
    without = instruction_prompt("Sing.", "", None)
    assert with_input == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    )
    assert without == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSing.\n\n### Response:\n"
    )


def test_braces_in_the_data_are_left_alone() -> None:
    assert instruction_prompt("{input} {x}", "{instruction}", "{instruction}|{input}|") == "{input} {x}|{instruction}|"


# ---- chat ----------------------------------------------------------------------------------------------------------


def chat(*messages: tuple[str, str], **more: Any) -> Row:
    return row(messages=[{"role": role, "content": content} for role, content in messages], **more)


def test_chat_learns_the_assistant_turn_through_its_stop_token() -> None:
    example = Encoder(Letters()).encode(chat(("user", "hi"), ("assistant", "yo")), "chat")
    newline = ord("\n")
    assert example.input_ids == [
        TURN_START, *ids("u:hi"), TURN_END, newline,
        TURN_START, *ids("a:"), *ids("yo"), TURN_END, newline,
    ]  # fmt: skip
    assert example.labels == [_] * 7 + [_] * 3 + [*ids("yo"), TURN_END, _]


def test_chat_of_several_turns_learns_every_assistant_turn() -> None:
    turns = (("system", "s"), ("user", "q"), ("assistant", "x"), ("user", "r"), ("assistant", "y"))
    example = Encoder(Letters()).encode(chat(*turns), "chat")
    learnt = [token for token in example.labels if token != IGNORED]
    assert learnt == [*ids("x"), TURN_END, *ids("y"), TURN_END]
    assert [index for index, label in enumerate(example.labels) if label != IGNORED] == [15, 16, 27, 28]


def test_chat_message_of_weight_zero_is_context_only() -> None:
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "x", "weight": 0},
        {"role": "user", "content": "r"},
        {"role": "assistant", "content": "y", "weight": 1},
    ]
    example = Encoder(Letters()).encode(row(messages=messages), "chat")
    assert [token for token in example.labels if token != IGNORED] == [*ids("y"), TURN_END]


def test_chat_has_no_begin_token_beside_the_template() -> None:
    example = Encoder(Letters(adds_begin=True)).encode(chat(("user", "q"), ("assistant", "a")), "chat")
    assert BEGIN not in example.input_ids, "the template writes it where the model wants one; the server adds none"


def test_chat_tools_reach_the_template() -> None:
    template = "{% if tools %}T{{ tools | length }}{% endif %}" + CHATML
    example = Encoder(Letters(chat_template=template)).encode(
        chat(("user", "q"), ("assistant", "a"), tools=[{"type": "function", "function": {"name": "f"}}]), "chat"
    )
    assert example.input_ids[:2] == ids("T1")


def test_chat_template_that_rewrites_earlier_turns_is_refused_with_the_line() -> None:
    template = "{{ messages | length }}" + CHATML
    with pytest.raises(DataError, match=r"rows\.jsonl, line 7: rendering up to messages\[1\] is not a prefix"):
        Encoder(Letters(chat_template=template)).encode(
            chat(("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")), "chat"
        )


def test_chat_template_whose_generation_prompt_differs_from_the_turn_is_refused() -> None:
    template = CHATML.replace("<|im_start|>a:{% endif %}", "<|im_start|>a:<think>{% endif %}")
    with pytest.raises(DataError, match="is not a prefix"):
        Encoder(Letters(chat_template=template)).encode(chat(("user", "q"), ("assistant", "a")), "chat")


def test_chat_template_that_raises_names_the_row() -> None:
    template = "{{ messages[0].nothing.at.all }}"
    with pytest.raises(DataError, match=r"line 7: UndefinedError"):
        Encoder(Letters(chat_template=template)).encode(chat(("user", "q"), ("assistant", "a")), "chat")


# ---- raw text ------------------------------------------------------------------------------------------------------


def test_text_learns_everything_and_ends() -> None:
    example = encode("text", text="abc")
    assert example.input_ids == example.labels == [BEGIN, *ids("abc"), END]
    assert example.num_trained_tokens == 4, "nothing comes before the first token: it has no loss"


# ---- prompts and stops ---------------------------------------------------------------------------------------------


def test_prompt_ids_are_what_the_server_sees() -> None:
    encoder = Encoder(Letters())
    assert encoder.prompt_ids(row(prompt="hi", completion="yo"), "completion") == [BEGIN, *ids("hi")]
    asked = encoder.prompt_ids(chat(("user", "q"), ("assistant", "a")), "chat")
    assert asked == [TURN_START, *ids("u:q"), TURN_END, ord("\n"), TURN_START, *ids("a:")]
    assert encoder.prompt_ids(row(text="abcdefgh"), "text") == [BEGIN, *ids("abc")]


def test_stop_tokens_are_end_of_text_and_the_templates_end_of_turn() -> None:
    assert stop_token_ids(Letters()) == (END, TURN_END)
    assert stop_token_ids(Letters(chat_template=None)) == (END,)
