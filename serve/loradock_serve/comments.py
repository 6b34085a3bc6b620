"""Signs of life in an event stream, for as long as its request has to wait. Knows nothing of what it waits for."""

import asyncio
from types import TracebackType

from loradock_serve.reply import Reply

EVERY_S = 5.0


class Comments:
    """`async with Comments(…) as comments`: until `stop()` or the end of the block, a comment every few seconds.

    Most requests wait for nothing: until the first comment is due there is a timer, and no task.
    """

    def __init__(self, reply: Reply, text: str, *, wanted: bool) -> None:
        self._reply = reply
        self._text = text
        self._wanted = wanted
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Comments":
        if self._wanted:
            self._timer = asyncio.get_running_loop().call_later(EVERY_S, self._begin)
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def stop(self) -> None:
        """No comment comes after this."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._task is not None:
            task, self._task = self._task, None
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _begin(self) -> None:
        self._task = asyncio.create_task(self._write())

    async def _write(self) -> None:
        while True:
            await self._reply.comment(self._text)
            await asyncio.sleep(EVERY_S)
