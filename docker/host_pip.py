"""Carries this machine's pip settings into an image's build.

    python docker/host_pip.py PIP_CONF

Writes one pip.conf of all that pip is told here, by its files and its environment, and prints the `-v` arguments for
the local files and folders that the settings name. It knows nothing of the values themselves: where they come from is
this machine's business.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

# What bears on where packages come from; the rest (a cache folder, a timeout) stays here.
CARRIED = ("cert", "client_cert", "extra_index_url", "find_links", "index_url", "proxy", "trusted_host")
CERTIFICATE = "/run/host-pip/cert.pem"


def settings() -> dict[str, str]:
    """pip's settings by name; the environment goes over the files, as it does in pip."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, str] = {}
    for line in sorted(listing.splitlines(), key=lambda line: line.startswith(":env:")):
        key, _, value = line.partition("=")
        name = key.rpartition(".")[2].replace("-", "_")
        if name in CARRIED:
            found[name] = str(ast.literal_eval(value))
    return found


def local_folder(word: str) -> Path | None:
    """The folder to mount for a path or a file: URL; its parent for an index, whose pages link to files beside it."""
    parts = urlsplit(word)
    if parts.scheme == "file":
        folder = Path(unquote(parts.path)).parent
        return folder if folder.is_dir() else None
    path = Path(word)
    return path if path.is_absolute() and path.is_dir() else None


def main() -> int:
    values = settings()
    mounts: dict[str, str] = {}
    for name in ("cert", "client_cert"):
        if name in values and Path(values[name]).is_file():
            mounts[CERTIFICATE if name == "cert" else f"{CERTIFICATE}.client"] = values[name]
            values[name] = CERTIFICATE if name == "cert" else f"{CERTIFICATE}.client"
    for name in ("extra_index_url", "find_links", "index_url"):
        for word in values.get(name, "").split():
            folder = local_folder(word)
            if folder is not None:
                mounts[str(folder)] = str(folder)
    lines = ["[global]", *(f"{name.replace('_', '-')} = {' '.join(value.split())}" for name, value in values.items())]
    Path(sys.argv[1]).write_text("\n".join(lines) + "\n", encoding="utf-8")
    for target, source in mounts.items():
        sys.stdout.write(f"-v\n{source}:{target}:ro\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
