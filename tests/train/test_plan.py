"""Plans of models: the count of activations against a real pass, and the whole against what real steps allocate."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from typer.testing import CliRunner

from loradock_adapters.errors import UsageError
from loradock_testing.rows import WriteRows
from loradock_testing.tiny_models import make_llama
from loradock_train import load_config, train
from loradock_train.before import load_data, prepare_model
from loradock_train.blueprint import blueprint
from loradock_train.calibrate import calibrate
from loradock_train.model import base_config
from loradock_train.peak import PeakMeter, available_bytes
from loradock_train.plan import memory_of
from loradock_train.plan_facts import facts_of
from loradock_train.planning import plan_lines, plan_of_config, warnings_of
from loradock_train.rows import read_rows
from loradock_train.shared import Alone
from loradock_train.tokenizer import make_tokenizer

HEAD = {
    "task": {"kind": "sequence_classification", "labels": ["a", "b", "c"]},
    "valid_path": "rows.jsonl",
    "eval_batch_size_per_device": 8,
}
HEAD_ROWS = [{"text": f"def f{i}():", "label": "abc"[i % 3]} for i in range(8)]
IN_BF16 = {"mixed_precision": "bf16", "dtype": "bfloat16"}
ROWS = [{"prompt": f"def f{i}():", "completion": f" return {i}"} for i in range(8)]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that its tensors outweigh what a step allocates besides."""
    return make_llama(tmp_path_factory.mktemp("wide") / "wide", hidden=128, layers=3)


def write_config(folder: Path, base: Path, **values: Any) -> Path:
    rows = HEAD_ROWS if "task" in values else ROWS
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"model_id": str(base), "train_path": "rows.jsonl", "context_length": 64, "max_steps": 2, **values}
    given = {"mixed_precision": "no", "padding": "max_length", "learning_rate": 0.01, **given}
    path = folder / "run.yaml"
    path.write_text(json.dumps(given))
    return path


def most_live_bytes(profiled: Any) -> int:
    """The most that stood at one moment, of what was allocated in the profiled block."""
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def held_bytes(model: torch.nn.Module) -> int:
    """Of all weights, with what bitsandbytes keeps beside those that it has made small."""
    held: dict[int, torch.Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        state: Any = getattr(tensor, "quant_state", None)
        scales = [] if state is None else [state.absmax, *([state.state2.absmax] if state.nested else [])]
        beside = getattr(tensor, "SCB", None)
        for each in (tensor, *scales, *([] if beside is None else [beside])):
            held[each.untyped_storage()._cdata] = each
    return sum(each.untyped_storage().nbytes() for each in held.values())


@pytest.mark.parametrize(
    "values",
    [
        {"lora_config": {"r": 8}},
        {"lora_config": {"r": 8, "target_modules": ["q_proj", "lm_head"], "lora_dropout": 0.1}},
        {},
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2, "train_batch_size_per_device": 2},
        {"valid_path": "rows.jsonl", "eval_batch_size_per_device": 8},
        {**HEAD, "lora_config": {"r": 8}},
        HEAD,
        {**HEAD, "gradient_checkpointing": True, "eval_batch_size_per_device": 64},
        {"lora_config": {"r": 8}, "quantisation": {"load_in": "4bit"}},
        {"lora_config": {"r": 8}, "quantisation": {"load_in": "4bit", "double_quant": True}, "mixed_precision": "bf16"},
        {"lora_config": {"r": 8}, "quantisation": {"load_in": "4bit"}, "gradient_checkpointing": True, **IN_BF16},
        {"lora_config": {"r": 8}, "quantisation": {"load_in": "8bit"}},
        {"lora_config": {"r": 8}, "quantisation": {"load_in": "8bit"}, **IN_BF16},
    ],
    ids=[
        *("lora", "head", "full", "checkpointing", "accumulation", "validation"),
        *("new head, lora", "new head, full", "new head, checkpointing"),
        *("4 bits", "4 bits, bf16", "4 bits, bf16 base, checkpointing", "8 bits", "8 bits, bf16 base"),
    ],
)
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_planned_memory_is_within_a_third_of_what_steps_allocate(
    wide: Path, tmp_path: Path, values: dict[str, Any]
) -> None:
    given = {"train_batch_size_per_device": 8, **values}
    config, _ = load_config(write_config(tmp_path, wide, **given))
    rows = read_rows(config.train_path, config.format, "train_path")
    tokenizer = make_tokenizer(config, rows)
    data = load_data(config, rows, tokenizer)
    facts = facts_of(config, blueprint(config, tokenizer), data)
    assert facts is not None
    precision, model, _ = prepare_model(config, base_config(config), tokenizer, data, Alone())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        measured = calibrate(config, model, tokenizer, data, precision, PeakMeter.start())
    assert facts.weights_bytes == pytest.approx(held_bytes(model), rel=0.05)
    planned = memory_of(facts).peak_bytes
    allocated = facts.weights_bytes + most_live_bytes(profiled)
    assert 0.75 <= planned / allocated <= 1.33, f"planned {planned}, allocated {allocated}"
    assert measured.step_seconds > 0
    assert (measured.eval_batch_seconds is not None) == ("valid_path" in values)
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items()), "the steps change nothing"


def test_plan_command_prints_and_writes_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import typer

    from loradock_train.commands.train import train as command

    app = typer.Typer()
    app.command()(command)
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path, base, lora_config={"r": 4}, price_per_hour=2)
    result = CliRunner().invoke(app, [str(config), "--plan"])
    assert result.exit_code == 0, result.output
    assert "gradients" in result.stdout
    assert "peak of three real steps" in result.stdout
    assert "cost: " in result.stdout
    assert not (tmp_path / "runs").exists()
    document = json.loads(CliRunner().invoke(app, [str(config), "--plan", "--json"]).stdout)
    assert document["fits"] is True
    assert document["batch"] == {"rows": 8, "tokens": 64}
    assert document["calibrated"]["step_seconds"] > 0


def test_plan_of_several_devices_is_that_of_one_process_with_the_steps_of_all(base: Path, tmp_path: Path) -> None:
    config = write_config(
        tmp_path, base, max_steps=None, num_epochs=3, train_batch_size_per_device=2, valid_path="rows.jsonl"
    )
    alone, pair, four = (
        plan_of_config(config), plan_of_config(config, ["num_devices=2"]), plan_of_config(config, ["num_devices=2"], 2)
    )  # fmt: skip
    assert [found.steps for found in (alone, pair, four)] == [12, 6, 3]
    assert [found.measured is None for found in (alone, pair, four)] == [False, True, True]
    assert alone.memory is not None
    assert pair.memory is not None
    assert pair.memory.exchange == alone.memory.gradients > 0
    assert pair.memory.training_peak == alone.memory.training_peak + pair.memory.exchange
    assert pair.seconds is None
    lines = list(plan_lines(pair))
    assert lines[0].startswith("memory of batches of 2 x 64 tokens in each of 2 processes")
    assert "time: not known: steps of several processes are not tried beforehand (6 of them)" in lines
    if not torch.cuda.is_available():
        assert (pair.available_bytes or 0) < 0.7 * (alone.available_bytes or 0), "RAM is shared by both"


def test_plan_of_a_stream_takes_the_widest_batch_and_its_steps_from_max_steps(base: Path, tmp_path: Path) -> None:
    common = {"padding": "longest", "train_batch_size_per_device": 4, "valid_path": "rows.jsonl", "max_steps": 25}
    whole = plan_of_config(write_config(tmp_path, base, **common))
    stream = plan_of_config(write_config(tmp_path, base, **common, streaming=True))
    assert (whole.facts, stream.facts) != (None, None)
    assert whole.facts is not None
    assert stream.facts is not None
    assert whole.facts.tokens < 64, "the longest row is known"
    assert (stream.facts.rows, stream.facts.tokens) == (4, 64), "it is not: context_length is the most"
    assert stream.steps == 25
    assert stream.eval_batches == 9, "every ceil(25 / 10) steps, as the run itself, a batch of all eight rows"
    assert stream.measured is not None
    assert stream.seconds is not None
    assert stream.seconds >= 25 * stream.measured.step_seconds


def test_plan_of_a_stream_without_a_number_of_steps_tells_the_time_of_one(base: Path, tmp_path: Path) -> None:
    found = plan_of_config(write_config(tmp_path, base, streaming=True, max_steps=None, num_epochs=2))
    assert (found.steps, found.seconds) == (None, None)
    assert any("s a step; how many a stream has is not known before it was read" in line for line in plan_lines(found))
    timed = plan_of_config(write_config(tmp_path, base, streaming=True, max_steps=None, max_time_s=90.0))
    assert timed.seconds == 90.0


def test_plan_of_a_sweep_is_that_of_its_adapters(base: Path, tmp_path: Path) -> None:
    sweep = [{"name": "small", "r": 2}, {"name": "large", "r": 64}]
    found = plan_of_config(write_config(tmp_path, base, lora_config={"r": 4}, sweep=sweep))
    alone = plan_of_config(write_config(tmp_path, base, lora_config={"r": 64}))
    assert list(found.legs) == ["small", "large"]
    assert found.memory == alone.memory, "one base, one adapter and its optimiser at a time"
    small, large = found.legs.values()
    assert (small.memory or alone.memory) != large.memory
    assert found.steps == 2 * (alone.steps or 0)
    assert found.seconds == (small.seconds or 0) + (large.seconds or 0) > 0
    assert found.disk_bytes < small.disk_bytes + large.disk_bytes
    told = [line for line in plan_lines(found) if line.startswith("  peak of")]
    assert [line.split()[2] for line in told] == ["training", "small", "large", "three"]


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_plan_of_a_new_head_knows_that_the_whole_model_is_exported(
    base: Path, tmp_path: Path, lora: dict[str, Any] | None
) -> None:
    config = write_config(tmp_path, base, lora_config=lora, **HEAD)
    planned, run = plan_of_config(config), train(config, output=tmp_path / "run")
    assert planned.measured is not None
    assert planned.measured.eval_batch_seconds is not None
    assert planned.memory is not None
    assert run.summary["plan"]["memory"] == asdict(planned.memory)
    assert planned.checkpoint_bytes == pytest.approx(_tensor_bytes(run.checkpoint), rel=0.01)


def test_run_in_few_bits_records_its_plan(base: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"lora_config": {"r": 4}, "quantisation": {"load_in": "4bit"}}
    whole = plan_of_config(write_config(tmp_path, base, lora_config={"r": 4}))
    planned = train(write_config(tmp_path, base, **values), output=tmp_path / "run").summary["plan"]
    assert whole.memory is not None
    assert 0 < planned["memory"]["weights"] < whole.memory.weights
    assert planned["memory"]["optimiser"] == whole.memory.optimiser


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"preference": {}}, "cannot count this config: preference: TRL keeps the logits of both answers"),
        ({"fsdp": {}, "num_devices": 2}, "cannot count this config: fsdp: what each process holds"),
    ],
)
def test_plan_that_cannot_be_says_why(base: Path, tmp_path: Path, values: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        plan_of_config(write_config(tmp_path, base, **values))


def test_run_over_a_stream_records_its_plan(base: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, base, streaming=True, lora_config={"r": 4}, valid_path="rows.jsonl", eval_steps=1)
    planned = train(config, output=tmp_path / "run").summary["plan"]
    assert planned["steps"] == 2
    assert planned["batch"] == {"rows": 16, "tokens": 64}


def test_run_records_its_plan_and_what_came_of_it(base: Path, tmp_path: Path, write_rows: WriteRows) -> None:
    run = train(write_config(tmp_path, base, lora_config={"r": 4}), output=tmp_path / "run")
    planned = json.loads((tmp_path / "run" / "run.json").read_text())["plan"]
    assert planned == run.summary["plan"]
    assert planned["peak_bytes"] == planned["memory"]["training_peak"]
    assert planned["measured_bytes"] >= 0
    assert planned["disk_bytes"] == 2 * planned["save_bytes"] + _tensor_bytes(run.checkpoint)


def _tensor_bytes(checkpoint: Path) -> int:
    from loradock_adapters.checkpoint import read_checkpoint

    return sum(info.size_bytes for info in read_checkpoint(checkpoint).tensors.values())


def test_run_that_does_not_fit_is_told_before_it_begins(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, base)
    monkeypatch.setattr("loradock_train.plan_facts.available_bytes", lambda: 2_000_000)
    planned = plan_of_config(config)
    assert planned.fits is False
    assert planned.measured is None, "nothing was loaded"
    assert planned.adapter is not None
    assert planned.adapter.change == "lora_config: {r: 8}"
    assert "will probably not fit" in warnings_of(planned)[0]


def test_memory_of_the_device_is_known_here() -> None:
    assert (available_bytes() or 0) > 2**20


def test_peak_meter_sees_what_came_and_went() -> None:
    meter = PeakMeter.start()
    if not torch.cuda.is_available():
        size = 64 << 20
        block = torch.ones(size // 4)
        del block
        assert meter.growth_bytes() >= 0.9 * size


def test_peak_is_that_of_the_process_and_not_of_the_one_that_started_it() -> None:
    ballast = b"x" * 2**30
    program = "from loradock_train.peak import peak_bytes; print(peak_bytes())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < len(ballast)
