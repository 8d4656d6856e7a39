"""What a step has measured: beside the model where a core is idle, and the same as in its way."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fp8lab
from fp8lab import GatedFeedForward, kernels
from fp8lab.monitor import probes
from fp8lab.monitor.recorder import Recorder, to_host

needs_kernels = pytest.mark.skipif(
    kernels.why_unavailable() is not None, reason="measuring beside needs kernels"
)


def recorder() -> Recorder:
    return Recorder(1, (), 0, always=False)


def test_what_was_written_to_meanwhile_is_dropped() -> None:
    kept, tensors, changed = recorder(), [torch.ones(3), torch.ones(3)], []
    started, go_on = threading.Event(), threading.Event()

    def job(number: int) -> None:
        started.set()
        go_on.wait(10)
        kept.add(f"{number}", "kind", tensors[number].double())

    for number in range(2):
        kept.beside(tensors[number], lambda n=number: job(n), lambda n=number: changed.append(n))
    started.wait(10)
    tensors[0].mul_(2.0)
    go_on.set()
    assert list(kept.collect()) == ["1"]
    assert changed == [0]
    kept.close()


def test_an_error_beside_comes_out_where_it_is_waited_for() -> None:
    kept = recorder()
    kept.beside(torch.ones(1), lambda: [][0], lambda: None)
    with pytest.raises(IndexError):
        kept.settle()
    kept.close()


def test_vectors_of_both_kinds_come_to_the_host_as_they_are() -> None:
    vectors = [torch.tensor([2**62 + 1, -1]), torch.tensor([0.1, torch.nan], dtype=torch.float64)]
    hosted = to_host(vectors)
    assert [vector.dtype.name for vector in hosted] == ["int64", "float64"]
    assert hosted[0].tolist() == [2**62 + 1, -1]
    assert hosted[1][0] == 0.1


class SometimesInPlace(GatedFeedForward):
    """Works in place from its third forward on, when nobody expects it any more."""

    calls = 0

    def product(self, x: Tensor) -> Tensor:
        self.calls += 1
        gate, up = self.gate(x), self.up(x)
        if self.calls >= 3:
            return functional.silu(gate.clone()).mul_(up)
        return functional.silu(gate) * up


def rows(path: Path, model: nn.Module, monkeypatch: Any, has_idle_core: bool) -> pd.DataFrame:
    met = []
    beside = Recorder.beside
    with monkeypatch.context() as patch:
        patch.setattr(probes, "has_idle_core", lambda: has_idle_core)
        patch.setattr(Recorder, "beside", lambda *a: (met.append(1), beside(*a)))
        with fp8lab.watch(model, path, every=1) as watching:
            for step in range(5):
                for part in range(2):
                    generator = torch.Generator().manual_seed(2 * step + part)
                    model(torch.randn(64, 16, generator=generator)).square().sum().backward()
                watching.step(step)
    assert bool(met) == has_idle_core
    return fp8lab.open_run(path).tensors()


@needs_kernels
@pytest.mark.parametrize("kind", [GatedFeedForward, SometimesInPlace])
@pytest.mark.parametrize("converted", [False, True])
def test_rows_are_the_same_beside_the_model_and_in_its_way(
    kind: type[GatedFeedForward], converted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = []
    for has_idle_core in (False, True):
        torch.manual_seed(0)
        model = kind(16, 24)
        if converted:
            fp8lab.convert(model, fp8lab.DelayedScaling(amax_history_len=2))
        frames.append(rows(tmp_path / str(has_idle_core), model, monkeypatch, has_idle_core))
    pd.testing.assert_frame_equal(*frames, check_exact=True)


@needs_kernels
def test_a_model_that_works_in_place_is_measured_before_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class InPlace(GatedFeedForward):
        def product(self, x: Tensor) -> Tensor:
            gate = self.gate(x)
            return functional.silu(gate, inplace=True) * self.up(x)

    torch.manual_seed(0)
    model = InPlace(16, 24)
    met = []
    monkeypatch.setattr(Recorder, "beside", lambda *a: met.append(1))
    monkeypatch.setattr(probes, "has_idle_core", lambda: True)
    with fp8lab.watch(model, tmp_path / "run", every=1) as watching:
        for step in range(3):
            model(torch.randn(64, 16)).square().sum().backward()
            watching.step(step)
    assert not met
    assert len(fp8lab.open_run(tmp_path / "run").tensors()) == 3 * 4


def test_no_thread_is_left(tmp_path: Path) -> None:
    model = GatedFeedForward(16, 24)
    with fp8lab.watch(model, tmp_path / "run", every=1) as watching:
        for step in range(3):
            model(torch.randn(64, 16)).sum().backward()
            watching.step(step)
    assert not [thread for thread in threading.enumerate() if "fp8lab" in thread.name]
