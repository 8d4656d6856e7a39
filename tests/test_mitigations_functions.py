"""Mitigations that put another function between gate, up and down, against formulas by hand.

The references are written out in torch beside the weights; they know no hook and no Formula. What
is cast in them is cast by torch's own float8 types.
"""

from __future__ import annotations

import copy
import gc
import math
import pickle
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_feed_forwards as foreign
import pytest
import torch
import torch.nn.functional as F
from test_families import FAMILIES, Log, footprint, hugging_face, run
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fp8lab
from fp8lab.ffn import ACTIVATIONS, FeedForward, GatedFeedForward, Swish
from fp8lab.formats import E4M3
from fp8lab.mitigations import HighPrecisionProduct, SmoothSwiGLU
from fp8lab.mitigations.clamped_swiglu import ClampedSwiGLU
from fp8lab.mitigations.powlu import PowLU
from fp8lab.mitigations.product import change_of_function
from fp8lab.mitigations.replaced_activation import ReplacedActivation
from fp8lab.mitigations.situ_glu import SiTUGLU
from fp8lab.sites import find_gates, observe, probing, survey

Product = Callable[[Tensor, Tensor], Tensor]


def before(limit: float, slope: float = 1.0, offset: float = 0.0) -> Product:
    def product(gate: Tensor, up: Tensor) -> Tensor:
        gate = torch.where(gate > limit, limit, gate)
        up = torch.where(up > limit, limit, torch.where(up < -limit, -limit, up))
        gate = F.silu(gate) if slope == 1.0 else gate * torch.sigmoid(gate * slope)
        return gate * (up + offset if offset else up)

    return product


def after(limit: float) -> Product:
    def product(gate: Tensor, up: Tensor) -> Tensor:
        gate = F.silu(gate)
        gate = torch.where(gate > limit, limit, gate)
        return gate * torch.where(up > limit, limit, torch.where(up < -limit, -limit, up))

    return product


def situ(b1: float, b2: float) -> Product:
    def product(gate: Tensor, up: Tensor) -> Tensor:
        return b1 * torch.tanh(gate / b1) * torch.sigmoid(gate) * (b2 * torch.tanh(up / b2))

    return product


def powlu(m: float) -> Product:
    """Element by element, in the two branches, without a `where`."""

    def product(gate: Tensor, up: Tensor) -> Tensor:
        flat = gate.reshape(-1)
        positive = flat > 0
        above, below = flat[positive], flat[~positive]
        grown = above ** (m / (above.sqrt() + 1)) * torch.sigmoid(above)
        result = torch.zeros_like(flat).masked_scatter(positive, grown)
        return result.masked_scatter(~positive, F.silu(below)).view_as(gate) * up

    return product


CASES: dict[str, tuple[Any, Product]] = {
    "before": (ClampedSwiGLU(limit=0.75), before(0.75)),
    "deepseek": (ClampedSwiGLU.deepseek_v4(), before(10.0)),
    "gpt-oss": (ClampedSwiGLU.gpt_oss(), before(7.0, 1.702, 1.0)),
    "after": (ClampedSwiGLU(limit=0.75, where="after"), after(0.75)),
    "step": (ClampedSwiGLU.step(), after(7.0)),
    "step, shared": (ClampedSwiGLU.step(shared=True), after(16.0)),
    "situ": (SiTUGLU(), situ(4.0, 25.0)),
    "situ, tight": (SiTUGLU(gate_bound=0.5, up_bound=1.5), situ(0.5, 1.5)),
    "powlu": (PowLU(), powlu(3.0)),
    "powlu, 2": (PowLU(power=2.0), powlu(2.0)),
    "relu": (ReplacedActivation(), lambda gate, up: F.relu(gate) * up),
    "gelu": (ReplacedActivation(activation="gelu"), lambda gate, up: F.gelu(gate) * up),
    "relu_squared": (
        ReplacedActivation(activation="relu_squared"),
        lambda gate, up: F.relu(gate).square() * up,
    ),
}
ALL = [SiTUGLU(), PowLU(), ReplacedActivation(), *(case for case, _ in CASES.values())]


def feed_forward(bias: bool = False) -> GatedFeedForward:
    """dim 16, hidden 24; one channel of gate and up is 20 times larger."""
    model = GatedFeedForward(16, 24, bias=bias)
    with torch.no_grad():
        model.gate.weight[5] *= 20.0
        model.up.weight[5:7] *= 20.0
    return model


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return (3.0 * torch.randn(2, 5, 16)).to(dtype), torch.randn(2, 5, 16).to(dtype)


def by_hand(model: GatedFeedForward, x: Tensor, product: Product) -> Tensor:
    gate = F.linear(x, model.gate.weight, model.gate.bias)
    return product(gate, F.linear(x, model.up.weight, model.up.bias))


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def assert_same(name: str, one: Tensor, other: Tensor) -> None:
    """Equal to the bit; but torch's power of a vector is not its power of the same elements picked
    out of another (nor its tanh, of a view), by some units in the last place."""
    one, other = one.detach(), other.detach()
    if "powlu" not in name:
        assert torch.equal(one, other)
    eps = torch.finfo(one.dtype).eps
    torch.testing.assert_close(one, other, rtol=16 * eps, atol=16 * eps * float(other.abs().max()))


def assert_equal(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- the values ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mitigation", ALL, ids=repr)
def test_a_mitigation_is_a_frozen_value_that_says_what_it_is(mitigation: Any) -> None:
    for twin in (copy.deepcopy(mitigation), pickle.loads(pickle.dumps(mitigation))):
        assert twin == mitigation
    assert (mitigation.kind, mitigation.changes_function, mitigation.foldable) == (
        "model",
        True,
        False,
    )
    assert mitigation.cost and mitigation.source
    with pytest.raises(AttributeError):
        mitigation.limit = 3.0


def test_the_published_constants() -> None:
    assert ClampedSwiGLU.deepseek_v4() == ClampedSwiGLU() == ClampedSwiGLU(limit=10.0)
    assert ClampedSwiGLU.gpt_oss() == ClampedSwiGLU(limit=7.0, slope=1.702, offset=1.0)
    assert ClampedSwiGLU.step() == ClampedSwiGLU(limit=7.0, where="after")
    assert ClampedSwiGLU.step(shared=True) == ClampedSwiGLU(limit=16.0, where="after")
    assert SiTUGLU() == SiTUGLU(gate_bound=4.0, up_bound=25.0)
    assert PowLU() == PowLU(power=3.0)


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (ClampedSwiGLU, "limit"),
        (ClampedSwiGLU, "slope"),
        (SiTUGLU, "gate_bound"),
        (SiTUGLU, "up_bound"),
        (PowLU, "power"),
    ],
)
def test_a_number_is_positive(kind: Any, name: str, wrong: float) -> None:
    with pytest.raises(ValueError, match=f"^{kind.__name__}: {name}=.*, expected a positive num"):
        kind(**{name: wrong})


def test_names_are_known() -> None:
    with pytest.raises(ValueError, match=r"^ClampedSwiGLU: where='inside', expected 'before' or"):
        ClampedSwiGLU(where="inside")
    with pytest.raises(ValueError, match=r"^ClampedSwiGLU: offset=inf, expected a finite number$"):
        ClampedSwiGLU(offset=math.inf)
    with pytest.raises(ValueError, match=r"^ReplacedActivation: activation='xielu', expected one"):
        ReplacedActivation(activation="xielu")


# --- the formulas -------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_function_and_gradients_are_the_formula(name: str, dtype: torch.dtype, bias: bool) -> None:
    mitigation, product = CASES[name]
    model = mitigation.apply(feed_forward(bias).to(dtype))
    plain = copy.deepcopy(model)
    x, upstream = batch(dtype)
    output = model(x)
    expected = F.linear(by_hand(plain, x, product), plain.down.weight, plain.down.bias)
    assert_same(name, output, expected)
    output.backward(upstream)
    expected.backward(upstream)
    for one, other in zip(gradients(model), gradients(plain), strict=True):
        assert_same(name, one, other)


def cast(tensor: Tensor, scale: float, dtype: torch.dtype, largest: float) -> Tensor:
    codes = (tensor * scale).clamp(-largest, largest).to(dtype)
    return codes.float() * (1.0 / torch.tensor(scale))


@pytest.mark.parametrize("name", CASES)
def test_what_is_cast_is_the_new_product(name: str) -> None:
    """Down with delayed scales, beside the cast worked out by hand."""
    mitigation, product = CASES[name]
    model = feed_forward()
    fp8lab.convert(model, fp8lab.DelayedScaling(amax_history_len=4), include=["*down"])
    plain = copy.deepcopy(mitigation.apply(model))
    scales = torch.tensor([64.0, 128.0, 32.0])
    model.down.scale.copy_(scales)
    x, upstream = batch()
    output = model(x)
    output.backward(upstream)

    made = by_hand(plain, x, product)
    inputs = cast(made.detach().reshape(-1, 24), 64.0, torch.float8_e4m3fn, 448.0)
    weights = cast(plain.down.weight.detach(), 128.0, torch.float8_e4m3fn, 448.0)
    gradient = cast(upstream.reshape(-1, 16), 32.0, torch.float8_e5m2, 57344.0)
    assert torch.equal(output, F.linear(inputs, weights).view(2, 5, 16))
    made.backward((gradient @ weights).view_as(made))
    assert_same(name, model.gate.weight.grad, plain.gate.weight.grad)
    assert_same(name, model.up.weight.grad, plain.up.weight.grad)
    assert torch.equal(model.down.weight.grad, gradient.t() @ inputs)


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name: str) -> None:
    mitigation, _ = CASES[name]
    model = mitigation.apply(GatedFeedForward(4, 6)).double()
    names = [name for name, _ in model.named_parameters()]
    values = [3.0 * p.detach() for p in model.parameters()]

    def call(x: Tensor, *given: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, given, strict=True)), (x,))

    inputs = (2.0 * torch.randn(3, 4, dtype=torch.float64), *values)
    assert torch.autograd.gradcheck(call, tuple(value.requires_grad_() for value in inputs))


def test_limits_that_nothing_reaches_change_no_bit() -> None:
    plain = feed_forward()
    x, upstream = batch()
    plain(x).backward(upstream)
    for where in ("before", "after"):
        model = copy.deepcopy(plain)
        model.zero_grad()
        ClampedSwiGLU(limit=1e9, where=where).apply(model)
        assert torch.equal(model(x), plain(x))
        model(x).backward(upstream)
        assert_equal(gradients(model), gradients(plain))


def test_bounds_hold() -> None:
    x = 100.0 * torch.randn(64, 16)
    bounds = {"situ": 100.0, "deepseek": 100.0, "gpt-oss": 56.0, "step": 49.0}
    for name, bound in bounds.items():
        model = CASES[name][0].apply(feed_forward())
        seen: list[Tensor] = []
        model.down.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        model(x)
        assert 0.5 * bound < seen[0].abs().max() <= bound, name


@pytest.mark.parametrize("name", CASES)
def test_zero_tokens_zero_channels_nan_and_infinity(name: str) -> None:
    mitigation, product = CASES[name]
    model = mitigation.apply(feed_forward())
    with torch.no_grad():
        model.gate.weight[3] = model.up.weight[4] = 0.0
    assert model(torch.randn(0, 16)).shape == (0, 16)
    x = torch.randn(5, 16)
    x[1, 2], x[2, 3], x[3] = math.nan, math.inf, 0.0
    x.requires_grad_()
    output = model(x)
    output[[0, 3, 4]].sum().backward()
    assert x.grad is not None and x.grad[[0, 3, 4]].isfinite().all()
    assert (x.grad[[0, 4]] != 0).all()
    output = output.detach()
    torch.testing.assert_close(
        output, F.linear(by_hand(model, x, product), model.down.weight).detach(), equal_nan=True
    )
    assert output[1].isnan().all()
    assert output[[0, 3, 4]].isfinite().all()


def test_activations_in_a_format_stay_in_it() -> None:
    model = feed_forward()
    model.activation_format = E4M3
    PowLU().apply(model)
    x, _ = batch()

    def rounded(tensor: Tensor) -> Tensor:
        return tensor.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float()

    gate = rounded(F.linear(x, model.gate.weight))
    grown = rounded(powlu(3.0)(gate, torch.ones_like(gate)))
    expected = F.linear(grown * F.linear(x, model.up.weight), model.down.weight)
    with pytest.raises(RuntimeError, match="down ran without its gate and up"):
        model.down(x)
    assert torch.equal(model(x), expected)


# --- how it is done -----------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("name", ["before", "situ", "powlu"])
def test_activation_checkpointing_changes_nothing(
    name: str, converted: bool, reentrant: bool
) -> None:
    model = feed_forward()
    if converted:
        fp8lab.convert(model, fp8lab.Float8CurrentScaling())
    CASES[name][0].apply(model)
    twin = copy.deepcopy(model)
    x, upstream = batch()
    one, other = (x.clone().requires_grad_() for _ in range(2))
    model(one).backward(upstream)
    checkpoint(twin, other, use_reentrant=reentrant).backward(upstream)
    assert torch.equal(one.grad, other.grad)
    assert_equal(gradients(model), gradients(twin))
    (hook,) = twin.down._forward_pre_hooks.values()
    assert hook.__self__._remembered.gate is hook.__self__._remembered.up is None


def test_nothing_is_remembered_after_a_forward_or_a_failure() -> None:
    model = PowLU().apply(feed_forward())
    kept: list[Any] = []
    for projection in (model.gate, model.up):
        projection.register_forward_hook(lambda *a: kept.append(weakref.ref(a[2])))
    with torch.no_grad():
        model(torch.randn(3, 16))

    def fails(*_: Any) -> None:
        raise RuntimeError("in between")

    handle = model.up.register_forward_hook(fails)
    with pytest.raises(RuntimeError, match="in between"):
        model(torch.randn(3, 16))
    handle.remove()
    gc.collect()
    assert len(kept) == 4 and all(reference() is None for reference in kept)
    assert model(torch.randn(3, 16)).isfinite().all()


def test_who_looked_at_down_before_sees_the_new_product_and_nothing_is_kept_by_then() -> None:
    model, x = feed_forward(), batch()[0]
    seen: list[Tensor] = []
    model.down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ClampedSwiGLU(limit=0.75).apply(model)
    hook = next(iter(model.down._forward_pre_hooks.values())).__self__
    seen.clear()
    model.down.register_forward_hook(lambda *_: seen.append(hook._remembered.gate))
    model(x)
    assert torch.equal(seen[0], by_hand(model, x, before(0.75)))
    assert seen[1:] == [None]


def test_threads_do_not_see_each_others_products() -> None:
    model = SiTUGLU().apply(feed_forward())
    meeting = threading.Barrier(2)
    model.up.register_forward_hook(lambda *_: meeting.wait(20.0) and None)
    inputs = [torch.randn(4, 16) for _ in range(2)]
    outputs: dict[int, Tensor] = {}
    threads = [
        threading.Thread(target=lambda n=n: outputs.update({n: model(inputs[n]).detach()}))
        for n in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, x in enumerate(inputs):
        assert torch.equal(outputs[number], model.down.forward(by_hand(model, x, situ(4.0, 25.0))))


def test_state_dict_and_copies() -> None:
    plain, x = feed_forward(), torch.randn(3, 16)
    model = PowLU().apply(copy.deepcopy(plain))
    assert list(model.state_dict()) == list(plain.state_dict())
    again = PowLU().apply(GatedFeedForward(16, 24))
    again.load_state_dict(model.state_dict())
    for twin in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        with torch.no_grad():
            twin.gate.weight.zero_()
        assert not twin(x).any() and model(x).any()
    plain.load_state_dict(model.state_dict())
    assert not torch.equal(plain(x), model(x))


@pytest.mark.long
@pytest.mark.parametrize("compiled_first", [False, True])
@pytest.mark.parametrize("name", ["before", "after", "situ", "powlu", "relu"])
def test_a_compiled_model_computes_the_same_without_a_break(
    name: str, compiled_first: bool
) -> None:
    torch.compiler.reset()
    model, x = nn.Sequential(feed_forward(), feed_forward()), batch()[0]
    eager = CASES[name][0].apply(copy.deepcopy(model))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    if compiled_first:
        compiled(x)
    CASES[name][0].apply(model)
    for one in (compiled, eager):
        one(x).square().mean().backward()
    torch.testing.assert_close(compiled(x), eager(x))
    for one, other in zip(gradients(model), gradients(eager), strict=True):
        torch.testing.assert_close(one, other)
    for module in model:
        (hook,) = module.down._forward_pre_hooks.values()
        assert hook.__self__._remembered.gate is None
    torch.compiler.reset()


def test_a_layer_that_is_exchanged_afterwards_is_not_passed_over() -> None:
    model = PowLU().apply(feed_forward())
    model.down = nn.Linear(24, 16)
    with pytest.raises(RuntimeError, match=r"^PowLU: \. ran without it: a layer was exchanged aft"):
        model(torch.randn(3, 16))
    model = PowLU().apply(feed_forward())
    model.up = nn.Linear(16, 24)
    with pytest.raises(RuntimeError, match=r"^PowLU: \.: down ran without its gate and up$"):
        model(torch.randn(3, 16))


def test_a_model_that_is_converted_afterwards_keeps_it() -> None:
    one, other = feed_forward(), feed_forward()
    other.load_state_dict(one.state_dict())
    PowLU().apply(one)
    fp8lab.convert(one, fp8lab.Float8CurrentScaling())
    fp8lab.convert(other, fp8lab.Float8CurrentScaling())
    PowLU().apply(other)
    x, _ = batch()
    assert torch.equal(one(x), other(x))


# --- on models of others ------------------------------------------------------------------------


def products(model: nn.Module) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(gate, up, what down was given) of every feed-forward in one run, overheard."""
    logs = []
    for site in find_gates(model):
        log = Log()
        observe.attach(site, log)
        logs.append(log)
    run(model)
    return [tuple(log.of(role)[0] for role in ("gate", "up", "product")) for log in logs]


SWIGLU = ("llama", "mistral", "qwen3", "phi3", "torchao Float8Linear", "torchtitan", "litgpt")
SWIGLU += ("megatron", "liger", "seed 000")


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["before", "after", "gpt-oss", "situ", "powlu", "relu_squared"])
@pytest.mark.parametrize("family", SWIGLU)
def test_families(family: str, name: str, dtype: torch.dtype) -> None:
    mitigation, product = CASES[name]
    model = FAMILIES[family].build().to(dtype)
    if family == "seed 000" and mitigation != CASES["relu_squared"][0]:
        # sigmoid(x) * x is SiLU to eight units, and found as such.
        assert find_gates(model)[0].activation == "silu"
    before_loss = float(run(model).detach())
    mitigation.apply(model)
    assert float(run(model).detach()) != before_loss
    seen = products(model)
    assert len(seen) == len(FAMILIES[family].sites)
    for gate, up, given in seen:
        # A fused gate is a view here and a copy there, of which torch's functions differ by units.
        fused = gate.shape[-1] * 2 in (p.shape[0] for p in model.parameters())
        assert_same("powlu" if fused else name, given, product(gate, up))
    run(model).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_gemma_has_another_activation_replaced() -> None:
    model = FAMILIES["gemma2"].build()
    ReplacedActivation(activation="silu").apply(model)
    for gate, up, given in products(model):
        assert torch.equal(given, F.silu(gate) * up)
    assert [site.activation for site in find_gates(model)] == ["silu", "silu"]


def test_a_clamp_of_the_model_stays_where_its_activation_is_replaced() -> None:
    model = ReplacedActivation(activation="gelu").apply(foreign.Clamped())
    (site,) = find_gates(model)
    assert (site.activation, site.gate_limit, site.up_limit) == ("gelu", 7.0, 7.0)


def test_a_learnable_swish_is_replaced_too() -> None:
    model = GatedFeedForward(16, 24, swish=Swish(1.5, learnable=True))
    ReplacedActivation(activation="relu").apply(model)
    x = torch.randn(3, 16)
    expected = by_hand(model, x, lambda gate, up: F.relu(gate) * up)
    assert torch.equal(model(x), F.linear(expected, model.down.weight))


class InPlace(foreign.Torchtitan):
    def forward(self, x: Tensor) -> Tensor:
        return self.w2(input=F.silu(self.w1(x), inplace=True).mul_(self.w3(input=x)))


class ByKeyword(foreign.Torchtitan):
    """And down is given its tokens flat."""

    def forward(self, x: Tensor) -> Tensor:
        product = (F.silu(self.w1(input=x)) * self.w3(input=x)).flatten(0, -2)
        return self.w2(input=product).view(*x.shape[:-1], -1)


class Dropped(foreign.Torchtitan):
    """Dropout before down."""

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.dropout(F.silu(self.w1(x)) * self.w3(x), 0.1, self.training))


class DroppedOutput(foreign.Torchtitan):
    """Dropout behind down, which is none of our business."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5, self.training)


def test_a_product_that_is_reshaped_and_passed_by_keyword() -> None:
    model = PowLU().apply(ByKeyword())
    x = torch.randn(2, 3, foreign.DIM)
    expected = powlu(3.0)(model.w1(x), model.w3(x))
    shapes: list[torch.Size] = []
    model.w2.register_forward_pre_hook(
        lambda *a: shapes.append(a[2]["input"].shape), with_kwargs=True
    )
    assert_same("powlu", model(x), F.linear(expected, model.w2.weight))
    assert shapes == [(6, foreign.HIDDEN)]
    assert DroppedOutput.__name__ == type(PowLU().apply(DroppedOutput())).__name__


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "uncalled": (foreign.SeedWeights, "PowLU: 1 does not call its projections"),
    "down uncalled": (foreign.TorchtitanDownUncalled, "1 does not call its projections"),
    "parameters": (foreign.TorchtitanFused, "1 does not call its projections"),
    "experts": (foreign.TorchtitanExperts, "1 does not call its projections"),
    "weighted": (foreign.MegatronExpert, "1 multiplies its product by a factor per token"),
    "in place": (InPlace, "1 works in place on what its gate or up gave"),
    "dropout": (Dropped, r"in training the product of 1 is not silu\(gate\) \* up: something ran"),
    "mixtral": (
        lambda: FAMILIES["mixtral eager"].build(),
        r"PowLU: 1\.model\.layers\.0\.mlp\.experts does not call its projections",
    ),
    "gpt-oss": (
        lambda: FAMILIES["gpt_oss grouped_mm"].build(),
        r"PowLU: 1\.model\.layers\.0\.mlp\.experts does not call its projections",
    ),
    "gelu": (lambda: GatedFeedForward(16, 24, "geglu"), "PowLU: 1 has gelu, expected silu"),
    "gtu": (lambda: GatedFeedForward(16, 24, "gtu"), "PowLU: 1 has tanh, expected silu"),
    "swish": (lambda: FAMILIES["ours, swish"].build(), "PowLU: 1 has swish, expected silu"),
    "clamped": (foreign.Clamped, "PowLU: 1 has limits or an offset already, expected none"),
    "twice": (lambda: PowLU().apply(feed_forward()), "PowLU: the product of 1 is made anew alrea"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_reached_is_refused_and_nothing_changed(name: str) -> None:
    build, reason = REFUSED[name]
    both = nn.ModuleList([feed_forward(), build()])
    before_it = footprint(both)
    modes = [module.training for module in both.modules()]
    with pytest.raises(ValueError, match=reason) as error:
        PowLU().apply(both)
    assert "\n" not in str(error.value)
    assert footprint(both) == before_it
    assert [module.training for module in both.modules()] == modes


def test_a_model_without_a_gate_is_refused() -> None:
    for mitigation in ALL:
        with pytest.raises(ValueError, match="no gated feed-forward"):
            mitigation.apply(FeedForward(16, 24))


def test_the_activation_that_is_there_already_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^ReplacedActivation: \. has silu already$"):
        ReplacedActivation(activation="silu").apply(feed_forward())


# --- found, watched, composed -------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_new_formula_is_found(name: str) -> None:
    mitigation, product = CASES[name]
    for model in (mitigation.apply(feed_forward()), mitigation.apply(foreign.Megatron())):
        (site,) = find_gates(model)
        assert site.remade and site.seen == "hooks" and not survey(model).reasons
        gate, up = 8.0 * torch.randn(2, 7, site.channels)
        activated_gate, activated_up = site.activated(gate, up)
        assert_same(name, activated_gate * activated_up, product(gate, up))
    (site,) = find_gates(feed_forward())
    assert not site.remade


def test_a_sharded_model_keeps_its_formula_in_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    model = PowLU().apply(feed_forward())
    noted: list[Any] = []
    model.gate.register_forward_hook(lambda *_: noted.append(1))
    monkeypatch.setattr(probing, "_is_sharded", lambda parameter: True)
    (site,) = find_gates(model)
    assert (site.activation, site.remade, noted) == ("powlu", True, [])


@pytest.mark.parametrize("recipe", [None, fp8lab.Float8CurrentScaling(), fp8lab.DelayedScaling()])
@pytest.mark.parametrize("name", ["before", "after", "gpt-oss", "situ", "powlu", "relu"])
def test_watching_records_what_is_cast(name: str, recipe: Any, tmp_path: Path) -> None:
    mitigation, _ = CASES[name]
    model = hugging_face("llama", "Llama")
    if recipe is not None:
        fp8lab.convert(model, recipe, include=["*.mlp.*"])
    mitigation.apply(model)
    given: list[float] = []

    def hear(module: nn.Module, args: tuple[Tensor]) -> None:
        given.append(float(args[0].detach().abs().max()))

    with fp8lab.watch(model, tmp_path / "run", every=1) as watching:
        heard = [
            layer.mlp.down_proj.register_forward_pre_hook(hear) for layer in model.model.layers
        ]
        for step in range(3):
            loss = run(model, step)
            loss.backward()
            watching.step(step, loss=loss)
    for handle in heard:
        handle.remove()
    recorded = fp8lab.open_run(tmp_path / "run")
    assert recorded.events().empty
    rows = recorded.tensors("cur_amax")
    for layer in range(2):
        amaxes = rows.loc[rows["site"] == f"model.layers.{layer}.mlp:product", "cur_amax"]
        assert amaxes.tolist() == given[layer::2]
    (said, _) = recorded.info["sites"]
    assert said.items() >= find_gates(model)[0].formula.facts.items()


def test_statistics_of_the_activated_gate_know_a_limit_behind_it(tmp_path: Path) -> None:
    model, x = ClampedSwiGLU(limit=0.75, where="after").apply(feed_forward()), batch()[0]
    with fp8lab.watch(model, tmp_path / "run", every=1) as watching:
        watching.step(0, loss=model(x).square().mean())
    gate, up = F.linear(x, model.gate.weight), F.linear(x, model.up.weight)
    product = after(0.75)(gate, up)
    expected = product.detach().abs().max() / (
        F.silu(gate.detach()).clamp(max=0.75).abs().max() * 0.75
    )
    rows = fp8lab.open_run(tmp_path / "run").tensors("coincidence", sites=".:product")
    assert rows["coincidence"].tolist() == [pytest.approx(float(expected), rel=1e-5)]


def test_it_composes_with_the_mitigations_of_the_cast() -> None:
    for other in (SmoothSwiGLU(), HighPrecisionProduct()):
        for order in (1, -1):
            model = feed_forward()
            fp8lab.convert(model, fp8lab.Float8CurrentScaling())
            for mitigation in [ClampedSwiGLU(limit=2.0), other][::order]:
                mitigation.apply(model)
            output = model(batch()[0])
            output.sum().backward()
            assert output.isfinite().all()
            assert find_gates(model)[0].gate_limit == 2.0


# --- the change of the function -----------------------------------------------------------------


def test_change_of_function_is_what_it_says() -> None:
    model, (x, _) = feed_forward(), batch()
    gate, up = F.linear(x, model.gate.weight), F.linear(x, model.up.weight)
    plain = model(x).detach().double()
    cases = {
        "before": (gate > 0.75) | (up.abs() > 0.75),
        "after": (F.silu(gate) >= 0.75) | (up.abs() > 0.75),
        "situ": torch.zeros_like(gate, dtype=torch.bool),
    }
    for name, touched in cases.items():
        mitigation, product = CASES[name]
        changed = F.linear(by_hand(model, x, product), model.down.weight).detach().double()
        change = change_of_function(model, mitigation, x)
        assert change.difference == pytest.approx(float((changed - plain).norm() / plain.norm()))
        assert change.clamped == float(touched.double().mean())
        assert change.difference > 0.01
    assert not find_gates(model)[0].remade and not model.gate._forward_hooks


def test_change_of_function_of_what_changes_none() -> None:
    model, (x, _) = feed_forward(), batch()
    change = change_of_function(model, ClampedSwiGLU(limit=1e6), x)
    assert (change.difference, change.clamped) == (0.0, 0.0)
    fp8lab.convert(model, fp8lab.DelayedScaling())
    smooth = change_of_function(model.bfloat16(), SmoothSwiGLU(), x.bfloat16())
    assert smooth.difference <= 1e-6
    assert change_of_function(model, HighPrecisionProduct(), x).difference == 0.0
    assert model.down.recipes["input"] == fp8lab.DelayedScaling()
    narrow, model = ClampedSwiGLU(limit=0.75), feed_forward().bfloat16()
    assert change_of_function(model, narrow, x.bfloat16()) == change_of_function(
        model.float(), narrow, x.bfloat16().float()
    )


def test_change_of_function_of_a_whole_model_by_keywords() -> None:
    model = hugging_face("phi3", "Phi3").train()
    tokens = torch.randint(1, 64, (2, 8))
    change = change_of_function(model, ClampedSwiGLU(limit=1.0), {"input_ids": tokens})
    assert 0.0 < change.difference < 2.0 and 0.0 < change.clamped < 1.0
    assert model.training


def test_change_of_function_refuses_what_takes_no_model() -> None:
    class OfAnOptimizer:
        kind = "optimizer"

        def apply(self, optimizer: Any) -> Any: ...

    with pytest.raises(ValueError, match="OfAnOptimizer is of kind optimizer, expected one that t"):
        change_of_function(feed_forward(), OfAnOptimizer(), torch.randn(2, 16))


def test_every_activation_can_be_put_there() -> None:
    x = torch.randn(5, 16)
    for activation, function in ACTIVATIONS.items():
        if activation == "silu":
            continue
        model = ReplacedActivation(activation=activation).apply(feed_forward())
        expected = by_hand(model, x, lambda gate, up, f=function: f(gate) * up)
        assert torch.equal(model(x), F.linear(expected, model.down.weight)), activation
