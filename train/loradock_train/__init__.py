"""From a YAML to a checkpoint.

    from loradock_train import train

    run = train("lora.yaml")              # or a TrainConfig, or a dict with the YAML's keys
    print(run.checkpoint, run.final_eval_loss)

Importing this package is cheap: torch and transformers are imported when training starts, so that `loradock --help`
is quick.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loradock_train.comparison import Comparison, RunFacts, compare
    from loradock_train.config import TrainConfig
    from loradock_train.config_file import load_config
    from loradock_train.duelling import duel
    from loradock_train.merging import export_checkpoint, merge
    from loradock_train.publish import push
    from loradock_train.run import Run, train

__all__ = [
    "Comparison",
    "Run",
    "RunFacts",
    "TrainConfig",
    "compare",
    "duel",
    "export_checkpoint",
    "load_config",
    "merge",
    "push",
    "train",
]

_HOMES = {
    "Comparison": "loradock_train.comparison",
    "Run": "loradock_train.run",
    "RunFacts": "loradock_train.comparison",
    "TrainConfig": "loradock_train.config",
    "compare": "loradock_train.comparison",
    "duel": "loradock_train.duelling",
    "export_checkpoint": "loradock_train.merging",
    "load_config": "loradock_train.config_file",
    "merge": "loradock_train.merging",
    "push": "loradock_train.publish",
    "train": "loradock_train.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
