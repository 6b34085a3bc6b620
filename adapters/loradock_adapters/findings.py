"""Where the gate's checks put what they find, so that none of them stops the others."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from loradock_adapters.problems import Problem

_MAX_REASONS = 50


@dataclass
class Findings:
    """Refusals outweigh detours, detours outweigh remarks."""

    refusals: list[Problem] = field(default_factory=list)
    detours: list[Problem] = field(default_factory=list)
    remarks: list[Problem] = field(default_factory=list)

    @property
    def reasons(self) -> tuple[Problem, ...]:
        """Everything found, the weightiest first; a bound keeps a hostile upload's answer short."""
        return tuple([*self.refusals, *self.detours, *self.remarks][:_MAX_REASONS])

    def refuse(self, code: str, message: str, where: str = "", fix: str = "") -> None:
        self.refusals.append(Problem(code, message, where, fix))

    def detour(self, code: str, message: str, where: str = "", fix: str = "") -> None:
        """Something that keeps the checkpoint off the shared engine, but not out."""
        self.detours.append(Problem(code, message, where, fix))

    def remark(self, code: str, message: str, where: str = "", fix: str = "") -> None:
        self.remarks.append(Problem(code, message, where, fix))

    def refuse_all(self, code: str, message: str, places: Sequence[str], fix: str = "") -> None:
        """One problem for the same fault in many places: the first is named, the others are counted."""
        if places:
            self.refusals.append(_grouped(code, message, places, fix))

    def detour_all(self, code: str, message: str, places: Sequence[str], fix: str = "") -> None:
        if places:
            self.detours.append(_grouped(code, message, places, fix))

    def remark_all(self, code: str, message: str, places: Sequence[str], fix: str = "") -> None:
        if places:
            self.remarks.append(_grouped(code, message, places, fix))


def _grouped(code: str, message: str, places: Sequence[str], fix: str) -> Problem:
    others = f" (and {len(places) - 1} more like it)" if len(places) > 1 else ""
    return Problem(code, message + others, places[0], fix)
