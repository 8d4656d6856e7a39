"""Malformed run directories: recorded by `watch`, damaged in info, rows, bytes or layout, and read.

`make_valid` records the runs of a tiny experiment, one that was clipped and diverged, one that was
killed; and a checkpoint. Rows are also damaged in ways that Arrow finds nothing wrong with: values
that nobody measures, columns that are missing, doubled or of another type.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from malformed_inputs import (
    NASTY,
    Draw,
    Kind,
    below,
    damage_bytes,
    damaged_place,
    deep,
    demand,
    gone,
    invoke,
    json_text,
    one_line,
    pick,
    replaced,
    small_files,
)

NOBODY = 2**22 + 1  # beyond the largest process id
REPORTS = 1 / 60  # a page takes as long as all other verbs together


def make_valid(base: Path) -> None:
    """Runs, an experiment's folder and a checkpoint, all recorded for real."""
    import tiny_experiment
    import torch
    from malformed_files import trained

    from fp8lab.lab.experiment import Job, Settings
    from fp8lab.lab.train import save_checkpoint

    base.mkdir(parents=True, exist_ok=True)
    tiny = tiny_experiment.EXPERIMENT
    torch.manual_seed(0)
    for part in tiny.parts:
        if part.prepare is not None:
            part.prepare(0, base / "runs" / part.name, Settings(), lambda *_: None)
        for arm in part.arms:
            path = base / "runs" / part.name / arm.name / "seed-0"
            part.run(Job("tiny", part.name, arm, 0, path, Settings()), lambda *_: None)
    described = tiny.describe() | {"settings": {"steps": None, "text": None}}
    (base / "runs" / "experiment.json").write_text(json.dumps(described))
    clipped(base / "clipped")
    killed(base / "killed")
    model, optimizer = trained()
    save_checkpoint(base / "c.safetensors", model, optimizer, 3)


def clipped(path: Path) -> None:
    """A run with findings, and with weights, histograms and doses to draw."""
    import torch

    from fp8lab import DelayedScaling, GatedFeedForward, Plan, convert, watch

    model = torch.nn.Sequential(GatedFeedForward(8, 16))
    convert(model, Plan(recipe=DelayedScaling(amax_history_len=2)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    config = {"part": "p", "arm": "a", "seed": 0, "mitigations": []}
    with watch(model, path, optimizer=optimizer, every=1, config=config) as watching:
        for step in range(16):
            x = torch.randn(8, 8) * (1.0 if step < 12 else 40.0)
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            watching.step(step, loss=float("nan") if step == 15 else loss, dose=float(step))
        doses = [{"dose": 1.0, "loss": 0.5, "gradient_cosine": 0.9}]
        watching.event(15, "diverged", "loss is nan")
        watching.set_result(diverged_at=15, final_loss=None, doses=doses)


def killed(path: Path) -> None:
    """A run whose process is gone: its rows are in segments."""
    import torch

    from fp8lab import GatedFeedForward, watch

    model = torch.nn.Sequential(GatedFeedForward(8, 16))
    watching = watch(model, path, every=2, flush_seconds=0.0)
    for step in range(6):
        loss = model(torch.randn(8, 8)).square().mean()
        loss.backward()
        watching.step(step, loss=loss)
    watching.event(5, "noted", "something")
    shutil.copytree(path, path.with_name("kept"))
    watching.__exit__(None, None, None)
    gone(path)
    path.with_name("kept").rename(path)
    info = json.loads((path / "run.json").read_text()) | {"pid": NOBODY}
    (path / "run.json").write_text(json.dumps(info))


def make_run(base: Path, folder: Path, draw: Draw) -> None:
    """The damaged run `runs/mine` beside one that is not, and sometimes an experiment's file."""
    names = ("clipped", "clipped", "killed", "runs/second/hot/seed-0", "runs/first/current/seed-0")
    shutil.copytree(base / pick(draw, names), folder / "runs" / "mine")
    shutil.copytree(base / "runs/second/bf16/seed-0", folder / "runs" / "other")
    if draw.random() < 0.2:
        shutil.copy(base / "runs" / "experiment.json", folder / "runs" / "experiment.json")
    (folder / "page.html").write_text("<!DOCTYPE html>the page of yesterday")


def tables_of(run: Path) -> list[Path]:
    files = (path for path in below(run) if path.is_file())  # one may be a pipe by now
    return [path for path in files if path.suffix in (".arrow", ".parquet")]


def damage_info(run: Path, draw: Draw) -> str:
    if not (run / "run.json").is_file():  # a pipe by now, which nobody writes
        return "no further damage"
    info = json.loads((run / "run.json").read_bytes())
    for _ in range(int(draw.integers(1, 4))):
        info = replaced(info, draw, pick(draw, NASTY))
    (run / "run.json").write_bytes(json_text(info, draw))
    return f"run.json is {str(info)[:200]!r}"


def damage_rows(run: Path, draw: Draw) -> str:
    """A table that Arrow finds nothing wrong with, and a reader might."""
    import pyarrow as pa
    import pyarrow.ipc
    import pyarrow.parquet as pq

    file = pick(draw, tables_of(run))
    read = (
        pq.read_table
        if file.suffix == ".parquet"
        else (lambda path: pa.ipc.open_file(path.read_bytes()).read_all())
    )
    rows = read(file)
    for _ in range(int(draw.integers(1, 4))):
        name = pick(draw, rows.column_names)
        rows = _DAMAGED_COLUMN[pick(draw, list(_DAMAGED_COLUMN))](rows, name, draw)
    if file.suffix == ".parquet":
        pq.write_table(rows, file)
    else:
        with pa.ipc.new_file(str(file), rows.schema) as sink:
            sink.write_table(rows)
    return f"rows of {file.name}"


def _values(rows: Any, name: str, draw: Draw) -> Any:
    """Some values of a column are others of its type."""
    import pyarrow as pa

    kind = rows.schema.field(name).type
    odd: list[Any] = [None]
    if pa.types.is_floating(kind):
        odd += [float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 1e308, 5e-324]
    elif pa.types.is_integer(kind):
        bits = kind.bit_width - 1
        odd += [-1, 0, 2**bits - 1, -(2**bits)]
    elif pa.types.is_string(kind):
        odd += ["", "\x00", ":product", "E4M3", "max", "x" * 1000, "é\n", "Float8CurrentScaling"]
    elif pa.types.is_map(kind):
        odd += [[("loss", 1.0)], [("", None)], [("dose", float("nan"))], [("step", 3.0)], []]
        odd += [[("dose", 1.0), ("dose", 2.0)]]
    else:
        odd += [[], [-1], [0] * 5000, [2**31 - 1] * 2, [None]]
    values = rows[name].to_pylist()
    share = pick(draw, (0.1, 0.5, 1.0))
    values = [pick(draw, odd) if draw.random() < share else value for value in values]
    return rows.set_column(
        rows.column_names.index(name), rows.schema.field(name), [_array(values, kind)]
    )


def _array(values: list[Any], kind: Any) -> Any:
    import pyarrow as pa

    try:
        return pa.array(values, kind)
    except (pa.ArrowException, OverflowError):  # a null where the type has none
        return pa.nulls(len(values), kind)


def _of_another_type(rows: Any, name: str, draw: Draw) -> Any:
    import pyarrow as pa

    kinds = (pa.string(), pa.float16(), pa.int8(), pa.bool_(), pa.binary(), pa.list_(pa.string()))
    kinds += (pa.large_string(), pa.uint64(), pa.timestamp("ns"), pa.decimal128(5, 2), pa.null())
    kind = pick(draw, kinds)
    try:
        column = rows[name].cast(kind)
    except (pa.ArrowException, NotImplementedError):
        column = pa.nulls(rows.num_rows, kind)
    return rows.set_column(rows.column_names.index(name), name, column)


def _encoded(rows: Any, name: str, draw: Draw) -> Any:
    import pyarrow as pa

    try:
        column = rows[name].dictionary_encode()
    except (pa.ArrowException, NotImplementedError):
        return rows
    return rows.set_column(rows.column_names.index(name), name, column)


_DAMAGED_COLUMN: dict[str, Callable[[Any, str, Draw], Any]] = {
    "values": _values,
    "more values": _values,
    "most values": _values,
    "type": _of_another_type,
    "encoded": _encoded,
    "gone": lambda rows, name, _: rows.drop_columns([name]) if rows.num_columns > 1 else rows,
    "twice": lambda rows, name, _: rows.append_column(name, rows[name]),
    "unknown": lambda rows, name, _: rows.append_column("unknown\n" + name, rows[name]),
    "no rows": lambda rows, *_: rows.slice(0, 0),
    "doubled": lambda rows, *_: __import__("pyarrow").concat_tables([rows, rows]),
}


def damage_layout(run: Path, draw: Draw) -> str:
    """Entries that are missing, too many, or not of the sort expected."""
    where = below(run)
    odd = ("x", "²", "000009", "٣", ".000007", "-1", "replaces-earlier", "steps.parquet", "ranks")
    odd += ("segments", "events.arrow", "run.json", "experiment.json", os.fsdecode(b"\xff\xfe"))
    parents = [run, *(path for path in where if path.is_dir() and not path.is_symlink())]
    fate = draw.random()
    if fate < 0.5 and where:
        target = pick(draw, where)
        damaged_place(target, draw)
    elif fate < 0.85:
        target = pick(draw, parents) / pick(draw, odd)
        damaged_place(target, draw)
    elif fate < 0.9:
        target = pick(draw, (run, run.parent)) / "deep"
        if not target.exists():
            deep(target)
    else:
        one, other = pick(draw, where), pick(draw, where)
        target = one
        if one.is_file() and other.is_file():
            hidden = one.with_name(".swap")
            one.rename(hidden)
            other.rename(one) if one != other else None
            hidden.rename(other)
    return f"place {target.name!r}"


def damage_run(folder: Path, draw: Draw) -> str:
    run = folder / "runs" / "mine"
    try:
        experiment = folder / "runs" / "experiment.json"
        fate = draw.random()
        if experiment.is_file() and fate < 0.5:
            described = json.loads(experiment.read_bytes())
            for _ in range(int(draw.integers(1, 3))):
                described = replaced(described, draw, pick(draw, NASTY))
            experiment.write_bytes(json_text(described, draw))
            return "experiment.json"
        if fate < 0.25:
            return damage_info(run, draw)
        if fate < 0.5:
            return damage_rows(run, draw)
        if fate < 0.75:
            return damage_bytes(pick(draw, small_files(run)), draw)
        return damage_layout(run, draw)
    except (ValueError, OSError, RecursionError, ImportError, KeyError) as error:
        return f"no further damage ({type(error).__name__})"  # nothing is left to damage
    except Exception as error:
        if type(error).__module__.startswith("pyarrow"):
            return "no further damage"
        raise


def use_run(folder: Path, draw: Draw) -> None:
    """Only RunError from the library; the verbs end in one line."""
    from fp8lab.store import RunError, find_runs, open_run

    mine = folder / "runs" / "mine"
    before = list(find_runs(folder))
    demand(len(before) == len(set(before)), "a run is found twice")
    with one_line("mine", RunError):
        run = open_run(mine)
        str(run), run.state, run.name
        for table in (run.steps, run.tensors, run.channels, run.events):
            with one_line("mine", RunError):
                table()
    if draw.random() < REPORTS:
        code = invoke("runs", "report", folder / "runs", "-o", folder / "page-new.html")
        demand(
            (folder / "page-new.html").exists() == (code == 0), "a page if and only if all is well"
        )
        if code == 2:
            invoke("runs", "report", folder / "runs", "-o", folder / "page.html")
    flags = ("--json",) if draw.random() < 0.5 else ()
    verb = pick(draw, ("show", "diagnose", "compare", "ls", "twin", "replay"))
    if verb == "ls":
        demand(invoke("runs", "ls", folder, *flags) == 0, "ls never fails")
    elif verb == "twin":
        invoke("mine", "diagnose", folder / "runs" / "other", "--twin", mine, *flags)
    elif verb == "replay":
        recipe = pick(draw, ("DelayedScaling", "Float8CurrentScaling", "MXFP8BlockScaling"))
        invoke("mine", "replay", mine, "--recipe", recipe, *flags)
    else:
        invoke("mine", verb, mine, *flags)


def warm_run() -> None:
    import matplotlib.pyplot  # noqa: F401  (what a first use would load)
    import seaborn  # noqa: F401
    import torch

    import fp8lab.cli
    import fp8lab.lab.experiment
    import fp8lab.report.page  # noqa: F401

    torch.set_num_threads(1)


RUN = Kind(make_run, damage_run, use_run, warm_run)
