"""Whatever mixture of drifts and initialisations comes: what is repaired is the same function."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loradock_adapters.base import base_from
from loradock_adapters.checkpoint import read_checkpoint
from loradock_adapters.repair import plan_repair, write_repaired
from loradock_adapters.repair_bases import is_same
from loradock_adapters.repair_inits import converted_tensors
from loradock_adapters.safetensors_header import read_header
from loradock_adapters.tensor_files import TensorStream, pieces, stream_of, write_safetensors
from loradock_testing.checkpoints import LLAMA, lora_tensors, write_adapter

BASE = base_from(LLAMA)
TARGETS = ("q_proj", "k_proj", "down_proj", "embed_tokens", "lm_head")
WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "base_model.model.", "base_model.model.model.")


def drifted(name: str, wrappers: list[str], nesting: str, adapter_name: str, inside: str) -> str:
    name = name.replace("base_model.model.model.", f"base_model.model.{nesting}")
    name = name.replace(".self_attn.", f".self_attn.{inside}").replace(".weight", f"{adapter_name}.weight")
    if ".lora_embedding" in name:
        name += adapter_name
    return "".join(wrappers) + name


@settings(max_examples=60)
@given(
    wrappers=st.lists(st.sampled_from(WRAPPERS), max_size=3),
    nesting=st.sampled_from(["model.", "model.language_model.", "language_model.model.", ""]),
    adapter_name=st.sampled_from(["", ".default", ".my-adapter_1"]),
    inside=st.sampled_from(["", "_orig_mod.", "_checkpoint_wrapped_module."]),
    rank=st.integers(1, 5),
)
def test_every_mixture_of_drifts_is_undone_bit_by_bit(
    wrappers: list[str], nesting: str, adapter_name: str, inside: str, rank: int
) -> None:
    right = lora_tensors(rank=rank, targets=TARGETS, seed=rank)
    names = {name: drifted(name, wrappers, nesting, adapter_name, inside) for name in right}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        moved = {names[name]: tensor for name, tensor in right.items()}
        write_adapter(root / "a", moved, rank=rank, targets=TARGETS)
        repair = plan_repair(read_checkpoint(root / "a"), BASE, None)
        assert bool(repair) == (names != {name: name for name in names})
        (root / "out").mkdir()
        write_repaired(repair, root / "out")
        checkpoint = read_checkpoint(root / "out")
        path = root / "out" / "adapter_model.safetensors"
        found = {name: stream_of(path, info).whole() for name, info in checkpoint.tensors.items()}
    assert found == {name: raw for name, (_, _, raw) in right.items()}


@settings(max_examples=40)
@given(
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from(["F16", "F32", "F64"]),
    piece_bytes=st.integers(1, 64),
    seed=st.integers(0, 1000),
)
def test_converted_factors_make_the_difference_of_the_two_changes(
    sizes: tuple[int, int, int], dtype: str, piece_bytes: int, seed: int
) -> None:
    rank, inner, outer = sizes
    kind = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]
    random = np.random.default_rng(seed)
    a, b, a0, b0 = (
        random.standard_normal(shape).astype(kind)
        for shape in ((rank, inner), (outer, rank)) * 2  # as they come
    )
    names = ("m.lora_A.weight", "m.lora_B.weight")
    trained = {names[0]: stream(a, dtype), names[1]: stream(b, dtype)}
    found = converted_tensors(trained, {names[0]: stream(a0, dtype), names[1]: stream(b0, dtype)})
    ours = {
        name: np.frombuffer(b"".join(tensor.read(piece_bytes)), kind).reshape(tensor.shape)
        for name, tensor in found.items()
    }
    change = ours[names[1]].astype("f8") @ ours[names[0]].astype("f8")
    expected = b.astype("f8") @ a.astype("f8") - b0.astype("f8") @ a0.astype("f8")
    assert np.allclose(change, expected, atol=1e-9)


def stream(values: np.ndarray, dtype: str) -> TensorStream:
    raw = np.ascontiguousarray(values).tobytes()
    return TensorStream(dtype, values.shape, lambda size: pieces([raw], size))


@settings(max_examples=60)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20), st.integers(0, 19)
)
def test_copy_in_another_format_is_the_base_s_only_as_torch_would_round_it(values: list[float], place: int) -> None:
    torch = pytest.importorskip("torch")
    own = torch.tensor(values, dtype=torch.float32)
    for dtype, name in ((torch.bfloat16, "BF16"), (torch.float16, "F16")):
        copy = own.to(dtype)
        bits = copy.view(torch.int16).numpy().copy()
        ours = stream(own.numpy(), "F32")
        assert is_same(stream(bits, name), ours)
        bits[place % len(values)] ^= 1
        assert not is_same(stream(bits, name), ours)


def test_written_file_has_the_widest_types_first_and_can_be_read(tmp_path: Path) -> None:
    wide, narrow = np.arange(3, dtype="<f8"), np.arange(5, dtype="<f2")
    write_safetensors(tmp_path / "x", {"a": stream(narrow, "F16"), "b": stream(wide, "F64")})
    header = read_header(tmp_path / "x")
    assert header["b"].offsets[1] == header["a"].offsets[0]
    assert header["b"].offsets[0] % 8 == 0
    short = TensorStream("F16", (9,), lambda size: pieces([b"1234"], size))
    with pytest.raises(ValueError, match="4 bytes came, its shape takes 18"):
        write_safetensors(tmp_path / "y", {"a": short})
