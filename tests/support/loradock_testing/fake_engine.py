"""A small process that speaks the engine's API, for tests of everything around an engine.

Run as the gateway runs vLLM: `python -m loradock_testing.fake_engine --uds PATH --served-model-name NAME …`. It
answers at once and always the same: the words of the prompt, each behind the name of the model, so that a test sees who
answered what. Prompts that begin with `!` make it misbehave (`_misbehave`, `_stream`). Flags it does not know it shows
under `/loradock/status`.
"""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from aiohttp import web


class FakeEngine:
    """State of the fake: loaded adapters, and what it was asked."""

    def __init__(self, flags: dict[str, str]) -> None:
        self.flags = flags
        self.base = flags["served_model_name"]
        self.adapters: dict[str, str] = {}
        self.packed: dict[str, str | None] = {}
        """Where it was told that the packed form of an adapter lies."""
        self.pinned: list[str] = []
        self.in_slots: list[str] = []
        """The least recently used first, as long as there are slots (`--max-loras`)."""
        self.counts = {"reads": 0, "activations": 0, "slot_evictions": 0, "cpu_evictions": 0}
        self.statuses = 0
        self.loads = 0
        self.requests: list[dict[str, Any]] = []
        self.probes: list[dict[str, Any]] = []
        self.aborted = 0
        self.healthy = True

    def app(self) -> web.Application:
        app = web.Application(client_max_size=64 * 1024**2)
        app.add_routes(
            [
                web.get("/health", self.health),
                web.get("/loradock/status", self.status),
                web.post("/loradock/adapters/load", self.load),
                web.post("/loradock/adapters/unload", self.unload),
                web.post("/loradock/adapters/pin", self.pin),
                web.post("/loradock/adapters/unpin", self.unpin),
                web.post("/loradock/probe", self.probe),
                web.post("/v1/completions", self.complete),
                web.post("/v1/chat/completions", self.complete),
                web.post("/v1/responses", self.complete),
                web.get("/fake/seen", self.seen),
                web.route("*", "/{anything:.*}", self.no_route),
            ]
        )
        return app

    async def health(self, _request: web.Request) -> web.Response:
        return web.Response(status=200 if self.healthy else 503)

    async def status(self, _request: web.Request) -> web.Response:
        self.statuses += 1
        slots = int(self.flags.get("max_loras", "0"))
        status: dict[str, Any] = {
            "vllm_version": "fake",
            "device": "cpu",
            "lora_wrapper": "loradock_testing.fake_engine.FakeEngine",
            "corrected": os.environ.get("FAKE_ENGINE_CORRECTED", "1") == "1",
            "registered": list(self.adapters),
            "max_loras": slots,
            "active": (self.in_slots + [None] * slots)[:slots],
            "loaded": sorted(self.adapters),
            "pinned": self.pinned,
            "counts": self.counts,
            "adapters": {name: {"activations": 1} for name in self.in_slots},
            "lora_dtype": "float32",
            "dtype": "float32",
            "max_model_len": 128,
            "flags": self.flags,
        }
        status |= {key: int(self.flags[key]) for key in ("max_loras", "max_num_seqs") if key in self.flags}
        return web.json_response(status)

    async def load(self, request: web.Request) -> web.Response:
        body = await request.json()
        if not Path(body["path"], "adapter_config.json").is_file():
            return web.json_response({"error": {"message": f"no adapter at {body['path']}"}}, status=400)
        if os.environ.get("FAKE_ENGINE_REFUSES") == "1":
            return web.json_response({"error": {"message": "rank 99 is greater than max_lora_rank 64"}}, status=400)
        self.loads += 1
        self.adapters[body["name"]] = body["path"]
        self.packed[body["name"]] = body.get("packed")
        return web.json_response({})

    async def unload(self, request: web.Request) -> web.Response:
        name = (await request.json())["name"]
        self.adapters.pop(name, None)
        for names in (self.pinned, self.in_slots):
            if name in names:
                names.remove(name)
        return web.json_response({})

    async def pin(self, request: web.Request) -> web.Response:
        name = (await request.json())["name"]
        if name not in self.adapters:
            return web.json_response({"error": {"message": f"no adapter {name!r} is loaded"}}, status=404)
        self._use_slot(name)
        self.pinned.append(name)
        return web.json_response({"name": name, "pinned": True})

    async def unpin(self, request: web.Request) -> web.Response:
        name = (await request.json())["name"]
        if name not in self.pinned:
            return web.json_response({"error": {"message": f"no adapter {name!r} is loaded"}}, status=404)
        self.pinned.remove(name)
        return web.json_response({"name": name, "pinned": False, "was_pinned": True})

    async def probe(self, request: web.Request) -> web.Response:
        """The base always says the same. A checkpoint says what its passport says, or else a little less than the base;
        `metrics: {"fake": …}` in its passport has it say what the base says, no number, or half of what it should."""
        body = await request.json()
        self.probes.append(body)
        name, prompts = body.get("name"), body["prompts"]
        if os.environ.get("FAKE_ENGINE_PROBES") == "404":
            return await self.no_route(request)
        if name is not None and name not in self.adapters:
            return web.json_response({"error": {"message": f"no adapter {name!r} is loaded"}}, status=404)
        base = [[(prompt[0] % 7 + k, -0.5 - k) for k in range(8)] for prompt in prompts]
        passport = Path(self.adapters[name] if name is not None else self.flags.get("model", "")) / "loradock.json"
        told = json.loads(passport.read_text()) if passport.is_file() else {}
        fake = told.get("metrics", {}).get("fake", os.environ.get("FAKE_ENGINE_PROBES"))
        known = {tuple(p["prompt_token_ids"]): p for p in (told.get("probe") or {}).get("prompts", ())}
        if name is None and not known:
            answers: list[list[tuple[int, float | None]]] = [list(answer) for answer in base]
        else:
            shift = 0.0 if fake == "base" else 0.25
            answers = [[(token, value - shift) for token, value in answer] for answer in base]
            for number, prompt in enumerate(prompts):
                if fake != "base" and (probe := known.get(tuple(prompt))) is not None:
                    answers[number] = [(top["id"], top["logprob"]) for top in probe["top"]]
        if fake == "half" and (name is not None or known):
            answers = [[(token, (value or 0.0) * 2) for token, value in answer] for answer in answers]
        if fake == "nan" and (name is not None or self.base != "base"):
            answers = [[(token, None) for token, _ in answer] for answer in answers]
        return web.json_response({"answers": answers})

    def _use_slot(self, name: str) -> None:
        if name in self.in_slots:
            self.in_slots.remove(name)
        else:
            self.counts["activations"] += 1
        self.in_slots.append(name)
        if len(self.in_slots) > int(self.flags.get("max_loras", "0")):
            self.in_slots.remove(next(one for one in self.in_slots if one not in self.pinned))
            self.counts["slot_evictions"] += 1

    async def seen(self, _request: web.Request) -> web.Response:
        return web.json_response(
            {
                "requests": self.requests,
                "aborted": self.aborted,
                "adapters": self.adapters,
                "packed": self.packed,
                "pinned": self.pinned,
                "statuses": self.statuses,
                "loads": self.loads,
                "probes": self.probes,
            }
        )

    async def no_route(self, _request: web.Request) -> web.Response:
        return _json({"error": {"message": "Not Found", "type": "Not Found", "param": None, "code": 404}}, 404)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append({"path": request.path, "headers": dict(request.headers), "body": body})
        model = body.get("model")
        if model != self.base and model not in self.adapters:
            error = {"message": f"The model `{model}` does not exist.", "type": "NotFoundError", "param": "model"}
            return web.json_response({"error": error | {"code": 404}}, status=404)
        if model != self.base:
            self._use_slot(model)
        prompt = _prompt(body)
        if prompt.startswith("!") and (answer := await self._misbehave(prompt, request)) is not None:
            return answer
        words = [f"{model}:{word}" for word in prompt.split()]
        usage = {"prompt_tokens": len(words), "completion_tokens": len(words), "total_tokens": 2 * len(words)}
        if request.path == "/v1/responses":
            return _json({"object": "response", "model": model, "output": " ".join(words), "usage": usage})
        if body.get("stream"):
            return await self._stream(request, body, words, usage)
        chat = "chat" in request.path
        text = " ".join(words)
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        return _json({"id": "cmpl-1", "object": "x", "model": model, "choices": [choice], "usage": usage})

    async def _stream(
        self, request: web.Request, body: dict[str, Any], words: list[str], usage: dict[str, int]
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        try:
            for word in words:
                await response.write(_event(_chunk(body["model"], word)))
                if word.endswith(":!die"):
                    os._exit(9)
                if word.endswith(":!error"):
                    await response.write(
                        _event({"error": {"message": "boom", "type": "InternalServerError", "code": 500}})
                    )
                    await response.write(b"data: [DONE]\n\n")
                    return response
                if word.endswith(":!hang"):
                    await asyncio.sleep(3600)
                if word.endswith(":!cut"):
                    return response
        except (asyncio.CancelledError, ConnectionResetError):
            self.aborted += 1
            raise
        if (body.get("stream_options") or {}).get("include_usage"):
            await response.write(_event({"id": "cmpl-1", "model": body["model"], "choices": [], "usage": usage}))
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _misbehave(self, prompt: str, request: web.Request) -> web.StreamResponse | None:
        """Before the first byte: `!exit` ends the process, `!500`, `!404`, `!400`, `!sick` fail, `!wait` hangs."""
        match prompt.split()[0]:
            case "!exit":
                os._exit(9)
            case "!500":
                return _json({"error": {"message": f"broke on {self.base}", "type": "X", "code": 500}}, 500)
            case "!404":
                return _json({"error": {"message": "no response with this id", "type": "X", "code": 404}}, 404)
            case "!400":
                return _json({"error": {"message": "max_tokens must be at least 1", "type": "X", "code": 400}}, 400)
            case "!sick":
                self.healthy = False
                return _json({"error": {"message": "EngineCore died", "type": "X", "code": 500}}, 500)
            case "!wait":
                try:
                    await asyncio.sleep(3600)
                except asyncio.CancelledError:
                    self.aborted += 1
                    raise
        return None


def _prompt(body: dict[str, Any]) -> str:
    if "messages" in body:
        return str(body["messages"][-1]["content"])
    return str(body.get("prompt", body.get("input", "")))


def _chunk(model: str, word: str) -> dict[str, Any]:
    return {"id": "cmpl-1", "model": model, "choices": [{"index": 0, "text": word + " ", "delta": {"content": word}}]}


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


def _json(data: dict[str, Any], status: int = 200) -> web.Response:
    body = json.dumps(data, separators=(",", ":")).encode()
    return web.Response(body=body, status=status, content_type="application/json")


def read_flags(words: list[str]) -> dict[str, str]:
    """`--max-loras 4 --enforce-eager` as `{"max_loras": "4", "enforce_eager": ""}`."""
    flags: dict[str, str] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name = word[2:].replace("-", "_")
            flags[name] = ""
        else:
            flags[name] = word
    return flags


def main() -> None:
    """Serve on `--uds` until SIGTERM."""
    flags = read_flags(sys.argv[1:])
    if "fail-to-start" in flags.get("model", ""):
        sys.exit("fake engine: this model does not load")
    engine = FakeEngine(flags)
    web.run_app(engine.app(), path=flags["uds"], print=None, handler_cancellation=True)


if __name__ == "__main__":
    main()
