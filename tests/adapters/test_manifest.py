"""Manifests: identity, what a directory contributes, and what strangers send."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loradock_adapters.errors import ManifestError, NotFoundError
from loradock_adapters.filetypes import is_safe_path, role_of
from loradock_adapters.manifest import MAX_FILES, FileEntry, Manifest, manifest_of, scan
from loradock_testing.checkpoints import write_adapter

SHA = "ab" * 32


def entry(path: object = "a.json", size_bytes: object = 1, sha256: object = SHA, **more: object) -> dict[str, object]:
    return {"path": path, "size_bytes": size_bytes, "sha256": sha256, **more}


def codes_of(document: object) -> list[str]:
    with pytest.raises(ManifestError) as caught:
        Manifest.from_json(document)
    return [problem.code for problem in caught.value.problems]


def test_digest_is_sha256_of_the_canonical_json() -> None:
    manifest = Manifest((FileEntry("b.json", 2, SHA), FileEntry("a.json", 1, SHA)))
    canonical = (
        f'{{"files":[{{"path":"a.json","sha256":"{SHA}","size_bytes":1}},'
        f'{{"path":"b.json","sha256":"{SHA}","size_bytes":2}}]}}'
    )
    assert manifest.digest == "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


def test_digest_order_of_files_does_not_matter() -> None:
    a, b = FileEntry("a.json", 1, "aa" * 32), FileEntry("b.json", 1, "bb" * 32)
    assert Manifest((a, b)).digest == Manifest((b, a)).digest
    assert Manifest((a, b)).files == (a, b)


@pytest.mark.parametrize(
    "other", [FileEntry("b.json", 1, SHA), FileEntry("a.json", 2, SHA), FileEntry("a.json", 1, "0" * 64)]
)
def test_digest_any_difference_changes_it(other: FileEntry) -> None:
    assert Manifest((other,)).digest != Manifest((FileEntry("a.json", 1, SHA),)).digest


def test_from_json_own_output_round_trips() -> None:
    manifest = Manifest((FileEntry("b.json", 2, SHA), FileEntry("additional_chat_templates/a.jinja", 1, "0" * 64)))
    assert Manifest.from_json(json.dumps(manifest.to_json())) == manifest
    assert Manifest.from_json({**manifest.to_json(), "force": True}) == manifest


def test_size_and_blobs_count_equal_contents_once() -> None:
    manifest = Manifest((FileEntry("a.json", 5, SHA), FileEntry("b.json", 5, SHA), FileEntry("c.json", 1, "0" * 64)))
    assert manifest.size_bytes == 11
    assert manifest.blobs == {SHA: 5, "0" * 64: 1}


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd.json",
        "../a.json",
        "a/../b.json",
        "a//b.json",
        "./a.json",
        "a\\b.json",
        "a\x00.json",
        "a\n.json",
        "",
        ".hidden.json",
        "a/",
        "x/y/z.json",
        "é.json",
        "a" * 300 + ".json",
        " a.json",
        7,
        None,
        "a\x1b[31m.json",
        "C:a.json",
    ],
)
def test_from_json_unsafe_path_refused(path: object) -> None:
    assert "path_invalid" in codes_of({"files": [entry(path)]})


@pytest.mark.parametrize("size_bytes", [-1, 1.0, "1", True, None, 2**41, 10**400])
def test_from_json_insane_size_refused(size_bytes: object) -> None:
    assert codes_of({"files": [entry(size_bytes=size_bytes)]}) == ["size_invalid"]


@pytest.mark.parametrize("sha256", ["", "ab" * 31, "AB" * 32, "zz" * 32, f"sha256:{SHA}", None, f"{SHA}\n"])
def test_from_json_bad_sha256_refused(sha256: object) -> None:
    assert codes_of({"files": [entry(sha256=sha256)]}) == ["sha256_invalid"]


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("adapter_model.bin", "pickle_refused"),
        ("model.pt", "pickle_refused"),
        ("data.pkl", "pickle_refused"),
        ("model.gguf", "format_refused"),
        ("model.zip", "format_refused"),
        ("modeling_evil.py", "file_not_allowed"),
        ("optimizer.pt", "file_not_allowed"),
        ("checkpoint-5/model.safetensors", "file_not_allowed"),
    ],
)
def test_from_json_file_without_a_place_refused(path: str, code: str) -> None:
    assert codes_of({"files": [entry(path)]}) == [code]


@pytest.mark.parametrize(
    ("document", "code"),
    [
        ("", "manifest_not_json"),
        ("[" * 100_000, "manifest_not_json"),
        (b"\xff\xfe", "manifest_not_json"),
        ("null", "manifest_shape"),
        ([], "manifest_shape"),
        ({"files": {}}, "manifest_shape"),
        ({"files": []}, "manifest_files"),
        ({"files": [entry()] * (MAX_FILES + 1)}, "manifest_files"),
        ({"files": ["a.json"]}, "manifest_entry"),
        ({"files": [entry(mode=0o777)]}, "manifest_entry"),
        ({"files": [{"path": "a.json"}]}, "manifest_entry"),
        ('{"files": "' + "x" * (1 << 20) + '"}', "manifest_too_long"),
        ({"files": [entry(), entry()]}, "path_duplicate"),
        ({"files": [entry("a.json"), entry("b.json", size_bytes=2)]}, "size_contradiction"),
    ],
)
def test_from_json_malformed_refused(document: object, code: str) -> None:
    assert codes_of(document) == [code]


def test_from_json_every_problem_named_at_once() -> None:
    rows = [entry("../x"), entry("a.bin", size_bytes=-1), entry("b.json", sha256="no"), entry("c.json", extra=1)]
    assert codes_of({"files": rows}) == [
        "path_invalid",
        "pickle_refused",
        "size_invalid",
        "sha256_invalid",
        "manifest_entry",
    ]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["files", "path", "sha256", "x"]), inner)
    ),
    max_leaves=20,
)
rows = st.fixed_dictionaries(
    {
        "path": json_values | st.sampled_from(["a.json", "../a", "a.bin"]),
        "size_bytes": json_values | st.integers(0, 99),
        "sha256": json_values | st.just(SHA),
    }
)


@given(json_values | st.fixed_dictionaries({"files": st.lists(json_values | rows, max_size=5)}))
def test_from_json_any_json_accepted_or_refused(document: Any) -> None:
    try:
        manifest = Manifest.from_json(document)
    except ManifestError as error:
        problems = error.problems
        assert problems
        assert all(problem.code and str(problem).isprintable() for problem in problems)
    else:
        assert all(is_safe_path(file.path) and role_of(file.path) == "kept" for file in manifest.files)


def test_manifest_of_adapter_has_its_files_and_their_hashes(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    manifest = manifest_of(tmp_path)
    assert [file.path for file in manifest.files] == ["adapter_config.json", "adapter_model.safetensors"]
    for file in manifest.files:
        raw = (tmp_path / file.path).read_bytes()
        assert (file.size_bytes, file.sha256) == (len(raw), hashlib.sha256(raw).hexdigest())


def test_manifest_of_same_bytes_elsewhere_same_digest(tmp_path: Path) -> None:
    assert manifest_of(write_adapter(tmp_path / "a")).digest == manifest_of(write_adapter(tmp_path / "b")).digest
    assert manifest_of(write_adapter(tmp_path / "c", seed=9)).digest != manifest_of(tmp_path / "a").digest


def test_manifest_of_progress_adds_up(tmp_path: Path) -> None:
    pieces: list[int] = []
    assert sum(pieces) < manifest_of(write_adapter(tmp_path), pieces.append).size_bytes == sum(pieces)


def test_scan_training_state_and_folders_left_behind(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    for name in ["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "scaler.pt"]:
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "trainer_state.json").write_text("{}")
    (tmp_path / "modeling_custom.py").write_text("")
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "adapter_model.bin").write_bytes(b"x")
    found = scan(tmp_path)
    assert found.kept == ("adapter_config.json", "adapter_model.safetensors")
    assert len(found.skipped) == 9
    assert not found.problems


def test_scan_tokenizer_templates_and_card_kept(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    (tmp_path / "additional_chat_templates").mkdir()
    names = ["tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "README.md", "loradock.json"]
    for name in [*names, "additional_chat_templates/tool_use.jinja"]:
        (tmp_path / name).write_text("x")
    assert set(names) | {"additional_chat_templates/tool_use.jinja"} <= set(scan(tmp_path).kept)


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin", "model.pt", "x.pth", "x.ckpt", "x.pkl"])
def test_manifest_of_pickle_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"\x80\x04")
    with pytest.raises(ManifestError, match="runs whatever code") as caught:
        manifest_of(tmp_path)
    assert [(problem.code, problem.where) for problem in caught.value.problems] == [("pickle_refused", name)]
    assert "safetensors" in caught.value.problems[0].fix


def test_scan_pickle_beside_its_safetensors_twin_skipped(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04")
    assert "adapter_model.bin" in scan(tmp_path).skipped
    (tmp_path / "non_lora_trainables.bin").write_bytes(b"\x80\x04")
    assert [problem.where for problem in scan(tmp_path).problems] == ["non_lora_trainables.bin"]


def test_manifest_of_link_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    directory = tmp_path / "adapter"
    write_adapter(directory)
    (directory / "tokenizer.json").symlink_to(tmp_path / "secret")
    (directory / "latest").symlink_to(tmp_path)
    with pytest.raises(ManifestError) as caught:
        manifest_of(directory)
    assert [(problem.code, problem.where) for problem in caught.value.problems] == [("link_refused", "tokenizer.json")]


def test_manifest_of_name_with_control_character_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    (tmp_path / "a\x1b[31m.json").write_text("{}")
    with pytest.raises(ManifestError) as caught:
        manifest_of(tmp_path)
    assert caught.value.problems[0].code == "path_invalid"
    assert str(caught.value).isprintable()


def test_manifest_of_nothing_there_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no file"):
        manifest_of(tmp_path)
    with pytest.raises(NotFoundError):
        manifest_of(tmp_path / "missing")
