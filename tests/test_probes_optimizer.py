"""The columns of a step row that are read at the optimizer's step and at the model's output.

Each is computed again in float64 from what the test holds itself: parameters before and after the
step, gradients as the optimizer met them, and the optimizer's own state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fp8lab.ffn import GatedFeedForward
from fp8lab.monitor import watch
from fp8lab.monitor.selection import Selection
from fp8lab.optim import Fp8AdamW
from fp8lab.store import open_run

DIM, HIDDEN = 16, 24
COLUMNS = ("learning_rate", "grad_norm", "update_ratio", "rms_t")


def inputs(step: int) -> Tensor:
    return torch.randn(2, 5, DIM, generator=torch.Generator().manual_seed(step))


def norm(tensors: list[Tensor]) -> float:
    return float(np.linalg.norm(np.concatenate([t.double().numpy().ravel() for t in tensors])))


class NoBetas(torch.optim.Optimizer):
    """Has a state called exp_avg_sq, as transformers' Adafactor, and is no Adam."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.01, "eps": (1e-30, 1e-3)})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter -= group["lr"] * parameter.grad
                    self.state[parameter] = {"step": 1, "exp_avg_sq": torch.zeros(3)}


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer]] = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "Adam": lambda groups: torch.optim.Adam(groups, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1),
    "AdamW, fused": lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True),
    "NAdam": lambda groups: torch.optim.NAdam(groups, lr=0.01),
    "no betas": lambda groups: NoBetas(groups),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_columns_are_their_definitions(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = GatedFeedForward(DIM, HIDDEN, bias=True).to(dtype)
    model.up.bias.requires_grad_(False)
    groups = [
        {"params": list(model.gate.parameters()), "eps": 1e-3},
        {"params": [*model.up.parameters(), *model.down.parameters()]},
    ]
    optimizer = OPTIMIZERS[name](groups)
    expected = []
    with watch(model, tmp_path / "run", optimizer=optimizer, every=2) as watching:
        for step in range(4):
            optimizer.zero_grad()
            model(inputs(step).to(dtype)).float().square().sum().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = 0.01 * (step + 1)
            trained = [p for p in model.parameters() if p.requires_grad]
            before = [p.detach().double() for p in trained]
            optimizer.step()
            row = {"learning_rate": 0.01 * (step + 1), "grad_norm": norm([p.grad for p in trained])}
            if step % 2 == 0:
                changes = [
                    p.detach().double() - old for p, old in zip(trained, before, strict=True)
                ]
                row["update_ratio"] = norm(changes) / norm(before)
            rms = [
                rms_t(parameter, group, optimizer.state[parameter])
                for group in optimizer.param_groups
                for parameter in group["params"]
                if "exp_avg_sq" in optimizer.state[parameter] and "betas" in group
            ]
            if step % 2 == 0 and rms:
                row["rms_t"] = max(rms)
            expected.append(row)
            watching.step(step)
    assert ("rms_t" in expected[0]) == (name not in ("SGD", "no betas"))
    steps = open_run(tmp_path / "run").steps()
    for got, row in zip(steps.to_dict("records"), expected, strict=True):
        present = {name: got[name] for name in COLUMNS if not math.isnan(got[name])}
        assert present == pytest.approx(row, rel=1e-10)


def rms_t(parameter: Tensor, group: dict[str, Any], state: dict[str, Any]) -> float:
    """StableAdamW: sqrt(mean(g² / max(v, eps²))), v with its bias corrected."""
    gradient = parameter.grad.double().numpy()
    corrected = state["exp_avg_sq"].double().numpy() / (1 - group["betas"][1] ** int(state["step"]))
    return math.sqrt(np.mean(gradient**2 / np.maximum(corrected, group["eps"] ** 2)))


def test_a_skipped_optimizer_step_leaves_its_columns_missing(tmp_path: Path) -> None:
    model = GatedFeedForward(DIM, HIDDEN)
    optimizer = torch.optim.AdamW(model.parameters())
    with watch(model, tmp_path / "run", optimizer=optimizer, every=1) as watching:
        for step in range(3):
            model(inputs(step)).sum().backward()
            if step != 1:
                optimizer.step()
            watching.step(step)
    steps = open_run(tmp_path / "run").steps()
    for name in COLUMNS:
        assert steps[name].isna().tolist() == [False, True, False], name


@pytest.mark.parametrize("by_name", [False, True])
def test_gradients_that_a_closure_computes_are_those_of_this_step(
    by_name: bool, tmp_path: Path
) -> None:
    model = GatedFeedForward(DIM, HIDDEN)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        if len(norms) > 1:
            model.gate.weight.requires_grad_(False)  # fewer gradients than before the step
        loss = model(inputs(len(norms))).sum()
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norms.append(float(torch.stack([g.double().norm() for g in gradients]).norm()))
        return loss

    with watch(model, tmp_path / "run", optimizer=optimizer, every=1) as watching:
        for step in range(4):
            optimizer.step(closure=closure) if by_name else optimizer.step(closure)
            watching.step(step)
    steps = open_run(tmp_path / "run").steps()
    assert steps["learning_rate"].tolist() == [0.1] * 4
    assert steps["grad_norm"].tolist() == pytest.approx(norms, rel=1e-12)


def test_a_closure_that_is_called_again_is_looked_at_once(tmp_path: Path) -> None:
    left = []
    for is_watched in (False, True):
        torch.manual_seed(0)
        model, norms = GatedFeedForward(DIM, HIDDEN), []
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)

        def closure() -> Tensor:
            optimizer.zero_grad()  # noqa: B023
            loss = model(inputs(0)).square().sum()  # noqa: B023
            loss.backward()
            parameters = model.parameters()  # noqa: B023
            norms.append(float(torch.stack([p.grad.norm() for p in parameters]).norm()))  # noqa: B023
            return loss

        if not is_watched:
            optimizer.step(closure)
        else:
            with watch(model, tmp_path / "run", optimizer=optimizer, every=1) as watching:
                optimizer.step(closure)
                watching.step(0)
        left.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*left, strict=True))
    assert len(norms) > 1
    row = open_run(tmp_path / "run").steps()["grad_norm"]
    assert row.tolist() == pytest.approx(norms[:1], rel=1e-5)


class Output(dict):
    """As transformers returns it: a mapping whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        return self[name] if name in self else None


@pytest.mark.parametrize("kind", ["tensor", "logits", "nothing"])
def test_logit_max_is_the_largest_magnitude_of_the_output(kind: str, tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = GatedFeedForward(DIM, HIDDEN)

        def forward(self, x: Tensor) -> Any:
            y = self.mlp(x)
            return {"tensor": y, "logits": Output(logits=y), "nothing": (y, y)}[kind]

    model = Model()
    with torch.no_grad():
        peaks = [float(model.mlp(inputs(step)).abs().max()) for step in range(3)]
    with watch(model, tmp_path / "run", every=2) as watching:
        for micro_batches in ([0, 1], [2], [2]):
            for batch in micro_batches:
                model(inputs(batch))
            watching.step(len(open_run(tmp_path / "run").steps()))
            watching._flush()
    logit_max = open_run(tmp_path / "run").steps()["logit_max"]
    expected = [math.nan, math.nan, math.nan]
    if kind != "nothing":
        expected = [max(peaks[0], peaks[1]), math.nan, peaks[2]]
    np.testing.assert_array_equal(logit_max.to_numpy(), expected)


class OfItsOwn(torch.optim.Optimizer):
    """A step, and a state called as Adam's which is none."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= 0.1 * parameter.grad
                self.state[parameter] = {"exp_avg_sq": torch.ones(1)}


@pytest.mark.parametrize(
    "defaults",
    [{}, {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}, {"betas": (0.9, 0.99), "eps": (0.1, 0.2)}],
)
def test_an_optimizer_of_another_kind_keeps_its_gradient_norm(
    defaults: dict[str, Any], tmp_path: Path
) -> None:
    model = GatedFeedForward(DIM, HIDDEN)
    optimizer = OfItsOwn(model.parameters(), defaults)
    with watch(model, tmp_path / "run", optimizer=optimizer, every=1) as watching:
        model(inputs(0)).sum().backward()
        optimizer.step()
        watching.step(0)
    (row,) = open_run(tmp_path / "run").steps().to_dict("records")
    assert row["grad_norm"] > 0 and row["update_ratio"] > 0 and math.isnan(row["rms_t"])
    assert math.isnan(row["learning_rate"]) == ("lr" not in defaults)


def test_gradients_that_cannot_be_read_end_no_training(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(10, DIM, sparse=True), GatedFeedForward(DIM, HIDDEN))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.warns(UserWarning, match="the optimizer: not recorded: NotImpl"),
        watch(model, tmp_path / "run", optimizer=optimizer, every=1) as watching,
    ):
        for step in range(2):
            model(torch.arange(5)).sum().backward()
            optimizer.step()
            watching.step(step, loss=1.0)
    run = open_run(tmp_path / "run")
    assert run.events()["site"].tolist() == ["the optimizer"]
    assert run.steps()["loss"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("fused", [False, True])
def test_what_a_gradient_scaler_did_is_undone(fused: bool, tmp_path: Path) -> None:
    """A fused optimizer meets the gradients scaled, every other one as they are."""
    model = GatedFeedForward(DIM, HIDDEN)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    select = Selection(layers=("down",), tensors=("grad_weight",))
    options: dict[str, Any] = {"optimizer": optimizer, "every": 1, "select": select}
    with watch(model, tmp_path / "run", **options) as watching:
        loss = model(inputs(0)).square().mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        watching.step(0)
    run = open_run(tmp_path / "run")
    (found,) = run.steps()["grad_norm"]
    assert found == pytest.approx(norm(list(gradients)), rel=1e-12)
    names = [name for name, _ in model.named_parameters()]
    peak = float(gradients[names.index("down.weight")].abs().max())
    assert run.tensors(sites="down:grad_weight")["cur_amax"].tolist() == [peak]


def test_rms_t_of_a_second_moment_in_fp8_is_that_of_what_the_step_used(tmp_path: Path) -> None:
    # What is stored afterwards is rounded, and flushed where it is small.
    model = GatedFeedForward(DIM, HIDDEN)
    optimizer = Fp8AdamW(model.parameters(), lr=0.01)
    expected = []
    with watch(model, tmp_path / "run", optimizer=optimizer, every=1) as watching:
        for step in range(4):
            optimizer.zero_grad()
            model(inputs(step)).square().sum().backward()
            moments = {}
            for parameter in model.parameters():
                squares = parameter.grad.double().square()
                old = optimizer.moments(parameter)[1].double() if step else 0.0
                moments[parameter] = 0.999 * old + 0.001 * squares
            optimizer.step()
            group = optimizer.param_groups[0]
            expected.append(
                max(
                    rms_t(p, group, {"exp_avg_sq": v, "step": step + 1}) for p, v in moments.items()
                )
            )
            watching.step(step)
    assert open_run(tmp_path / "run").steps()["rms_t"].tolist() == pytest.approx(expected, rel=1e-9)
