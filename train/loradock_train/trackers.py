"""Where the lines of metrics.jsonl go as well: TensorBoard, Weights & Biases, MLflow (`report_to`).

transformers' own integrations are not used: on resume they would send again what they sent before the kill. Here a
resumed run begins with the very lines that metrics.jsonl keeps, and each step is sent once. The packages are imported
when they are asked for.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from loradock_train.errors import ModelError

FOLDER = "tensorboard"
STATE = "trackers.json"
"""Ids of the runs in trackers that keep theirs elsewhere, so that a resumed run goes on with the same one."""
_INSTALL = {
    "tensorboard": "pip install 'loradock[tensorboard]'",
    "wandb": "pip install wandb",
    "mlflow": "pip install mlflow",
}
Line = Mapping[str, Any]


class Tracker(Protocol):
    def send(self, line: Line) -> None:
        """One line of metrics.jsonl."""

    def close(self) -> None: ...


def check_trackers(names: Sequence[str]) -> None:
    """Refuse before anything is loaded what is not installed. Raises ModelError."""
    for name in names:
        if find_spec(name) is None:
            raise ModelError(f"report_to: {name} is not installed: {_INSTALL[name]}, or take it out of report_to")


class Trackers:
    """All that a run reports to; nothing, for most."""

    def __init__(
        self, names: Sequence[str], directory: Path, config: Mapping[str, Any], history: Sequence[Line] = ()
    ) -> None:
        """history: the lines that stand in metrics.jsonl already."""
        state_path = directory / STATE
        state: dict[str, str] = json.loads(state_path.read_text()) if state_path.is_file() else {}
        self._all: list[Tracker] = [_MAKERS[name](directory, config, history, state) for name in names]
        if state:
            state_path.write_text(json.dumps(state) + "\n", encoding="utf-8")

    def send(self, line: Line) -> None:
        for tracker in self._all:
            tracker.send(line)

    def close(self) -> None:
        for tracker in self._all:
            tracker.close()


def numbers_of(line: Line) -> dict[str, float]:
    """The figures of a line, without its step."""
    return {
        key: float(value)
        for key, value in line.items()
        if key != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


class _TensorBoard:
    """Event files in RUN/tensorboard. A resumed run writes them anew, from the lines that it keeps."""

    def __init__(
        self, directory: Path, config: Mapping[str, Any], history: Sequence[Line], state: dict[str, str]
    ) -> None:
        import shutil

        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(directory / FOLDER, ignore_errors=True)
        self._writer = SummaryWriter(str(directory / FOLDER))
        self._writer.add_text("config", f"```json\n{json.dumps(config, indent=2)}\n```")
        for line in history:
            self.send(line)

    def send(self, line: Line) -> None:
        for name, value in numbers_of(line).items():
            self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """One W&B run for all processes of ours. Project, entity, key and `WANDB_MODE=offline` are its own variables'."""

    def __init__(
        self, directory: Path, config: Mapping[str, Any], history: Sequence[Line], state: dict[str, str]
    ) -> None:
        wandb: Any = import_module("wandb")

        known = state.get("wandb")
        self._run: Any = wandb.init(
            id=known,
            resume="allow" if known else None,
            name=directory.resolve().name,
            dir=str(directory),
            config=config,
        )
        state["wandb"] = str(self._run.id)
        self._sent = int(self._run.step) - 1 if known else -1
        """The last step that W&B has: it takes none twice, and drops what comes out of order."""
        self._waiting: dict[str, float] = {}
        self._step = -1
        for line in history:
            self.send(line)

    def send(self, line: Line) -> None:
        """Lines of one step are one row there."""
        if line["step"] != self._step:
            self._flush()
        self._step = line["step"]
        self._waiting |= numbers_of(line)

    def _flush(self) -> None:
        if self._waiting and self._step > self._sent:
            self._run.log(self._waiting, step=self._step)
            self._sent = self._step
        self._waiting = {}

    def close(self) -> None:
        self._flush()
        self._run.finish()


class _Mlflow:
    """One MLflow run for all processes of ours; the server is `MLFLOW_TRACKING_URI`'s."""

    def __init__(
        self, directory: Path, config: Mapping[str, Any], history: Sequence[Line], state: dict[str, str]
    ) -> None:
        mlflow: Any = import_module("mlflow")

        self._mlflow: Any = mlflow
        known = state.get("mlflow")
        run = mlflow.start_run(run_id=known, run_name=None if known else directory.resolve().name)
        state["mlflow"] = str(run.info.run_id)
        self._sent: set[tuple[str, int]] = set()
        if known:
            client = mlflow.MlflowClient()
            for name in run.data.metrics:
                self._sent |= {(name, metric.step) for metric in client.get_metric_history(known, name)}
        else:
            flat = {key: value for key, value in config.items() if isinstance(value, str | int | float | bool)}
            mlflow.log_params({key: str(value)[:500] for key, value in flat.items()})
        for line in history:
            self.send(line)

    def send(self, line: Line) -> None:
        step = line["step"]
        fresh = {name: value for name, value in numbers_of(line).items() if (name, step) not in self._sent}
        self._sent |= {(name, step) for name in fresh}
        if fresh:
            self._mlflow.log_metrics(fresh, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


_MAKERS: dict[str, Callable[[Path, Mapping[str, Any], Sequence[Line], dict[str, str]], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _Mlflow,
}
