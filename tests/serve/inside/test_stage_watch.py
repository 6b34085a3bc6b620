"""The wait for adapters that workers read, in front of a fake engine."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from loradock_serve.inside.stage_watch import StageWatch


class FakeEngine:
    """One worker that has every adapter ready, and cannot be asked at first; `then` runs as soon as it has failed."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.then: Callable[[], Any] = lambda: None

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        if method == "loradock_stage":
            return [None]
        if self.failures:
            self.failures -= 1
            asyncio.get_running_loop().call_soon(self.then)
            raise RuntimeError("no answer")
        return [[("ready", "") for _ in args[0]]]


def adapter(number: int) -> Any:
    return SimpleNamespace(lora_int_id=number, lora_name=f"a{number}", lora_path="/a")


async def test_wait_that_fails_while_another_begins_ends_nonetheless() -> None:
    engine = FakeEngine(failures=1)
    stages = StageWatch(engine)
    others: list[asyncio.Task[None]] = []
    engine.then = lambda: others.append(asyncio.create_task(stages.stage(adapter(2), None)))

    async with asyncio.timeout(10):
        with pytest.raises(RuntimeError, match="no answer"):
            await stages.stage(adapter(1), None)
        (other,) = others
        await other
