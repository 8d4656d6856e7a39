"""What a long run costs: bytes a row, files, and the time and memory of reading a part of it.

The rows are as long as real ones: 24 tensors a step with moments, casts and a histogram of some
eighty counts, drawn anew so that they compress as badly as measured ones. They are made as Arrow
tables, because five million dictionaries would take longer than all that is tested here. Reading
is timed in a process of its own: its peak of memory is nobody else's. Bounds are generous: three
times what two busy cores needed, and a tenth of what loading everything takes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fp8lab import segments
from fp8lab.record import TABLES
from fp8lab.store import RunWriter

ROOT = Path(__file__).resolve().parents[1]
SITES = [f"layers.{n}.mlp:{role}" for n in range(6) for role in ("gate", "up", "product", "output")]
SHAPE = 4000.0 * np.exp(-0.5 * ((np.arange(80) - 55) / 14.0) ** 2)  # as of 512 x 256 normal ones


def tensor_rows(first_step: int, steps: int, draw: np.random.Generator) -> pa.Table:
    count = steps * len(SITES)
    columns: dict[str, pa.Array] = {
        "step": pa.array(np.repeat(np.arange(first_step, first_step + steps), len(SITES))),
        "rank": pa.array(np.zeros(count, dtype=np.int32)),
        "site": pa.array(SITES * steps),
        "count": pa.array(np.full(count, 1 << 19)),
        "hot_channel": pa.array(draw.integers(0, 688, count, dtype=np.int32)),
        "histogram_start": pa.array(draw.integers(400, 430, count, dtype=np.int32)),
        "recipe": pa.array(["DelayedScaling"] * count),
        "format": pa.array(["E4M3"] * count),
    }
    counts = draw.poisson(SHAPE, (count, len(SHAPE)))
    offsets = np.arange(count + 1, dtype=np.int32) * len(SHAPE)
    columns["histogram"] = pa.ListArray.from_arrays(offsets, counts.reshape(-1))
    schema = TABLES["tensors"]
    for field in schema:
        if field.type == pa.float64():
            columns[field.name] = pa.array(draw.standard_normal(count))
        elif field.type == pa.int64() and field.name not in columns:
            columns[field.name] = pa.array(np.zeros(count, dtype=np.int64))
    arrays = [columns.get(field.name, pa.nulls(count, field.type)) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def record(path: Path, rows: int, rows_a_flush: int) -> tuple[RunWriter, float, int]:
    """A run that is still open, its seconds of writing, and the most folders it ever had."""
    writer = RunWriter.create(path, {})
    draw = np.random.default_rng(0)
    steps = rows_a_flush // len(SITES)
    # More rows than are packed together, so that none of them is packed with itself.
    pool = [tensor_rows(0, steps, draw) for _ in range(2 * segments.ROWS_AT_ONCE // rows_a_flush)]
    position = pool[0].column_names.index("step")
    seconds, most = 0.0, 0
    for number in range(rows // (steps * len(SITES))):
        step = pa.array(np.repeat(np.arange(steps) + number * steps, len(SITES)))
        batch = pool[number % len(pool)].set_column(position, TABLES["tensors"].field("step"), step)
        began = time.perf_counter()
        writer._write_segment({"tensors": batch})
        seconds += time.perf_counter() - began
        most = max(most, len(list((path / "segments").iterdir())))
    return writer, seconds, most


READ = """
import json, sys, time
from pathlib import Path
import fp8lab.store
from fp8lab.store import open_run

def peak():
    # Not getrusage: its peak of memory is inherited from the process that started this one.
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024

path, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
import pandas
pandas.DataFrame({"a": [1.0]}).sort_values("a")
told = {"MiB before": peak()}
began = time.perf_counter()
run = open_run(path)
told["open s"] = time.perf_counter() - began
began = time.perf_counter()
frame = run.tensors("cur_amax", sites="layers.3.mlp:product")
told |= {"site s": time.perf_counter() - began, "site rows": len(frame)}
began = time.perf_counter()
frame = run.tensors(steps=range(first, last))
told |= {"steps s": time.perf_counter() - began, "steps rows": len(frame)}
told["MiB more"] = peak() - told["MiB before"]
print(json.dumps(told))
"""


def read_in_part(path: Path, first: int, last: int) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path), str(first), str(last)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return dict(json.loads(done.stdout))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((200_000, 2_400), id="200 thousand rows"),
        pytest.param((5_000_000, 24_000), marks=pytest.mark.slow, id="5 million rows"),
    ],
)
def told(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What a run of so many rows, so many a flush, came to; read while open and when closed."""
    rows, rows_a_flush = request.param
    path = tmp_path_factory.mktemp("scale") / "run"
    writer, seconds, most = record(path, rows, rows_a_flush)
    rows = rows // rows_a_flush * rows_a_flush
    size = sum(file.stat().st_size for file in path.rglob("*.arrow"))
    found = {"rows": rows, "us/row": seconds / rows * 1e6, "folders": most, "segment bytes": size}
    found |= {"segment bytes/row": size / rows, "segment rows/GB": 1e9 * rows / size}
    found["running"] = read_in_part(path, 100, 200)
    began = time.perf_counter()
    writer.close()
    found["close s"] = time.perf_counter() - began
    size = (path / "tensors.parquet").stat().st_size
    found |= {"parquet bytes/row": size / rows, "parquet rows/GB": 1e9 * rows / size}
    found["closed"] = read_in_part(path, 100, 200)
    print(json.dumps(found, indent=1))
    return found


@pytest.mark.parametrize("state", ["running", "closed"])
def test_a_part_is_read_without_the_rest(state: str, told: dict[str, Any]) -> None:
    read, millions = told[state], told["rows"] / 1e6
    assert read["site rows"] == told["rows"] // len(SITES)
    assert read["steps rows"] == 100 * len(SITES)
    assert read["open s"] < 0.1
    assert read["site s"] < 1.0 + 2.0 * millions
    assert read["steps s"] < 2.0 + 1.0 * millions
    # All of it would be a kilobyte a row: 200 MiB, 5 GiB.
    assert read["MiB more"] < 180 + 20 * millions


def test_rows_are_small_and_files_are_few(told: dict[str, Any]) -> None:
    assert told["segment bytes/row"] < 400
    assert told["parquet bytes/row"] < 350
    assert told["folders"] <= 3 * segments.MERGED_AT_ONCE + told["segment bytes"] // (4 << 20)
