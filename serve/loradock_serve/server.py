"""Run the gateway under uvicorn, in the foreground, until it is told to stop."""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator

import uvicorn
import uvloop
from starlette.types import ASGIApp

from loradock_serve import plan
from loradock_serve.app import OPENAI_PATHS, Gateway, build_gateway
from loradock_serve.config import ServeConfig, read_admin_key
from loradock_serve.errors import ServeConfigError
from loradock_serve.lean_protocol import LeanProtocol, hot_paths
from loradock_serve.log_lines import LogLines
from loradock_serve.process import adopt_orphans
from loradock_serve.proxy import REQUESTS

log = logging.getLogger("loradock.gateway")

SHUTDOWN_GRACE_S = 10
KEEP_ALIVE_S = 75
"""Longer than clients and proxies keep an idle connection themselves (httpx 5 s, aiohttp 15 s, nginx 60 s): where they
close it first, no request that comes at that moment is lost."""
BACKLOG = 2048
COLLECT_EVERY = 20_000  # objects
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run(config: ServeConfig) -> None:
    """Serve until SIGINT or SIGTERM, then stop orderly and return. Raises ServeConfigError where it cannot begin."""
    # The lines of a server are read by people and by log collectors: one each, on stderr, with a time.
    lines = LogLines(sys.stderr, patient=REQUESTS.name)
    logging.basicConfig(level=logging.INFO, handlers=[lines])
    REQUESTS.write_to(lines)
    # Nothing of this is in our lines, and gathering it is half of a line's cost (logging's own how-to, "Optimization").
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    vars(logging)["_srcfile"] = None
    logging.getLogger("alembic").setLevel(logging.WARNING)  # else it names its plug-ins at every start
    adopt_orphans()
    admin_key = read_admin_key(config, os.environ)
    listener = _listen(config)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(config, admin_key, listener))
    lines.flush()


class _Server(uvicorn.Server):
    """Ends as if it had come to its end by itself: uvicorn's own raises the signal once more after an orderly stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


async def _serve(config: ServeConfig, admin_key: str | None, listener: socket.socket) -> None:
    gateway = build_gateway(config, admin_key)
    # What is there by now stays: without this the collector walks through it again and again, in the way of requests.
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_EVERY, 20, 50)
    _announce(gateway, config, listener, admin_key)
    await _Server(uvicorn_config(gateway.app)).serve(sockets=[listener])


class _Protocol(LeanProtocol):
    hot = hot_paths(OPENAI_PATHS)


def uvicorn_config(app: ASGIApp) -> uvicorn.Config:
    """How uvicorn runs the gateway."""
    return uvicorn.Config(
        app,
        lifespan="on",
        log_config=None,
        access_log=False,
        http=_Protocol,
        timeout_graceful_shutdown=SHUTDOWN_GRACE_S,
        timeout_keep_alive=KEEP_ALIVE_S,
        server_header=False,
        proxy_headers=False,  # auth.py has that, for what looks at its client
    )


def _listen(config: ServeConfig) -> socket.socket:
    """The listening socket, bound before anything heavy starts, so that a taken port is told at once."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise ServeConfigError(
            f"cannot listen on {config.host}:{config.port}: {error.strerror}; "
            "choose another `--port`, or 0 for a free one"
        ) from error
    listener.listen(BACKLOG)
    return listener


def _announce(gateway: Gateway, config: ServeConfig, listener: socket.socket, admin_key: str | None) -> None:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    log.info(
        "listening on http://%s:%d (%s)", shown, port, "with an admin key" if admin_key else "this machine only, no key"
    )
    log.info("base %s from %s; data in %s", " or ".join(gateway.catalog.base_names), config.base, config.data_dir)
    if gateway.plan is not None and config.engine.url is None:
        plan.say(gateway.plan)
    if config.engine.url is None:
        log.info("the engine starts; its log is %s", config.data_dir / "logs" / "engine-base.log")
