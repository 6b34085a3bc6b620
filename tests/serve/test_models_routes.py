"""`/v1/models` in OpenAI's shapes."""

from pathlib import Path

import pytest

from loradock_testing.gateway import Served
from loradock_testing.tiny_checkpoints import write_adapter

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_base_comes_first_with_its_alias(shared: Served) -> None:
    listed = (await shared.client.get("/v1/models")).json()
    card = listed["data"][0]
    assert listed["object"] == "list"
    assert (card["id"], card["object"], card["owned_by"]) == ("tiny-base", "model", "loradock")
    assert card["loradock"] == {
        "kind": "base",
        "placement": "shared",
        "version": None,
        "digest": None,
        "state": "ready",
        "aliases": ["base"],
    }
    assert (await shared.client.get("/v1/models/base")).json() == card | {"id": "base"}


async def test_adapter_is_shown_by_name_version_and_digest(shared: Served, tmp_path: Path) -> None:
    digest = (await shared.push(write_adapter(tmp_path / "a", seed=1), "shown")).json()["digest"]
    about = {"kind": "lora", "placement": "shared", "version": 1, "digest": digest, "state": "loaded"}
    about["source"] = None  # an upload
    for name in ("shown", "shown@1", f"shown@{digest}"):
        card = (await shared.client.get(f"/v1/models/{name}")).json()
        assert (card["id"], card["loradock"]) == (name, about)
    assert "shown" in [card["id"] for card in (await shared.client.get("/v1/models")).json()["data"]]


async def test_deleted_model_is_gone(shared: Served, tmp_path: Path) -> None:
    await shared.push(write_adapter(tmp_path / "a", seed=2), "brief")
    answer = await shared.client.delete("/v1/models/brief")
    assert answer.json() == {"id": "brief", "object": "model", "deleted": True}
    gone = await shared.client.get("/v1/models/brief")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("model", "status", "message"),
    [
        ("tiny-base", 409, "'tiny-base' is the base of this server and cannot be deleted"),
        ("pinned@1", 409, "Name the model itself ('pinned') to delete it with all its versions"),
        ("pined", 404, "The model 'pined' does not exist. Near names: pinned."),
        ("org%2Fmodel", 404, "The model 'org/model' does not exist."),
    ],
)
async def test_what_cannot_be_deleted_says_why(
    shared: Served, tmp_path: Path, model: str, status: int, message: str
) -> None:
    await shared.push(write_adapter(tmp_path / "a", seed=3), "pinned")
    answer = await shared.client.delete(f"/v1/models/{model}")
    assert answer.status_code == status
    assert answer.json()["error"]["message"].startswith(message)
