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


async def answered(reply: Reply, receive: Receive, *, streams: bool) -> None:
    scope: Scope = {"extensions": {HANG_UP: lambda _callback: None}}
    with CutShort(reply, 0.02) as cut:
        cut.watch(scope, receive)
        if streams:
            await reply.start_stream()
            await reply.end()
        else:
            await reply.whole(b"{}", "application/json")


@pytest.mark.parametrize("streams", [True, False])
async def test_deadline_of_an_answer_whose_end_the_client_does_not_take_is_kept(streams: bool) -> None:
    reply = Reply(stalls, "r")
    with pytest.raises(DeadlineError):
        await asyncio.wait_for(answered(reply, never, streams=streams), 10)
    assert not reply.ended
