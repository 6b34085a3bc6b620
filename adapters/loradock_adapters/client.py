"""The client of a Loradock server: publish, list, show, move names, pin, remove.

Publishing sends the contents that the server lacks (sending.py), and then the list of files. Every request may be
repeated: contents are known by their hash, and the same bytes again make no new version. Needs httpx and nothing
heavier.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from loradock_adapters.checkpoint import read_checkpoint
from loradock_adapters.connection import RETRY_WAITS_S, Connection, MissingBlobsAnswerError
from loradock_adapters.errors import CheckpointError
from loradock_adapters.names import check_name, check_tag, parse_ref
from loradock_adapters.sending import Progress, Sending
from loradock_adapters.source_ref import parse_source

DEFAULT_SERVER = "http://127.0.0.1:8080"
SOURCE_TOKEN = "X-Loradock-Source-Token"
TELL_EVERY_S = 2
"""How often the server shall say how far its fetch is."""


def _silent(phase: str, done_bytes: int, total_bytes: int) -> None:
    pass


def _count(answer: dict[str, Any], key: str) -> int:
    number = answer.get(key)
    return number if isinstance(number, int) else 0


class Client:
    """Speaks to one server. Close it, or use it as a context manager."""

    def __init__(
        self,
        server: str = DEFAULT_SERVER,
        api_key: str | None = None,
        *,
        transport: httpx.BaseTransport | None = None,
        retry_waits_s: Sequence[float] = RETRY_WAITS_S,
    ) -> None:
        """`retry_waits_s`: the pauses before what a broken connection or a busy server stopped is tried again."""
        self._connection = Connection(server, api_key, transport, retry_waits_s)
        self.server = self._connection.server

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    def push(self, path: Path, name: str, progress: Progress | None = None, *, force: bool = False) -> dict[str, Any]:
        """Publishes a checkpoint directory, or a trainer's run directory, as the next version of a name.

        What an earlier, broken push left on the server is not sent again. `force` publishes what the server would
        refuse only because it is of no use. Returns the server's answer, with `sent_bytes`, `size_bytes` and `seconds`
        added. Raises CheckpointError before anything is sent if the directory is broken, ServerError with the gate's
        problems if the server refuses it.
        """
        started_s = time.monotonic()
        check_name(name)
        checkpoint = read_checkpoint(path)
        if checkpoint.problems:
            raise CheckpointError(checkpoint.problems)
        tell = progress or _silent
        sending = Sending(self._connection, checkpoint.directory, tell)
        manifest = sending.run()
        tell("publish", 0, 0)
        document = manifest.to_json() | ({"force": True} if force else {})
        try:
            answer = self._json("POST", f"/v1/adapters/{name}/versions", json=document)
        except MissingBlobsAnswerError as error:  # collected by the server between our question and our publication
            sending.send_again(manifest, error.missing)
            answer = self._json("POST", f"/v1/adapters/{name}/versions", json=document)
        figures = {"sent_bytes": sending.sent_bytes, "size_bytes": manifest.size_bytes}
        return {**answer, **figures, "seconds": round(time.monotonic() - started_s, 3)}

    def push_source(
        self, source: str, name: str, progress: Progress | None = None, *, token: str | None = None, force: bool = False
    ) -> dict[str, Any]:
        """Has the server fetch a source (`hf://org/repo@revision`) and publish it; returns its answer, with `seconds`.

        `token`: for the source, in a header of these requests and nowhere else. The server answers every few seconds
        with how far it is; after a broken connection it goes on by itself. Raises InvalidSourceError, ServerError.
        """
        started_s = time.monotonic()
        parse_source(source)
        tell = progress or _silent
        path = f"/v1/adapters/{check_name(name)}/versions"
        headers = {"Prefer": f"wait={TELL_EVERY_S}"} | ({SOURCE_TOKEN: token} if token else {})
        document: dict[str, Any] = {"source": source} | ({"force": True} if force else {})
        answer = self._connection.json("POST", path, document, headers)
        while answer.get("state") == "fetching":
            tell("fetch", _count(answer, "done_bytes"), _count(answer, "total_bytes"))
            answer = self._connection.json("POST", path, {**document, "fetch": answer.get("fetch")}, headers)
        return {**answer, "seconds": round(time.monotonic() - started_s, 3)}

    def models(self) -> list[dict[str, Any]]:
        """The published models, each with its current version."""
        rows = self._json("GET", "/v1/adapters").get("data")
        return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []

    def show(self, name: str) -> dict[str, Any]:
        return self._json("GET", f"/v1/adapters/{check_name(name)}")

    def rm(self, model: str) -> dict[str, Any]:
        """Removes a name with all its versions, or of `name@2` that version alone."""
        ref = parse_ref(model)
        path = f"/v1/adapters/{check_name(ref.name)}"
        return self._json("DELETE", path if ref.pin is None else f"{path}/versions/{ref.pin}")

    def rollback(self, name: str, version: int | None = None) -> dict[str, Any]:
        """Points a name at one of its versions, by default the one before the current one."""
        return self._json("POST", f"/v1/adapters/{check_name(name)}/rollback", json={"version": version})

    def promote(self, name: str, version: int | str) -> dict[str, Any]:
        """Points a name at one of its versions: a number, a tag or a digest."""
        return self._json("POST", f"/v1/adapters/{check_name(name)}/promote", json={"version": version})

    def tag(self, model: str, tag: str) -> dict[str, Any]:
        """Puts a tag on `name@2`, or of `name` on the current version."""
        ref = parse_ref(model)
        path = f"/v1/adapters/{check_name(ref.name)}/tags/{check_tag(tag)}"
        return self._json("PUT", path, json={"version": ref.pin})

    def untag(self, name: str, tag: str) -> dict[str, Any]:
        return self._json("DELETE", f"/v1/adapters/{check_name(name)}/tags/{check_tag(tag)}")

    def split(self, name: str, weights: Mapping[int, int]) -> dict[str, Any]:
        """Shares out the traffic that follows a name: version number -> weight."""
        split = {str(number): weight for number, weight in weights.items()}
        return self._json("PUT", f"/v1/adapters/{check_name(name)}/split", json={"split": split})

    def end_split(self, name: str) -> dict[str, Any]:
        """Sends all that follows a name to its current version again."""
        return self._json("DELETE", f"/v1/adapters/{check_name(name)}/split")

    def gc(self, *, dry_run: bool = False) -> dict[str, Any]:
        """Frees the server's disk of what no name has any more, or only says what that is."""
        return self._json("POST", "/v1/adapters/gc", json={"dry_run": dry_run})

    def pin(self, name: str) -> dict[str, Any]:
        return self._json("POST", f"/v1/adapters/{check_name(name)}/pin")

    def unpin(self, name: str) -> dict[str, Any]:
        return self._json("DELETE", f"/v1/adapters/{check_name(name)}/pin")

    def plan(self) -> dict[str, Any]:
        """What the server would choose for itself at its next start, and what runs now."""
        return self._json("GET", "/v1/plan")

    def base(self) -> dict[str, Any]:
        """The base that the server serves, and the limits of its engine, as far as adapters depend on them."""
        return self._json("GET", "/v1/base")

    def _json(self, method: str, path: str, json: object = None) -> dict[str, Any]:
        return self._connection.json(method, path, json)
