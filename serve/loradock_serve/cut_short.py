"""Ends a request early: its client hung up, or its time is over.

The request's own task is cancelled, and with it the engine's work; outside the block the reason is raised in place of
the cancellation. Knows ASGI, and nothing of engines.
"""

import asyncio
from types import TracebackType

from starlette.types import Receive, Scope

from loradock_serve.errors import DeadlineError
from loradock_serve.lean_protocol import HANG_UP
from loradock_serve.reply import Reply


class ClientGoneError(Exception):
    """The client hung up; there is nobody to answer."""


class CutShort:
    """`with CutShort(reply, timeout_s) as cut:` around a request, `cut.watch(…)` once its body has been read.

    Raises DeadlineError or ClientGoneError. An answer that is complete is not cut short any more: its end, too, shows
    as the end of the conversation.
    """

    def __init__(self, reply: Reply, timeout_s: float, whose: str = "request_timeout_s") -> None:
        """`whose`: the setting or header that says `timeout_s`."""
        self._reply = reply
        self._timeout_s = timeout_s
        self._whose = whose
        self._reason: Exception | None = None
        self._watcher: asyncio.Task[None] | None = None

    def __enter__(self) -> "CutShort":
        self._task = asyncio.current_task()
        self._timer = asyncio.get_running_loop().call_later(self._timeout_s, self._late)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
        if self._reason is not None and self._task is not None:
            self._task.uncancel()
            if kind is asyncio.CancelledError:
                raise self._reason from None

    def watch(self, scope: Scope, receive: Receive) -> None:
        """Look out for the end of the connection; nobody else may call `receive` from here on."""
        tell_me = scope.get("extensions", {}).get(HANG_UP)
        if tell_me is not None:
            tell_me(self._gone)
        else:
            self._watcher = asyncio.create_task(self._wait_for_end(receive))

    async def _wait_for_end(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._gone()

    def _gone(self) -> None:
        self._cut(ClientGoneError())

    def _late(self) -> None:
        waited = "; it did not reach the engine" if self._reply.queue_s is None else ""
        self._cut(DeadlineError(f"The request was cut off after {self._timeout_s:g} s (`{self._whose}`){waited}"))

    def _cut(self, reason: Exception) -> None:
        if self._reason is None and self._task is not None and not self._reply.ended:
            self._reason = reason
            self._task.cancel()
