"""What a config alone says against a run, before a byte of data or of a base is read: one list of rules for
`loradock train`, `check` and `--plan`, so that none of them passes what another refuses.
"""

from collections.abc import Callable, Iterator

from loradock_adapters.errors import UsageError
from loradock_train.config import TrainConfig
from loradock_train.errors import Problem
from loradock_train.model import check_machine
from loradock_train.shard import check_shardable
from loradock_train.trackers import check_trackers

Rule = Callable[[TrainConfig, int], None]

RULES: dict[str, Rule] = {
    "machine": check_machine,
    "report_to": lambda config, _processes: check_trackers(config.report_to),
    "processes": check_shardable,
}
"""By what is at fault; each raises UsageError or its kin."""


def check_start(config: TrainConfig, processes: int) -> None:
    """Raises for the first rule that is broken. processes: of the run, on all machines."""
    for rule in RULES.values():
        rule(config, processes)


def start_problems(config: TrainConfig, processes: int) -> Iterator[Problem]:
    """All that are broken, in the same words."""
    for where, rule in RULES.items():
        try:
            rule(config, processes)
        except UsageError as error:
            yield Problem(where, str(error))
