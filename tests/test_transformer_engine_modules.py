"""fp8lab's converted layers against Transformer Engine's own modules, on a CPU.

`te.Linear` and `te.LayerNormMLP` run by TE's Python on a stand-in for its compiled extension, which
does the arithmetic. So these tests show *wiring* and no number: which tensor is cast when, by whose
scale, when that moves, and which codes enter which GEMM. What TE computes outside of FP8 layers,
the norm, is the same function on both sides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformer_engine_on_cpu as worker
from torch import Tensor, nn
from transformer_engine_on_cpu import TransformerEngine, assert_same_bits
from transformer_engine_stand_in import NORM_EPSILON

from fp8lab import GatedFeedForward, autocast, convert
from fp8lab.recipe import DelayedScaling, Float8CurrentScaling, Format

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module")
def te() -> Iterator[TransformerEngine]:
    with TransformerEngine() as running:
        yield running


TOKENS, DIM, HIDDEN = 24, 32, 48
DELAYED = {"amax_history_len": 3}
RECIPES = {
    "delayed max": DelayedScaling(**DELAYED),
    "delayed most_recent": DelayedScaling(amax_compute_algo="most_recent", margin=1, **DELAYED),
    "delayed E4M3": DelayedScaling(fp8_format=Format.E4M3, **DELAYED),
    "current": Float8CurrentScaling(),
    "current E4M3": Float8CurrentScaling(fp8_format=Format.E4M3),
}


def to_worker(ours: DelayedScaling | Float8CurrentScaling) -> tuple[str, dict[str, Any]]:
    """A recipe as the worker takes it: TE's class name and the fields that are not the default."""
    values = {field.name: getattr(ours, field.name) for field in dataclasses.fields(ours)}
    fields = {
        field.name: getattr(values[field.name], "name", values[field.name])
        for field in dataclasses.fields(ours)
        if values[field.name] != field.default
    }
    return type(ours).__name__, fields


def batches(width_out: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Six steps of inputs and output gradients, whose amax grows and falls by an order a step."""
    sizes = torch.tensor([1.0, 3.0, 40.0, 0.2, 0.01, 5.0])[:, None, None]
    inputs = torch.randn(6, TOKENS, DIM) * sizes
    gradients = torch.randn(6, TOKENS, width_out) * sizes.flip(0) * 0.1
    inputs[:, 3, 5] *= 30  # saturates where the scale is of a smaller step
    return inputs.to(dtype), gradients.to(dtype)


def our_steps(
    model: nn.Module, inputs: Tensor, gradients: Tensor, learning_rate: float
) -> Iterator[dict[str, Tensor]]:
    """The same steps as the worker's `train`, of a converted model."""
    for given, gradient in zip(inputs, gradients, strict=True):
        step = given.clone().requires_grad_()
        model.zero_grad(set_to_none=True)
        output = model(step)
        output.backward(gradient)
        seen = {"output": output.detach(), "input.grad": step.grad}
        for name, parameter in model.named_parameters():
            seen[f"{name}.grad"] = parameter.grad.clone()
            with torch.no_grad():
                parameter.sub_(learning_rate * parameter.grad)
        seen |= {name: buffer.clone() for name, buffer in model.named_buffers()}
        yield seen


def assert_state(
    mine: dict[str, Tensor], theirs: dict[str, Tensor], layer: str, columns: tuple[int, int, int]
) -> None:
    """TE has a column per tensor of a module, forward and backward apart; ours one per operand."""
    for kind in ("scale", "amax_history"):
        ways = ("forward", "forward", "backward")
        for ours, (way, column) in enumerate(zip(ways, columns, strict=True)):
            assert_same_bits(
                mine[f"{layer}.{kind}"][..., ours], theirs[f"{way} {kind}"][..., column]
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RECIPES)
def test_linear(te: TransformerEngine, name: str, dtype: torch.dtype) -> None:
    """Equal: output, three gradients, and after every step scale and history.

    Only in BF16 has the layer a bias; see the next test.
    """
    bias = dtype == torch.bfloat16
    model = nn.Sequential(nn.Linear(DIM, HIDDEN, bias=bias, dtype=dtype))
    parameters = {k.partition(".")[2]: v.clone() for k, v in model.state_dict().items()}
    inputs, gradients = batches(HIDDEN, dtype)
    settings = {"in_features": DIM, "out_features": HIDDEN, "bias": bias}
    theirs = te(
        worker.train,
        *("Linear", settings, parameters, inputs, gradients, to_worker(RECIPES[name])),
        learning_rate=0.1,
    )
    convert(model, RECIPES[name])
    for mine, step in zip(our_steps(model, inputs, gradients, 0.1), theirs, strict=True):
        assert_same_bits(mine["output"], step["output"])
        assert_same_bits(mine["input.grad"], step["input.grad"])
        for parameter in parameters:
            assert_same_bits(mine[f"0.{parameter}.grad"], step[f"{parameter}.grad"])
        if name.startswith("delayed"):
            assert_state(mine, step, "0", (0, 1, 0))


def test_power_of_two_scales_are_not_what_the_field_says_in_te(te: TransformerEngine) -> None:
    """TE's modules go by the recipe's `QParams`, class attributes that the environment sets, and
    `use_power_2_scales` changes nothing: that run is ours without. (So `to_te` refuses ours with.)
    """
    asked = Float8CurrentScaling(use_power_2_scales=True)
    model = nn.Sequential(nn.Linear(DIM, HIDDEN, bias=False))
    parameters = {"weight": model[0].weight.detach().clone()}
    inputs, gradients = batches(HIDDEN, torch.float32)
    settings = {"in_features": DIM, "out_features": HIDDEN, "bias": False}
    theirs = te(worker.train, "Linear", settings, parameters, inputs, gradients, to_worker(asked))
    convert(model, Float8CurrentScaling())
    for mine, step in zip(our_steps(model, inputs, gradients, 0.0), theirs, strict=True):
        assert_same_bits(mine["output"], step["output"])
        assert_same_bits(mine["0.weight.grad"], step["weight.grad"])


class Norm(nn.Module):
    """RMSNorm as the stand-in has it: FP32 inside, rounded once."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(DIM, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), (DIM,), self.weight.float(), NORM_EPSILON)
        return normed.to(x.dtype)


class Fused(nn.Module):
    """A SwiGLU whose gate and up are one layer, as TE's fc1 is."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm(torch.float32)
        self.gate_up = nn.Linear(DIM, 2 * HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(self.norm(x)).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


MLP = {
    "hidden_size": DIM,
    "ffn_hidden_size": HIDDEN,
    "bias": False,
    "normalization": "RMSNorm",
    "activation": "swiglu",
}


@pytest.mark.parametrize("name", RECIPES)
def test_layernorm_mlp_in_fp32(te: TransformerEngine, name: str) -> None:
    """Equal in everything, with gate and up in one layer: they share a scale then, as in TE."""
    model = Fused()
    names = {
        "layer_norm_weight": "norm.weight",
        "fc1_weight": "gate_up.weight",
        "fc2_weight": "down.weight",
    }
    parameters = {theirs: model.state_dict()[ours].clone() for theirs, ours in names.items()}
    inputs, gradients = batches(DIM, torch.float32)
    theirs = te(
        worker.train,
        *("LayerNormMLP", MLP, parameters, inputs, gradients, to_worker(RECIPES[name])),
        learning_rate=0.1,
    )
    convert(model, RECIPES[name])
    for mine, step in zip(our_steps(model, inputs, gradients, 0.1), theirs, strict=True):
        assert_same_bits(mine["output"], step["output"])
        assert_same_bits(mine["input.grad"], step["input.grad"])
        for parameter, ours in names.items():
            assert_same_bits(mine[f"{ours}.grad"], step[f"{parameter}.grad"])
        if name.startswith("delayed"):
            assert_state(mine, step, "gate_up", (0, 1, 0))
            assert_state(mine, step, "down", (3, 4, 2))


@pytest.mark.parametrize("name", ["delayed max", "current"])
def test_the_bias_of_an_fp32_model_is_rounded_to_bf16_by_te(
    te: TransformerEngine, name: str
) -> None:
    """cuBLAS's FP8 GEMM takes no FP32 bias, so TE's Python rounds it to BF16 before each one, and
    only it: the parameter and its gradient stay FP32. fp8lab adds the FP32 bias.
    """
    linear = nn.Linear(DIM, HIDDEN)
    parameters = {name: value.clone() for name, value in linear.state_dict().items()}
    inputs, gradients = batches(HIDDEN, torch.float32)
    settings = {"in_features": DIM, "out_features": HIDDEN, "bias": True}
    theirs = te(
        worker.train,
        *("Linear", settings, parameters, inputs, gradients, to_worker(RECIPES[name])),
    )
    rounded = nn.Sequential(linear)
    with torch.no_grad():
        linear.bias.copy_(linear.bias.bfloat16())
    assert (linear.bias != parameters["bias"]).any()
    convert(rounded, RECIPES[name])
    for mine, step in zip(our_steps(rounded, inputs, gradients, 0.0), theirs, strict=True):
        for key in ("output", "input.grad"):
            assert_same_bits(mine[key], step[key])
        assert_same_bits(mine["0.bias.grad"], step["bias.grad"])
        assert_same_bits(mine["0.weight.grad"], step["weight.grad"])


class Separate(nn.Module):
    """A norm and fp8lab's own feed-forward, whose gate and up are two layers; in BF16 with biases
    (TE rounds those of an FP32 model, see above)."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = Norm(dtype)
        self.mlp = GatedFeedForward(DIM, HIDDEN, bias=dtype == torch.bfloat16).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm(x))


def separate_and_its_steps(
    te: TransformerEngine,
    ours: DelayedScaling | Float8CurrentScaling,
    dtype: torch.dtype,
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """(ours, TE's) per step of `Separate` and of LayerNormMLP with the same weights, which stay:
    the norm's gradient is near TE's and not equal, and a step along it would part the two.

    The largest weight of gate and of up are made equal: TE's fc1 has one scale for both.
    With `return_layernorm_output` TE's norm returns the model's dtype and fc1 casts that; without
    it the fused norm kernel casts its FP32 result, which no norm outside of the layer can do.
    """
    model = Separate(dtype)
    with torch.no_grad():
        model.mlp.gate.weight[0, 0] = model.mlp.up.weight[0, 0] = 0.5
    fc1 = torch.cat([model.mlp.gate.weight, model.mlp.up.weight]).detach()
    parameters = {
        "layer_norm_weight": model.norm.weight.detach().clone(),
        "fc1_weight": fc1,
        "fc2_weight": model.mlp.down.weight.detach().clone(),
    }
    bias = model.mlp.down.bias is not None
    if bias:
        both = [model.mlp.gate.bias.detach(), model.mlp.up.bias.detach()]
        parameters |= {
            "fc1_bias": torch.cat(both),
            "fc2_bias": model.mlp.down.bias.detach().clone(),
        }
    inputs, gradients = batches(DIM, dtype)
    theirs = te(
        worker.train,
        *("LayerNormMLP", {**MLP, "bias": bias, "return_layernorm_output": True}),
        *(parameters, inputs, gradients, to_worker(ours)),
        gemm_block=HIDDEN,
    )
    convert(model, ours)
    return zip(our_steps(model, inputs, gradients, 0.0), theirs, strict=True)


def assert_input_gradient_is_near(mine: Tensor, theirs: Tensor) -> None:
    """TE sums what comes back through gate and up in one GEMM and rounds once; two layers round
    twice, and autograd rounds their sum: each time by at most 2^-9 of a BF16 number (2^-24 of an
    FP32 one), of terms that may cancel in part. The norm's backward, linear, passes that on.
    """
    unit = torch.finfo(mine.dtype).eps / 2
    assert (mine.float() - theirs.float()).norm() <= 4 * unit * theirs.float().norm()
    assert theirs.float().norm() > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_feed_forward_under_delayed_scaling(
    te: TransformerEngine, dtype: torch.dtype
) -> None:
    """Equal: the output, all parameters' gradients, the state of every operand, in BF16 too, where
    TE's kernel casts the FP32 product and fp8lab's `convert` must.

    An `amax_compute_algo` that always says 7 makes the scales of the shared fc1 and of the two
    layers the same; what is seen of the gradient of fc1 is the larger of the two layers'.
    """
    ours = DelayedScaling(amax_history_len=3, amax_compute_algo=worker.seven)
    for mine, step in separate_and_its_steps(te, ours, dtype):
        assert_same_bits(mine["output"], step["output"])
        for kind in ("weight", "bias") if dtype == torch.bfloat16 else ("weight",):
            gate, up = (mine[f"mlp.{half}.{kind}.grad"] for half in ("gate", "up"))
            assert_same_bits(torch.cat([gate, up]), step[f"fc1_{kind}.grad"])
            assert_same_bits(mine[f"mlp.down.{kind}.grad"], step[f"fc2_{kind}.grad"])
        assert_input_gradient_is_near(mine["input.grad"], step["input.grad"])
        assert_state(mine, step, "mlp.down", (3, 4, 2))
        larger = torch.maximum(*(mine[f"mlp.{half}.amax_history"] for half in ("gate", "up")))
        assert_same_bits(larger[:, :2], step["forward amax_history"][:, :2])
        assert_same_bits(larger[:, 2], step["backward amax_history"][:, 0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_feed_forward_under_current_scaling(
    te: TransformerEngine, dtype: torch.dtype
) -> None:
    """Equal: the output, the gradient of down's weight, and that of gate's or up's, the one whose
    incoming gradient has the larger amax; the other is cast with its own scale, and by TE with
    the one it shares. In BF16 TE takes the product's amax in FP32 and casts it rounded to BF16.
    """
    for mine, step in separate_and_its_steps(te, Float8CurrentScaling(), dtype):
        assert_same_bits(mine["output"], step["output"])
        assert_same_bits(mine["mlp.down.weight.grad"], step["fc2_weight.grad"])
        halves = zip(("gate", "up"), step["fc1_weight.grad"].chunk(2), strict=True)
        same = [torch.equal(mine[f"mlp.{half}.weight.grad"], theirs) for half, theirs in halves]
        assert any(same)


# --- when scales move --------------------------------------------------------------------------


def states_along(
    te: TransformerEngine, loop: list[Callable[..., None]], sizes: list[float] | None = None
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """(ours, TE's) scales and histories after each part of a training loop; `sizes` are those of
    the inputs and gradients of each part."""
    factors = torch.tensor(sizes or [4.0**-part for part in range(len(loop))])[:, None, None, None]
    inputs = torch.randn(len(loop), 2, TOKENS, DIM) * factors
    inputs[:, 1] *= 3
    gradients = torch.randn(len(loop), 2, TOKENS, HIDDEN) * factors
    gradients[:, 1] *= 3
    linear = nn.Linear(DIM, HIDDEN, bias=False)
    fields = {"amax_history_len": 3, "amax_compute_algo": "most_recent"}
    weight = linear.weight.detach().clone()
    theirs = te(worker.states_of_linear, loop, weight, inputs, gradients, fields)
    model = convert(nn.Sequential(linear), DelayedScaling(**fields))
    for part, given, gradient, state in zip(loop, inputs, gradients, theirs, strict=True):
        part(model, autocast, given, gradient)
        yield {name: buffer.clone() for name, buffer in model.named_buffers()}, state


@pytest.mark.parametrize(
    "part",
    [
        worker.two_micro_batches,
        worker.two_forwards,
        worker.backward_inside,
        worker.forward_alone,
    ],
    ids=lambda part: part.__name__,
)
def test_scales_move_when_those_of_te_do(te: TransformerEngine, part: Callable[..., None]) -> None:
    for mine, theirs in states_along(te, [worker.one_step, part, worker.one_step, worker.one_step]):
        assert_state(mine, theirs, "0", (0, 1, 0))


@pytest.mark.parametrize("inside", [False, True], ids=["no_grad outside", "no_grad inside"])
def test_difference_evaluation_leaves_no_trace_here(te: TransformerEngine, inside: bool) -> None:
    """TE's casts write into row 0 of the history under no_grad too, so that the amax of an
    evaluation counts in the training step that follows; where no_grad is inside of autocast, it
    even moves the scales at once, for TE asks whether there are gradients when autocast ends.
    """
    part = worker.evaluation_inside if inside else worker.evaluation
    before, ours, after = states_along(te, [worker.one_step, part, worker.one_step], [1, 100, 1])
    for name, state in before[0].items():
        assert_same_bits(ours[0][name], state)
    assert_state(*before, "0", (0, 1, 0))
    trained, evaluated = before[1], ours[1]
    if inside:
        assert evaluated["forward scale"][0] < 0.1 * trained["forward scale"][0]
    else:
        assert_same_bits(evaluated["forward scale"], trained["forward scale"])
        assert evaluated["forward amax_history"][0, 0] > 10 * trained["forward amax_history"].max()
        assert after[1]["forward scale"][0] < 0.1 * after[0]["0.scale"][0]
    assert_same_bits(evaluated["backward scale"], trained["backward scale"])


def test_an_evaluation_of_smaller_amaxes_is_none_in_te_either(te: TransformerEngine) -> None:
    loop = [worker.one_step, worker.evaluation, worker.one_step]
    *_, (mine, theirs) = states_along(te, loop, [1, 0.01, 1])
    assert_state(mine, theirs, "0", (0, 1, 0))


@pytest.mark.parametrize("part", [worker.two_backwards, worker.nested], ids=["apart", "nested"])
def test_difference_every_backward_pass_moves_scales_here(
    te: TransformerEngine, part: Callable[..., None]
) -> None:
    """Two forwards in one region. TE moves the scales of gradients when the backward of the
    region's first FP8 layer is done: of two passes only the first moves them, and the amax of the
    second waits for the next step. Here each pass does. Where autocast is nested, TE takes the
    forward behind the inner one for a first layer too and moves twice in the one backward pass;
    here once. Scales of inputs and weights move alike.
    """
    states = list(states_along(te, [worker.one_step, part]))
    for mine, theirs in states:
        for kind in ("scale", "amax_history"):
            ours, forward = mine[f"0.{kind}"], theirs[f"forward {kind}"]
            assert_same_bits(ours[..., :2], forward[..., :2])
    ours = states[1][0]["0.amax_history"][:, 2]
    theirs = states[1][1]["backward amax_history"][:, 0]
    earlier = states[0][0]["0.amax_history"][2, 2].item()
    if part is worker.two_backwards:
        _, first, second = ours.tolist()
        assert ours[0] == 0.0
        assert theirs.tolist() == [second, earlier, first]
    else:
        assert ours[:2].tolist() == [0.0, earlier]
        larger, smaller = theirs[1:].tolist()
        assert larger == ours[2] > smaller
