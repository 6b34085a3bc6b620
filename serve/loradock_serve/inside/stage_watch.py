"""Has the workers of an engine stage adapters, and waits until they have, without holding up the engine's loop.

A worker is asked between two steps, and answers at once. One watch asks for all adapters that are waited for, with
growing pauses. Knows nothing of names or of HTTP. Private touch: `AsyncLLM.collective_rpc` and `add_lora`.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

FIRST_PAUSE_S, LONGEST_PAUSE_S, GROWTH = 0.002, 0.1, 1.5


class StageFailedError(Exception):
    """A worker refuses an adapter; the message is vLLM's own."""


class StageWatch:
    """See the top of the file. One for each engine."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._waiting: dict[int, asyncio.Future[str]] = {}
        self._watch: asyncio.Task[None] | None = None

    async def stage(self, adapter: Any, packed: str | None) -> None:
        """Returns when every worker can activate the adapter, a `LoRARequest`. Raises StageFailedError.

        What cannot be told without it is tried: such an adapter is activated, inside the loop, as vLLM's own load does.
        """
        args = (adapter.lora_int_id, adapter.lora_name, adapter.lora_path, packed)
        await self._engine.collective_rpc("loradock_stage", args=args)
        if await self._staged(adapter.lora_int_id) == "unproven":
            try:
                await self._engine.add_lora(adapter)
            except Exception as error:  # vLLM raises whatever went wrong in the worker
                raise StageFailedError(str(error)) from error

    async def _staged(self, adapter_id: int) -> str:
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting[adapter_id] = future
        try:
            if self._watch is None or self._watch.done():
                self._watch = asyncio.create_task(self._look(), name="staged adapters")
            watch = self._watch  # by the time it has ended, another caller may have begun the next
            either: set[asyncio.Future[Any]] = {future, watch}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not future.done():
                await watch  # raises: the workers could not be asked
            return await future
        finally:
            self._waiting.pop(adapter_id, None)

    async def _look(self) -> None:
        pause_s = FIRST_PAUSE_S
        while self._waiting:
            await asyncio.sleep(pause_s)
            asked = list(self._waiting)
            workers = await self._engine.collective_rpc("loradock_staged", args=(asked,))
            answers = zip(asked, zip(*workers, strict=True), strict=True)
            done = [self._settle(adapter_id, of_workers) for adapter_id, of_workers in answers]
            pause_s = FIRST_PAUSE_S if any(done) else min(GROWTH * pause_s, LONGEST_PAUSE_S)

    def _settle(self, adapter_id: int, answers: Sequence[tuple[str, str]]) -> bool:
        """Tell the one who waits, where there is something to tell."""
        future = self._waiting.get(adapter_id)
        states = {state for state, _ in answers}
        if future is None or future.done():
            return False
        for state, error in answers:
            if state in ("failed", "unknown"):
                future.set_exception(StageFailedError(error or "the engine has forgotten it"))
                return True
        if "reading" in states:
            return False
        future.set_result("unproven" if "unproven" in states else "ready")
        return True
