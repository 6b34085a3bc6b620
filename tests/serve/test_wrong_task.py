"""A classifier is not asked for text, nor a hot-swapped adapter for classes: told before an engine starts."""

from datetime import UTC, datetime
from typing import Literal

import pytest

from loradock_adapters.problems import Problem
from loradock_adapters.registry import Version
from loradock_serve.catalog import refuse_wrong_task
from loradock_serve.errors import WrongTaskError
from loradock_serve.rewrite import CHAT, CLASSIFY, COMPLETIONS, EMBEDDINGS, Behaviour, outgoing

HEAD = Problem("classification_head", "a classification head")
FULL = Problem("full_weights", "complete weights")


def version(kind: Literal["lora", "full"], *reasons: Problem) -> Version:
    return Version(
        name="m", number=1, digest="sha256:0", kind=kind, placement="shared" if kind == "lora" else "dedicated",
        reasons=reasons, rank=None, size_bytes=1, created_at=datetime.now(UTC), chat_template=None, stop_token_ids=(),
        current=True,
    )  # fmt: skip


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, EMBEDDINGS])
def test_classifier_is_refused_on_every_other_path_with_the_right_one(path: str) -> None:
    with pytest.raises(WrongTaskError, match=r"'m' is a classifier: .* ask POST /classify") as caught:
        refuse_wrong_task(version("full", FULL, HEAD), "m", path)
    assert (caught.value.code, caught.value.param) == ("wrong_task", "model")


def test_adapter_is_refused_on_classify() -> None:
    with pytest.raises(WrongTaskError, match=r"'m' writes text and has no classes: ask POST /v1/chat/completions"):
        refuse_wrong_task(version("lora"), "m", CLASSIFY)


def test_what_fits_or_is_not_known_goes_through() -> None:
    refuse_wrong_task(version("full", FULL, HEAD), "m", CLASSIFY)
    refuse_wrong_task(version("lora"), "m", CHAT)
    refuse_wrong_task(version("full", FULL), "m", CLASSIFY)  # published before heads were told apart: its engine says
    refuse_wrong_task(None, "base", CLASSIFY)  # a base may be a classifier


def test_request_for_classes_gets_no_stop_tokens() -> None:
    out = outgoing(CLASSIFY, {"model": "m", "input": "x"}, "sha256:0", "m", Behaviour("{{ own }}", (2,)))
    assert b"stop_token_ids" not in out.body
    assert b"chat_template" not in out.body
