"""`report_to`: the lines of metrics.jsonl, each once, also where a run was resumed."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from loradock_testing.rows import WriteRows
from loradock_train import train
from loradock_train.errors import ModelError
from loradock_train.trackers import Trackers, check_trackers, numbers_of

LINES = [
    {"step": 1, "epoch": 0.5, "loss": 2.0, "learning_rate": 1e-3},
    {"step": 2, "epoch": 1.0, "loss": 1.5, "learning_rate": 5e-4},
    {"step": 2, "epoch": 1.0, "eval_loss": 1.75},
    {"step": 3, "epoch": 1.5, "loss": 1.25, "learning_rate": 0.0},
]


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself reads."""
    events = EventAccumulator(str(directory / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_run_reports_its_metrics_to_tensorboard(base: Path, tmp_path: Path, write_rows: WriteRows) -> None:
    rows = write_rows("rows.jsonl", [{"prompt": f"def f{i}():", "completion": f" return {i}"} for i in range(4)])
    config = {
        "model_id": str(base), "train_path": str(rows), "valid_path": str(rows), "context_length": 64, "max_steps": 3,
        "learning_rate": 1e-2, "mixed_precision": "no", "logging_steps": 1, "lora_config": {"r": 2},
        "report_to": "tensorboard",
    }  # fmt: skip
    run = train(config, output=tmp_path / "run")
    lines = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    found = scalars(run.directory)
    for key in ("loss", "eval_loss", "learning_rate", "tokens"):
        expected = [(line["step"], line[key]) for line in lines if key in line]
        assert expected
        assert [step for step, _ in found[key]] == [step for step, _ in expected]
        assert [value for _, value in found[key]] == pytest.approx([value for _, value in expected], rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_resumed_run_has_each_line_once_in_tensorboard(tmp_path: Path) -> None:
    killed = Trackers(["tensorboard"], tmp_path, {"seed": 1})
    for line in LINES:
        killed.send(line)
    killed.close()
    resumed = Trackers(["tensorboard"], tmp_path, {"seed": 1}, LINES[:1])  # saved at step 1
    for line in LINES[1:]:
        resumed.send(line)
    resumed.close()
    assert scalars(tmp_path)["loss"] == [(1, 2.0), (2, 1.5), (3, 1.25)]
    assert scalars(tmp_path)["eval_loss"] == [(2, 1.75)]


def test_numbers_of_a_line_are_its_figures_alone() -> None:
    assert numbers_of({"step": 3, "loss": 1, "note": "x", "ok": True, "none": None}) == {"loss": 1.0}


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_tracker_that_is_not_installed_is_refused_with_what_installs_it(name: str) -> None:
    with pytest.raises(ModelError, match=rf"report_to: {name} is not installed: pip install {name}"):
        check_trackers([name])


# ---- trackers that keep runs elsewhere: fakes that speak their interface ---------------------------------------------


def fake_wandb(runs: dict[str, dict[int, dict[str, float]]]) -> ModuleType:
    module = ModuleType("wandb")

    def init(**options: Any) -> Any:
        number = options["id"] if options["id"] is not None else f"run-{len(runs)}"
        rows = runs.setdefault(number, {})

        def log(values: dict[str, float], step: int) -> None:
            assert step >= max(rows, default=0), "W&B drops what comes out of order"
            assert step not in rows
            rows[step] = dict(values)

        return SimpleNamespace(id=number, step=max(rows, default=-1) + 1, log=log, finish=lambda: None)

    module.__dict__["init"] = init
    return module


def test_resumed_run_goes_on_in_the_same_wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: dict[str, dict[int, dict[str, float]]] = {}
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(runs))
    killed = Trackers(["wandb"], tmp_path, {})
    for line in LINES[:3]:
        killed.send(line)
    killed.close()
    resumed = Trackers(["wandb"], tmp_path, {}, LINES[:1])
    for line in LINES[1:]:
        resumed.send(line)
    resumed.close()
    assert list(runs) == ["run-0"]
    assert {step: row.get("loss") for step, row in runs["run-0"].items()} == {1: 2.0, 2: 1.5, 3: 1.25}
    assert runs["run-0"][2]["eval_loss"] == 1.75


class FakeMlflow(ModuleType):
    """Keeps runs as MLflow does: metrics are lists, and nothing keeps one from being logged twice."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.runs: dict[str, list[tuple[str, int, float]]] = {}
        self.params: dict[str, str] = {}
        self._current = ""

    def start_run(self, run_id: str | None, run_name: str | None) -> Any:
        self._current = run_id if run_id is not None else f"run-{len(self.runs)}"
        logged = self.runs.setdefault(self._current, [])
        metrics = {name: value for name, _, value in logged}
        return SimpleNamespace(info=SimpleNamespace(run_id=self._current), data=SimpleNamespace(metrics=metrics))

    def log_params(self, values: dict[str, str]) -> None:
        self.params |= values

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        self.runs[self._current] += [(name, step, value) for name, value in values.items()]

    def end_run(self) -> None:
        self._current = ""

    def MlflowClient(self) -> Any:  # noqa: N802 - MLflow's name
        def history(run: str, name: str) -> list[Any]:
            return [SimpleNamespace(step=step) for key, step, _ in self.runs[run] if key == name]

        return SimpleNamespace(get_metric_history=history)


def test_resumed_run_goes_on_in_the_same_mlflow_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    killed = Trackers(["mlflow"], tmp_path, {"seed": 1, "lora_config": {"r": 4}})
    for line in LINES[:3]:
        killed.send(line)
    killed.close()
    resumed = Trackers(["mlflow"], tmp_path, {"seed": 1}, LINES[:1])
    for line in LINES[1:]:
        resumed.send(line)
    resumed.close()
    assert mlflow.params == {"seed": "1"}
    losses = [(step, value) for name, step, value in mlflow.runs["run-0"] if name == "loss"]
    assert losses == [(1, 2.0), (2, 1.5), (3, 1.25)]
    assert len(mlflow.runs) == 1
