"""Splicing a request's bytes says the same as dumping it anew."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loradock_serve.splice import _spliced, written

DIGEST = "sha256:" + "0" * 64

texts = st.text(max_size=12) | st.sampled_from(["model", '"model"', ',"model":"x"', '{"model": "y"', "\\", '\\"'])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
spaces = st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", "\t:  ")])


def changed(body: bytes, **changes: Any) -> tuple[Any, Any]:
    """What the written bytes say, and what they are to say."""
    parsed = json.loads(body)
    return json.loads(written(body, parsed, DIGEST, changes)), parsed | {"model": DIGEST} | changes


@given(
    members=st.lists(st.tuples(texts, values), max_size=5),
    model=texts,
    at=st.integers(0, 5),
    separators=spaces,
    ascii_only=st.booleans(),
    adds=st.booleans(),
)
def test_spliced_bytes_say_what_dumped_ones_say(
    members: list[tuple[str, Any]], model: str, at: int, separators: tuple[str, str], ascii_only: bool, adds: bool
) -> None:
    comma, colon = separators
    pairs = [*members[:at], ("model", model), *members[at:]]
    inner = [
        json.dumps(key, ensure_ascii=ascii_only)
        + colon
        + json.dumps(value, separators=separators, ensure_ascii=ascii_only)
        for key, value in pairs
    ]
    body = ("{" + comma.join(inner) + "}").encode("utf-8", "surrogatepass")
    said, wanted = changed(body, **({"stream_options": {"include_usage": True}} if adds else {}))
    assert said == wanted


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"a","stream":true}',
        b'{ "stream":true ,\n "model" : "a" }',
        b'{"messages":[{"role":"user","content":"say \\"model\\": \\"x\\", twice"}],"model":"a"}',
    ],
)
def test_usual_request_is_spliced(body: bytes) -> None:
    parsed = json.loads(body)
    spliced = _spliced(body, parsed, DIGEST, {"new": [1]})
    assert spliced is not None
    assert json.loads(spliced) == parsed | {"model": DIGEST, "new": [1]}


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"a","model":"b"}',  # twice
        b'{"metadata":{"model":"x"},"\\u006dodel":"a"}',  # the one that is spelt so is another object's
        b'{"metadata":{"model":"x"},"model":"a"}',
        b'{"model":"a","role":"model"}',
        b'{"model":"a\\u0062"}',
        b'\xef\xbb\xbf{"model":"a"}',
        b' {"model":"a"}',
        '{"model":"a"}'.encode("utf-16"),
        b'{"model":"a","chat_template":"x","chat_template":null}',
    ],
)
def test_request_in_doubt_is_dumped(body: bytes) -> None:
    parsed = json.loads(body)
    assert _spliced(body, parsed, DIGEST, {}) is None
    said, wanted = changed(body)
    assert said == wanted


def test_member_that_changes_or_goes_away_is_dumped() -> None:
    body = b'{"model":"a","priority":1,"stream_options":{}}'
    parsed = json.loads(body)
    for changes, left_out in (({}, "priority"), ({"stream_options": {"x": 1}}, None)):
        wanted = {key: value for key, value in (parsed | {"model": "b"} | changes).items() if key != left_out}
        assert _spliced(body, parsed, "b", changes, left_out) is None
        assert json.loads(written(body, parsed, "b", changes, left_out)) == wanted
