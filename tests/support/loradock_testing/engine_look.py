"""What a running server's base engine says of itself, asked past the gateway."""

import re
from typing import Any

import httpx

from loradock_testing.loradock_server import LoradockServer, engine_socket


class EngineLook:
    """Its status and its metrics at one moment."""

    def __init__(self, server: LoradockServer) -> None:
        transport = httpx.HTTPTransport(uds=str(engine_socket(server)))
        with httpx.Client(transport=transport, base_url="http://engine", timeout=60) as client:
            self.status: dict[str, Any] = client.get("/loradock/status").raise_for_status().json()
            self._metrics = client.get("/metrics").raise_for_status().text

    def metric(self, name: str) -> float:
        """The sum of a metric's values; it must be there."""
        values = re.findall(rf"^vllm:{name}(?:{{.*}})? (\S+)$", self._metrics, re.MULTILINE)
        assert values, f"the engine has no metric {name}"
        return sum(map(float, values))
