"""`Fp8Linear` against numpy in float64, and its delayed state against Transformer Engine's kernel.

Two oracles are written here, in plain Python and numpy, sharing no code with the layer. `rounded`
and `reference` make the GEMMs of values rounded one by one; the layer may differ by what FP32
accumulation costs, K · 2^-24 of the sum of magnitudes, and by nothing where operands are small
integers. `bulk_update` transcribes `kernel_bulk` of TE's delayed_scaling.cu; states must be equal.
When these scales move (regions, backward passes, checkpointing) is in test_linear_steps.
"""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fp8lab import formats
from fp8lab.linear import Fp8Linear
from fp8lab.recipe import OPERANDS, DelayedScaling, Float8CurrentScaling, Format, HighPrecision
from fp8lab.rewriting import Rewritten

FLOAT32_MAX = np.finfo(np.float32).max
INPUT, WEIGHT, GRADIENT = range(3)
BF16, FP32 = HighPrecision(), HighPrecision(format=formats.FP32)
CURRENT, DELAYED = Float8CurrentScaling(), DelayedScaling(amax_history_len=4)
INF, NAN = math.inf, math.nan


def each(recipe: Any) -> dict[Any, Any]:
    return dict.fromkeys(OPERANDS, recipe)


def layer_with(recipe: Any, in_features: int = 16, out_features: int = 8, bias: bool = True) -> Any:
    recipes = recipe if isinstance(recipe, dict) else each(recipe)
    return Fp8Linear(in_features, out_features, bias, recipes=recipes)


# --- the three GEMMs --------------------------------------------------------------------------


def rounded(tensor: Tensor, recipe: Any, operand: str, scale: float) -> np.ndarray:
    """float64: what the GEMM reads. FloatFormat.round for each element, scales in numpy float32."""
    values = tensor.detach().float().numpy()
    if isinstance(recipe, HighPrecision):
        return np.vectorize(recipe.format.round, otypes=[float])(values)
    fmt = formats.E4M3
    if operand == "grad_output" and recipe.fp8_format == Format.HYBRID:
        fmt = formats.E5M2
    factor = np.float32(scale)
    if isinstance(recipe, Float8CurrentScaling):
        amax = np.abs(values).max(initial=0)
        factor = np.float32(fmt.max) / amax if amax > 0 else np.float32(1)
        if recipe.use_power_2_scales:
            factor = np.float32(2.0 ** math.floor(math.log2(factor)))
    codes = np.vectorize(fmt.round, otypes=[np.float32])(values * factor)
    return (codes * (np.float32(1) / factor)).astype(np.float64)


def reference(x: Any, layer: Any, gradient: Any, scales: list[float]) -> dict[str, Any]:
    """name -> (exact value, bound of what FP32 accumulation may do), float64."""
    inputs, outputs = layer.in_features, layer.out_features
    a = rounded(x, layer.recipes["input"], "input", scales[0]).reshape(-1, inputs)
    w = rounded(layer.weight, layer.recipes["weight"], "weight", scales[1])
    g = rounded(gradient, layer.recipes["grad_output"], "grad_output", scales[2])
    g = g.reshape(-1, outputs)
    raw = gradient.detach().double().numpy().reshape(-1, outputs)
    bias = np.zeros(outputs) if layer.bias is None else layer.bias.detach().double().numpy()
    tokens, unit = len(a), 2.0**-24

    def product(left: Any, right: Any, terms: int, shape: Any, plus: Any = 0.0) -> Any:
        magnitudes = np.abs(left) @ np.abs(right) + np.abs(plus)
        bound = 1.01 * (terms + 1) * unit * magnitudes
        return (left @ right + plus).reshape(shape), bound.reshape(shape)

    lead = tuple(x.shape[:-1])
    return {
        "output": product(a, w.T, inputs, (*lead, outputs), bias),
        "grad_input": product(g, w, outputs, (*lead, inputs)),
        "grad_weight": product(g.T, a, tokens, (outputs, inputs)),
        "grad_bias": (raw.sum(0), 1.01 * tokens * unit * np.abs(raw).sum(0)),
    }


def run(layer: Any, x: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    output = layer(x)
    output.backward(gradient.to(output.dtype))
    grads = {"grad_input": x.grad, "grad_weight": layer.weight.grad}
    if layer.bias is not None:
        grads["grad_bias"] = layer.bias.grad
    return {"output": output.detach(), **grads}


RECIPES = {
    "bf16": each(BF16),
    "fp32": each(FP32),
    "current": each(CURRENT),
    "current-e4m3": each(Float8CurrentScaling(fp8_format=Format.E4M3)),
    "current-powers": each(Float8CurrentScaling(use_power_2_scales=True)),
    "delayed": each(DELAYED),
    "mixed": {"input": CURRENT, "weight": BF16, "grad_output": DELAYED},
    "mixed-too": {"input": DELAYED, "weight": CURRENT, "grad_output": FP32},
}
SHAPES = [(16,), (6, 16), (2, 3, 16), (0, 16), (2, 0, 16)]
NO_FEATURES = "ignore:Initializing zero-element tensors"


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_gemms_are_those_of_float64(name: str, shape: Any, bias: bool) -> None:
    layer, scales = layer_with(RECIPES[name], bias=bias), [37.0, 1000.0, 3e4]
    if hasattr(layer, "scale"):
        layer.scale.copy_(torch.tensor(scales))
    x, gradient = 3 * torch.randn(shape), 0.01 * torch.randn(*shape[:-1], 8)
    expected = reference(x, layer, gradient, scales)
    for what, actual in run(layer, x, gradient).items():
        value, bound = expected[what]
        assert actual.dtype == torch.float32
        assert actual.shape == value.shape, what
        assert (np.abs(actual.numpy() - value) <= bound).all(), what


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gemms_of_small_integers_are_exact(name: str, dtype: torch.dtype) -> None:
    layer = layer_with(RECIPES[name])
    for parameter in layer.parameters():
        parameter.data = torch.randint(-7, 8, parameter.shape).float()
    x, gradient = torch.randint(-7, 8, (5, 16)).float(), torch.randint(-4, 5, (5, 8)).float()
    # amax 7 makes scales of 448 / 7 and 57344 / 7: powers of two.
    x[0, 0], layer.weight.data[0, 0], gradient[0, 0] = 7.0, -7.0, 7.0
    expected = reference(x, layer, gradient, [1.0, 1.0, 1.0])
    for what, actual in run(layer, x.to(dtype), gradient.to(dtype)).items():
        wide = what in ("grad_weight", "grad_bias")
        wanted = torch.from_numpy(expected[what][0]).to(torch.float32 if wide else dtype)
        assert actual.dtype == wanted.dtype
        assert torch.equal(actual, wanted), what


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_fp32_is_nn_linear_to_the_bit(shape: Any, bias: bool) -> None:
    layer, plain = layer_with(FP32, bias=bias), nn.Linear(16, 8, bias)
    plain.load_state_dict(layer.state_dict())
    x, gradient = torch.randn(shape), torch.randn(*shape[:-1], 8)
    ours, theirs = run(layer, x, gradient), run(plain, x, gradient)
    assert list(ours) == list(theirs)
    for what in ours:
        assert torch.equal(ours[what], theirs[what]), what


@pytest.mark.parametrize("name", RECIPES)
def test_autocast_of_torch_is_an_input_in_bf16(name: str) -> None:
    layer = layer_with(RECIPES[name])
    twin = copy.deepcopy(layer)
    x, gradient = torch.randn(5, 16), torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(layer, x, gradient)
    outside = run(twin, x.bfloat16(), gradient)
    assert inside["output"].dtype == torch.bfloat16
    assert inside["grad_input"].dtype == torch.float32
    for what in inside:
        assert torch.equal(inside[what].float(), outside[what].float()), what


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool])
def test_autocast_of_torch_lets_nothing_in_that_is_refused(name: str, dtype: torch.dtype) -> None:
    x = torch.ones(3, 16, dtype=dtype)
    for layer in (layer_with(RECIPES[name]), nn.Linear(16, 8)):
        with torch.autocast("cpu", torch.bfloat16), pytest.raises((ValueError, RuntimeError)):
            layer(x)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_may_be_changed_in_place(name: str, shape: Any, dtype: torch.dtype) -> None:
    layer = layer_with(RECIPES[name])
    twin = copy.deepcopy(layer)
    x, other = torch.randn(shape).to(dtype), torch.randn(*shape[:-1], 8).to(dtype)
    output = layer(x)
    output += other
    nn.ReLU(inplace=True)(output).square().sum().backward()
    nn.ReLU()(twin(x) + other).square().sum().backward()
    assert torch.equal(layer.weight.grad, twin.weight.grad)
    assert torch.equal(layer.bias.grad, twin.bias.grad)


@pytest.mark.filterwarnings(NO_FEATURES)
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("sizes", [(0, 4), (4, 0)])
def test_no_features(name: str, sizes: tuple[int, int]) -> None:
    layer, x = layer_with(RECIPES[name], *sizes), torch.randn(3, sizes[0], requires_grad=True)
    output = layer(x)
    output.backward(torch.ones(3, sizes[1]))
    assert torch.equal(output, layer.bias.expand(3, sizes[1]))
    assert torch.equal(x.grad, torch.zeros(3, sizes[0]))
    assert torch.equal(layer.weight.grad, torch.zeros(sizes[::-1]))


def test_the_bias_gradient_is_not_quantized() -> None:
    layer = layer_with(CURRENT, 2, 2)
    gradient = torch.tensor([[1.0 + 2.0**-20, 1e-30], [1.0, 3.0]])
    assert torch.equal(run(layer, torch.ones(2, 2), gradient)["grad_bias"], gradient.sum(0))


def test_double_backward_is_refused() -> None:
    x = torch.randn(3, 16, requires_grad=True)
    loss = layer_with(CURRENT)(x).square().sum()
    with pytest.raises(RuntimeError, match=r"^Fp8Linear: create_graph=True, expected False"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_the_gradient_of_saturated_inputs() -> None:
    layer = layer_with(DELAYED, 6, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0, 32.0]])
    # The first scale is 1. 450 rounds to 448 like any other value, but it lies beyond max.
    x = torch.tensor([[448.0, 450.0, -1e9, INF, -448.0, 0.0], [1.0, 0.5, 449.0, NAN, -INF, -3.0]])
    passed = torch.tensor([[1.0, 2, 4, 8, 16, 32]] * 2)
    stopped = torch.tensor([[1.0, 0, 0, 0, 16, 32], [1.0, 2, 0, 8, 0, 32]])
    for mode, expected in (("straight_through", passed), ("zero", stopped)):
        fresh = copy.deepcopy(layer)
        fresh.gradient_of_saturated = mode
        result = run(fresh, x, torch.ones(2, 1))
        assert torch.equal(result["grad_input"], expected)
        saturated_input = torch.tensor([[449.0, 448.5, 0, NAN, -896.0, -3.0]])
        assert torch.equal(result["grad_weight"][0, 4:], saturated_input[0, 4:])


def test_current_scaling_stops_no_gradient() -> None:
    layer = layer_with(CURRENT, 4, 4)
    layer.gradient_of_saturated = "zero"
    twin = copy.deepcopy(layer)
    twin.gradient_of_saturated = "straight_through"
    for _ in range(100):
        x, gradient = torch.randn(1, 4), torch.randn(1, 4)
        ours, theirs = run(layer, x, gradient), run(twin, x, gradient)
        assert torch.equal(ours["grad_input"], theirs["grad_input"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_channel_scale_of_powers_of_two_changes_nothing_in_fp32(dtype: torch.dtype) -> None:
    layer = layer_with(FP32)
    twin = copy.deepcopy(layer)
    powers = torch.tensor([2.0**k for k in range(-8, 8)])
    layer.rewrite = lambda tensor, weight: Rewritten(tensor * powers, weight / powers, powers)
    x, gradient = torch.randn(5, 16).to(dtype), torch.randn(5, 8)
    ours, theirs = run(layer, x, gradient), run(twin, x, gradient)
    for what in ours:
        assert ours[what].dtype == theirs[what].dtype, what
        assert torch.equal(ours[what], theirs[what]), what


def test_a_channel_scale_moves_what_is_cast() -> None:
    layer = layer_with(CURRENT, 2, 1, bias=False)
    scale = torch.tensor([2.0**-10, 1.0])
    layer.rewrite = lambda tensor, weight: Rewritten(tensor * scale, weight / scale, scale)
    x = torch.tensor([[1024.0, 1.0]])
    how = layer.cast_in_force("input", x)
    assert torch.equal(how.tensor, torch.tensor([[1.0, 1.0]]))
    assert how.scale == 448.0
    assert torch.equal(how.channel_scale, torch.tensor([2.0**-10, 1.0]))
    layer.weight.data = torch.tensor([[1.0, 64.0]])
    # weight / channel_scale = [1024, 64]; without the scale 1 would be flushed beside 1024.
    assert layer(x).item() == 1024 + 64


# --- delayed state: Transformer Engine's kernel -------------------------------------------------


def bulk_update(history: list[Any], scale: Any, algorithm: str, largest: float) -> Any:
    """`kernel_bulk` of TE's delayed_scaling.cu for one tensor: (history, scale), float32.

    fmaxf ignores NaN. `largest` is scaled_max: the format's, times 2^-margin.
    """
    length, last, amax = len(history), history[0], np.float32(0)
    if last != 0:  # NaN != 0
        shifted = [*history[1:], last]
        for value in shifted:
            amax = np.fmax(amax, value)
        history = [np.float32(0) if i == 0 else shifted[i] for i in range(length)]
    if algorithm == "most_recent":
        amax = last
    if np.isfinite(amax) and amax > 0:
        with np.errstate(over="ignore"):
            scale = np.float32(largest) / amax
    return history, min(scale, FLOAT32_MAX)


def unfused_update(history: list[Any], scale: Any, function: Any, largest: float) -> Any:
    """`_amax_and_scale_update` of TE's quantization.py, which a function as algorithm goes through:
    it is asked at every step, and the history always rolls."""
    amax = np.float32(function(torch.tensor(history)).item())
    if np.isfinite(amax) and amax > 0:
        with np.errstate(over="ignore"):
            scale = np.float32(largest) / amax
    return [np.float32(0), *history[2:], history[0]][: len(history)], min(scale, FLOAT32_MAX)


ALGORITHMS: dict[str, Any] = {
    "max": "max",
    "most_recent": "most_recent",
    # As written for TE, whose history has a column per tensor; NaN-safe, as TE's own is not.
    "function": lambda history: torch.max(history, dim=0).values,
}


def trajectory(steps: int) -> list[list[float]]:
    """amaxes of (input, weight, gradient) by step: quiet, jumping, and the three odd ones."""
    generator = np.random.default_rng(7)
    amaxes = np.float32(10 ** generator.uniform(-3, 3, (steps, 3)))
    odd = generator.uniform(size=(steps, 3))
    amaxes[odd < 0.25] = 0.0
    amaxes[(odd > 0.25) & (odd < 0.32)] = np.inf
    amaxes[(odd > 0.32) & (odd < 0.36)] = 1e-42
    amaxes[20:30] = np.float32(1e-3)  # a calm stretch right after whatever came before
    amaxes[20] = 900.0
    return amaxes.tolist()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("length", [1, 3, 16])
@pytest.mark.parametrize("margin", [0, 2, -1])
def test_a_trajectory_is_that_of_te(algorithm: str, length: int, margin: int) -> None:
    recipe = DelayedScaling(
        amax_history_len=length, amax_compute_algo=ALGORITHMS[algorithm], margin=margin
    )
    layer = layer_with(recipe, 3, 2, bias=False)
    update = unfused_update if algorithm == "function" else bulk_update
    history = [[np.float32(0)] * length for _ in range(3)]
    scale = [np.float32(1)] * 3
    largest = [fmt.max * 2.0**-margin for fmt in (formats.E4M3, formats.E4M3, formats.E5M2)]
    for step, amaxes in enumerate(trajectory(200)):
        x = torch.tensor([[-amaxes[INPUT], 0.0, NAN if step % 3 == 0 else 0.0]])
        layer.weight.data = torch.tensor([[0.0, amaxes[WEIGHT], 0.0], [0.0, 0.0, 0.0]])
        gradient = torch.tensor([[0.0, -amaxes[GRADIENT]]])
        run(layer, x, gradient)
        for column in range(3):
            history[column][0] = np.float32(amaxes[column])
            history[column], scale[column] = update(
                history[column], scale[column], ALGORITHMS[algorithm], largest[column]
            )
        assert layer.amax_history.t().tolist() == history, step
        assert layer.scale.tolist() == scale, step


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
def test_a_nan_in_the_history_is_passed_over_as_in_te(algorithm: str) -> None:
    # No kernel writes one, but a checkpoint may bring one.
    recipe = DelayedScaling(amax_history_len=3, amax_compute_algo=algorithm)
    layer = layer_with(recipe, 3, 2)
    history, scale = [np.float32(0)] * 3, np.float32(1)
    for amax in (2.0, NAN, 0.0, 3.0, NAN, NAN, NAN, 5.0):
        layer.amax_history[0, INPUT] = amax
        layer.move_scales("input")
        history[0] = np.float32(amax)
        history, scale = bulk_update(history, scale, algorithm, 448.0)
        assert layer.scale[INPUT].item() == scale
        np.testing.assert_array_equal(layer.amax_history[:, INPUT].numpy(), history)


def test_operands_may_have_histories_of_their_own() -> None:
    recipes = {
        "input": DelayedScaling(amax_history_len=2),
        "weight": CURRENT,
        "grad_output": DelayedScaling(amax_history_len=5, fp8_format=Format.E4M3),
    }
    layer = layer_with(recipes, 1, 1, bias=False)
    for amax in (8.0, 4.0, 2.0, 1.0):
        run(layer, torch.tensor([[amax]]), torch.tensor([[amax]]))
    assert layer.amax_history.shape == (5, 3)
    assert layer.amax_history[:, INPUT].tolist() == [0, 1, 0, 0, 0]
    assert layer.amax_history[:, WEIGHT].tolist() == [0] * 5
    assert layer.amax_history[:, GRADIENT].tolist() == [0, 8, 4, 2, 1]
    assert layer.scale.tolist() == [448 / 2, 1.0, 448 / 8]


def test_state_is_float32_whatever_the_default_dtype_is() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = layer_with(DELAYED, 8, 4).float()
        state = {name: layer.get_buffer(name) for name in ("amax_history", "scale")}
        assert {tensor.dtype for tensor in state.values()} == {torch.float32}
        run(layer, torch.full((2, 8), 3.0), torch.ones(2, 4))
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.scale[0] == torch.div(torch.tensor(448.0), 3.0)
    rounded = {name: tensor.bfloat16() for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(rounded, assign=True)
    assert layer.amax_history.dtype == layer.scale.dtype == torch.float32


def test_a_checkpoint_without_fp8_state_starts_it_afresh() -> None:
    layer = layer_with(DELAYED, 8, 4)
    plain = {name: layer.state_dict()[name].clone() for name in ("weight", "bias")}
    run(layer, torch.full((2, 8), 3.0), torch.ones(2, 4))
    assert layer.scale[0] != 1.0
    layer.load_state_dict({}, strict=False)  # nothing of this layer is in it
    assert layer.scale[0] != 1.0
    layer.load_state_dict(plain)
    assert layer.scale.tolist() == [1.0] * 3 and not layer.amax_history.any()
    on_meta = layer_with(DELAYED, 8, 4).to("meta").to_empty(device="cpu")
    on_meta.reset_parameters()
    assert on_meta.scale.tolist() == [1.0] * 3 and not on_meta.amax_history.any()


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ("torch.set_float32_matmul_precision('medium')", "bf16"),
        ("torch.backends.mkldnn.matmul.fp32_precision = 'bf16'", "bf16"),
        ("torch.backends.fp32_precision = 'tf32'", "tf32"),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", None),
        ("torch.backends.cudnn.fp32_precision = 'tf32'", None),
    ],
)
def test_a_low_matmul_precision_is_refused_where_it_matters(
    settings: str, refused: str | None
) -> None:
    # In a process of its own: torch cannot be brought back to what it was before.
    code = f"""
import torch, fp8lab
from fp8lab.linear import Fp8Linear
{settings}
recipes = dict.fromkeys(("input", "weight", "grad_output"), fp8lab.Float8CurrentScaling())
Fp8Linear(16, 8, recipes=recipes)(torch.randn(3, 16)).sum().backward()
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if refused is None:
        assert ran.returncode == 0, ran.stderr
    else:
        said = f"RuntimeError: Fp8Linear: float32 matmul precision '{refused}', expected 'ieee'"
        assert ran.stderr.splitlines()[-1] == said
