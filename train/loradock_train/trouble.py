"""What to do when a run goes wrong, in numbers: memory that does not suffice, a loss that does not fall or is no
number, steps that could be quicker. Pure policy: facts in, texts out; watch.py and trainer.py collect the facts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

CHECKED_LOGS = (20, 40, 80, 160)
"""Numbers of logged losses at which it is asked whether they fall."""
NO_FALL = -1.645
"""z of the Mann-Kendall test above which a fall is not significant (one-sided, 5 %)."""
RISE = 2.326
"""z from which a rise is (1 %)."""
LEARNT_ENOUGH = 0.05
"""Nats per token under which a loss need not fall."""
ACTIVATION_BYTES = 34
"""Of a layer, for each token and hidden unit in 16 bits, without attention scores (arXiv 2205.05198, section 4)."""
CHECKPOINT_BYTES = 2
GB = 1e9


@dataclass(frozen=True)
class Facts:
    """What memory is needed for."""

    batch: int
    accumulation: int
    context_length: int
    trainable: int
    total: int
    layers: int
    hidden: int
    weight_bytes: int
    """Of a weight in memory."""
    activation_bytes: int
    """Of a number in the arithmetic."""
    optim: str
    kind: str
    checkpointing: bool
    has_gpu: bool

    @property
    def activations(self) -> float:
        """Bytes, estimated."""
        units = self.batch * self.context_length * self.layers * self.hidden
        per_unit = CHECKPOINT_BYTES if self.checkpointing else ACTIVATION_BYTES
        return units * per_unit * self.activation_bytes / 2

    @property
    def optimiser(self) -> float:
        """Bytes of its state, estimated."""
        if "8bit" in self.optim:
            return 2.0 * self.trainable
        return 8.0 * self.trainable if "adamw" in self.optim else 0.0

    @property
    def weights(self) -> float:
        """Bytes of weights and gradients."""
        return float(self.weight_bytes * (self.total + self.trainable))


def memory_advice(facts: Facts) -> list[str]:
    """What to change, the largest effect first, each with the bytes that it is estimated to save."""
    found: list[tuple[float, str]] = []
    if facts.batch > 1:
        half = facts.batch // 2
        accumulation = math.ceil(facts.accumulation * facts.batch / half)
        saved = facts.activations - replace(facts, batch=half).activations
        text = f"train_batch_size_per_device: {half} with gradient_accumulation_steps: {accumulation} (the same steps)"
        found.append((saved, text))
    if not facts.checkpointing:
        saved = facts.activations - replace(facts, checkpointing=True).activations
        found.append((saved, "gradient_checkpointing: true (about a third slower)"))
    if facts.context_length > 64:
        found.append((facts.activations / 2, f"context_length: {facts.context_length // 2}"))
    if facts.has_gpu and facts.optimiser > replace(facts, optim="adamw_8bit").optimiser:
        saved = facts.optimiser - replace(facts, optim="adamw_8bit").optimiser
        found.append((saved, "optim: adamw_8bit"))
    if facts.kind == "full":
        saved = facts.optimiser + facts.trainable * facts.weight_bytes
        found.append((saved, "lora_config: {r: 8} (an adapter instead of all weights)"))
    if facts.kind == "scratch" and facts.layers > 1:
        saved = (facts.activations + facts.weights + facts.optimiser) / 2
        found.append((saved, f"a model of {facts.layers // 2} layers"))
    found.sort(key=lambda pair: -pair[0])
    return [f"{text}: about {saved / GB:.2f} GB less" for saved, text in found]


def memory_told(facts: Facts, step: int, reason: str) -> str:
    """The message of a run that ended for want of memory."""
    needs = (
        f"weights and gradients {facts.weights / GB:.2f} GB, optimiser {facts.optimiser / GB:.2f} GB, activations "
        f"about {facts.activations / GB:.2f} GB (batch {facts.batch}, context_length {facts.context_length})"
    )
    lines = [f"out of memory at step {step}: {reason}", f"  it needs: {needs}", "  change one of:"]
    lines += [f"    {line}" for line in memory_advice(facts)]
    return "\n".join([*lines, "  or set on_out_of_memory: adapt, which halves the batch and goes on"])


# ---- the loss --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Course:
    """What a loss that does not fall may come from."""

    step: int
    learning_rate: float
    usual_rate: float
    warmup_steps: float
    """0 where the warm-up is a share of the run."""
    learnt_share: float
    """Of the tokens, those with a loss."""
    vocabulary: int


def trend(losses: Sequence[float]) -> float:
    """z of the Mann-Kendall test: under -1.645 they fall, by more than chance in 19 of 20 cases. It asks only which of
    two is larger, so that outliers and the shape of the fall do not matter."""
    count = len(losses)
    signs = sum(
        (later > earlier) - (later < earlier) for at, earlier in enumerate(losses) for later in losses[at + 1 :]
    )
    spread = math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    return (signs - (signs > 0) + (signs < 0)) / spread


def first_without_fall(losses: Sequence[float]) -> int | None:
    """After how many logged losses it was first seen that they do not fall; None where they do, or are too few."""
    for count in CHECKED_LOGS:
        begun = losses[:count]
        if len(begun) == count and sum(begun) / count > LEARNT_ENOUGH and trend(begun) > NO_FALL:
            return count
    return None


def no_fall_told(losses: Sequence[float], course: Course) -> str:
    """The notice, with the likeliest cause."""
    z = trend(losses)
    told = (
        f"the loss does not fall: {losses[0]:.3f} at first, {losses[-1]:.3f} at step {course.step} (trend z {z:+.1f}, "
    )
    return told + f"a fall is under {NO_FALL}); likely: {_cause(z, course)}"


def _cause(z: float, course: Course) -> str:
    rate, usual = course.learning_rate, course.usual_rate
    if z >= RISE:
        return f"it rises, so learning_rate {rate:g} is too high; try {rate / 10:g}, and warmup_steps"
    if course.step < course.warmup_steps:
        return f"the warm-up is not over (warmup_steps {course.warmup_steps:g}); wait, or shorten it"
    if course.learnt_share < 0.02:
        return (
            f"only {course.learnt_share:.2%} of the tokens are learnt, the others are masked; look with `loradock data`"
        )
    if rate < usual / 10:
        return f"learning_rate {rate:g} is low, {usual:g} is usual here"
    if rate > usual * 10:
        return f"learning_rate {rate:g} is high, {usual:g} is usual here; lower it, or give it more warmup_steps"
    return (
        f"the data (does each prompt decide its answer? look with `loradock data`), or learning_rate {rate:g}: try "
        f"{rate * 3:g} and {rate / 3:g}, and warmup_steps {max(100, 2 * int(course.warmup_steps))}"
    )


def not_finite_told(loss: float, step: int, rate: float, is_fp16: bool) -> str:
    """The message of a run whose loss is no number."""
    told = (
        f"the loss is {loss} at step {step}; usually the learning rate is too high (it is {rate:g} here): lower it, or "
        "give it warmup_steps"
    )
    return told + ("; fp16 overflows above 65,504, mixed_precision: bf16 does not" if is_fp16 else "")


# ---- speed -----------------------------------------------------------------------------------------------------------


def slow_advice(
    padded_share: float, is_packed: bool, by_length: bool, arithmetic: str, has_fast_bf16: bool
) -> list[str]:
    """What would be quicker. padded_share: of what the model computed, the part that was padding."""
    told = []
    if arithmetic == "no" and has_fast_bf16:
        told.append("this machine is quick at bf16, and mixed_precision is no: bf16 would be about twice as fast")
    if padded_share > 0.3 and not is_packed:
        how = "packing: true" if by_length else "group_by_length: true, or packing: true"
        told.append(f"{padded_share:.0%} of what is computed is padding; {how} would save most of it")
    return told
