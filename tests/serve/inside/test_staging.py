"""Adapters read ahead by a worker: vLLM's own reading, behind a manager that is faked as far as a slot goes."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest

from loradock_serve.inside import staging as staging_module
from loradock_serve.inside.staging import Staging, check_shapes, populate
from loradock_serve.packed_file import Recipe
from loradock_testing.waiting import until

PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"
WIDTH, RANK = 16, 4


def adapter_at(directory: Path, *, width: int = WIDTH, rank: int = RANK, alpha: int = RANK) -> Path:
    """An adapter of one layer on disk."""
    directory.mkdir(parents=True)
    tensors = {f"{PREFIX}.lora_A.weight": torch.ones(rank, width), f"{PREFIX}.lora_B.weight": torch.ones(width, rank)}
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"r": rank, "lora_alpha": alpha, "target_modules": ["q_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def fake_layer(places_a: list[tuple[int, int]], places_b: list[tuple[int, int]], tp_size: int = 1) -> SimpleNamespace:
    """A layer of two slots with places of these sizes, one for each slice."""
    stacked_a, stacked_b = (tuple(torch.zeros(2, 1, *size) for size in sizes) for sizes in (places_a, places_b))
    return SimpleNamespace(lora_a_stacked=stacked_a, lora_b_stacked=stacked_b, tp_size=tp_size)


class FakeManager:
    """vLLM's `WorkerLoRAManager` with one layer; reads as vLLM does, and remembers what it was asked to read."""

    def __init__(self, capacity: int = 2) -> None:
        self.reads: list[str] = []
        self.may_read = threading.Event()
        self.may_read.set()
        layer = SimpleNamespace(
            lora_a_stacked=(torch.zeros(2, 1, RANK, WIDTH),),
            lora_b_stacked=(torch.zeros(2, 1, WIDTH, RANK),),
            tp_size=1,
        )
        self._adapter_manager = SimpleNamespace(
            modules={"model.layers.0.self_attn.q_proj": layer},
            capacity=capacity,
            _is_moe=False,
            _create_merged_loras_inplace=merge,
        )

    def _load_adapter(self, request: LoRARequest) -> LoRAModel:
        self.reads.append(request.lora_path)
        assert self.may_read.wait(10)
        if not Path(request.lora_path).is_dir():
            raise LoRAAdapterNotFoundError(request.lora_name, request.lora_path)
        peft = PEFTHelper.from_local_dir(request.lora_path, None)
        return LoRAModel.from_local_checkpoint(
            request.lora_path, {"q_proj"}, peft, lora_model_id=request.lora_int_id, device="cpu", dtype=torch.float32
        )

    def ask(self, request: LoRARequest) -> LoRAModel:
        """What `add_adapter` does in a step for an adapter that is not in vLLM's cache."""
        return self._load_adapter(request)


def merge(model: LoRAModel) -> None:
    for layer in model.loras.values():
        layer.optimize()


def request(path: Path, number: int = 1) -> LoRARequest:
    return LoRARequest(f"a{number}", number, str(path))


async def staged(staging: Staging, number: int = 1) -> tuple[str, str]:
    """How the reading ended."""
    seen: list[tuple[str, str]] = []

    def ended() -> bool:
        seen.append(staging.look(number))
        return seen[-1][0] != "reading"

    await until(ended, "the end of the reading")
    return seen[-1]


def b_of(model: LoRAModel) -> torch.Tensor:
    (layer,) = model.loras.values()
    return layer.lora_b


async def test_staged_adapter_is_handed_to_the_step_without_another_read(tmp_path: Path) -> None:
    manager = FakeManager()
    staging = Staging(manager)
    one = request(adapter_at(tmp_path / "a", alpha=2 * RANK))
    manager.may_read.clear()

    staging.begin(one, None)
    assert staging.look(1) == ("reading", "")
    manager.may_read.set()
    assert await staged(staging) == ("ready", "")
    assert staging.held() == [1]
    model = manager.ask(one)

    assert manager.reads == [one.lora_path]
    assert torch.equal(b_of(model), torch.full((WIDTH, RANK), 2.0))  # merged and scaled already
    assert staging.held() == []  # vLLM has it now, and nobody else


async def test_packed_adapter_is_mapped_kept_and_handed_out_again(tmp_path: Path) -> None:
    manager = FakeManager()
    staging = Staging(manager)
    one, packed = request(adapter_at(tmp_path / "a")), adapter_at(tmp_path / "packed")

    staging.begin(one, str(packed))
    assert await staged(staging) == ("ready", "")
    first = manager.ask(one)
    (packed / "adapter_model.safetensors").unlink()
    again = manager.ask(one)

    assert manager.reads == [str(packed)]
    assert again is first
    assert torch.equal(b_of(again), torch.ones(WIDTH, RANK))  # still mapped, whatever became of the file's name
    assert staging.held() == [1]


async def test_packed_bs_that_lie_transposed_are_turned_back_and_stay_mapped(tmp_path: Path) -> None:
    manager = FakeManager()
    staging = Staging(manager)
    one, packed = request(adapter_at(tmp_path / "a", alpha=3 * RANK)), tmp_path / "packed"
    packed.mkdir()
    Recipe(Path(one.lora_path), "float32-cpu").write(packed)

    staging.begin(one, str(packed))
    assert await staged(staging) == ("ready", "")
    b = b_of(manager.ask(one))

    assert torch.equal(b, torch.full((WIDTH, RANK), 3.0))
    assert b.stride() == (1, WIDTH)
    assert manager.reads == [str(packed)]


async def test_adapter_that_is_read_as_it_was_uploaded_is_not_turned_whatever_its_metadata_say(tmp_path: Path) -> None:
    manager = FakeManager()
    staging = Staging(manager)
    own = adapter_at(tmp_path / "a")
    b = torch.arange(float(WIDTH * RANK)).reshape(WIDTH, RANK)
    tensors = {f"{PREFIX}.lora_A.weight": torch.ones(RANK, WIDTH), f"{PREFIX}.lora_B.weight": b}
    save_file(tensors, own / "adapter_model.safetensors", metadata={"b": "transposed"})
    one = request(own)

    staging.begin(one, str(own))  # what packing names where it has nothing to gain

    assert await staged(staging) == ("ready", "")
    assert torch.equal(b_of(manager.ask(one)), b)
    assert manager.reads == [str(own)]


@pytest.mark.parametrize("damage", ["missing", "gone", "cut off", "nonsense"])
async def test_packed_directory_that_cannot_be_read_costs_only_time(tmp_path: Path, damage: str) -> None:
    manager = FakeManager()
    staging = Staging(manager)
    one, packed = request(adapter_at(tmp_path / "a")), adapter_at(tmp_path / "packed")
    file = packed / "adapter_model.safetensors"
    match damage:
        case "missing":
            packed = tmp_path / "nowhere"
        case "gone":
            file.unlink()
        case "cut off":
            file.write_bytes(file.read_bytes()[:-8])
        case "nonsense":
            (packed / "adapter_config.json").write_text("{")

    staging.begin(one, str(packed))

    assert await staged(staging) == ("ready", "")
    assert manager.reads[-1] == one.lora_path
    assert torch.equal(b_of(manager.ask(one)), torch.ones(WIDTH, RANK))


async def test_refused_adapter_fails_in_vllms_words_and_is_forgotten(tmp_path: Path) -> None:
    manager = FakeManager()
    staging = Staging(manager)
    wrong = adapter_at(tmp_path / "a")
    tensors = {f"{PREFIX.replace('q_proj', 'x_proj')}.lora_A.weight": torch.ones(RANK, WIDTH)}
    save_file(tensors, wrong / "adapter_model.safetensors")

    staging.begin(request(wrong), None)
    state, error = await staged(staging)

    assert state == "failed"
    assert "x_proj" in error
    assert staging.look(1) == ("unknown", "")


@pytest.mark.parametrize(("width", "rank", "part"), [(WIDTH + 1, RANK, "lora_A"), (WIDTH, RANK + 1, "lora_A")])
async def test_adapter_that_no_slot_has_room_for_fails_before_any_step(
    tmp_path: Path, width: int, rank: int, part: str
) -> None:
    staging = Staging(FakeManager())

    staging.begin(request(adapter_at(tmp_path / "a", width=width, rank=rank)), None)
    state, error = await staged(staging)

    assert state == "failed"
    assert part in error
    assert str([rank, width]) in error
    assert str([RANK, WIDTH]) in error


async def test_adapter_dropped_while_it_is_read_stays_dropped(tmp_path: Path) -> None:
    manager = FakeManager()
    staging = Staging(manager)
    one = request(adapter_at(tmp_path / "a"))
    manager.may_read.clear()
    staging.begin(one, None)
    await until(lambda: bool(manager.reads), "the reading's begin")

    assert staging.drop(1) is False
    manager.may_read.set()
    staging.begin(request(adapter_at(tmp_path / "b"), 2), None)
    assert await staged(staging, 2) == ("ready", "")

    assert staging.look(1) == ("unknown", "")
    assert staging.held() == [2]
    assert staging.drop(2) is True
    assert staging.held() == []


async def test_unused_adapters_are_bounded_by_vllms_cache_and_read_again_by_the_step(tmp_path: Path) -> None:
    manager = FakeManager(capacity=2)
    staging = Staging(manager)
    requests = [request(adapter_at(tmp_path / str(number)), number) for number in (1, 2, 3)]
    for one in requests:
        staging.begin(one, None)
        assert await staged(staging, one.lora_int_id) == ("ready", "")

    assert staging.held() == [2, 3]
    assert torch.equal(b_of(manager.ask(requests[0])), torch.ones(WIDTH, RANK))
    assert manager.reads[3:] == [requests[0].lora_path]


async def test_mapped_adapters_are_bounded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging_module, "MAX_MAPPED", 1)
    manager = FakeManager()
    staging = Staging(manager)
    requests = [request(adapter_at(tmp_path / str(number)), number) for number in (1, 2)]
    packed = [adapter_at(tmp_path / f"packed{number}") for number in (1, 2)]
    for one, directory in zip(requests, packed, strict=True):
        staging.begin(one, str(directory))
        assert await staged(staging, one.lora_int_id) == ("ready", "")

    assert staging.held() == [2]
    manager.ask(requests[0])
    assert manager.reads == [str(packed[0]), str(packed[1]), str(packed[0])]
    assert staging.held() == [1]


@pytest.mark.parametrize("damage", ["gone", "cut off", "no safetensors"])
async def test_step_survives_a_packed_directory_whose_file_is_no_longer_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(staging_module, "MAX_MAPPED", 0)
    manager = FakeManager()
    staging = Staging(manager)
    one, packed = request(adapter_at(tmp_path / "a")), adapter_at(tmp_path / "packed")
    staging.begin(one, str(packed))
    assert await staged(staging) == ("ready", "")
    file = packed / "adapter_model.safetensors"
    content = file.read_bytes()
    file.unlink()
    if damage != "gone":
        file.write_bytes(content[:-8] if damage == "cut off" else b"nonsense")

    assert torch.equal(b_of(manager.ask(one)), torch.ones(WIDTH, RANK))
    assert manager.reads[1:] == [str(packed), one.lora_path]


@pytest.mark.parametrize("change", ["unknown", "another path", "in place"])
async def test_what_was_not_staged_is_read_by_vllm_itself(tmp_path: Path, change: str) -> None:
    manager = FakeManager()
    staging = Staging(manager)
    one = request(adapter_at(tmp_path / "a"))
    staging.begin(one, None)
    assert await staged(staging) == ("ready", "")
    other: Callable[[], LoRARequest] = {
        "unknown": lambda: request(tmp_path / "a", 7),
        "another path": lambda: request(adapter_at(tmp_path / "b")),
        "in place": lambda: LoRARequest("a1", 1, one.lora_path, load_inplace=True),
    }[change]

    manager.ask(other())

    assert len(manager.reads) == 2
    assert staging.held() == [1]


def test_shapes_of_a_worker_that_keeps_a_share_are_checked_against_the_whole() -> None:
    layer = SimpleNamespace(
        lora_a_stacked=(torch.zeros(2, 1, RANK, WIDTH),),
        lora_b_stacked=(torch.zeros(2, 1, WIDTH // 2, RANK),),
        tp_size=2,
    )
    manager: Any = SimpleNamespace(modules={"m": layer}, _is_moe=False)

    def model(out: int) -> Any:
        part = SimpleNamespace(lora_a=torch.zeros(RANK, WIDTH), lora_b=torch.zeros(out, RANK))
        return SimpleNamespace(loras={"m": part, "elsewhere": part})

    check_shapes(model(WIDTH), manager)
    with pytest.raises(ValueError, match=r"lora_B of m has the shape \[17, 4\]"):
        check_shapes(model(WIDTH + 1), manager)


def test_shapes_of_packed_layers_and_embeddings_are_those_of_their_slots() -> None:
    packed = SimpleNamespace(
        lora_a_stacked=(torch.zeros(2, 1, RANK, WIDTH),) * 2,
        lora_b_stacked=(torch.zeros(2, 1, 8, RANK),) * 2,
        tp_size=1,
    )
    embedding = SimpleNamespace(lora_a_stacked=torch.zeros(2, 100, RANK), lora_b_stacked=torch.zeros(2, 1, WIDTH, RANK))
    manager: Any = SimpleNamespace(modules={"qkv": packed, "embed": embedding}, _is_moe=False)
    a, b = torch.zeros(RANK, WIDTH), torch.zeros(8, RANK)
    layers = {
        "qkv": SimpleNamespace(lora_a=[a, None], lora_b=[b, None]),
        "embed": SimpleNamespace(lora_a=torch.zeros(RANK, 100), lora_b=torch.zeros(WIDTH, RANK)),
    }

    check_shapes(SimpleNamespace(loras=layers), manager)
    layers["embed"].lora_a = torch.zeros(RANK, 101)
    with pytest.raises(ValueError, match=r"lora_A of embed has the shape \[4, 101\], and .* room for \[4, 100\]"):
        check_shapes(SimpleNamespace(loras=layers), manager)


def test_populate_fills_the_page_tables_of_a_mapped_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(64 * 4096))
    mapped = torch.from_file(str(path), shared=False, size=64 * 4096, dtype=torch.uint8)
    layer = SimpleNamespace(lora_a=mapped[100:4096], lora_b=mapped[4096:])

    before = resident_bytes(mapped.data_ptr())
    populate(SimpleNamespace(loras={"m": layer}))

    assert before == 0
    assert resident_bytes(mapped.data_ptr()) == 64 * 4096


def resident_bytes(address: int) -> int:
    """Rss of the mapping at an address, as the kernel has it."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        span = line.split(" ")[0].split("-")
        if len(span) == 2 and int(span[0], 16) <= address < int(span[1], 16):
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Rss:"))
    raise AssertionError("no such mapping")
