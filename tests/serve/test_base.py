"""Finding the base that the server was told to serve, and the process that an engine runs in."""

import asyncio
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from loradock_serve import base as base_module
from loradock_serve.base import find_base
from loradock_serve.engine_command import EngineCommand
from loradock_serve.errors import HubUnreachableError, ServeConfigError
from loradock_serve.process import LOG_TAIL_LINES, EngineProcess, explain_status
from loradock_testing.tiny_checkpoints import write_base


def test_directory_is_served_under_its_last_part(tmp_path: Path) -> None:
    directory = write_base(tmp_path / "My-Base")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    found = find_base(str(directory))
    assert (found.name, found.model) == ("My-Base", str(directory))
    assert found.facts.hidden_size == 16
    assert found.behaviour.chat_template == "{{ messages }}"
    assert set(found.behaviour.stop_token_ids) == {2, 5}


def test_run_directory_stands_for_its_checkpoint_and_keeps_its_name(tmp_path: Path) -> None:
    inner = write_base(tmp_path / "run-7" / "checkpoint")
    (tmp_path / "run-7" / "run.json").write_text("{}")
    found = find_base(str(tmp_path / "run-7"))
    assert (found.name, found.model) == ("run-7", str(inner))


def test_link_is_served_under_the_name_of_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(write_base(tmp_path / "v2"))
    assert find_base(str(tmp_path / "current")).name == "v2"


def test_path_that_is_neither_directory_nor_hub_id_is_refused() -> None:
    with pytest.raises(ServeConfigError, match=r"base '/no/such/place': neither a directory nor a Hub id \(org/name\)"):
        find_base("/no/such/place")


def test_directory_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ServeConfigError, match=r"config\.json does not exist"):
        find_base(str(tmp_path))


def test_hub_id_is_fetched_small_and_given_to_the_engine_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None]] = []

    def fetch(base: str, revision: str | None) -> Path:
        asked.append((base, revision))
        return write_base(tmp_path / "snapshot")

    monkeypatch.setattr(base_module, "_fetch_small_files", fetch)
    found = find_base("org/Model-1B", "v1")
    assert (found.name, found.model, asked) == ("Model-1B", "org/Model-1B", [("org/Model-1B", "v1")])


class Failing:
    """What the Hub's library does: raises one error, perhaps because of another."""

    def __init__(self, error: Exception, cause: Exception | None = None) -> None:
        self._error = error
        self._cause = cause

    def __call__(self, *_: object, **__: object) -> str:
        raise self._error from self._cause


def hub_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)  # their constructors want a response of the library's own HTTP client
    error.args = ("401 Client Error",)
    return error


@pytest.mark.parametrize(
    ("failing", "expected"),
    [
        (Failing(hub_error(GatedRepoError)), r"accept its terms on huggingface\.co, and set HF_TOKEN"),
        (
            Failing(LocalEntryNotFoundError("no"), hub_error(GatedRepoError)),
            r"cannot be reached: no; accept .*HF_TOKEN",
        ),
        (Failing(hub_error(RepositoryNotFoundError)), r"if it is private, set HF_TOKEN"),
        (Failing(ValueError("Unknown scheme for proxy URL")), r"does not give it: Unknown scheme for proxy URL$"),
        (Failing(ImportError("Using SOCKS proxy, but …")), r"does not give it: Using SOCKS proxy"),
    ],
)
def test_hub_that_does_not_give_the_base_is_explained(
    monkeypatch: pytest.MonkeyPatch, failing: Failing, expected: str
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", failing)
    with pytest.raises(ServeConfigError, match=expected):
        find_base("org/model")


def test_hub_that_does_not_answer_is_no_fault_of_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 2 tells systemd to leave it: a machine whose network comes up late would stay without a server."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", Failing(LocalEntryNotFoundError("no route")))
    with pytest.raises(HubUnreachableError, match=r"^base 'org/model': .* cannot be reached: no route$") as raised:
        find_base("org/model")
    assert (raised.value.exit_code, ServeConfigError.exit_code) == (1, 2)


def test_base_that_is_not_in_the_cache_of_an_offline_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", Failing(LocalEntryNotFoundError("offline mode")))
    with pytest.raises(ServeConfigError, match=r"the Hub cannot be reached: offline mode$"):
        find_base("org/model")


async def run_once(log: Path, script: str) -> EngineProcess:
    command = EngineCommand((sys.executable, "-c", script), dict(os.environ), log.with_name("never.sock"))
    process = await EngineProcess.start(command, log)
    await asyncio.wait_for(process.wait(), 15)
    await process.clean_up()
    return process


async def test_log_of_the_start_before_is_kept_and_the_tail_is_short(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "engine.log"
    await run_once(log, "print('first')")
    process = await run_once(log, "for n in range(100): print('line', n)")
    assert log.with_name("engine.log.1").read_text() == "first\n"
    assert process.log_tail().splitlines() == [f"line {n}" for n in range(100 - LOG_TAIL_LINES, 100)]
    for number in range(2, 8):
        await run_once(log, f"print('start', {number})")
    kept = {path.name: path.read_text() for path in log.parent.iterdir() if path.name != "engine.log"}
    assert kept == {f"engine.log.{number}": f"start {7 - number}\n" for number in range(1, 6)}
    log.unlink()
    assert "cannot be read" in process.log_tail()


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (1, "1"),
        (128, "128"),
        (137, "137 (killed by signal 9, perhaps out of memory)"),
        (139, "139 (killed by signal 11, a crash in native code)"),
        (143, "143 (killed by signal 15)"),
        (-9, "-9 (killed by signal 9, perhaps out of memory)"),
    ],
)
def test_status_over_128_is_explained_as_a_signal(status: int, text: str) -> None:
    assert explain_status(status) == text


async def test_stop_and_kill_of_a_process_that_has_ended_do_nothing(tmp_path: Path) -> None:
    process = await run_once(tmp_path / "engine.log", "raise SystemExit(3)")
    assert await process.wait() == 3
    await process.stop()
    await process.kill()


def test_weights_are_read_where_the_engine_put_those_of_the_served_revision(tmp_path: Path) -> None:
    served = replace(find_base(str(write_base(tmp_path / "base"))), model="org/name")
    assert served.source == "org/name"
    (tmp_path / "base" / "model.safetensors").touch()
    assert served.source == str(tmp_path / "base")
