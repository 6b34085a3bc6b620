"""Addresses of sources, the prefixes that allow them, and the token that goes with one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loradock_adapters.errors import InvalidSourceError, UsageError
from loradock_adapters.source_ref import check_prefix, is_allowed, is_source, parse_source
from loradock_adapters.source_token import token_for

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("hf://org/repo", "org/repo", None),
        ("hf://Org-1/my.Repo_2@v1.0", "Org-1/my.Repo_2", "v1.0"),
        (f"hf://org/repo@{COMMIT}", "org/repo", COMMIT),
        ("hf://org/repo@refs/pr/12", "org/repo", "refs/pr/12"),
    ],
)
def test_address_of_the_hub_is_taken_apart(text: str, repo: str, revision: str | None) -> None:
    ref = parse_source(text)
    assert (ref.scheme, ref.repo, ref.revision, str(ref)) == ("hf", repo, revision, text)
    assert ref.is_fixed == (revision == COMMIT)
    assert ref.at(COMMIT) == f"hf://{repo}@{COMMIT}"


def test_address_of_a_store_is_taken_apart() -> None:
    ref = parse_source("s3://bucket/adapters/run=5/bot v1/")
    assert (ref.scheme, ref.parts) == ("s3", ("bucket", "adapters", "run=5", "bot v1"))
    assert str(ref) == "s3://bucket/adapters/run=5/bot v1"


@pytest.mark.parametrize("text", ["bot", "bot@3", "bot@sha256:" + "0" * 64, "./dir", "/abs/dir", "C:\\dir", "a:/b", ""])
def test_names_and_paths_are_no_addresses(text: str) -> None:
    assert not is_source(text)


@given(st.text(max_size=60))
def test_no_text_but_an_address_is_taken_and_what_is_taken_reads_back_the_same(rest: str) -> None:
    for scheme in ("hf://", "s3://"):
        try:
            ref = parse_source(scheme + rest)
        except InvalidSourceError:
            continue
        assert parse_source(str(ref)) == ref
        assert not {"", ".", ".."} & set(ref.parts)
        assert ":" not in ref.address.removeprefix(scheme)


@pytest.mark.parametrize(
    ("prefixes", "allowed"),
    [
        (["hf://"], True),
        (["hf://acme"], True),
        (["hf://acme/"], True),
        (["hf://acme/bot"], True),
        (["s3://", "hf://acme"], True),
        ([], False),
        (["hf://acm"], False),
        (["hf://acme/bo"], False),
        (["hf://acme/bot-2", "s3://acme/bot"], False),
    ],
)
def test_prefix_allows_what_lies_below_it_part_by_part(prefixes: list[str], allowed: bool) -> None:
    assert is_allowed(parse_source("hf://acme/bot@main"), prefixes) is allowed


@pytest.mark.parametrize("prefix", ["hf://", "s3://", "hf://acme", "hf://acme/bot", "s3://bucket", "s3://bucket/a/"])
def test_prefix_of_a_known_kind_is_taken(prefix: str) -> None:
    assert check_prefix(prefix) == prefix


@pytest.mark.parametrize("prefix", ["", "acme/bot", "http://", "file:///srv", "hf://a b", "s3://b/../c", "hf"])
def test_other_prefix_is_refused(prefix: str) -> None:
    with pytest.raises(InvalidSourceError):
        check_prefix(prefix)


@pytest.mark.parametrize(
    ("source", "server", "token"),
    [
        ("hf://org/repo", "http://127.0.0.1:8080", "secret"),
        ("hf://org/repo", "http://localhost:8080", "secret"),
        ("hf://org/repo", "https://loradock.example", "secret"),
        ("hf://org/repo", "http://loradock.example", None),
        ("hf://org/repo", "http://10.0.0.7:8080", None),
        ("hf://org/repo", "http://[", None),
        ("s3://bucket/x", "https://loradock.example", None),
    ],
)
def test_hub_token_of_the_environment_is_sent_where_nobody_can_read_it(
    source: str, server: str, token: str | None
) -> None:
    assert token_for(source, server, None, {"HF_TOKEN": "secret"}) == token


def test_named_variable_is_sent_anywhere_and_has_to_be_there() -> None:
    assert token_for("hf://a/b", "http://10.0.0.7", "MINE", {"MINE": " it \n", "HF_TOKEN": "x"}) == "it"
    with pytest.raises(UsageError, match="--token-env MINE: there is no such variable"):
        token_for("hf://a/b", "http://10.0.0.7", "MINE", {"HF_TOKEN": "x"})
