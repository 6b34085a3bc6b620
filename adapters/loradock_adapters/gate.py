"""The gate: what becomes of a checkpoint on a given base and engine, with every reason at once.

    shared      hot-swapped on the base's engine; reasons are only remarks
    dedicated   an engine of its own; the reasons say why it cannot be swapped
    rejected    not served at all; the reasons say what to change

Pure but for reading tensor values. Does not know names, versions or where the files came from.
"""

from dataclasses import dataclass
from typing import Any, Literal

from loradock_adapters.base import BaseModel
from loradock_adapters.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Checkpoint, Kind
from loradock_adapters.engine_rules import EngineLimits
from loradock_adapters.findings import Findings
from loradock_adapters.gate_full import judge_full
from loradock_adapters.gate_lora import judge_lora
from loradock_adapters.gate_passport import judge_passport
from loradock_adapters.lora_keys import FACTORS, parse_key
from loradock_adapters.problems import Problem
from loradock_adapters.values import scan_values

__all__ = ["EngineLimits", "Placement", "Problem", "Verdict", "judge"]

Placement = Literal["shared", "dedicated", "rejected"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a checkpoint, and why."""

    kind: Kind
    placement: Placement
    reasons: tuple[Problem, ...]
    """Why it was rejected, then why it is dedicated, then remarks."""
    rank: int | None
    """The largest rank of an adapter's modules; None for full models."""

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "placement": self.placement,
            "rank": self.rank,
            "reasons": [reason.to_json() for reason in self.reasons],
        }


def judge(
    checkpoint: Checkpoint,
    base: BaseModel | None,
    limits: EngineLimits,
    *,
    check_values: bool = True,
    force: bool = False,
    found: Findings | None = None,
) -> Verdict:
    """The verdict on a checkpoint.

    Without a base (an offline inspection) what hangs on it is left open, and said so. `check_values` reads the tensors'
    values as well. With `force` an adapter that changes nothing, or whose passport names another base, is remarked on
    and not refused. `found` is what a repair has to say of it.
    """
    findings = Findings(list(checkpoint.problems))
    if found is not None:
        findings.add(found)
    if checkpoint.kind == "lora":
        rank = judge_lora(checkpoint, base, limits, findings)
    else:
        judge_full(checkpoint, findings)
        rank = None
    zero = _judge_values(checkpoint, findings) if check_values else frozenset()
    if checkpoint.kind == "lora":
        _judge_effect(checkpoint, zero, findings, force)
    judge_passport(checkpoint, base, findings, force=force)
    placement: Placement = "shared" if checkpoint.kind == "lora" else "dedicated"
    if findings.detours:
        placement = "dedicated"
    if findings.refusals:
        placement = "rejected"
    return Verdict(checkpoint.kind, placement, findings.reasons, rank)


def _judge_values(checkpoint: Checkpoint, findings: Findings) -> frozenset[str]:
    """NaN and infinity anywhere are refused. Returns the tensors that are zero throughout."""
    zero: set[str] = set()
    for name, tensors in checkpoint.shards.items():
        scan = scan_values(checkpoint.directory / name, tensors)
        zero |= scan.zero
        places = [f"{name}: {tensor}" for tensor in scan.not_finite]
        findings.refuse_all("not_finite", "holds NaN or infinity", places)
    return frozenset(zero)


def _judge_effect(checkpoint: Checkpoint, zero: frozenset[str], findings: Findings, force: bool) -> None:
    """An adapter whose every product of factors is zero answers as the base does; seldom what was meant."""
    keys = [parse_key(tensor) for tensor in checkpoint.tensors]
    factors = [key for key in keys if key.part in FACTORS]
    if not factors or len(factors) != len([key for key in keys if key.part != "base_layer"]):
        return  # what else is inside (a bias, a whole matrix) changes something
    at_work = {key.module for key in factors} - {key.module for key in factors if key.tensor in zero}
    no_scale = checkpoint.config.get("lora_alpha") == 0 and not checkpoint.config.get("alpha_pattern")
    if at_work and not no_scale:
        return
    message = "lora_alpha is zero" if no_scale else "every module's B (or A) matrix is zero"
    where = f"{ADAPTER_CONFIG}: lora_alpha" if no_scale else ADAPTER_WEIGHTS
    message += ": this adapter answers as the base does"
    if force:
        findings.remark("changes_nothing", message, where)
    else:
        findings.refuse("changes_nothing", message, where)
