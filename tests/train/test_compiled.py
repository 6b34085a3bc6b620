"""torch.compile of a model's layers: the same training by other code, and the plain code where no gradient is taken."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from torch._dynamo import config as dynamo_config
from transformers.modeling_layers import GradientCheckpointingLayer

from loradock_testing.rows import WriteRows
from loradock_train import train
from loradock_train.compiled import Tally, check_compiler, compiled_layers
from loradock_train.errors import ModelError

pytestmark = [  # torch's own words to itself while it compiles
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]

ROWS = [
    {"prompt": f"def f{i}(x" + "y" * (3 * i % 11) + "):", "completion": f" return {i}" + " + x" * (i % 4)}
    for i in range(12)
]


class Layer(GradientCheckpointingLayer):
    """y = 3 x."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), 3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every graph that is compiled, which then runs as it is."""
    found: list[Any] = []
    plain = torch.compile

    def backend(graph: Any, inputs: Any) -> Any:
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda *given, **options: plain(*given, **options, backend=backend))
    torch.compiler.reset()
    return found


def test_layers_share_what_was_compiled_for_one_of_them(graphs: list[Any]) -> None:
    model = nn.Sequential(Layer(), Layer(), Layer(), Layer())
    tally = Tally()
    with compiled_layers(model, tally):
        for width in (5, 9, 17):  # a batch is as wide as its longest row
            assert torch.equal(model(torch.ones(2, width)), torch.full((2, width), 81.0))
    assert len(graphs) == 2  # what goes into the first layer takes no gradient, and into all others it does
    assert (tally.layer_calls, tally.uncompiled_calls, tally.told()) == (12, 0, None)


class OtherLayer(Layer):
    """As a vision tower's beside a language model's."""


def test_calls_past_the_limit_are_counted_and_right(graphs: list[Any]) -> None:
    model, tally = nn.Sequential(Layer(), Layer()), Tally()
    with dynamo_config.patch(recompile_limit=1), compiled_layers(model, tally):
        for _ in range(3):
            assert torch.equal(model(torch.ones(2, 5)), torch.full((2, 5), 9.0))
    assert len(graphs) == 1
    assert (tally.layer_calls, tally.uncompiled_calls) == (6, 3)
    told = tally.told()
    assert told is not None
    assert told.startswith("torch_compile: 3 of 6 calls of a layer so far ran uncompiled")


def test_each_class_of_layers_has_a_limit_of_its_own(graphs: list[Any]) -> None:
    model, tally = nn.Sequential(Layer(), OtherLayer(), Layer(), OtherLayer()), Tally()
    with dynamo_config.patch(recompile_limit=1), compiled_layers(model, tally):
        for width in (5, 9):
            model(torch.ones(2, width, requires_grad=True))
    assert len(graphs) == 2
    assert tally.uncompiled_calls == 0


def test_run_past_the_limit_says_so_once_and_in_run_json(
    graphs: list[Any], base: Path, tmp_path: Path, write_rows: WriteRows
) -> None:
    console = Console(file=io.StringIO(), width=400)
    config = {
        "model_id": str(base), "train_path": str(write_rows("rows.jsonl", ROWS)), "context_length": 64,
        "mixed_precision": "no", "max_steps": 3, "train_batch_size_per_device": 4, "learning_rate": 1e-2,
        "torch_compile": True, "lora_config": {"r": 4},  # the first layer gets what takes no gradient
    }  # fmt: skip
    with dynamo_config.patch(recompile_limit=1):
        run = train(config, output=tmp_path / "run", console=console)
    written = json.loads((tmp_path / "run" / "run.json").read_text())
    counts = written["torch_compile"]
    assert counts == run.summary["torch_compile"]
    assert 0 < counts["uncompiled_calls"] < counts["layer_calls"] == 2 * 3
    told = [line for line in written["notices"] if "ran uncompiled" in line]
    assert len(told) == 1
    assert console.file.getvalue().count("ran uncompiled") == 1  # type: ignore[attr-defined]


def test_run_within_the_limit_says_nothing(
    graphs: list[Any], base: Path, tmp_path: Path, write_rows: WriteRows
) -> None:
    config = {
        "model_id": str(base), "train_path": str(write_rows("rows.jsonl", ROWS)), "context_length": 64,
        "mixed_precision": "no", "max_steps": 2, "learning_rate": 1e-2, "torch_compile": True,
    }  # fmt: skip
    summary = train(config, output=tmp_path / "run").summary
    assert summary["torch_compile"]["uncompiled_calls"] == 0
    assert not any("torch_compile" in notice for notice in summary["notices"])
    del config["torch_compile"]
    assert "torch_compile" not in train(config, output=tmp_path / "plain").summary


def test_only_what_takes_gradients_is_compiled(graphs: list[Any]) -> None:
    model = nn.Sequential(Layer())
    tally = Tally()
    with compiled_layers(model, tally), torch.no_grad():
        model(torch.ones(2, 5))
    assert graphs == []
    assert tally == Tally()


def test_layers_are_their_own_again_afterwards(graphs: list[Any]) -> None:
    layer = Layer()
    with pytest.raises(RuntimeError, match="stop"), compiled_layers(layer, Tally()):
        raise RuntimeError("stop")
    layer(torch.ones(2, 5))
    assert "forward" not in vars(layer)
    assert graphs == []


def test_model_without_layers_is_refused() -> None:
    with (
        pytest.raises(ModelError, match="torch_compile: Linear has no layers that transformers marks"),
        compiled_layers(nn.Linear(2, 2), Tally()),
    ):
        pass


def test_machine_without_a_compiler_is_told_what_it_lacks() -> None:
    from torch._inductor import config

    with (
        config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(ModelError, match=r"nothing can be compiled here \(.*compiler.*\); it needs a C\+\+ compiler"),
    ):
        check_compiler()


def test_compiled_run_ends_as_the_plain_one(base: Path, tmp_path: Path, write_rows: WriteRows) -> None:
    rows = str(write_rows("rows.jsonl", ROWS))
    config = {
        "model_id": str(base), "train_path": rows, "valid_path": rows, "context_length": 64, "mixed_precision": "no",
        "num_epochs": 2, "train_batch_size_per_device": 4, "learning_rate": 1e-2, "logging_steps": 1,
        "lora_config": {"r": 4}, "gradient_checkpointing": True,
    }  # fmt: skip
    plain = train(config, output=tmp_path / "plain")
    other = train({**config, "torch_compile": True}, output=tmp_path / "compiled")
    theirs = load_file(other.checkpoint / "adapter_model.safetensors")
    for name, tensor in load_file(plain.checkpoint / "adapter_model.safetensors").items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-5, msg=name)
    assert other.final_eval_loss == pytest.approx(plain.final_eval_loss, rel=1e-5)
    assert other.summary["proof"]["reloaded"] == pytest.approx(plain.summary["proof"]["reloaded"], abs=1e-4)
