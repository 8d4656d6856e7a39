"""FP8 optimizer states: torch's arithmetic to the bit, and storage that is what it says.

Three oracles that are not ours: torch.optim.AdamW where nothing is reduced, torch's own float8
casts around formulas written out below where something is, and torchao's low-bit AdamW for blocks.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fp8lab.ffn import GatedFeedForward
from fp8lab.formats import (
    E2M1,
    E4M3,
    E4M3_GAUDI2,
    E4M3FNUZ,
    E5M2,
    E5M2FNUZ,
    FP16,
    FP32,
    FloatFormat,
)
from fp8lab.lab.train import load_checkpoint, save_checkpoint
from fp8lab.optim import Fp8AdamW

DTYPES = {
    E4M3: torch.float8_e4m3fn,
    E5M2: torch.float8_e5m2,
    E4M3FNUZ: torch.float8_e4m3fnuz,
    E5M2FNUZ: torch.float8_e5m2fnuz,
    FP16: torch.float16,
}
COAT = {"second_moment": E4M3, "group_size": 128, "expansion": True}


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """A matrix, a vector, one that lies transposed, one that never has a gradient, an empty one."""
    tensors = [random(9, 31, seed=1), random(17, seed=2), random(5, 8, seed=3).t()]
    tensors += [random(3, seed=4), torch.empty(0, 4)]
    return [nn.Parameter(tensor.to(dtype)) for tensor in tensors]


def give_gradients(of: list[nn.Parameter], step: int) -> None:
    """Spread over eight decades; the third parameter misses every other step."""
    for index, parameter in enumerate(of):
        parameter.grad = None
        if index == 3 or (index == 2 and step % 2):
            continue
        seeds = 1000 * index + 2 * step
        gradient = random(*parameter.shape, seed=seeds)
        gradient *= 10 ** (2 * random(*parameter.shape, seed=seeds + 1) - 3)
        parameter.grad = torch.empty_like(parameter).copy_(gradient)  # in its strides, as autograd


# --- torch.optim.AdamW --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"foreach": True},
        {"fused": True},
        {"maximize": True, "weight_decay": 0.3},
        {"lr": torch.tensor(0.02), "eps": 1e-4},
        {"betas": (0.5, 0.6), "weight_decay": 0.0},
    ],
    ids=str,
)
def test_nothing_reduced_is_torchs_adamw_to_the_bit(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    theirs, ours = parameters(dtype), parameters(dtype)
    # A scheduler writes into a learning rate that is a tensor: each optimizer has its own.
    mine = copy.deepcopy(options)
    optimizers = [
        torch.optim.AdamW([{"params": theirs[:2], "eps": 1e-3}, {"params": theirs[2:]}], **options),
        Fp8AdamW(
            [{"params": ours[:2], "eps": 1e-3}, {"params": ours[2:]}],
            first_moment=None,
            second_moment=None,
            **mine,
        ),
    ]
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(one, 0.9) for one in optimizers]
    for step in range(6):
        give_gradients(theirs, step)
        give_gradients(ours, step)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))
    for a, b in zip(theirs, ours, strict=True):
        assert optimizers[0].state[a].keys() == optimizers[1].state[b].keys()
        for name, value in optimizers[0].state[a].items():
            assert torch.equal(value, optimizers[1].state[b][name]), name


def test_a_closure_is_evaluated_with_gradients_and_its_value_returned() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = Fp8AdamW([weight], lr=0.1, weight_decay=0.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert torch.allclose(weight, torch.full((3,), 0.9))


# --- formulas written out, around torch's own casts -----------------------------------------------


class Reference:
    """AdamW of one parameter, its states stored in `first`, `second` and `master`."""

    def __init__(
        self,
        parameter: Tensor,
        first: FloatFormat | None,
        second: FloatFormat | None,
        master: FloatFormat | None,
        group_size: int | None,
    ) -> None:
        self.parameter, self.step_count, self.size = parameter.clone(), 0, group_size
        self.formats = first, second, master
        self.m = torch.zeros(parameter.shape)
        self.v = torch.zeros(parameter.shape)
        self.weights = self.parameter.float()

    def stored(self, values: Tensor, fmt: FloatFormat | None, size: int | None) -> Tensor:
        """What a tensor is after it has been stored."""
        if fmt is None or fmt == FP32:
            return values
        flat = values.flatten()
        pieces = []
        for piece in flat.split(size or max(len(flat), 1)):
            scale = torch.ones(())
            if len(piece) and piece.abs().max() > 0:
                scale = torch.div(torch.tensor(fmt.max), piece.abs().max())
            codes = (piece * scale).clamp(-fmt.max, fmt.max).to(DTYPES[fmt])
            pieces.append(codes.float() * torch.div(torch.ones(()), scale))
        return torch.cat(pieces).view(values.shape)

    def step(
        self,
        gradient: Tensor,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        maximize: bool,
    ) -> None:
        self.step_count += 1
        first, second, master = self.formats
        g = -gradient.float() if maximize else gradient.float()
        w = self.weights if master else self.parameter.float()
        w = w * (1 - lr * weight_decay)
        m = torch.lerp(self.m, g, 1 - betas[0])
        v = torch.addcmul(self.v * betas[1], g, g, value=1 - betas[1])
        corrections = [1 - beta**self.step_count for beta in betas]
        denominator = v.sqrt() / math.sqrt(corrections[1]) + eps
        w = torch.addcdiv(w, m, denominator, value=-lr / corrections[0])
        self.m, self.v = self.stored(m, first, self.size), self.stored(v, second, self.size)
        self.weights = self.stored(w, master, None)
        self.parameter = self.weights.to(self.parameter.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    ("first", "second", "master", "group_size"),
    [
        (E4M3, E5M2, None, None),
        (E4M3, E4M3, None, None),
        (E5M2, E5M2, None, 7),
        (E4M3FNUZ, E5M2FNUZ, None, None),
        (E4M3, None, None, 128),
        (None, E5M2, None, None),
        (E4M3, E5M2, FP16, None),
        (E4M3, E5M2, FP32, 16),
        (None, None, FP16, None),
    ],
    ids=str,
)
def test_a_step_is_the_written_out_formulas_to_the_bit(
    first: FloatFormat | None,
    second: FloatFormat | None,
    master: FloatFormat | None,
    group_size: int | None,
    maximize: bool,
    dtype: torch.dtype,
) -> None:
    own = parameters(dtype)
    numbers = {"lr": 0.03, "betas": (0.8, 0.9), "eps": 1e-7, "weight_decay": 0.2}
    optimizer = Fp8AdamW(
        own,
        **numbers,
        maximize=maximize,
        first_moment=first,
        second_moment=second,
        group_size=group_size,
        master_weights=master,
    )
    references = [Reference(p.detach(), first, second, master, group_size) for p in own]
    for step in range(8):
        give_gradients(own, step)
        optimizer.step()
        for parameter, reference in zip(own, references, strict=True):
            if parameter.grad is not None:
                reference.step(parameter.grad, **numbers, maximize=maximize)
            assert torch.equal(parameter, reference.parameter)
    for parameter, reference in zip(own, references, strict=True):
        if parameter in optimizer.state:
            m, v = optimizer.moments(parameter)
            assert torch.equal(m, reference.m) and torch.equal(v, reference.v)


@pytest.mark.parametrize("options", [{}, {"group_size": 5}, COAT], ids=str)
def test_fused_steps_see_the_strides_of_the_parameter(options: dict[str, Any]) -> None:
    """torch's fused kernel walks memory: moments in other strides would meet other elements."""
    plain, fused = parameters(), parameters()
    optimizers = [Fp8AdamW(plain, **options), Fp8AdamW(fused, fused=True, **options)]
    for step in range(4):
        for of, optimizer in zip((plain, fused), optimizers, strict=True):
            give_gradients(of, step)
            optimizer.step()
    for a, b in zip(plain, fused, strict=True):
        # The fused kernel rounds elsewhere: by its last bit, or by a code that this bit decides.
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_states_are_codes_of_one_byte_and_float32_scales() -> None:
    own = parameters(torch.bfloat16)
    optimizer = Fp8AdamW(own, group_size=128, master_weights=FP16)
    give_gradients(own, 0)
    optimizer.step()
    state = optimizer.state[own[0]]
    found = {name: (value.dtype, list(value.shape)) for name, value in state.items()}
    assert found == {
        "step": (torch.float32, []),
        "exp_avg_codes": (torch.float8_e4m3fn, [9, 31]),
        "exp_avg_scale_inv": (torch.float32, [3]),
        "exp_avg_sq_codes": (torch.float8_e5m2, [9, 31]),
        "exp_avg_sq_scale_inv": (torch.float32, [3]),
        "master_codes": (torch.float16, [9, 31]),
        "master_scale_inv": (torch.float32, [1]),
    }
    assert own[3] not in optimizer.state
    with pytest.raises(KeyError, match="no moments yet"):
        optimizer.moments(own[3])


def test_bytes_per_parameter_are_measured() -> None:
    own = [nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))]
    optimizer = Fp8AdamW(own, master_weights=FP16)
    with pytest.raises(ValueError, match="expected at least one step"):
        optimizer.bytes_per_parameter()
    own[0].grad = torch.ones_like(own[0])
    optimizer.step()
    scale = 4 / 4096
    assert optimizer.bytes_per_parameter() == {
        "parameter": 2.0,
        "exp_avg": 1 + scale,
        "exp_avg_sq": 1 + scale,
        "master": 2 + scale,
        "step": scale,
        "total": 6 + 4 * scale,
    }


# --- expansion ----------------------------------------------------------------------------------


def after_one_step(gradient: Tensor, **options: Any) -> tuple[Fp8AdamW, nn.Parameter]:
    parameter = nn.Parameter(torch.zeros_like(gradient))
    optimizer = Fp8AdamW([parameter], lr=0.0, betas=(0.0, 0.0), **options)
    parameter.grad = gradient.clone()
    optimizer.step()
    return optimizer, parameter  # with both betas zero: m = g and v = g^2


@pytest.mark.parametrize("fmt", [E4M3, E5M2])
@pytest.mark.parametrize("decades", [0.3, 3.0, 12.0])
def test_expansion_is_the_papers_formula(fmt: FloatFormat, decades: float) -> None:
    """f(x) = sign(x) |x|^k in float64, k = log(range of the format) / log(range of the group)."""
    gradient = random(300, 100, seed=1).sign() * 10 ** (decades * torch.rand(300, 100) - 6)
    options = {"first_moment": fmt, "group_size": 100, "expansion": True}
    optimizer, parameter = after_one_step(gradient, **options)
    state = optimizer.state[parameter]
    x = gradient.double().numpy()
    amax, amin = np.abs(x).max(1), np.abs(x).min(1)
    k = np.log(fmt.max / fmt.smallest_subnormal) / np.log(amax / amin)
    np.testing.assert_allclose(state["exp_avg_exponent"].numpy(), k, rtol=1e-6)
    np.testing.assert_array_equal(state["exp_avg_amax"].numpy(), amax.astype(np.float32))
    expanded = np.sign(x) * np.abs(x) ** k[:, None] * (fmt.max / amax**k)[:, None]
    codes = torch.from_numpy(expanded).float().clamp(-fmt.max, fmt.max).to(DTYPES[fmt])
    # Where float32's power errs across a midpoint the codes are neighbours.
    ours, theirs = (c.view(torch.uint8).int() for c in (state["exp_avg_codes"], codes))
    assert (ours - theirs).abs().max() <= 1
    assert (ours != theirs).float().mean() < 1e-3
    back = codes.double().numpy()
    back = np.sign(back) * (np.abs(back) / fmt.max) ** (1 / k[:, None]) * amax[:, None]
    agree = (ours == theirs).numpy()
    stored = optimizer.moments(parameter)[0].double().numpy()
    np.testing.assert_allclose(stored[agree], back[agree], rtol=1e-5)


def test_expansion_keeps_zeros_signs_and_the_largest_exactly() -> None:
    gradient = random(64, 128, seed=2) * 10 ** (2 * random(64, 128, seed=3))
    gradient[random(64, 128, seed=4) > 1] = 0.0
    gradient[5] = 0.0
    gradient[6] = 0.25
    gradient[7, 1:] = 0.0
    optimizer, parameter = after_one_step(gradient, **COAT)
    for stored, exact in zip(optimizer.moments(parameter), (gradient, gradient**2), strict=True):
        assert torch.equal(stored == 0, exact == 0)  # the smallest is not flushed either
        assert torch.equal(stored.sign(), exact.sign())
        assert torch.equal(stored.abs().amax(1), exact.abs().amax(1))
    assert torch.equal(optimizer.moments(parameter)[0][6:8], gradient[6:8])


def test_expansion_is_finer_where_the_range_of_a_group_is_small() -> None:
    """COAT's reason: moments of a group span a decade or three, the format's codes five."""
    gradient = 10 ** torch.rand(100, 128, generator=torch.Generator().manual_seed(0))
    errors = []
    for expansion in (False, True):
        optimizer, parameter = after_one_step(gradient, group_size=128, expansion=expansion)
        stored = optimizer.moments(parameter)[0]
        errors.append(float(((stored - gradient) / gradient).square().mean().sqrt()))
    assert errors[1] < errors[0] / 2  # by 5.3, the decades of codes, but where these are subnormal


# --- values that are not finite -----------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan, 1e30])
@pytest.mark.parametrize(
    "options",
    [{}, {"second_moment": E4M3}, {"group_size": 8}, COAT, {"master_weights": FP16}],
    ids=str,
)
def test_a_poisoned_gradient_spoils_what_it_spoils_in_torch_and_nothing_else(
    poison: float, options: dict[str, Any]
) -> None:
    """1e30 has a square of infinity: torch then stops that element where it is."""
    theirs, ours, clean = (nn.Parameter(random(4, 8, seed=1)) for _ in range(3))
    plain = torch.optim.AdamW([theirs], weight_decay=0.0)
    optimizers = [Fp8AdamW([p], weight_decay=0.0, **options) for p in (ours, clean)]
    hit = torch.zeros(4, 8, dtype=torch.bool)
    hit[2, 3] = True
    for step in range(6):
        gradient = random(4, 8, seed=10 + step).masked_fill(hit, 0.0)
        clean.grad = gradient.clone()
        poisoned = gradient.masked_fill(hit, poison) if step == 2 else gradient
        theirs.grad, ours.grad = poisoned.clone(), poisoned.clone()
        for optimizer in (plain, *optimizers):
            optimizer.step()
        if math.isfinite(poison):  # its first moment is the tensor's amax, and all others are lost
            assert torch.isnan(theirs).sum() == 0
            nan_allowed = options.get("second_moment") == E4M3  # it has no infinity
            assert torch.isnan(ours).sum() == (1 if nan_allowed and step > 2 else 0)
        else:
            assert torch.equal(ours.isnan(), theirs.isnan())
            assert torch.equal(ours[~hit], clean[~hit])
            moments = optimizers[0].moments(ours), optimizers[1].moments(clean)
            for a, b in zip(*moments, strict=True):
                assert torch.equal(a[~hit], b[~hit])
                assert not (step >= 2 and a[hit].isfinite().any())


def test_zero_gradients_and_tiny_ones() -> None:
    zero, parameter = after_one_step(torch.zeros(4, 4))
    assert all((moment == 0).all() for moment in zero.moments(parameter))
    tiny, parameter = after_one_step(torch.full((4, 4), 1e-25))
    m, v = tiny.moments(parameter)
    assert torch.allclose(m, torch.full((4, 4), 1e-25), rtol=1e-6, atol=0)
    assert (v == 0).all()  # 1e-50 is zero in float32 already


# --- saving and resuming ------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "plain": {"first_moment": None, "second_moment": None},
    "one moment": {"second_moment": None},
    "fnuz": {"first_moment": E4M3FNUZ, "second_moment": E5M2FNUZ},
    "coat": COAT,
    "fp16 master": {"master_weights": FP16, "group_size": 16},
    "fp32 master": {"master_weights": FP32, "fused": True},
}


def through_file(optimizer: Fp8AdamW) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def by_copy(optimizer: Fp8AdamW) -> dict[str, Any]:
    return copy.deepcopy(optimizer).state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", [through_file, by_copy])
@pytest.mark.parametrize("kind", KINDS)
def test_resuming_is_the_uninterrupted_run_to_the_bit(
    kind: str, way: Callable[[Fp8AdamW], dict[str, Any]], dtype: torch.dtype
) -> None:
    def made() -> tuple[list[nn.Parameter], Fp8AdamW]:
        own = parameters(dtype)
        groups = [{"params": own[:1], "lr": 0.1}, {"params": own[1:], "weight_decay": 0.0}]
        return own, Fp8AdamW(groups, lr=0.01, **KINDS[kind])

    whole, optimizer = made()
    for step in range(8):
        if step == 4:
            resumed, other = made()
            with torch.no_grad():
                for a, b in zip(resumed, whole, strict=True):
                    a.copy_(b)
            other.load_state_dict(way(optimizer))
        give_gradients(whole, step)
        optimizer.step()
        if step >= 4:
            give_gradients(resumed, step)
            other.step()
            assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    for a, b in zip(whole, resumed, strict=True):
        assert optimizer.state[a].keys() == other.state[b].keys()
        for name, value in optimizer.state[a].items():
            assert other.state[b][name].dtype == value.dtype
            assert torch.equal(other.state[b][name].float(), value.float())


def test_the_labs_checkpoint_holds_them(tmp_path: Path) -> None:
    def made() -> tuple[nn.Module, Fp8AdamW]:
        torch.manual_seed(0)
        model = GatedFeedForward(8, 16)
        return model, Fp8AdamW(model.parameters(), **COAT)

    def advance(model: nn.Module, optimizer: Fp8AdamW, step: int) -> None:
        give_gradients(list(model.parameters())[:2], step)
        optimizer.step()

    model, optimizer = made()
    for step in range(3):
        advance(model, optimizer, step)
    save_checkpoint(tmp_path / "file.safetensors", model, optimizer, 3)
    again, other = made()
    load_checkpoint(tmp_path / "file.safetensors", again, other)
    advance(model, optimizer, 3)
    advance(again, other, 3)
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_loaded_state_is_a_copy() -> None:
    own, others = parameters(), parameters()
    optimizer, other = Fp8AdamW(own), Fp8AdamW(others)
    give_gradients(own, 0)
    optimizer.step()
    other.load_state_dict(optimizer.state_dict())
    other.state[others[0]]["step"] += 5
    assert optimizer.state[own[0]]["step"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (None, "parameter group 0: expected a state of Fp8AdamW"),
        ({"first_moment": E5M2}, "exp_avg_codes is .*e5m2"),
        ({"group_size": 4}, r"exp_avg_scale_inv is .*\(70,\)"),
        (COAT, "exp_avg_amax is .*expected nothing"),
        ({"master_weights": FP16}, "master_codes is .*expected nothing"),
    ],
    ids=str,
)
def test_a_state_stored_otherwise_is_refused_and_nothing_changes(
    options: dict[str, Any] | None, message: str
) -> None:
    own, others = parameters(), parameters()
    optimizer = Fp8AdamW(own)
    other: torch.optim.Optimizer = torch.optim.AdamW(others)
    if options is not None:
        other = Fp8AdamW(others, **options)
    for of, one in ((own, optimizer), (others, other)):
        give_gradients(of, 0)
        one.step()
    state = other.state_dict()
    if options is not None:  # as if the groups had been loaded from elsewhere
        state["param_groups"] = optimizer.state_dict()["param_groups"]
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message) as error:
        optimizer.load_state_dict(state)
    assert "\n" not in str(error.value)
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    for index, kept in before["state"].items():
        for name, value in kept.items():
            assert torch.equal(optimizer.state_dict()["state"][index][name].float(), value.float())


# --- master weights -----------------------------------------------------------------------------


def test_a_master_keeps_what_a_bfloat16_parameter_loses() -> None:
    """A hundred steps of 1e-3 from 1: each less than half a unit of BF16, more than one of FP16."""
    ends = {}
    for master in (None, FP16, FP32):
        parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        optimizer = Fp8AdamW([parameter], lr=1e-3, weight_decay=0.0, master_weights=master)
        for _ in range(100):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        ends[master] = float(parameter.detach()[0])
    assert ends[None] == 1.0
    assert ends[FP32] == pytest.approx(0.9, abs=0.004)
    assert ends[FP16] == pytest.approx(0.9, abs=0.03)


def test_a_float32_parameter_is_its_own_fp32_master() -> None:
    own = parameters()
    optimizer = Fp8AdamW(own, master_weights=FP32)
    give_gradients(own, 0)
    optimizer.step()
    assert not any(name.startswith("master") for name in optimizer.state[own[0]])


def test_what_changed_a_parameter_in_between_is_not_undone() -> None:
    parameter = nn.Parameter(random(8, seed=1, dtype=torch.bfloat16))
    untouched = nn.Parameter(parameter.detach().clone())
    optimizers = [
        Fp8AdamW([p], lr=1e-3, weight_decay=0.0, master_weights=FP16)
        for p in (parameter, untouched)
    ]
    for step in range(3):
        for p, optimizer in zip((parameter, untouched), optimizers, strict=True):
            p.grad = random(8, seed=step, dtype=torch.bfloat16)
            optimizer.step()
        if step == 1:
            with torch.no_grad():
                parameter[3] = 0.5
    assert float(parameter.detach()[3]) == pytest.approx(0.5, abs=0.01)
    others = torch.arange(8) != 3
    assert torch.equal(parameter[others], untouched[others])


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first_moment": E2M1}, "first_moment='E2M1', expected None or one of E4M3"),
        ({"second_moment": FP16}, "second_moment='FP16', expected None or one of E4M3"),
        ({"second_moment": E4M3_GAUDI2}, "second_moment='E4M3_GAUDI2', expected None"),
        ({"first_moment": "float8"}, "first_moment='float8', expected None or one of"),
        ({"master_weights": E4M3}, "master_weights='E4M3', expected None or one of FP16, FP32"),
        ({"group_size": 0}, "group_size=0, expected None or at least 1"),
        ({"group_size": 12.5}, "group_size=12.5, expected None or at least 1"),
        ({"expansion": 1}, "expansion=1, expected True or False"),
        (
            {"first_moment": None, "second_moment": None, "expansion": True},
            "expansion=True, expected a moment that is quantised",
        ),
        ({"lr": -1.0}, "Invalid learning rate"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused_at_birth(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Fp8AdamW(parameters(), **options)


@pytest.mark.parametrize("name", ["amsgrad", "capturable", "differentiable"])
def test_what_torch_has_and_this_has_not_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        Fp8AdamW(parameters(), **{name: True})
    with pytest.raises(ValueError, match=f"{name}=True, expected False: not supported"):
        Fp8AdamW([{"params": parameters(), name: True}])


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_parameters_that_would_be_rounded_twice_are_refused(dtype: torch.dtype) -> None:
    own = parameters()
    optimizer = Fp8AdamW(own)
    wrong = nn.Parameter(torch.zeros(3, dtype=dtype))
    with pytest.raises(ValueError, match=f"{dtype}, expected float32, bfloat16 or float16"):
        optimizer.add_param_group({"params": [wrong]})
    assert len(optimizer.param_groups) == 1


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradient"):
        Fp8AdamW(embedding.parameters()).step()


def test_groups_have_options_of_their_own_and_follow_the_defaults() -> None:
    own = parameters()
    optimizer = Fp8AdamW([{"params": own[:1], "first_moment": E5M2}], second_moment=None)
    optimizer.add_param_group({"params": own[1:]})
    give_gradients(own, 0)
    optimizer.step()
    assert optimizer.state[own[0]]["exp_avg_codes"].dtype == torch.float8_e5m2
    assert optimizer.state[own[1]]["exp_avg_codes"].dtype == torch.float8_e4m3fn
    assert optimizer.state[own[1]]["exp_avg_sq"].dtype == torch.float32


def test_named_parameters_and_none_at_all() -> None:
    model = GatedFeedForward(4, 8)
    optimizer = Fp8AdamW(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"][0] == "gate.weight"
    with pytest.raises(ValueError, match="empty parameter list"):
        Fp8AdamW([])
    with pytest.raises(TypeError, match="iterable"):
        Fp8AdamW(torch.ones(3))


def test_a_gradient_scaler_skips_a_step_without_touching_the_states() -> None:
    parameter = nn.Parameter(random(16, seed=1))
    optimizer = Fp8AdamW([parameter], fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (1.0, math.inf, 1.0):
        before, step = parameter.detach().clone(), optimizer.state.get(parameter, {}).get("step")
        count = 0 if step is None else int(step)
        optimizer.zero_grad()
        scaler.scale((parameter * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        skipped = math.isinf(factor)
        assert torch.equal(before, parameter) == skipped
        assert int(optimizer.state[parameter]["step"]) == count + (not skipped)


# --- torchao, and whether it learns -------------------------------------------------------------


def test_torchaos_step_of_blocks_of_256() -> None:
    """Same codes but where the last bit of a scale or of v decides, by at most one code."""
    adam = pytest.importorskip("torchao.optim.adam")
    fp8 = pytest.importorskip("torchao.optim.subclass_fp8")
    theirs = random(32, 256, seed=1)
    ours = nn.Parameter(theirs.clone())
    m, v = (fp8.OptimStateFp8.zeros(theirs.shape, 256) for _ in range(2))
    optimizer = Fp8AdamW([ours], lr=0.01, weight_decay=0.1, second_moment=E4M3, group_size=256)
    for step in range(1, 6):
        gradient = random(32, 256, seed=step + 1)
        ours.grad = gradient.clone()
        optimizer.step()
        numbers = torch.tensor(float(step)), m, v, None, torch.tensor(0.01), 0.9, 0.999, 0.1, 1e-8
        adam.single_param_adam(theirs, gradient, *numbers, True, False)
        state = optimizer.state[ours]
        for name, stored in (("exp_avg", m), ("exp_avg_sq", v)):
            a, b = (c.view(torch.uint8).int() for c in (state[f"{name}_codes"], stored.codes))
            assert (a != b).float().mean() < 0.001 and (a - b).abs().max() <= 1, name
            torch.testing.assert_close(state[f"{name}_scale_inv"], stored.scale, rtol=1e-6, atol=0)
        # A differing code of m moves a weight by an eighth of a step of the learning rate.
        torch.testing.assert_close(ours.detach(), theirs, rtol=0, atol=step * 0.01 / 8)
        assert ((ours.detach() - theirs).abs() > 1e-5).float().mean() < 0.01


def test_it_learns_as_adamw_learns() -> None:
    """A SwiGLU layer fits a random one; the loss falls twentyfold with every optimizer."""

    def final_loss(made: Callable[[Any], torch.optim.Optimizer]) -> float:
        torch.manual_seed(0)
        teacher, student = GatedFeedForward(8, 16), GatedFeedForward(8, 32)
        optimizer, losses = made(student.parameters()), []
        for step in range(200):
            x = random(64, 8, seed=step)
            loss = (student(x) - teacher(x).detach()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        last = sum(losses[-20:]) / 20
        assert last < losses[0] / 20
        return last

    numbers = {"lr": 0.02, "betas": (0.9, 0.95)}
    theirs = final_loss(lambda p: torch.optim.AdamW(p, **numbers))
    for options in ({}, COAT, {"master_weights": FP16}):
        ours = final_loss(lambda p, options=options: Fp8AdamW(p, **numbers, **options))
        assert ours < 1.5 * theirs, options
