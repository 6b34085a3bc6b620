"""Proofs of what `loradock train` made, through `loradock push` and a real engine."""

import json
import shutil
from pathlib import Path

import httpx
import pytest

from loradock_testing.loradock_server import LoradockServer
from loradock_testing.proof_figures import doubled_alpha, swapped_files
from loradock_testing.tiny_models import make_adapter
from loradock_testing.trained import PROMPTS, Trained

pytestmark = pytest.mark.engine


def proof_of(server: LoradockServer, name: str) -> dict[str, object]:
    shown: dict[str, object] = httpx.get(f"{server.url}/v1/adapters/{name}", timeout=60).json()["proof"]
    return shown


def test_trained_adapter_is_proven_against_its_trainers_answers(server: LoradockServer) -> None:
    for name in ("linear", "whole-list"):
        proof = proof_of(server, name)
        assert proof["state"] == "proven", proof
        agreement = proof["agreement"]
        assert isinstance(agreement, dict)
        assert agreement["difference"] < 1e-3
    assert "proof:           proven" in server.loradock("show", "linear").stdout


def test_trained_adapter_whose_settings_or_files_were_changed_is_refused(
    server: LoradockServer, trained: Trained, tmp_path: Path
) -> None:
    for spoil in (doubled_alpha, swapped_files):
        copy = tmp_path / spoil.__name__
        shutil.copytree(trained.linear / "checkpoint", copy)
        spoil(copy)
        refused = server.loradock("push", str(copy), "spoilt", check=False)
        assert refused.returncode == 1
        assert "proof_mismatch" in refused.stderr
        assert "the engine does not answer as the trainer did" in refused.stderr
    assert httpx.get(f"{server.url}/v1/adapters/spoilt", timeout=60).status_code == 404


def test_adapter_without_a_passport_is_proven_to_change_something(
    server: LoradockServer, trained: Trained, tmp_path: Path
) -> None:
    server.loradock("push", str(make_adapter(tmp_path / "a", trained.base, 77)), "foreign")
    proof = proof_of(server, "foreign")
    assert (proof["state"], proof["agreement"]) == ("proven", None)


def test_full_model_is_unproven_until_its_engine_has_run_and_then_proven(
    server: LoradockServer, trained: Trained, tmp_path: Path
) -> None:
    assert server.tokens("full", PROMPTS[0], 4)
    proof = proof_of(server, "full")
    assert proof["state"] == "proven", proof
    spoilt = tmp_path / "spoilt"
    shutil.copytree(trained.full / "checkpoint", spoilt)
    passport = json.loads((spoilt / "loradock.json").read_text())
    for prompt in passport["probe"]["prompts"]:
        for token in prompt["top"]:
            token["logprob"] -= 1.0
    (spoilt / "loradock.json").write_text(json.dumps(passport))
    assert "unproven: " in server.loradock("push", str(spoilt), "full-spoilt").stderr
    body = {"model": "full-spoilt", "prompt": "x", "max_tokens": 1}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=240)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "proof_failed")
    assert "failed" in server.loradock("ls").stdout
