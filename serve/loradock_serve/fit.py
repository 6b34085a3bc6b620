"""Whether a version that was published once can be served today: the base, or the engine's limits, may be others now.

Pure, from what the registry says of the version; nothing is read or stored, so going back to the old base or limit
brings everything back. What was not judged with this base is not guessed about: pushing it again judges it anew.
"""

from dataclasses import dataclass, replace

from loradock_adapters.base_identity import BaseIdentity
from loradock_adapters.engine_rules import EngineLimits
from loradock_adapters.gate import Placement
from loradock_adapters.problems import Problem
from loradock_adapters.registry import Version


@dataclass(frozen=True)
class Fit:
    """This server, as far as versions depend on it."""

    base: BaseIdentity
    limits: EngineLimits | None
    """None where the engine is another's, whose limits are not known."""

    def __call__(self, version: Version) -> Version:
        """The version with today's placement and reasons; placement `rejected`: it does not fit."""
        if version.kind == "full":  # needs no base
            return version
        if version.base is not None and not version.base.is_same(self.base):
            return _placed(version, "rejected", self._other_base(version.base))
        if version.placement == "shared" and self.limits is not None:
            return _within(version, self.limits)
        return version

    def _other_base(self, base: BaseIdentity) -> Problem:
        return Problem(
            "other_base",
            f"published for the base {base}, this server's is {self.base}",
            fix="push it again to have it judged for this base, or serve the base that it was published for",
        )


def _within(version: Version, limits: EngineLimits) -> Version:
    if not limits.enable_lora:
        return _placed(version, "dedicated", Problem("engine_without_lora", "the base's engine runs without LoRA"))
    if version.rank is not None and version.rank > limits.max_lora_rank:
        message = f"rank {version.rank} is over the engine's max_lora_rank {limits.max_lora_rank}"
        return _placed(
            version, "dedicated", Problem("rank_over_limit", message, fix="raise engine.max_lora_rank again")
        )
    return version


def _placed(version: Version, placement: Placement, why: Problem) -> Version:
    return replace(version, placement=placement, reasons=(why, *version.reasons))
