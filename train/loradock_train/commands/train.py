"""`loradock train CONFIG.yaml`: train what the YAML says. Imports nothing heavy until it is called.

loradock train lora.yaml --set lora_config.r=16 --output runs/lora-16
"""

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from loradock_adapters.commands.options import DEFAULT_SERVER, ApiKey, Server
from loradock_adapters.errors import UsageError
from loradock_train.launch import Machines
from loradock_train.processes import is_main
from loradock_train.ray_run import RayCluster


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
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run that is there.")] = False,
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
    from loradock_adapters.console import note, out, out_json
    from loradock_train.config_file import load_config
    from loradock_train.errors import RunStopped
    from loradock_train.launch import launch, make_order, must_launch, read_summary, run_directory
    from loradock_train.publish import check_push, told
    from loradock_train.publish import push as push_run
    from loradock_train.ray_run import check_on_ray, train_on_ray
    from loradock_train.remote import has_urls

    overrides = [*(set_ or []), *([f"num_devices={nproc}"] if nproc is not None else [])]
    machines = Machines(nodes, node_rank, master_address)
    machines.check()
    cluster = _cluster(ray, workers, gpus_per_worker, cpus_per_worker, is_alone=nproc is None and nodes == 1)
    check_push(push, server)
    resolved, notices = load_config(config, overrides)  # a typo is told before the heavy imports
    if plan:
        if cluster is not None:
            raise UsageError(
                "--plan plans for this machine: for the memory of a worker give --nproc N in place of --ray"
            )
        _print_plan(config, overrides, as_json, nodes)
        return
    directory = run_directory(resolved, output, config.stem)
    if resolved.sweep and push is not None:
        raise UsageError("--push publishes one checkpoint, and a sweep makes several: push the one you choose")
    try:
        if cluster is not None:
            check_on_ray(resolved)
            alone = resolved.model_copy(update={"num_devices": 1})  # of a worker
            order = make_order(alone, notices, config.stem, directory, overwrite, resume)
            train_on_ray(order, cluster, resolved.worker_resources)
        elif must_launch(resolved.num_devices, machines) and not has_urls(resolved):
            order = make_order(resolved, notices, config.stem, directory, overwrite, resume)
            launch(order, resolved.num_devices, machines)
        else:
            _train_here(config, overrides, output, overwrite, resume, machines)
    except RunStopped as stop:
        if is_main() and node_rank == 0:
            note(f"stopped at step {stop.step}, saved in {stop.save}; resume with")
            note(f"    {_again(config, set_, output, nproc, machines, cluster)}{_push_words(push, server)}")
        return
    if not is_main() or node_rank > 0:
        return
    if resolved.sweep:
        told_by_sweep = json.loads((directory / "sweep.json").read_text(encoding="utf-8"))
        if as_json:
            out_json(told_by_sweep)
        else:
            out("\n".join(str(directory / leg["name"] / "checkpoint") for leg in told_by_sweep["legs"]))
    elif as_json:
        out_json(read_summary(directory))
    else:
        out(str(directory / "checkpoint"))
    if push is not None:
        note(told(push_run(directory, push, server=server, api_key=api_key)), "green")


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


def _push_words(push: str | None, server: str) -> str:
    return "" if push is None else f" {shlex.join(['--push', push, '--server', server])}"


def _train_here(
    config: Path, overrides: list[str], output: Path | None, overwrite: bool, resume: bool, machines: Machines
) -> None:
    from loradock_train.quiet import quieten

    quieten()
    from loradock_adapters.console import err
    from loradock_train.run import train as run_training

    run_training(
        config, overrides=overrides, output=output, overwrite=overwrite, resume=resume, console=err, machines=machines
    )


def _print_plan(config: Path, overrides: list[str], as_json: bool, nodes: int) -> None:
    from loradock_train.quiet import quieten

    quieten()
    from loradock_adapters.console import out, out_json
    from loradock_train.planning import plan_lines, plan_of_config

    planned = plan_of_config(config, overrides, nodes)
    if as_json:
        out_json(planned.to_json())
        return
    for line in plan_lines(planned):
        out(line)


def _again(
    config: Path,
    overrides: list[str] | None,
    output: Path | None,
    nproc: int | None,
    machines: Machines,
    cluster: RayCluster | None,
) -> str:
    """The command that goes on with this run."""
    words = ["loradock", "train", str(config)]
    if cluster is not None:
        words += ["--ray", cluster.address, "--workers", str(cluster.workers)]
        words += ["--gpus-per-worker", f"{cluster.gpus_per_worker:g}"] if cluster.gpus_per_worker else []
        words += ["--cpus-per-worker", f"{cluster.cpus_per_worker:g}"] if cluster.cpus_per_worker != 1 else []
    if nproc is not None:
        words += ["--nproc", str(nproc)]
    if machines.nodes > 1:
        words += ["--nodes", str(machines.nodes), "--node-rank", str(machines.rank)]
        words += ["--master-address", str(machines.master_address)]
    for override in overrides or []:
        words += ["--set", override]
    if output is not None:
        words += ["--output", str(output)]
    return shlex.join([*words, "--resume"])
