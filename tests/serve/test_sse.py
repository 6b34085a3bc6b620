"""The stream rewriter: what it changes, what it leaves alone, and that chunk borders never matter."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loradock_serve.sse import StreamRewriter, Usage, comment, error_event

ENGINE, PUBLIC = b'"model":"sha256:00"', b'"model":"mine"'


def rewriter(*, hide_usage: bool = True) -> StreamRewriter:
    return StreamRewriter(ENGINE, PUBLIC, hide_usage)


def event(data: dict[str, Any], name: str = "") -> bytes:
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


def chunk(text: str, **more: Any) -> bytes:
    return event({"id": "c", "model": "sha256:00", "choices": [{"index": 0, "text": text}]} | more)


DONE = b"data: [DONE]\n\n"
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
USAGE_CHUNK = event({"id": "c", "model": "sha256:00", "choices": [], "usage": USAGE})


def test_plain_events_pass_with_the_public_name() -> None:
    stream = rewriter()
    assert stream.feed(chunk("a") + chunk("b")) == (chunk("a") + chunk("b")).replace(ENGINE, PUBLIC)
    assert not stream.ended_well
    assert stream.feed(DONE) == DONE
    assert stream.ended_well


def test_name_inside_a_text_is_left_alone() -> None:
    said = chunk('he said "model":"sha256:00" to me')
    assert b'\\"model\\":\\"sha256:00\\"' in rewriter().feed(said)


def test_usage_chunk_that_was_not_asked_for_is_metered_and_hidden() -> None:
    stream = rewriter()
    assert stream.feed(chunk("a") + USAGE_CHUNK + DONE) == chunk("a").replace(ENGINE, PUBLIC) + DONE
    assert stream.usage == Usage(3, 2)


def test_usage_chunk_that_was_asked_for_is_metered_and_shown() -> None:
    stream = rewriter(hide_usage=False)
    assert stream.feed(USAGE_CHUNK) == USAGE_CHUNK.replace(ENGINE, PUBLIC)
    assert stream.usage == Usage(3, 2)


def test_null_usage_in_every_chunk_is_taken_out_where_it_was_not_asked_for() -> None:
    stream = rewriter()
    (line,) = stream.feed(chunk("ä", usage=None)).splitlines()[:1]
    assert json.loads(line.removeprefix(b"data: ")) == {
        "id": "c",
        "model": "mine",
        "choices": [{"index": 0, "text": "ä"}],
    }
    assert stream.usage == Usage(0, 0)
    assert rewriter(hide_usage=False).feed(chunk("a", usage=None)) == chunk("a", usage=None).replace(ENGINE, PUBLIC)


def test_running_usage_counts_once_with_its_last_figures() -> None:
    stream = rewriter(hide_usage=False)
    stream.feed(chunk("a", usage={"prompt_tokens": 3, "completion_tokens": 1}))
    stream.feed(chunk("b", usage={"prompt_tokens": 3, "completion_tokens": 2}))
    assert stream.usage == Usage(3, 2)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (event({"error": {"message": "boom", "code": 500}}), {"message": "boom", "code": 500}),
        (event({"error": "boom"}, "error"), {"message": "boom"}),
        (event({"type": "error", "message": "boom"}, "error"), {"type": "error", "message": "boom"}),
    ],
)
def test_error_event_ends_the_stream_and_nothing_after_it_passes(bad: bytes, error: dict[str, Any]) -> None:
    stream = rewriter()
    assert stream.feed(chunk("a") + bad + DONE) == chunk("a").replace(ENGINE, PUBLIC)
    assert stream.error == error
    assert stream.feed(chunk("b") + DONE) == b""
    assert not stream.ended_well


def test_word_error_in_an_answer_is_no_error() -> None:
    stream = rewriter()
    said = chunk('{"error": {"message": "x"}}')
    assert stream.feed(said) == said.replace(ENGINE, PUBLIC)
    assert stream.error is None


@pytest.mark.parametrize("name", ["response.completed", "response.incomplete", "response.failed"])
def test_responses_api_ends_with_its_own_event(name: str) -> None:
    stream = rewriter(hide_usage=False)
    usage = {"input_tokens": 7, "output_tokens": 4}
    last = event({"type": name, "response": {"model": "sha256:00", "usage": usage, "error": None}}, name)
    assert stream.feed(event({"type": "response.created", "response": {}}, "response.created")) != b""
    assert not stream.ended_well
    assert stream.feed(last) == last.replace(ENGINE, PUBLIC)
    assert stream.ended_well
    assert stream.usage == Usage(7, 4)


def test_failed_response_without_a_body_still_ends_the_stream() -> None:
    stream = rewriter()
    stream.feed(event({"type": "response.failed", "response": None}, "response.failed"))
    assert stream.ended_well


def test_incomplete_event_is_held_back() -> None:
    stream = rewriter()
    assert stream.feed(b'data: {"model":"sha256:') == b""
    assert stream.feed(b'00"}\n') == b""
    assert stream.feed(b"\n") == b'data: {"model":"mine"}\n\n'


def test_broken_json_and_comments_pass_as_they_are() -> None:
    stream = rewriter()
    odd = b": ping\n\n" + b'data: {"usage"\n\n' + b'data: ["usage"]\n\n'
    assert stream.feed(odd) == odd


@pytest.mark.parametrize("done", [b"data:[DONE]\n\n", b"data: [DONE]\r\n\r\n", b"\ndata: [DONE]\n\n"])
def test_end_is_seen_however_it_is_spelled(done: bytes) -> None:
    stream = rewriter()
    stream.feed(done)
    assert stream.ended_well


def test_done_inside_a_text_is_no_end() -> None:
    stream = rewriter()
    stream.feed(chunk("data: [DONE]") + chunk("[DONE]"))
    assert not stream.ended_well


def test_usage_that_is_no_object_is_ignored() -> None:
    usage = Usage()
    odds: list[Any] = [None, [], {"prompt_tokens": "3"}, {"completion_tokens": 3}]
    for odd in odds:
        usage.take(odd)
    assert usage == Usage(0, 0)
    usage.take({"prompt_tokens": 3})  # embeddings have no completion
    assert usage == Usage(3, 0)


def test_own_events_are_single_events() -> None:
    assert error_event({"message": "a\nb"}) == b'data: {"error":{"message":"a\\nb"}}\n\n'
    assert comment("a\n\nb") == b": a  b\n\n"


texts = st.text(max_size=12)
events = st.one_of(
    texts.map(chunk),
    texts.map(lambda text: chunk(text, usage=None)),
    st.just(USAGE_CHUNK),
    st.just(b": ping\n\n"),
    st.just(event({"error": {"message": "boom"}})),
    st.just(event({"type": "response.completed", "response": {"usage": {"input_tokens": 1}}}, "response.completed")),
)


@given(st.lists(events, max_size=8), st.booleans(), st.booleans(), st.data())
def test_any_chunking_of_a_stream_gives_the_same_output(
    parts: list[bytes], crlf: bool, hide: bool, data: st.DataObject
) -> None:
    plain = b"".join(parts) + DONE
    whole = rewriter(hide_usage=hide)
    expected = whole.feed(plain)
    sent = plain.replace(b"\n", b"\r\n") if crlf else plain
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sent)), max_size=12)))
    split = rewriter(hide_usage=hide)
    borders = [0, *cuts, len(sent)]
    pieces = [sent[start:end] for start, end in itertools.pairwise(borders)]
    assert b"".join(split.feed(piece) for piece in pieces) == expected
    assert (split.usage, split.error, split.ended_well) == (whole.usage, whole.error, whole.ended_well)
