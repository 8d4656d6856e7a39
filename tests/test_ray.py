"""The pool on Ray: a cluster of two processes on this machine, and the tiny experiment on it.

The oracle is the local pool: the same rows. One worker is killed by the run that it does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fp8lab.lab.experiment import load_experiment, run_experiment
from fp8lab.lab.ray_workers import RayWorkers
from fp8lab.monitor.about import command
from fp8lab.store import find_runs, open_run

pytestmark = pytest.mark.long

pytest.importorskip("ray")
TINY = Path(__file__).with_name("tiny_experiment.py")
KILLED = "second/bf16/seed-1"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its address; in its workers one run of the experiment is killed."""
    program = Path(sys.executable).with_name("ray")
    # Not below pytest's folder: a socket's path may have 107 characters.
    fates = json.dumps({KILLED: "killed"})
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "TINY_EXPERIMENT": fates}
    port = "6397"
    start = [program, "start", "--head", "--num-cpus=2", f"--port={port}"]
    start += [
        "--include-dashboard=false",
        "--disable-usage-stats",
        "--object-store-memory=80000000",
    ]
    subprocess.run(start, env=environment, check=True, capture_output=True, timeout=120)
    yield f"127.0.0.1:{port}"
    subprocess.run([program, "stop", "--force"], check=True, capture_output=True, timeout=120)


def losses(out: Path) -> dict[str, list[float]]:
    """Of every finished run, by its place in the folder."""
    runs = {str(path.relative_to(out)): open_run(path) for path in find_runs(out)}
    return {
        name: run.steps("loss")["loss"].tolist()
        for name, run in runs.items()
        if run.state == "finished"
    }


@pytest.mark.filterwarnings("default")  # Ray's own, of its dependencies
def test_a_cluster_gives_the_same_runs_and_a_lost_worker_costs_its_own(
    cluster: str, tmp_path: Path
) -> None:
    file, experiment = load_experiment(str(TINY))
    ends: dict[int, str | None] = {}
    reports: list[object] = []
    failures = run_experiment(
        file,
        experiment,
        tmp_path / "there",
        ray=cluster,
        on_end=ends.__setitem__,
        on_report=reports.append,
    )
    assert [failure.split(":")[0] for failure in failures] == [KILLED]
    assert "its worker was lost" in failures[0]
    assert sorted(ends) == list(range(10))
    assert reports
    assert run_experiment(file, experiment, tmp_path / "here", workers=2) == []
    here = losses(tmp_path / "here")
    assert len(here) == 8
    assert here.pop(KILLED)
    assert losses(tmp_path / "there") == here
    runs = [open_run(tmp_path / "there" / name) for name in here]
    assert {run.info["command"] for run in runs} == {command()}


def test_no_cluster_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"^ray '127\.0\.0\.1:1': ConnectionRefusedError"):
        RayWorkers("127.0.0.1:1")
