"""`/v1/adapters/{name}/…`: promoting, rolling back, tagging, splitting traffic, removing versions and names.

The HTTP side only: what a move does is decided in `pointers.py`.
"""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from loradock_serve.adapters_routes import summary
from loradock_serve.catalog import Catalog, split_json
from loradock_serve.errors import BadRequestError
from loradock_serve.json_body import json_object
from loradock_serve.pointers import Moved, Pointers
from loradock_serve.states import States

MAX_NUMBER = 10**9
"""No version has it, or one beyond; databases have limits of their own."""


def pointers_router(catalog: Catalog, pointers: Pointers, states: States) -> APIRouter:
    """The routes, bound to their parts."""
    router = APIRouter(prefix="/v1/adapters")

    def moved_json(moved: Moved) -> dict[str, Any]:
        version = catalog.fit(moved.version)
        before = {"previous_version": moved.before, "ended_split": split_json(moved.ended_split)}
        return summary(version, states.of(version)) | before

    @router.post("/{name}/promote")
    async def promote(name: str, request: Request) -> Response:
        pin = _pin(await json_object(request))
        if pin is None:
            raise BadRequestError('Say which version, a number, a tag or a digest: {"version": 2}', param="version")
        return JSONResponse(moved_json(await pointers.promote(name, pin)))

    @router.post("/{name}/rollback")
    async def roll_back(name: str, request: Request) -> Response:
        number = (await json_object(request, may_be_missing=True)).get("version")
        if number is not None and not (_is_number(number) and abs(number) < MAX_NUMBER):
            raise BadRequestError('Say which version: {"version": 2}, or nothing for the one before', param="version")
        return JSONResponse(moved_json(await pointers.roll_back(name, number)))

    @router.put("/{name}/tags/{tag}")
    async def tag(name: str, tag: str, request: Request) -> Response:
        moved = await pointers.tag(name, tag, _pin(await json_object(request, may_be_missing=True)))
        about = {"version": moved.version.number, "digest": moved.version.digest, "previous_version": moved.before}
        return JSONResponse({"name": name, "tag": tag} | about)

    @router.delete("/{name}/tags/{tag}")
    async def untag(name: str, tag: str) -> Response:
        return JSONResponse({"name": name, "tag": tag, "deleted": await pointers.untag(name, tag)})

    @router.put("/{name}/split")
    async def split(name: str, request: Request) -> Response:
        weights = _weights(await json_object(request))
        before = await pointers.split(name, weights)
        return JSONResponse({"name": name, "split": split_json(weights), "previous_split": split_json(before)})

    @router.delete("/{name}/split")
    async def end_split(name: str) -> Response:
        moved = await pointers.end_split(name)
        about = {"previous_split": split_json(moved.ended_split), "current_version": moved.version.number}
        return JSONResponse({"name": name, "split": None} | about)

    @router.delete("/{name}/versions/{version}")
    async def remove_version(name: str, version: str) -> Response:
        removed = await pointers.remove_version(name, version)
        return JSONResponse({"name": name, "version": removed.number, "digest": removed.digest, "deleted": True})

    @router.delete("/{name}")
    async def remove(name: str) -> Response:
        removed = await pointers.remove(name)
        return JSONResponse({"name": name, "versions": len(removed), "deleted": True})

    return router


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _pin(document: dict[str, Any]) -> str | None:
    """`version` as it would stand behind the `@`; None where the document says nothing of it."""
    version = document.get("version")
    if version is None:
        return None
    if not _is_number(version) and not isinstance(version, str):
        raise BadRequestError("`version` is a number, a tag or a digest", param="version")
    return str(version)


def _weights(document: dict[str, Any]) -> dict[int, int]:
    """`split` of a request's body, from strings in JSON to numbers."""
    split = document.get("split")
    if not isinstance(split, dict) or not all(_is_number(weight) for weight in split.values()):
        raise BadRequestError('Say how to split: {"split": {"3": 90, "4": 10}}, whole numbers', param="split")
    numbers = {number: weight for number, weight in split.items() if _is_version_number(number)}
    if len(numbers) != len(split):
        raise BadRequestError("`split` names versions by their numbers", param="split")
    return {int(number): weight for number, weight in numbers.items()}


def _is_version_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10 and not text.startswith("0")
