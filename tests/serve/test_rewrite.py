"""What the gateway writes into requests, and that it writes nothing else."""

import json
from typing import Any

import pytest

from loradock_serve import rewrite
from loradock_serve.errors import BadRequestError
from loradock_serve.rewrite import CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, Behaviour, Outgoing

DIGEST = "sha256:" + "0" * 64


def sent(path: str, payload: dict[str, Any], behaviour: Behaviour | None = None) -> dict[str, Any]:
    out = rewrite.outgoing(path, payload, DIGEST, "mine", behaviour or Behaviour())
    body: dict[str, Any] = json.loads(out.body)
    return body


def outgoing(engine_name: str = DIGEST) -> Outgoing:
    return Outgoing(b"", False, False, engine_name, "mine")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES])
def test_every_other_field_goes_through_untouched(path: str) -> None:
    payload = {"model": "mine", "temperature": 0, "seed": 2**63, "x": [1.5, None, {"ü": "\ud83d"}], "stream": False}
    assert sent(path, payload) == payload | {"model": DIGEST}
    assert payload["model"] == "mine"


@pytest.mark.parametrize("priority", [3, None])
def test_priority_is_not_forwarded(priority: int | None) -> None:
    assert sent(CHAT, {"model": "mine", "priority": priority}) == {"model": DIGEST}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("options", [{}, {"stream_options": None}, {"stream_options": {"include_usage": False}}])
def test_usage_is_asked_for_in_streams_and_hidden_again(path: str, options: dict[str, Any]) -> None:
    payload = {"model": "mine", "stream": True} | options
    out = rewrite.outgoing(path, payload, DIGEST, "mine", Behaviour())
    assert out.streams
    assert out.hide_usage
    assert json.loads(out.body)["stream_options"]["include_usage"] is True


@pytest.mark.parametrize("options", [{"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}])
def test_usage_that_the_client_asked_for_is_not_hidden(options: dict[str, Any]) -> None:
    out = rewrite.outgoing(CHAT, {"stream": True, "stream_options": options}, DIGEST, "mine", Behaviour())
    assert not out.hide_usage
    assert json.loads(out.body)["stream_options"] == options


YES, NO = (True, 1, 1.0, "true", "Yes", "on"), (False, None, 0, 2, "false", "", [1])


@pytest.mark.parametrize("value", [*YES, *NO])
def test_stream_is_what_engines_read_as_true_so_that_its_tokens_are_counted(value: Any) -> None:
    streams = value in YES
    out = rewrite.outgoing(CHAT, {"model": "mine", "stream": value}, DIGEST, "mine", Behaviour())
    assert (out.streams, out.hide_usage) == (streams, streams)
    assert ("stream_options" in json.loads(out.body)) == streams


def test_responses_api_is_not_given_stream_options() -> None:
    assert "stream_options" not in sent(RESPONSES, {"model": "mine", "stream": True})


def test_stream_options_that_are_no_object_are_refused() -> None:
    with pytest.raises(BadRequestError, match="`stream_options` must be an object") as caught:
        sent(CHAT, {"stream": True, "stream_options": "all"})
    assert caught.value.param == "stream_options"


@pytest.mark.parametrize(
    ("payload", "param"),
    [
        ({"chat_template": "{{ x }}"}, "chat_template"),
        ({"chat_template": ""}, "chat_template"),
        ({"chat_template_kwargs": {"chat_template": "{{ x }}"}}, "chat_template_kwargs"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, EMBEDDINGS])
def test_template_of_a_client_is_refused(payload: dict[str, Any], param: str, path: str) -> None:
    with pytest.raises(BadRequestError, match="cannot bring its own chat template") as caught:
        sent(path, payload)
    assert caught.value.param == param


def test_other_template_arguments_go_through() -> None:
    payload = {"chat_template": None, "chat_template_kwargs": {"enable_thinking": False}}
    assert sent(CHAT, payload) == payload | {"model": DIGEST}


def test_template_and_stop_tokens_of_the_adapter_go_into_chat() -> None:
    behaviour = Behaviour("{{ own }}", (7, 8))
    assert sent(CHAT, {}, behaviour) == {"model": DIGEST, "chat_template": "{{ own }}", "stop_token_ids": [7, 8]}
    assert sent(COMPLETIONS, {}, behaviour) == {"model": DIGEST, "stop_token_ids": [7, 8]}
    assert sent(EMBEDDINGS, {}, behaviour) == {"model": DIGEST}


@pytest.mark.parametrize(
    ("asked", "sent_on"),
    [([], [7, 8]), ([5], [7, 8, 5]), ([8, 5], [7, 8, 5]), (None, [7, 8]), ("x", "x"), ([{}], [7, 8, {}])],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES])
def test_stop_tokens_of_the_request_come_beside_the_adapters(path: str, asked: Any, sent_on: Any) -> None:
    assert sent(path, {"stop_token_ids": asked}, Behaviour(None, (7, 8)))["stop_token_ids"] == sent_on


def test_request_that_ignores_the_end_of_texts_ignores_the_adapters_too() -> None:
    payload = {"ignore_eos": True, "stop_token_ids": [5]}
    assert sent(CHAT, payload, Behaviour(None, (7,)))["stop_token_ids"] == [5]
    assert "stop_token_ids" not in sent(CHAT, {"ignore_eos": True}, Behaviour(None, (7,)))


def test_template_of_the_adapter_goes_into_embeddings_of_messages_only() -> None:
    messages = [{"role": "user", "content": "x"}]
    assert sent(EMBEDDINGS, {"messages": messages}, Behaviour("{{ own }}"))["chat_template"] == "{{ own }}"
    assert "chat_template" not in sent(EMBEDDINGS, {"input": "x"}, Behaviour("{{ own }}"))


def test_responses_api_cannot_apply_a_template_and_says_so() -> None:
    with pytest.raises(BadRequestError, match="'mine' has a chat template of its own, which /v1/responses") as caught:
        sent(RESPONSES, {}, Behaviour("{{ own }}"))
    assert caught.value.code == "chat_template_unsupported"


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000, b'{"n": ' + b"1" * 5000 + b"}"])
def test_body_that_is_no_json_is_refused(body: bytes) -> None:
    with pytest.raises(BadRequestError, match="The body is not valid JSON") as caught:
        rewrite.parse_body(body)
    assert caught.value.code == "invalid_json"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-le"])
def test_body_may_have_any_encoding_of_json(encoding: str) -> None:
    assert rewrite.parse_body('{"model": "ü"}'.encode(encoding)) == {"model": "ü"}


def test_body_with_half_a_surrogate_pair_is_read_as_json_reads_it() -> None:
    assert rewrite.parse_body(b'{"x": "\xed\xa0\xbd"}') == {"x": "\ud83d"}


@pytest.mark.parametrize("body", [b"[]", b"1", b"null", b'"x"'])
def test_body_that_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(BadRequestError, match="The body must be a JSON object"):
        rewrite.parse_body(body)


@pytest.mark.parametrize("payload", [{}, {"model": ""}, {"model": None}, {"model": 3}, {"model": ["mine"]}])
def test_request_without_a_model_is_told_where_models_are_listed(payload: dict[str, Any]) -> None:
    with pytest.raises(BadRequestError, match="You must name a model: `GET /v1/models`") as caught:
        rewrite.model_of(payload)
    assert caught.value.param == "model"


def test_whole_answer_gets_the_public_name_and_shows_its_usage() -> None:
    text = 'he said "model":"' + DIGEST + '", "usage":{'
    answer = {"model": DIGEST, "choices": [{"text": text}], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}
    body, usage = rewrite.incoming(json.dumps(answer, separators=(",", ":")).encode(), outgoing())
    assert json.loads(body) == answer | {"model": "mine"}
    assert usage == answer["usage"]


@pytest.mark.parametrize("body", [b'{"x":1}', b'{"usage":null}', b'{"usage":{"broken', b'"usage":{"\xff"}'])
def test_answer_without_readable_usage_passes_unmetered(body: bytes) -> None:
    assert rewrite.incoming(body, outgoing()) == (body, None)


@pytest.mark.parametrize(
    ("answer", "message", "code"),
    [
        (b'{"error":{"message":"no %s here","code":404}}' % DIGEST.encode(), "no mine here", 404),
        (b'{"message":"old shape","code":400}', "old shape", 400),
        (b'{"detail":"Not Found"}', "Not Found", None),
        (b'{"error":"plain"}', "plain", None),
        (b"[1]", "[1]", None),
        (b"<html>", "<html>", None),
    ],
)
def test_engine_error_of_any_shape_becomes_one_shape(answer: bytes, message: str, code: int | None) -> None:
    error = rewrite.engine_error(answer, outgoing())
    assert (error["message"], error["code"], error["source"]) == (message, code, "engine")
    assert set(error) == {"message", "type", "param", "code", "source"}


def test_engine_error_about_the_base_keeps_its_words() -> None:
    error = rewrite.engine_error(b'{"message":"the base of a number"}', outgoing("base"))
    assert error["message"] == "the base of a number"
