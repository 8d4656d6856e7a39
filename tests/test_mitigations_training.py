"""Mitigations of optimizer, loss and lab architecture, each against its formula in plain Python.

The references know neither the mitigation nor torch's optimizers: numbers in lists, float64. Where
a step is torch's own with other options (a learning rate, clipped gradients) it is equal to the bit
to that step made by hand.
"""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_families import FAMILIES
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fp8lab
from fp8lab.ffn import FeedForward, GatedFeedForward
from fp8lab.hooking import OfOneModel
from fp8lab.lab.model import Attention, LanguageModel, ModelConfig, rotary_table
from fp8lab.mitigations.adagc import AdaGC
from fp8lab.mitigations.block_changes import FOG, OutlierProtected, PlainFeedForward, QKNorm
from fp8lab.mitigations.no_decay_on_gate_up import NoDecayOnGateUp
from fp8lab.mitigations.qk_clip import QKClip
from fp8lab.mitigations.spam import SPAM
from fp8lab.mitigations.stable_adamw import StableAdamW
from fp8lab.mitigations.tweo import TWEO
from fp8lab.mitigations.z_loss import ZLoss
from fp8lab.mitigations.zclip import ZClip
from fp8lab.optim import Fp8AdamW
from fp8lab.recipe import DelayedScaling
from fp8lab.sites import find_gates

ALL: list[Any] = [
    *(StableAdamW(), ZClip(), SPAM(), AdaGC(), NoDecayOnGateUp(), QKClip(), TWEO(), ZLoss()),
    *(FOG(), OutlierProtected(), QKNorm(), PlainFeedForward()),
]
OF_GRADIENTS: list[Any] = [
    *(StableAdamW(), ZClip(warm_up=3), AdaGC(warm_up=3)),
    SPAM(interval=5, warm_up=2, settle=1, threshold=4.0),
]
CONFIG = ModelConfig(dim=16, layers=2, heads=2, context=16)
by_name = pytest.mark.parametrize("mitigation", OF_GRADIENTS, ids=lambda m: type(m).__name__)


def tokens(batch: int = 2, length: int = 9, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, length), generator=generator)


# --- all --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mitigation", ALL, ids=lambda m: type(m).__name__)
def test_a_mitigation_is_a_frozen_value_that_says_what_it_is(mitigation: Any) -> None:
    assert mitigation == type(mitigation)()
    assert pickle.loads(pickle.dumps(mitigation)) == mitigation == copy.deepcopy(mitigation)
    assert mitigation.kind in ("optimizer", "loss", "architecture")
    assert mitigation.changes_function in (True, False) and mitigation.foldable in (True, False)
    assert mitigation.cost and mitigation.source
    with pytest.raises(AttributeError):
        mitigation.tau = 3.0


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (ZClip, {"alpha": 1.0}, "ZClip: alpha=1.0, expected a number above 0, below 1"),
        (ZClip, {"z": 0.0}, "ZClip: z=0.0, expected a number above 0"),
        (ZClip, {"warm_up": 0}, "ZClip: warm_up=0, expected a whole number, at least 1"),
        (SPAM, {"threshold": -1.0}, "SPAM: threshold=-1.0, expected a number above 0"),
        (SPAM, {"interval": 2.5}, "SPAM: interval=2.5, expected a whole number, at least 1"),
        (AdaGC, {"relative": math.nan}, "AdaGC: relative=nan, expected a number above 0"),
        (AdaGC, {"beta": "x"}, "AdaGC: beta='x', expected a number above 0, below 1"),
        (QKClip, {"tau": math.inf}, "QKClip: tau=inf, expected a number above 0"),
        (TWEO, {"power": 1.0}, "TWEO: power=1.0, expected a number above 1"),
        (ZLoss, {"weight": 0.0}, "ZLoss: weight=0.0, expected a number above 0"),
        (FOG, {"softmax_scale": 0.0}, "FOG: softmax_scale=0.0, expected a number above 0"),
        (FOG, {"embedding_std": 0.0}, "FOG: embedding_std=0.0, expected a number above 0"),
        (
            OutlierProtected,
            {"residual_weight": 1.0},
            "OutlierProtected: residual_weight=1.0, expected a number above 0, below 1",
        ),
    ],
)
def test_options_are_valid_at_birth(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        kind(**options)
    assert str(caught.value) == message


# --- the optimizer's gradients: a small problem -----------------------------------------------

SHAPES = ((3, 2), (4,))
Lists = list[list[float]]


def born(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in SHAPES]
    return [nn.Parameter(tensor.to(dtype)) for tensor in drawn]


def gradients_of(step: int) -> list[Tensor]:
    """Drawn; every fourth step much larger in one tensor, in some of its elements."""
    generator = torch.Generator().manual_seed(100 + step)
    drawn = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in SHAPES]
    if step % 4 == 3:
        drawn[(step // 4) % 2].view(-1)[::2] *= 40.0 * (1 + step)
    return drawn


def set_gradients(parameters: list[nn.Parameter], step: int) -> None:
    for parameter, gradient in zip(parameters, gradients_of(step), strict=True):
        parameter.grad = gradient.to(parameter.dtype)


def plain(tensors: list[Any]) -> Lists:
    return [tensor.detach().double().flatten().tolist() for tensor in tensors]


def assert_close(found: list[Any], expected: Lists, relative: float = 1e-11) -> None:
    for one, other in zip(plain(found), expected, strict=True):
        assert one == pytest.approx(other, rel=relative, abs=1e-300)


class PlainAdamW:
    """AdamW on lists of floats; `moments` are not reset with the step count."""

    def __init__(self, values: Lists, lr: float, decay: float, beta2: float = 0.9) -> None:
        self.values, self.lr, self.decay = values, lr, decay
        self.beta1, self.beta2, self.eps = 0.8, beta2, 1e-8
        self.first = [[0.0] * len(v) for v in values]
        self.second = [[0.0] * len(v) for v in values]
        self.steps = 0

    def moments(self, gradients: Lists) -> None:
        self.steps += 1
        for n, gradient in enumerate(gradients):
            for i, g in enumerate(gradient):
                self.first[n][i] = self.beta1 * self.first[n][i] + (1 - self.beta1) * g
                self.second[n][i] = self.beta2 * self.second[n][i] + (1 - self.beta2) * g * g

    def corrected(self, n: int, i: int) -> float:
        return self.second[n][i] / (1 - self.beta2**self.steps)

    def update(self, rates: list[float], decays: list[float]) -> None:
        for n, values in enumerate(self.values):
            for i in range(len(values)):
                first = self.first[n][i] / (1 - self.beta1**self.steps)
                values[i] -= decays[n] * self.decay * values[i]
                values[i] -= rates[n] * first / (math.sqrt(self.corrected(n, i)) + self.eps)

    def options(self) -> dict[str, Any]:
        return {
            "lr": self.lr,
            "weight_decay": self.decay,
            "betas": (self.beta1, self.beta2),
            "eps": self.eps,
        }


# --- StableAdamW ------------------------------------------------------------------------------


def test_stable_adamw_is_its_formula() -> None:
    parameters = born()
    reference = PlainAdamW(plain(parameters), lr=0.05, decay=0.1)
    optimizer = StableAdamW().apply(torch.optim.AdamW(parameters, **reference.options()))
    clipped = 0
    for step in range(12):
        set_gradients(parameters, step)
        optimizer.step()

        gradients = plain(gradients_of(step))
        reference.moments(gradients)
        rates = []
        for n, gradient in enumerate(gradients):
            ratios = [
                g * g / max(reference.corrected(n, i), reference.eps**2)
                for i, g in enumerate(gradient)
            ]
            rms = math.sqrt(sum(ratios) / len(ratios))
            clipped += rms > 1.2
            rates.append(reference.lr / max(1.0, rms))
        reference.update(rates, rates)
        assert_close(parameters, reference.values)
    assert clipped >= 3
    assert [group["lr"] for group in optimizer.param_groups] == [0.05]
    assert [len(group["params"]) for group in optimizer.param_groups] == [2]


@pytest.mark.parametrize("foreach", [False, True])
def test_stable_adamw_is_adamw_at_another_rate_to_the_bit(foreach: bool) -> None:
    parameters, others = born(torch.float32), born(torch.float32)
    options = {"weight_decay": 0.1, "betas": (0.9, 0.95), "foreach": foreach}
    optimizer = StableAdamW().apply(torch.optim.AdamW(parameters, lr=0.01, **options))
    by_hand = torch.optim.AdamW([{"params": [p]} for p in others], lr=0.01, **options)
    rates: list[float] = []
    for step in range(10):
        set_gradients(parameters, step)
        set_gradients(others, step)
        for group in by_hand.param_groups:
            (parameter,) = group["params"]
            state = by_hand.state.get(parameter)
            squares = parameter.grad.double().square()
            moment = 0.05 * squares + (0.95 * state["exp_avg_sq"].double() if state else 0.0)
            ratio = squares / (moment / (1 - 0.95 ** (step + 1))).clamp(min=1e-16)
            group["lr"] = 0.01 / max(1.0, math.sqrt(float(ratio.mean())))
            rates.append(group["lr"])
        by_hand.step()
        optimizer.step()
        assert all(map(torch.equal, parameters, others))
    assert min(rates) < 0.006 and max(rates) == 0.01


def test_stable_adamw_counts_the_decay_that_adam_puts_into_its_gradient() -> None:
    (parameter,) = nn.ParameterList([torch.full((2,), 10.0)])
    optimizer = StableAdamW().apply(torch.optim.Adam([parameter], lr=0.1, weight_decay=1.0))
    for gradient in (-10.0, 0.0):  # with the decay: 0 and 10
        before = parameter.detach().clone()
        parameter.grad = torch.full((2,), gradient)
        optimizer.step()
    # v is all from this step: RMS_t = sqrt(1 / (0.001 / (1 - 0.999^2))), about sqrt(2).
    moved = (before - parameter.detach()).tolist()
    plain_step = 0.1 * 0.1 / (1 - 0.9**2) / math.sqrt(0.001 / (1 - 0.999**2))
    assert moved == pytest.approx([plain_step / math.sqrt((1 - 0.999**2) / 0.001)] * 2, rel=1e-4)


def test_stable_adamw_follows_moments_that_are_stored_in_fp8() -> None:
    parameters, others = born(torch.float32), born(torch.float32)
    optimizer = StableAdamW().apply(Fp8AdamW(parameters, lr=0.01, betas=(0.9, 0.9)))
    by_hand = Fp8AdamW([{"params": [p]} for p in others], lr=0.01, betas=(0.9, 0.9))
    for step in range(8):
        set_gradients(parameters, step)
        set_gradients(others, step)
        for group in by_hand.param_groups:
            (parameter,) = group["params"]
            squares = parameter.grad.double().square()
            kept = by_hand.moments(parameter)[1].double() if step else torch.zeros_like(squares)
            moment = (0.9 * kept + (1.0 - 0.9) * squares) / (1.0 - 0.9 ** (step + 1))
            mean = float((squares / moment.clamp(min=1e-16)).mean())
            group["lr"] = 0.01 / max(1.0, math.sqrt(mean))
        optimizer.step()
        by_hand.step()
        assert all(map(torch.equal, parameters, others))


def test_the_rates_are_back_after_a_step_that_raised() -> None:
    parameters = born()
    optimizer = StableAdamW().apply(torch.optim.AdamW(parameters, lr=0.01))
    groups = optimizer.param_groups
    for step in range(4):
        set_gradients(parameters, step)
        if step < 3:
            optimizer.step()
    parameters[1].grad = None
    optimizer.state[parameters[0]]["exp_avg"] = torch.zeros(1, 7, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="size"):
        optimizer.step()
    assert optimizer.param_groups is not groups
    rates: list[float] = []
    optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    raised = optimizer.param_groups[0]["lr"]
    optimizer.state[parameters[0]]["exp_avg"] = torch.zeros(3, 2, dtype=torch.float64)
    optimizer.step()
    assert 0.8 * raised < rates[0] < 0.8 * 0.01  # and not divided twice
    assert optimizer.param_groups is groups


# --- ZClip ------------------------------------------------------------------------------------


def test_zclip_is_its_formula() -> None:
    parameters = born()
    optimizer = ZClip(warm_up=5).apply(torch.optim.SGD(parameters, lr=1.0))
    values = plain(parameters)
    seen: list[float] = []
    mean = variance = 0.0
    clipped = 0
    for step in range(30):
        set_gradients(parameters, step)
        optimizer.step()

        gradients = plain(gradients_of(step))
        norm = wanted = math.sqrt(math.fsum(g * g for gradient in gradients for g in gradient))
        if len(seen) < 5:
            seen.append(norm)
            if len(seen) == 5:
                mean = sum(seen) / 5
                variance = sum((one - mean) ** 2 for one in seen) / 5
        else:
            z = (norm - mean) / (math.sqrt(variance) + 1e-6)
            if z > 2.5:
                clipped += 1
                wanted = mean + 2.5 * math.sqrt(variance) / (z / 2.5)
            mean = 0.97 * mean + 0.03 * wanted
            variance = 0.97 * variance + 0.03 * (wanted - mean) ** 2
        factor = 1.0 if wanted == norm else wanted / (norm + 1e-6)
        for value, gradient in zip(values, gradients, strict=True):
            value[:] = [v - factor * g for v, g in zip(value, gradient, strict=True)]
        assert_close(parameters, values)
    assert clipped >= 2
    state = optimizer.param_groups[0]["zclip"]
    assert (state["mean"], state["variance"]) == pytest.approx((mean, variance), rel=1e-11)


@pytest.mark.parametrize(("norm", "wanted"), [(15.0, 15.0), (15.2, 10 + 5.0 / (5.2 / 5.0))])
def test_zclip_clips_from_the_score_on_and_not_before(norm: float, wanted: float) -> None:
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = ZClip().apply(torch.optim.SGD([parameter], lr=1.0))
    optimizer.param_groups[0]["zclip"] = {"norms": [], "mean": 10.0, "variance": 4.0}
    parameter.grad = torch.tensor([norm], dtype=torch.float64)
    optimizer.step()
    assert -float(parameter.detach()) == pytest.approx(wanted, rel=1e-6)


# --- AdaGC ------------------------------------------------------------------------------------


def test_adagc_is_its_formula() -> None:
    parameters = born()
    groups = [{"params": parameters[:1]}, {"params": parameters[1:]}]
    optimizer = AdaGC(warm_up=4, absolute=2.0).apply(torch.optim.SGD(groups, lr=1.0))
    values = plain(parameters)
    gamma: list[float] = []
    clipped = 0
    for step in range(20):
        set_gradients(parameters, step)
        optimizer.step()

        gradients = plain(gradients_of(step))
        norms = [math.sqrt(math.fsum(g * g for g in gradient)) for gradient in gradients]
        if step < 4:
            factors = [min(1.0, 2.0 / math.hypot(*norms))] * 2
        else:
            factors = [min(1.0, 1.05 * gamma[n] / norms[n]) for n in range(2)]
            clipped += min(factors) < 0.1
        after = [norm * factor for norm, factor in zip(norms, factors, strict=True)]
        if step == 0:
            gamma = after
        elif step < 4:
            gamma = [min(gamma[n], after[n]) for n in range(2)]
        else:
            gamma = [0.98 * gamma[n] + 0.02 * after[n] for n in range(2)]
        for n, value in enumerate(values):
            value[:] = [v - factors[n] * g for v, g in zip(value, gradients[n], strict=True)]
        assert_close(parameters, values)
    assert clipped >= 3
    kept = [group["adagc"]["gamma"]["0"] for group in optimizer.param_groups]
    assert kept == pytest.approx(gamma, rel=1e-11)


def test_a_tensor_without_gradients_in_the_warm_up_learns_all_the_same() -> None:
    parameters = born()
    optimizer = AdaGC(warm_up=2).apply(torch.optim.SGD(parameters, lr=1.0))
    for step in range(4):
        set_gradients(parameters, step % 3)
        if step < 2:
            parameters[0].grad.zero_()
        if step == 0:
            parameters[1].grad = None
        before = parameters[0].detach().clone()
        optimizer.step()
        assert torch.equal(before, parameters[0]) == (step < 2)


# --- SPAM -------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoupled", [True, False])
def test_spam_is_its_formula(decoupled: bool) -> None:
    parameters = born()
    decay = 0.1 if decoupled else 0.0
    reference = PlainAdamW(plain(parameters), lr=0.05, decay=decay)
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    mitigation = SPAM(threshold=9.0, interval=8, warm_up=3, settle=2)
    optimizer = mitigation.apply(kind(parameters, **reference.options()))
    spikes = 0
    for step in range(1, 27):
        set_gradients(parameters, step)
        optimizer.step()

        gradients = plain(gradients_of(step))
        since = step % 8
        if since == 0:
            reference.first = [[0.0] * len(v) for v in reference.values]
            reference.second = [[0.0] * len(v) for v in reference.values]
        for n, gradient in enumerate(gradients):
            for i, g in enumerate(gradient):
                second = reference.second[n][i]
                if step >= 2 and since >= 2 and second > 0 and g * g > 9.0 * second:
                    gradient[i] = math.copysign(math.sqrt(9.0 * second), g)
                    spikes += 1
        reference.moments(gradients)
        rate = reference.lr
        if step >= 8 and since < 3:
            rate *= 1 - 0.99 * (1 + math.cos(math.pi * (since + 1) / 4)) / 2
        reference.update([rate] * 2, [reference.lr] * 2)
        assert_close(parameters, reference.values)
    assert spikes >= 5
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert optimizer.param_groups[0]["weight_decay"] == decay


def test_an_element_that_first_has_a_gradient_late_learns_all_the_same() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = SPAM(settle=1).apply(torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.0))
    for gradient in ([1.0, 0.0, 1.0], [1.0, 0.0, 1.0], [1.0, 5.0, math.inf]):
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
    assert (parameter != 0).all()
    assert parameter.isfinite().all()


# --- all of them ------------------------------------------------------------------------------


@by_name
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_leaves_no_trace_in_other_tensors(
    mitigation: Any, bad: float
) -> None:
    parameters = born()
    optimizer = mitigation.apply(torch.optim.AdamW(parameters, lr=0.01))
    for step in range(9):
        set_gradients(parameters, step)
        if step in (1, 7):
            parameters[0].grad[0, 0] = bad
        optimizer.step()
    assert parameters[1].isfinite().all()
    numbers = str([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
    assert "nan" not in numbers and "inf" not in numbers
    if isinstance(mitigation, AdaGC):
        assert min(optimizer.param_groups[0]["adagc"]["gamma"].values()) > 0.01
    if math.isnan(bad):
        assert parameters[0].isnan().any()


@by_name
def test_tensors_without_gradient_or_elements_are_passed_over(mitigation: Any) -> None:
    parameters = [*born(), nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.ones(2))]
    optimizer = mitigation.apply(torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0))
    for step in range(7):
        set_gradients(parameters[:2], step)
        parameters[2].grad = torch.zeros(0, 3)
        if step == 3:
            parameters[0].grad = None
        optimizer.step()
    assert all(parameter.isfinite().all() for parameter in parameters)
    assert torch.equal(parameters[3], torch.ones(2))


def run(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: range
) -> list[Tensor]:
    for step in steps:
        set_gradients(parameters, step)
        optimizer.step()
    return [parameter.detach().clone() for parameter in parameters]


@by_name
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at", [2, 6])
def test_the_state_survives_a_checkpoint_to_the_bit(
    mitigation: Any, dtype: torch.dtype, at: int
) -> None:
    def fresh() -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
        parameters = born(dtype)
        return parameters, mitigation.apply(torch.optim.AdamW(parameters, lr=0.01))

    parameters, optimizer = fresh()
    halfway = run(optimizer, parameters, range(at))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    expected = run(optimizer, parameters, range(at, 16))

    others, other = fresh()
    with torch.no_grad():
        for parameter, value in zip(others, halfway, strict=True):
            parameter.copy_(value)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert all(map(torch.equal, run(other, others, range(at, 16)), expected))
    assert str(other.state_dict()["param_groups"]) == str(optimizer.state_dict()["param_groups"])
    groups = [{k: v for k, v in g.items() if k != "params"} for g in other.param_groups]
    assert json.loads(json.dumps(groups)) == [g | {"betas": [0.9, 0.999]} for g in groups]


@by_name
def test_a_state_from_before_the_mitigation_begins_anew(mitigation: Any) -> None:
    parameters, others = born(), born()
    before = torch.optim.AdamW(others, lr=0.01).state_dict()
    optimizer = mitigation.apply(torch.optim.AdamW(parameters, lr=0.01))
    expected = mitigation.apply(torch.optim.AdamW(others, lr=0.01))
    optimizer.load_state_dict(before)
    found = run(optimizer, parameters, range(12))
    assert all(map(torch.equal, found, run(expected, others, range(12))))


@by_name
@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_closure_computes_the_gradients_first(mitigation: Any, by_keyword: bool) -> None:
    parameters, others = born(), born()
    optimizer = mitigation.apply(torch.optim.AdamW(parameters, lr=0.01))
    for step in range(12):

        def closure(step: int = step) -> float:
            assert torch.is_grad_enabled()
            set_gradients(parameters, step)
            return 0.25

        loss = optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)
        assert loss == 0.25
    expected = run(mitigation.apply(torch.optim.AdamW(others, lr=0.01)), others, range(12))
    assert all(map(torch.equal, parameters, expected))


def test_all_of_them_at_once_put_the_groups_back() -> None:
    parameters = born()
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(parameters, lr=0.01)
    groups = optimizer.param_groups
    for mitigation in OF_GRADIENTS:
        assert mitigation.apply(optimizer) is optimizer
    run(optimizer, parameters, range(24))
    assert optimizer.param_groups is groups
    assert len(groups) == 1 and groups[0]["lr"] == 0.01
    assert all(parameter.isfinite().all() for parameter in parameters)


@pytest.mark.parametrize("watched_first", [False, True])
def test_the_watch_goes_on_and_changes_nothing(watched_first: bool, tmp_path: Path) -> None:
    def trained(watched: bool) -> LanguageModel:
        model = fp8lab.convert(LanguageModel(CONFIG, 0), DelayedScaling(), exclude=["head"])
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2)
        penalties = [TWEO().apply(model), ZLoss().apply(model)]

        def mitigate() -> None:
            for one in (StableAdamW(), ZClip(warm_up=2), AdaGC(warm_up=2), SPAM(interval=3)):
                one.apply(optimizer)
            QKClip(tau=0.5).apply(optimizer, model)

        def step(number: int) -> Tensor:
            loss = model.loss(tokens(seed=number))
            loss = loss + sum(penalty() for penalty in penalties)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss

        if not watched:
            mitigate()
            for number in range(6):
                step(number)
            return model
        if not watched_first:
            mitigate()
        with fp8lab.watch(model, tmp_path / "run", optimizer=optimizer, every=1) as watch:
            if watched_first:
                mitigate()
            for number in range(6):
                watch.step(number, loss=step(number))
        return model

    model, unwatched = trained(True), trained(False)
    assert all(map(torch.equal, model.parameters(), unwatched.parameters()))
    run = fp8lab.open_run(tmp_path / "run")
    steps = run.steps()
    assert len(steps) == 6
    assert steps[["grad_norm", "rms_t", "update_ratio", "learning_rate"]].notna().all(axis=None)
    assert {f"layers.{n}.mlp:product" for n in range(2)} <= set(run.tensors()["site"])
    assert not len(run.events())


@pytest.mark.parametrize(
    "mitigation", [AdaGC(warm_up=3), ZClip(warm_up=3), OF_GRADIENTS[3]], ids=lambda m: m.source
)
@pytest.mark.parametrize("forgotten", [False, True])
def test_groups_of_a_step_are_nobody_elses(mitigation: Any, forgotten: bool) -> None:
    """StableAdamW before it: the gradients are cut, and what is kept of them, as without."""

    def cut(*before: Any) -> tuple[list[Any], Any]:
        parameters = [nn.Parameter(torch.ones(4)) for _ in range(3)]
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(parameters, lr=0.0)
        for one in (*before, mitigation):
            one.apply(optimizer)
        gradients = []
        for step in range(12):
            if forgotten and step == 8:  # as a state from before the mitigation leaves it
                for name in ("adagc", "zclip", "spam"):
                    optimizer.param_groups[0].pop(name, None)
            for parameter, size in zip(parameters, (1e-3, 1.0, 1e-2), strict=True):
                parameter.grad = torch.full((4,), size * (30.0 if step >= 8 and size == 1 else 1))
            optimizer.step()
            gradients.append([parameter.grad.tolist() for parameter in parameters])
        kept = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        return gradients, kept

    assert cut(StableAdamW()) == cut()


def test_two_that_set_rates_multiply() -> None:
    seen: dict[str, list[list[float]]] = {}
    for name, mitigations in {
        "stable": [StableAdamW()],
        "spam": [SPAM(interval=2, warm_up=9)],
        "both": [StableAdamW(), SPAM(interval=2, warm_up=9)],
        "other order": [SPAM(interval=2, warm_up=9), StableAdamW()],
    }.items():
        parameters = born()
        groups = [{"params": [parameter]} for parameter in parameters]
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=1.0)
        for mitigation in mitigations:
            optimizer = mitigation.apply(optimizer)
        optimizer.register_step_pre_hook(
            lambda o, *_, name=name: seen.setdefault(name, []).append(
                [group["lr"] for group in o.param_groups]
            )
        )
        for index, step in enumerate((0, 3, 7)):
            set_gradients(parameters, step)
            if index == 1:  # of what SPAM has reset, both have the same moments
                for parameter in parameters:
                    optimizer.state[parameter]["exp_avg_sq"].zero_()
            optimizer.step()
    for both in ("both", "other order"):
        for step in (0, 1):
            product = [a * b for a, b in zip(seen["stable"][step], seen["spam"][step], strict=True)]
            assert seen[both][step] == pytest.approx(product, rel=1e-12)
    assert max(seen["both"][1]) < 0.2 and min(seen["stable"][1]) < 0.9


def options_of(kind: str) -> dict[str, Any]:
    return {} if kind in ("Adafactor", "Adadelta", "Rprop") else {"lr": 0.01}


@pytest.mark.parametrize("mitigation", [ZClip(warm_up=2), AdaGC(warm_up=2)])
@pytest.mark.parametrize(
    "kind",
    [
        *("SGD", "Adam", "AdamW", "Adamax", "Adagrad", "Adadelta", "Adafactor", "ASGD", "NAdam"),
        *("RAdam", "RMSprop", "Rprop", "Muon", "Fp8AdamW"),
    ],
)
def test_clippers_stand_before_any_optimizer(mitigation: Any, kind: str) -> None:
    def fresh() -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
        parameters = born(torch.float32)[: 1 if kind == "Muon" else 2]
        make = Fp8AdamW if kind == "Fp8AdamW" else getattr(torch.optim, kind)
        return parameters, make(parameters, **options_of(kind))

    parameters, optimizer = fresh()
    others, by_hand = fresh()
    mirror = mitigation.apply(torch.optim.SGD(clones := born(torch.float32), lr=0.0))
    del clones[len(parameters) :]
    mirror.param_groups[0]["params"] = clones
    mirror.param_groups[0].pop("adagc", None)
    mitigation.apply(optimizer)
    for step in range(9):
        for some in (parameters, others, clones):
            for parameter, gradient in zip(some, gradients_of(step), strict=False):
                parameter.grad = gradient.float()
        mirror.step()  # clips, and moves nothing
        for parameter, clone in zip(others, clones, strict=True):
            parameter.grad = clone.grad
        optimizer.step()
        by_hand.step()
    assert all(map(torch.equal, parameters, others))


@pytest.mark.parametrize("mitigation", [StableAdamW(), SPAM()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("kind", ["SGD", "Adamax", "Adagrad", "RMSprop", "RAdam", "Adafactor"])
def test_what_has_no_second_moment_like_adams_is_refused(mitigation: Any, kind: str) -> None:
    optimizer = getattr(torch.optim, kind)(born(), lr=0.01)
    name = type(mitigation).__name__
    with pytest.raises(ValueError) as caught:
        mitigation.apply(optimizer)
    expected = f"{name}: {kind} has not Adam's second moment, expected Adam or AdamW"
    assert str(caught.value) == expected
    assert not optimizer._optimizer_step_pre_hooks


@by_name
def test_refusals_of_optimizers(mitigation: Any) -> None:
    name = type(mitigation).__name__

    def refused(optimizer: Any, reason: str) -> None:
        with pytest.raises(TypeError if optimizer is None else ValueError) as caught:
            mitigation.apply(optimizer)
        assert str(caught.value) == f"{name}: {reason}"

    refused(None, "NoneType, expected a torch optimizer")
    refused(torch.optim.LBFGS(born()), "LBFGS computes gradients many times a step, expected once")
    complex_one = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    refused(torch.optim.AdamW([complex_one]), "a parameter of torch.complex64, expected real ones")
    flat = nn.Parameter(torch.zeros(2))
    flat._is_flat_param = True
    expected = "a rank's share of FSDP1, expected whole tensors or DTensors"
    refused(torch.optim.AdamW([flat]), expected)
    twice = mitigation.apply(torch.optim.AdamW(born()))
    refused(twice, "on this AdamW already")
    assert len(twice._optimizer_step_pre_hooks) == 1 + (name in ("SPAM", "StableAdamW"))
    # torch forgets the hooks of a copy, and so does what refuses; the state goes on.
    copied = copy.deepcopy(twice)
    assert mitigation.apply(copied) is copied
    if name in ("StableAdamW", "SPAM"):
        other = "AdamW with amsgrad divides by another second moment"
        refused(torch.optim.AdamW(born(), amsgrad=True), other)
    if name == "SPAM":
        stored = Fp8AdamW(born(torch.float32))
        refused(stored, "Fp8AdamW stores its moments quantised, expected Adam or AdamW")


@by_name
def test_gradients_that_cannot_be_judged_stop_the_step(mitigation: Any) -> None:
    parameters = born()
    optimizer = mitigation.apply(torch.optim.AdamW(parameters))
    set_gradients(parameters, 0)
    optimizer.grad_scale = torch.tensor(65536.0)
    with pytest.raises(RuntimeError, match=r"expected scaler.unscale_\(optimizer\) before"):
        optimizer.step()
    optimizer.grad_scale = None
    parameters[0].grad = parameters[0].grad.to_sparse()
    with pytest.raises(RuntimeError, match=r"a sparse gradient, expected dense ones$"):
        optimizer.step()


@pytest.fixture
def mesh() -> Iterator[Any]:
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@by_name
def test_dtensors_are_whole(mitigation: Any, mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    others = born()
    parameters = [
        nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])) for p in others
    ]
    optimizer = mitigation.apply(torch.optim.AdamW(parameters, lr=0.01))
    plain_one = mitigation.apply(torch.optim.AdamW(others, lr=0.01))
    for step in range(9):
        set_gradients(others, step)
        for parameter, other in zip(parameters, others, strict=True):
            parameter.grad = distribute_tensor(other.grad.clone(), mesh, [Shard(0)])
        optimizer.step()
        plain_one.step()
    for parameter, other in zip(parameters, others, strict=True):
        assert torch.equal(parameter.full_tensor(), other)


# --- no weight decay on gate and up -----------------------------------------------------------

DECAY_FAMILIES = [
    *("llama", "gemma2", "phi3", "torchao Float8Linear"),
    *(name for name in FAMILIES if name.startswith(("mixtral", "gpt-oss", "gpt_oss"))),
]


@pytest.mark.parametrize("family", DECAY_FAMILIES)
def test_gate_and_up_alone_do_not_decay(family: str) -> None:
    model = FAMILIES[family].build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    assert NoDecayOnGateUp().apply(optimizer, model) is optimizer
    expected = {
        id(projection.parameter)
        for site in find_gates(model)
        for projection in (site.gate, site.up)
    }
    assert {
        id(parameter)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if group["weight_decay"] == 0.0
    } == expected
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        shrunk = before[name] if id(parameter) in expected else before[name] * (1.0 - 0.005)
        assert torch.equal(parameter, shrunk), name


def test_the_split_is_torchs_own_and_keeps_every_option() -> None:
    model = LanguageModel(CONFIG, 0)
    downs = [(n, p) for n, p in model.named_parameters() if "down" in n]
    ups = [(n, p) for n, p in model.named_parameters() if "up" in n]
    others = [
        (n, p)
        for n, p in model.named_parameters()
        if not any(part in n for part in ("gate", "up", "down"))
    ]
    named = [(n, p) for n, p in model.named_parameters() if "gate" in n]
    groups: list[dict[str, Any]] = [
        {"params": ups, "lr": 1.0, "weight_decay": 0.3},
        {"params": [*downs, *named], "lr": 2.0, "weight_decay": 0.2},
        {"params": others, "lr": 3.0, "weight_decay": 0.1},
    ]
    optimizer = torch.optim.AdamW([dict(group) for group in groups])
    NoDecayOnGateUp().apply(optimizer, model)
    found = [
        (group["lr"], group["weight_decay"], group["param_names"])
        for group in optimizer.param_groups
    ]
    names = [[name for name, _ in some] for some in (ups, downs, others, named)]
    expected = [(1.0, 0.0), (2.0, 0.2), (3.0, 0.1), (2.0, 0.0)]
    assert found == [(*two, some) for two, some in zip(expected, names, strict=True)]
    whole = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in whole} == {id(p) for p in model.parameters()}
    assert len(whole) == len(list(model.parameters()))

    twin = torch.optim.AdamW([dict(group) for group in groups])
    NoDecayOnGateUp().apply(twin, model)
    twin.load_state_dict(optimizer.state_dict())
    assert str(twin.state_dict()) == str(optimizer.state_dict())


@pytest.mark.long
def test_no_decay_is_refused_where_it_cannot_be_and_nothing_changes() -> None:
    model = LanguageModel(CONFIG, 0)

    def refused(optimizer: torch.optim.Optimizer, model: nn.Module, reason: str) -> None:
        before = str(optimizer.param_groups)
        with pytest.raises(ValueError) as caught:
            NoDecayOnGateUp().apply(optimizer, model)
        assert str(caught.value).startswith(reason)
        assert str(optimizer.param_groups) == before

    every = torch.optim.AdamW(model.parameters())
    refused(every, FeedForward(8, 8), "FeedForward: no gated feed-forward found")
    reason = "NoDecayOnGateUp: layers.0.mlp: gate.weight is no parameter of the AdamW"
    refused(torch.optim.AdamW([model.head.weight]), model, reason)
    none = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    refused(none, model, "NoDecayOnGateUp: no gate and no up has weight decay, nothing to")
    scheduled = torch.optim.AdamW(model.parameters())
    torch.optim.lr_scheduler.LambdaLR(scheduled, lambda step: 1.0)
    reason = "NoDecayOnGateUp: a learning rate scheduler knows the groups already, expected this"
    refused(scheduled, model, reason)
    reason = "NoDecayOnGateUp: AdaGC knows the groups already"
    refused(AdaGC().apply(torch.optim.AdamW(model.parameters())), model, reason)


# --- QK-clip ----------------------------------------------------------------------------------


def logits_by_hand(attention: Attention, x: Tensor) -> Tensor:
    """[heads]: the largest logit that is not masked, position by position."""
    length, width = x.shape[1], x.shape[2] // attention.heads
    cosine, sine = rotary_table(length, width, dtype=torch.float32, device=x.device)
    parts = {}
    for name in ("query", "key"):
        flat = (x @ attention.get_parameter(f"{name}.weight").T).view(
            x.shape[0], length, attention.heads, width
        )
        first, second = flat[..., : width // 2], flat[..., width // 2 :]
        c, s = cosine[:, None], sine[:, None]
        parts[name] = torch.cat((first * c - second * s, first * s + second * c), -1)
    largest = torch.full((attention.heads,), -math.inf)
    for head in range(attention.heads):
        for one in range(length):
            for other in range(one + 1):
                dots = (
                    (parts["query"][:, one, head] * parts["key"][:, other, head]).sum(-1).detach()
                )
                largest[head] = max(float(largest[head]), float(dots.max()) / math.sqrt(width))
    return largest


@pytest.mark.parametrize("converted", [False, True])
def test_qk_clip_is_its_formula(converted: bool) -> None:
    model = LanguageModel(CONFIG, 0)
    with torch.no_grad():
        model.layers[1].attention.query.weight[8:] *= 300.0
    if converted:
        fp8lab.convert(model, DelayedScaling(amax_history_len=2), include=["*.mlp.*"])
    attentions = [layer.attention for layer in model.layers]
    inputs: dict[int, list[Tensor]] = {0: [], 1: []}
    for number, attention in enumerate(attentions):
        attention.register_forward_pre_hook(
            lambda _, args, number=number: inputs[number].append(args[0].detach())
        )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    assert QKClip(tau=20.0).apply(optimizer, model) is optimizer
    for seed in range(2):  # two micro-batches: the largest of both
        model.loss(tokens(seed=seed)).backward()
    with torch.no_grad():
        for factor in (128.0, 1.0 / 128.0):  # an evaluation does not count, whatever its logits
            model.layers[0].attention.query.weight *= factor
            model.loss(tokens(seed=9))
    twins = [copy.deepcopy(attention) for attention in attentions]
    gradients = [(a.query.weight.grad, a.key.weight.grad) for a in attentions]
    optimizer.step()
    clipped = []
    for number, (attention, twin) in enumerate(zip(attentions, twins, strict=True)):
        largest = torch.stack([logits_by_hand(twin, x) for x in inputs[number][:2]]).amax(0)
        factor = torch.where(largest > 20.0, (20.0 / largest).sqrt(), 1.0)
        clipped += [float(one) for one in factor if one < 1.0]
        for name, gradient in zip(("query", "key"), gradients[number], strict=True):
            stepped = twin.get_parameter(f"{name}.weight") - 1e-3 * gradient
            expected = stepped * factor.repeat_interleave(8)[:, None]
            found = attention.get_parameter(f"{name}.weight")
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert len(clipped) == 1 and clipped[0] < 0.5

    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.zero_grad()
    optimizer.step()  # nothing has run since: nothing is clipped again
    assert all(torch.equal(after[name], p) for name, p in model.named_parameters())


def test_after_qk_clip_the_same_inputs_have_logits_of_tau() -> None:
    model = LanguageModel(ModelConfig(dim=16, layers=1, heads=2, context=16), 0)
    attention = model.layers[0].attention
    with torch.no_grad():
        attention.query.weight *= 500.0
    optimizer = QKClip().apply(torch.optim.SGD(model.parameters(), lr=0.0), model)
    model.loss(tokens()).backward()
    x = model.layers[0].attention_norm(model.embedding(tokens()[:, :-1])).detach()
    assert (logits_by_hand(attention, x) > 100.0).all()
    optimizer.step()
    assert logits_by_hand(attention, x).tolist() == pytest.approx([100.0, 100.0], rel=1e-5)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_qk_clip_sees_what_is_computed_again_once(reentrant: bool | None) -> None:
    model = LanguageModel(CONFIG, 0)
    if reentrant is not None:
        for layer in model.layers:
            layer.forward = lambda x, t, f=layer.forward: checkpoint(
                f, x, t, use_reentrant=reentrant
            )
    optimizer = QKClip(tau=0.5).apply(torch.optim.SGD(model.parameters(), lr=0.1), model)
    for seed in range(3):
        model.loss(tokens(seed=seed)).backward()
        optimizer.step()
    plain_model = LanguageModel(CONFIG, 0)
    born_with = plain_model.layers[0].attention.query.weight.detach().clone()

    def clipped(weight: Tensor) -> bool:
        return bool(weight.norm() < 0.9 * born_with.norm())

    plain_one = torch.optim.SGD(plain_model.parameters(), lr=0.1)
    QKClip(tau=0.5).apply(plain_one, plain_model)
    for seed in range(3):
        plain_model.loss(tokens(seed=seed)).backward()
        plain_one.step()
    found = dict(plain_model.named_parameters())
    assert all(torch.equal(p, found[name]) for name, p in model.named_parameters())
    assert clipped(found["layers.0.attention.query.weight"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_logit_that_is_not_finite_clips_nothing(bad: float) -> None:
    model = LanguageModel(CONFIG, 0)
    optimizer = QKClip(tau=1e-3).apply(torch.optim.SGD(model.parameters(), lr=0.0), model)
    before = [layer.attention.key.weight.detach().clone() for layer in model.layers]
    query = torch.full((1, 2, 3, 8), bad)
    for layer in model.layers:
        layer.attention.mixing(query.clone().requires_grad_(), query.abs(), query)
    optimizer.step()
    assert all(
        torch.equal(layer.attention.key.weight, one)
        for layer, one in zip(model.layers, before, strict=True)
    )


def test_ranks_clip_by_the_largest_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model, distributed = LanguageModel(CONFIG, 0), torch.distributed
    elsewhere = torch.tensor([400.0, -math.inf])

    def all_reduce(tensor: Tensor, op: Any) -> None:
        assert op == distributed.ReduceOp.MAX
        torch.maximum(tensor, elsewhere, out=tensor)

    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    optimizer = QKClip().apply(torch.optim.SGD(model.parameters(), lr=0.0), model)
    before = [layer.attention.query.weight.detach().clone() for layer in model.layers]
    for forward in (True, False):  # a rank without a forward takes part all the same
        if forward:
            model.loss(tokens()).backward()
        optimizer.step()
        for layer, one in zip(model.layers, before, strict=True):
            one[:8] *= 0.5
            assert torch.equal(layer.attention.query.weight, one)


def test_qk_clip_is_refused_where_it_cannot_be() -> None:
    def refused(optimizer: torch.optim.Optimizer, model: nn.Module, reason: str) -> None:
        with pytest.raises(ValueError) as caught:
            QKClip().apply(optimizer, model)
        assert str(caught.value) == reason
        assert not optimizer._optimizer_step_post_hooks

    llama = FAMILIES["llama"].build()
    expected = "expected one with query, key, heads and mixing, as the lab's has"
    kinds = "LlamaForCausalLM has LlamaAttention"
    refused(torch.optim.SGD(llama.parameters(), lr=1.0), llama, f"QKClip: {kinds}, {expected}")
    mlp = GatedFeedForward(4, 4)
    reason = f"QKClip: GatedFeedForward has no attention, {expected}"
    refused(torch.optim.SGD(mlp.parameters(), lr=1.0), mlp, reason)
    normed = LanguageModel(QKNorm().apply(CONFIG), 0)
    reason = "QKClip: layers.0.attention has QK-norm, its logits do not grow with W_q, W_k"
    refused(torch.optim.SGD(normed.parameters(), lr=1.0), normed, reason)
    model = LanguageModel(CONFIG, 0)
    reason = "QKClip: layers.0.attention: query or key is no parameter of the SGD"
    refused(torch.optim.SGD(model.head.parameters(), lr=1.0), model, reason)
    expected = "is shared, expected query and key of each head with weights of their own"
    for number, tied in ((0, model.layers[0].attention.key), (1, model.layers[1].attention.key)):
        model = LanguageModel(CONFIG, 0)
        tied = model.layers[number].attention.key
        tied.weight = model.layers[0].attention.query.weight
        reason = f"QKClip: layers.{number}.attention: query or key {expected}"
        refused(torch.optim.SGD(model.parameters(), lr=1.0), model, reason)


@pytest.mark.long
def test_qk_clip_is_on_once_and_says_when_it_sees_nothing() -> None:
    model = LanguageModel(CONFIG, 0)
    optimizer = QKClip().apply(torch.optim.SGD(model.parameters(), lr=0.0), model)
    with pytest.raises(ValueError, match=r"^QKClip: on this SGD already$"):
        QKClip(tau=5.0).apply(optimizer, model)
    assert len(optimizer._optimizer_step_post_hooks) == 1
    model.loss(tokens()[:0]).nansum().backward()  # no sequences: seen, and nothing to clip
    optimizer.step()

    torch._dynamo.reset()
    model = LanguageModel(CONFIG, 0)
    model.compile(backend="eager")
    model(tokens()).sum().backward()
    optimizer = QKClip().apply(torch.optim.SGD(model.parameters(), lr=0.0), model)
    model(tokens()).sum().backward()
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    torch._dynamo.reset()
    assert str(caught.value) == (
        "QKClip: layers.0.attention: gradients of a forward in which no logits were seen, "
        "expected QKClip on the model before it is compiled and run"
    )


# --- losses -----------------------------------------------------------------------------------


def outlying(model: LanguageModel) -> LanguageModel:
    with torch.no_grad():
        model.layers[0].mlp.down.weight[3] *= 50.0
    return model


def residuals(model: LanguageModel, text: Tensor) -> list[Tensor]:
    x = model.embedding(text)
    table = rotary_table(text.shape[1], 8, dtype=torch.float32, device=x.device)
    found = []
    for layer in model.layers:
        x = layer(x, table)
        found.append(x)
    return found


def test_tweo_is_its_formula() -> None:
    model = outlying(LanguageModel(CONFIG, 0))
    mitigation = TWEO(weight=0.02, tau=2.0, power=3.0)
    penalty = mitigation.apply(model)
    text = tokens()
    loss = model.loss(text)
    found = penalty()
    expected = 0.0
    for stream in residuals(model, text[:, :-1]):
        values = stream.detach().double().flatten().tolist()
        total = math.fsum((abs(v) / (2.0 + 1e-6)) ** 3 for v in values)
        expected += 0.02 * total / len(values) / 2
    assert float(found.detach()) == pytest.approx(expected, rel=1e-6)
    (loss + found).backward()

    twin = outlying(LanguageModel(CONFIG, 0))
    streams = residuals(twin, text[:, :-1])
    logits = twin.head(twin.norm(streams[-1]))
    by_hand = sum(((s.abs() / (2.0 + 1e-6)) ** 3).mean() for s in streams) / 2
    (F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()) + 0.02 * by_hand).backward()
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-8, msg=name)


def test_z_loss_is_its_formula() -> None:
    model = LanguageModel(CONFIG, 0)
    penalty = ZLoss(weight=0.5).apply(model)
    logits = model(tokens())
    found = penalty()
    rows = logits.detach().double().flatten(0, 1).tolist()
    logsums = [math.log(math.fsum(map(math.exp, row))) for row in rows]
    expected = 0.5 * math.fsum(z * z for z in logsums) / len(rows)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-6)
    found.backward()
    # d(logsumexp^2) = 2 logsumexp softmax
    x = []
    model.head.register_forward_pre_hook(lambda _, args: x.append(args[0].detach()))
    shares = torch.tensor(
        [[math.exp(v - z) for v in row] for row, z in zip(rows, logsums, strict=True)]
    )
    model(tokens())
    upstream = 0.5 * 2.0 * torch.tensor(logsums)[:, None] * shares / len(rows)
    torch.testing.assert_close(
        model.head.weight.grad, upstream.T @ x[0].flatten(0, 1), rtol=1e-4, atol=1e-7
    )


def test_penalties_by_gradcheck() -> None:
    torch.manual_seed(3)
    first, second = (4.0 * torch.randn(2, 3, 4, dtype=torch.float64) for _ in range(2))
    inputs = (first.requires_grad_(), second.requires_grad_())
    assert torch.autograd.gradcheck(lambda *outputs: TWEO().penalty(list(outputs)), inputs)
    assert torch.autograd.gradcheck(ZLoss(weight=0.1).penalty, (inputs[0],))
    assert TWEO().penalty(list(inputs)).dtype == torch.float64


LOSSES: list[Any] = [TWEO(), ZLoss()]
each_loss = pytest.mark.parametrize("mitigation", LOSSES, ids=lambda m: type(m).__name__)


@each_loss
def test_no_tokens_no_penalty_and_what_is_not_finite_shows(mitigation: Any) -> None:
    def of(tensor: Tensor) -> Tensor:
        return mitigation.penalty([tensor] if isinstance(mitigation, TWEO) else tensor)

    assert float(of(torch.zeros(2, 0, 4))) == 0.0
    if isinstance(mitigation, TWEO):
        assert float(of(torch.zeros(2, 3, 4))) == 0.0
    assert math.isnan(float(of(torch.full((2, 3), math.nan))))
    assert not math.isfinite(float(of(torch.tensor([[1.0, math.inf]]))))
    wide = of(torch.full((2, 3), 300.0, dtype=torch.bfloat16))
    assert wide.dtype == torch.float32
    assert torch.equal(wide, of(torch.full((2, 3), 300.0, dtype=torch.bfloat16).float()))


@each_loss
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_have_the_same_penalty(mitigation: Any, reentrant: bool) -> None:
    def trained(wrap: bool) -> tuple[list[float], LanguageModel]:
        model = outlying(LanguageModel(CONFIG, 0))
        penalty = mitigation.apply(model)
        if wrap:
            model.layers = nn.ModuleList(Recomputed(layer, reentrant) for layer in model.layers)
        found = []
        for seed in range(3):
            model.zero_grad()
            (model.loss(tokens(seed=seed)) + (extra := penalty())).backward()
            found.append(float(extra.detach()))
        return found, model

    found, model = trained(True)
    expected, plain_model = trained(False)
    assert found == expected
    # Reentrant checkpointing adds three gradients of the stream up in another order.
    tolerance = 1e-6 if reentrant and isinstance(mitigation, TWEO) else 0.0
    for one, other in zip(model.parameters(), plain_model.parameters(), strict=True):
        largest = float(other.grad.abs().max())
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=tolerance * largest)


class Recomputed(nn.Module):
    def __init__(self, layer: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.layer, self.reentrant = layer, reentrant

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        found: Tensor = checkpoint(self.layer, x, table, use_reentrant=self.reentrant)
        return found


@each_loss
def test_a_penalty_is_asked_for_once_a_forward_and_leaves_nothing(mitigation: Any) -> None:
    model = LanguageModel(CONFIG, 0)
    penalty = mitigation.apply(model)
    name = type(mitigation).__name__
    with pytest.raises(RuntimeError, match=rf"^{name}: .* has not run, expected a forward with"):
        penalty()
    with torch.no_grad():
        model.loss(tokens())
    with pytest.raises(RuntimeError, match="has not run"):
        penalty()
    model.loss(tokens())
    penalty()
    with pytest.raises(RuntimeError, match="has not run"):
        penalty()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(tokens()), model(tokens()))
        kept = [hook for module in twin.modules() for hook in module._forward_hooks.values()]
        assert kept and not any(isinstance(hook, OfOneModel) for hook in kept)
    penalty.remove()
    assert not any(module._forward_hooks for module in model.modules())


@each_loss
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", *DECAY_FAMILIES[4:6]])
def test_penalties_of_real_models(mitigation: Any, family: str) -> None:
    model = FAMILIES[family].build()
    penalty = mitigation.apply(model)
    text = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0))
    found = model(text, output_hidden_states=True, use_cache=False)
    if isinstance(mitigation, ZLoss):
        expected = 1e-4 * found.logits.float().logsumexp(-1).square().mean()
    else:
        seen = []
        for layer in model.model.layers:
            layer.register_forward_hook(
                lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
            )
        model(text, use_cache=False)
        assert [tuple(one.shape) for one in seen] == [(2, 8, 32)] * 2
        expected = 0.01 * sum(((s.abs() / 3.000001) ** 4).mean() for s in seen) / 2
    extra = penalty()
    torch.testing.assert_close(extra, expected, rtol=1e-6, atol=0)
    extra.backward()
    assert model.model.layers[0].self_attn.o_proj.weight.grad.isfinite().all()


class TwoLists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = (
            nn.ModuleDict({"layers": nn.ModuleList(GatedFeedForward(4, 4) for _ in range(2))})
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> tuple[Tensor]:
        for part in (self.encoder, self.decoder):
            for layer in part["layers"]:
                x = layer(x)
        return (x,)


def test_what_the_blocks_are_must_be_clear() -> None:
    def refused(model: nn.Module, reason: str, blocks: str | None = None) -> None:
        with pytest.raises(ValueError) as caught:
            TWEO(blocks=blocks).apply(model)
        assert str(caught.value) == reason
        assert not any(module._forward_hooks for module in model.modules())

    expected = "expected one, or blocks= with their names"
    lists = "2 lists of modules (encoder.layers, decoder.layers)"
    refused(TwoLists(), f"TWEO: TwoLists has {lists}, {expected}")
    refused(GatedFeedForward(4, 4), f"TWEO: GatedFeedForward has no list of modules, {expected}")
    refused(TwoLists(), "TWEO: blocks='layers.*' matches no module of TwoLists", "layers.*")
    model = TwoLists()
    penalty = TWEO(blocks="decoder.layers.*").apply(model)
    assert sum(len(module._forward_hooks) for module in model.modules()) == 2
    x = torch.randn(3, 4)
    model(x)
    for layer in (*model.encoder["layers"], model.decoder["layers"][0]):
        x = layer(x)
    last = model.decoder["layers"][1](x)
    expected_value = 0.01 * sum(((s.abs() / 3.000001) ** 4).mean() for s in (x, last)) / 2
    torch.testing.assert_close(penalty(), expected_value, rtol=1e-6, atol=0)


def test_outputs_without_stream_or_logits_are_refused() -> None:
    model = nn.ModuleList([nn.Identity()])
    TWEO().apply(model)
    with pytest.raises(TypeError, match=r"^TWEO: 0 gives out a dict, expected the residual"):
        model[0]({})
    wrong = TwoLists()
    with pytest.raises(ValueError, match=r"^ZLoss: head='lm_head', TwoLists has none such$"):
        ZLoss(head="lm_head").apply(wrong)
    ZLoss().apply(wrong)
    expected = r"^ZLoss: the output, a tuple, has no logits, expected head= to be set$"
    with pytest.raises(TypeError, match=expected):
        wrong(torch.ones(1, 4))
    right = TwoLists()
    penalty = ZLoss(weight=1.0, head="decoder.layers.1").apply(right)
    (logits,) = right(torch.ones(1, 4))
    assert torch.equal(penalty(), logits.logsumexp(-1).square().mean())


# --- architectures ----------------------------------------------------------------------------


def test_architectures_set_what_they_say() -> None:
    changed = {
        name: value
        for name, value in vars(FOG(activation="gelu").apply(CONFIG)).items()
        if value != getattr(CONFIG, name)
    }
    assert changed == {
        "variant": "gelu",
        "norm": "post",
        "norm_gain": 1 / math.sqrt(2),
        "final_norm": False,
        "qk_norm": "frozen",
        "softmax_scale": 0.5,  # sqrt(2 / 8)
        "embedding_std": 0.02,
    }
    published = ModelConfig(dim=2048, layers=16, heads=16, context=8)
    assert FOG().apply(published).softmax_scale == 0.125
    assert FOG(softmax_scale=0.25, embedding_std=1.0).apply(CONFIG).embedding_std == 1.0
    protected = OutlierProtected().apply(CONFIG)
    assert (protected.norm, protected.qk_norm, protected.residual_weight) == (
        "none",
        "learned",
        0.5,
    )
    assert OutlierProtected(residual_weight=0.1).apply(CONFIG).residual_weight == 0.1
    assert QKNorm().apply(CONFIG).qk_norm == "learned"
    assert QKNorm(learned=False).apply(CONFIG).qk_norm == "frozen"
    assert PlainFeedForward().apply(CONFIG).variant == "relu_squared"
    assert CONFIG == ModelConfig(dim=16, layers=2, heads=2, context=16)


ARCHITECTURES: list[Any] = [
    *(FOG(), FOG(activation="gelu"), FOG(embedding_std=1.0), OutlierProtected(), QKNorm()),
    *(PlainFeedForward(activation=a) for a in ("relu", "relu_squared", "gelu", "silu", "xielu")),
]


@pytest.mark.long
@pytest.mark.parametrize("mitigation", ARCHITECTURES, ids=repr)
def test_an_architecture_learns_and_is_watched(mitigation: Any, tmp_path: Path) -> None:
    config = mitigation.apply(CONFIG)
    model = fp8lab.convert(LanguageModel(config, 0), DelayedScaling(), exclude=["head"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    text = torch.arange(17).repeat(4, 1)
    losses = []
    with fp8lab.watch(model, tmp_path / "run", optimizer=optimizer) as watch:
        for step in range(40):
            loss = model.loss(text)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            watch.step(step, loss=loss)
            losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(math.log(256), abs=0.3)
    assert losses[-1] < 1.0
    rows = fp8lab.open_run(tmp_path / "run").tensors()
    roles = ("gate", "up") if config.is_gated else ("up",)
    expected = {f"layers.{n}.mlp:{role}" for n in range(2) for role in (*roles, "product")}
    assert expected <= set(rows["site"])
    assert rows["cur_amax"].notna().any()


def test_architectures_refuse_what_is_not_the_labs() -> None:
    for mitigation in (FOG(), OutlierProtected(), QKNorm(), PlainFeedForward()):
        name = type(mitigation).__name__
        for other in (None, ModelConfig, mitigation):
            got = type(other).__name__
            expected = f"{name}: {got}, expected the configuration of the lab's model"
            with pytest.raises(TypeError) as caught:
                mitigation.apply(other)
            assert str(caught.value) == expected
    gelu = PlainFeedForward(activation="gelu")
    with pytest.raises(ValueError, match=r"^PlainFeedForward: gelu has no gate already$"):
        gelu.apply(gelu.apply(CONFIG))
    with pytest.raises(ValueError, match=r"^PlainFeedForward: activation='geglu' has a gate$"):
        PlainFeedForward(activation="geglu").apply(CONFIG)
    with pytest.raises(ValueError, match=r"^PlainFeedForward: hidden=41, expected an even width$"):
        gelu.apply(ModelConfig(dim=16, layers=2, heads=2, context=16, hidden=41))
    with pytest.raises(ValueError, match=r"^ModelConfig.variant: expected one of .*, got 'tan'$"):
        FOG(activation="tan").apply(CONFIG)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (FOG(), QKNorm(), "QKNorm: the configuration has qk_norm='frozen', expected 'none' to"),
        (QKNorm(), FOG(), "FOG: the configuration has qk_norm='learned', expected 'none' to make"),
        (FOG(), OutlierProtected(), "OutlierProtected: the configuration has norm='post', expecte"),
        (OutlierProtected(), FOG(), "FOG: the configuration has norm='none', expected 'pre' to"),
    ],
    ids=repr,
)
def test_norms_are_changed_by_one(first: Any, second: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        second.apply(first.apply(CONFIG))
    assert str(caught.value).startswith(message)
    assert first.apply(first.apply(CONFIG)) == first.apply(CONFIG)
    both = QKNorm().apply(OutlierProtected().apply(CONFIG))  # says the same twice
    assert both == OutlierProtected().apply(CONFIG)


@pytest.mark.parametrize("activation", ["relu", "relu_squared", "gelu", "silu"])
def test_a_plain_feed_forward_has_the_parameters_of_the_gated_one(activation: str) -> None:
    for config in (CONFIG, ModelConfig(dim=64, layers=1, heads=4, context=8, hidden=170)):
        plain_config = PlainFeedForward(activation=activation).apply(config)
        counts = [
            sum(p.numel() for p in LanguageModel(one, 0).parameters())
            for one in (config, plain_config)
        ]
        assert counts[0] == counts[1]
