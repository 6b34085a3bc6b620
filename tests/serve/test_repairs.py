"""A repaired upload on its way to a version: what is served, what is said, what stays in the store."""

import json
from pathlib import Path

from safetensors.numpy import load_file, save_file

from loradock_adapters.manifest import manifest_of
from loradock_testing.gateway import Served
from loradock_testing.tiny_checkpoints import write_adapter

WEIGHTS = "adapter_model.safetensors"


def drifted(directory: Path, seed: int = 0, prefix: str = "module.") -> Path:
    write_adapter(directory, seed)
    tensors = load_file(directory / WEIGHTS)
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, directory / WEIGHTS)
    return directory


async def test_repaired_upload_is_a_version_of_its_own_digest_that_says_what_was_repaired(
    served: Served, tmp_path: Path
) -> None:
    await served.until_ready()
    upload = drifted(tmp_path / "a")
    uploaded = manifest_of(upload).digest
    answer = await served.push(upload, "mended")
    assert answer.status_code == 201
    body = answer.json()
    assert [repair["code"] for repair in body["repairs"]] == ["tensors_renamed", "uploaded_as"]
    assert body["repairs"][0]["where"].startswith("module.base_model.model.")
    assert body["repairs"][1]["where"] == uploaded
    assert (body["placement"], body["state"]) == ("shared", "ready")
    assert body["digest"] != uploaded
    assert not served.version_dir(uploaded).exists()
    names = load_file(served.version_dir(body["digest"]) / WEIGHTS).keys()
    assert all(name.startswith("base_model.model.model.layers.") for name in names)
    shown = (await served.client.get("/v1/adapters/mended")).json()
    assert shown["repairs"] == body["repairs"]
    assert await served.text("mended", "x") == f"{body['digest']}:x"


async def test_same_upload_again_is_no_new_version(served: Served, tmp_path: Path) -> None:
    upload = drifted(tmp_path / "a")
    first = (await served.push(upload, "again")).json()
    second = await served.push(upload, "again")
    assert (second.status_code, second.json()["created"]) == (200, False)
    assert (second.json()["version"], second.json()["digest"]) == (1, first["digest"])
    assert second.json()["repairs"] == first["repairs"]
    right = write_adapter(tmp_path / "right")
    assert (await served.push(right, "again")).json()["repairs"] == []


async def test_upload_that_is_repaired_and_refused_leaves_nothing(served: Served, tmp_path: Path) -> None:
    upload = drifted(tmp_path / "a")
    path = upload / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"alora_invocation_tokens": [1]}))
    answer = await served.push(upload, "refused")
    assert answer.status_code == 422
    assert answer.json()["error"]["problems"][0]["code"] == "alora"
    assert list((served.data_dir / "versions").iterdir()) == []
    assert [path for path in (served.data_dir / "blobs").rglob("*") if path.is_file()] == []


async def test_initial_adapter_beside_the_upload_is_subtracted(served: Served, tmp_path: Path) -> None:
    upload = write_adapter(tmp_path / "a", init_lora_weights="pissa")
    refused = await served.push(upload, "pissa")
    problem = refused.json()["error"]["problems"][0]
    assert (problem["code"], "initial_adapter" in problem["fix"]) == ("init_changes_base", True)
    write_adapter(upload / "initial_adapter", seed=1)
    body = (await served.push(upload, "pissa")).json()
    assert [repair["code"] for repair in body["repairs"]] == ["initial_adapter_subtracted", "uploaded_as"]
    assert (await served.client.get("/v1/adapters/pissa")).json()["rank"] == 8
