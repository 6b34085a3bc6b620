"""Where the gate's checks put what they find, so that none of them stops the others."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from loradock_adapters.problems import Problem

_MAX_REASONS = 50  # keeps the answer to a hostile upload short


@dataclass
class Findings:
    """Refusals outweigh detours, detours outweigh remarks."""

    refusals: list[Problem] = field(default_factory=list)
    detours: list[Problem] = field(default_factory=list)
    remarks: list[Problem] = field(default_factory=list)

    @property
    def reasons(self) -> tuple[Problem, ...]:
        """Everything found, the weightiest first. The same fault in many places is one reason, with the first place."""
        found = [*_grouped(self.refusals), *_grouped(self.detours), *_grouped(self.remarks)]
        return tuple(found[:_MAX_REASONS])

    def add(self, others: "Findings") -> None:
        self.refusals.extend(others.refusals)
        self.detours.extend(others.detours)
        self.remarks.extend(others.remarks)

    def refuse(self, code: str, message: str, where: str = "", fix: str = "") -> None:
        self.refusals.append(Problem(code, message, where, fix))

    def detour(self, code: str, message: str, where: str = "", fix: str = "") -> None:
        """Something that keeps the checkpoint off the shared engine, but not out."""
        self.detours.append(Problem(code, message, where, fix))

    def remark(self, code: str, message: str, where: str = "", fix: str = "") -> None:
        self.remarks.append(Problem(code, message, where, fix))

    def refuse_all(self, code: str, message: str, places: Iterable[str], fix: str = "") -> None:
        """The same fault in each of these places."""
        self.refusals.extend(Problem(code, message, where, fix) for where in places)

    def detour_all(self, code: str, message: str, places: Iterable[str], fix: str = "") -> None:
        self.detours.extend(Problem(code, message, where, fix) for where in places)

    def remark_all(self, code: str, message: str, places: Iterable[str], fix: str = "") -> None:
        self.remarks.extend(Problem(code, message, where, fix) for where in places)


def _grouped(problems: Iterable[Problem]) -> Iterator[Problem]:
    """Equal problems as one that counts the other places, in the order in which they were first seen."""
    places: dict[Problem, list[str]] = {}
    for problem in problems:
        places.setdefault(replace(problem, where=""), []).append(problem.where)
    for problem, found in places.items():
        others = f" (and {len(found) - 1} more like it)" if len(found) > 1 else ""
        yield replace(problem, message=problem.message + others, where=found[0])
