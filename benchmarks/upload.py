"""How fast a push is: the client against a real gateway over loopback, beside `cp` and `sha256sum` of the same files.

    make bench BENCH=upload                          # 1 GB in 8 files
    make bench BENCH=upload ARGS="--megabytes 4000 --rounds 1"

Hashing and sending only: no gate and no engine. Each round takes new random bytes. The server writes to the disk for
good (fsync) and hashes what comes; `cp` does neither, so `sync` of its copy is timed with it.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from loradock_adapters.connection import RETRY_WAITS_S, Connection
from loradock_adapters.sending import Sending

FILES = 8
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
}


def main() -> None:
    """Prints a table, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root, gateway(Path(root)) as url:
        rounds = [one_round(Path(root), url, options.megabytes) for _ in range(options.rounds)]
    medians = {name: statistics.median(figures[name] for figures in rounds) for name in rounds[0]}
    for name, seconds in medians.items():
        print(f"{name:<28} {seconds:8.2f} s  {options.megabytes / 1000 / seconds:6.2f} GB/s")
    ratio = medians["push"] / medians["cp, sync and sha256sum"]
    print(f"push / (cp, sync and sha256sum): {ratio:.2f}")
    print(json.dumps({"megabytes": options.megabytes, "files": FILES, "rounds": rounds, "ratio": round(ratio, 3)}))


def one_round(root: Path, url: str, megabytes: int) -> dict[str, float]:
    """Seconds of each."""
    source, copy = root / "source", root / "copy"
    source.mkdir(exist_ok=True)
    for number in range(FILES):
        with (source / f"model-{number + 1:05}-of-{FILES:05}.safetensors").open("wb") as file:
            for _ in range(megabytes // FILES):
                file.write(os.urandom(1_000_000))
    os.sync()
    seconds = {
        "push": timed(lambda: push(url, source)),
        "push again": timed(lambda: push(url, source)),
        "cp, sync and sha256sum": timed(lambda: copied_and_hashed(source, copy)),
    }
    subprocess.run(["rm", "-rf", str(copy)], check=True)
    return seconds


def push(url: str, source: Path) -> None:
    """What `loradock push` does before it publishes."""
    connection = Connection(url, None, None, RETRY_WAITS_S)
    try:
        Sending(connection, source, lambda phase, done_bytes, total_bytes: None).run()
    finally:
        connection.close()


def copied_and_hashed(source: Path, copy: Path) -> None:
    subprocess.run(["cp", "-r", str(source), str(copy)], check=True)
    subprocess.run(["sync", *map(str, copy.iterdir())], check=True)
    subprocess.run(["sha256sum", *map(str, copy.iterdir())], check=True, stdout=subprocess.DEVNULL)


def timed(work: Callable[[], None]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


@contextmanager
def gateway(root: Path) -> Iterator[str]:
    """`loradock serve` on a free port, attached to no engine; yields its address."""
    base = root / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(CONFIG))
    config = {"base": str(base), "port": 0, "data_dir": str(root / "data"), "engine": {"url": f"unix://{root}/none"}}
    (root / "serve.yaml").write_text(json.dumps(config))
    command = [sys.executable, "-m", "loradock_adapters.cli", "serve", str(root / "serve.yaml")]
    log_path = root / "gateway.log"
    with log_path.open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            deadline_s = time.monotonic() + 60
            while not (found := re.search(r"listening on (http://\S+)", log_path.read_text())):
                if process.poll() is not None or time.monotonic() > deadline_s:
                    raise SystemExit(f"`loradock serve` did not start:\n{log_path.read_text()}")
                time.sleep(0.1)
            yield found[1]
        finally:
            process.terminate()


if __name__ == "__main__":
    main()
