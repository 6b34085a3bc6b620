"""A Hub on a free loopback port: the parts of its API by which `huggingface_hub` reads models, with faults on demand.

    GET       /api/models/ORG/REPO[/revision/REV]      commit and files (`?blobs=True`: with sizes and hashes)
    GET       /api/models/ORG/REPO/tree/REV[/FOLDER]   the files again
    HEAD, GET /ORG/REPO/resolve/REV/PATH               a file, or the way to it where it is large
    GET       /lfs/SHA256?signature=…                  a large file, on another host name, as a CDN has it

Private repositories look like missing ones, gated ones are refused, renamed ones redirect.
"""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = ".safetensors"
SIGNATURE = "signed-for-the-one-who-asked"


@dataclass
class Repo:
    """One repository."""

    branches: dict[str, str] = field(default_factory=dict)
    """Branch or tag -> commit."""
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    tokens: set[str] | None = None
    """Who may see it; None: everybody."""
    gated: bool = False


@dataclass(frozen=True)
class Asked:
    """A request as it came."""

    method: str
    path: str
    host: str
    authorization: str | None
    range: str | None


@dataclass
class Hub:
    """What the server holds, what it was asked, and what it shall do wrong."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    """Answer the next requests with these instead."""
    cut_after: dict[str, list[int]] = field(default_factory=dict)
    """File -> bytes after which each of its next downloads breaks off."""
    wrong: dict[str, bytes] = field(default_factory=dict)
    """File -> what is sent in its place."""
    sizes: dict[str, int] = field(default_factory=dict)
    """File -> the size that its listing claims."""
    sizes_in_listing: bool = True
    knows_ranges: bool = True
    hold: threading.Event | None = None
    """What has `hold_on` in its path waits for it."""
    hold_on: str = "/lfs/"
    lock: threading.Lock = field(default_factory=threading.Lock)

    def commit(self, name: str, files: Mapping[str, bytes] | Path, branch: str = "main", **about: Any) -> str:
        """Makes a commit of a repository, which is made where it is not there, and returns its id."""
        if isinstance(files, Path):
            files = {
                path.relative_to(files).as_posix(): path.read_bytes() for path in files.rglob("*") if path.is_file()
            }
        repo = self.repos.setdefault(name, Repo())
        for key, value in about.items():
            setattr(repo, key, value)
        facts = repr([name, branch, len(repo.commits), sorted(files.items())])
        commit = hashlib.sha1(facts.encode(), usedforsecurity=False).hexdigest()
        repo.commits[commit] = dict(files)
        repo.branches[branch] = commit
        return commit

    def clear(self) -> None:
        """As it was made, at the same address."""
        if self.hold is not None:
            self.hold.set()
        url = self.url
        self.__init__(url)  # type: ignore[misc]

    def count(self, part: str = "") -> int:
        """Requests whose path has this in it."""
        with self.lock:
            return sum(part in asked.path for asked in self.asked)


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Serves until the block ends."""
    hub = Hub()

    class Handler(_Handler):
        shared = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        if hub.hold is not None:
            hub.hold.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    shared: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.shared
        headers = self.headers
        with hub.lock:
            host, token = headers.get("Host", ""), headers.get("Authorization")
            hub.asked.append(Asked(self.command, self.path, host, token, headers.get("Range")))
            status = hub.statuses.pop(0) if hub.statuses else None
        if status is not None:
            self._send(status, b"{}")
            return
        if hub.hold is not None and hub.hold_on in self.path:
            hub.hold.wait(60)
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if parts[0] == "lfs":
            self._large(parts[1], url.query)
        elif parts[:2] == ["api", "models"] and len(parts) >= 4:
            self._api("/".join(parts[2:4]), parts[4:], parse_qs(url.query))
        elif len(parts) >= 5 and parts[2] == "resolve":
            self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._send(404, b"{}")

    def _api(self, name: str, rest: list[str], query: dict[str, list[str]]) -> None:
        if (new := self.shared.renamed.get(name)) is not None:
            location = "/".join([f"{self.shared.url}/api/models/{new}", *rest]) + f"?{urlsplit(self.path).query}"
            self._send(307, headers={"Location": location})
            return
        repo = self._visible(name)
        if repo is None:
            return
        commit = self._commit(repo, rest[1] if len(rest) > 1 else "main")
        if commit is None:
            return
        files = repo.commits[commit]
        if rest[:1] == ["tree"]:
            tree = [{"type": "file", "path": path, **self._facts(path, content)} for path, content in files.items()]
            self._send(200, json.dumps(tree).encode())
            return
        detailed = query.get("blobs") == ["True"] or query.get("blobs") == ["true"]
        siblings = [{"rfilename": path} | (self._facts(path, files[path]) if detailed else {}) for path in files]
        about = {"id": name, "modelId": name, "sha": commit, "private": repo.tokens is not None, "siblings": siblings}
        self._send(200, json.dumps(about | {"tags": [], "downloads": 0}).encode())

    def _facts(self, path: str, content: bytes) -> dict[str, Any]:
        if not self.shared.sizes_in_listing:
            return {}
        size = self.shared.sizes.get(path, len(content))
        if not path.endswith(LARGE):
            git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
            return {"size": size, "blobId": git}
        sha256 = hashlib.sha256(content).hexdigest()
        lfs = {"size": size, "sha256": sha256, "oid": sha256, "pointerSize": 130}
        return {"size": size, "blobId": "0" * 40, "lfs": lfs}

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repo = self._visible(self.shared.renamed.get(name, name))
        if repo is None:
            return
        commit = self._commit(repo, revision)
        if commit is None:
            return
        content = repo.commits[commit].get(path)
        if content is None:
            self._error(404, "EntryNotFound", "Entry not found")
            return
        sha256 = hashlib.sha256(content).hexdigest()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{sha256[:40]}"'}
        if path.endswith(LARGE):
            headers |= {"X-Linked-ETag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
            other_host = self.shared.url.replace("127.0.0.1", "localhost")
            headers["Location"] = f"{other_host}/lfs/{sha256}?signature={SIGNATURE}"
            self._send(302, headers=headers)
        else:
            self._content(path, content, headers)

    def _large(self, sha256: str, query: str) -> None:
        if query != f"signature={SIGNATURE}" or self.headers.get("Authorization") is not None:
            self._send(403, b"{}")  # stores refuse a request that is signed twice
            return
        for repo in self.shared.repos.values():
            for files in repo.commits.values():
                for path, content in files.items():
                    if path.endswith(LARGE) and hashlib.sha256(content).hexdigest() == sha256:
                        self._content(path, content, {"ETag": f'"{sha256}"'})
                        return
        self._send(404, b"{}")

    def _content(self, path: str, content: bytes, headers: dict[str, str]) -> None:
        """A file, or the rest of it; broken off where it is to be."""
        content = self.shared.wrong.get(path, content)
        start = 0
        wanted = self.headers.get("Range", "")
        if self.shared.knows_ranges and wanted.startswith("bytes=") and wanted.endswith("-"):
            start = int(wanted.removeprefix("bytes=")[:-1])
            headers = headers | {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        body = content[start:]
        with self.shared.lock:
            cuts = self.shared.cut_after.get(path, [])
            cut = cuts.pop(0) if cuts and self.command == "GET" else None
        self._send(206 if "Content-Range" in headers else 200, body, headers, cut)

    def _visible(self, name: str) -> Repo | None:
        repo = self.shared.repos.get(name)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if repo is None or (repo.tokens is not None and token not in repo.tokens):
            status = 404 if token else 401
            self._error(status, "RepoNotFound", "Repository not found")
            return None
        if repo.gated and "/resolve/" in self.path:
            self._error(403 if token else 401, "GatedRepo", "Access to this model is restricted")
            return None
        return repo

    def _commit(self, repo: Repo, revision: str) -> str | None:
        commit = revision if revision in repo.commits else repo.branches.get(revision)
        if commit is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _error(self, status: int, code: str, message: str) -> None:
        # As the real one it repeats what it was sent: none of that may come any further.
        words = f"{message} ({self.headers.get('Authorization')})"
        self._send(status, json.dumps({"error": words}).encode(), {"X-Error-Code": code, "X-Error-Message": words})

    def _send(
        self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(ConnectionError):  # who asked may be gone
                self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: what came is in `asked`."""
