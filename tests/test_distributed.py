"""Trainings of several processes, and what may befall one of them.

Real processes, started by torchrun, over gloo, and killed by real signals. A start of torch costs
seconds of CPU in each process, so that a start serves several tests.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from distributed_on_cpu import MISMATCHES

import fp8lab

SCRIPT = Path(__file__).with_name("distributed_on_cpu.py")


def torchrun(processes: int, scenario: str, folder: Path) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", str(SCRIPT), scenario, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def told_in(folder: Path) -> list[Any]:
    """What each process told."""
    files = sorted(folder.glob("told-*.json"))
    return [json.loads(file.read_text()) for file in files]


# --- a mismatch -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mismatched(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("mismatched")
    return torchrun(2, "mismatch", folder), folder


def test_processes_that_cast_otherwise_stop_before_they_train(mismatched: Any) -> None:
    first, second = told_in(mismatched[1])
    assert set(first) == set(second) == set(MISMATCHES)
    assert set(first.values()) == {None}  # whoever comes first cannot know
    where = "watch: layers.0.attention.query 32x32: grad_output@grad_input"
    delayed, same = "E5M2 DelayedScaling (amax_history_len=4)", "expected the same on both"
    assert second == {
        "recipe": f"{where}: E5M2 Float8CurrentScaling on rank 1, {delayed} on rank 0, {same}",
        "setting": f"{where}: E5M2 DelayedScaling (margin=1, amax_history_len=4) on rank 1, "
        f"{delayed} on rank 0, {same}",
        "one operand": "watch: layers.1.mlp.down 88x32: input@output: BF16 HighPrecision on rank 1,"
        f" {delayed.replace('E5M2', 'E4M3')} on rank 0, {same}",
        "not converted": f"{where}: not converted on rank 1, {delayed} on rank 0, {same}",
        "none": None,
        "other layers": None,
    }
    for name, told in second.items():
        ranks = fp8lab.open_run(mismatched[1] / name).ranks()["rank"]
        assert len(ranks) == (2 if told is None else 1), name


def test_a_mismatch_ends_the_training_of_all_processes(mismatched: Any) -> None:
    done, folder = mismatched
    assert done.returncode == 1
    told = [line for line in done.stderr.splitlines() if "ValueError: watch: " in line]
    assert len(told) == 1
    assert told[0].endswith("expected the same on both")
    assert len(fp8lab.open_run(folder / "uncaught").steps()) == 0
