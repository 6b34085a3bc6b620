"""Rows are checked, every one, and a broken one is named by file and line."""

import json
from pathlib import Path
from typing import Any

import pytest

from loradock_train.chat import as_served, functions_as_tools
from loradock_train.errors import DataError
from loradock_train.rows import Format, read_rows
from loradock_train.stream import open_stream


def read(path: Path, wanted: Format | None = None) -> Format:
    return read_rows([str(path)], wanted or "auto", "train_path").format


def complaint(path: Path, wanted: Format | None = None) -> str:
    with pytest.raises(DataError) as caught:
        read(path, wanted)
    assert caught.value.exit_code == 2
    return str(caught.value)


def jsonl(folder: Path, *lines: str) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
INSTRUCTION = '{"instruction": "a", "input": "", "output": "b"}'
COMPLETION = '{"prompt": "a", "completion": "b"}'
TEXT = '{"text": "a"}'


@pytest.mark.parametrize(
    ("line", "expected"),
    [(CHAT, "chat"), (INSTRUCTION, "instruction"), (COMPLETION, "completion"), (TEXT, "text")],
)
def test_format_is_told_by_the_keys(tmp_path: Path, line: str, expected: str) -> None:
    assert read(jsonl(tmp_path, line, line)) == expected


def test_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n")
    rows = read_rows([str(path)], "auto", "train_path")
    assert [row.values["text"] for row in rows.rows] == ["one\n\ntwo\n"]
    assert rows.rows[0].where == str(path)


def test_directory_stands_for_its_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2.txt").write_text("two")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "notes.md").write_text("not data")
    rows = read_rows([str(tmp_path)], "auto", "train_path")
    assert [row.values["text"] for row in rows.rows] == ["one", "two"]


def test_blank_lines_count_for_line_numbers_but_are_no_rows(tmp_path: Path) -> None:
    rows = read_rows([str(jsonl(tmp_path, "", TEXT, "", TEXT))], "auto", "train_path")
    assert [row.line for row in rows.rows] == [2, 4]


def test_line_separators_inside_strings_do_not_split_a_row(tmp_path: Path) -> None:
    rows = read_rows([str(jsonl(tmp_path, '{"text": "a\u2028b\x85c"}', TEXT))], "auto", "train_path")
    assert [row.line for row in rows.rows] == [1, 2]


def test_hash_is_that_of_the_bytes(tmp_path: Path) -> None:
    first = read_rows([str(jsonl(tmp_path, TEXT))], "auto", "train_path").sha256
    assert read_rows([str(jsonl(tmp_path, TEXT, TEXT))], "auto", "train_path").sha256 != first


def test_mixed_formats_are_refused_naming_the_first_row_of_each(tmp_path: Path) -> None:
    message = complaint(jsonl(tmp_path, CHAT, CHAT, TEXT))
    assert "mixes formats" in message
    assert "line 1: the first chat row" in message
    assert "line 3: the first text row" in message


def test_later_row_of_no_known_format_is_refused(tmp_path: Path) -> None:
    message = complaint(jsonl(tmp_path, TEXT, '{"txt": "a"}'))
    assert "line 2: no messages, instruction, prompt or text key (its keys: txt)" in message


def test_row_with_keys_of_two_formats_asks_for_format(tmp_path: Path) -> None:
    message = complaint(jsonl(tmp_path, '{"prompt": "a", "completion": "b", "text": "c"}'))
    assert "line 1: has keys of several formats (prompt, text); set format:" in message


def test_format_given_decides_rows_with_extra_keys(tmp_path: Path) -> None:
    assert read(jsonl(tmp_path, '{"prompt": "a", "completion": "b", "text": "c"}'), "completion") == "completion"


def test_all_broken_lines_are_told_at_once(tmp_path: Path) -> None:
    message = complaint(jsonl(tmp_path, TEXT, '{"text": ', "[1]", '"x"'))
    assert "3 broken lines" in message
    assert "line 2: not valid JSON" in message
    assert "line 3: expected a JSON object, found list" in message
    assert "line 4: expected a JSON object, found str" in message


def test_many_problems_are_cut_short_with_their_number(tmp_path: Path) -> None:
    assert "… and 10 more" in complaint(jsonl(tmp_path, *["{"] * 30))


def test_bytes_that_are_no_utf8_name_their_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(TEXT.encode() + b'\n{"text": "\xff"}\n')
    assert "line 2: not valid UTF-8" in complaint(path)


def test_empty_file_has_no_data(tmp_path: Path) -> None:
    assert "train_path has no data" in complaint(jsonl(tmp_path, ""))


def test_files_of_a_directory_that_are_not_read_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    for name in ("b.JSONL", "c.parquet", "d.json", "e.csv", "README.md", "cat.png"):
        (tmp_path / name).write_text("{}")
    told = f"train_path: not read in {tmp_path}, being no .jsonl or .txt: 4 (b.JSONL, c.parquet, d.json, …)"
    assert read_rows([str(tmp_path)], "auto", "train_path").notices == (told,)
    _, rows = open_stream([str(tmp_path)], "auto", "train_path", 10, 0)
    assert rows.notices == (told,)


def test_directory_without_data_is_refused(tmp_path: Path) -> None:
    assert "no .jsonl or .txt file in this directory" in complaint(tmp_path)


def test_file_of_another_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,b")
    assert "expected a .jsonl or .txt file" in complaint(tmp_path / "rows.csv")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt": "a"}', "missing key 'completion'"),
        ('{"prompt": "a", "completion": 3}', "'completion' must be a string, found int"),
        ('{"prompt": "a", "completion": ""}', "completion is empty: there is nothing to learn"),
        ('{"instruction": "a"}', "missing key 'output'"),
        ('{"instruction": "a", "output": "b", "input": null}', "'input' must be a string, found NoneType"),
        ('{"instruction": "a", "output": ""}', "output is empty: there is nothing to learn"),
        ('{"text": null}', "'text' must be a string, found NoneType"),
        ('{"messages": []}', "'messages' must be a non-empty list"),
        ('{"messages": "hi"}', "'messages' must be a non-empty list"),
        ('{"messages": ["hi"]}', "messages[0]: expected an object, found str"),
        ('{"messages": [{"role": "human", "content": "a"}]}', "messages[0]: invalid role 'human'"),
        ('{"messages": [{"role": "user"}]}', "messages[0]: missing or non-string 'content'"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "Example has no assistant message to learn from"),
        ('{"messages": [{"role": "user", "content": "a", "weight": 1}]}', "messages[0]: 'weight' must be 0 or 1"),
        ('{"messages": [{"role": "assistant", "content": "a", "weight": 2}]}', "messages[0]: 'weight' must be 0 or 1"),
        (
            '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]}',
            "Example has no assistant message to learn from",
        ),
    ],
)
def test_wrong_row_names_its_line_and_key(tmp_path: Path, line: str, expected: str) -> None:
    message = complaint(jsonl(tmp_path, line))
    assert f"rows.jsonl, line 1: {expected}" in message


def test_assistant_message_with_tool_calls_needs_no_content(tmp_path: Path) -> None:
    assert read(jsonl(tmp_path, calling(CALL))) == "chat"


# ---- tools -----------------------------------------------------------------------------------------------------------

ADD: dict[str, Any] = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL: dict[str, Any] = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


def calling(*calls: Any, answer: Any = None, **more: Any) -> str:
    """A row in which the assistant calls, and is perhaps answered."""
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": list(calls)}]
    return json.dumps({"messages": messages + ([] if answer is None else [answer]), **more})


def with_function(**changes: Any) -> dict[str, Any]:
    """The call, with a part of its function replaced; None takes it away."""
    function = {key: value for key, value in {**CALL["function"], **changes}.items() if value is not None}
    return {**CALL, "function": function}


def test_row_with_tools_calls_and_answers_is_a_chat(tmp_path: Path) -> None:
    answer = {"role": "tool", "content": "3", "tool_call_id": "c1"}
    line = calling(CALL, answer=answer, tools=[ADD], parallel_tool_calls=False)
    assert read(jsonl(tmp_path, line)) == "chat"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (calling(CALL, tools={}), "'tools' must be a list, found dict"),
        (calling(CALL, tools=["add"]), "tools[0]: expected an object, found str"),
        (calling(CALL, tools=[{**ADD, "type": "code"}]), "Invalid value: 'code' at 'tools[0].type'. Supported values"),
        (calling(CALL, tools=[{"type": "function"}]), "Missing required parameter: 'tools[0].function'."),
        (calling(CALL, tools=[{"function": "add"}]), "'tools[0].function' must be an object, found str"),
        (calling(CALL, tools=[{"function": {}}]), "Missing required parameter: 'tools[0].function.name'."),
        (calling(CALL, tools=[{"function": {"name": ""}}]), "'tools[0].function.name' must be a non-empty string"),
        (
            calling(CALL, tools=[{"function": {"name": "add", "parameters": "{}"}}]),
            "'tools[0].function.parameters' must be an object, found str",
        ),
        (
            calling(CALL, tools=[{"function": {"name": "add", "description": 1}}]),
            "'tools[0].function.description' must be a string, found int",
        ),
        (calling(CALL, tools=[ADD, ADD]), "'tools' has 'add' more than once"),
        (calling(CALL, parallel_tool_calls="no"), "'parallel_tool_calls' must be true or false, found str"),
        (
            calling(CALL, CALL, parallel_tool_calls=False),
            "'messages[1].tool_calls' has 2 calls, but 'parallel_tool_calls' is false",
        ),
        (calling("add"), "messages[1].tool_calls[0]: expected an object, found str"),
        (calling({"id": "c1"}), "Missing required parameter: 'messages[1].tool_calls[0].function'."),
        (
            calling(with_function(arguments=None)),
            "Missing required parameter: 'messages[1].tool_calls[0].function.arguments'.",
        ),
        (
            calling(with_function(arguments="{a")),
            "'messages[1].tool_calls[0].function.arguments' is not valid JSON: ",
        ),
        (
            calling(with_function(arguments="[1]")),
            "'messages[1].tool_calls[0].function.arguments' must be a JSON object, found list",
        ),
        (
            calling(with_function(name="sub"), tools=[ADD]),
            "'messages[1].tool_calls[0].function.name' is 'sub', which is not among the row's tools (add)",
        ),
        (
            calling(CALL, answer={"role": "tool", "content": "3"}),
            "Missing required parameter: 'messages[2].tool_call_id'.",
        ),
        (
            calling(CALL, answer={"role": "tool", "content": "3", "tool_call_id": "c9"}),
            "messages[2]: 'tool_call_id' 'c9' is not among the ids of the calls before it (c1)",
        ),
        (
            '{"messages": [{"role": "tool", "content": "3"}, {"role": "assistant", "content": "a"}]}',
            "messages[0]: messages with role 'tool' must be a response to a preceding message with 'tool_calls'.",
        ),
        (
            '{"messages": [{"role": "user", "content": "q", "tool_calls": []}, {"role": "assistant", "content": "a"}]}',
            "messages[0]: 'tool_calls' belong to assistant messages only",
        ),
    ],
)
def test_wrong_tools_and_calls_name_their_line_and_place(tmp_path: Path, line: str, expected: str) -> None:
    assert f"rows.jsonl, line 1: {expected}" in complaint(jsonl(tmp_path, line))


def test_old_functions_are_read_as_tools_with_a_notice(tmp_path: Path) -> None:
    old = {
        "functions": [{"name": "add"}],
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": "{}"}},
            {"role": "function", "name": "add", "content": "3"},
            {"role": "assistant", "content": "three", "weight": 0},
        ],
    }
    rows = read_rows([str(jsonl(tmp_path, CHAT, json.dumps(old)))], "auto", "train_path")
    assert rows.notices == ("train_path: 1 row with the old functions and function_call read as tools and tool_calls",)
    assert functions_as_tools(rows.rows[1].values) == {
        "tools": [{"type": "function", "function": {"name": "add"}}],
        "messages": [
            {"role": "user", "content": "q"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": "{}"}}],
            },
            {"role": "tool", "name": "add", "content": "3"},
            {"role": "assistant", "content": "three", "weight": 0},
        ],
    }
    assert [message["role"] for message in as_served(old)[0]] == ["user", "assistant", "tool", "assistant"]
    assert read_rows([str(jsonl(tmp_path, CHAT))], "auto", "train_path").notices == ()


def test_old_function_call_that_is_malformed_is_named(tmp_path: Path) -> None:
    call = '{"role": "assistant", "content": null, "function_call": "add"}'
    message = complaint(jsonl(tmp_path, f'{{"messages": [{{"role": "user", "content": "a"}}, {call}]}}'))
    assert "line 1: 'messages[1].tool_calls[0].function' must be an object, found str" in message


def test_chat_reaches_the_template_as_the_engine_hands_it_over() -> None:
    """What vLLM's chat endpoint does with a request: arguments as objects, no content as an empty text."""
    values = {
        "tools": [{**ADD, "cache": 1}],
        "messages": [
            {"role": "assistant", "content": None, "weight": 1, "tool_calls": [CALL, with_function(arguments="")]}
        ],
    }
    messages, tools = as_served(values)
    function = {"name": "add", "description": None, "parameters": {"type": "object"}}
    assert tools == [{"type": "function", "function": function}]
    calls = [{**CALL, "function": {"name": "add", "arguments": found}} for found in ({"a": 1}, {})]
    assert messages == [{"role": "assistant", "content": "", "tool_calls": calls}]
    assert values["messages"][0]["tool_calls"][0]["function"]["arguments"] == '{"a": 1}', "the row is left as it is"


def test_keys_that_nothing_reads_are_told(tmp_path: Path) -> None:
    lines = [{"prompt": "a", "completion": "b", "system": "be kind"}, {"prompt": "a", "completion": "c", "id": 1}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, lines[1]]))
    assert read_rows([str(tmp_path / "a.jsonl")], "auto", "train_path").notices == (
        "train_path: keys that completion rows do not have, and that are not learnt: id (2 rows), system (1 row)",
    )


def test_key_that_stands_twice_with_one_value_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "text": "a"}\n')
    assert [row.values for row in read_rows([str(tmp_path / "a.jsonl")], "auto", "train_path").rows] == [{"text": "a"}]


def test_character_written_as_two_escapes_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude80"}\n')
    assert read_rows([str(tmp_path / "a.jsonl")], "auto", "train_path").rows[0].values == {"text": "\N{ROCKET}"}
