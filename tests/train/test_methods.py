"""Methods beside plain LoRA, each in a whole run on a tiny base: rsLoRA, DoRA, LoRA+, QLoRA, 8-bit optimisers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from loradock_testing.rows import WriteRows
from loradock_train import train
from loradock_train.config import TrainConfig
from loradock_train.errors import ModelError
from loradock_train.model import add_adapter, check_machine, decide_precision, load_model
from loradock_train.optimiser import quicken_b

ROWS = [{"prompt": f"def f{i}():", "completion": f" return {i}"} for i in range(8)]


def options(base: Path, data: Path, lora: dict[str, Any] | None, **values: Any) -> dict[str, Any]:
    common = {
        "model_id": str(base), "train_path": str(data), "context_length": 64, "learning_rate": 1e-2,
        "mixed_precision": "no", "max_steps": 3, "train_batch_size_per_device": 4,
    }  # fmt: skip
    return {**common, **({} if lora is None else {"lora_config": {"r": 4, **lora}}), **values}


def tensors(run: Any) -> dict[str, torch.Tensor]:
    return load_file(run.checkpoint / "adapter_model.safetensors")


# ---- LoRA's relatives -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "scale"), [({"use_rslora": True}, 16 / 4**0.5), ({"use_dora": True}, 16 / 4)])
def test_adapter_of_another_method_is_trained_and_loads_as_such(
    base: Path, tmp_path: Path, write_rows: WriteRows, method: dict[str, bool], scale: float
) -> None:
    run = train(options(base, write_rows("rows.jsonl", ROWS), method), output=tmp_path / "run")
    written = json.loads((run.checkpoint / "adapter_config.json").read_text())
    assert {key: written[key] for key in method} == method
    assert any("magnitude" in name for name in tensors(run)) is method.get("use_dora", False)
    loaded: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run.checkpoint)
    assert loaded.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] == scale


def test_b_learns_faster_by_the_ratio() -> None:
    """One step of Adam moves every number by its learning rate."""
    model = nn.ModuleDict({"lora_A": nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})})
    model["lora_B"] = nn.ModuleDict({"default": nn.Linear(2, 4, bias=False)})
    whole = nn.ModuleDict({"q_proj": model})
    before = {name: p.detach().clone() for name, p in whole.named_parameters()}
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-3, weight_decay=0.0)
    quicken_b(optimizer, whole, 16.0)
    sum(p.sum() for p in whole.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    moved = {name: (p.detach() - before[name]).abs().mean() for name, p in whole.named_parameters()}
    assert float(moved["q_proj.lora_A.default.weight"]) == pytest.approx(1e-3, rel=1e-3)
    assert float(moved["q_proj.lora_B.default.weight"]) == pytest.approx(16e-3, rel=1e-3)


def test_run_with_loraplus_gives_another_adapter_of_the_same_form(
    base: Path, tmp_path: Path, write_rows: WriteRows
) -> None:
    data = write_rows("rows.jsonl", ROWS)
    small = {"learning_rate": 1e-3, "max_steps": 1}
    plain = tensors(train(options(base, data, {}, **small), output=tmp_path / "plain"))
    quick = tensors(train(options(base, data, {"loraplus_lr_ratio": 16}, **small), output=tmp_path / "quick"))
    assert plain.keys() == quick.keys()
    for name, tensor in plain.items():  # B begins at zero: after one step it is the step
        if "lora_B" in name:
            torch.testing.assert_close(quick[name], 16 * tensor, rtol=1e-3, atol=1e-6)
        else:
            assert torch.equal(quick[name], tensor)


# ---- few bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "section", [{"load_in": "4bit"}, {"load_in": "4bit", "double_quant": True}, {"load_in": "8bit"}],
    ids=["4bit", "double", "8bit"],
)  # fmt: skip
def test_adapter_over_a_base_in_few_bits_is_trained_proven_and_loads_over_the_whole_one(
    base: Path, tmp_path: Path, write_rows: WriteRows, section: dict[str, Any]
) -> None:
    chosen = options(base, write_rows("rows.jsonl", ROWS), {}, quantisation=section)
    run = train(chosen, output=tmp_path / "run")
    assert run.summary["proof"]["base"] > 0
    whole = sum(tensor.numel() for tensor in load_file(base / "model.safetensors").values())
    counted = run.summary["parameters"]
    assert counted["total"] - counted["trainable"] == whole, "4-bit weights are counted as they were"
    assert not [name for name in tensors(run) if "base_layer" in name or "absmax" in name]
    loaded: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run.checkpoint)
    with torch.no_grad():
        assert bool(torch.isfinite(loaded(torch.tensor([[1, 2, 3]])).logits).all())


def test_gradients_over_4_bits_are_those_over_the_weights_that_they_stand_for(base: Path) -> None:
    """After an answer in eval mode, too: then bitsandbytes would repack the weights into a form without a gradient."""
    values = {"model_id": str(base), "train_path": "x", "lora_config": {"r": 4}, "quantisation": {"load_in": "4bit"}}
    config = TrainConfig.model_validate({**values, "mixed_precision": "no"})
    assert config.lora_config is not None
    ids = torch.arange(1, 40)[None]
    found: list[dict[str, torch.Tensor]] = []
    for is_quantised in (True, False):
        model: Any = load_model(config, decide_precision(config, torch.float32))
        if not is_quantised:
            model = model.dequantize()
        with torch.no_grad():
            model.eval()(ids)
        torch.manual_seed(0)
        adapted: Any = add_adapter(model, config.lora_config)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
        adapted.train()(ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in adapted.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        assert float(grad.abs().max()) > 1e-5, name
        torch.testing.assert_close(grad, found[1][name], rtol=1e-3, atol=1e-5, msg=name)


def test_quantised_run_stopped_and_resumed_has_the_bits_of_the_one_left_alone(
    base: Path, tmp_path: Path, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loradock_train.errors import RunStopped
    from loradock_train.stop import StopRequest

    chosen = options(
        base, write_rows("rows.jsonl", ROWS), {"lora_dropout": 0.2, "loraplus_lr_ratio": 4}, max_steps=4, save_steps=2,
        quantisation={"load_in": "4bit"}, optim="adamw_8bit",
    )  # fmt: skip
    alone = train(chosen, output=tmp_path / "alone")
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "__init__", lambda self: setattr(self, "is_set", True))
        with pytest.raises(RunStopped):
            train(chosen, output=tmp_path / "stopped")
    resumed = train(chosen, output=tmp_path / "stopped", resume=True)
    assert tensors(resumed).keys() == tensors(alone).keys()
    assert all(torch.equal(tensors(resumed)[name], tensor) for name, tensor in tensors(alone).items())


def test_optimiser_of_8_bits_trains(base: Path, tmp_path: Path, write_rows: WriteRows) -> None:
    run = train(
        options(base, write_rows("rows.jsonl", ROWS), {}, optim="adamw_8bit", max_steps=8, logging_steps=1),
        output=tmp_path / "run",
    )
    losses = [json.loads(line)["loss"] for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - 0.1


def test_section_without_bitsandbytes_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"model_id": "a/b", "train_path": "x", "lora_config": {}, "quantisation": {"load_in": "4bit"}}
    monkeypatch.setattr("loradock_train.quantised.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"quantisation needs bitsandbytes.*loradock\[quantised\]"):
        check_machine(TrainConfig.model_validate(values))
