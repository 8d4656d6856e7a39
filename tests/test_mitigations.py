"""Each mitigation against the formula in its docstring, worked out by hand and equal to the bit.

The reference casts with torch's own float8 types between float32 products and multiplies with
torch's GEMMs in the layer's order of operands; it knows no Fp8Linear. Only the down projection is
converted in these references, so that gate and up are plain torch.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fp8lab
from fp8lab import formats, mitigations
from fp8lab.ffn import FeedForward, GatedFeedForward
from fp8lab.lab.model import LanguageModel, ModelConfig
from fp8lab.linear import Fp8Linear
from fp8lab.mitigations import AntiWindup, ClampedSwiGLU, HighPrecisionProduct, SmoothSwiGLU
from fp8lab.mitigations.hadamard_product import HadamardProduct, Turned
from fp8lab.mitigations.hot_channel_patch import HotChannelPatch, Patched
from fp8lab.mitigations.smooth_swiglu import ChannelsBalanced, power_of_two_scale
from fp8lab.recipe import (
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

EACH: list[Any] = [AntiWindup(), ClampedSwiGLU(), HighPrecisionProduct(), SmoothSwiGLU()]
EACH += [HadamardProduct(), HotChannelPatch()]
FP32 = HighPrecision(format=formats.FP32)
E4M3, E5M2 = (torch.float8_e4m3fn, 448.0), (torch.float8_e5m2, 57344.0)


def cast(tensor: Tensor, scale: float | Tensor, fmt: tuple[torch.dtype, float] = E4M3) -> Tensor:
    """TE's cast and its inverse, with torch's own rounding."""
    dtype, largest = fmt
    scale = torch.as_tensor(scale, dtype=torch.float32)
    return (tensor * scale).clamp(-largest, largest).to(dtype).float() * (1.0 / scale)


def current(tensor: Tensor, fmt: tuple[torch.dtype, float] = E4M3) -> Tensor:
    return cast(tensor, torch.div(torch.tensor(fmt[1]), tensor.abs().max()), fmt)


def feed_forward(variant: str = "swiglu", *, spread: float = 1.0) -> GatedFeedForward:
    """dim 16, hidden 24; one channel of the product is `spread` times larger."""
    model = GatedFeedForward(16, 24, variant)
    with torch.no_grad():
        model.up.weight[5] *= spread
    return model


def down_converted(model: nn.Module, **overrides: Recipe) -> Fp8Linear:
    plan = {f"*down:{operand}": recipe for operand, recipe in overrides.items()}
    fp8lab.convert(model, DelayedScaling(amax_history_len=4), include=["*down"], overrides=plan)
    return model.get_submodule("down")


def batch() -> tuple[Tensor, Tensor]:
    return 3.0 * torch.randn(2, 5, 16), torch.randn(2, 5, 16)


def product_of(model: GatedFeedForward, x: Tensor) -> Tensor:
    return F.silu(F.linear(x, model.gate.weight)) * F.linear(x, model.up.weight)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


# --- all --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mitigation", EACH, ids=lambda m: type(m).__name__)
def test_a_mitigation_is_a_frozen_value_that_says_what_it_is(mitigation: Any) -> None:
    assert mitigation == type(mitigation)()
    assert pickle.loads(pickle.dumps(mitigation)) == mitigation
    assert mitigation.kind in ("model", "optimizer", "loss", "recipe", "architecture")
    assert isinstance(mitigation.changes_function, bool)
    assert isinstance(mitigation.foldable, bool)
    assert mitigation.cost and mitigation.source
    with pytest.raises(AttributeError):
        mitigation.limit = 3.0


@pytest.mark.parametrize("mitigation", EACH, ids=lambda m: type(m).__name__)
def test_a_model_without_a_gate_is_refused(mitigation: Any) -> None:
    with pytest.raises(ValueError, match="no gated feed-forward"):
        mitigation.apply(FeedForward(16, 24))


@pytest.mark.parametrize(
    "mitigation",
    [AntiWindup(), HighPrecisionProduct(), SmoothSwiGLU(), HadamardProduct(), HotChannelPatch()],
    ids=lambda m: type(m).__name__,
)
def test_an_unconverted_model_is_refused(mitigation: Any) -> None:
    name = type(mitigation).__name__
    with pytest.raises(ValueError, match=rf"^{name}: \.: down is not converted, expected convert"):
        mitigation.apply(feed_forward())


def two_layers(recipe: Recipe, *, product_of_the_last: Recipe | None = None) -> LanguageModel:
    model = LanguageModel(ModelConfig(dim=16, layers=2, heads=2, context=16), seed=0)
    overrides = {"layers.1.mlp.down:input": product_of_the_last} if product_of_the_last else {}
    fp8lab.convert(model, recipe, exclude=["head"], overrides=overrides)
    return model


@pytest.mark.parametrize(
    ("mitigation", "reason"),
    [
        (AntiWindup(), "AntiWindup: the product of layers.1.mlp is not FP8, nothing saturates"),
        (SmoothSwiGLU(), "SmoothSwiGLU: the product of layers.1.mlp is not FP8"),
    ],
    ids=["AntiWindup", "SmoothSwiGLU"],
)
def test_a_product_in_high_precision_is_refused_and_nothing_changed(
    mitigation: Any, reason: str
) -> None:
    model = two_layers(DelayedScaling(), product_of_the_last=HighPrecision())
    with pytest.raises(ValueError, match=f"^{reason}$"):
        mitigation.apply(model)
    for layer in model.layers:
        assert layer.mlp.down.gradient_of_saturated == "straight_through"
        assert layer.mlp.down.rewrite is None
        assert layer.mlp.down.recipes["weight"] == DelayedScaling()


@pytest.mark.parametrize("mitigation", EACH, ids=lambda m: type(m).__name__)
def test_every_layer_gets_it_and_the_same_model_comes_back(mitigation: Any) -> None:
    model, plain = two_layers(DelayedScaling()), two_layers(DelayedScaling())
    assert mitigation.apply(model) is model
    for layer, before in zip(model.layers, plain.layers, strict=True):
        changed = {
            "AntiWindup": layer.mlp.down.gradient_of_saturated != "straight_through",
            "ClampedSwiGLU": len(layer.mlp.gate._forward_hooks) == 1,
            "HighPrecisionProduct": layer.mlp.down.recipes["input"] == HighPrecision(),
            "SmoothSwiGLU": type(layer.mlp.down.rewrite) is ChannelsBalanced,
            "HadamardProduct": type(layer.mlp.down.rewrite) is Turned,
            "HotChannelPatch": type(layer.mlp.down.rewrite) is Patched,
        }
        assert [name for name, it_is in changed.items() if it_is] == [type(mitigation).__name__]
        assert getattr(layer.mlp.down.rewrite, "mitigation", mitigation) is mitigation
        for name, other in before.named_modules():
            if isinstance(other, Fp8Linear) and not name.endswith("down"):
                assert layer.get_submodule(name).recipes == other.recipes


@pytest.mark.parametrize("mitigation", EACH, ids=lambda m: type(m).__name__)
def test_a_copy_of_the_model_keeps_it(mitigation: Any) -> None:
    model = mitigation.apply(two_layers(DelayedScaling()))
    with torch.no_grad():
        model.layers[0].mlp.up.weight.mul_(200.0)
    tokens = torch.randint(0, 256, (2, 9))
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    model.loss(tokens).backward()
    for twin in copies:
        twin.loss(tokens).backward()
        assert_equal(gradients(twin), gradients(model))


# --- anti-wind-up -----------------------------------------------------------------------------


@pytest.mark.parametrize("applied", [False, True])
def test_anti_windup_stops_the_gradient_of_saturated_elements_alone(applied: bool) -> None:
    model = feed_forward(spread=8.0)
    down = down_converted(model)
    x, upstream = batch()
    plain = copy.deepcopy(model)
    if applied:
        AntiWindup().apply(model)
    stale = 448.0 / 2.0
    down.scale.copy_(torch.tensor([stale, 100.0, 5.0]))
    down.weight.grad = None
    model(x).backward(upstream)

    product = product_of(plain, x)
    flat = product.detach().reshape(-1, 24)
    inputs, weights = cast(flat, stale), cast(plain.down.weight.detach(), 100.0)
    gradient = cast(upstream.reshape(-1, 16), 5.0, E5M2)
    passed = gradient @ weights
    saturated = flat.abs() * stale > 448.0
    assert 0.02 < saturated.float().mean() < 0.5
    if applied:
        passed = torch.where(saturated, 0.0, passed)
    product.backward(passed.view_as(product))
    expected = {
        "gate.weight": plain.gate.weight.grad,
        "up.weight": plain.up.weight.grad,
        "down.weight": gradient.t() @ inputs,
    }
    assert_equal(gradients(model), expected)


def test_anti_windup_leaves_the_forward_alone() -> None:
    model = feed_forward(spread=8.0)
    down_converted(model).scale[0] = 200.0
    with torch.no_grad():
        before = model(batch()[0].fill_(2.0))
        after = AntiWindup().apply(model)(batch()[0].fill_(2.0))
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("recipe", "saturates"),
    [
        (DelayedScaling(), True),
        (NVFP4BlockScaling(), True),
        (MXFP8BlockScaling(scale_rounding="ocp_floor"), True),
        (MXFP8BlockScaling(scale_rounding="even"), True),
        (MXFP8BlockScaling(scale_rounding="ceil"), False),
        (MXFP8BlockScaling(), False),
        (Float8CurrentScaling(), False),
        (Float8CurrentScaling(use_power_2_scales=True), False),
        (RowwiseScaling(), False),
        (RowwiseScaling(round_scales_to_power_of_2=False), False),
        (Float8BlockScaling(), False),
        (BitNetScaling(), False),
    ],
    ids=str,
)
def test_anti_windup_is_refused_where_nothing_saturates(recipe: Recipe, saturates: bool) -> None:
    model = feed_forward()
    down = down_converted(model, input=recipe)
    torch.manual_seed(0)
    products = torch.randn(200, 64, 24).mul_(2.0 ** torch.arange(200)[:, None, None].sub(100) / 8)
    found = [down.cast_in_force("input", one).saturated().any().item() for one in products]
    assert any(found) == saturates
    if saturates:
        AntiWindup().apply(model)
        return
    with pytest.raises(ValueError, match=r"of \. is scaled just in time \(.*\), nothing saturates"):
        AntiWindup().apply(model)
    assert down.gradient_of_saturated == "straight_through"


# --- what one GEMM takes ----------------------------------------------------------------------


@pytest.mark.parametrize("gemm", ["output", "grad_weight"])
def test_high_precision_product_holds_in_both_gemms(gemm: str) -> None:
    model = feed_forward()
    overrides = {f"down:input@{gemm}": RowwiseScaling()}
    fp8lab.convert(model, Float8CurrentScaling(), overrides=overrides)
    HighPrecisionProduct().apply(model)
    said = model.down.precision()
    assert {said["input@output"], said["input@grad_weight"]} == {"BF16 HighPrecision"}


@pytest.mark.parametrize(
    "mitigation",
    [AntiWindup(), SmoothSwiGLU(), HadamardProduct(block=8), HotChannelPatch(channels=4)],
    ids=lambda m: type(m).__name__,
)
def test_what_the_output_takes_decides(mitigation: Any) -> None:
    """Not what the operand's recipe says, which one GEMM may not follow; and in either order."""
    bf16, delayed = HighPrecision(), DelayedScaling()
    model = feed_forward()
    fp8lab.convert(model, delayed, overrides={"down:input@output": bf16})
    with pytest.raises(ValueError, match=r"the product of \. is not FP8"):
        mitigation.apply(model)
    model = mitigation.apply(down_converted_model(feed_forward()))
    before = copy.deepcopy(model.down.recipes)
    with pytest.raises(ValueError, match=r"^HighPrecisionProduct: \.: .*, expected neither$"):
        HighPrecisionProduct().apply(model)
    assert model.down.recipes == before


def test_the_weight_is_scaled_just_in_time_in_both_gemms() -> None:
    delayed = DelayedScaling()
    model = feed_forward()
    fp8lab.convert(model, delayed, overrides={"down:weight@output": delayed})
    said = SmoothSwiGLU().apply(model).down.precision()
    assert said["weight@output"] == said["weight@grad_input"] == "E4M3 Float8CurrentScaling"


# --- the product in high precision ------------------------------------------------------------


def test_high_precision_product_rounds_the_product_to_bf16_and_nothing_else_changes() -> None:
    model = feed_forward(spread=100.0)
    down = HighPrecisionProduct().apply(down_converted_model(model)).down
    x, upstream = batch()
    plain = copy.deepcopy(model)
    down.scale.copy_(torch.tensor([1e6, 100.0, 5.0]))  # the product's own would clip everything
    output = model(x)
    output.backward(upstream)

    product = product_of(plain, x)
    inputs = product.detach().reshape(-1, 24).bfloat16().float()
    weights = cast(plain.down.weight.detach(), 100.0)
    gradient = cast(upstream.reshape(-1, 16), 5.0, E5M2)
    assert torch.equal(output, F.linear(inputs, weights).view(2, 5, 16))
    product.backward((gradient @ weights).view_as(product))
    expected = {
        "gate.weight": plain.gate.weight.grad,
        "up.weight": plain.up.weight.grad,
        "down.weight": gradient.t() @ inputs,
    }
    assert_equal(gradients(model), expected)
    assert down.precision()["input@output"] == "BF16 HighPrecision"


def down_converted_model(model: GatedFeedForward) -> GatedFeedForward:
    down_converted(model)
    return model


# --- clamped SwiGLU ---------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [10.0, 0.75])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clamped_swiglu_is_its_formula(dtype: torch.dtype, limit: float) -> None:
    model = ClampedSwiGLU(limit=limit).apply(feed_forward(spread=20.0).to(dtype))
    plain = copy.deepcopy(model)
    x, upstream = (tensor.to(dtype) for tensor in batch())
    output = model(x)
    output.backward(upstream)

    gate, up = F.linear(x, plain.gate.weight), F.linear(x, plain.up.weight)
    bounded_gate = torch.where(gate > limit, limit, gate)
    bounded_up = torch.where(up > limit, limit, torch.where(up < -limit, -limit, up))
    product = F.silu(bounded_gate) * bounded_up
    expected = F.linear(product, plain.down.weight)
    assert torch.equal(output, expected)
    assert product.abs().max() <= limit**2
    expected.backward(upstream)
    assert_equal(gradients(model), gradients(plain))


def test_no_gradient_passes_where_the_clamp_bites() -> None:
    model = ClampedSwiGLU(limit=2.0).apply(feed_forward())
    with torch.no_grad():
        model.gate.weight[3] = model.up.weight[3] = 10.0
        model.gate.weight[4] = -0.5  # times 16: far below -limit
        model.up.weight[4] = 0.1
    model(torch.ones(1, 16)).sum().backward()
    assert (model.gate.weight.grad[3] == 0).all()
    assert (model.up.weight.grad[3] == 0).all()
    assert (model.gate.weight.grad[4] != 0).all()  # from below the gate is not clamped
    assert (model.up.weight.grad[4] != 0).all()


class Uncalled(GatedFeedForward):
    """Seed 002's way: the projections are never called."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(product_of(self, x), self.down.weight)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: Uncalled(16, 24), r"ClampedSwiGLU: 1 does not call its projections"),
        (lambda: GatedFeedForward(16, 24, "geglu"), "ClampedSwiGLU: 1 has gelu, expected silu"),
        (lambda: GatedFeedForward(16, 24, "gtu"), "ClampedSwiGLU: 1 has tanh, expected silu"),
        (lambda: GatedFeedForward(16, 24, "bilinear"), "1 has identity, expected silu"),
    ],
)
def test_clamped_swiglu_refuses_and_changes_nothing(
    model: Callable[[], nn.Module], reason: str
) -> None:
    both = nn.ModuleList([feed_forward(), model()])
    with pytest.raises(ValueError, match=reason):
        ClampedSwiGLU().apply(both)
    assert not any(module._forward_hooks for module in both.modules())


@pytest.mark.parametrize("limit", [0.0, -1.0, math.inf, math.nan])
def test_clamped_swiglu_is_valid_at_birth(limit: float) -> None:
    with pytest.raises(ValueError, match=r"^ClampedSwiGLU: limit=.*, expected a positive number$"):
        ClampedSwiGLU(limit=limit)


def test_a_clamped_model_is_still_a_swiglu() -> None:
    model = ClampedSwiGLU(limit=0.5).apply(feed_forward())
    (site,) = fp8lab.find_gates(model)
    assert (site.activation, site.up_activation) == ("silu", "identity")


# --- Smooth-SwiGLU ----------------------------------------------------------------------------


def expected_scale(amax: float) -> float:
    """2^-ceil(log2 amax), from the binary expansion of amax."""
    if not 0.0 < amax < math.inf:
        return 1.0
    fraction, exponent = math.frexp(amax)
    return 2.0 ** -max(min(exponent - (fraction == 0.5), 126), -126)


def channel_scale(product: Tensor) -> Tensor:
    """Of [..., channels]."""
    return power_of_two_scale(ChannelsBalanced().maxima(product))


@given(st.lists(st.floats(width=32), min_size=1, max_size=40))
def test_channel_scale_is_its_formula_for_any_amax(amaxes: list[float]) -> None:
    product = torch.tensor([amaxes, [0.0] * len(amaxes)])
    scale = channel_scale(product)
    assert scale.dtype == torch.float32
    assert scale.tolist() == [expected_scale(abs(amax)) for amax in amaxes]


def test_channel_scale_is_an_exact_power_of_two_for_every_exponent() -> None:
    exponents = list(range(-149, 128))
    for mantissa in (1.0, 1.0 + 2.0**-23, 1.5, 2.0 - 2.0**-23):
        amaxes = [math.ldexp(mantissa, e) for e in exponents]
        product = torch.tensor(amaxes, dtype=torch.float32)[None]
        scale = channel_scale(product)
        assert scale.tolist() == [expected_scale(amax) for amax in product[0].tolist()]
        brought_to = (product * scale)[0]
        within = torch.tensor(
            [-126 <= e and math.ldexp(mantissa, e) <= 2.0**126 for e in exponents]
        )
        assert ((brought_to > 0.5) & (brought_to <= 1.0))[within].all()
        assert torch.equal((product * scale / scale)[0][within], product[0][within])


def test_channel_scale_is_per_channel_over_all_tokens() -> None:
    product = torch.randn(3, 4, 24) ** 5 * 2.0 ** torch.arange(-12, 12)
    scaled = (product * channel_scale(product)).abs().amax(dim=(0, 1))
    assert ((scaled > 0.5) & (scaled <= 1.0)).all()
    powers = channel_scale(product).log2()
    assert torch.equal(powers, powers.round())
    assert len(powers.unique()) > 10


def test_a_channel_without_a_scale_keeps_one() -> None:
    product = torch.full((4, 4), 100.0)
    product[:, 0] = 0.0
    product[2, 1], product[2, 2] = math.nan, math.inf
    assert channel_scale(product).tolist() == [1.0, 1.0, 1.0, 2.0**-7]


def test_channel_scale_carries_no_gradient() -> None:
    assert not channel_scale(torch.randn(4, 8, requires_grad=True)).requires_grad


@pytest.mark.parametrize("input_recipe", [Float8CurrentScaling(), DelayedScaling()])
def test_smooth_swiglu_is_its_formula(input_recipe: Recipe) -> None:
    """y = (W_down · diag(1/s)) Q(s ⊙ product), and what autograd makes of it."""
    model = feed_forward(spread=500.0)
    down = down_converted(model, input=input_recipe, weight=FP32, grad_output=FP32)
    SmoothSwiGLU().apply(model)
    x, upstream = batch()
    plain = copy.deepcopy(model)
    if isinstance(input_recipe, DelayedScaling):
        down.scale[0] = 448.0
    output = model(x)
    output.backward(upstream)

    product = product_of(plain, x)
    flat = product.detach().reshape(-1, 24)
    scale = torch.tensor([expected_scale(amax) for amax in flat.abs().amax(dim=0).tolist()])
    smooth = flat * scale
    inputs = cast(smooth, 448.0) if isinstance(input_recipe, DelayedScaling) else current(smooth)
    folded = plain.down.weight.detach() / scale
    assert torch.equal(output, F.linear(inputs, folded).view(2, 5, 16))
    gradient = upstream.reshape(-1, 16)
    product.backward(((gradient @ folded) * scale).view_as(product))
    expected = {
        "gate.weight": plain.gate.weight.grad,
        "up.weight": plain.up.weight.grad,
        "down.weight": (gradient.t() @ inputs) / scale,
    }
    assert_equal(gradients(model), expected)


def test_smooth_swiglu_casts_the_folded_weight_just_in_time() -> None:
    model = feed_forward(spread=500.0)
    down = down_converted(model)
    SmoothSwiGLU().apply(model)
    down.scale[0] = 448.0
    plain = copy.deepcopy(model)
    x, _ = batch()
    output = model(x)
    flat = product_of(plain, x).detach().reshape(-1, 24)
    scale = channel_scale(flat)
    folded = current(plain.down.weight.detach() / scale)
    assert torch.equal(output, F.linear(cast(flat * scale, 448.0), folded).view(2, 5, 16))


def test_smooth_swiglu_changes_no_bit_of_what_fp8_holds_exactly() -> None:
    """Products of four significant bits: smoothed, unsmoothed and unconverted are one function."""
    model = GatedFeedForward(16, 24, "reglu")
    with torch.no_grad():
        model.gate.weight.copy_(torch.eye(24, 16))
        model.up.weight.copy_(torch.eye(24, 16) * 2.0 ** (torch.arange(24) % 8 - 4)[:, None])
    x = torch.randint(0, 3, (7, 16)).float()  # products 0, 1 and 4 times a power of two
    exact = {"input": Float8CurrentScaling(use_power_2_scales=True)}
    converted, smooth = copy.deepcopy(model), copy.deepcopy(model)
    for fp8 in (converted, smooth):
        down_converted(fp8, **exact, weight=FP32, grad_output=FP32)
    SmoothSwiGLU().apply(smooth)
    expected = model(x)
    assert expected.any()
    assert torch.equal(converted(x), expected)
    assert torch.equal(smooth(x), expected)


def test_smooth_swiglu_saves_the_bulk_from_the_outlier() -> None:
    model = feed_forward(spread=2.0**20)
    with torch.no_grad():
        model.down.weight[:, 5] /= 2.0**20
    x, _ = batch()
    expected = model(x).detach()
    operands = {"input": Float8CurrentScaling(), "weight": FP32, "grad_output": FP32}
    plain, smooth = copy.deepcopy(model), copy.deepcopy(model)
    down_converted(plain, **operands)
    down_converted(smooth, **operands)
    SmoothSwiGLU().apply(smooth)
    error = [
        float((fp8(x).detach() - expected).norm() / expected.norm()) for fp8 in (plain, smooth)
    ]
    assert error[0] > 0.1 > 0.04 > error[1]


@pytest.mark.parametrize(
    ("weight", "becomes"),
    [
        (DelayedScaling(), Float8CurrentScaling()),
        (DelayedScaling(fp8_format=Format.E4M3), Float8CurrentScaling(fp8_format=Format.E4M3)),
        (Float8CurrentScaling(use_power_2_scales=True),) * 2,
        (HighPrecision(),) * 2,
    ],
)
def test_smooth_swiglu_scales_the_weight_of_down_just_in_time(
    weight: Recipe, becomes: Recipe
) -> None:
    model = feed_forward()
    down = down_converted(model, weight=weight)
    before = dict(down.recipes)
    SmoothSwiGLU().apply(model)
    assert down.recipes == before | {"weight": becomes}


# --- together ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mitigations",
    [
        [SmoothSwiGLU()],
        [SmoothSwiGLU(), AntiWindup()],
        [ClampedSwiGLU(), SmoothSwiGLU(), AntiWindup()],
        [ClampedSwiGLU(), HighPrecisionProduct()],
    ],
    ids=lambda ms: " and ".join(type(m).__name__ for m in ms),
)
def test_they_compose_and_train_under_delayed_scaling(mitigations: list[Any]) -> None:
    model = two_layers(DelayedScaling(amax_history_len=4))
    for mitigation in mitigations:
        mitigation.apply(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.randint(0, 4, (4, 17))
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = model.loss(tokens)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 5.0
    assert losses[-1] < 2.0
    down = model.layers[0].mlp.down
    if any(isinstance(m, SmoothSwiGLU) for m in mitigations):
        # The smoothed product's amax is in (1/2, 1]: the delayed scale has followed it there.
        assert 448.0 <= float(down.scale[0]) < 896.0


def test_folded_weights_are_cast_by_scales_of_their_own() -> None:
    """A delayed scale is of the weight before: up's rows grew by a factor of 64, and clipped."""
    torch.manual_seed(0)
    model = nn.Sequential(GatedFeedForward(32, 64), GatedFeedForward(32, 64))
    SmoothSwiGLU().apply(fp8lab.convert(model, fp8lab.DelayedScaling()))
    optimizer, x = torch.optim.SGD(model.parameters(), lr=0.05), torch.randn(64, 32)
    for _ in range(20):
        optimizer.zero_grad()
        (model(x) - x).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        before = model.eval()(x)
        after = SmoothSwiGLU.fold(model, [x])(x)
    assert float((after - before).norm() / before.norm()) < 0.03  # 0.011; 0.93 by the old scale


def every_mitigation() -> list[Any]:
    kinds = [getattr(mitigations, name) for name in mitigations.__all__]
    needed: dict[Any, Any] = {mitigations.HighPrecisionOperands: {"where": ("*:input",)}}
    return [kind(**needed.get(kind, {})) for kind in kinds if hasattr(kind, "kind")]


@pytest.mark.parametrize("mitigation", every_mitigation(), ids=lambda one: type(one).__name__)
def test_what_is_of_another_kind_is_refused_in_a_line(mitigation: Any) -> None:
    model = feed_forward()
    optimizer = torch.optim.AdamW(model.parameters())
    expected = {"optimizer": "a torch optimizer", "architecture": "the configuration of the lab's"}
    right = model if mitigation.kind in ("model", "recipe", "loss") else optimizer
    for wrong in (model, optimizer, "model", None, nn.Linear, model.state_dict()):
        if wrong is right and mitigation.kind != "architecture":
            continue
        with pytest.raises(TypeError) as caught:
            mitigation.apply(wrong, *([model] if getattr(mitigation, "needs_model", False) else []))
        said = f": {type(wrong).__name__}, expected {expected.get(mitigation.kind, 'an nn.Module')}"
        assert said in str(caught.value) and "\n" not in str(caught.value)
    if getattr(mitigation, "needs_model", False):
        with pytest.raises(TypeError, match=r"^model: AdamW, expected an nn\.Module$"):
            mitigation.apply(optimizer, optimizer)
