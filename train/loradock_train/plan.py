"""What a run will need, as arithmetic: memory by part, disk, steps. No torch, no files, no clock.

From a few counts of the model (plan_facts.py) to bytes. Legend: N tokens with a loss at once, V vocabulary, D hidden
size.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

CHUNK_LOGITS = 2**21
"""As loss.py holds them at once."""
LEAST_CHUNK_ROWS = 64
BLOCK = 256
"""Numbers of an 8-bit optimiser's state that share one scale of four bytes."""


@dataclass(frozen=True)
class Facts:
    """What the arithmetic goes by. `rows` x `tokens` is the largest batch."""

    weights_bytes: int
    """Of all parameters, as they lie in memory."""
    trained: int
    """Parameters that are trained."""
    trained_bytes: int
    """The same in memory; their gradients take as much."""
    factored: int
    """Numbers that Adafactor keeps: a row and a column of each matrix."""
    optim: str
    rows: int
    tokens: int
    eval_rows: int
    """0 without validation."""
    kept_bytes: int
    """Activations of a forward pass of that batch (activations.py)."""
    largest_bytes: int
    hidden_bytes: int
    layers: int
    vocabulary: int
    width: int
    """D."""
    compute_bytes: int
    """Of a number in the arithmetic: 4, or 2 in mixed precision."""
    weight_bytes: int
    """Of a number of the weights."""
    trains_head: bool
    adapts_head: bool
    checkpointing: bool
    accumulation: int
    own_loss: bool = True
    """Whether the loss is taken in chunks (loss.py), and not from all logits at once."""
    processes: int = 1
    """That train together, each with the whole model (torch's DistributedDataParallel). All here is of one of them."""
    unpacked_bytes: int = 0
    """Of the largest weight that is kept in few bits, in whole: a step works on one of them at a time."""


@dataclass(frozen=True)
class Memory:
    """By part, in bytes. The parts do not all stand at one moment: `peak_bytes` says the most that do."""

    weights: int
    gradients: int
    optimiser: int
    activations: int
    logits: int
    evaluation: int
    training_peak: int
    evaluation_peak: int
    exchange: int = 0
    """The copy of the gradients that several processes add up in."""

    @property
    def peak_bytes(self) -> int:
        return max(self.training_peak, self.evaluation_peak)


def memory_of(facts: Facts) -> Memory:
    """The arithmetic."""
    gradients, optimiser = facts.trained_bytes, optimiser_bytes(facts)
    casts = facts.trained * facts.compute_bytes if facts.compute_bytes < facts.weight_bytes else 0
    activations = activation_bytes(facts) + casts + facts.unpacked_bytes
    logits = logit_bytes(facts, facts.rows * facts.tokens)
    evaluation = 0
    if facts.eval_rows:
        # Nothing is kept: one layer's tensors at a time.
        share = facts.eval_rows / facts.rows
        a_layer = facts.kept_bytes / max(1, facts.layers) + 2 * facts.largest_bytes
        evaluation = int(share * a_layer) + logit_bytes(facts, facts.eval_rows * facts.tokens, with_slopes=False)
    exchange = facts.trained_bytes if facts.processes > 1 else 0
    standing = facts.weights_bytes + optimiser + exchange
    head = facts.vocabulary * facts.width * facts.weight_bytes if facts.trains_head else 0
    # Gradients come as activations go; those of earlier batches of a step, and the head's, are there from the first.
    early = gradients if facts.accumulation > 1 else min(head, gradients)
    return Memory(
        weights=facts.weights_bytes,
        gradients=gradients,
        optimiser=optimiser,
        activations=activations,
        logits=logits,
        evaluation=evaluation,
        training_peak=standing + max(activations + logits + early, gradients),
        evaluation_peak=standing + evaluation if facts.eval_rows else 0,
        exchange=exchange,
    )


def optimiser_bytes(facts: Facts) -> int:
    """States of the optimiser, after its first step."""
    if "8bit" in facts.optim:
        return 2 * facts.trained + 2 * 4 * math.ceil(facts.trained / BLOCK)
    if "adafactor" in facts.optim:
        return 4 * facts.factored
    return 0 if facts.optim == "sgd" else 2 * facts.trained_bytes


def activation_bytes(facts: Facts) -> int:
    """What waits for the backward pass, and the two tensors that a step of it works on. With checkpointing: what goes
    from layer to layer, and one layer computed again."""
    working = 2 * facts.largest_bytes
    if not facts.checkpointing:
        return facts.kept_bytes + working
    return facts.layers * facts.hidden_bytes + facts.kept_bytes // max(1, facts.layers) + working


def logit_bytes(facts: Facts, tokens: int, *, with_slopes: bool = True) -> int:
    """Of the head and the loss, of N = `tokens`; without slopes: of a validation."""
    if not facts.own_loss:
        return tokens * facts.vocabulary * (facts.compute_bytes + (8 if with_slopes else 4))
    at_once = min(tokens, max(LEAST_CHUNK_ROWS, CHUNK_LOGITS // facts.vocabulary))
    copies = 12 if facts.adapts_head else 4 + facts.compute_bytes  # logits in float32, their slopes; a graph of them
    states = tokens * facts.width * facts.compute_bytes
    cast = facts.vocabulary * facts.width * facts.compute_bytes if facts.compute_bytes < facts.weight_bytes else 0
    return at_once * facts.vocabulary * copies + states * (2 if with_slopes else 1) + cast


def with_rows(facts: Facts, rows: int, accumulation: int) -> Facts:
    """The same run with other batches: activations go by the rows."""
    share = rows / facts.rows
    return replace(
        facts,
        rows=rows,
        eval_rows=min(facts.eval_rows, rows),
        accumulation=accumulation,
        kept_bytes=math.ceil(facts.kept_bytes * share),
        largest_bytes=math.ceil(facts.largest_bytes * share),
        hidden_bytes=math.ceil(facts.hidden_bytes * share),
    )


@dataclass(frozen=True)
class Remedy:
    """A change that makes a run smaller."""

    change: str
    peak_bytes: int


def remedies(facts: Facts) -> Iterator[Remedy]:
    """What to change, the least first: the same steps from smaller batches, recomputed activations, both."""
    rows, steps = facts.rows, facts.accumulation
    while rows > 1:
        rows, steps = math.ceil(rows / 2), steps * 2
        batches = f"train_batch_size_per_device: {rows}"
        if facts.eval_rows > rows:
            batches += f", eval_batch_size_per_device: {rows}"
        smaller = with_rows(facts, rows, steps)
        yield Remedy(f"{batches}, gradient_accumulation_steps: {steps}", memory_of(smaller).peak_bytes)
    if not facts.checkpointing:
        again = replace(facts, checkpointing=True)
        yield Remedy("gradient_checkpointing: true", memory_of(again).peak_bytes)
        if facts.rows > 1:
            least = with_rows(again, 1, facts.accumulation * facts.rows)
            change = f"the same and train_batch_size_per_device: 1, gradient_accumulation_steps: {least.accumulation}"
            yield Remedy(change, memory_of(least).peak_bytes)
    if "adamw" in facts.optim and "8bit" not in facts.optim:
        yield Remedy("optim: adamw_8bit", memory_of(replace(facts, optim="adamw_8bit")).peak_bytes)


@dataclass(frozen=True)
class Measured:
    """Three real steps and one batch of validation, on this device."""

    peak_bytes: int
    step_seconds: float
    """A whole optimiser step."""
    eval_batch_seconds: float | None


@dataclass(frozen=True)
class Plan:
    """Everything that is told before a run."""

    memory: Memory | None
    """None where the architecture's activations cannot be counted."""
    facts: Facts | None
    device: str
    available_bytes: int | None
    steps: int | None
    """None where the clock ends the run."""
    eval_batches: int
    """Of all validations of the run."""
    max_time_s: float | None
    save_bytes: int
    checkpoint_bytes: int
    disk_bytes: int
    """Saves that are kept, one that is being written, and the checkpoint."""
    price_per_hour: float | None
    measured: Measured | None = None
    adapter: Remedy | None = None
    """The same as a LoRA run; None where it is one, or fits."""
    legs: Mapping[str, "Plan"] = field(default_factory=dict)
    """Of a sweep: the plan of each adapter, by its name; the rest is of all of them."""

    @property
    def peak_bytes(self) -> int | None:
        """As measured, where it was; else by the arithmetic."""
        if self.measured is not None:
            return self.measured.peak_bytes
        return None if self.memory is None else self.memory.peak_bytes

    @property
    def fits(self) -> bool | None:
        """None where either is not known."""
        if self.peak_bytes is None or self.available_bytes is None:
            return None
        return self.peak_bytes <= self.available_bytes

    @property
    def seconds(self) -> float | None:
        """Of training; None where no step was timed. A device that was not timed has no speed here."""
        if self.legs:
            each = [leg.seconds for leg in self.legs.values()]
            return None if None in each else sum(seconds for seconds in each if seconds is not None)
        if self.measured is None or self.steps is None:
            return self.max_time_s
        evaluations = self.eval_batches * (self.measured.eval_batch_seconds or 0.0)
        whole = self.steps * self.measured.step_seconds + evaluations
        return whole if self.max_time_s is None else min(whole, self.max_time_s)

    @property
    def price(self) -> float | None:
        if self.seconds is None or self.price_per_hour is None:
            return None
        return self.seconds / 3600 * self.price_per_hour

    def remedies(self) -> list[Remedy]:
        """Changes with which it would fit."""
        if self.facts is None or self.fits is not False:
            return []
        assert self.available_bytes is not None
        # The arithmetic is taken by the factor that the measurement found it wrong by.
        assert self.memory is not None
        factor = self.peak_bytes / self.memory.peak_bytes if self.peak_bytes else 1.0
        known = [*remedies(self.facts), *([self.adapter] if self.adapter is not None else [])]
        found = [replace(each, peak_bytes=int(each.peak_bytes * factor)) for each in known]
        return [each for each in found if each.peak_bytes <= self.available_bytes]

    def to_json(self) -> dict[str, Any]:
        """As run.json holds it."""
        return {
            "memory": None if self.memory is None else asdict(self.memory),
            "peak_bytes": self.peak_bytes,
            "available_bytes": self.available_bytes,
            "fits": self.fits,
            "device": self.device,
            "batch": None if self.facts is None else {"rows": self.facts.rows, "tokens": self.facts.tokens},
            "processes": 1 if self.facts is None else self.facts.processes,
            "steps": self.steps,
            "seconds": self.seconds,
            "save_bytes": self.save_bytes,
            "disk_bytes": self.disk_bytes,
            "price": self.price,
            "calibrated": None if self.measured is None else asdict(self.measured),
            "remedies": [asdict(remedy) for remedy in self.remedies()],
            **({"legs": {name: leg.to_json() for name, leg in self.legs.items()}} if self.legs else {}),
        }


def of_sweep(legs: Mapping[str, Plan]) -> Plan:
    """Adapters one after the other on one base: the memory of the largest, the steps and checkpoints of all, and the
    saves of one at a time."""
    largest = max(legs.values(), key=lambda leg: leg.peak_bytes or 0)
    steps = [leg.steps for leg in legs.values()]
    saves = [leg.disk_bytes - leg.checkpoint_bytes for leg in legs.values()]
    return replace(
        largest,
        steps=None if None in steps else sum(number for number in steps if number is not None),
        eval_batches=sum(leg.eval_batches for leg in legs.values()),
        save_bytes=max(leg.save_bytes for leg in legs.values()),
        checkpoint_bytes=sum(leg.checkpoint_bytes for leg in legs.values()),
        disk_bytes=sum(leg.checkpoint_bytes for leg in legs.values()) + max(saves),
        legs=dict(legs),
    )
