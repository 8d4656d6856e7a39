"""The feed-forward zoo against its definitions: math-module formulas and the published modules."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp8lab.ffn import (
    ACTIVATIONS,
    GLU_VARIANTS,
    WITH_A_NUMBER,
    XIELU,
    FeedForward,
    GatedFeedForward,
    Swish,
    activate,
    llama_hidden,
    matched_hidden,
    powlu,
    situ,
    soft_limit,
    swish,
    xielu,
)
from fp8lab.formats import BF16, E2M1, E4M3, E5M2, E8M0, FP16, FP32, FloatFormat


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


ORACLES: dict[str, Callable[[float], float]] = {
    "identity": lambda x: x,
    "relu": lambda x: max(x, 0.0),
    "relu6": lambda x: min(max(x, 0.0), 6.0),
    "leaky_relu": lambda x: x if x >= 0 else 0.01 * x,
    "sigmoid": sigmoid,
    "tanh": math.tanh,
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: (
        0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "silu": lambda x: x * sigmoid(x),
    "hardswish": lambda x: x * min(max(x + 3, 0.0), 6.0) / 6,
    "mish": lambda x: x * math.tanh(softplus(x)),
    "relu_squared": lambda x: max(x, 0.0) ** 2,
}
ROUNDED_ONCE = {"identity", "relu", "relu6", "leaky_relu", "relu_squared"}
KINKS = torch.tensor([-3.0, 0.0, 3.0, 6.0], dtype=torch.float64)

POINTS = torch.cat(
    (
        torch.linspace(-12, 12, 4801, dtype=torch.float64),
        torch.logspace(-300, 2, 303, dtype=torch.float64),
        -torch.logspace(-300, 2, 303, dtype=torch.float64),
    )
)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_every_activation_has_an_oracle() -> None:
    assert list(ACTIVATIONS) == list(ORACLES)


@pytest.mark.parametrize("name", ORACLES)
def test_activation_is_its_formula(name: str) -> None:
    expected = torch.tensor([ORACLES[name](x) for x in POINTS.tolist()], dtype=torch.float64)
    error = (ACTIVATIONS[name](POINTS) - expected).abs()
    # A formula of at most eight roundings, of which the bounded factor can cancel down to the unit
    # roundoff: 8 * 2^-53 relative to x, and to 1 where the function does not scale with x.
    scale = torch.ones_like(POINTS) if name in ("sigmoid", "tanh") else POINTS.abs()
    tolerance = torch.zeros_like(POINTS) if name in ROUNDED_ONCE else 2.0**-50 * scale
    worst = int((error - tolerance).argmax())
    assert (error <= tolerance).all(), (name, POINTS[worst], error[worst])


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activation_keeps_dtype_and_shape(name: str, dtype: torch.dtype) -> None:
    y = ACTIVATIONS[name](normal(2, 3, 5).to(dtype))
    assert (y.dtype, y.shape) == (dtype, (2, 3, 5))


@pytest.mark.parametrize("name", ORACLES)
def test_activation_gradient(name: str) -> None:
    x = torch.linspace(-7, 7, 57, dtype=torch.float64) + 0.0625
    assert (x[:, None] - KINKS).abs().min() > 0.01
    assert torch.autograd.gradcheck(ACTIVATIONS[name], (x.requires_grad_(),))


def test_gelu_tanh_is_within_5e_4_of_gelu() -> None:
    distance = (ACTIVATIONS["gelu_tanh"](POINTS) - ACTIVATIONS["gelu"](POINTS)).abs().max()
    assert 4e-4 < distance < 5e-4


def test_mish_lower_bound() -> None:
    x = torch.linspace(-2, 0, 200_001, dtype=torch.float64)
    y = ACTIVATIONS["mish"](x)
    assert y.min().item() == pytest.approx(-0.30884, abs=5e-6)
    assert (ACTIVATIONS["mish"](POINTS) >= y.min() - 1e-9).all()


def test_hardswish_is_zero_below_and_identity_above() -> None:
    hardswish = ACTIVATIONS["hardswish"]
    assert torch.equal(hardswish(torch.tensor([-100.0, -3.0, 0.0])), torch.zeros(3))
    above = torch.tensor([3.0, 4.5, 100.0])
    assert torch.equal(hardswish(above), above)


def test_silu_slope_is_negative_below_its_minimum_and_zero_there() -> None:
    """Against the claim that Swish has a positive, or a non-zero, derivative everywhere."""
    x = torch.tensor([-6.0, -2.0, -1.2784645427610738, 0.0], dtype=torch.float64)
    x.requires_grad_()
    (slope,) = torch.autograd.grad(ACTIVATIONS["silu"](x).sum(), x)
    assert slope[0] < 0 and slope[1] < 0 and slope[2].abs() < 1e-15 and slope[3] == 0.5


def test_swish_limits() -> None:
    assert torch.equal(Swish(0.0)(POINTS), POINTS / 2)
    assert torch.equal(Swish(1.0)(POINTS), POINTS * torch.sigmoid(POINTS))
    nearly_half = Swish(1e-9)(POINTS)  # sigmoid(z) = 1/2 + z/4 - z^3/48 + ...
    bound = 1e-9 * POINTS**2 / 4 + 2.0**-52 * POINTS.abs()
    assert ((nearly_half - POINTS / 2).abs() <= bound).all()
    # x * sigmoid(-beta x) peaks at 0.2785 / beta: that far from ReLU and no farther.
    distance = (Swish(1e6)(POINTS) - F.relu(POINTS)).abs().max()
    assert distance <= 0.2785 / 1e6


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.5])
def test_swish_is_its_formula(beta: float) -> None:
    expected = torch.tensor([x * sigmoid(beta * x) for x in POINTS.tolist()], dtype=torch.float64)
    # sigmoid(z) inherits the rounding of z times z; beyond |z| = 40 nothing of it is left.
    tolerance = 2.0**-50 * POINTS.abs()
    assert ((Swish(beta)(POINTS) - expected).abs() <= tolerance).all()


def test_learnable_beta_is_the_only_parameter_and_has_the_right_gradient() -> None:
    swish = Swish(1.5, learnable=True).double()
    assert [name for name, _ in swish.named_parameters()] == ["beta"]
    assert not list(Swish(1.5).parameters()) and not Swish(1.5).state_dict()
    x = normal(20, dtype=torch.float64).requires_grad_()
    beta = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    assert torch.equal(swish(x), Swish(1.5)(x))
    assert torch.autograd.gradcheck(
        lambda x, beta: torch.func.functional_call(swish, {"beta": beta}, (x,)), (x, beta)
    )


def test_learnable_beta_does_not_widen_bf16() -> None:
    assert Swish(1.5, learnable=True)(normal(4).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("beta", [math.inf, -math.inf, math.nan])
def test_swish_refuses_a_beta_that_is_not_finite(beta: float) -> None:
    with pytest.raises(ValueError, match=r"^Swish: beta must be finite, got -?(inf|nan)$"):
        Swish(beta)


# Activations with a number, and xIELU


def powlu_oracle(x: float, power: float) -> float:
    return x ** (power / (math.sqrt(x) + 1)) * sigmoid(x) if x > 0 else x * sigmoid(x)


def xielu_oracle(x: float, alpha_p: float, alpha_n: float, beta: float) -> float:
    if x > 0:
        return alpha_p * x * x + beta * x
    return alpha_n * (math.expm1(x) - x) + beta * x


NUMBERED: dict[str, tuple[Callable[[float, float], float], tuple[float, ...]]] = {
    "swish": (lambda x, beta: x * sigmoid(beta * x), (0.5, 1.702)),
    "powlu": (powlu_oracle, (3.0, 2.0, 0.5)),
    "situ": (lambda x, bound: bound * math.tanh(x / bound) * sigmoid(x), (4.0, 0.5)),
    "soft_limit": (lambda x, bound: bound * math.tanh(x / bound), (25.0, 0.5)),
}


@pytest.mark.parametrize("name", NUMBERED)
def test_an_activation_with_a_number_is_its_formula(name: str) -> None:
    assert list(NUMBERED) == list(WITH_A_NUMBER)
    oracle, numbers = NUMBERED[name]
    for number in numbers:
        expected = torch.tensor([oracle(x, number) for x in POINTS.tolist()], dtype=torch.float64)
        error = (WITH_A_NUMBER[name](POINTS, number) - expected).abs()
        # Of a power x^p the rounding of p counts ln(x) times: up to 700 times here.
        units = 1024 if name == "powlu" else 8
        scale = torch.maximum(expected.abs(), POINTS.abs() if name != "powlu" else expected.abs())
        assert (error <= units * 2.0**-53 * scale).all(), number


@pytest.mark.parametrize("name", NUMBERED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_activation_with_a_number_keeps_dtype_and_shape(name: str, dtype: torch.dtype) -> None:
    y = WITH_A_NUMBER[name](normal(2, 3, 5).to(dtype), 3.0)
    assert (y.dtype, y.shape) == (dtype, (2, 3, 5))
    y = xielu(normal(2, 3, 5).to(dtype), 0.8, 0.8)
    assert (y.dtype, y.shape) == (dtype, (2, 3, 5))


@pytest.mark.parametrize("name", NUMBERED)
def test_gradient_of_an_activation_with_a_number(name: str) -> None:
    x = torch.linspace(-7, 7, 57, dtype=torch.float64) + 0.0625
    for number in NUMBERED[name][1]:
        assert torch.autograd.gradcheck(
            lambda x, number=number: WITH_A_NUMBER[name](x, number), (x.requires_grad_(),)
        )


def slope(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(x).sum(), x)
    return gradient


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_powlu_at_and_around_zero_and_far_away(dtype: torch.dtype) -> None:
    tiny, largest = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    zero = torch.tensor([0.0, -0.0, -tiny, -tiny / 4], dtype=dtype)
    assert (powlu(zero).abs() <= tiny / 2).all()
    assert torch.equal(slope(powlu, zero), torch.full_like(zero, 0.5))
    above = torch.tensor([tiny / 4, tiny, 1e-7], dtype=dtype)
    assert (powlu(above) <= above / 2).all() and (slope(powlu, above) <= 1e-5).all()
    assert powlu(above).isfinite().all() and slope(powlu, above).isfinite().all()
    far = torch.tensor([largest, math.inf], dtype=dtype)
    assert (powlu(far) - 1).abs().max() <= (0.15 if dtype == torch.float16 else 1e-6)
    assert slope(powlu, far).abs().max() <= 1e-4
    assert powlu(torch.tensor([math.nan], dtype=dtype)).isnan().all()


def test_powlu_has_one_maximum_and_crosses_silu_at_one_and_four() -> None:
    x = torch.linspace(0.0, 1000.0, 1_000_001, dtype=torch.float64)
    y = powlu(x)
    top = int(y.argmax())
    assert (float(y[top]), float(x[top])) == pytest.approx((5.3163, 12.897), abs=1e-3)
    assert (y[: top + 1].diff() > 0).all() and (y[top:].diff() < 0).all()
    ones = torch.tensor([1.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(powlu(ones), F.silu(ones), rtol=1e-15, atol=0)


def test_bounds_of_situ() -> None:
    x = torch.tensor([-math.inf, -1e9, 1e-3, 1e9, math.inf], dtype=torch.float64)
    assert situ(x).tolist() == [0.0, 0.0, pytest.approx(float(F.silu(x[2])), rel=1e-6), 4.0, 4.0]
    assert soft_limit(x).tolist() == [-25.0, -25.0, pytest.approx(1e-3), 25.0, 25.0]
    assert slope(situ, x[[0, 4]]).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("numbers", [(0.8, 0.8, 0.5), (2.0, 0.1, 0.0), (0.1, 3.0, 1.0)])
def test_xielu_is_its_formula(numbers: tuple[float, float, float]) -> None:
    values = [xielu_oracle(x, *numbers) for x in POINTS.tolist()]
    expected = torch.tensor(values, dtype=torch.float64)
    error = (xielu(POINTS, *numbers) - expected).abs()
    assert (error <= 2.0**-49 * torch.maximum(POINTS.abs(), expected.abs())).all()


def test_xielu_at_zero_and_far_away() -> None:
    x = torch.tensor([0.0, -0.0, 1e-30, -1e-30, -math.inf, math.inf])
    torch.testing.assert_close(xielu(x, 0.8, 0.8)[:4], x[:4] / 2, rtol=1e-6, atol=0)
    assert slope(lambda x: xielu(x, 0.8, 0.8), x[:4]).tolist() == [0.5] * 4
    far = xielu(x[4:], 0.8, 0.8)
    assert not far.isnan().any()
    assert not slope(lambda x: xielu(x, 0.8, 0.8), x[4:]).isnan().any()


def test_xielu_of_the_published_code() -> None:
    """transformers' XIELUActivation, with its own parameters."""
    theirs = import_module("transformers.activations").XIELUActivation(dtype=torch.float32)
    ours = XIELU()
    x = 4 * normal(1000)
    assert (theirs.alpha_p.item(), theirs.alpha_n.item()) == pytest.approx(
        (ours.alpha_p.item(), ours.alpha_n.item()), rel=1e-6
    )
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=2e-6)


def test_the_alphas_are_trainable_and_have_the_right_gradient() -> None:
    module = XIELU(0.6, 1.5).double()
    assert [name for name, _ in module.named_parameters()] == ["alpha_p", "alpha_n"]
    alpha_p, alpha_n = module.alphas()
    assert (float(alpha_p.detach()), float(alpha_n.detach())) == pytest.approx((0.6, 1.5))
    x = normal(20, dtype=torch.float64).requires_grad_()
    values = [p.detach().clone().requires_grad_() for p in module.parameters()]
    assert torch.autograd.gradcheck(
        lambda x, p, n: torch.func.functional_call(module, {"alpha_p": p, "alpha_n": n}, (x,)),
        (x, *values),
    )
    assert XIELU()(normal(4).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("numbers", [(0.0, 0.8, 0.5), (0.8, 0.5, 0.5), (math.inf, 1.0, 0.5)])
def test_xielu_refuses_an_alpha_that_no_parameter_gives(numbers: tuple[float, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"^XIELU: expected alpha_p > 0 and alpha_n > beta, all fi"
    ):
        XIELU(*numbers)


def test_xielu_in_both_feed_forwards() -> None:
    x = normal(4, 6)
    plain = FeedForward(6, 10, "xielu")
    assert [name for name, _ in plain.named_children()] == ["xielu", "up", "down"]
    assert torch.equal(plain(x), plain.down(xielu(plain.up(x), *plain.xielu.alphas())))
    gated = GatedFeedForward(6, 10, xielu=XIELU())
    expected = xielu(gated.gate(x), *gated.xielu.alphas()) * gated.up(x)
    assert torch.equal(gated(x), gated.down(expected))
    for layer in (plain, gated):
        layer(x).square().sum().backward()
        assert layer.xielu.alpha_p.grad != 0 and layer.xielu.alpha_n.grad != 0
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(twin(x), layer(x))
    formatted = FeedForward(6, 10, "xielu", activation_format=E4M3)
    up = cast(formatted.up(x).detach(), E4M3)
    product = cast(xielu(up, *formatted.xielu.alphas()).detach(), E4M3)
    assert torch.equal(formatted(x), formatted.down(product))


def test_swish_of_a_number_is_the_module() -> None:
    assert torch.equal(swish(POINTS, 1.5), Swish(1.5)(POINTS))


# The variants


def test_variants_are_shazeers_table_and_gtu() -> None:
    assert GLU_VARIANTS == {
        "glu": ("sigmoid", "identity"),
        "gtu": ("tanh", "sigmoid"),
        "bilinear": ("identity", "identity"),
        "reglu": ("relu", "identity"),
        "geglu": ("gelu", "identity"),
        "swiglu": ("silu", "identity"),
    }


@pytest.mark.parametrize("variant", GLU_VARIANTS)
@pytest.mark.parametrize("bias", [False, True])
def test_gated_is_its_formula(variant: str, bias: bool) -> None:
    layer = GatedFeedForward(3, 5, variant, bias=bias).double()
    x = normal(2, 3, dtype=torch.float64)

    def affine(linear: nn.Linear, row: list[float]) -> list[float]:
        offset = linear.bias.tolist() if bias else [0.0] * linear.out_features
        return [
            math.fsum([*(w * v for w, v in zip(weights, row, strict=True)), b])
            for weights, b in zip(linear.weight.tolist(), offset, strict=True)
        ]

    gate_oracle, up_oracle = (ORACLES[name] for name in GLU_VARIANTS[variant])
    expected = []
    for row in x.tolist():
        pairs = zip(affine(layer.gate, row), affine(layer.up, row), strict=True)
        expected.append(affine(layer.down, [gate_oracle(g) * up_oracle(u) for g, u in pairs]))
    assert layer(x).tolist() == [pytest.approx(row, rel=1e-12, abs=1e-14) for row in expected]


@pytest.mark.parametrize("variant", sorted(set(GLU_VARIANTS) - {"reglu"}))
def test_gated_gradients(variant: str) -> None:
    layer = GatedFeedForward(3, 4, variant, bias=True).double()
    names = [name for name, _ in layer.named_parameters()]
    values = [value.detach().clone().requires_grad_() for value in layer.parameters()]
    x = normal(2, 3, dtype=torch.float64).requires_grad_()

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *values))


@pytest.mark.parametrize("bias", [False, True])
def test_plain_is_linear_activation_linear(bias: bool) -> None:
    for name in ACTIVATIONS:
        layer = FeedForward(8, 32, name, bias=bias)
        x = normal(2, 5, 8)
        assert torch.equal(layer(x), layer.down(ACTIVATIONS[name](layer.up(x))))


def test_children_and_shapes() -> None:
    gated = GatedFeedForward(6, 10, dropout=0.5)
    assert {name: tuple(child.weight.shape) for name, child in gated.named_children()} == {
        "gate": (10, 6),
        "up": (10, 6),
        "down": (6, 10),
    }
    plain = FeedForward(6, 10, dropout=0.5)
    assert {name: tuple(child.weight.shape) for name, child in plain.named_children()} == {
        "up": (10, 6),
        "down": (6, 10),
    }
    assert len(list(gated.parameters())) == 3 and len(list(plain.parameters())) == 2
    assert len(list(GatedFeedForward(6, 10, bias=True).parameters())) == 6


def test_each_child_is_called_once_and_down_receives_the_product() -> None:
    layer = GatedFeedForward(6, 10)
    seen: dict[str, list[Tensor]] = {"gate": [], "up": [], "down": []}
    for name, child in layer.named_children():
        child.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
    x = normal(4, 6)
    layer(x)
    assert {name: len(calls) for name, calls in seen.items()} == {"gate": 1, "up": 1, "down": 1}
    assert seen["gate"][0] is x and seen["up"][0] is x
    assert torch.equal(seen["down"][0], layer.product(x))


def test_learnable_swish_in_a_gate() -> None:
    swish = Swish(beta=1.5, learnable=True)
    layer = GatedFeedForward(6, 10, swish=swish)
    x = normal(4, 6)
    gate, up = layer.gate(x), layer.up(x)
    assert torch.equal(layer(x), layer.down(gate * torch.sigmoid(1.5 * gate) * up))
    assert "swish.beta" in dict(layer.named_parameters())
    layer(x).square().sum().backward()
    assert swish.beta.grad is not None and swish.beta.grad != 0


@pytest.mark.parametrize("variant", sorted(set(GLU_VARIANTS) - {"swiglu"}))
def test_swish_is_refused_elsewhere(variant: str) -> None:
    with pytest.raises(ValueError, match=f"swish is for variant 'swiglu', got '{variant}'"):
        GatedFeedForward(6, 10, variant, swish=Swish())


def test_layers_survive_copy_pickle_and_save() -> None:
    x = normal(4, 6)
    for layer in (
        GatedFeedForward(6, 10, "gtu"),
        GatedFeedForward(6, 10, swish=Swish(2.0)),
        FeedForward(6, 10, "relu_squared"),
    ):
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        for twin in (
            copy.deepcopy(layer),
            pickle.loads(pickle.dumps(layer)),
            torch.load(file, weights_only=False),
        ):
            assert torch.equal(twin(x), layer(x))


# The precision in which the activation is computed

TORCH_CASTS = {
    FP32: torch.float32,
    BF16: torch.bfloat16,
    FP16: torch.float16,
    E4M3: torch.float8_e4m3fn,
    E5M2: torch.float8_e5m2,
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def cast(x: Tensor, fmt: FloatFormat) -> Tensor:
    """float32 values of `fmt`, by torch's own cast; what FP8 cannot hold saturates."""
    x = x.float()
    return (x.clamp(-fmt.max, fmt.max) if fmt.bits == 8 else x).to(TORCH_CASTS[fmt]).float()


def computed_in(name: str, fmt: FloatFormat, x: Tensor, signal: Tensor) -> tuple[Tensor, Tensor]:
    """Activation and input gradient written out: no derivative of a rounding anywhere."""
    if name == "identity":
        return x, signal
    rounded = cast(x, fmt).requires_grad_()
    result = ACTIVATIONS[name](rounded)
    (gradient,) = torch.autograd.grad(result, rounded, signal.float())
    return cast(result.detach(), fmt).to(x.dtype), gradient.to(x.dtype)


def wide(dtype: torch.dtype) -> Tensor:
    """Values from beyond E5M2's subnormals to beyond its maximum, ends and specials included."""
    sizes = 2.0 ** torch.linspace(-26, 17, 60)
    ends = torch.tensor([0.0, -0.0, 448.0, 464.0, 480.0, 57344.0, 1e5, math.inf, -math.inf])
    return torch.cat(((normal(40, 60) * sizes).flatten(), ends)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", TORCH_CASTS, ids=repr)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_in_a_format(name: str, fmt: FloatFormat, dtype: torch.dtype) -> None:
    x = wide(dtype).requires_grad_()
    signal = normal(x.numel(), seed=1, dtype=torch.float32).to(dtype)
    y = activate(ACTIVATIONS[name], x, fmt)
    y.backward(signal)
    expected, gradient = computed_in(name, fmt, x.detach(), signal)
    assert y.dtype == dtype and x.grad is not None
    # 0 * inf is NaN in some of them, there as here.
    torch.testing.assert_close(y.detach(), expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(x.grad, gradient, rtol=0, atol=0, equal_nan=True)
    assert y.isfinite().sum() > 2000 and x.grad.isfinite().sum() > 2000


@pytest.mark.parametrize("name", sorted(set(ACTIVATIONS) - {"identity"}))
def test_bf16_is_what_torch_computes_in_bf16(name: str) -> None:
    """Not so of FP16: torch has another formula for GELU there, 7 % from its float32 at -4.9."""
    x = normal(1000, seed=2) * 4
    own = ACTIVATIONS[name](x.bfloat16()).float()
    assert torch.equal(activate(ACTIVATIONS[name], x, BF16), own)


def test_a_format_that_torch_lacks() -> None:
    x = torch.tensor([-4.9, -1.0, 0.2, 0.3, 1.2, 2.4, 2.6, 100.0])
    # Of E2M1 are 0, 0.5, 1, 1.5, 2, 3, 4, 6; sigmoid(0.5) = 0.62 is nearest to 0.5.
    assert activate(F.relu, x, E2M1).tolist() == [0, 0, 0, 0.5, 1, 2, 3, 6]
    assert activate(torch.sigmoid, x, E2M1).tolist() == [0, 0.5, 0.5, 0.5, 0.5, 1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fmt", TORCH_CASTS, ids=repr)
@pytest.mark.parametrize("variant", GLU_VARIANTS)
def test_gated_computes_its_activations_in_the_format(
    variant: str, fmt: FloatFormat, dtype: torch.dtype
) -> None:
    """Both activations and nothing else: not the product, not an identity."""
    layer = GatedFeedForward(12, 32, variant, activation_format=fmt).to(dtype)
    x = normal(16, 12).to(dtype).requires_grad_()
    signal = normal(16, 12, seed=1).to(dtype)
    gate, up = layer.gate(x), layer.up(x)
    ones = torch.ones_like(gate)
    gate_name, up_name = GLU_VARIANTS[variant]
    activated_gate, gate_slope = computed_in(gate_name, fmt, gate.detach(), ones)
    product = activated_gate * computed_in(up_name, fmt, up.detach(), ones)[0]
    assert torch.equal(layer.product(x), product)
    assert torch.equal(layer(x), layer.down(product))
    assert (gate_name == "identity") == torch.equal(gate_slope, ones)

    layer(x).backward(signal)
    (at_product,) = torch.autograd.grad(layer.down(product.requires_grad_()), product, signal)
    at_gate = computed_in(
        gate_name, fmt, gate.detach(), at_product * computed_in(up_name, fmt, up.detach(), ones)[0]
    )[1]
    at_up = computed_in(up_name, fmt, up.detach(), at_product * activated_gate)[1]
    assert torch.equal(layer.gate.weight.grad, at_gate.T @ x)
    assert torch.equal(layer.up.weight.grad, at_up.T @ x)


@pytest.mark.parametrize("fmt", TORCH_CASTS, ids=repr)
def test_plain_computes_its_activation_in_the_format(fmt: FloatFormat) -> None:
    for name in ACTIVATIONS:
        layer = FeedForward(12, 32, name, activation_format=fmt).bfloat16()
        x = normal(16, 12).bfloat16()
        up = layer.up(x).detach()
        assert torch.equal(layer(x), layer.down(computed_in(name, fmt, up, up)[0]))


def test_the_format_matters_and_none_is_the_dtype_of_the_input() -> None:
    layer = GatedFeedForward(12, 32)
    x = normal(16, 12)
    products = []
    for fmt in (None, FP32, BF16, FP16, E4M3, E5M2):
        layer.activation_format = fmt
        products.append(layer.product(x))
    assert torch.equal(products[0], products[1])
    assert len({tuple(product.flatten().tolist()) for product in products[1:]}) == 5
    layer.bfloat16()
    layer.activation_format = None
    expected = layer.product(x.bfloat16())
    layer.activation_format = BF16
    assert torch.equal(layer.product(x.bfloat16()), expected)


def test_learnable_swish_in_a_format() -> None:
    swish = Swish(1.5, learnable=True)
    layer = GatedFeedForward(6, 10, swish=swish, activation_format=E4M3)
    x = normal(4, 6)
    gate, up = layer.gate(x).detach(), layer.up(x).detach()
    rounded = cast(gate, E4M3)
    product = cast(rounded * torch.sigmoid(1.5 * rounded), E4M3) * up
    assert torch.equal(layer.product(x), product)
    layer.product(x).sum().backward()
    slope = rounded.double() ** 2 * torch.sigmoid(1.5 * rounded.double()).mul_(
        1 - torch.sigmoid(1.5 * rounded.double())
    )
    assert swish.beta.grad is not None
    torch.testing.assert_close(swish.beta.grad.double(), (slope * up).sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("make", [GatedFeedForward, FeedForward])
def test_a_format_is_in_the_copy_and_the_repr_and_in_no_state_dict(
    make: Callable[..., nn.Module],
) -> None:
    layer, default = make(6, 10, activation_format=E4M3), make(6, 10)
    x = normal(4, 6)
    assert not torch.equal(layer(x), default.eval()(x))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    assert list(layer.state_dict()) == list(default.state_dict())
    default.load_state_dict(layer.state_dict())
    assert not torch.equal(layer(x), default(x))
    assert "activation_format=E4M3\n" in repr(layer) and "format" not in repr(default)


def test_a_format_refuses_float64() -> None:
    layer = GatedFeedForward(6, 10, activation_format=BF16).double()
    with pytest.raises(ValueError) as caught:
        layer(normal(4, 6, dtype=torch.float64))
    expected = "expected float32, bfloat16 or float16"
    assert str(caught.value) == f"activation_format BF16: torch.float64, {expected}"


# The published modules, as their authors wrote them


class CallsTwice(nn.Module):
    """w1 called twice in one forward; w2 is down."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        swish = self.w1(x).sigmoid() * self.w1(x)
        gate = self.w3(x)
        return self.w2(swish * gate)


class BypassesModules(nn.Module):
    """Modules used for their weights only; w3 is down."""

    def __init__(self, w1: nn.Linear, w2: nn.Linear, w3: nn.Linear) -> None:
        super().__init__()
        self.w1 = w1
        self.w2 = w2
        self.w3 = w3

    def forward(self, x: Tensor) -> Tensor:
        x1 = F.linear(x, self.w1.weight)
        x2 = F.linear(x, self.w2.weight)
        hidden = F.silu(x1) * x2
        return F.linear(hidden, self.w3.weight)


class WithDropout(nn.Module):
    """Biases and dropout on the output; w2 is down. `misplaced` keeps the published parenthesis."""

    def __init__(
        self, dim: int, hidden: int, multiple_of: int, dropout: float, misplaced: bool = False
    ) -> None:
        super().__init__()
        hidden = multiple_of * ((2 * hidden // 3 + multiple_of - 1) // multiple_of)
        self.w1 = nn.Linear(dim, hidden)
        self.w2 = nn.Linear(hidden, dim)
        self.w3 = nn.Linear(dim, hidden)
        self.dropout = nn.Dropout(dropout)
        self.misplaced = misplaced

    def forward(self, x: Tensor) -> Tensor:
        if self.misplaced:
            return self.dropout(self.w2(F.silu(self.w1(x))) * self.w3(x))
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


def copied(layer: GatedFeedForward, **source: nn.Linear) -> GatedFeedForward:
    for name, linear in source.items():
        layer.get_submodule(name).load_state_dict(linear.state_dict())
    return layer


def assert_same(ours: nn.Module, theirs: nn.Module, pairs: dict[str, nn.Linear]) -> None:
    """Output, input gradient and every weight gradient equal to the bit."""
    x, y = (normal(2, 7, 12, seed=3).requires_grad_() for _ in range(2))
    torch.manual_seed(5)  # the dropout mask
    ours_out = ours(x)
    torch.manual_seed(5)
    theirs_out = theirs(y)
    assert torch.equal(ours_out, theirs_out)
    signal = normal(2, 7, 12, seed=4)
    ours_out.backward(signal)
    theirs_out.backward(signal)
    assert torch.equal(x.grad, y.grad)
    for name, linear in pairs.items():
        assert torch.equal(ours.get_parameter(f"{name}.weight").grad, linear.weight.grad)


def test_equals_the_module_that_calls_w1_twice() -> None:
    theirs = CallsTwice(12, llama_hidden(12))
    pairs = {"gate": theirs.w1, "up": theirs.w3, "down": theirs.w2}
    # sigmoid(x) * x is Swish(1) to the bit, not F.silu: that one divides by 1 + exp(-x).
    ours = copied(GatedFeedForward(12, llama_hidden(12), swish=Swish(1.0)), **pairs)
    x = normal(2, 7, 12, seed=3)
    assert torch.equal(ours(x), theirs(x))
    # The gradient of w1 arrives in two halves and is rounded in between, so it is not bit-equal.
    default = copied(GatedFeedForward(12, llama_hidden(12)), **pairs)
    x = x.double()
    outputs = [module.double()(x) for module in (default, theirs)]
    torch.testing.assert_close(*outputs, rtol=0, atol=4 * 2.0**-53)
    for output in outputs:
        output.square().sum().backward()
    for name, linear in pairs.items():
        gradient = default.get_parameter(f"{name}.weight").grad
        torch.testing.assert_close(gradient, linear.weight.grad, rtol=0, atol=1e-14)


def test_equals_the_module_that_bypasses_its_children() -> None:
    w1, w2, w3 = (nn.Linear(*shape, bias=False) for shape in ((12, 32), (12, 32), (32, 12)))
    pairs = {"gate": w1, "up": w2, "down": w3}
    assert_same(copied(GatedFeedForward(12, 32), **pairs), BypassesModules(w1, w2, w3), pairs)


@pytest.mark.parametrize("training", [True, False])
def test_equals_the_module_with_dropout_and_biases(training: bool) -> None:
    theirs = WithDropout(12, 48, 16, 0.25).train(training)
    ours = GatedFeedForward(12, matched_hidden(48, 16), bias=True, dropout=0.25).train(training)
    pairs = {"gate": theirs.w1, "up": theirs.w3, "down": theirs.w2}
    assert_same(copied(ours, **pairs), theirs, pairs)


def test_dropout_acts_on_the_output_of_down_only() -> None:
    layer = GatedFeedForward(12, 32, dropout=0.5)
    x = normal(64, 12)
    torch.manual_seed(0)
    dropped = layer(x)
    kept = dropped != 0
    assert 0.4 < kept.float().mean() < 0.6
    assert torch.equal(dropped[kept], (layer.eval()(x) * 2)[kept])


def test_misplaced_parenthesis_does_not_fit() -> None:
    with pytest.raises(RuntimeError, match="must match the size"):
        WithDropout(12, 48, 16, 0.0, misplaced=True)(normal(4, 12))


# Widths


def test_matched_hidden_examples() -> None:
    assert matched_hidden(256, 16) == 176
    assert matched_hidden(64, 8) == 48
    assert matched_hidden(4 * 96, 8) == 256


def test_matched_hidden_is_the_ceiling_of_the_floor() -> None:
    for hidden in range(2, 400):
        for multiple_of in (1, 2, 7, 8, 16, 256):
            expected = multiple_of * math.ceil(math.floor(2 * hidden / 3) / multiple_of)
            assert matched_hidden(hidden, multiple_of) == expected


@pytest.mark.parametrize("arguments", [(1, 1), (0, 8), (-3, 1), (64, 0)])
def test_matched_hidden_refuses(arguments: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="matched_hidden: expected hidden >= 2 and"):
        matched_hidden(*arguments)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("hidden", [48, 256, 384, 1000])
def test_matched_parameter_counts(hidden: int) -> None:
    dim = 32
    plain = parameters(FeedForward(dim, hidden))
    assert plain == 2 * dim * hidden
    for multiple_of in (1, 8, 16):
        gated = parameters(GatedFeedForward(dim, matched_hidden(hidden, multiple_of)))
        assert -2 * dim <= gated - plain <= 3 * dim * (multiple_of - 1)
    if hidden % 3 == 0:
        assert parameters(GatedFeedForward(dim, matched_hidden(hidden))) == plain


def test_llama_hidden_is_the_float_formula() -> None:
    powers = [3 * 2**k for k in range(47)]
    near = [power + step for power in powers for step in (-1, 0, 1)]
    for dim in [*range(1, 20_000), *near]:
        assert llama_hidden(dim) == int(2 / 3 * 4 * dim)
    assert [llama_hidden(dim) for dim in (384, 768, 4096)] == [1024, 2048, 10922]


# Errors, each in one line


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: GatedFeedForward(6, 10, "swigloo"),
            "GatedFeedForward: unknown name 'swigloo', expected one of "
            "glu, gtu, bilinear, reglu, geglu, swiglu",
        ),
        (
            lambda: FeedForward(6, 10, "swish"),
            "FeedForward: unknown name 'swish', expected one of identity, relu, relu6, leaky_relu, "
            "sigmoid, tanh, gelu, gelu_tanh, silu, hardswish, mish, relu_squared, xielu",
        ),
        (
            lambda: GatedFeedForward(6, 10, "reglu", xielu=XIELU()),
            "GatedFeedForward: xielu is for variant 'swiglu', got 'reglu'",
        ),
        (
            lambda: GatedFeedForward(6, 10, swish=Swish(), xielu=XIELU()),
            "GatedFeedForward: swish and xielu, expected one of them",
        ),
        (
            lambda: GatedFeedForward(0, 10),
            "GatedFeedForward: dim and hidden must be at least 1, got 0 and 10",
        ),
        (
            lambda: FeedForward(6, -1),
            "FeedForward: dim and hidden must be at least 1, got 6 and -1",
        ),
        (
            lambda: GatedFeedForward(6, 10, dropout=1.0),
            "GatedFeedForward: dropout must lie in [0, 1), got 1.0",
        ),
        (
            lambda: GatedFeedForward(6, 10, activation_format=E8M0),
            "GatedFeedForward: activation_format must be None or a FloatFormat of elements, "
            "got E8M0",
        ),
        (
            lambda: FeedForward(6, 10, activation_format="BF16"),
            "FeedForward: activation_format must be None or a FloatFormat of elements, got 'BF16'",
        ),
    ],
)
def test_errors(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value) == message
