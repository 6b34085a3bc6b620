"""`loradock check CONFIG.yaml`: would this train, and would its checkpoint be hot-swapped? Trains nothing.

loradock check lora.yaml --server http://127.0.0.1:8080 --write lora-fixed.yaml
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loradock_adapters.commands.options import ApiKey, Json

if TYPE_CHECKING:
    from loradock_train.check import Report


def check(
    config: Annotated[Path, typer.Argument(help="The YAML that describes the run.", show_default=False)],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one key, dotted.")
    ] = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Check for this many processes; as --set num_devices=N.")
    ] = None,
    server: Annotated[
        str | None, typer.Option(help="Judge by the base and the limits of a running server.", metavar="URL")
    ] = None,
    api_key: ApiKey = None,
    write: Annotated[
        Path | None, typer.Option(help="Write the config with the proposed changes here.", metavar="FILE")
    ] = None,
    json: Json = False,
) -> None:
    """Check a config, its data and its base, and say how its checkpoint would be served.

    Exit code 0: it trains, and is placed as its kind wants; 1: an adapter that would not be hot-swapped, or a
    checkpoint that a server would refuse; 2: it would not train.
    """
    from loradock_train.config_file import load_config

    overrides = [*(set_ or []), *([f"num_devices={nproc}"] if nproc is not None else [])]
    load_config(config, overrides)  # a typo is told before the heavy imports
    from loradock_train.quiet import quieten

    quieten()
    from loradock_adapters.console import note, out_json
    from loradock_train.check import check as look
    from loradock_train.check_write import write_rewritten
    from loradock_train.placement import DEFAULT_TARGET, target_of_server

    target = DEFAULT_TARGET if server is None else target_of_server(server, api_key)
    report = look(config, overrides, target)
    if json:
        out_json(report.to_json())
    else:
        _print(report)
    if write is not None:
        for notice in write_rewritten(config, overrides, report, write):
            note(f"note: {notice}")
        note(f"written: {write}")
    if report.exit_code:
        raise typer.Exit(report.exit_code)


def _print(report: "Report") -> None:
    from loradock_adapters.console import note, out, problem_lines

    for notice in report.notices:
        note(f"note: {notice}")
    for key, data in report.data.items():
        out(f"{key}: {data.num_rows:,} {data.format} rows, {data.num_trained_tokens:,} tokens with a loss")
    for key, found in report.examined.items():
        for finding in found.findings:
            out(f"  {key}: {finding.num_rows:,} rows {finding.message}: {', '.join(finding.first)}")
    if report.parameters is not None:
        count = report.parameters
        out(f"{report.config.kind}: {count.trainable:,} of {count.total:,} parameters trained ({count.share:.3%})")
    if report.forecast is not None:
        out(report.forecast.line())
        for line in problem_lines(report.forecast.verdict.reasons):
            out(f"  {line}")
    _print_changes(report)
    for advice in report.advice:
        out(f"advice: {advice}")
    for problem in report.problems:
        note(f"error: {problem}", "red")


def _print_changes(report: "Report") -> None:
    import yaml

    from loradock_adapters.console import out, size

    def shown(value: object) -> str:
        value = list(value) if isinstance(value, tuple) else value
        return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()

    for change in report.changes:
        out(f"{'you may change' if change.is_optional else 'change'} {change.key}")
        out(f"  - {shown(change.old)}")
        out(f"  + {shown(change.new)}")
        out(f"    because: {change.reason}")
        out(f"    effect:  {change.effect}")
    if report.rewritten is not None:
        before = f", was {size(report.forecast.checkpoint_bytes)}" if report.forecast is not None else ""
        out(f"with these changes: {report.rewritten.line()}")
        out(f"    tensors of {size(report.rewritten.checkpoint_bytes)}{before}")
