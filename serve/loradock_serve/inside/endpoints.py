"""Our private routes on the engine's Unix socket (entry point group `vllm.endpoint_plugins`).

    GET  /loradock/status              what the engine is, which LoRA wrapper its workers use, what lies in the slots
    POST /loradock/adapters/load       {"name", "path", "packed"?}: from now on the OpenAI routes serve `"model": name`
    POST /loradock/adapters/unload     {"name"}: forget the name, and free the weights
    POST /loradock/adapters/pin        {"name"}: into a slot, and it stays there (`slot_pins.py`)
    POST /loradock/adapters/unpin      {"name"}: it may leave its slot again
    POST /loradock/probe               {"name"?, "prompts"}: what the base, or an adapter, says next (`probe.py`)

vLLM's own `/v1/load_lora_adapter` reads the adapter in the engine's loop, evicts the oldest slot for it even where
requests run there, answers a refused one with 500, and accepts Hub ids, which it then downloads inside that loop; its
unload route keeps the weights. Ours has every worker read the adapter on a thread (staging.py) and then only tells the
API server its name: a slot is taken when the first request is scheduled. These routes know nothing of versions, tenants
or who is still using an adapter: whoever unloads makes sure that nobody is (vLLM would read it from disk again).
Private touches: `OpenAIServingModels` (`unload_lora_adapter`, `lora_requests`, `lora_id_counter`, `is_base_model`) and
`AsyncLLM` (`add_lora`, `remove_lora`, `collective_rpc`, `vllm_config`, `errored`).
"""

import asyncio
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from loradock_serve.inside.probe import Ranked, probe, top_of
from loradock_serve.inside.stage_watch import StageFailedError, StageWatch
from loradock_serve.inside.worker import is_corrected
from loradock_serve.turns import Turns


class LoadRequest(BaseModel):
    """An adapter in PEFT layout in a local directory."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=256)
    path: str = Field(min_length=1)
    packed: str | None = None
    """A directory with the same adapter in the form that is read fastest (packing.py)."""


class UnloadRequest(BaseModel):
    """An adapter loaded before."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=256)


class PinRequest(BaseModel):
    """An adapter loaded before, to be pinned or unpinned."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=256)


class ProbeRequest(BaseModel):
    """Prompts for the base, or for an adapter loaded before."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = Field(default=None, min_length=1, max_length=256)
    prompts: list[list[int]] = Field(min_length=1, max_length=32)


class DeskError(Exception):
    """A request that cannot be granted; `status` is the HTTP status, `kind` the error's type."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


class AdapterDesk:
    """Loads and unloads adapters of one engine: in turn for each name, and side by side for different ones."""

    def __init__(self, engine: Any, models: Any) -> None:
        self._engine = engine
        self._models = models
        self._turns = Turns()
        self._stages = StageWatch(engine)

    async def load(self, name: str, path: str, packed: str | None = None) -> bool:
        """Serve the adapter under the name; False if it was served already.

        Raises:
            DeskError: The path is no adapter, the name is taken, or the engine refused it.
        """
        from vllm.lora.request import LoRARequest

        directory = Path(path)
        async with self._turns.of(name):
            self._require_lora()
            known = self._models.lora_requests.get(name)
            if known is not None:
                if known.lora_path == path:
                    return False
                raise DeskError(409, "name_taken", f"adapter {name!r} is loaded from {known.lora_path!r}, not {path!r}")
            if self._models.is_base_model(name):
                raise DeskError(409, "name_taken", f"{name!r} is the name of the base model")
            if not directory.is_absolute() or not await asyncio.to_thread((directory / "adapter_config.json").is_file):
                raise DeskError(400, "no_adapter", f"{path!r} is no absolute directory with an adapter_config.json")
            adapter = LoRARequest(name, self._models.lora_id_counter.inc(1), path)
            await self._stage(adapter, packed)
            self._models.lora_requests[name] = adapter
            return True

    async def _stage(self, adapter: Any, packed: str | None) -> None:
        """Have the workers read an adapter; none keeps anything of it where one refuses it, or nobody waits for it."""
        staged = False
        try:
            await self._stages.stage(adapter, packed)
            staged = True
        except StageFailedError as error:
            message = f"the engine refused adapter {adapter.lora_name!r}: {error}"
            raise DeskError(422, "adapter_refused", message) from error
        finally:
            self._require_alive()
            if not staged:
                await self._engine.collective_rpc("loradock_unstage", args=(adapter.lora_int_id,))
                await self._engine.remove_lora(adapter.lora_int_id)  # vLLM keeps a slot for what failed on its way in

    async def unload(self, name: str) -> bool:
        """Forget the name and free the weights; whether the engine still had the weights.

        Raises:
            DeskError: No adapter has this name.
        """
        from vllm.entrypoints.serve.lora.protocol import UnloadLoRAAdapterRequest

        async with self._turns.of(name):
            known = self._known(name)
            await self._models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name=name))
            staged = await self._engine.collective_rpc("loradock_unstage", args=(known.lora_int_id,))
            return bool(await self._engine.remove_lora(known.lora_int_id)) or any(staged)

    async def pin(self, name: str) -> None:
        """Put the adapter into a slot and keep it there. Pinning it twice is pinning it once.

        Whoever pins sees to it that the requests in flight leave a slot for it; if they do not, it waits its turn.

        Raises:
            DeskError: No adapter has this name, or all slots but one are pinned.
        """
        async with self._turns.of(name):
            known = self._known(name)
            await self._engine.add_lora(known)  # reads it again where it had to leave host memory
            answers = await self._engine.collective_rpc("loradock_pin", args=(known.lora_int_id,))
            self._require_alive()
            if "full" in answers:
                slots = self._engine.vllm_config.lora_config.max_loras
                raise DeskError(409, "pins_full", f"{slots - 1} of the {slots} slots may be pinned, and are already")
            if "absent" in answers:
                raise DeskError(409, "not_in_memory", f"adapter {name!r} left host memory before it could be pinned")

    async def unpin(self, name: str) -> bool:
        """Let the adapter leave its slot again when another needs it; whether it was pinned.

        Raises:
            DeskError: No adapter has this name.
        """
        async with self._turns.of(name):
            known = self._known(name)
            return all(await self._engine.collective_rpc("loradock_unpin", args=(known.lora_int_id,)))

    async def probe(self, name: str | None, prompts: list[list[int]]) -> list[Ranked]:
        """The likeliest next tokens of each prompt, by an adapter, or by the base where there is no name.

        Raises:
            DeskError: No adapter has this name, the model does not generate, or a prompt is none for it.
        """
        self._require_alive()
        adapter = None if name is None else self._known(name)
        config = self._engine.vllm_config.model_config
        if config.runner_type != "generate" or not config.logprobs_mode.endswith("_logprobs"):
            message = f"a model that does {config.runner_type}, with --logprobs-mode {config.logprobs_mode}"
            raise DeskError(409, "cannot_probe", f"{message}, has no log-probabilities to tell")
        try:
            return await probe(self._engine, adapter, prompts)
        except ValueError as error:
            raise DeskError(400, "bad_prompt", str(error)) from error
        finally:
            self._require_alive()

    def _known(self, name: str) -> Any:
        self._require_lora()
        known = self._models.lora_requests.get(name)
        if known is None:
            raise DeskError(404, "unknown_adapter", f"no adapter {name!r} is loaded")
        return known

    async def status(self) -> dict[str, Any]:
        """The document of `GET /loradock/status`."""
        import vllm

        self._require_alive()
        config = self._engine.vllm_config
        lora = config.lora_config
        # An engine without LoRA need not have our worker extension: there is nothing to ask.
        workers = await self._engine.collective_rpc("loradock_status") if lora else []
        names = {request.lora_int_id: name for name, request in self._models.lora_requests.items()}
        wrappers = sorted({wrapper for worker in workers for wrapper in worker["wrappers"]})
        return {
            "vllm_version": vllm.__version__,
            "device": str(config.device_config.device),
            "lora_wrapper": ", ".join(wrappers) or None,
            "corrected": all(is_corrected(worker) for worker in workers),
            "max_loras": lora.max_loras if lora else 0,
            "max_cpu_loras": lora.max_cpu_loras if lora else 0,
            "max_lora_rank": lora.max_lora_rank if lora else 0,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "max_model_len": config.model_config.max_model_len,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "quantised": config.model_config.quantization is not None,
            "top_logprobs": top_of(self._engine),
            "lora_dtype": str(lora.lora_dtype).removeprefix("torch.") if lora else None,
            "registered": sorted(self._models.lora_requests),
            "active": [_name(names, adapter_id) for worker in workers[:1] for adapter_id in worker["active"]],
            "loaded": [_name(names, adapter_id) for worker in workers[:1] for adapter_id in worker["loaded"]],
            "staged": [_name(names, adapter_id) for worker in workers[:1] for adapter_id in worker["staged"]],
        } | _residency(names, workers)

    def _require_lora(self) -> None:
        self._require_alive()
        if self._engine.vllm_config.lora_config is None:
            raise DeskError(409, "lora_disabled", "this engine runs without --enable-lora")

    def _require_alive(self) -> None:
        if self._engine.errored:
            raise DeskError(503, "engine_dead", "the engine core has died")


def _residency(names: Mapping[int, str], workers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Pins and counts, which are the same in every worker; slots are as large as the largest worker's."""
    if not workers:
        return {"pinned": [], "counts": {}, "adapters": {}, "slot_bytes": 0}
    first = workers[0]
    return {
        "pinned": [_name(names, adapter_id) for adapter_id in first["pinned"]],
        "counts": first["counts"],
        "adapters": {names[number]: count for number, count in first["adapters"].items() if number in names},
        "slot_bytes": max(worker["slot_bytes"] for worker in workers),
    }


def _name(names: Mapping[int, str], adapter_id: int | None) -> str | None:
    """An adapter without a name was unloaded while requests still ran on it, and was read again for them."""
    return None if adapter_id is None else names.get(adapter_id, f"unnamed:{adapter_id}")


class LoradockEndpoints:
    """The plug-in as vLLM sees it."""

    name = "loradock_endpoints"
    required_tasks = ("generate", "embed", "classify", "token_embed", "token_classify")

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes."""

        async def status(request: Request) -> JSONResponse:
            return JSONResponse(await _desk(request).status())

        async def load(body: LoadRequest, request: Request) -> JSONResponse:
            created = await _desk(request).load(body.name, body.path, body.packed)
            return JSONResponse({"name": body.name, "path": body.path, "created": created})

        async def unload(body: UnloadRequest, request: Request) -> JSONResponse:
            freed = await _desk(request).unload(body.name)
            return JSONResponse({"name": body.name, "freed": freed})

        async def pin(body: PinRequest, request: Request) -> JSONResponse:
            await _desk(request).pin(body.name)
            return JSONResponse({"name": body.name, "pinned": True})

        async def unpin(body: PinRequest, request: Request) -> JSONResponse:
            was_pinned = await _desk(request).unpin(body.name)
            return JSONResponse({"name": body.name, "pinned": False, "was_pinned": was_pinned})

        async def ask(body: ProbeRequest, request: Request) -> JSONResponse:
            return JSONResponse({"answers": await _desk(request).probe(body.name, body.prompts)})

        async def refuse(request: Request, error: Exception) -> JSONResponse:
            assert isinstance(error, DeskError)
            body = {"message": str(error), "type": error.kind, "param": None, "code": error.status}
            return JSONResponse({"error": body}, status_code=error.status)

        app.add_exception_handler(DeskError, refuse)
        app.add_api_route("/loradock/status", status, methods=["GET"])
        app.add_api_route("/loradock/adapters/load", load, methods=["POST"])
        app.add_api_route("/loradock/adapters/unload", unload, methods=["POST"])
        app.add_api_route("/loradock/adapters/pin", pin, methods=["POST"])
        app.add_api_route("/loradock/adapters/unpin", unpin, methods=["POST"])
        app.add_api_route("/loradock/probe", ask, methods=["POST"])

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Keep the engine and its registry of models; called once the OpenAI server stands."""
        state.loradock_desk = AdapterDesk(engine_client, state.openai_serving_models)


def _desk(request: Request) -> AdapterDesk:
    desk: AdapterDesk = request.app.state.loradock_desk
    return desk
