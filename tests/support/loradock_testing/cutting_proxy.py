"""A TCP proxy that cuts connections after so many bytes of what the client sends."""

import contextlib
import socket
import threading
from collections.abc import Iterator, Sequence


@contextlib.contextmanager
def cutting_proxy(port: int, limits_bytes: Sequence[int]) -> Iterator[tuple[str, list[int]]]:
    """Stands before a port of the loopback until the block ends; yields its URL, and the limits that were reached.

    The first connections are cut after these many bytes each, what comes later is left alone.
    """
    left = list(limits_bytes)
    cuts: list[int] = []
    listener = socket.create_server(("127.0.0.1", 0))
    open_sockets: list[socket.socket] = [listener]

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", port))
                open_sockets.extend((client, server))
                limit = left.pop(0) if left else None
                threading.Thread(target=_pump, args=(server, client, None, cuts), daemon=True).start()
                threading.Thread(target=_pump, args=(client, server, limit, cuts), daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", cuts
    finally:
        for each in open_sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        thread.join()


def _pump(source: socket.socket, target: socket.socket, limit: int | None, cuts: list[int]) -> None:
    """Until one side ends, or the limit is reached; then both ends go."""
    passed = 0
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            if limit is not None and passed + len(data) > limit:
                target.sendall(data[: limit - passed])
                cuts.append(limit)
                break
            target.sendall(data)
            passed += len(data)
    for each in (source, target):
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
