"""The gate: what becomes of a checkpoint on a given base and engine, with every reason at once.

    shared      hot-swapped on the base's engine; reasons are only remarks
    dedicated   an engine of its own; the reasons say why it cannot be swapped
    rejected    not served at all; the reasons say what to change

Pure but for reading tensor values. Does not know names, versions or where the files came from.
"""

from dataclasses import dataclass
from typing import Any, Literal

from loradock_adapters.base import BaseModel
from loradock_adapters.checkpoint import Checkpoint, Kind
from loradock_adapters.engine_rules import EngineLimits
from loradock_adapters.findings import Findings
from loradock_adapters.gate_full import judge_full
from loradock_adapters.gate_lora import judge_lora
from loradock_adapters.problems import Problem
from loradock_adapters.values import can_scan, scan_values

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
    check_values: bool | None = None,
    found: Findings | None = None,
) -> Verdict:
    """The verdict on a checkpoint.

    Without a base (an offline inspection) what hangs on it is left open, and said so. `check_values` reads the tensors'
    values as well: by default where numpy is there, as on the server. `found` is what a repair has to say of it.
    """
    findings = Findings(list(checkpoint.problems))
    if found is not None:
        findings.add(found)
    if checkpoint.kind == "lora":
        rank = judge_lora(checkpoint, base, limits, findings)
    else:
        judge_full(checkpoint, findings)
        rank = None
    _judge_values(checkpoint, findings, can_scan() if check_values is None else check_values)
    placement: Placement = "shared" if checkpoint.kind == "lora" else "dedicated"
    if findings.detours:
        placement = "dedicated"
    if findings.refusals:
        placement = "rejected"
    return Verdict(checkpoint.kind, placement, findings.reasons, rank)


def _judge_values(checkpoint: Checkpoint, findings: Findings, wanted: bool) -> None:
    """NaN and infinity anywhere are refused; an adapter whose every B is zero changes nothing, which is remarked."""
    if not wanted:
        return
    zero: set[str] = set()
    for name, tensors in checkpoint.shards.items():
        scan = scan_values(checkpoint.directory / name, tensors)
        zero |= scan.zero
        if scan.not_finite:
            findings.refuse_all(
                "not_finite",
                "holds NaN or infinity",
                [f"{name}: {tensor}" for tensor in scan.not_finite],
                "the training run diverged: lower the learning rate, and publish an earlier checkpoint",
            )
    second_factors = [name for name in checkpoint.tensors if "lora_B" in name or "lora_embedding_B" in name]
    if second_factors and zero.issuperset(second_factors):
        findings.remark("changes_nothing", "every B matrix is zero: this adapter answers as the base does")
