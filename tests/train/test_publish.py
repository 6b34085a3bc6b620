"""`--push`: published when the run succeeds, timed to the first token, and never the loss of a run."""

import json
from pathlib import Path

import httpx
import pytest

from loradock_adapters.cli import run as command
from loradock_adapters.errors import UsageError
from loradock_testing.rows import WriteRows
from loradock_testing.tiny_models import make_adapter
from loradock_train.publish import PushFailedError, check_push, push, told


class FakeServer:
    """Takes any upload, publishes it, and answers with one token, or with this status."""

    def __init__(self, answers_with: int = 200, publishes_with: int = 200) -> None:
        self.answers_with, self.publishes_with = answers_with, publishes_with
        self.keys: set[str | None] = set()
        self.asked: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.keys.add(request.headers.get("authorization"))
        if request.url.path == "/v1/completions":
            self.asked.append(json.loads(request.content)["model"])
            answer = {"choices": [{"text": " a"}]} if self.answers_with == 200 else {"error": {"message": "no"}}
            return httpx.Response(self.answers_with, json=answer)
        if request.url.path.endswith("/versions"):
            error = {"error": {"message": "the gate says no", "type": "refused", "code": "refused", "param": None}}
            good = {"name": "bot", "version": 3, "digest": "d" * 64, "placement": "shared", "created": True}
            return httpx.Response(self.publishes_with, json=good if self.publishes_with == 200 else error)
        return httpx.Response(200)


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    make_adapter(tmp_path / "run" / "checkpoint", base, 1)
    (tmp_path / "run" / "run.json").write_text("{}")
    return tmp_path / "run"


def pushed_to(server: FakeServer, run: Path) -> dict[str, object]:
    return push(run, "bot", server="http://there", api_key="secret", transport=httpx.MockTransport(server))


def test_push_is_recorded_with_the_time_to_the_first_token(run: Path) -> None:
    server = FakeServer()
    record = pushed_to(server, run)
    assert record == json.loads((run / "push.json").read_text())
    assert (record["name"], record["version"], record["placement"], record["why"]) == ("bot", 3, "shared", None)
    assert isinstance(record["push_s"], float)
    assert isinstance(record["first_token_s"], float)
    assert record["first_token_s"] >= record["push_s"]
    assert server.asked == ["bot"]
    assert server.keys == {"Bearer secret"}
    assert told(record).startswith("pushed as bot@3 (shared) in ")


def test_server_that_does_not_answer_leaves_the_time_unknown_and_says_why(run: Path) -> None:
    record = pushed_to(FakeServer(answers_with=503), run)
    assert record["first_token_s"] is None
    assert str(record["why"]).startswith("HTTP 503")
    assert "no token yet: HTTP 503" in told(record)


def test_push_that_is_refused_says_the_command_that_tries_again(run: Path) -> None:
    with pytest.raises(PushFailedError) as error:
        pushed_to(FakeServer(publishes_with=422), run)
    assert f"{run} is whole, but was not published" in str(error.value)
    assert f"loradock push {run} bot --server http://there" in str(error.value)
    assert not (run / "push.json").exists()


def test_names_and_addresses_are_checked_before_a_run_begins() -> None:
    check_push(None, "anything")
    with pytest.raises(UsageError):
        check_push("not a name", "http://there")
    with pytest.raises(UsageError, match="is no address"):
        check_push("bot", "there:8080")


def test_run_whose_push_fails_is_whole(
    base: Path,
    tmp_path: Path,
    write_rows: WriteRows,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_rows("rows.jsonl", [{"prompt": "def f():", "completion": " return 1"}])
    (tmp_path / "lora.yaml").write_text(
        f"model_id: {base}\ntrain_path: rows.jsonl\ncontext_length: 64\nmax_steps: 1\nlearning_rate: 1e-2\n"
        "mixed_precision: 'no'\nlora_config: {r: 2}\n"
    )
    monkeypatch.setattr("loradock_train.publish.RETRY_WAITS_S", ())
    output = ["--output", str(tmp_path / "run"), "--push", "bot", "--server", "http://127.0.0.1:9"]
    assert command(["train", str(tmp_path / "lora.yaml"), *output]) == 1
    printed = capsys.readouterr()
    assert (tmp_path / "run" / "run.json").is_file()
    assert printed.out.strip() == str(tmp_path / "run" / "checkpoint")
    assert "loradock push" in printed.err
    assert command(["train", str(tmp_path / "lora.yaml"), "--push", "not a name"]) == 2
