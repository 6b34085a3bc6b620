"""Data at signed URLs: it is fetched, and no byte of a signature is in anything that is written or said."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from loradock_adapters.cli import run as loradock
from loradock_adapters.errors import UsageError
from loradock_testing.worlds import run_legs
from loradock_train import train
from loradock_train.commands.train import Asked
from loradock_train.config_file import config_from
from loradock_train.errors import ConfigError, DataError
from loradock_train.launch import Machines
from loradock_train.ray_run import check_on_ray
from loradock_train.signed import is_signed, signed_keys

ROWS = [{"prompt": f"def f{i}():", "completion": f" return {i}"} for i in range(8)]
SECRETS = ("c0ffee5ecre7", "AKIAHUNTER2", "7ok3nOfTheHour", "f0071e5ecre7")
"""Parts of the signatures below, in the letters in which they would be repeated."""
FIRST = (
    "X-Amz-Credential=AKIAHUNTER2%2F20261123%2Fs3&X-Amz-Security-Token=7ok3nOfTheHour%2B%3D"
    "&X-Amz-Signature=c0ffee5ecre7"
)
FRESH = "X-Amz-Credential=AKIAHUNTER2%2F20261124%2Fs3&X-Amz-Signature=f0071e5ecre7"


@dataclass
class Store:
    """An object store with one signature that is good, for GET alone, as S3 signs."""

    url: str = ""
    good: str = FIRST
    asked: list[str] = field(default_factory=list)
    """METHOD, and whether it was answered."""


@pytest.fixture
def store() -> Iterator[Store]:
    content = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    made = Store()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path, _, query = self.path.partition("?")
            is_good = self.command == "GET" and query == made.good and path == "/rows.jsonl"
            made.asked.append(f"{self.command} {is_good}")
            start, end = 0, len(content)
            if (wanted := self.headers.get("Range")) is not None:
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                start, end = int(first), min(len(content), int(last or len(content) - 1) + 1)
            self.send_response(403 if not is_good else 200 if wanted is None else 206)
            body = content[start:end] if is_good else b"SignatureDoesNotMatch"
            self.send_header("Content-Length", str(len(body)))
            if is_good and wanted is not None:
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    made.url = f"http://127.0.0.1:{server.server_port}/rows.jsonl"
    yield made
    server.shutdown()
    server.server_close()
    thread.join()


def options(store: Store, base: Path, **values: Any) -> dict[str, Any]:
    signed = f"{store.url}?{store.good}"
    return {
        "model_id": str(base), "train_path": signed, "valid_path": [signed], "context_length": 64,
        "learning_rate": 1e-2, "mixed_precision": "no", "max_steps": 4, "train_batch_size_per_device": 2,
        "lora_config": {"r": 2}, **values,
    }  # fmt: skip


def assert_is_silent(folder: Path, *texts: str) -> None:
    """No secret in any file below, or in the texts."""
    everything = [(str(file), file.read_bytes()) for file in folder.rglob("*") if file.is_file()]
    everything += [("output", text.encode()) for text in texts]
    assert everything
    for name, content in everything:
        for secret in SECRETS:
            assert secret.encode() not in content, f"{secret} stands in {name}"


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
def test_run_fetches_with_the_signature_and_keeps_none_of_it(
    store: Store, base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
    streaming: bool,
) -> None:  # fmt: skip
    config = options(store, base, streaming=streaming, report_to="tensorboard")
    run = train(config, output=tmp_path / "run")
    assert "GET True" in store.asked
    said = capfd.readouterr()
    assert_is_silent(tmp_path, said.out, said.err, json.dumps(run.summary), repr(run), caplog.text)
    notices = [notice for notice in run.summary["notices"] if "is fetched with the signature" in notice]
    assert [notice.partition(":")[0] for notice in notices] == ["train_path", "valid_path"]
    written = (tmp_path / "run" / "config.yaml").read_text()
    assert written.startswith("# train_path: fetched with a signature, which is not kept\n# valid_path: fetched")
    assert f"- {store.url}\n" in written


def test_killed_run_goes_on_with_a_fresh_signature_and_not_with_the_stale_one(
    store: Store, base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = options(store, base, save_steps=1, keep=9)
    alone = train(config, output=tmp_path / "alone")
    leg = {"config": config, "output": str(tmp_path / "run"), "resume": False, "kill_at_batch": 4}
    assert run_legs([leg]) == [-9]
    assert_is_silent(tmp_path)
    store.good = FRESH
    with pytest.raises(DataError, match="no such file, or its signature is no longer good: give a fresh one") as stale:
        train(config, output=tmp_path / "run", resume=True)
    fresh = options(store, base, save_steps=1, keep=9)
    resumed = train(fresh, output=tmp_path / "run", resume=True)
    files = [run.checkpoint / "adapter_model.safetensors" for run in (alone, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()
    said = capfd.readouterr()
    assert_is_silent(tmp_path, str(stale.value), said.out, said.err)
    assert train(fresh, output=tmp_path / "run", resume=True).summary == resumed.summary


def test_commands_say_and_write_nothing_of_it(
    store: Store, base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    config = own / "lora.yaml"
    values = options(store, base, max_steps=1) | {"lora_config": {"r": 300}}
    config.write_text(f"# was {values['train_path']}\n" + "".join(f"{k}: {json.dumps(v)}\n" for k, v in values.items()))
    written = tmp_path / "written"
    written.mkdir()
    assert loradock(["check", str(config), "--write", str(written / "fixed.yaml")]) == 1
    assert loradock(["data", str(config)]) == 0
    assert loradock(["train", str(config), "--plan"]) == 0
    words = [str(config), "--set", "lora_config.r=4", "--nproc", "2", "--output", str(written / "run")]
    assert loradock(["train", *words]) == 0, capfd.readouterr().err
    said = capfd.readouterr()
    assert_is_silent(written, said.out, said.err)
    assert "train_path stands there without its signature" in " ".join(said.err.split())
    assert f'train_path: ["{store.url}"]' in (written / "fixed.yaml").read_text()
    store.good = "other"
    assert loradock(["check", str(config)]) == 2
    said = capfd.readouterr()
    assert "give a fresh one" in " ".join(said.err.split())
    assert_is_silent(written, said.out, said.err)


def test_command_that_goes_on_does_not_repeat_it(store: Store, base: Path) -> None:
    config_from(options(store, base), folder=Path())
    override = f"train_path={store.url}?{FIRST}"
    asked = Asked(
        Path("lora.yaml"), [override], None, Machines(), None, None, overwrite=False, resume=False, push=None,
        as_json=False,
    )  # fmt: skip
    assert asked.again == f"loradock train lora.yaml --set 'train_path={store.url}?***' --resume"


def test_signed_url_elsewhere_and_a_login_before_the_query_are_refused(store: Store, base: Path) -> None:
    for values in (
        {"model_id": f"https://host/base?{FIRST}"},
        {"train_path": f"https://me:hunter2@host/rows.jsonl?{FIRST}"},
        {"train_path": f"az://container/rows.jsonl?{FIRST}"},
    ):
        with pytest.raises(ConfigError, match="a URL with a login in it") as caught:
            config_from(options(store, base, **values), folder=Path())
        assert not any(secret in str(caught.value) for secret in SECRETS)


def test_two_signatures_of_one_url_are_refused(store: Store, base: Path) -> None:
    with pytest.raises(ConfigError, match="stands there with two signatures") as caught:
        config_from(options(store, base, valid_path=f"{store.url}?{FRESH}"), folder=Path())
    assert not any(secret in str(caught.value) for secret in SECRETS)


def test_ray_cluster_gets_no_signature(store: Store, base: Path) -> None:
    config, _ = config_from(options(store, base), folder=Path())
    assert signed_keys(config.model_dump()) == ["train_path", "valid_path"]
    with pytest.raises(UsageError, match="--ray: train_path, valid_path: signed URLs are not handed to the machines"):
        check_on_ray(config)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://b.s3.amazonaws.com/r.jsonl?X-Amz-Date=1&X-Amz-Signature=a", True),
        ("https://storage.googleapis.com/b/r.jsonl?X-Goog-Signature=a", True),
        ("https://a.blob.core.windows.net/c/r.jsonl.gz?sv=2026&sp=r&sig=a%2Bb%3D", True),
        ("https://d.cloudfront.net/r.jsonl?Expires=1&Signature=a&Key-Pair-Id=K", True),
        ("https://host/r.jsonl?version=3", False),
        ("https://host/r.jsonl", False),
        ("s3://bucket/r.jsonl?sig=a", False),
        ("https://u:p@host/r.jsonl?sig=a", False),
    ],
)
def test_which_urls_are_signed(url: str, expected: bool) -> None:
    assert is_signed(url) is expected
