"""What a page costs: seconds, memory and bytes by tensor rows, up to 80 layers x 10,000 steps.

    python tests/bench_report.py                 replaces its section of reports/benchmarks.md
    python tests/bench_report.py --rows 100000   prints that one line

The runs are made up but go through fp8lab's own writer, and are in proportion what `watch(every=1)`
records: six tensors a layer and step, each with moments, a histogram of some eighty counts and a
packed one, drawn anew so that they compress as badly as measured ones; 28 channel rows a layer and
step, one of them with its weights. Values are those of an ordinary training under delayed scaling
into which one layer's product jumps and the loss leaves, so that rules and pictures have work.
A page is written in a process of its own: its peak of memory is nobody else's. Beside wall seconds
stand those of the processor, for the machine may be busy with other things. Runs are as long as the
rows need and as deep as 80 layers allow. 10 million rows take a quarter of an hour and 10 GB of
disk; rows are made as Arrow tables, because as many dictionaries would take a day.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fp8lab.record import TABLES, Table
from fp8lab.store import RunWriter

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "reports" / "benchmarks.md"
TITLE = "## A page by the rows of its run"
SIZES = {10_000: (8, 208), 100_000: (80, 208), 1_000_000: (80, 2083), 10_000_000: (80, 20_833)}
GOAL = 80, 10_000

ROLES = (":product", ":gate", ":up", ".gate:input", ".down:weight", ".down:grad_output")
CAST = np.array([role in (":product",) or role.startswith(".") for role in ROLES])
COUNTS = 4000.0 * np.exp(-0.5 * ((np.arange(80) - 55) / 14.0) ** 2)  # of 512 x 256 normal ones
START, CHANNELS, HIDDEN, WEIGHTS = 410, 28, 11_008, 64
STEPS_AT_ONCE = 50
POOL = 3  # flushes that differ: beyond what is packed together
JUMPS_AT, LEAVES_AT = 0.75, 0.85  # share of the steps
JUMP = 24.0


class Rows:
    """Rows of some steps, drawn once; every flush has them under steps of its own."""

    def __init__(self, layers: int, draw: np.random.Generator) -> None:
        self.layers, self.draw = layers, draw
        self.tensors = [self._tensors() for _ in range(POOL)]
        self.channels = [self._channels() for _ in range(POOL)]

    def _tensors(self) -> dict[str, Any]:
        sites = [f"layers.{layer}.mlp{role}" for layer in range(self.layers) for role in ROLES]
        count, draw = STEPS_AT_ONCE * len(sites), self.draw
        cast = np.tile(CAST, count // len(ROLES))
        product = np.tile(np.array([role == ":product" for role in ROLES]), count // len(ROLES))
        positive = draw.lognormal(0.0, 0.1, count)
        columns: dict[str, Any] = {
            "rank": np.zeros(count, dtype=np.int32),
            "site": pa.array(sites).take(pa.array(np.tile(np.arange(len(sites)), STEPS_AT_ONCE))),
            "hot_channel": pa.array(draw.integers(0, HIDDEN, count, np.int32), mask=~cast),
            "recipe": _named("DelayedScaling", cast),
            "format": _named("E4M3", cast),
            "seen": _named("seen", product),
            "cur_amax": 4.0 * positive,
            "scale": np.where(cast, 64.0, np.nan),
            "staleness": np.where(cast, draw.lognormal(0.0, 0.2, count), np.nan),
            "sqnr_db": np.where(cast, draw.normal(31.0, 0.3, count), np.nan),
        }
        for name in ("zeros", "nans", "infs"):
            columns[name] = np.zeros(count, dtype=np.int64)
        for name in ("saturated", "flushed", "subnormal", "bulk_error"):
            columns[name] = np.where(cast, draw.uniform(0.0, 0.03, count), np.nan)
        for name in ("token_ratio", "channel_ratio", "persistence", "amplification", "coincidence"):
            columns[name] = np.where(product, draw.uniform(0.5, 1.0, count), np.nan)
        # Without gemm_error: it is recorded where a recipe asks for it.
        for field in TABLES["tensors"]:
            if field.type == pa.float64() and field.name not in (*columns, "gemm_error"):
                columns[field.name] = 1.0 + np.abs(draw.standard_normal(count))
        return columns | _histograms(draw.poisson(np.repeat(COUNTS / 2, 2), (count, 160)))

    def _channels(self) -> dict[str, Any]:
        layers, draw = self.layers, self.draw
        count = STEPS_AT_ONCE * layers * CHANNELS
        sites = pa.array([f"layers.{layer}.mlp" for layer in range(layers)])
        layer = np.tile(np.repeat(np.arange(layers), CHANNELS), STEPS_AT_ONCE)
        hottest = np.arange(count) % CHANNELS == 0
        columns: dict[str, Any] = {
            "rank": np.zeros(count, dtype=np.int32),
            "site": sites.take(pa.array(layer)),
            "channel": (17 * np.arange(count) % CHANNELS * 31 + layer).astype(np.int32),
            "alignment": draw.uniform(-0.3, 0.3, count),
        }
        for field in TABLES["channels"]:
            if field.type == pa.float64() and field.name not in columns:
                columns[field.name] = 1.0 + np.abs(draw.standard_normal(count))
        ends = np.concatenate([[0], np.cumsum(hottest)]).astype(np.int32) * WEIGHTS
        offsets = pa.array(ends, mask=np.append(~hottest, False))
        for name in ("gate_weights", "up_weights"):
            values = draw.standard_normal(int(ends[-1]), np.float32)
            columns[name] = pa.ListArray.from_arrays(offsets, pa.array(values))
        return columns

    def flush(self, first: int, jumps_at: int) -> dict[Table, pa.Table]:
        """The tensor and channel rows of `STEPS_AT_ONCE` steps from `first` on."""
        steps = np.arange(first, first + STEPS_AT_ONCE)
        number = first // STEPS_AT_ONCE % POOL
        tensors, channels = dict(self.tensors[number]), self.channels[number]
        site = len(ROLES) * (self.layers // 2)
        jumping = np.zeros(len(tensors["cur_amax"]), dtype=bool)
        jumping[site :: len(ROLES) * self.layers] = (steps >= jumps_at) & (steps % 5 == 0)
        for name in ("cur_amax", "staleness"):
            tensors[name] = tensors[name] * np.where(jumping, JUMP, 1.0)
        tensors["sqnr_db"] = np.where(jumping, 2.0, tensors["sqnr_db"])
        tensors["step"] = np.repeat(steps, len(ROLES) * self.layers)
        more = {"step": np.repeat(steps, CHANNELS * self.layers)}
        return {
            "tensors": _table("tensors", tensors),
            "channels": _table("channels", channels | more),
        }


def _histograms(counts: NDArray[np.int64]) -> dict[str, Any]:
    """Of counts in 8 bins an octave: what a row has of them, as `Sketch.statistics` says."""
    rows, bins = counts.shape
    offsets = np.arange(rows + 1, dtype=np.int32)
    quarters = counts.reshape(rows, -1, 2).sum(axis=2)
    numbers = np.stack([counts, counts // 64, counts // 16], axis=1).astype("<u2")
    planes = numbers.reshape(rows, -1).view(np.uint8).reshape(rows, -1, 2).transpose(0, 2, 1)
    head = np.frombuffer((2 * START).to_bytes(2, "little") + b"\x02", dtype=np.uint8)
    packed = np.concatenate([np.tile(head, (rows, 1)), planes.reshape(rows, -1)], axis=1)
    ends = pa.py_buffer(offsets * packed.shape[1])
    return {
        "count": counts.sum(axis=1),
        "histogram_start": np.full(rows, START, dtype=np.int32),
        "histogram": pa.ListArray.from_arrays(offsets * (bins // 2), quarters.reshape(-1)),
        "bins": pa.Array.from_buffers(
            pa.binary(), rows, [None, ends, pa.py_buffer(packed.tobytes())]
        ),
    }


def _named(name: str, where: NDArray[np.bool_]) -> pa.Array:
    return pa.array([name]).take(pa.array(np.zeros(len(where), np.int32), mask=~where))


def _table(table: Table, columns: dict[str, Any]) -> pa.Table:
    """Columns as the schema has them; NaN, which no probe records, is missing."""
    schema, count = TABLES[table], len(columns["step"])
    arrays = []
    for field in schema:
        values = columns.get(field.name)
        if values is None:
            arrays.append(pa.nulls(count, field.type))
        elif isinstance(values, np.ndarray):
            arrays.append(pa.array(values, field.type, from_pandas=True))
        else:
            arrays.append(values)
    return pa.Table.from_arrays(arrays, schema=schema)


def record(path: Path, layers: int, steps: int) -> int:
    """A finished run of that size at `path`; its tensor rows."""
    precision = {
        f"layers.{layer}.mlp.{name}": {
            "input@output": "E4M3 DelayedScaling",
            "weight@output": "E4M3 DelayedScaling",
            "grad_output@grad_input": "E5M2 DelayedScaling",
        }
        for layer in range(layers)
        for name in ("gate", "up", "down")
    }
    linears = {name: {"class": "Fp8Linear", "in": 4096, "out": HIDDEN} for name in precision}
    info = {"every": 1, "precision": precision, "linears": linears, "config": {"seed": 0}}
    writer = RunWriter.create(path, info)
    rows, count = Rows(layers, np.random.default_rng(0)), 0
    for first in range(0, steps, STEPS_AT_ONCE):
        tables = rows.flush(first, int(JUMPS_AT * steps))
        for table, full in tables.items():
            writer._backlog.add({table: full.filter(pa.compute.less(full["step"], steps))})
        writer.append("steps", _step_rows(range(first, min(first + STEPS_AT_ONCE, steps)), steps))
        count += min(STEPS_AT_ONCE, steps - first) * layers * len(ROLES)
        writer.flush()
    lost = int(LEAVES_AT * steps)
    writer.append("events", [{"step": lost, "kind": "diverged", "detail": "made so"}])
    writer.close(result={"diverged_at": lost, "final_loss": None})
    return count


def _step_rows(numbers: range, steps: int) -> list[dict[str, Any]]:
    leaves = int(LEAVES_AT * steps)
    return [
        {
            "step": step,
            "loss": (5.0 + 5.0 / (1 + step)) * (1.0 if step < leaves else 1e3),
            "grad_norm": 1.0 + 0.1 * (step % 7),
            "learning_rate": 1e-3,
            "update_ratio": 1e-3,
            "logit_max": 12.0,
            "seconds": 0.5,
        }
        for step in numbers
    ]


WRITE = """
import json, os, sys, time
from pathlib import Path
from fp8lab.report import write_report

def peak():
    # Not getrusage: its peak of memory is inherited from the process that started this one.
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024

began, before = time.perf_counter(), os.times()
page = write_report([sys.argv[1]], sys.argv[2])
wall, after = time.perf_counter() - began, os.times()
cpu = after.user + after.system - before.user - before.system
print(json.dumps({"s": wall, "cpu s": cpu, "MiB": peak(), "bytes": page.stat().st_size}))
"""


def write_page(run: Path, page: Path) -> dict[str, float]:
    """Wall and processor seconds, peak MiB, bytes: of writing the page in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", WRITE, str(run), str(page)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"no page of {run}:\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def line(layers: int, steps: int, folder: Path) -> str:
    """A row of the table; the run is gone afterwards."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        run = Path(place) / "run"
        rows = record(run, layers, steps)
        size = sum(file.stat().st_size for file in run.rglob("*") if file.is_file())
        told = write_page(run, Path(place) / "page.html")
    goal = "≤ 60 s, ≤ 2 GB, ≤ 15 MB" if (layers, steps) == GOAL else ""
    return (
        f"| {rows:,} | {layers} × {steps:,} | {size / 1e9:.2f} | {told['s']:.1f} | "
        f"{told['cpu s']:.1f} | {told['MiB'] / 1024:.2f} | {told['bytes'] / 1e6:.2f} | {goal} |"
    )


def replaced(text: str, title: str, section: str) -> str:
    """`text` with this section in the place of the one of that title, or at its end."""
    before, found, after = text.partition(f"{title}\n")
    _, more, others = after.partition("\n## ")
    rest = f"\n## {others}" if found and more else ""
    return f"{before.rstrip()}\n\n{title}\n\n{section.strip()}\n{rest}"


def with_kept(text: str, before: str) -> str:
    """The report `text` with the sections that others write (this file, the GPU suite) and `before`
    has."""
    for title in (TITLE, "## On a GPU"):
        section = before.partition(f"{title}\n")[2].partition("\n## ")[0]
        text = replaced(text, title, section) if section else text
    return text


def main() -> None:
    """Measure, print and put the table into the report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, help="one size alone, printed and not written")
    parser.add_argument("--folder", type=Path, help="where there are 10 GB for a while")
    options = parser.parse_args()
    if options.rows:
        layers = min(80, max(1, options.rows // (len(ROLES) * 200)))
        print(line(layers, options.rows // (len(ROLES) * layers), options.folder))
        return
    lines = [
        "Written by `python tests/bench_report.py`; a process of its own a page, two cores.",
        "",
        "| tensor rows | layers × steps | run, GB | wall, s | processor, s | peak, GiB | page, MB "
        "| goal |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for layers, steps in sorted([*SIZES.values(), GOAL], key=lambda one: one[0] * one[1]):
        lines.append(line(layers, steps, options.folder))
        print(lines[-1], flush=True)
    text = REPORT.read_text(encoding="utf-8")
    REPORT.write_text(replaced(text, TITLE, "\n".join(lines)), encoding="utf-8")


if __name__ == "__main__":
    main()
