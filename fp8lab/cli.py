"""The command line: verbs over runs and experiments, each a thin layer over the library.

`--json` gives any listing as data. Exit codes: 0 fine, 1 when `diagnose` found something of high
severity, a run of an experiment or its conclusion failed or `bisect` can name nothing, 2 for wrong
usage or bad input (one line on stderr that names the file, the key and what was expected), 130
after Ctrl-C (what was recorded is kept).
"""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Iterable
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from fp8lab.comparison import AGAINST, require_arm, side_by_side
from fp8lab.ending import stopped_first
from fp8lab.listing import (
    facts_of,
    print_grids,
    print_rows,
    print_runs,
    rank_in_words,
    ranks_of,
    summaries_below,
    summary_of,
)
from fp8lab.progress import Bars
from fp8lab.store import RunError, find_runs, open_run
from fp8lab.terminal import printable


class _OneLineErrors(TyperGroup):
    """Bad input and wrong usage end in one line, not in a traceback or a box."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name may be no text
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            code = super().main(*args, **kwargs | {"standalone_mode": False})
        except Exception as error:
            # Typer's own usage errors: their class has no public name.
            usage = getattr(error, "format_message", None)
            if usage is None and not isinstance(error, ValueError | RunError | OSError):
                raise
            message = str(error) or type(error).__name__ if usage is None else usage()
            if isinstance(error, OSError) and error.filename is not None:
                message = f"{error.filename}: {error.strerror}"
            for line in message.strip().splitlines()[:1]:  # none after the help, for no arguments
                typer.echo(f"error: {printable(line)}", err=True)
            sys.exit(getattr(error, "exit_code", 2))
        if code == 130:
            typer.echo("interrupted: what was recorded is kept", err=True)
        sys.exit(code)


app = typer.Typer(
    cls=_OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    help="Why an FP8 training run diverges: which tensor, layer and channel, since when.",
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fp8lab {version('fp8lab')}")
        raise typer.Exit()


@app.callback(help=app.info.help)
def program(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it."),
    ] = False,
) -> None:
    """The options of the program itself."""


class Parallelism(StrEnum):
    """How the processes of a run share a model."""

    ddp = "ddp"
    fsdp2 = "fsdp2"
    tensor_parallel = "tensor_parallel"


class Alignment(StrEnum):
    """What losses are laid beside each other by."""

    step = "step"
    tokens = "tokens"


Json = Annotated[bool, typer.Option("--json", help="Print data instead of a table.")]
Twin = Annotated[Path | None, typer.Option(help="The same training in BF16.")]
Page = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="PAGE", help="The page, .html, or .md with PNGs beside."),
]
Quick = Annotated[
    bool, typer.Option(help="One seed, few steps: does it run? Nothing follows from it.")
]
Verdicts = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", file_okay=False, help="Write the verdict's page there."),
]
Processes = Annotated[int, typer.Option(min=1, help="That do each run together, under torchrun.")]
Shared = Annotated[Parallelism | None, typer.Option(help="How processes share a run's model.")]
# Without a metavar the name of an argument in an error depends on the version of typer.
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
RunPaths = Annotated[
    list[Path], typer.Argument(metavar="RUN", help="Run directories, or folders of them.")
]


@app.command()
def run(
    experiment: Annotated[
        str,
        typer.Argument(metavar="EXPERIMENT", help="A .py file, or a name; a wrong one lists them."),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for the runs. [runs/NAME]")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Runs at the same time.")] = 2,
    part: Annotated[list[str] | None, typer.Option(help="Only this part; repeatable.")] = None,
    arm: Annotated[list[str] | None, typer.Option(help="Only this arm; repeatable.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Only this seed; repeatable.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of every training.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text for the language model.")] = None,
    quick: Quick = False,
    processes: Processes = 1,
    parallel: Shared = None,
    ray: Annotated[str | None, typer.Option(help="A Ray cluster's address, or auto.")] = None,
    report: Verdicts = None,
    as_json: Json = False,
) -> None:
    """Run an experiment, arms x seeds; go on where it stopped."""
    from fp8lab.lab.experiment import Settings, load_experiment, run_experiment
    from fp8lab.lab.result import require_conclusion, write_page
    from fp8lab.lab.work import Chosen

    file, value = load_experiment(experiment)
    out = out or Path("runs") / value.name
    if report is not None:
        require_conclusion(value, out, quick, Chosen.of(part, arm, seed))
    more: dict[str, Any] = {"processes": processes, "parallel": parallel and parallel.value}
    console = Console(stderr=as_json, markup=False)
    with Bars(console) as progress:
        failures = run_experiment(
            file,
            value,
            out,
            workers=workers,
            ray=ray,
            parts=part,
            arms=arm,
            seeds=seed,
            settings=Settings(steps=steps, text=_readable(text), quick=quick, **more),
            on_note=progress.noted,
            on_plan=progress.planned,
            on_start=progress.started,
            on_report=progress.reported,
            on_end=progress.ended,
            on_interrupt=progress.interrupted,
        )
    if as_json:
        rows = [summary_of(open_run(path)) for path in find_runs(out)]
        asked = {"part": part, "arm": arm, "seed": seed}
        _print_json([row for row in rows if all(row[k] in v for k, v in asked.items() if v)])
    else:
        print_grids(console, value.parts, out)
    if report is not None and failures:
        typer.echo(f"no page: {len(failures)} failed", err=as_json)
    elif report is not None:
        typer.echo(f"page: {write_page(value, file, out, report)}", err=as_json)
    if failures:
        raise typer.Exit(1)


def _readable(text: Path | None) -> str | None:
    from fp8lab.lab.data import read_text

    if text is None:
        return None
    read_text(text)
    return str(text.resolve())


@app.command("ls")
def list_runs(
    folder: Annotated[Path, typer.Argument(help="Where to look.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List the runs below a folder."""
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder")
    summaries = summaries_below(folder)
    if as_json:
        _print_json(summaries)
    else:
        print_runs(Console(markup=False), summaries, folder)


@app.command()
def show(run: RunPath, as_json: Json = False) -> None:
    """What a run is: versions, precision in force, sites, events, where its processes stand."""
    opened = open_run(run)
    info = {key: value for key, value in opened.info.items() if key not in ("pid", "error")}
    info["state"] = opened.state
    info |= {key: value for key, value in summary_of(opened).items() if key not in info}
    events = opened.events()[["step", "rank", "kind", "site", "detail"]].to_dict("records")
    ranks, first = ranks_of(opened), stopped_first(opened)
    if as_json:
        _print_json(info | {"ranks": ranks, "stopped_first": first, "events": events})
        return
    console = Console(markup=False)
    table = Table(show_header=False, box=None)
    for name, told in facts_of(opened, info):
        table.add_row(printable(name), printable(told))
    for row in ranks if len(ranks) > 1 else []:
        table.add_row(f"rank {row['rank']}", printable(rank_in_words(row)))
    if first is not None:
        table.add_row("stopped first", printable(first))
    for event in events:
        told = f"{event['kind']}: {event['detail']}"
        where = f", rank {event['rank']}" if len(ranks) > 1 else ""
        table.add_row(f"step {event['step']}{where}", printable(told))
    console.print(table)


@app.command("diagnose")
def diagnose_runs(
    runs: RunPaths,
    twin: Twin = None,
    as_json: Json = False,
) -> None:
    """Name the cause, the place and the hour; exit code 1 if a finding is of high severity, 2 if
    nothing was recorded."""
    from fp8lab.diagnosis import diagnose
    from fp8lab.forecast.not_judged import not_judged

    diagnoses = [diagnose(path, twin) for path in _expand(runs)]
    if as_json:
        _print_json([one.to_dict() for one in diagnoses])
    else:
        for one in diagnoses:
            _echo(one)
            left = not_judged(open_run(one.run)) if one.is_unexplained else None
            if left is not None and left.what:
                _echo(left)
    if any(finding.severity == "high" for one in diagnoses for finding in one.findings):
        raise typer.Exit(1)
    if any(one.is_empty for one in diagnoses):
        raise typer.Exit(2)


@app.command("bisect")
def bisect_training(
    training: Annotated[
        str, typer.Argument(metavar="TRAINING", help="An experiment, or SCRIPT.py:FUNCTION.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the reruns; goes on with what it holds.")],
    arm: Annotated[str | None, typer.Option(help="Of an experiment: the arm that breaks.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of an experiment.")] = 0,
    part: Annotated[str | None, typer.Option(help="Where several have the arm.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of every training.")] = None,
    start: Annotated[
        int | None, typer.Option("--from", min=1, help="Reruns start at a checkpoint of that step.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Of a script: YAML, or a recipe's name.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Of a script: its third argument.")
    ] = None,
    site: Annotated[
        list[str] | None, typer.Option(help="Only LAYERS or LAYERS:OPERAND; repeatable.")
    ] = None,
    breaks: Annotated[bool, typer.Option("--break", help="What breaks a BF16 run?")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Reruns at the same time.")] = 1,
    as_json: Json = False,
) -> None:
    """Name the operands that break a run, by reruns; exit code 1 if none can be named."""
    from fp8lab.bisection import bisect
    from fp8lab.lab.reruns import training_of
    from fp8lab.lab.workers import Workers

    console = Console(stderr=as_json, markup=False)
    with Workers(workers) as pool, Bars(console) as progress:  # which end first, at Ctrl-C
        train = training_of(
            training,
            out,
            pool,
            progress.reported,
            of_arm=(arm, seed, part, steps, start),
            of_script=(recipe, checkpoint),
        )
        found = bisect(
            train,
            train.plan,
            site or ["*"],
            path=out,
            direction="breaks" if breaks else "saves",
            checkpoint=train.checkpoint,
            about=train.about,
            on_start=progress.started,
            on_end=progress.ended,
            on_bound=progress.bounded,
        )
    if as_json:
        _print_json(found.to_dict())
    else:
        _echo(found)
    if found.stopped is not None:
        raise typer.Exit(1)


@app.command("replay")
def replay_run(
    run: RunPath,
    recipe: Annotated[str, typer.Option(help="A recipe's name, or a plan in a YAML file.")],
    as_json: Json = False,
) -> None:
    """What FP8 would have done to a recorded run; exit code 1 if it would have been trouble, 2 if
    of no operand enough is recorded to tell."""
    from fp8lab.forecast import replay
    from fp8lab.plan import load_recipe

    forecast = replay(open_run(run), load_recipe(recipe))
    if as_json:
        _print_json(forecast.to_dict())
    else:
        _echo(forecast)
    if forecast.serious or not (forecast.is_told or forecast.is_high_precision):
        raise typer.Exit(1 if forecast.serious else 2)


@app.command("audit")
def audit_checkpoint(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A .safetensors, a folder, or torch's.")
    ],
    top: Annotated[int, typer.Option(min=1, help="Channels to watch of each layer.")] = 8,
    as_json: Json = False,
) -> None:
    """What a checkpoint's weights say before it is run; exit code 1 if something is severe.

    A row is a layer: alignment is the largest cosine of a channel's gate row and up row; control
    that of pairs from different channels, chance what random ones rarely exceed; norms are those of
    gate, up and down; gain is how large a channel's product can get, over the median channel's;
    crest is amax / rms and kurtosis mean(x^4) / mean(x^2)^2 of the weights, the largest of the
    layer's; survives names the recipes whose casts lose little of them.
    """
    from fp8lab.checkpoint import audit

    found = audit(checkpoint, top=top)
    if as_json:
        _print_json(found.to_dict())
    else:
        _echo(found)
        print_rows(Console(markup=False), found.rows())
    if found.severe:
        raise typer.Exit(1)


@app.command()
def report(
    runs: RunPaths,
    out: Page = None,
    twin: Twin = None,
    live: Annotated[bool, typer.Option("--live", help="Serve it here, anew as runs grow.")] = False,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Of --live.")] = None,
    as_json: Json = False,
) -> None:
    """Write a page about the runs: one offline HTML file, or Markdown with its pictures."""
    from fp8lab.report import demand_replaceable, report_data, write_report

    _expand(runs)
    if live is False and port is not None:
        raise ValueError(f"--port {port}: expected --live with it")
    if live and as_json:
        raise ValueError("--live: serves a page, expected no --json")
    if as_json:
        _only_printed(out)
        _print_json(report_data(runs, twin=twin))
    else:
        out = out or Path("report.html")
        demand_replaceable(out)
        if live:
            from fp8lab.live.serving import serve

            serve(runs, out, twin=twin, port=port or 0, say=typer.echo)
        typer.echo(f"report: {write_report(runs, out, twin=twin)}")


@app.command()
def tail(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run, or a folder of them.")],
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="One frame, and no more.")] = False,
) -> None:
    """Follow a run in the terminal while it is recorded; exit code 1 if it broke off.

    A run that is not there yet is waited for. Of a folder it is the newest run that is being
    recorded. Where no terminal is, an update is a line, and a frame follows at the end.
    """
    from fp8lab.live import follow

    state = follow(run, Console(markup=False, highlight=False), interval=interval, once=once)
    if state not in ("finished", "running", "unknown"):
        raise typer.Exit(1)


@app.command()
def compare(
    runs: RunPaths,
    against: Annotated[
        str, typer.Option(metavar="ARM", help="What losses and speeds are compared with.")
    ] = AGAINST,
    by: Annotated[
        Alignment | None, typer.Option(help="Losses at the same step, or after the same tokens.")
    ] = None,
    out: Page = None,
    as_json: Json = False,
) -> None:
    """One table of arms: diverged, final loss, what the casts did to the product, speed.

    Losses and speeds are medians over runs, final losses over finished ones ("unfinished": what
    the others came to; "steps": those they took, where they differ); staleness, saturated, flushed
    and bulk error are the largest recorded, the last three of steps recorded in full ("in full":
    how many). The loss gap is the median, over seeds that both have, of the final loss less that
    of the arm named by --against in the same part; the step time ratio is that of the median step
    times. With --by, the aligned loss is that at the furthest step, or number of tokens, that every
    arm of the part reached with a run that did not diverge.

    With --out a page: losses of every arm, a band over its seeds, and the table.
    """
    from fp8lab.report import demand_replaceable, write_comparison

    paths = _expand(runs)
    if out is not None and not as_json:
        demand_replaceable(out)
        written = write_comparison(runs, out, by=(by or Alignment.step).value, against=against)
        typer.echo(f"report: {written}")
        return
    _only_printed(out)
    opened = [open_run(path) for path in paths]
    require_arm(opened, against)
    rows = side_by_side(opened, against, by.value if by else None)
    if as_json:
        _print_json(rows)
        return
    print_rows(Console(markup=False), rows)


def _only_printed(out: Path | None) -> None:
    if out is not None:
        raise ValueError(f"--json prints and --out writes {out}, expected one of them")


def _expand(paths: Iterable[Path]) -> list[Path]:
    """Run directories at or below the paths; each path must hold at least one."""
    found = []
    for path in paths:
        below = list(find_runs(path))
        if not below:
            open_run(path)  # raises with the reason
        found += below
    return found


def _echo(said: object) -> None:
    """Lines, with names out of a stranger's model or file."""
    for line in str(said).splitlines():
        typer.echo(printable(line))


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(_without_nan(data), indent=1))


def _without_nan(data: Any) -> Any:
    """JSON has no NaN and no infinity: what is not a number is missing."""
    if isinstance(data, dict):
        return {key: _without_nan(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_without_nan(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
