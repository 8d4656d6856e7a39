"""What each GEMM of `Fp8Linear` multiplies, how it sums, and how a fused product is rounded.

The operands are taken where the layer hands them to `torch.nn.functional.linear`, and must be, bit
for bit, the tensor dequantised from the codes of `quantize`, whose codes and scales have oracles of
their own (test_casting, test_block_scaling). Which format, direction and scale each use has is
written out here by hand. The short accumulator is a scalar program in numpy; the feed-forward is
written out from TE's description, forward and backward.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fp8lab import formats, kernels
from fp8lab.accumulation import multiply_in_steps
from fp8lab.casting import fake_quantize, quantize
from fp8lab.conversion import convert
from fp8lab.ffn import GatedFeedForward
from fp8lab.linear import Fp8Linear
from fp8lab.recipe import (
    OPERANDS,
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
from fp8lab.rewriting import Rewritten
from fp8lab.scaling import power_of_two_scale, spread

BF16, FP32 = HighPrecision(), HighPrecision(format=formats.FP32)
CURRENT, MX, DELAYED = Float8CurrentScaling(), MXFP8BlockScaling(), DelayedScaling()
COPIES, GAUDI2 = Format.HYBRID_E5M2_COPIES, Format.GAUDI2_E5M2_COPIES
NVFP4 = NVFP4BlockScaling(disable_stochastic_rounding=True)
NO_RHT = NVFP4BlockScaling(disable_rht=True, disable_stochastic_rounding=True)
DTYPES = [torch.float32, torch.bfloat16]
INF, NAN = math.inf, math.nan

linear = F.linear  # before a test replaces it


# --- the operands of the three GEMMs ------------------------------------------------------------

USES = (
    ("input", "output"),
    ("weight", "output"),
    ("grad_output", "grad_input"),
    ("weight", "grad_input"),
    ("grad_output", "grad_weight"),
    ("input", "grad_weight"),
)
# Along the last axis of the tensor: what these GEMMs sum. The other three sum along the first.
ROWWISE = USES[:3]
# Of input, weight, grad_output, and the copies of input and weight; all different, some saturate.
SCALES = (37.0, 1000.0, 3e4, 600.0, 5000.0)


def six(forward: str, gradient: str, copies: str = "") -> list[str]:
    """Formats in the order of USES."""
    again = copies or forward
    return [forward, forward, gradient, again, gradient, again]


CASES: dict[str, tuple[Recipe, list[str]]] = {
    "delayed": (DELAYED, six("E4M3", "E5M2")),
    "delayed, E4M3": (DelayedScaling(fp8_format=Format.E4M3), six("E4M3", "E4M3")),
    "delayed, copies": (DelayedScaling(fp8_format=COPIES), six("E4M3", "E5M2", "E5M2")),
    "delayed, Gaudi": (DelayedScaling(fp8_format=Format.GAUDI2), six("E4M3_GAUDI2", "E5M2")),
    "delayed, Gaudi, copies": (
        DelayedScaling(fp8_format=GAUDI2),
        six("E4M3_GAUDI2", "E5M2", "E5M2"),
    ),
    "delayed, stochastic": (DelayedScaling(stochastic_rounding=True), six("E4M3", "E5M2")),
    "current": (CURRENT, six("E4M3", "E5M2")),
    "current, powers": (Float8CurrentScaling(use_power_2_scales=True), six("E4M3", "E5M2")),
    "current, copies": (Float8CurrentScaling(fp8_format=COPIES), six("E4M3", "E5M2", "E5M2")),
    "current, stochastic": (Float8CurrentScaling(stochastic_rounding=True), six("E4M3", "E5M2")),
    "blocks": (Float8BlockScaling(), six("E4M3", "E4M3")),
    "blocks, all of 1": (
        Float8BlockScaling(w_block_scaling_dim=1, fp8_format=Format.HYBRID),
        six("E4M3", "E5M2"),
    ),
    "blocks, square input": (
        Float8BlockScaling(x_block_scaling_dim=2, w_block_scaling_dim=1),
        six("E4M3", "E4M3"),
    ),
    "blocks, square gradient": (
        Float8BlockScaling(grad_block_scaling_dim=2, w_block_scaling_dim=1, use_f32_scales=True),
        six("E4M3", "E4M3"),
    ),
    "mx": (MX, six("E4M3", "E4M3")),
    "mx, square weight, floor": (
        MXFP8BlockScaling(
            enable_2d_quantization=True, scale_rounding="ocp_floor", fp8_format=Format.HYBRID
        ),
        six("E4M3", "E5M2"),
    ),
    "nvfp4": (NVFP4BlockScaling(), six("E2M1", "E2M1")),
    "nvfp4, no transform": (NVFP4BlockScaling(disable_rht=True), six("E2M1", "E2M1")),
    "nvfp4, long weight": (
        NVFP4BlockScaling(disable_2d_quantization=True, disable_stochastic_rounding=True),
        six("E2M1", "E2M1"),
    ),
    "rows": (RowwiseScaling(), six("E4M3", "E4M3")),
    "rows, any scale": (
        RowwiseScaling(round_scales_to_power_of_2=False, fp8_format=Format.HYBRID),
        six("E4M3", "E5M2"),
    ),
    "rows, wide grad_weight": (
        RowwiseScaling(high_precision_grad_weight=True),
        ["E4M3", "E4M3", "E4M3", "E4M3", "FP32", "FP32"],
    ),
    "bitnet": (BitNetScaling(), ["INT8", "SIGN", "FP32", "SIGN", "FP32", "INT8"]),
    "bf16": (BF16, six("BF16", "BF16")),
    "fp16": (HighPrecision(format=formats.FP16), six("FP16", "FP16")),
    "fp32": (FP32, six("FP32", "FP32")),
}
SHAPES = [(37, 136), (3, 47, 136), (136,)]  # two blocks across, the second ragged; 141 tokens


def on_grid(values: Tensor, scale_inv: Tensor, name: str) -> bool:
    """Whether each value is an element of the format times its scale_inv, rounded once."""
    wide = {"BF16": torch.bfloat16, "FP16": torch.float16, "FP32": torch.float32}
    if name in wide:
        return torch.equal(values, values.to(wide[name]).float())
    magnitudes = {"INT8": range(128), "SIGN": [1.0]}.get(name) or formats.FORMATS[name].values()
    grid = torch.tensor(list(magnitudes), dtype=torch.float64)
    codes = (values.double() / scale_inv.double()).abs()
    above = torch.searchsorted(grid, codes).clamp(max=len(grid) - 1)
    nearest = [(codes - grid[i]).abs() for i in (above, (above - 1).clamp(min=0))]
    return bool((torch.minimum(*nearest) <= 2.0**-23 * codes).all())


class Caught:
    """Runs a layer forward and backward, and catches what its three GEMMs multiply."""

    def __init__(
        self, layer: Any, x: Tensor, gradient: Tensor, patch: pytest.MonkeyPatch, seed: int = 5
    ) -> None:
        calls: list[tuple[Tensor, Tensor]] = []

        def spy(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
            calls.append((left.clone(), right.clone()))
            return linear(left, right, bias)

        x = x.clone().requires_grad_()
        with patch.context() as within:
            within.setattr(F, "linear", spy)
            self.output = layer(x)
            torch.manual_seed(seed)
            self.output.backward(gradient.to(self.output.dtype))
        assert len(calls) == 3
        (a, w), (g, w_again), (g_again, a_again) = calls
        # What the second and the third sum stands first in the tensor.
        self.operands = (a, w, g, w_again.t(), g_again.t(), a_again.t())
        self.grad_input, self.output = x.grad, self.output.detach()


def expected_of(use: Any, tensor: Tensor, recipe: Recipe) -> Any:
    operand = use[0]
    direction = "rowwise" if use in ROWWISE else "columnwise"
    scale = None
    if isinstance(recipe, DelayedScaling):
        column = OPERANDS.index(operand)
        if recipe.fp8_format in (COPIES, GAUDI2) and use in USES[3::2]:
            column = {"input": 3, "weight": 4}[operand]
        scale = torch.tensor(SCALES[column])
    return quantize(tensor, recipe, operand, scale=scale, direction=direction)  # type: ignore


def check_gemms(
    layer: Any,
    recipes: list[Recipe],
    names: list[str],
    x: Tensor,
    patch: pytest.MonkeyPatch,
    turned_back: tuple[Any, ...] = (),
) -> None:
    """`recipes` and `names` of formats in the order of USES; in the GEMMs of `turned_back` the
    Hadamard transform of the operand is undone."""
    if hasattr(layer, "scale"):
        layer.scale.copy_(torch.tensor(SCALES[: len(layer.scale)]))
    gradient = (0.01 * torch.randn(*x.shape[:-1], layer.out_features)).to(x.dtype)
    floor = ", scales rounded ocp_floor"
    added = [floor if getattr(r, "scale_rounding", "up") == "ocp_floor" else "" for r in recipes]
    classes = [type(r).__name__ + more for r, more in zip(recipes, added, strict=True)]
    said = [f"{name} {words}" for name, words in zip(names, classes, strict=True)]
    assert layer.precision() == {"@".join(u): s for u, s in zip(USES, said, strict=True)}
    caught = Caught(layer, x, gradient, patch)

    sources = {"input": x, "weight": layer.weight.detach(), "grad_output": gradient}
    torch.manual_seed(5)
    wanted: list[Tensor] = []
    for use, recipe, name in zip(USES, recipes, names, strict=True):
        how = expected_of(use, sources[use[0]], recipe)
        values = how.dequantize()
        scale_inv = spread(how.scale_inv, how.tile, values.shape)
        assert on_grid(values, scale_inv, name), use
        if use == ("grad_output", "grad_weight") and getattr(recipe, "stochastic_rounding", False):
            values = wanted[2]  # cast, and so drawn, once
        if use in turned_back:
            values = turned(values, len(wanted[2]))
        wanted.append(values.reshape(-1, values.shape[-1]))
    for use, ours, theirs in zip(USES, caught.operands, wanted, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs), use

    a, w, g, w_again, g_again, a_again = wanted
    bias, dtype = layer.bias.detach().float(), x.dtype
    output = linear(a, w, bias).to(dtype)
    grad_input = linear(g, w_again.t()).to(dtype)
    grad_weight = linear(g_again.t(), a_again.t()).to(dtype)
    assert torch.equal(caught.output, output.view(*x.shape[:-1], -1))
    assert torch.equal(caught.grad_input, grad_input.view(x.shape))
    assert torch.equal(layer.weight.grad, grad_weight)
    grad_bias = gradient.reshape(-1, layer.out_features).float().sum(0).to(dtype)
    assert torch.equal(layer.bias.grad, grad_bias)
    assert (caught.output.dtype, layer.weight.grad.dtype) == (dtype, dtype)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_operands_are_those_of_the_recipe(
    name: str, shape: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, names = CASES[name]
    layer = Fp8Linear(136, 72, recipes=dict.fromkeys(OPERANDS, recipe)).to(dtype)
    x = (3 * torch.randn(shape)).to(dtype)
    check_gemms(layer, [recipe] * 6, names, x, monkeypatch)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", [(0, 20), (2, 0, 20)])
def test_no_tokens(name: str, shape: Any) -> None:
    layer = Fp8Linear(20, 9, recipes=dict.fromkeys(OPERANDS, CASES[name][0]))
    x = torch.randn(shape, requires_grad=True)
    output = layer(x)
    output.sum().backward()
    assert output.shape == (*shape[:-1], 9)
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad, torch.zeros(9, 20))


@pytest.mark.parametrize("name", CASES)
def test_strides_change_no_operand(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = CASES[name][0]
    layer = Fp8Linear(24, 20, recipes=dict.fromkeys(OPERANDS, recipe))
    twin = copy.deepcopy(layer)
    x, gradient = torch.randn(24, 37).t(), torch.randn(20, 37).t()
    strided = Caught(layer, x, gradient, monkeypatch)
    plain = Caught(twin, x.contiguous(), gradient.contiguous(), monkeypatch)
    for ours, theirs in zip(strided.operands, plain.operands, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["mx", "current, copies", "blocks, all of 1", "rows", "bf16"])
def test_channel_scales_reach_every_use(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = CASES[name][0]
    layer = Fp8Linear(40, 24, recipes=dict.fromkeys(OPERANDS, recipe))
    channels = torch.rand(40) + 0.5
    layer.rewrite = lambda tensor, weight: Rewritten(tensor * channels, weight / channels)
    x, gradient = torch.randn(37, 40), torch.randn(37, 24)
    operands = Caught(layer, x, gradient, monkeypatch).operands
    weight = layer.weight.detach() / channels
    sources = {"input": x * channels, "weight": weight, "grad_output": gradient}
    for use, operand in zip(USES, operands, strict=True):
        assert torch.equal(operand, expected_of(use, sources[use[0]], recipe).dequantize()), use


# --- one GEMM singled out -----------------------------------------------------------------------

# `get_wgrad_sign_vector` of TE's nvfp4_tensor.py.
SIGNS = torch.tensor([1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1]).float()


def turned(values: Tensor, tokens: int) -> Tensor:
    """The Hadamard transform undone, sixteen tokens at a time, and the padding cut off."""
    bits = [[(-1.0) ** (i & j).bit_count() for j in range(16)] for i in range(16)]
    matrix = SIGNS[:, None] * torch.tensor(bits) / 4  # x^T ↦ x^T · matrix, orthogonal
    columns = values.t().reshape(-1, 16) @ matrix.t()
    return columns.view(values.shape[1], -1).t()[:tokens]


# Plan; recipes in the order of USES; where the transform is undone.
OVERRIDES: dict[str, Any] = {
    "an operand of a GEMM": (
        CURRENT,
        {"*:input@grad_weight": MX},
        [CURRENT, CURRENT, CURRENT, CURRENT, CURRENT, MX],
    ),
    "a GEMM": (MX, {"*@grad_weight": BF16}, [MX, MX, MX, MX, BF16, BF16]),
    "the weight of a GEMM": (
        MX,
        {"*:weight@grad_input": Float8BlockScaling()},
        [MX, MX, MX, Float8BlockScaling(), MX, MX],
    ),
    "another format in one GEMM": (
        CURRENT,
        {"*@output": Float8CurrentScaling(fp8_format=COPIES)},
        [Float8CurrentScaling(fp8_format=COPIES)] * 2 + [CURRENT] * 4,
    ),
    "the last one wins": (
        CURRENT,
        {"*:input@grad_weight": MX, "*:input": BF16, "*:weight": MX, "*:weight@output": FP32},
        [BF16, FP32, CURRENT, MX, CURRENT, BF16],
    ),
    "what is said twice is no override": (
        DELAYED,
        {"*@grad_input": DELAYED, "*:input@output": DELAYED},
        [DELAYED] * 6,
    ),
    "delayed, grad_weight wide": (
        DELAYED,
        {"*@grad_weight": BF16},
        [DELAYED, DELAYED, DELAYED, DELAYED, BF16, BF16],
    ),
    "delayed, output wide": (DELAYED, {"*@output": BF16}, [BF16, BF16] + [DELAYED] * 4),
    "delayed, grad_input wide": (
        DELAYED,
        {"*@grad_input": BF16},
        [DELAYED, DELAYED, BF16, BF16, DELAYED, DELAYED],
    ),
    "delayed, output wide, copies": (
        DelayedScaling(fp8_format=COPIES),
        {"*@output": BF16},
        [BF16, BF16] + [DelayedScaling(fp8_format=COPIES)] * 4,
    ),
    "delayed, one of the operands with copies": (
        DELAYED,
        {"*:weight": DelayedScaling(fp8_format=COPIES), "*:input@output": BF16},
        [BF16, c := DelayedScaling(fp8_format=COPIES), DELAYED, c, DELAYED, DELAYED],
    ),
    "a transform of the gradient alone": (
        NVFP4,
        {"*:input@grad_weight": BF16},
        [NVFP4, NVFP4, NVFP4, NVFP4, NVFP4, BF16],
        USES[4:5],
    ),
    "a transform of the input alone": (
        NVFP4,
        {"*:grad_output@grad_weight": CURRENT},
        [NVFP4, NVFP4, NVFP4, NVFP4, CURRENT, NVFP4],
        USES[5:],
    ),
    "a transform of one of two in FP4": (
        NVFP4,
        {"*:grad_output": NO_RHT},
        [NVFP4, NVFP4, NO_RHT, NVFP4, NO_RHT, NVFP4],
        USES[5:],
    ),
    "a transform in a GEMM of its own": (
        CURRENT,
        {"*@grad_weight": NVFP4},
        [CURRENT, CURRENT, CURRENT, CURRENT, NVFP4, NVFP4],
    ),
}


def formats_of(recipes: list[Recipe]) -> list[str]:
    known = {repr(recipe): names for recipe, names in CASES.values()}
    known |= {repr(NVFP4): six("E2M1", "E2M1"), repr(NO_RHT): six("E2M1", "E2M1")}
    return [known[repr(recipe)][i] for i, recipe in enumerate(recipes)]


@pytest.mark.parametrize("name", OVERRIDES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gemm_singled_out(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    base, overrides, recipes, *turned_back = OVERRIDES[name]
    model = nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 24)).to(dtype)
    convert(model, base, overrides={w.replace("*", "0"): r for w, r in overrides.items()})
    assert set(model[1].precision().values()) == {
        f"{n} {type(base).__name__}" for n in formats_of([base] * 6)
    }
    x = torch.randn(3, 7, 40).to(dtype)
    check_gemms(model[0], recipes, formats_of(recipes), x, monkeypatch, *turned_back)


def test_what_is_turned_back_is_the_tensor_again() -> None:
    """Not only the same formula: near what was never turned."""
    model = nn.Sequential(nn.Linear(40, 24))
    twin = copy.deepcopy(model)
    convert(model, FP32, overrides={"*:grad_output@grad_weight": NVFP4})
    x, gradient = torch.randn(21, 40), torch.randn(21, 24)
    model(x).backward(gradient)
    twin(x).backward(gradient)
    error = (model[0].weight.grad - twin[0].weight.grad).norm() / twin[0].weight.grad.norm()
    assert error < 0.15  # four bits: 0.1; of another tensor it would be 1.4
    way = {"direction": "columnwise"}
    values = fake_quantize(gradient, NVFP4, "grad_output", **way)  # type: ignore[arg-type]
    assert torch.equal(model[0].weight.grad, linear(values.t(), x.t()))


@pytest.mark.parametrize(
    "where", ["*@output", "*@grad_input", "*@grad_weight", "*:input@output", "*:weight@output"]
)
@pytest.mark.parametrize("fp8_format", [Format.HYBRID, COPIES])
def test_a_history_is_kept_where_one_gemm_is_delayed(where: str, fp8_format: Format) -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    recipe = DelayedScaling(amax_history_len=4, fp8_format=fp8_format)
    convert(model, recipe, overrides={where: BF16})
    x, gradient = 100 * torch.randn(5, 8), 1e-4 * torch.randn(5, 4)
    model(x.requires_grad_()).backward(gradient)
    amaxes = torch.stack([t.abs().max() for t in (x, model[0].weight, gradient)])
    assert torch.equal(model[0].amax_history[-1], amaxes.detach())


def test_delayed_scaling_of_one_gemm_is_refused() -> None:
    for base in (CURRENT, DelayedScaling(amax_history_len=3)):
        model = nn.Sequential(nn.Linear(8, 4))
        with pytest.raises(ValueError, match="input@grad_weight: DelayedScaling, expected") as told:
            convert(model, base, overrides={"*:input@grad_weight": DELAYED})
        assert "\n" not in str(told.value)


def test_a_conversion_that_is_refused_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    expected = model(torch.ones(2, 8))
    with pytest.raises(ValueError, match="DelayedScaling, expected"):
        convert(model, CURRENT, overrides={"1:input@output": DELAYED})
    assert [type(layer) for layer in model] == [nn.Linear] * 3
    assert torch.equal(model(torch.ones(2, 8)), expected)


def test_a_hadamard_transform_under_autocast_of_torch() -> None:
    x = torch.randn(32, 16)
    how = {"direction": "columnwise"}
    outside = fake_quantize(x, NVFP4, "input", **how)  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.bfloat16):
        inside = fake_quantize(x, NVFP4, "input", **how)  # type: ignore[arg-type]
    assert torch.equal(inside, outside)


# --- E5M2 copies under delayed scaling ----------------------------------------------------------


def copies_layer(fp8_format: Format = COPIES, **fields: Any) -> Fp8Linear:
    recipe = DelayedScaling(fp8_format=fp8_format, amax_history_len=3, **fields)
    return Fp8Linear(4, 3, recipes=dict.fromkeys(OPERANDS, recipe))


def step_of(layer: nn.Module, step: int, around: Callable[..., Any] | None = None) -> list[Tensor]:
    """One forward and backward, with amaxes that jump; output and all gradients."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(5, 4, generator=generator) * 10.0 ** (step % 4)
    gradient = torch.randn(5, 3, generator=generator) * 10.0 ** -(step % 3)
    x.requires_grad_()
    layer.zero_grad()
    output = layer(x) if around is None else around(layer, x)
    output.backward(gradient)
    return [output.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]  # type: ignore


@pytest.mark.parametrize("margin", [0, 2])
@pytest.mark.parametrize("fp8_format", [COPIES, GAUDI2])
def test_five_scales(fp8_format: Format, margin: int) -> None:
    layer = copies_layer(fp8_format, margin=margin)
    forward = 448.0 if fp8_format is COPIES else 240.0
    largest = np.float32([forward, forward, 57344, 57344, 57344]) * np.float32(2.0**-margin)
    assert layer.scale.tolist() == [1.0] * 5
    steps = []
    for step in range(8):
        layer.weight.data.mul_(0.3)
        step_of(layer, step)
        steps.append(layer.amax_history[-1].numpy().copy())
        amaxes = np.max(steps[-3:], axis=0)[[0, 1, 2, 0, 1]]
        assert layer.scale.tolist() == (largest / amaxes).tolist()
    assert layer.amax_history.shape == (3, 3)


def test_no_copies_no_scale_for_them() -> None:
    for fp8_format in (Format.HYBRID, Format.GAUDI2, Format.E4M3):
        assert copies_layer(fp8_format).scale.shape == (3,)


def test_copies_travel_in_a_checkpoint() -> None:
    layer, resumed, file = copies_layer(), copies_layer(), io.BytesIO()
    for step in range(3):
        step_of(layer, step)
    torch.save(layer.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file))
    assert len(set(resumed.scale.tolist())) == 5
    for step in range(3, 6):
        for ours, theirs in zip(step_of(layer, step), step_of(resumed, step), strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(layer.scale, resumed.scale)
    before = {"weight": layer.weight, "bias": layer.bias}  # from before the conversion
    copies_layer().load_state_dict(before)
    with pytest.raises(RuntimeError, match="size mismatch for scale"):
        copies_layer(Format.HYBRID).load_state_dict(layer.state_dict())


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_repeated_forward_has_the_copies_of_the_first(reentrant: bool) -> None:
    layer = copies_layer()
    twin = copy.deepcopy(layer)

    def again(module: nn.Module, x: Tensor) -> Any:
        return checkpoint(module, x, use_reentrant=reentrant)

    for step in range(5):
        for ours, theirs in zip(step_of(layer, step), step_of(twin, step, again), strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(layer.scale, twin.scale)


# --- the short accumulator ----------------------------------------------------------------------


def truncated(value: float, bits: int) -> float:
    mantissa, exponent = math.frexp(value)
    return math.ldexp(math.trunc(math.ldexp(mantissa, bits)), exponent - bits)


def in_steps(left: Any, right: Any, bits: int, every: int | None) -> float:
    """One element of the GEMM. Every step of 32 is exact: small integers times powers of two."""
    total = running = np.float32(0)
    for start in range(0, len(left), 32):
        if every is not None and start and start % every == 0:
            total, running = np.float32(total + running), np.float32(0)
        step = sum(left[k] * right[k] for k in range(start, min(start + 32, len(left))))
        running = np.float32(truncated(float(np.float32(running + np.float32(step))), bits))
    return float(np.float32(total + running))


def small(*shape: int) -> Tensor:
    """Products of these, and sums of 32 such products, need 20 bits."""
    return torch.randint(-15, 16, shape) * 2.0 ** torch.randint(-1, 2, shape)


@pytest.mark.parametrize("bits", [2, 8, 14, 23, 24])
@pytest.mark.parametrize("every", [32, 96, 128, None])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 128, 129, 300])
def test_the_accumulator_is_a_scalar_program(bits: int, every: int | None, length: int) -> None:
    left, right = small(3, length), small(length, 2)
    if length > 200:
        left[0], right[:, 0] = left[0].abs(), right[:, 0].abs()  # sums that grow
    accumulation = Accumulation(bits=bits, promote_every=every)
    columns = right.t().tolist()
    wanted = [[in_steps(a, b, bits, every) for b in columns] for a in left.tolist()]
    assert multiply_in_steps(left, right, accumulation).tolist() == wanted


def test_24_bits_never_promoted_are_plain_sums_in_steps() -> None:
    left, right = torch.randn(5, 170), torch.randn(170, 7)
    total = torch.zeros(5, 7)
    for start in range(0, 170, 32):
        total = total + left[:, start : start + 32] @ right[start : start + 32]
    every = Accumulation(bits=24, promote_every=None)
    assert torch.equal(multiply_in_steps(left, right, every), total)


def test_fewer_bits_err_more() -> None:
    left, right = torch.rand(8, 4096), torch.rand(4096, 8)
    exact = left.double() @ right.double()
    for every in (None, 128):
        errors = [
            (multiply_in_steps(left, right, Accumulation(bits=b, promote_every=every)) - exact)
            .abs()
            .max()
            .item()
            for b in (24, 14, 11, 8, 5)
        ]
        assert all(2 * less < more for less, more in pairwise(errors)), errors
    short = [Accumulation(bits=11, promote_every=every) for every in (32, 128, None)]
    lost = [(exact - multiply_in_steps(left, right, a)).mean().item() for a in short]
    assert 0 < 2 * lost[0] < lost[1]  # cut off, so too small, and promotion helps
    assert 2 * lost[1] < lost[2]


def gemms_of(recipe: Any, accumulation: Accumulation | None) -> dict[str, Tensor]:
    """The results of the three GEMMs of one layer, always the same tensors."""
    recipes = recipe if isinstance(recipe, dict) else dict.fromkeys(OPERANDS, recipe)
    torch.manual_seed(3)
    layer = Fp8Linear(96, 72, recipes=recipes, accumulation=accumulation)
    x, gradient = torch.randn(70, 96, requires_grad=True), torch.randn(70, 72)
    output = layer(x)
    output.backward(gradient)
    assert x.grad is not None
    assert layer.weight.grad is not None
    return {"output": output.detach(), "grad_input": x.grad, "grad_weight": layer.weight.grad}


NARROW = [CURRENT, MX, NVFP4, RowwiseScaling(), DELAYED]


@pytest.mark.parametrize("recipe", NARROW, ids=lambda recipe: type(recipe).__name__)
@pytest.mark.parametrize("gemm", ["output", "grad_input", "grad_weight"])
def test_only_the_named_gemms_are_short(recipe: Recipe, gemm: Any) -> None:
    told = Accumulation(bits=6, promote_every=None, gemms=(gemm,))
    plain, short = gemms_of(recipe, None), gemms_of(recipe, told)
    none = gemms_of(recipe, Accumulation(bits=6, gemms=()))
    assert [name for name in plain if not torch.equal(plain[name], short[name])] == [gemm]
    assert all(torch.equal(plain[name], none[name]) for name in plain)


def test_a_short_gemm_is_that_of_its_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Fp8Linear(96, 72, recipes=dict.fromkeys(OPERANDS, MX))
    x, gradient = torch.randn(70, 96), torch.randn(70, 72)
    a, w, g, w_again, g_again, a_again = Caught(layer, x, gradient, monkeypatch).operands
    layer.accumulation, layer.weight.grad = (told := Accumulation(bits=9, promote_every=64)), None
    x.requires_grad_()
    output = layer(x)
    output.backward(gradient)
    assert torch.equal(output, multiply_in_steps(a, w.t(), told) + layer.bias)
    assert torch.equal(x.grad, multiply_in_steps(g, w_again, told))  # type: ignore[arg-type]
    assert torch.equal(layer.weight.grad, multiply_in_steps(g_again.t(), a_again, told))


WIDE: dict[str, tuple[Any, list[str]]] = {
    "input": (dict.fromkeys(OPERANDS, CURRENT) | {"input": BF16}, ["grad_input"]),
    "weight": (dict.fromkeys(OPERANDS, CURRENT) | {"weight": FP32}, ["grad_weight"]),
    "grad_output": (dict.fromkeys(OPERANDS, MX) | {"grad_output": BF16}, ["output"]),
    "bitnet": (BitNetScaling(), ["output"]),
    "rows": (RowwiseScaling(high_precision_grad_weight=True), ["output", "grad_input"]),
    "all": (BF16, []),
}


@pytest.mark.parametrize("name", WIDE)
def test_a_gemm_with_a_wide_operand_is_not_short(name: str) -> None:
    recipe, short = WIDE[name]
    plain = gemms_of(recipe, None)
    cut = gemms_of(recipe, Accumulation(bits=6, promote_every=None))
    assert [gemm for gemm in plain if not torch.equal(plain[gemm], cut[gemm])] == short


def test_a_short_gemm_of_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    convert(model, CURRENT, accumulation=Accumulation())
    model(torch.randn(0, 8, requires_grad=True)).sum().backward()
    assert torch.equal(model[0].weight.grad, torch.zeros(4, 8))
    assert "Accumulation(bits=14" in repr(model)


# --- scales that a kernel moves -----------------------------------------------------------------


@pytest.fixture
def compiled() -> Iterator[None]:
    if reason := kernels.why_unavailable():
        pytest.skip(reason)
    yield


def pick(generator: np.random.Generator) -> float:
    odd = [0.0, 0.0, INF, NAN, 1e-42, 3e38, 1e-38]
    return float(generator.choice(odd) if generator.random() < 0.4 else 10 ** generator.normal())


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
@pytest.mark.parametrize("margin", [0, 3, -2, 135, -149])
@pytest.mark.parametrize("fp8_format", [Format.HYBRID, Format.GAUDI2])
def test_the_kernel_moves_scales_as_the_plain_path(
    algorithm: Any, margin: int, fp8_format: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"amax_compute_algo": algorithm, "margin": margin, "fp8_format": fp8_format}
    lengths = (1, 2, 16)  # of a buffer of 20
    recipes = {o: DelayedScaling(amax_history_len=20, **fields) for o in OPERANDS}
    fast = Fp8Linear(2, 2, recipes=recipes)  # type: ignore[arg-type]
    fast.recipes = {
        o: DelayedScaling(amax_history_len=n, **fields)
        for o, n in zip(OPERANDS, lengths, strict=True)
    }
    fast.amax_history.uniform_(0.1, 9.0)
    slow, calls = copy.deepcopy(fast), []
    move = kernels.move_scale
    monkeypatch.setattr(kernels, "move_scale", lambda *a: (calls.append(a), move(*a)))
    generator = np.random.default_rng(11)
    with np.errstate(all="ignore"):
        for step in range(300):
            amaxes = torch.tensor([pick(generator) for _ in OPERANDS])
            operands = OPERANDS[: step % 3 + 1]
            for layer in (fast, slow):
                layer.amax_history[0] = amaxes
            fast.move_scales(*operands)
            with monkeypatch.context() as within:
                within.setattr(kernels, "usable", lambda tensor: False)
                slow.move_scales(*operands)
            for name in ("amax_history", "scale", "_scale_before"):
                ours, theirs = getattr(fast, name), getattr(slow, name)
                assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32)), (step, name)
    assert len(calls) == 600


def test_scales_of_powers_of_two() -> None:
    recipe = DelayedScaling(
        scaling_factor_compute_algo=power_of_two_scale, amax_history_len=2, fp8_format=GAUDI2
    )
    layer = Fp8Linear(2, 2, recipes=dict.fromkeys(OPERANDS, recipe))
    largest, generator = [240.0, 240.0, 57344.0, 57344.0, 57344.0], np.random.default_rng(1)
    for amax in [*(2.0**k for k in range(-9, 9)), *(10 ** generator.normal(0, 4, 200)), 3e38]:
        for _ in range(2):  # so that the history knows nothing else
            layer.amax_history[0] = amax
            layer.move_scales(*OPERANDS)
        amax = layer.amax_history[1, 0].item()
        for scale, most in zip(layer.scale.tolist(), largest, strict=True):
            assert math.frexp(scale)[0] == 0.5
            assert scale * amax <= most < 2 * scale * amax
    before = layer.scale.tolist()
    for amax in (0.0, INF, NAN):
        layer.amax_history[:] = amax
        layer.move_scales(*OPERANDS)
        assert layer.scale.tolist() == before
    layer.amax_history[:] = 1e-42
    layer.move_scales(*OPERANDS)
    assert layer.scale.tolist() == [2.0**127] * 5


# --- the fused product of a feed-forward --------------------------------------------------------

FUSED: dict[str, Recipe] = {
    "delayed": DelayedScaling(amax_history_len=2),
    "delayed, copies": DelayedScaling(amax_history_len=2, fp8_format=GAUDI2),
    "current": CURRENT,
    "current, powers": Float8CurrentScaling(use_power_2_scales=True),
    "current, copies": Float8CurrentScaling(fp8_format=COPIES),
    "blocks": Float8BlockScaling(),
    "mx": MX,
    "nvfp4": NVFP4,
    "rows": RowwiseScaling(),
    "rows, wide grad_weight": RowwiseScaling(high_precision_grad_weight=True),
    "bitnet": BitNetScaling(),
    "bf16": BF16,
    "fp32": FP32,
}
DIM, HIDDEN = 24, 40


class Written:
    """One projection written out: what its GEMMs read, from `quantize` and the scales of a step."""

    def __init__(self, layer: Any, recipe: Recipe, product: bool = False) -> None:
        self.layer, self.recipe, self.is_product = layer, recipe, product
        delayed = isinstance(recipe, DelayedScaling)
        self.scales = layer.scale.clone() if delayed else None
        self.amaxes: dict[str, float] = {}

    def cast(self, operand: Any, tensor: Tensor, direction: Any) -> Tensor:
        recipe, scale = self.recipe, None
        column = ("input", "weight", "grad_output").index(operand)
        copied = direction == "columnwise" and operand != "grad_output"
        if isinstance(recipe, DelayedScaling):
            assert self.scales is not None
            scale = self.scales[column + 3 if copied and len(self.scales) == 5 else column]
            self.amaxes[operand] = tensor.detach().abs().max().item()
        elif self.is_product and operand == "input" and isinstance(recipe, Float8CurrentScaling):
            fmt = formats.E5M2 if copied and recipe.fp8_format is COPIES else formats.E4M3
            scale = torch.tensor(np.float32(fmt.max) / tensor.detach().abs().max().numpy())
            if recipe.use_power_2_scales:
                scale = torch.exp2(torch.log2(scale.double()).floor()).float()
        if self.is_product and operand == "input" and not isinstance(recipe, DelayedScaling):
            tensor = tensor.bfloat16()
        how = quantize(tensor.detach(), recipe, operand, scale=scale, direction=direction)
        return how.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        """The output in bfloat16."""
        self.x, bias = x, self.layer.bias.detach().float()
        weight = self.cast("weight", self.layer.weight, "rowwise")
        return linear(self.cast("input", x, "rowwise"), weight, bias).bfloat16()

    def backward(self, gradient: Tensor) -> Tensor:
        """grad_input in bfloat16; the parameters' gradients are kept, in their dtypes."""
        weight = self.cast("weight", self.layer.weight, "columnwise")
        grad_input = linear(self.cast("grad_output", gradient, "rowwise"), weight.t())
        again = self.cast("grad_output", gradient, "columnwise")
        grad_weight = linear(again.t(), self.cast("input", self.x, "columnwise").t())
        dtype = self.layer.weight.dtype
        self.grads = [grad_weight.to(dtype), gradient.float().sum(0).to(dtype)]
        return grad_input.bfloat16()

    def check(self) -> None:
        ours = [self.layer.weight.grad, self.layer.bias.grad]
        for grad, expected in zip(ours, self.grads, strict=True):
            assert grad.dtype == self.layer.weight.dtype
            assert torch.equal(grad, expected)
        if isinstance(self.recipe, DelayedScaling):
            wanted = [self.amaxes[operand] for operand in OPERANDS]
            assert self.layer.amax_history[-1].tolist() == wanted


def feed_forward(dtype: torch.dtype = torch.bfloat16, variant: str = "swiglu") -> Any:
    return GatedFeedForward(DIM, HIDDEN, variant, bias=True).to(dtype)


def check_product(
    model: Any, recipe: Recipe, x: Tensor, gradient: Tensor, *by_torch: AbstractContextManager[Any]
) -> None:
    """One step of the model, inside those regions of torch, against the same written out; x and
    gradient [tokens, DIM]."""
    gate, up = Written(model.gate, recipe), Written(model.up, recipe)
    down = Written(model.down, recipe, product=True)
    model.zero_grad()
    x.requires_grad_()
    around_forward, around_backward = by_torch or (nullcontext(), nullcontext())
    with around_forward:
        output = model(x)
    with around_backward:
        output.backward(gradient)

    half = x.detach().bfloat16()
    sides = [one.forward(half).float().requires_grad_() for one in (gate, up)]
    product = F.silu(sides[0]) * sides[1]
    expected = down.forward(product.detach())
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected)
    product.backward(down.backward(gradient).float())
    parts = [
        one.backward(side.grad.bfloat16()).to(x.dtype)  # type: ignore[union-attr]
        for one, side in zip((gate, up), sides, strict=True)
    ]
    assert x.grad is not None
    assert x.grad.dtype == x.dtype
    assert torch.equal(x.grad, parts[0] + parts[1])
    for one in (gate, up, down):
        one.check()


@pytest.mark.parametrize("name", FUSED)
def test_the_product_of_a_bf16_model(name: str) -> None:
    recipe, model = FUSED[name], feed_forward()
    convert(model, recipe)
    for step in range(3):
        x = (30.0**step * torch.randn(37, DIM)).bfloat16()
        check_product(model, recipe, x, torch.randn(37, DIM).bfloat16())


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("backward_too", [False, True])
def test_the_product_under_autocast_of_torch(name: str, backward_too: bool) -> None:
    recipe, model = FUSED[name], feed_forward(torch.float32)
    convert(model, recipe)
    for step in range(3):
        x = 30.0**step * torch.randn(37, DIM)
        regions = [torch.autocast("cpu", torch.bfloat16, enabled=e) for e in (True, backward_too)]
        check_product(model, recipe, x, torch.randn(37, DIM).bfloat16(), *regions)


def test_the_product_is_not_rounded_to_bf16_first() -> None:
    """The three roundings differ, or the tests above could not tell them apart."""
    x, outputs = torch.randn(37, DIM).bfloat16(), {}
    for recipe in (CURRENT, FUSED["delayed"], MX):
        fused = feed_forward()
        alone = copy.deepcopy(fused)
        convert(fused, recipe)
        convert(alone, recipe)
        for layer in (alone.gate, alone.up, alone.down):
            layer.product_in = layer.product_out = None
        outputs[type(recipe)] = torch.equal(fused(x), alone(x))
    assert not any(outputs.values())


@pytest.mark.parametrize("variant", ["swiglu", "geglu", "reglu", "glu"])
@pytest.mark.parametrize("name", FUSED)
def test_float32_models_know_nothing_of_it(name: str, variant: str) -> None:
    model = convert(feed_forward(torch.float32, variant), FUSED[name])
    twin: Any = copy.deepcopy(model)
    for layer in (twin.gate, twin.up, twin.down):
        layer.product_in = layer.product_out = None
    for step in range(3):
        x, gradient = 9.0**step * torch.randn(2, 11, DIM), torch.randn(2, 11, DIM)
        results = []
        for module in (model, twin):
            module.zero_grad()
            leaf = x.clone().requires_grad_()
            output = module(leaf)
            output.backward(gradient)
            grads = [parameter.grad for parameter in module.parameters()]
            results.append([output.detach(), leaf.grad, *grads, *module.buffers()])
        for ours, theirs in zip(*results, strict=True):
            assert ours.dtype == torch.float32
            assert torch.equal(ours, theirs)


class Wrapped(nn.Module):
    """A feed-forward that activation checkpointing repeats."""

    def __init__(self, inner: Any, kind: str) -> None:
        super().__init__()
        self.inner, self.kind = inner, kind

    def forward(self, x: Tensor) -> Any:
        if self.kind == "none":
            return self.inner(x)
        return checkpoint(self.inner, x, use_reentrant=self.kind == "reentrant")


@pytest.mark.parametrize("name", ["delayed", "delayed, copies", "current", "mx", "stochastic"])
@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
@pytest.mark.parametrize("cast_by_torch", [False, True])
def test_checkpointing_a_product_changes_no_bit(name: str, kind: str, cast_by_torch: bool) -> None:
    dtype = torch.float32 if cast_by_torch else torch.bfloat16
    plain = Wrapped(feed_forward(dtype), "none")
    again = copy.deepcopy(plain)
    again.kind = kind
    for model in (plain, again):
        convert(model, NVFP4BlockScaling() if name == "stochastic" else FUSED[name])
    for step in range(4):
        x = (30.0 ** (step % 3) * torch.randn(37, DIM)).to(dtype)
        results = []
        for model in (plain, again):
            torch.manual_seed(step)
            model.zero_grad()
            leaf = x.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=cast_by_torch):
                output = model(leaf)
            output.square().sum().backward()
            grads = [parameter.grad for parameter in model.parameters()]
            results.append([output.detach(), leaf.grad, *grads, *model.buffers()])
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("excluded", ["gate", "up", "down"])
def test_a_product_is_fused_only_among_converted_layers(excluded: str) -> None:
    model: Any = feed_forward()
    whole: Any = copy.deepcopy(model)
    convert(model, CURRENT, exclude=[excluded])
    convert(whole, CURRENT)
    x = torch.randn(5, DIM).bfloat16()
    assert model.product(x).dtype == torch.bfloat16
    assert whole.product(x).dtype == torch.float32
    assert model(x).dtype == whole(x).dtype == torch.bfloat16
    for layer in model.children():
        assert getattr(layer, "product_in", None) is getattr(layer, "product_out", None) is None


def test_two_feed_forwards_share_no_state() -> None:
    model: Any = nn.ModuleDict({"first": feed_forward(), "second": feed_forward(torch.float32)})
    twins = copy.deepcopy(model)
    convert(model, CURRENT)
    for inner in model.values():
        shared = inner.gate.product_out
        assert shared is inner.up.product_out is inner.down.product_in is not None
        assert inner.gate.product_in is inner.up.product_in is inner.down.product_out is None
    assert model["first"].down.product_in is not model["second"].down.product_in
    x = torch.randn(7, DIM)
    # Both gates and ups run before either down.
    half, wide = model["first"].product(x.bfloat16()), model["second"].product(x)
    outputs = [model["first"].down(half), model["second"].down(wide)]
    for twin in twins.values():
        convert(twin, CURRENT)
    expected = [twins["first"](x.bfloat16()), twins["second"](x)]
    for ours, theirs in zip(outputs, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    copied = copy.deepcopy(model)["first"]
    assert copied.gate.product_out is copied.down.product_in is not shared


def test_gradients_of_a_bf16_model_reach_every_parameter_in_its_dtype() -> None:
    model = feed_forward()
    model.up.float()  # as a user may: a parameter keeps its own dtype
    convert(model, FUSED["delayed"])
    model(torch.randn(5, DIM).bfloat16()).float().square().sum().backward()
    for name, parameter in model.named_parameters():
        wide = name.startswith("up")
        assert parameter.grad.dtype == (torch.float32 if wide else torch.bfloat16), name
        assert parameter.grad.abs().sum() > 0, name


def test_a_layer_that_would_run_without_its_casts_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].forward = lambda x, forward=model[0].forward: forward(x)
    with pytest.raises(ValueError, match=r"^convert: 0 has a forward of its own: exclude it"):
        convert(model, CURRENT)


def test_a_transformer_encoder_layer_takes_no_way_around_its_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0).eval()
    model, ran = nn.Sequential(encoder), []
    convert(model, MX, include=("0.linear*",))
    forward = Fp8Linear.forward
    monkeypatch.setattr(Fp8Linear, "forward", lambda self, x: ran.append(1) or forward(self, x))
    with torch.no_grad():
        model(torch.randn(2, 5, 64))
    assert len(ran) == 2
