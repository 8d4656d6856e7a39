"""Processes that should do the same and do not: none goes on with it, and none waits for another.

Real processes, started once by torchrun, over gloo. What each of them told, or was told, is looked
at here; of two that share a store alone this process plays both.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fp8lab
from fp8lab import agreement
from fp8lab.monitor.precision import in_full

SCRIPT = Path(__file__).with_name("agreement_on_cpu.py")
LAYER = "Fp8Linear(in_features=32, out_features=88, bias=False, "
LAYER += "input=DelayedScaling, weight=DelayedScaling, grad_output=DelayedScaling)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("agreement")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", str(SCRIPT), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def told(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"told-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("every", "ValueError: watch: every: 1 on rank 0, 2 on rank 1, expected the same in a"),
        ("select", "ValueError: watch: select: (Selection(tensors=('residual',), layers=('*',)"),
        ("no_model", "TypeError: model: NoneType, expected an nn.Module (on rank 1)"),
    ],
)
def test_who_watches_otherwise_stops_all_before_there_is_a_run(
    name: str, line: str, told: list[dict[str, Any]], folder: Path
) -> None:
    first, second = told
    assert first[name] == second[name]
    assert first[name].startswith(line)
    assert "\n" not in first[name]
    assert not (folder / name).exists()


@pytest.mark.long
def test_a_line_that_tells_it_all_comes_without_the_error_behind_it(
    told: list[dict[str, Any]],
) -> None:
    assert [one["chained"] for one in told] == [[], []]


@pytest.mark.long
def test_who_cannot_begin_stops_all(told: list[dict[str, Any]], folder: Path) -> None:
    """Also those that had begun, which say why in the run."""
    first, second = (one["cannot_begin"] for one in told)
    assert first == second
    assert first.startswith(f"RunError: {folder / 'cannot_begin' / 'ranks' / '1'}: exists already")
    assert first.endswith("(on rank 1)")
    run = fp8lab.open_run(folder / "cannot_begin")
    assert (run.state_of(0), run.info_of(0)["error"]) == ("failed", first)


@pytest.mark.long
def test_who_is_no_member_of_the_group_leaves_nothing(told: list[dict[str, Any]]) -> None:
    ranks, refused = (one["no_member"] for one in told)
    assert ranks == [0]
    assert refused == "ValueError: watch: group: rank 1 is no member, expected one that is"


@pytest.mark.long
def test_rows_of_all_processes_are_there_once(told: list[dict[str, Any]]) -> None:
    merged, refused = (one["of_two_groups"] for one in told)
    assert [row[0] for row in merged] == [0]
    where = "rows of layers.0.mlp together: added up: ranks 1 on rank 1, ranks 0 on rank 0"
    assert refused.startswith(f"ValueError: watch: group: {where}")


@pytest.mark.long
def test_rows_of_other_steps_are_not_added_up(told: list[dict[str, Any]]) -> None:
    merged, _, events = told[0]["skipped"]
    assert [row[0] for row in merged] == [0]
    words = "step 2 of process 0 and step 3 of process 1 of the group came together, expected the"
    for one in told:
        (warned,) = one["skipped"][1]
        assert f"rows of all processes are left out: {words} same step" in warned
    expected = [[step, rank, "not_merged", f"{words} same step"] for step, rank in ((2, 0), (3, 1))]
    assert events == expected


@pytest.mark.long
def test_a_sharded_weight_that_is_read_is_no_layer_that_runs(told: list[dict[str, Any]]) -> None:
    expected = [[0, rank, "not_run", f"{n}.read"] for rank in range(2) for n in range(2)]
    assert told[0]["sharded"] == told[1]["sharded"] == expected


@pytest.mark.long
def test_a_process_may_hold_nothing_of_a_parameter(told: list[dict[str, Any]]) -> None:
    assert told[0]["of_nothing"] == told[1]["of_nothing"] == [True, True]


@pytest.mark.long
def test_a_nan_in_one_gradient_clips_as_torch_clips_it(told: list[dict[str, Any]]) -> None:
    """torch's factor is then NaN: no gradient is left, and the loss tells it at once."""
    assert [one["clipped"] for one in told] == [0, 0]


@pytest.mark.long
def test_amaxes_of_other_layers_are_not_mixed(told: list[dict[str, Any]]) -> None:
    """As many of the same sizes: without a look at what they are of, a gate has an up's scale."""
    first, second = (one["other_amaxes"] for one in told)
    assert first == second
    up, gate = (f"2 amaxes of layers.0.mlp.{name} {LAYER}" for name in ("up", "gate"))
    here = f"{up} on rank 0, {gate} on rank 1", f"{gate} on rank 1, {up} on rank 0"
    assert first in [
        f"RuntimeError: delayed scaling: layer 4: reduces: {one}, expected the same on both: "
        f"convert the same layers in the same order on all ranks"
        for one in here
    ]


# --- through a store alone ----------------------------------------------------------------------


class Two:
    """This process as two that share a store."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch, self._times = patch, [agreement._times.copy() for _ in range(2)]
        store = dist.HashStore()
        patch.setattr(agreement, "_store", lambda: store)

    def be(self, rank: int) -> None:
        self._patch.setattr(agreement, "rank_of", lambda: rank)
        self._patch.setattr(agreement, "_times", self._times[rank])


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Two:
    return Two(monkeypatch)


def test_who_comes_second_knows(two: Two) -> None:
    two.be(0)
    assert agreement.unlike("here", {"a": {"input": "E4M3"}, "b": {}}) is None
    assert agreement.said_of("here") is None
    two.be(1)
    line = "b: input: E4M3 on rank 1, not converted on rank 0, expected the same on both"
    said = agreement.unlike("here", {"a": {"input": "E4M3"}, "b": {"input": "E4M3"}})
    assert said == line
    two.be(0)
    assert agreement.said_of("here") == line
    assert agreement.said_of("elsewhere") is None


def test_what_one_process_alone_has_may_be_anything(two: Two) -> None:
    two.be(0)
    assert agreement.unlike("here", {"a": {"input": "E4M3"}}) is None
    two.be(1)
    assert agreement.unlike("here", {"b": {"input": "E5M2"}}) is None


def test_a_place_is_compared_as_often_as_it_is_named(two: Two) -> None:
    """The n-th time of one process with the n-th of the other: a run that goes on otherwise."""
    for words, told in (("E4M3", None), ("E5M2", None)):
        two.be(0)
        assert agreement.unlike("here", {"a": {"input": words}}) is told
    two.be(1)
    assert agreement.unlike("here", {"a": {"input": "E4M3"}}) is None
    assert agreement.unlike("here", {"a": {"input": "E4M3"}}) is not None


def test_no_run_lies_at_another_place_of_agreement(
    two: Two, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run directory of the name `convert`, or of one that a run's keys may begin with."""
    monkeypatch.setattr("fp8lab.conversion.world_size", lambda: 2)
    monkeypatch.chdir(tmp_path)
    two.be(0)
    fp8lab.convert(nn.Sequential(fp8lab.GatedFeedForward(8, 16)), fp8lab.DelayedScaling())
    assert agreement.unlike("here", {"a": {}}) is None
    two.be(1)
    with fp8lab.watch(nn.Sequential(fp8lab.GatedFeedForward(8, 16)), "convert"):
        assert len(str(agreement.job_at("here/1"))) == len("0123456789abcdef") * 2


def test_an_error_of_this_process_alone_is_no_mismatch(two: Two, tmp_path: Path) -> None:
    """Though another one has refused: only what a lost connection raises gives way to that line."""
    model = nn.Sequential(fp8lab.GatedFeedForward(8, 16))
    lost = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection cl")
    for number, error in enumerate((RuntimeError("CUDA out of memory"), lost, dist.DistError("x"))):
        two.be(0)
        path = tmp_path / str(number)
        with pytest.raises((RuntimeError, ValueError)) as raised, fp8lab.watch(model, path):
            two.be(1)
            assert agreement.unlike(f"watch: {path}", {"0.up 8x16": {"every": "E4M3"}}) is not None
            two.be(0)
            raise error
        if number == 0:
            assert raised.value is error
        else:
            line = "watch: 0.up 8x16: every: E4M3 on rank 1, not converted on rank 0"
            assert str(raised.value) == f"{line}, expected the same on both"
            assert raised.value.__suppress_context__


def test_one_process_says_nothing_to_nobody() -> None:
    assert agreement.unlike("here", {"a": {}}) is None
    assert agreement.said_of("here") is None
    assert agreement.job_at("here") is None


@pytest.fixture
def alone() -> Iterator[None]:
    """One process of two, of which torch plays the other, who is not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_store_that_compares_nothing_is_no_reason_not_to_convert() -> None:
    model = fp8lab.convert(nn.Sequential(nn.Linear(8, 8)), fp8lab.DelayedScaling())
    model(torch.ones(2, 8)).sum().backward()
    assert float(model[0].scale[0]) == 448.0  # type: ignore[index, union-attr, arg-type]


class Made(TorchFunctionMode):
    """Counts what is made of numbers of Python: on a GPU the host waits for each."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += func in (torch.tensor, torch.Tensor.item, torch.Tensor.__float__)
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("alone")
def test_the_number_that_travels_with_amaxes_costs_no_wait_but_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fp8lab.regions._compared", {})
    model = fp8lab.convert(nn.Sequential(nn.Linear(8, 8)), fp8lab.DelayedScaling())
    counts = []
    for _ in range(3):
        with Made() as made:
            model(torch.ones(2, 8)).sum().backward()
        counts.append(made.count)
    assert counts[0] > 0 and counts[1:] == [0, 0]


class Odd(nn.Module):
    """Of which `weight` is no tensor, as of torch's quantised layers."""

    def weight(self) -> None: ...


@pytest.mark.parametrize("other", [Odd, partial(nn.LazyLinear, 4)], ids=["method", "lazy"])
def test_what_has_no_weight_yet_is_compared_with_nothing(
    other: Any, two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fp8lab.conversion.world_size", lambda: 2)
    two.be(0)
    model = nn.Sequential(nn.Linear(8, 8), other())
    fp8lab.convert(model, fp8lab.DelayedScaling(), include=["0"])
    assert type(model[0]).__name__ == "Fp8Linear"


def largest(history: Tensor) -> Tensor:
    return history.amax(0)


class Largest:
    def __call__(self, history: Tensor) -> Tensor:
        return largest(history)


@pytest.mark.parametrize(
    ("algorithm", "name"),
    [(largest, "largest"), (partial(largest), "partial"), (Largest(), "Largest")],
)
def test_a_function_has_the_same_words_in_every_process(algorithm: Any, name: str) -> None:
    """What Python shows of many has an address in it, and watching would be refused for that."""
    recipe = fp8lab.DelayedScaling(amax_compute_algo=algorithm)
    model = fp8lab.convert(nn.Sequential(nn.Linear(8, 8)), recipe)
    words = in_full(model)["0 8x8"]["input@output"]
    assert words == f"E4M3 DelayedScaling (amax_compute_algo=function {name})"
