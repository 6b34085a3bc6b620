"""An answer to a client that takes nothing more: it has not ended, so it can still be cut short."""

import asyncio

import pytest
from starlette.types import Message, Receive, Scope

from loradock_serve.cut_short import CutShort
from loradock_serve.errors import DeadlineError
from loradock_serve.lean_protocol import HANG_UP
from loradock_serve.reply import Reply


async def stalls(message: Message) -> None:
    if message["type"] == "http.response.body" and not message["more_body"]:
        await asyncio.Event().wait()


async def never() -> Message:
    return {"type": "http.request"}


@pytest.mark.parametrize("streams", [True, False])
async def test_deadline_of_an_answer_whose_end_the_client_does_not_take_is_kept(streams: bool) -> None:
    reply = Reply(stalls, "r")
    receive: Receive = never
    scope: Scope = {"extensions": {HANG_UP: lambda _callback: None}}
    with pytest.raises(DeadlineError):
        with CutShort(reply, 0.02) as cut:
            cut.watch(scope, receive)
            async with asyncio.timeout(10):
                if streams:
                    await reply.start_stream()
                    await reply.end()
                else:
                    await reply.whole(b"{}", "application/json")
    assert not reply.ended
