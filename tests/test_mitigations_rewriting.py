"""What down's operands are rewritten to: Smooth-SwiGLU's three forms, Hadamard, hot channels.

The references cast with torch's own float8 types and know no Fp8Linear; where every step is exact
or done in the same order they are equal to the bit. Gradients without the casts are torch's own
`gradcheck` in float64 of the rewriting alone, since the layer refuses float64.
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import foreign_feed_forwards as foreign
import pytest
import torch
import torch.nn.functional as F
from test_families import FAMILIES, run
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fp8lab
from fp8lab import formats
from fp8lab.ffn import GatedFeedForward
from fp8lab.lab.model import LanguageModel, ModelConfig
from fp8lab.linear import Fp8Linear
from fp8lab.mitigations.hadamard_product import (
    HadamardProduct,
    Turned,
    hadamard_matrix,
    random_signs,
)
from fp8lab.mitigations.high_precision_product import HighPrecisionOperands
from fp8lab.mitigations.hot_channel_patch import HotChannelPatch, Patched
from fp8lab.mitigations.smooth_swiglu import (
    ChannelsBalanced,
    SmoothSwiGLU,
    TokensBalanced,
    power_of_two_scale,
)
from fp8lab.recipe import (
    Accumulation,
    BitNetScaling,
    DelayedScaling,
    Float8BlockScaling,
    Float8CurrentScaling,
    Format,
    HighPrecision,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
    Recipe,
    RowwiseScaling,
)

FP32 = HighPrecision(format=formats.FP32)
SMOOTH = {
    "paper": SmoothSwiGLU(),
    "paper, linear": SmoothSwiGLU(branch="linear"),
    "paper, any scale": SmoothSwiGLU(power_of_two=False),
    "paper, with gradient": SmoothSwiGLU(power_of_two=False, detach=False),
    "paper, delayed": SmoothSwiGLU(timing="delayed"),
    "paper, linear, delayed": SmoothSwiGLU(branch="linear", timing="delayed"),
    "token": SmoothSwiGLU(granularity="token"),
    "reference code": SmoothSwiGLU.reference_code(),
    "reference code, with gradient": SmoothSwiGLU.reference_code(detach=False),
    "FOG": SmoothSwiGLU.fog_baseline(),
}
MITIGATIONS: dict[str, Any] = SMOOTH | {
    "Hadamard": HadamardProduct(block=8),
    "hot channels": HotChannelPatch(channels=4),
    "hot channels, amax": HotChannelPatch(channels=4, score="amax", operands="input"),
    "hot channels, persistent": HotChannelPatch(channels=4, timing="persistent"),
}
DELAYED = [name for name, mitigation in SMOOTH.items() if mitigation.timing == "delayed"]
every = pytest.mark.parametrize("name", MITIGATIONS)


def feed_forward(variant: str = "swiglu", spread: float = 64.0) -> GatedFeedForward:
    """dim 16, hidden 24; one channel of the product is `spread` times larger."""
    model = GatedFeedForward(16, 24, variant)
    with torch.no_grad():
        model.up.weight[5] *= spread
    return model


def on_down(model: nn.Module, mitigation: Any, **recipes: Recipe) -> Fp8Linear:
    """Convert down alone, and put the mitigation on it."""
    plan = {f"*down:{operand}": recipe for operand, recipe in recipes.items()}
    fp8lab.convert(model, Float8CurrentScaling(), include=["*down"], overrides=plan)
    mitigation.apply(model)
    down: Any = model.get_submodule("down")
    return down


def wide(down: Fp8Linear) -> None:
    for operand in down.recipes:
        down.recipes[operand] = FP32


def current(tensor: Tensor) -> Tensor:
    """TE's current scaling and its inverse, with torch's own rounding."""
    scale = torch.div(torch.tensor(448.0), tensor.abs().max())
    codes = (tensor * scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes.float() * (1.0 / scale)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def relative(one: Tensor, other: Tensor) -> float:
    return float(((one - other).norm() / other.norm()).detach())


# --- the function -------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("variant", ["swiglu", "gtu"])
def test_without_casts_the_function_and_its_gradients_stay(name: str, variant: str) -> None:
    model = feed_forward(variant)
    plain, x = copy.deepcopy(model), torch.randn(2, 5, 16)
    wide(on_down(model, MITIGATIONS[name]))
    upstream = torch.randn(2, 5, 16)
    for _ in range(2):  # in the second step delayed scales are no longer 1
        model.zero_grad()
        output = model(x)
        output.backward(upstream)
    expected = plain(x)
    expected.backward(upstream)
    assert relative(output, expected) <= 1e-6
    for parameter, gradient in gradients(plain).items():
        assert relative(gradients(model)[parameter], gradient) <= 1e-6, parameter
    exact = not MITIGATIONS[name].__dict__.get("power_of_two", True)
    if name in SMOOTH and not exact:
        assert torch.equal(output, expected)
        assert_equal(gradients(model), gradients(plain))


@pytest.mark.parametrize("name", [n for n in MITIGATIONS if not n.startswith("hot")])
def test_gradcheck_of_the_rewriting(name: str) -> None:
    mitigation = MITIGATIONS[name]
    down: Any = Fp8Linear(8, 3, recipes=dict.fromkeys(("input", "weight", "grad_output"), FP32))
    if isinstance(mitigation, HadamardProduct):
        rewrite: Any = Turned(mitigation, 8)
    else:
        kind = ChannelsBalanced if mitigation.granularity == "channel" else TokensBalanced
        rewrite = kind(mitigation)
        if mitigation.timing == "delayed":
            down.register_buffer("smooth_scale", 2.0 ** torch.arange(-4, 4))
            rewrite.layer = down

    def function(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        if (
            mitigation in SMOOTH.values()
            and mitigation.branch != "product"
            and mitigation.timing != "delayed"
        ):
            rewrite.see(gate if mitigation.branch == "gate" else up)
        made = rewrite(F.silu(gate) * up, weight)
        output = F.linear(made.input, made.weight)
        return output if made.output_scale is None else output * made.output_scale

    shapes = (2, 2, 8), (2, 2, 8), (3, 8)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(function, inputs)
    gate, up, weight = inputs
    assert relative(function(*inputs), F.linear(F.silu(gate) * up, weight)) < 1e-12
    assert down.rewrite is None


@pytest.mark.parametrize("operands", ["both", "input", "weight"])
def test_gradcheck_of_the_patch_with_constant_residuals(
    operands: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Float8CurrentScaling()
    down = Fp8Linear(8, 3, recipes=dict.fromkeys(("input", "weight", "grad_output"), recipe))
    rewrite = Patched(HotChannelPatch(channels=3, operands=operands), down)
    lost = {"input": torch.randn(2, 8).double(), "weight": torch.randn(3, 8).double()}
    monkeypatch.setattr(Patched, "_lost", lambda self, operand, tensor: lost[operand])

    def function(product: Tensor, weight: Tensor) -> Tensor:
        made = rewrite(product, weight)
        return F.linear(made.input, made.weight)

    product, weight = (torch.randn(n, 8, dtype=torch.float64, requires_grad=True) for n in (2, 3))
    assert torch.autograd.gradcheck(function, (product, weight))


# --- with casts, by hand ------------------------------------------------------------------------


def factors(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return F.linear(x, model.gate.weight), F.linear(x, model.up.weight)


@pytest.mark.parametrize("name", ["token", "reference code", "FOG"])
def test_the_token_forms_are_their_formula(name: str) -> None:
    model = feed_forward()
    down = on_down(model, MITIGATIONS[name], weight=FP32, grad_output=FP32)
    plain, x, upstream = copy.deepcopy(model), torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    output = model(x)
    output.backward(upstream)

    gate, up = factors(plain, x)
    product = F.silu(gate) * up
    of = {"token": product, "reference code": up, "FOG": gate}[name].detach()
    scale = of.abs().amax(dim=-1, keepdim=True).reciprocal()
    if name == "token":
        scale = power_of_two_scale(of.abs().amax(dim=-1, keepdim=True))
        smooth = (product * scale).abs().amax(dim=-1)
        assert ((smooth > 0.5) & (smooth <= 1.0)).all()
    inputs, weight = current(product.detach() * scale), plain.down.weight.detach()
    assert torch.equal(output, F.linear(inputs, weight) * scale.reciprocal())
    gradient = upstream * scale.reciprocal()
    product.backward((gradient @ weight) * scale)
    flat = gradient.reshape(-1, 16)
    expected = {
        "gate.weight": plain.gate.weight.grad,
        "up.weight": plain.up.weight.grad,
        "down.weight": flat.t() @ inputs.reshape(-1, 24),
    }
    assert_equal(gradients(model), expected)
    assert down.recipes["weight"] == FP32


def test_the_reference_code_divides_up_before_the_product() -> None:
    """As ScaledSwiglu does it: to one rounding the same."""
    model = feed_forward()
    down = on_down(model, SmoothSwiGLU.reference_code(), weight=FP32, grad_output=FP32)
    x = torch.randn(7, 16)
    with torch.no_grad():
        gate, up = factors(model, x)
        s = up.abs().max(dim=-1, keepdim=True).values
        how = down.cast_in_force("input", model.product(x))
        torch.testing.assert_close(how.tensor, F.silu(gate) * (up / s), rtol=3e-7, atol=0)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("granularity", ["token", "channel"])
def test_a_scale_that_is_not_detached_carries_the_gradient_of_its_maximum(
    granularity: Any, detach: bool
) -> None:
    """Without casts it cancels; with them the gradient is another."""
    model = feed_forward()
    how = SmoothSwiGLU(granularity=granularity, branch="linear", power_of_two=False, detach=detach)
    on_down(model, how, weight=FP32, grad_output=FP32)
    plain, x, upstream = copy.deepcopy(model), torch.randn(10, 16), torch.randn(10, 16)
    model(x).backward(upstream)
    gate, up = factors(plain, x)
    of = (up.detach() if detach else up).abs()
    scale = of.amax(dim=-1 if granularity == "token" else 0, keepdim=True).reciprocal()
    smooth = F.silu(gate) * up * scale
    cast = smooth + (current(smooth.detach()) - smooth).detach()
    weight = plain.down.weight
    if granularity == "token":
        output = F.linear(cast, weight) / scale
    else:
        output = F.linear(cast, weight / scale)
    output.backward(upstream)
    for name, gradient in gradients(plain).items():
        assert relative(gradients(model)[name], gradient) <= 1e-6, name


def test_the_linear_branch_bounds_half_of_the_growth() -> None:
    model = feed_forward()
    on_down(model, SmoothSwiGLU(branch="linear"), weight=FP32, grad_output=FP32)
    plain, x = copy.deepcopy(model), torch.randn(2, 5, 16)
    output = model(x)
    gate, up = factors(plain, x)
    scale = power_of_two_scale(up.detach().abs().amax(dim=(0, 1)))
    inputs = current((F.silu(gate) * up).detach() * scale)
    weight = plain.down.weight.detach() / scale
    assert torch.equal(output, F.linear(inputs.view(-1, 24), weight).view(2, 5, 16))


def next_scale(before: Tensor, amax: Tensor) -> Tensor:
    """Of a delayed scale: at most the median channel's, and at most twice the one before."""
    scale = power_of_two_scale(amax.clamp(min=amax[amax > 0].median()))
    return torch.where(before == 0, scale, torch.minimum(scale, 2 * before))


@pytest.mark.parametrize("branch", ["product", "linear"])
def test_a_delayed_scale_is_made_of_the_step_before(branch: Any) -> None:
    model = feed_forward()
    down = on_down(model, SmoothSwiGLU(timing="delayed", branch=branch), weight=FP32)
    rewrite: Any = down.rewrite
    before = torch.zeros(24)  # none yet
    for step in range(4):
        assert torch.equal(down.smooth_scale, before)
        parts = [(step + 1.0) * torch.randn(5, 16) for _ in range(2)]
        parts[1][:, :] = 0.0 if step == 2 else parts[1]
        amax = torch.zeros(24)
        with fp8lab.autocast():
            for x in parts:
                gate, up = (t.detach() for t in factors(model, x))
                product = F.silu(gate) * up
                made = down.cast_in_force("input", product)
                output = model(x)
                just_in_time = power_of_two_scale(product.abs().amax(dim=0))
                used = before if step else just_in_time
                assert torch.equal(rewrite._last, used)
                assert torch.equal(made.tensor, product * used)
                of = product if branch == "product" else up
                amax = torch.maximum(amax, of.abs().amax(dim=0))
                output.sum().backward()
        before = next_scale(before, amax)
        with torch.no_grad():  # an evaluation leaves it alone
            model(1e3 * torch.randn(5, 16))
    assert torch.equal(down.smooth_scale, before)


def test_a_silent_channel_keeps_its_delayed_scale() -> None:
    model = feed_forward()
    down: Any = on_down(model, SmoothSwiGLU(timing="delayed"))
    model(torch.randn(5, 16))
    first = down.smooth_scale.clone()
    with torch.no_grad():
        model.up.weight[3] = 0.0
        model.up.weight[4] = torch.nan
    model(torch.randn(5, 16))
    assert torch.equal(down.smooth_scale[3:5], first[3:5])
    assert not torch.equal(down.smooth_scale, first)


def error_of(model: Any, x: Tensor) -> float:
    """Of down's output under FP8, relative to its exact one; the step is taken."""
    with torch.no_grad():
        expected = model.product(x).double() @ model.down.weight.double().t()
    output = model(x)
    output.sum().backward()
    return relative(output.detach().double(), expected)


@pytest.mark.parametrize("name", ["paper", "paper, delayed", "reference code", "token"])
@pytest.mark.parametrize("copies", [False, True])
def test_put_on_in_mid_training_it_does_not_take_the_history_of_another_operand(
    name: str, copies: bool
) -> None:
    """With TE's history of 1024 steps the layer would be destroyed for as many."""
    model = GatedFeedForward(32, 64)
    with torch.no_grad():
        model.up.weight[5] *= 1e6
    fmt = Format.HYBRID_E5M2_COPIES if copies else Format.HYBRID
    fp8lab.convert(model, DelayedScaling(fp8_format=fmt))
    x = torch.randn(64, 32)
    for _ in range(3):
        error_of(model, x)
    weight, gradient = model.down.scale[1:3].clone()
    MITIGATIONS[name].apply(model)
    kept = model.down.scale[1], model.down.amax_history[1:, 1].any()
    assert kept == (weight, True)
    of_tokens = "paper" not in name  # whose gradient is divided by s
    assert (model.down.scale[2] == gradient) != of_tokens
    fresh = model.down.scale[[0, 3] if copies else [0]]
    assert (fresh == 1).all() and not model.down.amax_history[:, 0].any()
    errors = [error_of(model, x) for _ in range(3)]
    assert max(errors[1:]) <= 0.045


@pytest.mark.parametrize("recipe", [Float8CurrentScaling(), DelayedScaling()], ids=str)
@pytest.mark.parametrize("quiet", [1e-3, 1e-8])
def test_a_channel_that_was_quiet_for_a_step_is_no_outlier_after(
    recipe: Recipe, quiet: float
) -> None:
    errors = {}
    for name in ("none", "paper, delayed"):
        torch.manual_seed(0)
        model, x = GatedFeedForward(32, 64), torch.randn(64, 32)
        fp8lab.convert(model, recipe, include=["down"])
        if name != "none":
            MITIGATIONS[name].apply(model)
        loud = model.up.weight.detach().clone()
        for factor in (1.0, 1.0, 1.0, quiet, 1.0):
            with torch.no_grad():
                model.up.weight[3] = loud[3] * factor
            errors[name] = error_of(model, x)
    assert errors["paper, delayed"] <= 1.01 * errors["none"]


def test_the_turned_product_is_its_formula() -> None:
    signs = random_signs(32, seed=3)
    assert set(signs.tolist()) == {-1.0, 1.0}
    walsh = [[(-1.0) ** (i & j).bit_count() / 4 for j in range(16)] for i in range(16)]
    assert hadamard_matrix(16).tolist() == walsh
    turn = torch.diag(signs) @ torch.block_diag(torch.tensor(walsh), torch.tensor(walsh))
    assert torch.equal(turn @ turn.t(), torch.eye(32))
    recipes = dict.fromkeys(("input", "weight", "grad_output"), Float8CurrentScaling())
    layer = Fp8Linear(32, 8, bias=False, recipes=recipes | {"grad_output": FP32})
    plain = copy.deepcopy(layer)
    layer.rewrite = Turned(HadamardProduct(seed=3), 16)
    x = torch.randint(-8, 9, (2, 5, 32)).float().requires_grad_()
    with torch.no_grad():  # whole numbers: every order of the sums gives the same
        layer.weight.copy_(torch.randint(-8, 9, (8, 32)))
    upstream = torch.randint(-3, 4, (2, 5, 8)).float()
    output = layer(x)
    output.backward(upstream)
    inputs, weight = current(x.detach() @ turn), current(layer.weight.detach() @ turn)
    assert torch.equal(output, F.linear(inputs.view(10, 32), weight).view(2, 5, 8))
    torch.testing.assert_close(x.grad, upstream @ weight @ turn.t())
    flat = upstream.view(10, 8).t() @ inputs.view(10, 32)
    torch.testing.assert_close(layer.weight.grad, flat @ turn.t())
    assert plain.rewrite is None


def test_an_outlier_is_shared_out_among_its_block() -> None:
    x = torch.zeros(1, 32)
    x[0, 5] = 64.0
    turned = Turned(HadamardProduct(), 16)(x, x).input
    assert turned.abs()[0].tolist() == [16.0] * 16 + [0.0] * 16
    assert Turned(HadamardProduct(block=None), 32)(x, x).input.abs().amax() < 12


@pytest.mark.parametrize("score", ["residual", "amax"])
@pytest.mark.parametrize("operands", ["both", "input", "weight"])
def test_the_patch_is_its_formula(operands: Any, score: Any) -> None:
    model = feed_forward(spread=8.0)
    mitigation = HotChannelPatch(channels=3, operands=operands, score=score)
    down = on_down(model, mitigation, grad_output=FP32)
    plain, x, upstream = copy.deepcopy(model), torch.randn(9, 16), torch.randn(9, 16)
    output = model(x)
    output.backward(upstream)

    gate, up = factors(plain, x)
    product = F.silu(gate) * up
    flat, weight = product.detach(), plain.down.weight.detach()
    lost, lost_of_weight = flat - current(flat), weight - current(weight)
    scores = lost.abs().mean(0) + lost_of_weight.abs().mean(0)
    scores = flat.abs().amax(0) if score == "amax" else scores
    hot = sorted(range(24), key=lambda channel: -float(scores[channel]))[:3]
    hot.sort()
    assert 5 in hot
    of_input, of_weight = operands != "weight", operands != "input"
    left = torch.cat([flat, *[lost[:, hot]] * of_input, *[flat[:, hot]] * of_weight], 1)
    right = torch.cat(
        [weight, *[weight[:, hot]] * of_input, *[lost_of_weight[:, hot]] * of_weight], 1
    )
    left, right = current(left), current(right)
    assert torch.equal(left[:, :24], current(flat))  # the further columns change no code
    assert torch.equal(output, F.linear(left, right))
    grad_product, grad_weight = (upstream @ right), upstream.t() @ left
    total, total_of_weight = grad_product[:, :24].clone(), grad_weight[:, :24].clone()
    if of_input:
        total_of_weight[:, hot] += grad_weight[:, 24:27]
    if of_weight:
        total[:, hot] += grad_product[:, -3:]
    product.backward(total)
    torch.testing.assert_close(down.weight.grad, total_of_weight, rtol=1e-6, atol=1e-6)
    for part in ("gate", "up"):
        mine, theirs = (m.get_submodule(part).weight.grad for m in (model, plain))
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "recipe",
    [
        Float8CurrentScaling(),
        RowwiseScaling(),
        MXFP8BlockScaling(),
        Float8BlockScaling(),
        NVFP4BlockScaling(disable_stochastic_rounding=True),
    ],
    ids=lambda recipe: type(recipe).__name__,
)
def test_the_patch_of_all_channels_leaves_errors_of_second_order(recipe: Recipe) -> None:
    model = GatedFeedForward(16, 24)
    expected, x = copy.deepcopy(model), torch.randn(33, 16)
    plain = copy.deepcopy(model)
    for one in (model, plain):
        fp8lab.convert(one, recipe, include=["down"])
    HotChannelPatch(channels=24).apply(model)
    with torch.no_grad():
        wanted = expected(x)
        errors = [relative(one(x), wanted) for one in (plain, model)]
    four_bits = isinstance(recipe, NVFP4BlockScaling)
    assert errors[1] < errors[0] / (3 if four_bits else 8)
    how = model.down.cast_in_force("input", model.product(x))
    alone = plain.down.cast_in_force("input", plain.product(x))
    assert torch.equal(how.fake_quantized()[:, :24], alone.fake_quantized())


@pytest.mark.parametrize("operands", ["input", "weight"])
def test_a_residual_of_other_codes_is_left_out_of_the_gradient(operands: Any) -> None:
    """MX casts anew for the backward GEMMs: there the patched layer is the plain one."""
    model = feed_forward()
    fp8lab.convert(model, MXFP8BlockScaling(), include=["down"])
    plain, x, upstream = copy.deepcopy(model), torch.randn(64, 16), torch.randn(64, 16)
    HotChannelPatch(operands=operands).apply(model)
    for one in (model, plain):
        one(x).backward(upstream)
    same = {"input": ("down",), "weight": ("gate", "up")}[operands]
    for part in same:
        mine, theirs = (m.get_submodule(part).weight.grad for m in (model, plain))
        assert relative(mine, theirs) <= 1e-6, part


@pytest.mark.parametrize("recipe", [MXFP8BlockScaling(), Float8BlockScaling()])
def test_residuals_have_blocks_of_their_own(recipe: Recipe) -> None:
    model = feed_forward()
    fp8lab.convert(model, recipe, include=["down"])
    plain, x = copy.deepcopy(model), torch.randn(9, 16)
    HotChannelPatch(channels=5).apply(model)
    product = plain.product(x).detach()
    cast = model.down.cast_in_force("input", product).fake_quantized()
    hot = model.down.rewrite._hot
    lost = product - plain.down.cast_in_force("input", product).fake_quantized()
    alone = plain.down.cast_in_force("input", lost[:, hot]).fake_quantized()
    assert torch.equal(cast[:, 128:133], alone)


def test_persistent_channels_are_those_of_the_running_average() -> None:
    model = feed_forward(spread=1.0)
    mitigation = HotChannelPatch(channels=2, score="amax", timing="persistent", memory=0.5)
    down: Any = on_down(model, mitigation)
    rewrite: Any = down.rewrite
    average = torch.zeros(24)
    for _ in range(4):
        x = torch.randn(5, 16)
        product = model.product(x).detach()
        scores = product.abs().amax(dim=0)
        chosen = average if average.any() else scores
        model(x)
        assert sorted(chosen.topk(2).indices.tolist()) == rewrite._hot.tolist()
        average = average.lerp(scores, 0.5)
        torch.testing.assert_close(down.patch_average, average)
        average = down.patch_average.clone()  # to the last bit
        with torch.no_grad():
            model(100 * x)
        assert torch.equal(down.patch_average, average)


# --- what models meet ---------------------------------------------------------------------------


@every
@pytest.mark.parametrize(
    "recipe",
    [Float8CurrentScaling(), DelayedScaling(), MXFP8BlockScaling()],
    ids=lambda r: type(r).__name__,
)
def test_no_tokens_a_dead_channel_and_what_is_not_finite(name: str, recipe: Recipe) -> None:
    model = feed_forward()
    with torch.no_grad():
        model.up.weight[7] = 0.0
    fp8lab.convert(model, recipe)
    MITIGATIONS[name].apply(model)
    for tokens in (3, 0, 4):
        model.zero_grad()
        output = model(torch.randn(2, tokens, 16))
        output.sum().backward()
        assert output.shape == (2, tokens, 16)
        assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    output = model(torch.zeros(2, 3, 16))
    assert not output.any()
    for bad in (torch.nan, torch.inf):
        x = torch.randn(2, 3, 16)
        x[1, 2, 4] = bad
        output = model(x)
        assert output[0].isfinite().all() and output[1, :2].isfinite().all()


@pytest.mark.long
@every
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(name: str, reentrant: bool) -> None:
    alone = LanguageModel(ModelConfig(dim=16, layers=2, heads=2, context=16, hidden=24), seed=0)
    fp8lab.convert(alone, DelayedScaling(amax_history_len=2), exclude=["head"])
    MITIGATIONS[name].apply(alone)
    other = copy.deepcopy(alone)
    for layer in other.layers:
        layer.forward = _checkpointed(layer.forward, reentrant)
    for step in range(3):
        for model in (alone, other):
            torch.manual_seed(step)
            tokens = torch.randint(0, 256, (2, 9))
            model.zero_grad()
            with fp8lab.autocast():
                model.loss(tokens).backward()
        assert_equal(gradients(other), gradients(alone))
        assert_equal(other.state_dict(), alone.state_dict())
        for model in (alone, other):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
    # The region closed before the backward: the repeated forward has the scales of the first.
    for model in (alone, other):
        model.zero_grad()
        torch.manual_seed(9)
        model.loss(torch.randint(0, 256, (2, 9))).backward()
    assert_equal(gradients(other), gradients(alone))


@pytest.mark.parametrize("name", ["paper, linear", "token", "reference code", "FOG"])
@pytest.mark.parametrize("tokens", [(8, 8), (8, 5)])
def test_down_repeated_without_its_branch_is_refused(name: str, tokens: tuple[int, int]) -> None:
    """Activation checkpointing that keeps gate and up: their maxima are of the last micro-batch."""
    model: Any = feed_forward()
    on_down(model, MITIGATIONS[name])
    alone = copy.deepcopy(model)

    def tail(gate: Tensor, up: Tensor) -> Tensor:
        output: Tensor = model.down(F.silu(gate) * up)
        return output

    batches = [torch.randn(n, 16) for n in tokens]
    outputs = [
        checkpoint(tail, model.gate(x), model.up(x), use_reentrant=False).sum() for x in batches
    ]
    if name != "token":
        with pytest.raises(RuntimeError, match=r"down ran before its .* branch, expected that fir"):
            torch.stack(outputs).sum().backward()
        return
    torch.stack(outputs).sum().backward()
    torch.stack([alone(x).sum() for x in batches]).sum().backward()
    assert_equal(gradients(model), gradients(alone))


def test_a_gradient_of_another_forward_costs_its_part_of_a_row_alone(tmp_path: Path) -> None:
    model = nn.Sequential(feed_forward())
    fp8lab.convert(model, Float8CurrentScaling(), accumulation=Accumulation(promote_every=32))
    SmoothSwiGLU.reference_code().apply(model)
    select = fp8lab.Selection(
        tensors=("grad_output", "grad_weight"), layers=("*.down",), statistics=("mse",)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with fp8lab.watch(
        model, tmp_path / "run", optimizer=optimizer, every=1, select=select
    ) as watching:
        for step, lengths in enumerate([(6, 9), (6,), (6,)]):
            optimizer.zero_grad()
            loss = torch.stack([model(torch.randn(4, n, 16)).sum() for n in lengths]).sum()
            loss.backward()
            optimizer.step()
            watching.step(step, loss=loss)
    run_of = fp8lab.open_run(tmp_path / "run")
    assert run_of.events().empty
    rows = run_of.tensors()
    for name in ("grad_output", "grad_weight"):
        assert rows[rows["site"] == f"0.down:{name}"]["step"].tolist() == [0, 1, 2]


def _checkpointed(forward: Any, reentrant: bool) -> Any:
    return lambda *args: checkpoint(forward, *args, use_reentrant=reentrant)


@every
def test_a_state_dict_carries_it_on(name: str) -> None:
    def build() -> nn.Module:
        torch.manual_seed(1)
        model = feed_forward()
        fp8lab.convert(model, DelayedScaling(amax_history_len=2))
        return MITIGATIONS[name].apply(model)

    model, other = build(), build()
    for step in range(3):
        model(torch.randn(2, 5, 16) * (step + 1)).sum().backward()
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 5, 16)
    for one in (model, other):
        one.zero_grad()
        output = one(x)
        output.sum().backward()
    assert torch.equal(model(x), other(x))
    assert_equal(gradients(other), gradients(model))
    assert_equal(other.state_dict(), model.state_dict())
    model.bfloat16().float()
    own = ("smooth_scale", "patch_average")
    kept = {k: v for k, v in other.state_dict().items() if k.endswith(own)}
    assert len(kept) == (name in DELAYED or "persistent" in name)
    assert_equal({k: model.state_dict()[k] for k in kept}, kept)
    # A checkpoint from before the mitigation: its state starts afresh.
    plain = feed_forward()
    fp8lab.convert(plain, DelayedScaling(amax_history_len=2))
    model.load_state_dict(plain.state_dict())
    fresh = {k: v for k, v in build().state_dict().items() if k.endswith(own)}
    assert_equal({k: model.state_dict()[k] for k in fresh}, fresh)


@every
def test_copies_of_value_and_model(name: str) -> None:
    mitigation = MITIGATIONS[name]
    assert pickle.loads(pickle.dumps(mitigation)) == copy.deepcopy(mitigation) == mitigation
    model = feed_forward()
    fp8lab.convert(model, DelayedScaling(amax_history_len=2))
    mitigation.apply(model)
    x = torch.randn(2, 5, 16)
    kept = model(x)  # with a graph, while copies are made
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    assert kept.requires_grad
    model(x).sum().backward()
    for other in copies:
        assert other.down.rewrite is not model.down.rewrite or name == "Hadamard"
        other(x).sum().backward()
        assert_equal(gradients(other), gradients(model))
        assert_equal(other.state_dict(), model.state_dict())


# --- families and watching ----------------------------------------------------------------------

CALLED = ["llama", "gemma2", "phi3", "torchtitan", "litgpt"]


@pytest.mark.long
@every
@pytest.mark.parametrize("family", [n for n in CALLED if n in FAMILIES])
def test_families_with_a_down_that_is_called(family: str, name: str) -> None:
    model = FAMILIES[family].build()
    expected = run(model).detach()
    before = [(site.name, site.activation) for site in fp8lab.find_gates(model)]
    downs = [site.down.module for site in fp8lab.find_gates(model)]
    inside = [n for n, module in model.named_modules() if any(module is down for down in downs)]
    fp8lab.convert(model, Float8CurrentScaling(), include=inside)
    MITIGATIONS[name].apply(model)
    assert [(site.name, site.activation) for site in fp8lab.find_gates(model)] == before
    for down in downs:
        wide(down)
    for _ in range(2):
        loss = run(model)
        loss.backward()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["mixtral eager", "gpt_oss grouped_mm", "torchtitan, experts"])
@pytest.mark.parametrize("name", ["paper", "reference code", "Hadamard", "hot channels"])
def test_experts_that_compute_inside_are_refused(family: str, name: str) -> None:
    model = FAMILIES[family].build()
    with pytest.raises(ValueError, match=r"computes with down's weight itself, no layer does"):
        MITIGATIONS[name].apply(model)


@pytest.mark.parametrize("name", ["paper, linear", "FOG"])
def test_a_branch_that_no_layer_is_called_for_is_refused(name: str) -> None:
    class Uncalled(foreign.Torchtitan):
        def forward(self, x: Tensor) -> Tensor:
            return self.w2(F.silu(F.linear(x, self.w1.weight)) * F.linear(x, self.w3.weight))

    model = Uncalled()
    fp8lab.convert(model, Float8CurrentScaling(), include=["w2"])
    with pytest.raises(ValueError, match=r"SmoothSwiGLU: \. does not call its (linear|gate) proj"):
        MITIGATIONS[name].apply(model)
    SmoothSwiGLU().apply(model)
    model(torch.randn(3, 16))


@every
@pytest.mark.parametrize(
    "recipe", [DelayedScaling(), MXFP8BlockScaling()], ids=lambda r: type(r).__name__
)
def test_what_is_recorded_is_what_is_cast(
    name: str, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LanguageModel(ModelConfig(dim=16, layers=1, heads=2, context=16, hidden=24), seed=0)
    fp8lab.convert(model, recipe, exclude=["head"])
    MITIGATIONS[name].apply(model)
    down = model.layers[0].mlp.down
    used: dict[str, Tensor] = {}
    quantized = Fp8Linear.quantized

    def spied(self: Fp8Linear, how: Any, operand: Any, counts: bool) -> Tensor:
        if self is down:
            used.setdefault(operand, how.tensor.detach().clone())
        return quantized(self, how, operand, counts)

    monkeypatch.setattr(Fp8Linear, "quantized", spied)
    seen: dict[str, Tensor] = {}
    asked = Fp8Linear.cast_in_force

    def told(self: Fp8Linear, operand: Any, tensor: Tensor, gemm: Any = None) -> Any:
        how = asked(self, operand, tensor, gemm)
        if self is down:
            seen.setdefault(operand, how.tensor.detach().clone())
        return how

    monkeypatch.setattr(Fp8Linear, "cast_in_force", told)
    select = fp8lab.Selection(
        tensors=("input", "weight", "grad_output"), layers=("*.down",), statistics=("mse",)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with fp8lab.watch(
        model, tmp_path / "run", optimizer=optimizer, every=1, select=select
    ) as watching:
        for step in range(3):
            used.clear()
            seen.clear()
            optimizer.zero_grad()
            loss = model.loss(torch.randint(0, 256, (2, 9)))
            loss.backward()
            optimizer.step()
            watching.step(step, loss=loss)
            assert used.keys() == seen.keys() == {"input", "weight", "grad_output"}
            for operand, tensor in used.items():
                assert torch.equal(tensor, seen[operand]), operand
    told_of = fp8lab.open_run(tmp_path / "run")
    assert told_of.events().empty
    rows = told_of.tensors()
    product = rows[rows["site"] == "layers.0.mlp:product"]
    assert product["sqnr_db"].notna().all()
    assert told_of.info["config"] == {}


@pytest.mark.parametrize("name", ["paper", "token", "reference code"])
def test_errors_are_those_of_the_product_before(name: str, tmp_path: Path) -> None:
    model = feed_forward()
    on_down(model, MITIGATIONS[name])
    x = torch.randn(9, 16)
    with torch.no_grad():
        how = model.down.cast_in_force("input", model.product(x))
        before = model.product(x).double()
    assert how.channel_scale is not None
    after = how.fake_quantized().double() / how.channel_scale.double()
    expected = float(10 * torch.log10(before.square().sum() / (after - before).square().sum()))
    with fp8lab.watch(model, tmp_path / "run", every=1) as watching:
        loss = model(x).sum()
        loss.backward()
        watching.step(0, loss=loss)
    rows = fp8lab.open_run(tmp_path / "run").tensors()
    row = rows[rows["site"] == ".:product"].iloc[0]
    assert row["sqnr_db"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["paper", "token", "Hadamard", "hot channels"])
def test_a_short_accumulator_is_told_of(name: str) -> None:
    model = feed_forward()
    accumulation = Accumulation(promote_every=32)
    fp8lab.convert(model, Float8CurrentScaling(), include=["down"], accumulation=accumulation)
    MITIGATIONS[name].apply(model)
    x = torch.randn(9, 16)
    model(x)
    product = model.product(x).detach()
    for gemm, tensor in (("output", product), ("grad_input", torch.randn(9, 16))):
        error = model.down.gemm_error(gemm, tensor)
        assert error is not None and error.isfinite().all()


# --- folding ------------------------------------------------------------------------------------


def trained(
    mitigation: SmoothSwiGLU, recipe: Recipe, variant: str = "swiglu", **settings: Any
) -> GatedFeedForward:
    model = GatedFeedForward(16, 24, variant, bias=True)
    fp8lab.convert(model, recipe, **settings)
    mitigation.apply(model)
    for step in range(3):
        model((step + 1) * torch.randn(2, 5, 16)).sum().backward()
    return model.eval()


@pytest.mark.parametrize("name", DELAYED)
@pytest.mark.parametrize(
    ("recipe", "exact"),
    [
        (RowwiseScaling(), True),
        (MXFP8BlockScaling(), True),
        (Float8CurrentScaling(), False),
    ],
    ids=["rows", "MX", "current"],
)
def test_a_folded_model_is_the_unfolded_one(name: str, recipe: Recipe, exact: bool) -> None:
    model = trained(SMOOTH[name], recipe)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = model(x)
        scale = model.down.smooth_scale
        assert len(scale.unique()) > 1
        assert SmoothSwiGLU.fold(model) is model
        folded = model(x)
    assert model.down.rewrite is None
    assert torch.equal(folded, expected) == exact
    assert not model.down._forward_pre_hooks and not model.up._forward_hooks
    HadamardProduct(block=8).apply(model)  # the place is free


def test_with_up_as_it_is_folding_is_exact_under_one_scale_for_the_tensor() -> None:
    model = trained(SMOOTH["paper, delayed"], Float8CurrentScaling(), include=["down"])
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(SmoothSwiGLU.fold(model)(x), expected)


@pytest.mark.parametrize("form", ["tensor", "tuple", "mapping"])
def test_folding_scales_from_batches(form: str) -> None:
    model = trained(SmoothSwiGLU(), Float8CurrentScaling(), include=["down"])
    batches = [torch.randn(2, 5, 16) for _ in range(3)]
    with torch.no_grad():
        product = torch.cat([model.product(x) for x in batches])
        amax = product.abs().amax(dim=(0, 1))
        scale = next_scale(torch.zeros(24), amax)
        assert not torch.equal(scale, power_of_two_scale(amax))  # a quiet one is left as quiet
        up, down, x = model.up.weight.clone(), model.down.weight.clone(), batches[0]
        bias = model.up.bias.clone()
        plain = F.linear(model.product(x), model.down.weight, model.down.bias)
        model.train()
        shaped = [{"tensor": x, "tuple": (x,), "mapping": {"x": x}}[form] for x in batches]
        SmoothSwiGLU.fold(model, shaped)
        assert model.training
        assert torch.equal(model.up.weight, up * scale[:, None])
        assert torch.equal(model.up.bias, bias * scale)
        assert torch.equal(model.down.weight, down / scale)
        wide(model.down)
        assert relative(model(x), plain) <= 1e-6


def test_folding_a_fused_gate_and_up() -> None:
    model = FAMILIES["phi3"].build()
    fp8lab.convert(model, Float8CurrentScaling(), include=["*.down_proj"])
    SmoothSwiGLU(timing="delayed", branch="linear").apply(model)
    for step in range(2):
        run(model, step).backward()
    mlp = model.model.layers[0].mlp
    before, scale = mlp.gate_up_proj.weight.detach().clone(), mlp.down_proj.smooth_scale.clone()
    with torch.no_grad():
        expected = run(model)
        SmoothSwiGLU.fold(model)
        assert torch.equal(run(model), expected)
    assert torch.equal(mlp.gate_up_proj.weight[:48], before[:48])
    assert torch.equal(mlp.gate_up_proj.weight[48:], before[48:] * scale[:, None])


def test_what_cannot_be_folded_is_refused_and_nothing_changed() -> None:
    cases: list[tuple[Any, Any, str]] = [
        (trained(SMOOTH["reference code"], Float8CurrentScaling()), (), "tokens are balanced"),
        (
            trained(SMOOTH["paper, delayed"], Float8CurrentScaling(), "gtu"),
            (),
            r"not linear in up \(sigmoid",
        ),
        (trained(SMOOTH["paper"], Float8CurrentScaling()), (), "expected batches"),
        (feed_forward(), (), "expected a model with Smooth-SwiGLU on it"),
    ]
    tied = nn.Sequential(feed_forward(), feed_forward())
    tied[1].up.weight = tied[0].up.weight
    fp8lab.convert(tied, Float8CurrentScaling())
    SmoothSwiGLU().apply(tied)
    cases.append((tied, [torch.randn(3, 16)], "0: up or down shares its weight"))
    biased = nn.Sequential(*(GatedFeedForward(16, 24, "swiglu", bias=True) for _ in range(2)))
    biased[1].up.bias = biased[0].gate.bias
    fp8lab.convert(biased, Float8CurrentScaling())
    SmoothSwiGLU().apply(biased)
    cases.append((biased, [torch.randn(3, 16)], "1: up or down shares its weight or bias"))
    hooked = trained(SMOOTH["paper, delayed"], Float8CurrentScaling())
    hooked.up.register_forward_hook(lambda module, args, output: output.clamp(max=1.0))
    cases.append((hooked, (), "a hook that may change"))
    for model, batches, reason in cases:
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=rf"^SmoothSwiGLU\.fold.*{reason}"):
            SmoothSwiGLU.fold(model, batches)
        assert_equal(model.state_dict(), before)


# --- several processes --------------------------------------------------------------------------

RANK = """
import sys, torch
import torch.distributed as dist
import fp8lab
from fp8lab.ffn import GatedFeedForward
from fp8lab.mitigations.hot_channel_patch import HotChannelPatch
from fp8lab.mitigations.smooth_swiglu import SmoothSwiGLU
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
torch.manual_seed(0)
whole = GatedFeedForward(16, 24)
with torch.no_grad():
    for parameter in whole.parameters():  # whole numbers: every order of a sum gives the same
        parameter.copy_((parameter * 16).round())
batch, gradient = (torch.randint(-2, 3, (2, 5, 16)).float() for _ in range(2))
wide = fp8lab.HighPrecision(format=fp8lab.formats.FP32)


def of(how):
    way, form = how.split()
    group = dist.group.WORLD if way in ("megatron", "data") else None
    mitigation = {
        "token": SmoothSwiGLU(granularity="token", group=group),
        "reference": SmoothSwiGLU.reference_code(group=group),
        "fog": SmoothSwiGLU.fog_baseline(group=group),
        "channel": SmoothSwiGLU(),
        "delayed": SmoothSwiGLU(timing="delayed", group=group),
    }[form]
    split, x, upstream = way in ("megatron", "alone"), batch, gradient
    model = GatedFeedForward(16, 12 if split else 24)
    half = slice(12 * rank, 12 * rank + 12) if split else slice(None)
    with torch.no_grad():
        model.gate.weight.copy_(whole.gate.weight[half])
        model.up.weight.copy_(whole.up.weight[half])
        model.down.weight.copy_(whole.down.weight[:, half])
    fp8lab.convert(model, fp8lab.Float8CurrentScaling(), include=["down"])
    mitigation.apply(model)
    model.down.recipes = dict.fromkeys(model.down.recipes, wide)
    if way == "dtensor":
        plan = {"gate": ColwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    if way == "data":
        x, upstream = x[rank], upstream[rank]
    output = model(x)
    output.backward(upstream)
    result = output.detach().clone()
    if split:
        dist.all_reduce(result)
    scale, grad = model.down.rewrite._last, model.down.weight.grad
    if way == "dtensor":
        scale, grad = (t.full_tensor() if hasattr(t, "full_tensor") else t for t in (scale, grad))
    state = model.down.smooth_scale if form == "delayed" else None
    return {"output": result, "scale": scale, "grad": grad, "state": state}


def of_ddp(mitigation, recipe):
    # Scales after a step of two micro-batches, rank 1's first the largest, and all ranks' amaxes.
    torch.manual_seed(0)
    model = torch.nn.Sequential(GatedFeedForward(16, 24))
    fp8lab.convert(model, recipe)
    if mitigation is not None:
        mitigation.apply(model)
    down, products, gradients = model[0].down, [], []
    down.register_forward_pre_hook(lambda m, given: products.append(given[0].detach().abs()))
    down.register_full_backward_hook(lambda m, _, given: gradients.append(given[0].abs()))
    ddp = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=True)
    torch.manual_seed(1)
    for _ in range(2):
        products.clear()
        gradients.clear()
        with fp8lab.autocast():
            for factor in (8.0 ** rank, 1.0):
                ddp(torch.randn(5, 16) * factor).square().sum().backward()
    amax = torch.stack(products).amax(dim=(0, 1)), torch.stack(gradients).amax()
    for one in amax:
        dist.all_reduce(one, op=dist.ReduceOp.MAX)
    buffers = {name: buffer.clone() for name, buffer in down.named_buffers()}
    return {"product": amax[0], "gradient": amax[1], **buffers}


left = {how: of(how) for how in sys.argv[3].split(", ")}
left["DDP"] = of_ddp(None, fp8lab.DelayedScaling(amax_history_len=1))
shared = SmoothSwiGLU(timing="delayed", group=dist.group.WORLD)
left["DDP, delayed"] = of_ddp(shared, fp8lab.Float8CurrentScaling())
patch = HotChannelPatch(channels=2, score="amax", timing="persistent", memory=0.0)
left["DDP, persistent"] = of_ddp(patch, fp8lab.Float8CurrentScaling())
torch.save(left, f"{folder}/left-{rank}")
dist.destroy_process_group()
"""
PARALLEL = ["megatron token", "megatron reference", "megatron fog"]
PARALLEL += ["dtensor token", "dtensor reference", "dtensor channel"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """What each of two processes had."""
    folder = tmp_path_factory.mktemp("ranks")
    hows = ", ".join([*PARALLEL, "alone token", "data delayed"])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(folder), hows],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    return [torch.load(folder / f"left-{rank}") for rank in range(2)]


def of_one_process() -> tuple[GatedFeedForward, Tensor, Tensor]:
    torch.manual_seed(0)
    model = GatedFeedForward(16, 24)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * 16).round())
    x, upstream = (torch.randint(-2, 3, (2, 5, 16)).float() for _ in range(2))
    return model, x, upstream


@pytest.mark.long
@pytest.mark.parametrize("how", PARALLEL)
def test_two_tensor_parallel_processes_are_one(how: str, ranks: list[Any]) -> None:
    model, x, upstream = of_one_process()
    way, form = how.split()
    forms = {"token": "token", "reference": "reference code", "fog": "FOG", "channel": "paper"}
    down = on_down(model, SMOOTH[forms[form]])
    wide(down)
    output = model(x)
    output.backward(upstream)
    rewrite: Any = down.rewrite
    for rank, had in enumerate(ranks):
        part = had[how]
        assert torch.equal(part["scale"], rewrite._last)
        assert relative(part["output"], output.detach()) <= 1e-6
        mine = slice(None) if way == "dtensor" else slice(12 * rank, 12 * rank + 12)
        assert relative(part["grad"], down.weight.grad[:, mine]) <= 1e-6


def test_without_the_group_tensor_parallel_scales_differ(ranks: list[Any]) -> None:
    assert not torch.equal(*(had["alone token"]["scale"] for had in ranks))


def test_two_data_parallel_processes_share_delayed_scales(ranks: list[Any]) -> None:
    model, x, _ = of_one_process()
    down: Any = on_down(model, SMOOTH["paper, delayed"])
    model(x)
    for had in ranks:
        assert torch.equal(had["data delayed"]["state"], down.smooth_scale)


def test_buffers_that_ddp_broadcasts_are_not_what_a_step_collects(ranks: list[Any]) -> None:
    """Each forward of DistributedDataParallel gives all ranks the buffers of rank 0."""
    for had in ranks:
        plain, smooth = had["DDP"], had["DDP, delayed"]
        expected = torch.stack([plain["product"].amax(), plain["gradient"]])
        assert torch.equal(plain["scale"][[0, 2]], torch.tensor([448.0, 57344.0]) / expected)
        assert ((smooth["product"] * smooth["smooth_scale"]).amax() > 0.5).all()
        assert ((smooth["product"] * smooth["smooth_scale"]) <= 1.0).all()
    assert ranks[0]["DDP"]["product"].amax() > 2.0
    assert not torch.equal(*(had["DDP, persistent"]["patch_average"] for had in ranks))


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"granularity": "tokens"}, "granularity='tokens', expected one of"),
        ({"branch": "up"}, "branch='up', expected one of"),
        ({"timing": "late"}, "timing='late', expected one of"),
        ({"detach": "no"}, "detach='no', expected one of"),
        ({"power_of_two": 2}, "power_of_two=2, expected one of"),
        ({"granularity": "token", "timing": "delayed"}, "timing='delayed' with granularity"),
        ({"branch": "gate"}, "branch='gate' with granularity='channel'"),
        ({"detach": False}, "detach=False with power_of_two=True"),
        (
            {"detach": False, "power_of_two": False, "timing": "delayed"},
            "detach=False with timing='delayed'",
        ),
        ({"detach": False, "power_of_two": False, "group": 1}, "detach=False with a group"),
    ],
)
def test_smooth_swiglu_is_valid_at_birth(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=rf"^SmoothSwiGLU: {reason}"):
        SmoothSwiGLU(**fields)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: HadamardProduct(block=12), "HadamardProduct: block=12, expected a power of two"),
        (lambda: HadamardProduct(block=1), "HadamardProduct: block=1, expected a power of two"),
        (lambda: HadamardProduct(seed=-1), "HadamardProduct: seed=-1, expected a whole number"),
        (lambda: HotChannelPatch(channels=0), "HotChannelPatch: channels=0, expected a whole"),
        (lambda: HotChannelPatch(score="l2"), "HotChannelPatch: score='l2', expected one of"),
        (lambda: HotChannelPatch(memory=1.0), "HotChannelPatch: memory=1.0, expected 0 to below"),
        (lambda: HighPrecisionOperands(where="*:input"), r"where='\*:input', expected a tuple"),
        (lambda: HighPrecisionOperands(where=("*:in",)), "operand 'in', expected"),
        (lambda: HighPrecisionOperands(where=("*",), format=formats.E4M3), "format=E4M3"),
    ],
)
def test_the_others_are_valid_at_birth(make: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make()


@pytest.mark.parametrize(
    ("mitigation", "recipe", "reason"),
    [
        (HadamardProduct(), Float8CurrentScaling(), "is 24 channels wide, expected a multiple of"),
        (HadamardProduct(block=8), HighPrecision(), "the product of . is not FP8"),
        (HotChannelPatch(), HighPrecision(), "the product of . is not FP8"),
        (HotChannelPatch(channels=25), Float8CurrentScaling(), "has 24 channels, expected 25"),
        (HotChannelPatch(), BitNetScaling(), "is cast by BitNetScaling, which has no zero"),
        (SmoothSwiGLU.reference_code(), HighPrecision(), "the product of . is not FP8"),
    ],
)
def test_what_cannot_be_rewritten_is_refused(mitigation: Any, recipe: Any, reason: str) -> None:
    model = feed_forward()
    fp8lab.convert(model, recipe)
    before = dict(model.down.recipes)
    with pytest.raises(ValueError, match=rf"^{type(mitigation).__name__}: .*{reason}"):
        mitigation.apply(model)
    assert model.down.rewrite is None and model.down.recipes == before


@every
def test_one_rewriting_a_layer(name: str) -> None:
    model = feed_forward()
    on_down(model, MITIGATIONS[name])
    before = model.down.rewrite
    MITIGATIONS[name].apply(model)  # the same one: it is there
    assert model.down.rewrite is before
    for other in (SmoothSwiGLU(granularity="token", branch="linear"), HadamardProduct(block=4)):
        with pytest.raises(ValueError, match=r"\. is rewritten already: .*; one rewriting a layer"):
            other.apply(model)
    assert model.down.rewrite is before


def test_a_delayed_scale_of_the_turned_weight_is_made_just_in_time() -> None:
    model = feed_forward()
    fp8lab.convert(model, DelayedScaling())
    HadamardProduct(block=8).apply(model)
    assert model.down.recipes["weight"] == Float8CurrentScaling()


def test_down_alone_has_no_branch_to_go_by() -> None:
    model = feed_forward()
    on_down(model, SMOOTH["reference code"])
    down = copy.deepcopy(model).down
    with pytest.raises(RuntimeError, match="down ran before its linear branch"):
        down(torch.randn(3, 24))


# --- any operand in high precision --------------------------------------------------------------


def test_operands_in_high_precision_are_those_that_are_named() -> None:
    model = feed_forward()
    fp8lab.convert(
        model, DelayedScaling(), overrides={"down:input@grad_weight": Float8CurrentScaling()}
    )
    where = ("*up:grad_output", "down:input", "gate:weight@grad_input")
    assert HighPrecisionOperands(where=where).apply(model) is model
    bf16 = HighPrecision()
    assert model.up.recipes == {
        "input": DelayedScaling(),
        "weight": DelayedScaling(),
        "grad_output": bf16,
    }
    assert model.down.recipes["input"] == bf16 and model.down.gemm_recipes == {}
    assert model.gate.gemm_recipes == {("weight", "grad_input"): bf16}
    assert model.gate.recipes["weight"] == DelayedScaling()
    model(torch.randn(3, 16)).sum().backward()
    with pytest.raises(ValueError, match="'attention:input' names no converted layer"):
        HighPrecisionOperands(where=("attention:input",)).apply(model)
