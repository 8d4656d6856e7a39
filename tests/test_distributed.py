"""Trainings of several processes, and what may befall one of them.

Real processes, started by torchrun, over gloo, and killed by real signals. A start of torch costs
seconds of CPU in each process, so that a start serves several tests.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import pytest
import torch
from distributed_on_cpu import MISMATCHES, RECIPES, SLOW, STAGE, stage, trained
from typer.testing import CliRunner

import fp8lab
from fp8lab.cli import app
from fp8lab.lab.parallel import Parallel

pytestmark = pytest.mark.long

SCRIPT = Path(__file__).with_name("distributed_on_cpu.py")


def torchrun(processes: int, scenario: str, folder: Path) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", str(SCRIPT), scenario, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def in_a_namespace(scenario: str, folder: Path) -> str:
    """What two processes that may mount file systems print of warnings."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no namespaces here")
    command = [*unshare, sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", str(SCRIPT), scenario, str(folder)]
    done = subprocess.run(
        command,
        env=os.environ | {"TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def told_in(folder: Path) -> list[Any]:
    """What each process told."""
    files = sorted(folder.glob("told-*.json"))
    return [json.loads(file.read_text()) for file in files]


def processes_of(size: int, scenario: str, folder: Path) -> list[subprocess.Popen[str]]:
    """The processes without torchrun, which would end those that are left."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    of_all = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), scenario, str(folder)],
            env=os.environ | of_all | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def asked(*arguments: object) -> str:
    """What the program prints."""
    done = CliRunner().invoke(app, [str(one) for one in arguments])
    assert done.exit_code in (0, 1, 2), done.output
    return done.stdout


# --- a mismatch -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mismatched(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("mismatched")
    return torchrun(2, "mismatch", folder), folder


def test_processes_that_cast_otherwise_stop_before_they_train(mismatched: Any) -> None:
    """All of a group, by one line. Whoever came second says what it has first."""
    first, second = told_in(mismatched[1])
    assert first == second
    assert set(first) == set(MISMATCHES)
    where = "watch: layers.0.attention.query 32x32: grad_output@grad_input"
    delayed = "E5M2 DelayedScaling (amax_history_len=4)"
    expected = {
        "recipe": (where, "E5M2 Float8CurrentScaling", delayed),
        "setting": (where, "E5M2 DelayedScaling (margin=1, amax_history_len=4)", delayed),
        "one operand": (
            "watch: layers.1.mlp.down 88x32: input@output",
            "BF16 HighPrecision",
            delayed.replace("E5M2", "E4M3"),
        ),
        "not converted": (where, "not converted", delayed),
    }
    for name, (place, there, here) in expected.items():
        either = f"{there} on rank 1, {here} on rank 0", f"{here} on rank 0, {there} on rank 1"
        told = [f"{place}: {one}, expected the same on both" for one in either]
        assert first[name] in told, name
        assert not (mismatched[1] / name).exists()
    for name in set(MISMATCHES) - set(expected):
        assert first[name] is None
        assert len(fp8lab.open_run(mismatched[1] / name).ranks()) == 2


def test_what_a_wrapper_dies_of_is_said_before(mismatched: Any) -> None:
    """DistributedDataParallel compares buffers, and says of a mismatch what gloo does."""
    done, _ = mismatched
    assert done.returncode == 1
    told = re.findall("UserWarning: convert: (.+)", done.stderr)
    assert len(told) == 1 + len(MISMATCHES) - 2  # all but "none" and "other layers" differ
    where = "layers.0.attention.query 32x32: grad_output@grad_input: "
    here, there = (
        f"DelayedScaling (amax_history_len={n}) on rank {r}" for n, r in ((8, 0), (4, 1))
    )
    expected = "expected the same on both"
    assert told[-1] in (
        f"{where}{there}, {here}, {expected}",
        f"{where}{here}, {there}, {expected}",
    )


def test_a_mismatch_is_said_by_all_processes_that_it_ends(tmp_path: Path) -> None:
    """Without a group: the first one learns of it when its connection is gone."""
    processes = processes_of(2, "uncaught", tmp_path)
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    lines = [re.sub(r"^\[rank\d]: ", "", error.strip().splitlines()[-1]) for error in errors]
    assert lines[0] == lines[1]
    assert lines[0].startswith("ValueError: watch: layers.0.attention.query 32x32: grad_output@")
    run = fp8lab.open_run(tmp_path / "uncaught")
    assert run.info["error"] == lines[0]
    assert len(run.steps()) == 0
    told = asked("diagnose", run.path)
    assert " ".join(told.split()).endswith(f"recorded: failed before its first step: {lines[0]}")


# --- losses -----------------------------------------------------------------------------------
#
# The reference is one process that takes the processes' parts of a batch as micro-batches: every
# operand then has the amax, and every GEMM the shape, that it has there. With two processes nothing
# differs, not one bit: of two numbers there is one sum, and halving is exact. Four gradients are
# added in the order of a ring, by which a sum differs in its last bits (3 x 2^-24 of what is
# added), and tensor parallelism adds down's shares in another order. Adam makes of that at most
# rate x 2e-7 a weight and step; over the loss's gradient and four steps that is below 1e-6 of it.

BOUND = 1e-6
Losses = tuple[int, list[dict[Any, Any]], Path]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def parallel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Losses:
    """How many, what each process told of its trainings, and where their runs are."""
    folder = tmp_path_factory.mktemp("losses")
    done = torchrun(request.param, "losses", folder)
    assert done.returncode == 0, done.stderr[-4000:]
    files = sorted(folder.glob("trained-*.pt"))
    return request.param, [torch.load(file, weights_only=True) for file in files], folder


@cache
def of_one_process(recipe: str, parts: int, folder: Path) -> Any:
    return trained(recipe, folder / f"one, {recipe}, {parts}", parts=parts)


@pytest.mark.parametrize("how", get_args(Parallel))
@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_are_those_of_one_process(recipe: str, how: str, parallel: Losses) -> None:
    size, processes, folder = parallel
    told = [one[recipe, how] for one in processes]
    assert all(one["losses"] == told[0]["losses"] for one in told)
    expected = of_one_process(recipe, 1 if how == "tensor_parallel" else size, folder)
    if size == 2 and how != "tensor_parallel":
        assert told[0]["losses"] == expected["losses"]
    else:
        assert told[0]["losses"] == pytest.approx(expected["losses"], rel=BOUND)
        assert told[0]["losses"][0] == pytest.approx(expected["losses"][0], rel=1e-7)


@pytest.mark.parametrize("how", get_args(Parallel))
def test_delayed_scales_are_those_of_one_process(how: str, parallel: Losses) -> None:
    """A maximum does not depend on an order: after a step that began with equal weights all are
    equal to the bit, after later ones where the weights are."""
    size, processes, folder = parallel
    told = [one["delayed", how]["states"] for one in processes]
    expected = of_one_process("delayed", 1 if how == "tensor_parallel" else size, folder)
    for step, states in enumerate(zip(*told, expected["states"], strict=True)):
        *of_ranks, of_one = states
        assert len(of_one) == 2 * 15  # linear layers
        for name, tensor in of_one.items():
            for state in of_ranks[1:]:
                assert torch.equal(state[name], of_ranks[0][name]), (step, name)
            found, cut = of_ranks[0][name], how == "tensor_parallel"
            torch.testing.assert_close(found, tensor, rtol=10 * BOUND, atol=0.0)
            if not cut and (size == 2 or step == 0):
                assert torch.equal(found, tensor), (step, name)
            elif cut and step == 0:  # what no sum over processes precedes
                exact = [0, 1] if name.startswith("layers.0.attention") else [1]
                assert torch.equal(found[..., exact], tensor[..., exact]), (step, name)
    assert not torch.equal(told[0][0]["head.scale"], told[0][-1]["head.scale"])


@pytest.mark.parametrize("how", get_args(Parallel))
def test_rows_of_all_processes_are_merged(how: str, parallel: Losses) -> None:
    size, _, folder = parallel
    parts = 1 if how == "tensor_parallel" else size
    of_one_process("delayed", parts, folder)
    rows = fp8lab.open_run(folder / f"delayed {how}").tensors()
    merged, one = (
        frame.drop(columns="rank").set_index(["step", "site"]).sort_index()
        for frame in (
            rows[rows["rank"] == -1],
            fp8lab.open_run(folder / f"one, delayed, {parts}").tensors(),
        )
    )
    assert merged.index.tolist() == one.index.tolist()
    pd.testing.assert_frame_equal(merged[["count", "nans"]], one[["count", "nans"]])
    told = ["cur_amax", "l2_norm", "min", "max", "underflows%", "staleness"]
    told = [name for name in told if name in one]
    exact = size == 2 and how != "tensor_parallel"
    pd.testing.assert_frame_equal(
        merged[told], one[told], check_exact=exact, **({} if exact else {"rtol": 10 * BOUND})
    )
    assert sorted(rows["rank"].unique()) == [-1, *range(size)]


# --- on another number of processes -----------------------------------------------------------


@pytest.fixture(
    scope="module",
    params=[(1, 2, 1), *(pytest.param(s, marks=pytest.mark.slow) for s in [(2, 4, 1), (4, 1, 2)])],
    ids=str,
)
def stages(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A training that goes on twice, on so many processes: what each told, and the folder; and how
    the processes of the run stood after each stage."""
    folder = tmp_path_factory.mktemp("stages")
    standings = []
    for size in request.param:
        if size == 1:
            with warnings.catch_warnings():  # torch's, that one process is one
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                stage(folder)
        else:
            done = torchrun(size, "stage", folder)
            assert done.returncode == 0, done.stderr[-4000:]
        standings.append(fp8lab.open_run(folder / "run").ranks()["state"].tolist())
    told = [
        [
            torch.load(folder / f"stage-{number}-{rank}.pt", weights_only=True)
            for rank in range(size)
        ]
        for number, size in enumerate(request.param)
    ]
    return told, folder, standings


def test_a_checkpoint_is_loaded_on_another_number_of_processes(stages: Any) -> None:
    for before, after in pairwise(stages[0]):
        saved = before[0]["saved"]
        assert sum(name.endswith((".scale", ".amax_history")) for name in saved) == 2 * 15
        assert sum(name.endswith("exp_avg") for name in saved) > 15
        for process in after:
            assert process["loaded"].keys() == saved.keys()
            for name, tensor in saved.items():
                assert torch.equal(process["loaded"][name], tensor), name


def test_the_next_losses_are_those_of_the_training_that_went_on(stages: Any) -> None:
    for before, after in pairwise(stages[0]):
        assert before[0]["losses"][-1] == pytest.approx(after[0]["losses"][0], rel=BOUND)


def test_the_run_goes_on_with_another_number_of_processes(stages: Any) -> None:
    told, folder, standings = stages
    sizes = [len(processes) for processes in told]
    for number, size in enumerate(sizes):
        most = max(sizes[: number + 1])
        assert standings[number] == ["finished"] * size + ["left"] * (most - size)
    run = fp8lab.open_run(folder / "run")
    assert run.state == "finished"
    for rank in range(max(sizes)):
        steps = [
            step
            for number, size in enumerate(sizes)
            for step in range(number * STAGE, (number + 1) * STAGE)
            if rank < size
        ]
        steps += [len(sizes) * STAGE] * (rank < sizes[-1])  # what the last one did beyond
        assert run.steps(ranks=rank)["step"].tolist() == steps
        assert run.tensors(ranks=rank)["step"].drop_duplicates().tolist() == steps


# --- a process that is killed -----------------------------------------------------------------


def until_step(process: subprocess.Popen[str], step: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == str(step):
            return
    raise AssertionError(process.communicate()[1][-4000:])


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def with_a_victim(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Any:
    """The run of a training whose last process was killed, the last step that each told, and when
    it was killed."""
    folder = tmp_path_factory.mktemp("killed")
    processes = processes_of(request.param, "killed", folder)
    until_step(processes[-1], 5)
    before = time.time()
    processes[-1].send_signal(signal.SIGKILL)
    told = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode == 0 for process in processes] == [False] * len(processes)
    last = [max(int(step) for step in out.split()) for out, _ in told[:-1]]
    assert all("Error" in error for _, error in told[:-1])
    return folder / "run", [*last, 5], before


def test_the_rows_of_a_killed_process_and_of_all_others_are_there(with_a_victim: Any) -> None:
    path, last, _ = with_a_victim
    run = fp8lab.open_run(path)
    for rank, step in enumerate(last):
        steps = run.steps(ranks=rank)["step"].tolist()
        assert steps == list(range(len(steps)))
        assert len(steps) > step
        rows = run.tensors(ranks=rank)
        assert rows.groupby("step").size().tolist() == [8] * len(steps)  # four a feed-forward
        assert rows["cur_amax"].notna().all()


def test_show_names_the_process_that_was_killed_and_when(with_a_victim: Any) -> None:
    path, last, before = with_a_victim
    shown = json.loads(asked("show", path, "--json"))
    *others, victim = ranks = shown["ranks"]
    assert [row["rank"] for row in ranks] == list(range(len(last)))
    assert (victim["state"], victim["error"]) == ("killed", None)
    assert victim["last_step"] >= 5
    assert before - 60 < victim["flushed"] < before + 10
    for row, step in zip(others, last[:-1], strict=True):
        assert row["state"] == "failed"  # torch tells it that the connection is gone
        assert "Error: " in row["error"]
        assert row["last_step"] >= step
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(victim["flushed"]))
    text = asked("show", path)
    told = f"rank {victim['rank']} killed, last step on disk {victim['last_step']}, written {when}"
    # Those that torch told of a closed connection were there when it was closed.
    first = f"rank {victim['rank']}, last step on disk {victim['last_step']}"
    assert " ".join(text.split()).endswith(f"{told} stopped first {first}")
    assert shown["stopped_first"] == first


def test_what_is_said_of_a_killed_run_names_the_process(with_a_victim: Any, tmp_path: Path) -> None:
    path, last, _ = with_a_victim
    victim, others = len(last) - 1, ", ".join(map(str, range(len(last) - 1)))
    lost = f"rank {victim} killed; rank{'s' * (len(last) > 2)} {others} failed"
    (told,) = (line for line in asked("diagnose", path).splitlines() if line.startswith(lost))
    assert told.endswith(f": rows end there, the last of rank {victim} may be missing")
    page = tmp_path / "page.md"
    asked("report", path, "-o", page)
    assert f"Runs that are not finished: 1 killed. Of run {lost}." in page.read_text()
    assert f"killed ({lost})" in page.read_text()
    assert lost in asked("tail", path, "--once")


# --- a slow process, and one whose disk is full -----------------------------------------------


@pytest.fixture(scope="module")
def slow_and_full(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("troubled")
    return folder, in_a_namespace("slow_and_full", folder)


def of_rank(run: fp8lab.Run, rank: int) -> pd.DataFrame:
    rows = run.tensors(ranks=rank)
    return rows.set_index(["step", "site"]).sort_index()


@pytest.mark.parametrize("name", ["to the end", "for a while"])
def test_nobody_else_is_troubled(name: str, slow_and_full: Any) -> None:
    folder, _ = slow_and_full
    for step, refused in ((1, None), (4, "No space left on device")):  # while it trained
        ranks = json.loads((folder / f"{name}-{step}.json").read_text())
        assert [row["state"] for row in ranks] == ["running", "running"]  # slow is not dead
        assert [row["refused"] for row in ranks] == [None, refused]
        assert ranks[0]["last_step"] >= step
    run = fp8lab.open_run(folder / name)
    assert run.state == "finished"
    assert run.steps(ranks=0)["step"].tolist() == list(range(8))
    merged, own = of_rank(run, -1), of_rank(run, 0)
    assert merged.index.tolist() == own.index.tolist()
    assert merged["count"].tolist() == (2 * own["count"]).tolist()  # the other's are in it
    other = of_rank(fp8lab.open_run(folder / "for a while"), -1)
    pd.testing.assert_frame_equal(merged, other)  # the same training
    seconds = run.steps(ranks=0)["seconds"].dropna()
    assert (seconds > 0.8 * SLOW).all()  # who waits for the slow one is slow


def test_a_disk_that_stays_full_is_told(slow_and_full: Any) -> None:
    folder, warned = slow_and_full
    path = folder / "to the end"
    ranks = json.loads(asked("show", path, "--json"))["ranks"]
    assert [(row["state"], row["last_step"]) for row in ranks] == [("finished", 7), ("finished", 1)]
    assert ranks[0]["refused"] is None
    assert re.fullmatch(r"\d+ rows, No space left on device", ranks[1]["refused"])
    assert f"not written: {ranks[1]['refused']}" in " ".join(asked("show", path).split())
    assert "rank 1 could not write" in asked("diagnose", path)
    assert "rank 1 could not write" in asked("tail", path, "--once")
    rescued, target = re.findall(r"they are in (\S+): move that to (.+)", warned)[0]
    shutil.move(rescued, target)
    run = fp8lab.open_run(path)
    assert run.steps(ranks=1)["step"].tolist() == list(range(8))
    assert of_rank(run, 1)["count"].tolist() == of_rank(run, 0)["count"].tolist()


def test_a_disk_that_was_full_for_too_long_leaves_an_event(slow_and_full: Any) -> None:
    run = fp8lab.open_run(slow_and_full[0] / "for a while")
    dropped = run.events().query("kind == 'rows_dropped'")
    assert dropped["rank"].tolist() == [1]
    assert re.match(r"\d+ rows of steps 2 to \d: nothing could be", dropped["detail"].iloc[0])
    rows = run.tensors(ranks=1)
    assert rows["step"].iloc[-1] == 7
    lost = of_rank(run, 0).index.difference(rows.set_index(["step", "site"]).index)
    assert set(lost.get_level_values("step")) <= set(range(2, 7))
    assert len(lost) > 0
    assert run.ranks()["refused"].isna().all()  # what could be written has been
    assert run.lost == ""
