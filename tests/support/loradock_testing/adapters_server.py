"""A server that speaks `/v1/adapters` over real HTTP, in memory and in this process, with faults on demand.

What a client sees of a gateway: no engine, no gate, no disk. The gateway's own routes are tested in tests/serve.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from loradock_adapters.manifest import Manifest

KEY = "secret"


@dataclass
class State:
    """What the server holds, and what it shall do wrong."""

    url: str = ""
    blobs: dict[str, bytes] = field(default_factory=dict)
    partials: dict[str, bytes] = field(default_factory=dict)
    published: list[dict[str, Any]] = field(default_factory=list)
    """The documents of the publications."""
    put_answers: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    """Statuses and headers that the next PUTs are answered with, whatever they bring."""
    versions: dict[str, list[str]] = field(default_factory=dict)
    """Name -> digests, the oldest first."""
    current: dict[str, int] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    """Method and path of each request, as it came."""
    drop: dict[str, int] = field(default_factory=dict)
    """Method -> how many more of its requests are cut off without an answer."""
    keep_dropped: bool = True
    """Whether half of what a PUT that is cut off would have brought is there afterwards."""
    pinned: set[str] = field(default_factory=set)
    residency: dict[str, Any] | None = None
    """What every model shows of where it is."""
    plan: dict[str, Any] | None = None
    base: dict[str, Any] | None = None
    answer: tuple[int, Any] | None = None
    """Stands in for the answer to every POST."""
    forget_blobs_once: bool = False
    """The next publication finds its blobs gone."""
    put_came: threading.Event = field(default_factory=threading.Event)
    """Set by the first PUT."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, method: str) -> int:
        return sum(request.startswith(f"{method} ") for request in self.requests)


@contextmanager
def adapters_server() -> Iterator[State]:
    """Serves on a free port of the loopback until the block ends."""
    state = State()

    class Handler(_Handler):
        shared = state

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    shared: State
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        if self._received():
            held_bytes = len(self.shared.partials.get(self._last, b""))
            self._send(200 if self._last in self.shared.blobs else 404, headers={"Upload-Offset": str(held_bytes)})

    def do_PUT(self) -> None:
        self.shared.put_came.set()
        if not self._received():
            return
        if self.shared.put_answers:
            status, headers = self.shared.put_answers.pop(0)
            self._error(status, "made_up", headers=headers)
            return
        held = self.shared.partials.pop(self._last, b"") if "Content-Range" in self.headers else b""
        if "Content-Range" in self.headers:
            assert self.headers["Content-Range"].startswith((f"bytes {len(held)}-", "bytes */"))
        whole = held + self._body
        if hashlib.sha256(whole).hexdigest() != self._last:
            self._error(400, "digest_mismatch")
            return
        self.shared.blobs[self._last] = whole
        self._send(201, {})

    def do_GET(self) -> None:
        if not self._received():
            return
        if self.path == "/v1/adapters":
            self._send(200, {"object": "list", "data": [self._row(name) for name in self.shared.versions]})
        elif self.path == "/v1/plan":
            self._send(200, self.shared.plan)
        elif self.path == "/v1/base":
            self._send(200, self.shared.base)
        elif self._last in self.shared.versions:
            whole = {"rank": 4, "reasons": [], "versions": self._history(self._last)}
            self._send(200, self._row(self._last) | whole | {"residency": self.shared.residency})
        else:
            self._error(404, "model_not_found")

    def do_DELETE(self) -> None:
        if not self._received():
            return
        if self._last == "pin":
            name = self.path.split("/")[3]
            self._send(200, {"name": name, "pinned": False, "was_pinned": name in self.shared.pinned})
            self.shared.pinned.discard(name)
        elif self.shared.versions.pop(self._last, None) is None:
            self._error(404, "model_not_found")
        else:
            self._send(200, {"name": self._last, "deleted": True})

    def do_POST(self) -> None:
        if not self._received():
            return
        if self.shared.answer is not None:
            self._send(*self.shared.answer)
            return
        name = self.path.split("/")[3]
        document = json.loads(self._body) if self._last != "pin" else {}
        if self._last == "pin":
            self.shared.pinned.add(name)
            self._send(200, self._row(name) | {"pinned": True, "residency": self.shared.residency})
            return
        if self._last == "rollback":
            self.shared.current[name] = document["version"]
            self._send(200, self._row(name))
            return
        self.shared.published.append(document)
        self._publish(name, Manifest.from_json({"files": document["files"]}))

    def _publish(self, name: str, manifest: Manifest) -> None:
        if self.shared.forget_blobs_once:
            self.shared.forget_blobs_once = False
            self.shared.blobs.pop(next(iter(manifest.blobs)))
        missing = [sha256 for sha256 in manifest.blobs if sha256 not in self.shared.blobs]
        if missing:
            self._error(409, "missing_blobs", missing=missing)
            return
        digests = self.shared.versions.setdefault(name, [])
        created = not digests or digests[-1] != manifest.digest
        if created:
            digests.append(manifest.digest)
            self.shared.current[name] = len(digests)
        reason = {"code": "base_name", "message": "trained on x", "where": "adapter_config.json", "fix": "look"}
        answer = {"name": name, "version": len(digests), "kind": "lora", "placement": "shared", "reasons": [reason]}
        self._send(201 if created else 200, answer | {"digest": manifest.digest, "created": created, "state": "ready"})

    def _row(self, name: str) -> dict[str, Any]:
        number = self.shared.current[name]
        return {
            "name": name,
            "current_version": number,
            "digest": self.shared.versions[name][number - 1],
            "kind": "lora",
            "placement": "shared",
            "size_bytes": 1234,
            "created_at": "2026-01-02T03:04:05+00:00",
            "state": "ready",
            "residency": (self.shared.residency or {}).get("place"),
            "pinned": name in self.shared.pinned,
        }

    def _history(self, name: str) -> list[dict[str, Any]]:
        return [
            {"version": number, "digest": digest, "placement": "shared", "size_bytes": 1234}
            for number, digest in enumerate(self.shared.versions[name], 1)
        ]

    def _received(self) -> bool:
        """Takes the request in; answers it already where it is to be cut off or has no key."""
        with self.shared.lock:
            self.shared.requests.append(f"{self.command} {self.path}")
            if self.shared.drop.get(self.command, 0) > 0:
                self.shared.drop[self.command] -= 1
                self.close_connection = True
                if self.command == "PUT" and self.shared.keep_dropped:
                    half = self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
                    name = self.path.rpartition("/")[2]
                    held = self.shared.partials.get(name, b"") if "Content-Range" in self.headers else b""
                    self.shared.partials[name] = held + half
                return False
        self._last = self.path.rpartition("/")[2]
        self._body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {KEY}":
            self._error(401, "invalid_api_key")
            return False
        return True

    def _error(self, status: int, code: str, *, headers: dict[str, str] | None = None, **more: Any) -> None:
        error = {"message": f"no: {code}", "type": "x", "param": None, "code": code, **more}
        self._send(status, {"error": error}, headers)

    def _send(self, status: int, document: Any = None, headers: dict[str, str] | None = None) -> None:
        body = document if isinstance(document, bytes) else b"" if document is None else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: what came is in `requests`."""
