"""URLs of data and models: a login in one is refused, no message repeats it, and a missing driver is named."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import pytest
from pydantic import ValidationError

from loradock_adapters.errors import UsageError
from loradock_train import train
from loradock_train.config import TrainConfig
from loradock_train.config_file import load_config
from loradock_train.errors import ConfigError, DataError
from loradock_train.files import data_files
from loradock_train.rows import read_rows
from loradock_train.signed import is_signed
from loradock_train.urls import has_login, missing_told, redacted

LOGINS = [
    ("https://user:hunter2@host/rows.jsonl", "https://***@host/rows.jsonl"),
    ("https://hunter2@host/rows.jsonl", "https://***@host/rows.jsonl"),  # a token as the name
    ("https://user:p@hunter2@host/rows.jsonl", "https://***@host/rows.jsonl"),
    ("s3://AKIAX:hun/ter2@bucket/rows.jsonl", "s3://***@bucket/rows.jsonl"),
    ("sftp://me:hunter2@host/rows.jsonl", "sftp://***@host/rows.jsonl"),
    ("abfs://container:hunter2@account/rows.jsonl", "abfs://***@account/rows.jsonl"),
    ("simplecache::ftp://me:hunter2@host/rows.jsonl", "simplecache::ftp://***@host/rows.jsonl"),
    ("https://host/rows.jsonl?X-Amz-Signature=hunter2&a=1", "https://host/rows.jsonl?X-Amz-Signature=***&a=1"),
    ("az://container/rows.jsonl?sv=2026&sig=hunter2", "az://container/rows.jsonl?sv=2026&sig=***"),
    ("hf://datasets/org/name?token=hunter2", "hf://datasets/org/name?token=***"),
]
PLAIN = [
    "s3://bucket/a@b/rows.jsonl",
    "s3://arn:aws:s3:us-west-2:1234:accesspoint/name/rows.jsonl",
    "abfs://container@account.dfs.core.windows.net/rows.jsonl",
    "sftp://me@host/rows.jsonl",
    "http://localhost:8080/rows@2.jsonl",
    "hf://datasets/org/name?split=train&revision=v1",
]


@pytest.mark.parametrize(("url", "shown"), LOGINS)
def test_login_is_hidden_wherever_its_url_stands(url: str, shown: str) -> None:
    assert has_login(url)
    assert redacted(url) == shown
    assert redacted(f"ClientError: 403 at {url} (see '{url}')") == f"ClientError: 403 at {shown} (see '{shown}')"


@pytest.mark.parametrize("url", PLAIN)
def test_url_without_a_login_is_left_as_it_is(url: str) -> None:
    assert not has_login(url)


@pytest.mark.parametrize("url", [url for url, _ in LOGINS])
@pytest.mark.parametrize(
    "key", ["train_path", "valid_path", "model_id", "output_dir", "adapter_path", "chat_template", "trian_path"]
)
def test_login_in_a_config_is_refused_with_its_line_and_not_repeated(tmp_path: Path, key: str, url: str) -> None:
    if key in ("train_path", "valid_path") and is_signed(url):
        return  # see test_signed.py
    values = {"model_id": "org/name", "train_path": "[rows.jsonl]", "lora_config": "{}", key: url}
    path = tmp_path / "lora.yaml"
    path.write_text("".join(f"{name}: {value}\n" for name, value in values.items()))
    line = list(values).index(key) + 1
    with pytest.raises(
        ConfigError, match=rf"line {line}, {key}: a URL with a login in it .* by the environment"
    ) as one:
        load_config(path)
    with pytest.raises(ConfigError, match=key) as other:
        train(path, overrides=[f"{key}=['{url}']"], output=tmp_path / "run")
    for caught in (one, other):
        assert "ter2" not in str(caught.value)
        assert caught.value.__cause__ is None
    assert not (tmp_path / "run").exists()


def test_login_deep_in_a_config_is_found(tmp_path: Path) -> None:
    path = tmp_path / "lora.yaml"
    path.write_text("model_id: o/n\ntrain_path:\n  - a.jsonl\n  - https://u:hunter2@h/b.jsonl\n"
                    "tokenizer:\n  path: s3://k:hunter2@b/t\n")  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert [problem.where for problem in caught.value.problems] == ["line 2, train_path", "line 6, tokenizer.path"]


def test_login_in_a_config_object_is_refused_and_not_repeated() -> None:
    with pytest.raises(ValidationError, match="train_path: a URL with a login in it") as caught:
        TrainConfig(model_id="org/name", train_path=("https://user:hunter2@host/rows.jsonl",))
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("https://u:hunter2@h/x", "expected key=value"),
        ("seed=ftp://u:hunter2@h", "seed: a URL with a login in it"),
        ("train_path=[ftp://u:hunter2@h/x?]]", "is not a YAML value"),
        ("model_id.name=1", r"model_id is 'https://\*\*\*@h', not a section"),
    ],
)
def test_login_in_an_override_is_not_repeated(tmp_path: Path, override: str, message: str) -> None:
    path = tmp_path / "lora.yaml"
    path.write_text("model_id: https://u:hunter2@h\ntrain_path: rows.jsonl\n")
    with pytest.raises(UsageError, match=message) as caught:
        load_config(path, [override])
    assert "hunter2" not in str(caught.value)


def test_login_in_the_output_option_is_not_repeated(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    config = {"model_id": "org/name", "train_path": str(tmp_path / "rows.jsonl")}
    with pytest.raises(UsageError, match="give the URL as output_dir") as caught:
        train(config, output="s3://key:hunter2@bucket/run")
    assert "hunter2" not in str(caught.value)


# ---- drivers ---------------------------------------------------------------------------------------------------------


class TalkativeFile(io.RawIOBase):
    """Opens, and then cannot be read."""

    def read(self, size: int = -1) -> bytes:
        raise RuntimeError("connection to https://user:hunter2@mirror/rows lost (token?key=1&secret=hunter2)")


class TalkativeSystem(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """A file system whose errors tell everything it knows."""

    protocol = "talkative"

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        if "denied" in path:
            raise KeyError("403 for https://user:hunter2@mirror/rows.jsonl")
        return {"name": path, "size": 10, "type": "file"}

    def _open(self, path: str, mode: str = "rb", **options: Any) -> TalkativeFile:
        if "closed" in path:
            raise PermissionError("sftp://user:hunter2@mirror is closed")
        return TalkativeFile()


@pytest.fixture
def talkative() -> Iterator[None]:
    fsspec.register_implementation("talkative", TalkativeSystem, clobber=True)
    yield
    TalkativeSystem.clear_instance_cache()


@pytest.mark.usefixtures("talkative")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("denied", r"train_path cannot be read:\n  talkative://denied.jsonl: KeyError: .*https://\*\*\*@mirror"),
        ("closed", r"talkative://closed.jsonl: PermissionError: sftp://\*\*\*@mirror is closed"),
        (
            "broken",
            r"talkative://broken.jsonl: RuntimeError: connection to https://\*\*\*@mirror/rows lost .*secret=\*",
        ),
    ],
)
def test_error_of_a_driver_is_told_without_the_login_in_it(name: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_rows([f"talkative://{name}.jsonl"], "auto", "train_path")
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("url", "module", "package"),
    [("gs://bucket/rows.jsonl", "gcsfs", "gcsfs"), ("abfs://c@account/rows.jsonl", "adlfs", "adlfs")],
)
def test_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch, url: str, module: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf"nothing installed reads \w+:// \(pip install {package}\)"):
        data_files([url], "train_path")


def test_missing_driver_of_s3_is_our_extra() -> None:
    told = missing_told("s3://bucket/rows.jsonl", ImportError("Install s3fs to access S3"))
    assert told == "nothing installed reads s3:// (pip install 'loradock[s3]')"


def test_driver_without_an_entry_is_named_in_the_words_of_fsspec() -> None:
    told = missing_told("box://rows", ImportError('Please install "boxfs" to access BoxFileSystem'))
    assert told == 'nothing installed reads box:// (fsspec says: Please install "boxfs" to access BoxFileSystem)'


def test_unknown_file_system_is_told() -> None:
    with pytest.raises(DataError, match=r"nothing installed reads nowhere:// \(fsspec knows no such file system\)"):
        data_files(["nowhere://rows.jsonl"], "train_path")
