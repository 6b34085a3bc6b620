"""`loradock check --server`: judged by that server's base and limits, as it tells them."""

import json
from pathlib import Path

import pytest

from loradock_adapters.base import base_from
from loradock_adapters.base_identity import BaseIdentity
from loradock_adapters.cli import run as loradock
from loradock_adapters.engine_rules import EngineLimits
from loradock_testing.adapters_server import KEY, adapters_server
from loradock_testing.rows import WriteRows
from loradock_testing.tiny_models import make_llama


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORADOCK_API_KEY", KEY)


def told(base: Path, limits: EngineLimits) -> dict[str, object]:
    """What a server of that base answers."""
    identity = BaseIdentity.of(base.name, base, with_weights=True)
    facts = base_from(base).to_json()
    answer = {"name": base.name, "identity": identity.to_json(), "limits": limits.to_json(), **facts}
    return dict(json.loads(json.dumps(answer)))


@pytest.fixture
def config(base: Path, tmp_path: Path, write_rows: WriteRows) -> Path:
    write_rows("rows.jsonl", [{"prompt": "p", "completion": "c"}])
    path = tmp_path / "lora.yaml"
    path.write_text(f"model_id: {base}\ntrain_path: rows.jsonl\nlora_config: {{r: 48}}\n")
    return path


@pytest.mark.parametrize(
    ("limits", "code", "placement"),
    [
        (EngineLimits(64), 0, "shared"),
        (EngineLimits(32), 1, "dedicated"),
        (EngineLimits(512, enable_lora=False), 1, "dedicated"),
    ],
)
def test_limits_of_the_server_decide(
    config: Path, base: Path, limits: EngineLimits, code: int, placement: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with adapters_server() as server:
        server.base = told(base, limits)
        assert loradock(["check", str(config), "--server", server.url, "--json"]) == code
    document = json.loads(capsys.readouterr().out)
    assert document["placement"]["placement"] == placement
    assert server.url in document["target"]
    if limits == EngineLimits(32):
        assert {change["key"]: change["new"] for change in document["changes"]}["lora_config.r"] == 32
        assert document["rewritten"]["placement"] == "shared"


def test_server_of_other_weights_would_refuse_it(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_llama(tmp_path / "tiny", seed=1)
    with adapters_server() as server:
        server.base = told(other, EngineLimits(64))
        assert loradock(["check", str(config), "--server", server.url, "--json"]) == 1
    placement = json.loads(capsys.readouterr().out)["placement"]
    assert placement["placement"] == "rejected"
    assert [reason["code"] for reason in placement["reasons"]] == ["base_weights_differ"]


def test_server_of_another_architecture_would_refuse_it(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_llama(tmp_path / "other", hidden=128, layers=1)
    with adapters_server() as server:
        server.base = told(other, EngineLimits(64))
        assert loradock(["check", str(config), "--server", server.url, "--json"]) == 1
    codes = {reason["code"] for reason in json.loads(capsys.readouterr().out)["placement"]["reasons"]}
    assert {"shape_mismatch", "layer_beyond_base"} <= codes


def test_answer_of_something_else_is_told(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with adapters_server() as server:
        server.base = {"object": "list"}
        assert loradock(["check", str(config), "--server", server.url]) == 2
    assert "does not say what it serves" in capsys.readouterr().err
