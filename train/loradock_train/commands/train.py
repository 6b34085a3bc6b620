"""`loradock train CONFIG.yaml`: train what the YAML says. Imports nothing heavy until it is called.

loradock train lora.yaml --set lora_config.r=16 --output runs/lora-16
"""

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loradock_adapters.commands.options import DEFAULT_SERVER, ApiKey, Server
from loradock_adapters.errors import UsageError
from loradock_train.launch import Machines
from loradock_train.processes import is_main
from loradock_train.ray_run import RayCluster
from loradock_train.signed import hidden

if TYPE_CHECKING:
    from loradock_train.config import TrainConfig


def _print_schema(wanted: bool) -> None:
    if wanted:
        from loradock_adapters.console import out_json
        from loradock_train.schema import train_schema

        out_json(train_schema())
        raise typer.Exit


def train(
    config: Annotated[Path, typer.Argument(help="The YAML that describes the run.", show_default=False)],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one key, dotted: lora_config.r=16.")
    ] = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Processes on this machine, one a GPU; as --set num_devices=N.")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines that train together; each runs this command.")] = 1,
    node_rank: Annotated[int, typer.Option(min=0, help="Which of them this is, from 0.")] = 0,
    master_address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where machine 0 listens; a port that is free there.")
    ] = None,
    ray: Annotated[
        str | None, typer.Option("--ray", metavar="ADDRESS", help="Train on this Ray cluster: HOST:PORT, or auto.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes on the Ray cluster.")] = 1,
    gpus_per_worker: Annotated[float, typer.Option(min=0, help="GPUs that Ray gives each of them.")] = 0,
    cpus_per_worker: Annotated[float, typer.Option(min=0, help="CPU cores that Ray gives each of them.")] = 1,
    output: Annotated[Path | None, typer.Option(help="Run directory. Default: runs/<name of the YAML>.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that is already there.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that is there.")] = False,
    push: Annotated[
        str | None, typer.Option("--push", metavar="NAME", help="Publish the run under this name when it succeeds.")
    ] = None,
    server: Server = DEFAULT_SERVER,
    api_key: ApiKey = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print what the run would need (three steps are tried), and train nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the run's summary as JSON.")] = False,
    _schema: Annotated[
        bool,
        typer.Option(
            "--schema", help="Print the JSON Schema of a config, for editors.", callback=_print_schema, is_eager=True
        ),
    ] = False,
) -> None:
    """Train a LoRA adapter, a full fine-tune, or a model from scratch."""
    from loradock_train.config_file import load_config
    from loradock_train.publish import check_push

    machines = Machines(nodes, node_rank, master_address)
    machines.check()
    cluster = _cluster(ray, workers, gpus_per_worker, cpus_per_worker, is_alone=nproc is None and nodes == 1)
    check_push(push, server)
    target = None if push is None else Target(push, server, api_key)
    asked = Asked(config, set_ or [], nproc, machines, cluster, output, overwrite, resume, target, as_json)
    resolved, notices = load_config(config, asked.overrides)  # a typo is told before the heavy imports
    if plan:
        _print_plan(asked)
    else:
        _train(asked, resolved, notices)


@dataclass(frozen=True)
class Target:
    """Where a run goes that succeeds."""

    name: str
    server: str
    api_key: str | None = field(repr=False)


@dataclass(frozen=True)
class Asked:
    """What the command line says of a run."""

    config: Path
    set_: list[str]
    nproc: int | None
    machines: Machines
    cluster: RayCluster | None
    output: Path | None
    overwrite: bool
    resume: bool
    push: Target | None
    as_json: bool

    @property
    def overrides(self) -> list[str]:
        """Of the config's keys."""
        return [*self.set_, *([f"num_devices={self.nproc}"] if self.nproc is not None else [])]

    @property
    def again(self) -> str:
        """The command that goes on with this run."""
        words = ["loradock", "train", str(self.config)]
        if (cluster := self.cluster) is not None:
            words += ["--ray", cluster.address, "--workers", str(cluster.workers)]
            words += ["--gpus-per-worker", f"{cluster.gpus_per_worker:g}"] if cluster.gpus_per_worker else []
            words += ["--cpus-per-worker", f"{cluster.cpus_per_worker:g}"] if cluster.cpus_per_worker != 1 else []
        if self.nproc is not None:
            words += ["--nproc", str(self.nproc)]
        if (machines := self.machines).nodes > 1:
            words += ["--nodes", str(machines.nodes), "--node-rank", str(machines.rank)]
            words += ["--master-address", str(machines.master_address)]
        for override in self.set_:
            words += ["--set", hidden(override)]
        if self.output is not None:
            words += ["--output", str(self.output)]
        words.append("--resume")
        if self.push is not None:
            words += ["--push", self.push.name, "--server", self.push.server]
        return shlex.join(words)


def _train(asked: Asked, config: "TrainConfig", notices: list[str]) -> None:
    from loradock_adapters.console import note
    from loradock_train.errors import RunStopped
    from loradock_train.launch import run_directory
    from loradock_train.publish import push, told

    target, directory = asked.push, run_directory(config, asked.output, asked.config.stem)
    if config.sweep and target is not None:
        raise UsageError("--push publishes one checkpoint, and a sweep makes several: push the one you choose")
    speaks = asked.machines.rank == 0
    try:
        _train_where_asked(asked, config, notices, directory)
    except RunStopped as stop:
        if is_main() and speaks:
            note(f"stopped at step {stop.step}, saved in {stop.save}; resume with")
            note(f"    {asked.again}")
        return
    if not is_main() or not speaks:
        return
    _print_run(config, directory, asked.as_json)
    if target is not None:
        note(told(push(directory, target.name, server=target.server, api_key=target.api_key)), "green")


def _train_where_asked(asked: Asked, config: "TrainConfig", notices: list[str], directory: Path) -> None:
    """On a Ray cluster, in processes that are started for it, or in this one."""
    from loradock_train.launch import launch, make_order, must_launch
    from loradock_train.ray_run import check_on_ray, train_on_ray
    from loradock_train.remote import has_urls

    name, overwrite, resume = asked.config.stem, asked.overwrite, asked.resume
    if asked.cluster is not None:
        check_on_ray(config)
        alone = config.model_copy(update={"num_devices": 1})  # of a worker
        order = make_order(alone, notices, name, directory, overwrite, resume)
        train_on_ray(order, asked.cluster, config.worker_resources)
    elif must_launch(config.num_devices, asked.machines) and not has_urls(config):
        order = make_order(config, notices, name, directory, overwrite, resume)
        launch(order, config.num_devices, asked.machines)
    else:
        _train_here(asked)


def _print_run(config: "TrainConfig", directory: Path, as_json: bool) -> None:
    """What became of it, for whoever reads stdout."""
    from loradock_adapters.console import out, out_json
    from loradock_train.launch import read_summary

    if config.sweep:
        sweep = json.loads((directory / "sweep.json").read_text(encoding="utf-8"))
        if as_json:
            out_json(sweep)
        else:
            out("\n".join(str(directory / leg["name"] / "checkpoint") for leg in sweep["legs"]))
    elif as_json:
        out_json(read_summary(directory))
    else:
        out(str(directory / "checkpoint"))


def _cluster(
    address: str | None, workers: int, gpus_per_worker: float, cpus_per_worker: float, *, is_alone: bool
) -> RayCluster | None:
    """The Ray cluster to train on; None where no --ray is given. Raises UsageError."""
    if address is None:
        if workers != 1 or gpus_per_worker or cpus_per_worker != 1:
            raise UsageError("--workers, --gpus-per-worker and --cpus-per-worker belong to --ray ADDRESS")
        return None
    if not is_alone:
        raise UsageError("--ray places the processes itself: give --workers N instead of --nproc or --nodes")
    cluster = RayCluster(address, workers, gpus_per_worker, cpus_per_worker)
    cluster.check()
    return cluster


def _train_here(asked: Asked) -> None:
    from loradock_train.quiet import quieten

    quieten()
    from loradock_adapters.console import err
    from loradock_train.run import train as run_training

    run_training(
        asked.config,
        overrides=asked.overrides,
        output=asked.output,
        overwrite=asked.overwrite,
        resume=asked.resume,
        console=err,
        machines=asked.machines,
    )


def _print_plan(asked: Asked) -> None:
    if asked.cluster is not None:
        raise UsageError("--plan plans for this machine: for the memory of a worker give --nproc N in place of --ray")
    from loradock_train.quiet import quieten

    quieten()
    from loradock_adapters.console import out, out_json
    from loradock_train.planning import plan_lines, plan_of_config

    planned = plan_of_config(asked.config, asked.overrides, asked.machines.nodes)
    if asked.as_json:
        out_json(planned.to_json())
        return
    for line in plan_lines(planned):
        out(line)
