"""When the scales of `Fp8Linear` move: once a step, and not at all without gradients.

What is in a history tells how often and by what a scale moved, so most tests read it: every forward
and backward below brings an amax of its own. Activation checkpointing, of either kind, whole or
nested, must change no bit of losses, gradients and state. Afterwards nothing may be left open.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fp8lab import formats
from fp8lab.casting import fake_quantize
from fp8lab.linear import Fp8Linear
from fp8lab.mitigations.smooth_swiglu import ChannelsBalanced
from fp8lab.recipe import OPERANDS, DelayedScaling, Float8CurrentScaling, HighPrecision
from fp8lab.regions import autocast, close_region, open_region, steps

INPUT, WEIGHT, GRADIENT = range(3)
DELAYED = DelayedScaling(amax_history_len=6)
Wrap = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


@pytest.fixture(autouse=True)
def _nothing_is_left_open() -> Iterator[None]:
    yield
    left = steps.depth, dict(steps.forward_layers), dict(steps.backward_layers)
    steps.__init__()  # type: ignore[misc]
    assert left[0] == 0, "a region was left open"
    assert not left[1], "forward scales were left unmoved"
    assert not left[2], "gradient scales were left unmoved"


def layer_with(recipe: Any = DELAYED, in_features: int = 1, out_features: int = 1) -> Fp8Linear:
    return Fp8Linear(in_features, out_features, recipes=dict.fromkeys(OPERANDS, recipe))


def entered(layer: Fp8Linear, column: int) -> list[float]:
    """The amaxes in the history, oldest first, without the row of the running step."""
    return [amax for amax in layer.amax_history[1:, column].tolist() if amax]


def state(module: nn.Module) -> dict[str, Tensor]:
    parameters = dict(module.named_parameters())
    values = module.state_dict().items()
    return {name: value.clone() for name, value in values if name not in parameters}


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert list(left) == list(right)
    for name in left:
        assert torch.equal(left[name], right[name]), name


def forward(layer: nn.Module, amax: float) -> Tensor:
    return layer(torch.full((1, 1), amax, requires_grad=True))


def backward(output: Tensor, amax: float, **arguments: Any) -> None:
    output.backward(torch.full_like(output, amax), **arguments)


class Root(nn.Sequential):
    """A model whose outermost forward is the region, as `convert` makes one."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.register_forward_pre_hook(open_region)
        self.register_forward_hook(close_region, always_call=True)


# --- regions ----------------------------------------------------------------------------------


def test_a_bare_call_is_a_region() -> None:
    layer = layer_with()
    for amax in (2.0, 5.0, 3.0):
        backward(forward(layer, amax), 10 * amax)
    assert entered(layer, INPUT) == [2, 5, 3]
    assert entered(layer, WEIGHT) == [layer.weight.abs().item()] * 3
    assert entered(layer, GRADIENT) == [20, 50, 30]


def test_a_forward_is_cast_with_the_scale_from_before_it() -> None:
    layer = layer_with()
    layer.weight.data, layer.bias.data = torch.ones(1, 1), torch.zeros(1)
    assert forward(layer, 1000.0) == 448.0  # the first scale is 1: it saturates
    scale = np.float32(448) / np.float32(1000)
    assert layer.scale[INPUT].item() == scale
    half = forward(layer, 500.0).item()
    assert half == np.float32(224) * (np.float32(1) / scale)


def test_a_cast_in_force_stays_what_it_was() -> None:
    layer = layer_with()
    how = layer.cast_in_force("input", torch.tensor([3.0]))
    before = state(layer)
    assert how.scale == 1.0
    layer.cast_in_force("grad_output", torch.tensor([9.0]))
    assert_equal(state(layer), before)
    forward(layer, 7.0)
    assert layer.scale[INPUT] == 64.0
    assert how.scale == 1.0


@pytest.mark.parametrize("nested", [False, True])
def test_autocast_moves_once(nested: bool) -> None:
    layer, root = layer_with(), Root(layer_with())
    with autocast():
        with autocast() if nested else nullcontext():
            forward(layer, 2.0)
            forward(layer, 5.0)
        forward(layer, 3.0)
        forward(root, 2.0)
        forward(root, 1.0)
        assert layer.scale.tolist() == root[0].scale.tolist() == [1, 1, 1]
        (running,) = layer.running_amaxes("input")
        assert running == 5.0
        assert not layer.amax_history.any()
    assert entered(layer, INPUT) == [5]
    assert entered(root[0], INPUT) == [2]
    assert layer.scale[INPUT].item() == np.float32(448) / np.float32(5)
    assert not layer.amax_history[0].any()


def test_the_outermost_forward_of_a_model_is_a_region() -> None:
    shared = layer_with()
    shared.weight.data, shared.bias.data = torch.full((1, 1), 2.0), torch.zeros(1)
    root = Root(shared, Root(shared), shared)
    forward(root, 1.0)
    assert entered(shared, INPUT) == [4]  # of 1, 2 and 4
    forward(root, 0.5)
    assert entered(shared, INPUT) == [4, 2]


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("region", [nullcontext, autocast])
@pytest.mark.parametrize("model", [layer_with, lambda: Root(layer_with())])
def test_evaluation_changes_nothing(off: Any, region: Any, model: Any) -> None:
    module = model()
    backward(forward(module, 2.0), 3.0)
    before = state(module)
    with off(), region():
        forward(module, 50.0)
    with region(), off():
        forward(module, 70.0)
    assert_equal(state(module), before)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_evaluation_inside_a_training_region_enters_nothing(off: Any) -> None:
    root = Root(layer_with())
    with autocast():
        forward(root, 2.0)
        with off():
            forward(root, 50.0)
    assert entered(root[0], INPUT) == [2]


def test_a_forward_that_raises_closes_its_region() -> None:
    def refuse(*_: object) -> None:
        raise KeyError("refused")

    layer = layer_with()
    root = Root(layer, nn.Identity())
    for place in (root[1].register_forward_pre_hook, root.register_forward_pre_hook):
        handle = place(refuse)
        with pytest.raises(KeyError):
            forward(root, 2.0)
        handle.remove()
    handle = root.register_forward_pre_hook(refuse, prepend=True)  # before the region is opened
    with pytest.raises(KeyError):
        forward(root, 2.0)
    handle.remove()
    forward(root, 5.0)
    assert entered(layer, INPUT) == [2, 5]
    with pytest.raises(KeyError), autocast():
        forward(root, 7.0)
        refuse()
    assert entered(layer, INPUT) == [2, 5, 7]


# --- the backward pass --------------------------------------------------------------------------


def test_gradients_move_at_the_end_of_a_backward_pass() -> None:
    layer, seen = layer_with(), []
    layer.weight.data = torch.full((1, 1), 2.0)
    x = torch.ones(1, 1, requires_grad=True)
    x.register_hook(lambda _: seen.append(layer.scale[GRADIENT].item()))
    with autocast():
        output = layer(layer(x))  # gradients 3 and 6 in one pass
    backward(output, 3.0)
    assert seen == [1.0]
    assert entered(layer, GRADIENT) == [6]
    assert layer.scale[GRADIENT].item() == np.float32(57344) / np.float32(6)


def test_gradients_of_a_backward_inside_a_region_move_when_it_closes() -> None:
    layer = layer_with()
    with autocast():
        for amax in (3.0, 8.0, 5.0):
            backward(forward(layer, 2 * amax), amax)
            assert layer.scale.tolist() == [1, 1, 1]
    assert entered(layer, GRADIENT) == [8]
    assert entered(layer, INPUT) == [16]


def test_every_backward_pass_outside_a_region_is_a_step() -> None:
    layer = layer_with()
    with autocast():
        first, second = forward(layer, 2.0), forward(layer, 3.0)
    backward(first, 4.0, retain_graph=True)
    backward(second, 5.0)
    backward(first, 6.0)
    assert entered(layer, GRADIENT) == [4, 5, 6]
    assert entered(layer, INPUT) == [3]


def raising(tensor: Tensor) -> Tensor:
    """The tensor; the next backward pass through it raises, the one after does not."""
    left = [RuntimeError("not this time")]

    def hook(gradient: Tensor) -> Tensor:
        if left:
            raise left.pop()
        return gradient

    out = tensor * 1
    out.register_hook(hook)
    return out


@pytest.mark.parametrize("mode", [None, False, True])
@pytest.mark.parametrize("again", ["backward", "step"])
def test_a_backward_pass_that_raises_leaves_later_steps_working(mode: Any, again: str) -> None:
    first, second = layer_with(), layer_with()
    first.weight.data = second.weight.data = torch.ones(1, 1)

    def step(between: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Tensor:
        with autocast():
            x = between(first(torch.ones(1, 1, requires_grad=True)))
            return second(x) if mode is None else checkpoint(second, x, use_reentrant=mode)

    output = step(raising)
    with pytest.raises(RuntimeError, match="not this time"):
        backward(output, 32.0, retain_graph=True)
    assert entered(first, GRADIENT) == entered(second, GRADIENT) == []
    if again == "step":
        output = step()
    backward(output, 16.0)
    # What the second layer saw in the pass that raised is a step, or joins the one that follows.
    assert entered(second, GRADIENT) == ([32, 16] if again == "step" else [32])
    assert entered(first, GRADIENT) == [16]
    for amax in (8.0, 4.0):
        backward(step(), amax)
    assert entered(first, GRADIENT) == [16, 8, 4]
    assert entered(second, GRADIENT)[-2:] == [8, 4]
    steps = 4 if again == "step" else 3
    assert len(entered(first, INPUT)) == len(entered(second, INPUT)) == steps


def test_evaluation_after_a_backward_pass_that_raised_changes_nothing() -> None:
    layer = layer_with()
    with pytest.raises(RuntimeError, match="not this time"):
        backward(layer(raising(torch.ones(1, 1, requires_grad=True))), 3.0)
    before = state(layer)
    with torch.no_grad(), autocast():
        forward(layer, 50.0)
    assert_equal(state(layer), before)
    backward(forward(layer, 1.0), 2.0)
    assert entered(layer, GRADIENT) == [3]


# --- activation checkpointing -------------------------------------------------------------------

PLAIN: Wrap = lambda function, x: function(x)  # noqa: E731
KINDS: dict[str, Wrap] = {
    "not reentrant": lambda function, x: checkpoint(function, x, use_reentrant=False),
    "reentrant": lambda function, x: checkpoint(function, x, use_reentrant=True),
}


class Network(nn.Module):
    """Two blocks and a layer that both share; `outer` wraps a block, `inner` a half of it.

    The shared one is a model of its own, whose region a repeated forward opens inside the backward.
    """

    def __init__(self, outer: Wrap, inner: Wrap) -> None:
        super().__init__()
        self.outer, self.inner = outer, inner
        self.layers = nn.ModuleList(layer_with(DELAYED, 8, 8) for _ in range(4))
        self.shared = Root(layer_with(DelayedScaling(amax_compute_algo="most_recent"), 8, 8))

    def block(self, first: nn.Module, second: nn.Module) -> Callable[[Tensor], Tensor]:
        def half(x: Tensor) -> Tensor:
            return torch.tanh(self.shared(first(x)))

        return lambda x: x + second(self.inner(half, x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.outer(self.block(self.layers[0], self.layers[1]), x)
        return self.outer(self.block(self.layers[2], self.layers[3]), self.shared(x))


def train(
    network: nn.Module, region: str, between: Callable[[nn.Module], None] = lambda network: None
) -> dict[str, Tensor]:
    """Four steps; losses, every gradient and the state after each."""
    if region == "root":
        network.register_forward_pre_hook(open_region)
        network.register_forward_hook(close_region, always_call=True)
    optimizer, result = torch.optim.SGD(network.parameters(), lr=0.1), {}
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        x = (10**step * torch.randn(5, 8, generator=generator)).requires_grad_()
        whole: AbstractContextManager[Any] = autocast() if region == "step" else nullcontext()
        with whole:
            with autocast() if region == "forward" else nullcontext():
                loss = network(x).square().mean()
            between(network)
            loss.backward()
        result |= {f"{step} loss": loss.detach(), f"{step} x": x.grad}
        for name, parameter in network.named_parameters():
            result[f"{step} {name}"] = parameter.grad.clone()
        result |= {f"{step} {name}": value for name, value in state(network).items()}
        optimizer.step()
        optimizer.zero_grad()
    return result


def networks(outer: Wrap, inner: Wrap) -> tuple[Network, Network]:
    plain, checkpointed = Network(PLAIN, PLAIN), Network(outer, inner)
    checkpointed.load_state_dict(plain.state_dict())
    return plain, checkpointed


@pytest.mark.parametrize("region", ["forward", "step", "root"])
@pytest.mark.parametrize("outer", ["none", *KINDS])
@pytest.mark.parametrize("inner", ["none", *KINDS])
def test_checkpointing_changes_no_bit(region: str, outer: str, inner: str) -> None:
    plain, checkpointed = networks(KINDS.get(outer, PLAIN), KINDS.get(inner, PLAIN))
    assert_equal(train(checkpointed, region), train(plain, region))
    assert checkpointed.shared[0].amax_history.count_nonzero() == 3 * 4  # once a step


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_bare_layers_changes_no_bit(kind: str) -> None:
    plain = nn.Sequential(layer_with(DELAYED, 8, 8), nn.Tanh(), layer_with(DELAYED, 8, 8))
    twin = copy.deepcopy(plain)

    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return KINDS[kind](super().forward, x)

    assert_equal(train(Checkpointed(*twin), "none"), train(plain, "none"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("region", ["forward", "step", "root"])
def test_evaluation_between_forward_and_backward(kind: str, off: Any, region: str) -> None:
    def evaluate(network: nn.Module) -> None:
        with off():
            network.outer, wrap = PLAIN, network.outer  # as frameworks do outside training
            network(torch.full((2, 8), 1e5))
            network.outer = wrap

    plain, checkpointed = networks(KINDS[kind], PLAIN)
    assert_equal(train(checkpointed, region, evaluate), train(plain, region))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_evaluation_with_checkpointing_changes_nothing() -> None:
    for wrap in KINDS.values():
        network = Network(wrap, wrap)
        before = state(network)
        with torch.no_grad(), autocast():
            network(torch.randn(2, 8, requires_grad=True))
        assert_equal(state(network), before)


# --- a layer among the others -------------------------------------------------------------------


def test_adopting_keeps_hooks_parameters_and_references() -> None:
    plain = nn.Linear(3, 2)
    model = nn.Sequential(plain)
    weight, bias, calls = plain.weight, plain.bias, []
    plain.register_forward_hook(lambda *_: calls.append("after"))
    plain.register_forward_pre_hook(lambda *_: calls.append("before"))
    weight.register_hook(lambda _: calls.append("gradient"))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    adopted = Fp8Linear.adopt(plain, dict.fromkeys(OPERANDS, DELAYED))
    assert adopted is plain is model[0]
    assert type(adopted) is Fp8Linear
    assert adopted.weight is weight
    assert adopted.bias is bias
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(weight), id(bias)]
    before = weight.detach().clone()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert calls == ["before", "after", "gradient"]
    assert torch.equal(before - 1.0, adopted.weight)
    assert adopted.precision() == {
        "input@output": "E4M3 DelayedScaling",
        "weight@output": "E4M3 DelayedScaling",
        "grad_output@grad_input": "E5M2 DelayedScaling",
        "weight@grad_input": "E4M3 DelayedScaling",
        "grad_output@grad_weight": "E5M2 DelayedScaling",
        "input@grad_weight": "E4M3 DelayedScaling",
    }
    assert "grad_output=DelayedScaling" in repr(model)


def test_precision_says_what_is_put_on_top() -> None:
    layer = layer_with(Float8CurrentScaling())
    layer.rewrite = ChannelsBalanced()
    layer.gradient_of_saturated = "zero"
    recipe, balanced = "E4M3 Float8CurrentScaling", "channels balanced"
    precision = layer.precision()
    assert precision["input@output"] == f"{recipe}, {balanced}, no gradient where saturated"
    assert precision["input@grad_weight"] == f"{recipe}, {balanced}"
    assert precision["weight@output"] == precision["weight@grad_input"] == recipe


def test_only_delayed_scaling_has_state() -> None:
    for recipe in (HighPrecision(), Float8CurrentScaling()):
        assert not list(layer_with(recipe).buffers())
    assert list(layer_with().state_dict()) == ["weight", "bias", "amax_history", "scale"]


def test_a_resumed_layer_goes_on_as_it_would_have() -> None:
    layer, resumed = layer_with(), layer_with()
    for amax in (2.0, 900.0):
        backward(forward(layer, amax), amax)
    resumed.load_state_dict(layer.state_dict())
    for amax in (30.0, 0.5):
        outputs = [forward(module, amax) for module in (layer, resumed)]
        assert torch.equal(*outputs)
        for output in outputs:
            backward(output, amax)
        assert_equal(state(layer), state(resumed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_state_stays_fp32_whatever_the_parameters_become(dtype: torch.dtype) -> None:
    layer = layer_with()
    backward(forward(layer, 3.0), 3.0)
    before = state(layer)
    root = nn.Sequential(layer).to(dtype)
    assert_equal(state(layer), before)
    assert layer.weight.dtype == dtype
    backward(root(torch.full((1, 1), 5.0, dtype=dtype)), 7.0)
    assert layer.weight.grad.dtype == dtype
    assert entered(layer, INPUT) == [3, 5]
    assert entered(layer, GRADIENT) == [3, 7]


def test_recipes_may_change_between_steps() -> None:
    layer = layer_with()
    layer.weight.data, layer.bias.data = torch.ones(1, 1), torch.zeros(1)
    forward(layer, 2.0)
    before = state(layer)
    layer.recipes = dict.fromkeys(OPERANDS, HighPrecision(format=formats.FP32))
    assert forward(layer, 1.2345) == np.float32(1.2345)
    layer.recipes = dict.fromkeys(OPERANDS, Float8CurrentScaling())
    x = torch.full((1, 1), 1.2345)
    assert torch.equal(layer(x), fake_quantize(x, Float8CurrentScaling(), "input"))
    assert_equal(state(layer), before)
    layer.recipes = dict.fromkeys(OPERANDS, DELAYED)
    forward(layer, 4.0)
    assert entered(layer, INPUT) == [2, 4]
