"""Plans: the arithmetic against numbers worked out by hand, the count of activations against a real pass, and the
whole against what real steps allocate."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from typer.testing import CliRunner

from loradock_testing.rows import WriteRows
from loradock_testing.tiny_models import make_llama
from loradock_train import load_config, train
from loradock_train.before import load_data, prepare_model
from loradock_train.blueprint import blueprint
from loradock_train.calibrate import calibrate
from loradock_train.model import base_config
from loradock_train.peak import PeakMeter, available_bytes
from loradock_train.plan import (
    Facts,
    Measured,
    Plan,
    activation_bytes,
    logit_bytes,
    memory_of,
    optimiser_bytes,
    remedies,
    with_rows,
)
from loradock_train.plan_facts import facts_of
from loradock_train.planning import plan_lines, plan_of_config, warnings_of
from loradock_train.rows import read_rows
from loradock_train.shared import Alone
from loradock_train.tokenizer import make_tokenizer

ROWS = [{"prompt": f"def f{i}():", "completion": f" return {i}"} for i in range(8)]

# A float32 model of 1,000 parameters, all trained; batches of 4 x 16 tokens; V 128, D 8.
FULL = Facts(
    weights_bytes=4000, trained=1000, trained_bytes=4000, factored=60, optim="adamw_torch_fused", rows=4, tokens=16,
    eval_rows=0, kept_bytes=80_000, largest_bytes=1000, hidden_bytes=2048, layers=4, vocabulary=128, width=8,
    compute_bytes=4, weight_bytes=4, trains_head=False, adapts_head=False, checkpointing=False, accumulation=1,
)  # fmt: skip
LOGITS = 64 * 128 * 8 + 2 * 64 * 8 * 4
"""All 64 tokens in one chunk: logits and slopes in float32; hidden states and their gradients."""


# ---- by hand --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optim", "expected"),
    [
        ("adamw_torch_fused", 8000),  # two moments in the weights' type
        ("adamw_8bit", 2000 + 2 * 4 * 4),  # a byte each, and four blocks of 256 with a scale each
        ("paged_adamw_8bit", 2032),
        ("adafactor", 240),
        ("sgd", 0),
    ],
)
def test_optimiser_state(optim: str, expected: int) -> None:
    assert optimiser_bytes(replace(FULL, optim=optim)) == expected


def test_full_parameter_peak_is_activations_over_weights_and_moments() -> None:
    memory = memory_of(FULL)
    assert (memory.weights, memory.gradients, memory.optimiser) == (4000, 4000, 8000)
    assert memory.activations == 80_000 + 2 * 1000
    assert memory.logits == LOGITS
    assert memory.training_peak == 4000 + 8000 + 82_000 + LOGITS
    assert memory.evaluation_peak == 0


def test_gradients_stand_beside_activations_with_accumulation() -> None:
    once, several = memory_of(FULL), memory_of(replace(FULL, accumulation=4))
    assert several.training_peak - once.training_peak == 4000


def test_large_gradients_are_the_peak_where_activations_are_small() -> None:
    memory = memory_of(replace(FULL, kept_bytes=0, largest_bytes=0, rows=1, tokens=1, trained_bytes=400_000))
    assert memory.training_peak == 4000 + 800_000 + 400_000


def test_lora_has_moments_and_gradients_of_the_adapter_alone() -> None:
    memory = memory_of(replace(FULL, weights_bytes=4200, trained=50, trained_bytes=200))
    assert (memory.weights, memory.gradients, memory.optimiser) == (4200, 200, 400)


def test_checkpointing_keeps_one_layer_and_the_hidden_states_between() -> None:
    assert activation_bytes(replace(FULL, checkpointing=True)) == 4 * 2048 + 80_000 // 4 + 2 * 1000


def test_mixed_precision_adds_copies_of_the_trained_weights() -> None:
    memory = memory_of(replace(FULL, compute_bytes=2))
    assert memory.activations == 82_000 + 1000 * 2
    assert memory.logits == 64 * 128 * 6 + 2 * 64 * 8 * 2 + 128 * 8 * 2, "and a copy of the head"


def test_chunked_loss_never_holds_all_logits() -> None:
    many = logit_bytes(replace(FULL, vocabulary=2**17), 4096)
    assert many == 64 * 2**17 * 8 + 2 * 4096 * 8 * 4
    assert logit_bytes(replace(FULL, vocabulary=2**17, own_loss=False), 4096) == 4096 * 2**17 * 12


def test_first_validation_can_be_the_peak() -> None:
    memory = memory_of(replace(FULL, eval_rows=64, own_loss=False))
    assert memory.evaluation == 16 * (80_000 // 4 + 2000) + 64 * 16 * 128 * 8
    assert memory.peak_bytes == memory.evaluation_peak > memory.training_peak


def plan(available: int, **values: Any) -> Plan:
    given: dict[str, Any] = {
        "memory": memory_of(FULL), "facts": FULL, "device": "cpu", "available_bytes": available, "steps": 100,
        "eval_batches": 10, "max_time_s": None, "save_bytes": 1, "disk_bytes": 1, "price_per_hour": 3.6, **values,
    }  # fmt: skip
    return Plan(**given)


def test_plan_that_does_not_fit_says_what_would() -> None:
    tight = plan(100_000)
    assert tight.fits is False
    changes = [remedy.change for remedy in tight.remedies()]
    assert changes[0] == "train_batch_size_per_device: 2, gradient_accumulation_steps: 2"
    assert "gradient_checkpointing: true" not in changes
    assert all(remedy.peak_bytes <= 100_000 for remedy in tight.remedies())
    assert memory_of(with_rows(FULL, 2, 2)).peak_bytes == tight.remedies()[0].peak_bytes
    told = warnings_of(tight)
    assert "it will probably not fit" in told[0]
    assert "train_batch_size_per_device: 2" in told[1]
    assert len(list(remedies(FULL))) == 5


def test_several_processes_hold_a_copy_of_the_gradients_besides() -> None:
    alone, together = memory_of(FULL), memory_of(replace(FULL, processes=2, eval_rows=4))
    assert (alone.exchange, together.exchange) == (0, 4000)
    assert together.training_peak == alone.training_peak + 4000
    assert together.evaluation_peak == memory_of(replace(FULL, eval_rows=4)).evaluation_peak + 4000


def test_hopeless_plan_says_so() -> None:
    assert "take a smaller base" in warnings_of(plan(10))[1]


def test_plan_that_fits_says_nothing() -> None:
    assert plan(10**9).fits is True
    assert warnings_of(plan(10**9)) == []


def test_time_and_price_follow_from_measured_steps_and_are_not_guessed_without() -> None:
    assert plan(10**9).seconds is None
    assert plan(10**9).price is None
    timed = plan(10**9, measured=Measured(peak_bytes=5, step_seconds=2.0, eval_batch_seconds=0.5))
    assert timed.seconds == 100 * 2.0 + 10 * 0.5
    assert timed.price == pytest.approx(0.205)
    assert timed.peak_bytes == 5
    assert plan(10**9, max_time_s=60.0, measured=timed.measured).seconds == 60.0


# ---- on models ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that its tensors outweigh what a step allocates besides."""
    return make_llama(tmp_path_factory.mktemp("wide") / "wide", hidden=128, layers=3)


def write_config(folder: Path, base: Path, **values: Any) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
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


@pytest.mark.parametrize(
    "values",
    [
        {"lora_config": {"r": 8}},
        {"lora_config": {"r": 8, "target_modules": ["q_proj", "lm_head"], "lora_dropout": 0.1}},
        {},
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2, "train_batch_size_per_device": 2},
        {"valid_path": "rows.jsonl", "eval_batch_size_per_device": 8},
    ],
    ids=["lora", "head", "full", "checkpointing", "accumulation", "validation"],
)
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
