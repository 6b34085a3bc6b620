"""A server that speaks S3, for tests: moto's, as a process of its own on a free port of this machine.

What it holds is gone when it ends. Its log tells how often an object was asked for.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import boto3  # type: ignore[import-untyped]
import httpx

START_TIMEOUT_S = 60.0
KEY, SECRET = "test-key", "test-secret-key"
RUN = """
import sys
from werkzeug.serving import make_server
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
server = make_server("127.0.0.1", int(sys.argv[1]), DomainDispatcherApplication(create_backend_app), threaded=True)
print(server.server_port, flush=True)
server.serve_forever()
"""


class S3Server:
    """A running server."""

    def __init__(self, log: Path, port: int = 0) -> None:
        self._log = log
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", RUN, str(port)], stdout=subprocess.PIPE, stderr=file, text=True
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, log.read_text()[-2000:]
        self.port = int(line)
        self.url = f"http://127.0.0.1:{self.port}"
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"{self.url}/moto-api/", timeout=10)
                return
            assert time.monotonic() < deadline
            time.sleep(0.02)

    @property
    def environment(self) -> Mapping[str, str]:
        """What a client of this server has to have in its environment."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": self.url,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def new_bucket(self) -> str:
        """The URL of a place for blobs, in a bucket of its own."""
        bucket = f"b{uuid.uuid4().hex}"
        self._client().create_bucket(Bucket=bucket)
        return f"s3://{bucket}/some/prefix"

    def overwrite(self, url: str, sha256: str, content: bytes) -> None:
        """Put other bytes where a blob is."""
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        self._client().put_object(Bucket=bucket, Key=f"{prefix}/blobs/{sha256[:2]}/{sha256}", Body=content)

    def asked(self, method: str, sha256: str) -> int:
        """How often an object was asked for, by requests with this method."""
        line = (
            rf'"(?:\x1b\[\d+m)*{method} /[^? ]*/{sha256}[? ]'  # what is no 200 is coloured; a listing has it behind "?"
        )
        return len(re.findall(line, self._log.read_text()))

    def suspend(self) -> None:
        """It accepts connections and says nothing any more."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def _client(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
        )


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """A server that ends with the block."""
    with tempfile.TemporaryDirectory(prefix="loradock-s3-") as directory:
        server = S3Server(Path(directory, "log"))
        try:
            yield server
        finally:
            server.stop()


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """These values in this process's environment."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
