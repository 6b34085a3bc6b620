"""Model names and references to versions."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loradock_adapters.errors import InvalidNameError, UsageError
from loradock_adapters.names import MAX_NAME_CHARS, ModelRef, check_name, check_tag, parse_ref

DIGEST = "sha256:" + "ab" * 32


@pytest.mark.parametrize("name", ["a", "7", "sql-writer", "a.b_c-d", "x" * MAX_NAME_CHARS, "0base", "based"])
def test_check_name_well_formed_returned(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "A",
        "-a",
        ".a",
        "_a",
        "a b",
        "a/b",
        "../a",
        "a@1",
        "a\n",
        "\na",
        "a\x00",
        "é",
        "ａ",
        "a" * 97,
        "a\x1b[31m",
        "名",
    ],
)
def test_check_name_malformed_refused(name: str) -> None:
    with pytest.raises(InvalidNameError):
        check_name(name)


def test_check_name_reserved_refused() -> None:
    with pytest.raises(InvalidNameError, match="reserved"):
        check_name("base")


def test_check_name_too_long_message_has_both_numbers() -> None:
    with pytest.raises(InvalidNameError, match=r"97 characters .* 96"):
        check_name("a" * 97)


def test_invalid_name_is_wrong_usage() -> None:
    assert issubclass(InvalidNameError, UsageError)
    assert InvalidNameError.exit_code == 2


def test_check_name_control_characters_escaped_in_message() -> None:
    with pytest.raises(InvalidNameError) as caught:
        check_name("a\x1b[31m\n")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("sql", ModelRef("sql")),
        ("base", ModelRef("base")),
        ("sql@1", ModelRef("sql", version=1)),
        ("sql@120", ModelRef("sql", version=120)),
        (f"sql@{DIGEST}", ModelRef("sql", digest=DIGEST)),
        ("sql@prod", ModelRef("sql", tag="prod")),
        ("sql@2b", ModelRef("sql", tag="2b")),
        ("sql@2026.11-a_b", ModelRef("sql", tag="2026.11-a_b")),
        ("sql@" + "t" * 63, ModelRef("sql", tag="t" * 63)),
    ],
)
def test_parse_ref_well_formed_parsed(text: str, ref: ModelRef) -> None:
    assert parse_ref(text) == ref
    assert str(ref) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "@",
        "@1",
        "sql@",
        "sql@0",
        "sql@01",
        "sql@-1",
        "sql@1@2",
        "sql@Prod",
        "sql@.prod",
        "sql@-prod",
        "sql@pr od",
        "sql@prod@2",
        "sql@sha256:prod",
        "sql@" + "t" * 64,
        "sql@" + "9" * 10,
        "sql@١",
        "sql@1\n",
        "sql@sha256:abc",
        "sql@sha256:" + "AB" * 32,
        "sql@" + "ab" * 32,
        f"sql@{DIGEST}0",
        "Qwen/Qwen3-0.6B",
    ],
)
def test_parse_ref_malformed_refused(text: str) -> None:
    with pytest.raises(InvalidNameError):
        parse_ref(text)


@given(st.from_regex(re.compile(r"[a-z0-9][a-z0-9._-]{0,95}", re.ASCII), fullmatch=True), st.integers(1, 999_999_999))
def test_parse_ref_any_name_and_number_round_trips(name: str, number: int) -> None:
    assert parse_ref(f"{name}@{number}") == ModelRef(name, version=number)


@given(st.text(max_size=200))
def test_parse_ref_any_text_parsed_or_refused(text: str) -> None:
    try:
        shown = str(parse_ref(text))
    except InvalidNameError as error:
        refusal = str(error)
        assert refusal.isprintable()
    else:
        assert shown == text


@pytest.mark.parametrize("tag", ["prod", "v1.2", "2b", "_x", "sha256"])
def test_check_tag_well_formed_returned(tag: str) -> None:
    assert check_tag(tag) == tag


@pytest.mark.parametrize(
    "tag", ["", "7", "007", "12345678901", "Prod", "a b", "a/b", "a@b", "sha256:x", "\x1b[31m", "é"]
)
def test_check_tag_malformed_refused_in_printable_words(tag: str) -> None:
    with pytest.raises(InvalidNameError, match="is not a tag") as caught:
        check_tag(tag)
    assert str(caught.value).isprintable()
