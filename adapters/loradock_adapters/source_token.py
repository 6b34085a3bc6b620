"""Which token a push sends along for its source: one that was named, or the Hub's own variable where that is safe.

A token goes to the Loradock server, which shows it to the Hub and forgets it. Who names a variable means it to be sent.
HF_TOKEN is taken by itself only over a connection that nobody else can read. Knows nothing of requests.
"""

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

from loradock_adapters.errors import UsageError
from loradock_adapters.source_ref import HUB

HUB_TOKEN = "HF_TOKEN"


def token_for(source: str, server: str, token_env: str | None, environment: Mapping[str, str]) -> str | None:
    """The token to send with a push of `source` to `server`; UsageError where the variable that was named is empty."""
    if token_env is not None:
        token = environment.get(token_env, "").strip()
        if not token:
            raise UsageError(f"--token-env {token_env}: there is no such variable in the environment, or it is empty")
        return token
    if not source.startswith(f"{HUB}://") or not _is_private(server):
        return None
    return environment.get(HUB_TOKEN, "").strip() or None


def _is_private(server: str) -> bool:
    """Whether what is sent there can be read by nobody on the way."""
    try:
        url = urlsplit(server)
        if url.scheme == "https" or url.hostname == "localhost":
            return True
        return url.hostname is not None and ipaddress.ip_address(url.hostname).is_loopback
    except ValueError:
        return False
