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


def is_refused(asked: Version | None, path: str) -> bool:
    try:
        refuse_wrong_task(asked, "m", path)
    except WrongTaskError:
        return True
    return False


@pytest.mark.parametrize(
    ("asked", "open_paths"),
    [
        pytest.param(version("full", FULL, HEAD), {CLASSIFY}, id="classifier"),
        pytest.param(version("lora"), {CHAT, COMPLETIONS, EMBEDDINGS}, id="adapter"),
        # Published before heads were told apart: its engine says.
        pytest.param(version("full", FULL), {CHAT, COMPLETIONS, EMBEDDINGS, CLASSIFY}, id="full model"),
        # A base may be a classifier.
        pytest.param(None, {CHAT, COMPLETIONS, EMBEDDINGS, CLASSIFY}, id="base"),
    ],
)
def test_just_what_fits_or_is_not_known_goes_through(asked: Version | None, open_paths: set[str]) -> None:
    assert {path for path in (CHAT, COMPLETIONS, EMBEDDINGS, CLASSIFY) if not is_refused(asked, path)} == open_paths


def test_request_for_classes_gets_no_stop_tokens() -> None:
    out = outgoing(CLASSIFY, {"model": "m", "input": "x"}, "sha256:0", "m", Behaviour("{{ own }}", (2,)))
    assert b"stop_token_ids" not in out.body
    assert b"chat_template" not in out.body
