"""What the writer logged, read back from the file that an offline run leaves.

W&B ships no reader for that file in Python any more, so `records` below is one: fragments as
LevelDB's log keeps them (blocks of 32 KiB; checksum, length and kind before each), and W&B's own
protocol buffers inside.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from wandb.proto import wandb_internal_pb2

import fp8lab
from fp8lab.integrations.wandb import Writer
from fp8lab.lab.model import LanguageModel, ModelConfig

BLOCK, HEADER = 32768, 7
SITE = "fp8lab/layers.3.mlp/product"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[wandb.Run]:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for place in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{place}_DIR", str(tmp_path))
    # What the machine is and what the repository is called is nothing that a test should collect.
    settings = wandb.Settings(
        x_disable_stats=True, x_disable_meta=True, disable_git=True, console="off", silent=True
    )
    with wandb.init(project="test", dir=tmp_path, settings=settings) as run:
        yield run


def records(data: bytes) -> Iterator[Any]:
    position, record = HEADER, b""  # the file has a header, too, as long as a fragment's
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:  # too little left of the block for a fragment
            position += BLOCK - position % BLOCK
            continue
        length, kind = (
            int.from_bytes(data[position + 4 : position + 6], "little"),
            data[position + 6],
        )
        record += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (1, 4) and position <= len(data):  # whole, or last
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def read(run: wandb.Run, path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The logged rows, each with its `_step`, and the metrics that were defined."""
    run.finish()
    (file,) = path.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 60.0
    found: list[tuple[str, Any]] = []
    # Another process writes the file, and is not done when `finish` returns.
    while not any(kind == "exit" for kind, _ in found):
        assert time.monotonic() < deadline
        time.sleep(0.01)
        found = [(r.WhichOneof("record_type"), r) for r in records(file.read_bytes())]
    rows, metrics = [], {}
    for kind, record in found:
        if kind == "history":
            items = {item.nested_key[0]: item.value_json for item in record.history.item}
            names = items.keys() - {"_runtime", "_timestamp"}
            rows.append({name: json.loads(items[name]) for name in sorted(names)})
        if kind == "metric":
            metrics[record.metric.name or record.metric.glob_name] = record.metric
    return rows, metrics


def test_the_headlines_over_a_step_of_their_own(run: wandb.Run, tmp_path: Path) -> None:
    writer = Writer(run)
    writer(7, {"fp8lab/loss": 5.5, f"{SITE}/cur_amax": 448.0, f"{SITE}/std": 1.5})
    writer(17, {"fp8lab/loss": math.nan, f"{SITE}/staleness": 2.5, "fp8lab/of_mine": -1.0})
    rows, metrics = read(run, tmp_path)
    loss = rows[1].pop("fp8lab/loss")
    assert math.isnan(loss)
    assert rows == [
        {"fp8lab/step": 7, "fp8lab/loss": 5.5, f"{SITE}/cur_amax": 448, "_step": 7},
        {"fp8lab/step": 17, f"{SITE}/staleness": 2.5, "fp8lab/of_mine": -1, "_step": 17},
    ]
    assert metrics["fp8lab/*"].step_metric == "fp8lab/step"
    assert metrics["fp8lab/step"].options.hidden


def test_statistics_of_ones_own_choice(run: wandb.Run, tmp_path: Path) -> None:
    Writer(run, statistics=["mse"])(0, {f"{SITE}/mse": 0.5, f"{SITE}/cur_amax": 448.0})
    assert read(run, tmp_path)[0] == [{"fp8lab/step": 0, f"{SITE}/mse": 0.5, "_step": 0}]


@pytest.mark.parametrize("ours_first", [False, True])
def test_the_callers_rows_with_a_step_are_kept(
    ours_first: bool, run: wandb.Run, tmp_path: Path
) -> None:
    writer = Writer(run)
    for step in range(3):
        if ours_first:
            writer(step, {"fp8lab/loss": 0.5 + step})
        run.log({"loss": 0.5 + step}, step=step)
        if not ours_first:
            writer(step, {"fp8lab/loss": 0.5 + step})
    assert read(run, tmp_path)[0] == [
        {"loss": 0.5 + step, "fp8lab/loss": 0.5 + step, "fp8lab/step": step, "_step": step}
        for step in range(3)
    ]


def test_nothing_is_lost_where_the_caller_counts_otherwise(run: wandb.Run, tmp_path: Path) -> None:
    writer = Writer(run)
    for step in range(100, 103):  # a training resumed at 100, logged without steps, twice a step
        run.log({"loss": step})
        run.log({"accuracy": step})
        writer(step - 100, {"fp8lab/loss": step})  # and a watch that counts from 0
    rows = read(run, tmp_path)[0]
    for name in ("loss", "accuracy", "fp8lab/loss"):
        assert [row[name] for row in rows if name in row] == [100, 101, 102], name
    assert [row["fp8lab/step"] for row in rows if "fp8lab/step" in row] == [0, 1, 2]


def test_through_a_real_watch(run: wandb.Run, tmp_path: Path) -> None:
    model = LanguageModel(ModelConfig(dim=16, layers=1, heads=2, context=8), seed=0)
    losses = []
    with fp8lab.watch(model, tmp_path / "run", every=2, listeners=[Writer(run)]) as watch:
        for step in range(3):
            loss = model.loss(torch.randint(0, 256, (2, 9)))
            loss.backward()
            watch.step(step, loss=loss)
            losses.append(loss.item())
    amax = fp8lab.open_run(tmp_path / "run").tensors().query("site == 'layers.0.mlp:product'")
    rows = read(run, tmp_path)[0]
    assert [row["_step"] for row in rows] == [row["fp8lab/step"] for row in rows] == [0, 2]
    assert [row["fp8lab/loss"] for row in rows] == losses[::2]
    name = "fp8lab/layers.0.mlp/product/cur_amax"
    assert [row[name] for row in rows] == amax["cur_amax"].tolist()[::2]


def test_a_statistic_that_does_not_exist_is_refused(run: wandb.Run) -> None:
    with pytest.raises(ValueError, match="'amax' is not one, expected"):
        Writer(run, statistics=["amax"])


def test_without_the_library_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delitem(sys.modules, "fp8lab.integrations.wandb")
    with pytest.raises(ImportError, match=r"pip install 'fp8lab\[wandb\]'$"):
        import fp8lab.integrations.wandb  # noqa: F401
