"""Rows of several processes together are those of one process on the same data.

Real processes, started by torchrun, talk over gloo. One process computes the parts of the batch as
micro-batches, so that every matrix product has the shape that it has there, and nothing is learned:
what then differs between the rows differs in how they were added up. Nothing may.
"""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.distributed as dist
from ranks_on_cpu import CONFIG, PARALLEL, SELECT, batches, loss_of

import fp8lab
from fp8lab.lab.model import LanguageModel

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[1]


def torchrun(processes: int, *arguments: str) -> None:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc-per-node={processes}", str(ROOT / "tests" / "ranks_on_cpu.py"), *arguments),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def rows_of(path: Path, rank: int) -> pd.DataFrame:
    frame = fp8lab.open_run(path).tensors()
    frame = frame[frame["rank"] == rank].drop(columns="rank")
    return frame.set_index(["step", "site"]).sort_index()


@cache
def of_one_process(parts: int, folder: Path) -> pd.DataFrame:
    torch.manual_seed(0)
    model = LanguageModel(CONFIG, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    path = folder / f"one, {parts} parts"
    with fp8lab.watch(model, path, optimizer=optimizer, every=1, select=SELECT) as watching:
        for step in range(4):
            optimizer.zero_grad()
            for tokens in batches(step, parts):
                loss = loss_of(model, tokens)
                loss.backward()
            optimizer.step()
            watching.step(step, loss=loss)
    return rows_of(path, 0)


# Long or of one process alone: in the rows of the processes.
LOCAL = ["channel_ratio", "token_ratio", "persistence", "seen"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("parallelism", ["ddp", "fsdp2"])
def test_merged_rows_are_those_of_one_process(
    parallelism: str, processes: int, folder: Path, tmp_path: Path
) -> None:
    torchrun(processes, parallelism, "0", str(tmp_path / "run"), str(tmp_path / "left"))
    merged, one = rows_of(tmp_path / "run", -1), of_one_process(processes, folder)
    assert merged.index.tolist() == one.index.tolist()
    # Gradients are divided by the number of processes, and added up in the order of a ring.
    is_of_update = one.index.get_level_values("site").str.contains("grad_weight|exp_avg")
    columns = one.columns.difference([*LOCAL, "hot_channel"])
    forward = ~is_of_update & ~one.index.get_level_values("site").str.contains("grad_")
    pd.testing.assert_frame_equal(
        merged.loc[forward, columns], one.loc[forward, columns], check_exact=True
    )
    counted = ["count", "zeros", "nans", "infs"]
    pd.testing.assert_frame_equal(merged[counted], one[counted])


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_amax_of_a_tensor_parallel_product_is_the_global_one(
    processes: int, folder: Path, tmp_path: Path
) -> None:
    torchrun(processes, "tensor_parallel", "0", str(tmp_path / "run"), str(tmp_path / "left"))
    merged, one = rows_of(tmp_path / "run", -1), of_one_process(1, folder)
    parts = [rows_of(tmp_path / "run", rank) for rank in range(processes)]
    for step in range(4):
        for layer in range(CONFIG.layers):
            for role in ("gate", "up", "product", "output"):
                key = step, f"layers.{layer}.mlp:{role}"
                row, expected = merged.loc[key], one.loc[key]
                assert row["count"] == expected["count"], key
                assert row["cur_amax"] == max(part.loc[key]["cur_amax"] for part in parts), key
                # Splitting a matrix product may change its last bits.
                for column in ("cur_amax", "l2_norm", "kurtosis", "std"):
                    assert row[column] == pytest.approx(expected[column], rel=1e-5), (key, column)
            key = step, f"layers.{layer}.mlp:product"
            assert row_of_channel(parts, key) == one.loc[key]["hot_channel"]
            assert merged.loc[key]["hot_channel"] == one.loc[key]["hot_channel"]


def test_a_process_may_have_what_another_has_not(tmp_path: Path) -> None:
    torchrun(2, "experts", "0.01", str(tmp_path / "run"), str(tmp_path / "left"))
    parts = [rows_of(tmp_path / "run", rank) for rank in range(2)]
    merged = rows_of(tmp_path / "run", -1)
    for step in range(4):
        counts = [merged.loc[step, f"layers.{layer}.mlp:gate"]["count"] for layer in range(3)]
        alone = parts[1].loc[step, "layers.2.mlp:gate"]["count"]
        assert counts == [2 * alone, 2 * alone, alone]
        # The process that writes has never met it, nor what was asked of it.
        row, own = (rows.loc[step, "layers.2:residual"] for rows in (merged, parts[1]))
        for name in ("mxfp8_underflows%", "l1_norm", "cur_amax"):
            assert row[name] == own[name], name
    assert fp8lab.open_run(tmp_path / "run").steps()["rms_t"].notna().all()


def row_of_channel(parts: list[pd.DataFrame], key: tuple[int, str]) -> int:
    """The hot channel of the process whose part of the product peaks, in the whole's numbers."""
    return int(
        max((part.loc[key] for part in parts), key=lambda row: row["cur_amax"])["hot_channel"]
    )


@pytest.mark.parametrize("parallelism", PARALLEL)
def test_watching_changes_no_bit_of_a_distributed_training(
    parallelism: str, tmp_path: Path
) -> None:
    left = []
    for run in ("-", str(tmp_path / "run")):
        torchrun(2, parallelism, "0.01", run, str(tmp_path / "left"))
        left.append(torch.load(tmp_path / "left", weights_only=True))
    assert left[0].keys() == left[1].keys()
    for name, parameter in left[0].items():
        assert torch.equal(parameter, left[1][name]), name


def test_nothing_is_left_of_a_process_group() -> None:
    assert not dist.is_initialized()
