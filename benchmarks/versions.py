"""What many versions cost: resolving a name, listing, `/metrics`, and the gateway's start, with none and with 1,000.

    make bench BENCH=versions
    make bench BENCH=versions ARGS="--count 10000"

Two registries beside an empty one: a name for each version, and one name with all of them. The gateway is built and
asked in this process, without its engine; rows have the gate's reasons and manifests of four files, as real ones. "new"
is the first look-up of a reference after a change, "known" every later one.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from loradock_adapters.gate import Verdict
from loradock_adapters.manifest import FileEntry, Manifest
from loradock_adapters.problems import Problem
from loradock_adapters.registry import Details, Registry
from loradock_serve.app import Gateway, build_gateway
from loradock_serve.config import ServeConfig

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 512,
}
SHAPES = ("none", "names", "one name")
FILES = ("adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "loradock.json")
ADMIN_KEY = "benchmark"
NO_ENGINE = "http://127.0.0.1:9"
"""Of an attached engine, which nobody connects to here."""


def main() -> None:
    """Prints a table, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as root:
        for shape in SHAPES:
            directory = Path(root, shape.replace(" ", "-"))
            fill(directory, shape, options.count)
            results[shape] = asyncio.run(measure(directory, shape, options.count, options.rounds))
    print(f"{'milliseconds, medians':<28}" + "".join(f"{shape:>12}" for shape in SHAPES))
    for name in results["names"]:
        cells = [results[shape].get(name) for shape in SHAPES]
        print(f"{name:<28}" + "".join(f"{'' if cell is None else f'{cell:.3f}':>12}" for cell in cells))
    growth_s = max(results[shape]["start"] - results["none"]["start"] for shape in SHAPES) / 1000
    print(f"start-up grows by {growth_s:.3f} s")
    print(json.dumps({"count": options.count, "milliseconds": results, "start_growth_s": round(growth_s, 4)}))


def fill(directory: Path, shape: str, count: int) -> None:
    """A base, and a data directory with its registry."""
    (directory / "base").mkdir(parents=True)
    (directory / "base" / "config.json").write_text(json.dumps(CONFIG))
    (directory / "data").mkdir()
    registry = Registry(f"sqlite:///{directory / 'data' / 'registry.sqlite'}")
    remark = Problem("base_name", "trained on org/other-name, served is base", "adapter_config.json", "check it")
    verdict = Verdict("lora", "shared", (remark,), 16)
    for number in range(count if shape != "none" else 0):
        manifest = Manifest(tuple(FileEntry(path, 1000, f"{number:060x}{i:04x}") for i, path in enumerate(FILES)))
        name = "one" if shape == "one name" else f"customer-{number:05}"
        registry.publish(name, manifest, verdict, Details("{{ messages }}", (2,), proof={"state": "proven"}))
        if number % 10 == 0:
            registry.tags.set(name, f"tag-{number}", registry.resolve(name).number)
    registry.close()


async def measure(directory: Path, shape: str, count: int, rounds: int) -> dict[str, float]:
    """Milliseconds of each."""
    about = {"base": str(directory / "base"), "data_dir": str(directory / "data"), "engine": {"url": NO_ENGINE}}
    config = ServeConfig.model_validate(about)
    starts = []
    for _ in range(rounds):
        began = time.perf_counter()
        gateway = build_gateway(config, ADMIN_KEY)
        starts.append(1000 * (time.perf_counter() - began))
        await gateway.fleet.stop()
        if len(starts) < rounds:
            gateway.registry.close()
    found = {"start": statistics.median(starts)}
    if shape != "none":
        found |= resolving(gateway, shape, count)
    return found | await asking(gateway, shape, count, rounds)


def resolving(gateway: Gateway, shape: str, count: int) -> dict[str, float]:
    """Each reference twice."""
    catalog = gateway.catalog
    if shape == "one name":
        refs = ["one", *(f"one@{number}" for number in range(1, count)), *(f"one@tag-{n}" for n in range(0, count, 10))]
    else:
        refs = [f"customer-{number:05}" for number in range(count)]
    catalog.changed()
    new = [milliseconds(lambda ref=ref: catalog.resolve(ref)) for ref in refs]  # type: ignore[misc]
    known = [milliseconds(lambda ref=ref: catalog.resolve(ref)) for ref in refs]  # type: ignore[misc]
    return {"resolve, new": statistics.median(new), "resolve, known": statistics.median(known)}


async def asking(gateway: Gateway, shape: str, count: int, rounds: int) -> dict[str, float]:
    """What people and scrapers ask, over ASGI."""
    paths = {"GET /v1/adapters (ls)": "/v1/adapters", "GET /v1/models": "/v1/models", "GET /metrics": "/metrics"}
    if shape != "none":
        name = "one" if shape == "one name" else f"customer-{count - 1:05}"
        paths["GET /v1/adapters/NAME"] = f"/v1/adapters/{name}"
    headers = {"authorization": f"Bearer {ADMIN_KEY}"}
    found = {}
    transport = httpx.ASGITransport(gateway.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers) as client:
        for what, path in paths.items():
            times = []
            for _ in range(rounds):
                began = time.perf_counter()
                (await client.get(path)).raise_for_status()
                times.append(1000 * (time.perf_counter() - began))
            found[what] = statistics.median(times)
    return found


def milliseconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - began)


if __name__ == "__main__":
    main()
