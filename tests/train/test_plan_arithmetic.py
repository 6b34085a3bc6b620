"""Plans by arithmetic alone, against numbers worked out by hand."""

from dataclasses import replace
from typing import Any

import pytest

from loradock_train.config_quantisation import QuantisationOptions
from loradock_train.plan import (
    Facts,
    Measured,
    Plan,
    activation_bytes,
    logit_bytes,
    memory_of,
    of_sweep,
    optimiser_bytes,
    remedies,
    with_rows,
)
from loradock_train.planning import warnings_of
from loradock_train.quantised import quantised_bytes

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
        "eval_batches": 10, "max_time_s": None, "save_bytes": 1, "disk_bytes": 1, "price_per_hour": 3.6,
        "checkpoint_bytes": 0, **values,
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


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"load_in": "4bit"}, 100 * 64 // 2 + 4 * 100),  # half a byte each, and a scale of four bytes for each 64
        ({"load_in": "4bit", "double_quant": True}, 100 * 64 // 2 + 100 + 4),  # scales of a byte, and one of theirs
        ({"load_in": "8bit"}, 100 * 64 + 4 * 100),  # a byte each, and a scale for each row
    ],
)
def test_weight_in_few_bits(values: dict[str, Any], expected: int) -> None:
    assert quantised_bytes((100, 64), QuantisationOptions.model_validate(values)) == expected


def test_step_holds_one_weight_of_few_bits_in_whole() -> None:
    assert memory_of(replace(FULL, unpacked_bytes=777)).training_peak == memory_of(FULL).training_peak + 777


def test_sweep_needs_the_memory_of_its_largest_and_the_time_and_checkpoints_of_all() -> None:
    small = plan(10**9, checkpoint_bytes=7, disk_bytes=27, measured=Measured(5, 1.0, None))
    large = plan(10**9, checkpoint_bytes=9, disk_bytes=99, steps=50, measured=Measured(50, 2.0, None))
    whole = of_sweep({"small": small, "large": large})
    assert (whole.peak_bytes, whole.steps, whole.eval_batches) == (50, 150, 20)
    assert (whole.seconds, whole.disk_bytes) == (100 * 1.0 + 50 * 2.0, 7 + 9 + 90)
    assert whole.price == pytest.approx(0.2)
    assert of_sweep({"small": small, "open": replace(large, steps=None)}).seconds is None
    assert list(whole.to_json()["legs"]) == ["small", "large"]


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
