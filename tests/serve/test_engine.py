"""An engine's life: started once however many ask, restarted or not, stopped in every state. Real processes."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from loradock_serve import engine as engine_module
from loradock_serve.engine import AttachedEngine, Engine
from loradock_serve.engine_command import EngineCommand
from loradock_serve.errors import EngineStartError, EngineUnavailableError
from loradock_serve.process import EngineProcess
from loradock_testing.engines import fake_command, fake_engine, group_members, post
from loradock_testing.waiting import until


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(engine_module, "READY_POLL_S", 0.05)


def state_of(engine: Engine | AttachedEngine) -> str:
    """Its state now, which mypy must not think it knows."""
    return engine.state


@asynccontextmanager
async def running(engine: Engine) -> AsyncIterator[Engine]:
    try:
        yield engine
    finally:
        await engine.stop()


def switching(*commands: Callable[[Path], EngineCommand]) -> Callable[[Path], EngineCommand]:
    """One command after the other, a start each; the last one from then on."""
    left = list(commands)
    return lambda socket: (left.pop(0) if len(left) > 1 else left[0])(socket)


def failing(socket: Path) -> EngineCommand:
    return fake_command(socket, model="fail-to-start")


async def test_engine_starts_once_however_many_ask_and_leaves_nothing(tmp_path: Path) -> None:
    engine = fake_engine(tmp_path)
    assert (engine.state, engine.current, engine.pid) == ("stopped", None, None)
    starts = await asyncio.gather(*(engine.ensure_ready(30) for _ in range(5)))
    assert {start.number for start in starts} == {1}
    assert engine.current is starts[0]
    assert engine.state == "ready"
    pid = engine.pid
    assert pid is not None
    assert len(group_members(pid)) == 2
    await engine.stop()
    assert (state_of(engine), engine.runs) == ("stopped", False)
    assert group_members(pid) == []
    assert list(tmp_path.glob("*.sock")) == []
    await engine.stop()  # again: nothing happens


async def test_stopped_engine_starts_again_on_a_fresh_socket(tmp_path: Path) -> None:
    sockets: list[Path] = []

    def command(socket: Path) -> EngineCommand:
        sockets.append(socket)
        return fake_command(socket)

    async with running(fake_engine(tmp_path, command)) as engine:
        await engine.ensure_ready(30)
        await engine.stop()
        assert (await engine.ensure_ready(30)).number == 2
    assert len(set(sockets)) == 2
    assert (tmp_path / "logs" / "engine.log.1").is_file()


async def test_failed_start_tells_every_waiter_why_and_the_next_request_tries_afresh(tmp_path: Path) -> None:
    async with running(fake_engine(tmp_path, switching(failing, fake_command))) as engine:
        results = await asyncio.gather(*(engine.ensure_ready(30) for _ in range(3)), return_exceptions=True)
        for result in results:
            assert isinstance(result, EngineStartError)
            log = tmp_path / "logs" / "engine.log"
            assert str(result) == (
                f"The base's engine ended with status 1; its log is {log}, which ends:\n"
                "fake engine: this model does not load"
            )
            assert result.summary == "The base's engine ended with status 1"
        assert engine.failure is results[0]
        await until(lambda: not engine.runs, "the failed engine's end")
        assert engine.state == "failed"
        assert (await engine.ensure_ready(30)).number == 2
        assert engine.failure is None


async def test_base_that_fails_to_start_goes_on_trying_and_its_waiters_wait(tmp_path: Path) -> None:
    commands = switching(failing, failing, fake_command)
    async with running(fake_engine(tmp_path, commands, restarts=True)) as engine:
        assert (await engine.ensure_ready(30)).number == 3


async def test_wait_that_is_too_short_says_what_is_wrong_and_the_start_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "FIRST_PAUSE_S", 60.0)
    async with running(fake_engine(tmp_path, failing, restarts=True)) as engine:
        engine.start()
        await until(lambda: engine.failure is not None, "the first failure")
        with pytest.raises(EngineUnavailableError, match=r"not ready after 0 s: .*\n.*does not load") as caught:
            await engine.ensure_ready(0.05)
        assert caught.value.retry_after_s == 10
        assert state_of(engine) == "starting"
        await asyncio.wait_for(engine.stop(), 30)  # in the middle of the pause
        assert state_of(engine) == "stopped"


async def test_start_that_takes_too_long_fails_and_names_its_log(tmp_path: Path) -> None:
    def deaf(socket: Path) -> EngineCommand:
        return EngineCommand(("sleep", "600"), dict(os.environ), socket)

    engine = fake_engine(tmp_path, deaf, start_timeout_s=0.2)
    with pytest.raises(EngineStartError, match=r"was not ready within 0 s; its log is .*engine\.log"):
        await engine.ensure_ready(30)
    await until(lambda: not engine.runs, "its end")
    assert engine.pid is None


async def test_engine_that_cannot_even_be_started_says_so(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("no directory")
    engine = fake_engine(tmp_path)
    with pytest.raises(EngineStartError, match=r"The base's engine cannot be started: .*File exists"):
        await engine.ensure_ready(30)


async def test_stop_during_the_start_releases_the_waiters_at_once(tmp_path: Path) -> None:
    engine = fake_engine(tmp_path)
    waiter = asyncio.create_task(engine.ensure_ready(30))
    await until(lambda: engine.pid is not None, "the process")
    pid = engine.pid
    assert pid is not None
    await engine.stop()
    with pytest.raises(EngineUnavailableError, match="The base's engine is being stopped"):
        await waiter
    assert engine.state == "stopped"
    assert group_members(pid) == []


async def test_request_that_comes_while_it_stops_gets_the_next_start(tmp_path: Path) -> None:
    async with running(fake_engine(tmp_path)) as engine:
        await engine.ensure_ready(30)
        stopping = asyncio.create_task(engine.stop())
        await until(lambda: engine.state == "stopping", "the stop")
        assert engine.current is None
        assert (await engine.ensure_ready(30)).number == 2
        await stopping


async def test_request_in_the_last_moments_of_a_broken_engine_gets_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end = asyncio.Event()
    kill = EngineProcess.kill

    async def slow_kill(self: EngineProcess) -> None:
        await may_end.wait()
        await kill(self)

    monkeypatch.setattr(EngineProcess, "kill", slow_kill)
    async with running(fake_engine(tmp_path)) as engine:
        await engine.ensure_ready(30)
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        await until(lambda: engine.state == "failed", "the failure to be seen")
        late = asyncio.create_task(engine.ensure_ready(30))
        await asyncio.sleep(0)
        may_end.set()
        assert (await late).number == 2


@pytest.mark.parametrize("victim", ["launcher", "engine"])
async def test_base_that_is_killed_restarts_and_nothing_of_the_old_one_stays(tmp_path: Path, victim: str) -> None:
    async with running(fake_engine(tmp_path, restarts=True)) as engine:
        first = await engine.ensure_ready(30)
        group = engine.pid
        assert group is not None
        others = [pid for pid in group_members(group) if pid != group]
        os.kill(group if victim == "launcher" else others[0], signal.SIGKILL)
        await until(lambda: engine.current is not first, "the death to be seen")
        assert (await engine.ensure_ready(30)).number == 2
        assert group_members(group) == []
        assert len(list(tmp_path.glob("*.sock"))) == 1
        assert await first.client.is_healthy() is False


async def test_ready_engine_that_is_killed_leaves_one_log_line_with_its_last_words_and_the_signal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its connections break before its end is known."""
    monkeypatch.setattr(engine_module, "HEALTH_POLL_S", 0.001)
    monkeypatch.setattr(engine_module, "END_SEEN_WITHIN_S", 60.0)

    def talkative(socket: Path) -> EngineCommand:
        command = fake_command(socket)
        script = "import os, runpy, sys; print('last words', flush=True); sys.argv.pop(1); "
        script += "runpy.run_module('loradock_testing.fake_engine', run_name='__main__')"
        return EngineCommand((sys.executable, "-c", script, *command.argv[2:]), command.environment, socket)

    caplog.set_level("INFO", logger="loradock.engine")
    async with running(fake_engine(tmp_path, talkative, restarts=True)) as engine:
        first = await engine.ensure_ready(30)
        assert engine.pid is not None
        (victim,) = [pid for pid in group_members(engine.pid) if pid != engine.pid]
        os.kill(victim, signal.SIGKILL)
        await until(lambda: engine.current is not first, "the death to be seen")
        await engine.ensure_ready(30)
    log = tmp_path / "logs" / "engine.log"
    assert [record.getMessage() for record in caplog.records] == [
        "the base's engine is ready (start 1)",
        "The base's engine ended with status 137 (killed by signal 9, perhaps out of memory); "
        f"its log is {log}, which ends:\nlast words",
        "the base's engine starts again in 0 s",
        "the base's engine is ready (start 2)",
    ]
    assert log.with_name("engine.log.1").read_text() == "last words\n"


async def test_suspected_engine_that_is_sick_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "HEALTH_POLL_S", 600.0)  # so that only the suspicion can find it
    async with running(fake_engine(tmp_path, restarts=True)) as engine:
        first = await engine.ensure_ready(30)
        await engine.examine(60)
        assert await first.client.is_healthy()
        await post(first.client, "!sick")
        assert engine.current is first
        engine.suspect()
        await until(lambda: engine.starts == 2, "the restart")
        assert "is dead: its health check fails" in str(engine.failure)


async def test_engine_without_the_corrected_wrapper_never_becomes_ready(tmp_path: Path) -> None:
    def stock(socket: Path) -> EngineCommand:
        return fake_command(socket, extra={"FAKE_ENGINE_CORRECTED": "0"})

    with pytest.raises(EngineStartError, match=r"runs without Loradock's corrected LoRA wrapper .*FakeEngine"):
        await fake_engine(tmp_path, stock).ensure_ready(30)
    async with running(fake_engine(tmp_path, stock, needs_corrected_lora=False)) as engine:
        assert (await engine.ensure_ready(30)).number == 1


async def test_attached_engine_is_waited_for_and_counts_as_new_once_suspected(tmp_path: Path) -> None:
    engine = AttachedEngine(f"unix://{tmp_path}/fixed.sock")
    with pytest.raises(EngineUnavailableError, match=r"The engine at unix://.* does not answer") as caught:
        await engine.ensure_ready(0.1)
    assert caught.value.retry_after_s == 10
    waiting = [asyncio.create_task(engine.ensure_ready(30)) for _ in range(3)]
    behind = await EngineProcess.start(fake_command(tmp_path / "fixed.sock"), tmp_path / "log")
    try:
        assert [start.number for start in await asyncio.gather(*waiting)] == [1, 1, 1]
        assert (engine.state, engine.failure) == ("ready", None)
        engine.suspect()
        assert engine.current is None
        assert (await engine.ensure_ready(30)).number == 2
    finally:
        await engine.stop()
        await behind.stop()
    assert state_of(engine) == "stopped"


async def test_attached_engine_that_is_slow_to_answer_holds_nobody_beyond_his_time(tmp_path: Path) -> None:
    release = asyncio.Event()

    async def silent(_reader: Any, writer: asyncio.StreamWriter) -> None:
        await release.wait()
        writer.close()

    server = await asyncio.start_unix_server(silent, tmp_path / "deaf.sock")
    engine = AttachedEngine(f"unix://{tmp_path}/deaf.sock")
    waits = [engine.ensure_ready(0.2) for _ in range(10)]
    results = await asyncio.wait_for(asyncio.gather(*waits, return_exceptions=True), 30)
    assert all(isinstance(result, EngineUnavailableError) for result in results)
    await engine.stop()
    server.close()
    release.set()
    await server.wait_closed()
