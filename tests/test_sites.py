"""Roles found by running, on every way of writing a gated feed-forward that we have met.

Each model here is written with names that lie, or with none to go by, and its true roles stand
beside it. What is found must be what was written: the very weights, biases and modules, and the
activations by name; and the product made of what was found must be the model's own, to the bit.
The classes of `transformers` are the real ones.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fp8lab
from fp8lab.ffn import ACTIVATIONS, GLU_VARIANTS, XIELU, FeedForward, GatedFeedForward, Swish
from fp8lab.formats import FORMATS
from fp8lab.lab.model import LanguageModel, ModelConfig
from fp8lab.sites import GateSite, cast_in_force, find_feed_forwards, find_gates

DIM, HIDDEN = 16, 40
DELAYED = fp8lab.DelayedScaling(amax_history_len=4)

Act = Callable[[Tensor, Tensor], Tensor]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


class Called(nn.Module):
    """torchtitan, OLMo and Llama's own code: w1 is gate, w3 is up, w2 is down."""

    def __init__(self, act: Act = swiglu, dim: int = DIM, hidden: int = HIDDEN, **more: Any):
        super().__init__()
        self.act = act
        self.w1 = nn.Linear(dim, hidden, **{"bias": False, **more})
        self.w2 = nn.Linear(hidden, dim, **{"bias": False, **more})
        self.w3 = nn.Linear(dim, hidden, **{"bias": False, **more})

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act(self.w1(x), self.w3(x)))


class Twice(Called):
    """Seed 000: gate is called twice in one forward."""

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.w1(x).sigmoid() * self.w1(x) * self.w3(x))


class DownIsThird(Called):
    """xformers: w1 is gate, w2 is up, w3 is down."""

    def __init__(self, dim: int = DIM, hidden: int = HIDDEN):
        super().__init__(dim=dim, hidden=hidden)
        self.w2, self.w3 = self.w3, self.w2

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class Weights(DownIsThird):
    """Seed 002: the modules are never called."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(F.linear(x, self.w1.weight)) * F.linear(x, self.w2.weight)
        return F.linear(hidden, self.w3.weight)


class WeightsWithBias(DownIsThird):
    def __init__(self, dim: int = DIM, hidden: int = HIDDEN):
        super().__init__(dim, hidden)
        self.b1, self.b2 = (nn.Parameter(torch.randn(hidden)) for _ in range(2))
        self.b3 = nn.Parameter(torch.randn(dim))

    def forward(self, x: Tensor) -> Tensor:
        gate = F.linear(x, self.w1.weight, self.b1)
        up = F.linear(x, bias=self.b2, weight=self.w2.weight)
        return F.linear(F.silu(gate) * up, self.w3.weight, bias=self.b3)


class Transposed(nn.Module):
    """Bare parameters; `gate` and `up` are named the wrong way round."""

    def __init__(self, dim: int = DIM, hidden: int = HIDDEN):
        super().__init__()
        self.up, self.gate = (nn.Parameter(torch.randn(hidden, dim)) for _ in range(2))
        self.out = nn.Parameter(torch.randn(dim, hidden))

    def forward(self, x: Tensor) -> Tensor:
        up = torch.matmul(x, self.gate.t())
        return (F.silu(x @ self.up.T) * up) @ self.out.T


class ByName(Transposed):
    def forward(self, x: Tensor) -> Tensor:
        up = torch.matmul(input=x, other=self.gate.t())
        gate = torch.matmul(x, other=self.up.t())
        return torch.matmul(input=F.silu(gate) * up, other=self.out.t())


class Dropped(Called):
    """Seed 004, the right form, with its dropout."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5, self.training)


class InPlace(Called):
    def forward(self, x: Tensor) -> Tensor:
        return self.w2(input=F.silu(self.w1(x), inplace=True).mul_(self.w3(input=x)))


def only(model: nn.Module) -> GateSite:
    (site,) = find_gates(model)
    return site


def assert_roles(
    site: GateSite, gate: str, up: str, down: str, activations: tuple[str, str] = ("silu", "")
) -> None:
    assert (site.gate.name, site.up.name, site.down.name) == (gate, up, down)
    assert (site.activation, site.up_activation) == (activations[0], activations[1] or "identity")
    own = dict(site.module.named_parameters())
    for projection in (site.gate, site.up, site.down):
        assert projection.weight is own[projection.name]
        owner, _, _ = projection.name.rpartition(".")
        if projection.module is not None:
            assert projection.module is site.module.get_submodule(owner)
            assert projection.bias is projection.module.bias


def assert_explains(site: GateSite, model: nn.Module) -> None:
    """What the roles say the model computes is what it computes, to the bit."""
    dtype = site.gate.weight.dtype
    x = torch.randn(3, site.gate.weight.shape[1]).to(dtype)
    activated_gate, activated_up = site.activated(site.gate(x), site.up(x))
    model.eval()
    assert torch.equal(site.down(activated_gate * activated_up), model(x))


CALLED: dict[str, tuple[Callable[[], nn.Module], tuple[str, str, str]]] = {
    "torchtitan": (Called, ("w1", "w3", "w2")),
    "xformers": (DownIsThird, ("w1", "w2", "w3")),
    "seed 004": (Dropped, ("w1", "w3", "w2")),
    "in place, by keyword": (InPlace, ("w1", "w3", "w2")),
    "dim is hidden": (lambda: Called(dim=24, hidden=24), ("w1", "w3", "w2")),
    "hidden below dim": (lambda: Called(dim=24, hidden=9), ("w1", "w3", "w2")),
    "one channel": (lambda: Called(dim=4, hidden=1), ("w1", "w3", "w2")),
    "bias": (lambda: Called(bias=True), ("w1", "w3", "w2")),
}


@pytest.mark.parametrize("name", CALLED)
def test_projections_that_are_called(name: str) -> None:
    build, roles = CALLED[name]
    model = build()
    site = only(model)
    assert_roles(site, *(f"{role}.weight" for role in roles))
    assert site.hookable
    assert_explains(site, model)


def test_a_gate_that_is_called_twice() -> None:
    site = only(Twice())
    assert_roles(site, "w1.weight", "w3.weight", "w2.weight")
    assert site.hookable


UNCALLED: dict[str, tuple[Callable[[], nn.Module], tuple[str, str, str]]] = {
    "seed 002": (Weights, ("w1.weight", "w2.weight", "w3.weight")),
    "seed 002, square": (lambda: Weights(24, 24), ("w1.weight", "w2.weight", "w3.weight")),
    "with bias": (WeightsWithBias, ("w1.weight", "w2.weight", "w3.weight")),
    "x @ w.T": (Transposed, ("up", "gate", "out")),
    "matmul by name": (ByName, ("up", "gate", "out")),
    "x @ w.T, dim is hidden": (lambda: Transposed(24, 24), ("up", "gate", "out")),
}


@pytest.mark.parametrize("name", UNCALLED)
def test_projections_that_are_never_called(name: str) -> None:
    build, roles = UNCALLED[name]
    model = build()
    site = only(model)
    assert_roles(site, *roles)
    assert not site.hookable
    assert_explains(site, model)


def test_biases_of_uncalled_projections_are_found() -> None:
    model = WeightsWithBias()
    site = only(model)
    assert site.gate.bias is model.b1
    assert site.up.bias is model.b2
    assert site.down.bias is model.b3


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", GLU_VARIANTS)
def test_every_variant_of_the_zoo(variant: str, dtype: torch.dtype, bias: bool) -> None:
    model = GatedFeedForward(DIM, HIDDEN, variant, bias=bias, dropout=0.5).to(dtype)
    site = only(model)
    assert_roles(site, "gate.weight", "up.weight", "down.weight", GLU_VARIANTS[variant])
    assert_explains(site, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fmt", ["FP32", "BF16", "E4M3", "E2M1"])
@pytest.mark.parametrize("variant", GLU_VARIANTS)
def test_activations_in_a_format_of_their_own(variant: str, fmt: str, dtype: torch.dtype) -> None:
    """Told apart all the same (in E2M1 GELU is ReLU), and `activated` is what the module does."""
    model = GatedFeedForward(DIM, HIDDEN, variant, activation_format=FORMATS[fmt]).to(dtype)
    site = only(nn.Sequential(model))
    assert_roles(site, "gate.weight", "up.weight", "down.weight", GLU_VARIANTS[variant])
    assert model.activation_format is FORMATS[fmt]
    assert_explains(site, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_told_from_every_other(activation: str, dtype: torch.dtype) -> None:
    act = ACTIVATIONS[activation]
    site = only(Called(lambda gate, up: act(gate) * up).to(dtype))
    assert_roles(site, "w1.weight", "w3.weight", "w2.weight", (activation, "identity"))


def written_gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_activation_written_out_is_recognised(dtype: torch.dtype) -> None:
    gemma = Called(lambda gate, up: written_gelu_tanh(gate) * up).to(dtype)
    assert only(gemma).activation == "gelu_tanh"
    silu = Called(lambda gate, up: up * (gate / (1 + torch.exp(-gate)))).to(dtype)
    assert only(silu).activation == "silu"


@pytest.mark.parametrize("size", [0.01, 20.0])
def test_small_and_large_weights(size: float) -> None:
    model = Called()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=size)
    assert_roles(only(model), "w1.weight", "w3.weight", "w2.weight")


def test_dropout_of_the_product_does_not_hide_it() -> None:
    class Inner(Called):
        def forward(self, x: Tensor) -> Tensor:
            return self.w2(F.dropout(swiglu(self.w1(x), self.w3(x)), 0.5, self.training))

    assert_roles(only(Inner().train()), "w1.weight", "w3.weight", "w2.weight")


class Numbered(Called):
    """The numbers of its formula are attributes, whatever they are called."""

    def __init__(self, act: Callable[..., Tensor], **numbers: float) -> None:
        super().__init__(lambda gate, up: act(gate, up, **numbers))
        self.hidden_size, self.top_k, self.dropout = 16, 2, 0.1
        for name, number in numbers.items():
            setattr(self, name, number)


def clamped(gate: Tensor, up: Tensor, some: float) -> Tensor:
    return F.silu(gate.clamp(max=some)) * up.clamp(-some, some)


def of_gpt_oss(gate: Tensor, up: Tensor, one: float, other: float) -> Tensor:
    gate, up = gate.clamp(max=one), up.clamp(-one, one)
    return (up + 1) * gate * torch.sigmoid(gate * other)


def clamped_after(gate: Tensor, up: Tensor, some: float) -> Tensor:
    return F.silu(gate).clamp(max=some) * up.clamp(-some, some)


def of_kimi(gate: Tensor, up: Tensor, one: float, other: float) -> Tensor:
    bounded = one * torch.tanh(gate / one) * torch.sigmoid(gate)
    return bounded * other * torch.tanh(up / other)


def of_ling(gate: Tensor, up: Tensor, some: float) -> Tensor:
    base = gate.clamp(min=1e-30)
    grown = base.pow(some / (base.sqrt() + 1)) * torch.sigmoid(gate)
    return torch.where(gate > 0, grown, gate * torch.sigmoid(gate)) * up


def of_xielu(gate: Tensor, up: Tensor, one: float, other: float) -> Tensor:
    below = gate.clamp(max=-1e-6)
    negative = other * (torch.expm1(below) - gate) + 0.5 * gate
    return torch.where(gate > 0, one * gate * gate + 0.5 * gate, negative) * up


PLAIN_NUMBERS = {"beta": 1.0, "gate_limit": None, "up_limit": None, "up_offset": 0.0}
PLAIN_NUMBERS |= {"activated_limit": None, "up_beta": 1.0, "up_activation": "identity"}
PLAIN_NUMBERS |= {"alphas": None, "remade": False}
KIMI = {"up_activation": "soft_limit", "beta": 4.0, "up_beta": 25.0}
MODIFIED: dict[str, tuple[Callable[[], nn.Module], str, dict[str, Any]]] = {
    "off by one": (
        lambda: Called(lambda gate, up: F.silu(gate) * (up + 1)),
        "silu",
        {"up_offset": 1.0},
    ),
    "quick GELU": (
        lambda: Called(lambda gate, up: gate * torch.sigmoid(1.702 * gate) * up),
        "swish",
        {"beta": 1.702},
    ),
    "Swish": (lambda: GatedFeedForward(DIM, HIDDEN, swish=Swish(1.5)), "swish", {"beta": 1.5}),
    "learnable Swish": (
        lambda: GatedFeedForward(DIM, HIDDEN, swish=Swish(0.5, learnable=True)),
        "swish",
        {"beta": 0.5},
    ),
    "Swish in a format": (
        lambda: GatedFeedForward(DIM, HIDDEN, swish=Swish(1.5), activation_format=FORMATS["E2M1"]),
        "swish",
        {"beta": 1.5},
    ),
    "clamped": (
        lambda: Numbered(clamped, some=7.0),
        "silu",
        {"gate_limit": 7.0, "up_limit": 7.0},
    ),
    "gate clamped": (
        lambda: Numbered(lambda gate, up, some: F.gelu(gate.clamp(max=some)) * up, some=10),
        "gelu",
        {"gate_limit": 10.0},
    ),
    "up clamped": (
        lambda: Numbered(lambda gate, up, some: F.relu(gate) * up.clamp(-some, some), some=3.5),
        "relu",
        {"up_limit": 3.5},
    ),
    "GPT-OSS": (
        lambda: Numbered(of_gpt_oss, one=7.0, other=1.25),
        "swish",
        {"beta": 1.25, "gate_limit": 7.0, "up_limit": 7.0, "up_offset": 1.0},
    ),
    "clamped after": (
        lambda: Numbered(clamped_after, some=7.0),
        "silu",
        {"activated_limit": 7.0, "up_limit": 7.0},
    ),
    "activated gate clamped": (
        lambda: Numbered(lambda gate, up, some: F.gelu(gate).clamp(max=some) * up, some=5.0),
        "gelu",
        {"activated_limit": 5.0},
    ),
    "SiTU": (lambda: Called(lambda gate, up: of_kimi(gate, up, 4.0, 25.0)), "situ", KIMI),
    "SiTU with other bounds": (
        lambda: Numbered(of_kimi, one=3.0, other=12.5),
        "situ",
        KIMI | {"beta": 3.0, "up_beta": 12.5},
    ),
    "PowLU": (lambda: Called(lambda gate, up: of_ling(gate, up, 3.0)), "powlu", {"beta": 3.0}),
    "PowLU with another power": (lambda: Numbered(of_ling, some=2.5), "powlu", {"beta": 2.5}),
    "PowLU, up clamped": (
        lambda: Numbered(
            lambda gate, up, some, m: of_ling(gate, up.clamp(-some, some), m), some=9.0, m=3.0
        ),
        "powlu",
        {"beta": 3.0, "up_limit": 9.0},
    ),
    "xIELU": (
        lambda: Numbered(of_xielu, one=0.75, other=1.25),
        "xielu",
        {"beta": 0.5, "alphas": (0.75, 1.25)},
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODIFIED)
def test_slopes_limits_and_offsets(name: str, dtype: torch.dtype) -> None:
    build, activation, numbers = MODIFIED[name]
    model = build().to(dtype)
    site = only(model)
    assert site.activation == activation
    for field, value in (PLAIN_NUMBERS | numbers).items():
        assert getattr(site, field) == value, field
    assert not site.weighted
    facts = site.formula.facts
    assert facts["activation"] == activation
    assert {name: facts[name] for name in numbers if name != "alphas"} == {
        name: value for name, value in numbers.items() if name != "alphas"
    }
    if dtype == torch.float32:
        x = 8 * torch.randn(3, DIM)
        activated_gate, activated_up = site.activated(site.gate(x), site.up(x))
        torch.testing.assert_close(site.down(activated_gate * activated_up), model.eval()(x))


def test_a_trainable_xielu_is_found_and_followed() -> None:
    gated = GatedFeedForward(DIM, HIDDEN, xielu=XIELU(alpha_p=0.6, alpha_n=1.5))
    plain = FeedForward(DIM, HIDDEN, "xielu")
    site, (other,) = only(gated), find_feed_forwards(plain)
    assert (site.activation, other.activation) == ("xielu", "xielu")
    assert site.alphas == pytest.approx((0.6, 1.5)) and other.alphas == pytest.approx((0.8, 0.8))
    x = torch.randn(5, DIM)
    for model in (gated, plain):
        with torch.no_grad():
            model.xielu.alpha_p.add_(0.5)
    assert torch.equal(site.down(torch.mul(*site.activated(site.gate(x), site.up(x)))), gated(x))
    assert torch.equal(other.down(other.activated(other.up(x))), plain(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apertus_has_an_xielu_and_no_gate(dtype: torch.dtype) -> None:
    room = import_module("transformers.models.apertus.modeling_apertus")
    settings = import_module("transformers.models.apertus.configuration_apertus")
    config = settings.ApertusConfig(hidden_size=DIM, intermediate_size=HIDDEN, dtype=dtype)
    mlp = room.ApertusMLP(config).to(dtype)
    (site,) = find_feed_forwards(mlp)
    assert (site.activation, site.beta) == ("xielu", 0.5)
    assert site.alphas == pytest.approx((0.8, 0.8), rel=1e-2)
    x = torch.randn(3, DIM).to(dtype)
    rounding = {} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.01}
    torch.testing.assert_close(site.down(site.activated(site.up(x))), mlp(x), **rounding)


PUBLISHED: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "deepseek_v4": (
        "DeepseekV4MLP",
        "DeepseekV4Config",
        {"swiglu_limit": 10.0},
        {"gate_limit": 10.0, "up_limit": 10.0},
    ),
    "step3p7": (
        "Step3p7MLP",
        "Step3p7TextConfig",
        {"swiglu_limits_shared": [0.0, 16.0], "share_expert_dim": HIDDEN},
        {"activated_limit": 16.0, "up_limit": 16.0},
    ),
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_limits_of_published_models(family: str) -> None:
    module, config, settings, numbers = PUBLISHED[family]
    room = import_module(f"transformers.models.{family}.modeling_{family}")
    sizes = {"hidden_size": DIM, "intermediate_size": HIDDEN, "moe_intermediate_size": HIDDEN}
    config = getattr(room, config)(**sizes, **settings)
    kind = getattr(room, module)
    mlp = kind(config, 1) if "swiglu_limits_shared" in settings else kind(config)
    site = only(mlp)
    assert site.activation == "silu"
    for field, value in (PLAIN_NUMBERS | numbers).items():
        assert getattr(site, field) == value, field


class WeighedExperts(nn.Module):
    """Stacks, each token's product weighed by its router before down; the formula is given."""

    def __init__(self, act: Act, **numbers: float) -> None:
        super().__init__()
        self.act = act
        self.gate, self.up = (nn.Parameter(torch.randn(2, DIM, HIDDEN)) for _ in range(2))
        self.down = nn.Parameter(torch.randn(2, HIDDEN, DIM))
        for name, number in numbers.items():
            setattr(self, name, number)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(2, -1, DIM)
        weight = torch.linspace(0.1, 0.9, x.shape[1])[:, None]
        product = self.act(torch.bmm(x, self.gate), torch.bmm(x, self.up))
        return torch.bmm(product * weight, self.down).flatten(0, 1)


@pytest.mark.parametrize(
    ("act", "activation", "numbers"),
    [
        (lambda gate, up: of_kimi(gate, up, 4.0, 25.0), "situ", (4.0, 25.0)),
        (lambda gate, up: of_ling(gate, up, 3.0), "powlu", (3.0, 1.0)),
        (lambda gate, up: clamped_after(gate, up, 7.0), "silu", (1.0, 1.0)),
    ],
    ids=["SiTU", "PowLU", "after"],
)
def test_weighed_experts_with_them(act: Act, activation: str, numbers: tuple[float, float]) -> None:
    site = only(WeighedExperts(act, some=7.0))
    assert (site.activation, site.weighted, site.experts) == (activation, True, 2)
    assert (site.beta, site.up_beta) == numbers
    assert site.activated_limit == (7.0 if activation == "silu" else None)


def test_a_bias_that_is_added_apart_belongs_to_the_projection() -> None:
    model = Biased(True)
    site = only(model)
    assert_roles(site, "w1.weight", "w2.weight", "w3.weight")
    assert site.gate.bias is model.b1
    assert site.up.bias is None


def test_a_matrix_that_stands_on_the_right_is_transposed() -> None:
    model = SquareFromTheRight()
    site = only(model)
    assert (site.gate.name, site.up.name, site.down.name) == ("w1", "w2", "w3")
    assert site.gate.transposed and site.up.transposed and site.down.transposed
    x = torch.randn(3, DIM)
    assert torch.equal(site.gate(x), F.linear(x, model.w1.T))
    assert_explains(site, model)


def test_zero_and_nan_weights_are_no_obstacle() -> None:
    for value in (0.0, float("nan")):
        model = Called()
        for parameter in model.parameters():
            nn.init.constant_(parameter, value)
        assert_roles(only(model), "w1.weight", "w3.weight", "w2.weight")


def test_a_large_stack_of_experts_is_probed_with_one_matrix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from foreign_feed_forwards import TorchtitanExperts

    from fp8lab.sites import probing

    monkeypatch.setattr(probing, "_SMALL_STACK", 1)
    assert probing._stand_ins(TorchtitanExperts(), torch.device("cpu"))["w1_EFD"].stride(0) == 0
    site = only(TorchtitanExperts())
    assert (site.gate.name, site.up.name, site.down.name) == ("w1_EFD", "w3_EFD", "w2_EDF")
    assert site.experts == 3


def test_experts_whose_routing_is_not_understood_are_said_to_be() -> None:
    from foreign_feed_forwards import TorchtitanExperts

    class Strange(TorchtitanExperts):
        def forward(self, x: Tensor, mystery: Tensor) -> Tensor:
            return super().forward(x, mystery)

    with pytest.raises(ValueError, match="its forward takes 'mystery', which the probe does not"):
        find_gates(Strange())


# --- whole models -----------------------------------------------------------------------------


def language_model(variant: str = "swiglu") -> LanguageModel:
    config = ModelConfig(dim=16, layers=3, heads=2, context=8, variant=variant)
    return LanguageModel(config, seed=0)


def test_every_layer_of_the_lab_model() -> None:
    sites = find_gates(language_model())
    assert [site.name for site in sites] == [f"layers.{i}.mlp" for i in range(3)]
    for site in sites:
        assert_roles(site, "gate.weight", "up.weight", "down.weight")
    assert sites[2].site("product") == "layers.2.mlp:product"


@pytest.mark.parametrize("recipe", [DELAYED, fp8lab.Float8CurrentScaling()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_converted_models(recipe: Any, dtype: torch.dtype) -> None:
    model = fp8lab.convert(language_model("geglu").to(dtype), recipe)
    for layer, site in enumerate(find_gates(model)):
        assert site.name == f"layers.{layer}.mlp"
        assert_roles(site, "gate.weight", "up.weight", "down.weight", ("gelu", ""))
        how = cast_in_force(site.down.module, "input", torch.ones(1, HIDDEN))
        assert type(how.recipe) is type(recipe)


def test_a_plain_layer_does_not_say_how_it_casts() -> None:
    assert cast_in_force(nn.Linear(4, 4), "input", torch.ones(1, 4)) is None
    assert cast_in_force(None, "input", torch.ones(1, 4)) is None


def test_experts_are_sites_of_their_own() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(DIM, 2, bias=False)
            self.experts = nn.ModuleList([Called(), Called()])

        def forward(self, x: Tensor) -> Tensor:
            return sum(expert(x) for expert in self.experts) * self.router(x).amax()

    assert [site.name for site in find_gates(Experts())] == ["experts.0", "experts.1"]


HUGGING_FACE = {
    "llama": ("LlamaMLP", "LlamaConfig", "silu"),
    "mistral": ("MistralMLP", "MistralConfig", "silu"),
    "qwen3": ("Qwen3MLP", "Qwen3Config", "silu"),
    "gemma2": ("Gemma2MLP", "Gemma2Config", "gelu_tanh"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", HUGGING_FACE)
def test_the_real_classes_of_transformers(family: str, dtype: torch.dtype) -> None:
    module, config, activation = HUGGING_FACE[family]
    room = import_module(f"transformers.models.{family}.modeling_{family}")
    sizes = {"hidden_size": DIM, "intermediate_size": HIDDEN, "num_attention_heads": 2}
    mlp = getattr(room, module)(getattr(room, config)(**sizes)).to(dtype)
    site = only(mlp)
    roles = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
    assert_roles(site, *roles, (activation, ""))
    assert_explains(site, mlp)


def test_a_whole_llama_of_transformers() -> None:
    llama = import_module("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=32,
        max_position_embeddings=16,
    )
    sites = find_gates(llama.LlamaForCausalLM(config))
    assert [site.name for site in sites] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    for site in sites:
        assert_roles(site, "gate_proj.weight", "up_proj.weight", "down_proj.weight")


# --- what is no gate --------------------------------------------------------------------------


class Misplaced(Called):
    """Seed 004 as printed: the parenthesis closes too early."""

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x))) * self.w3(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


class Biased(WeightsWithBias):
    """A bias that is added outside the linear map, or that is no parameter: it would be lost."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.apart = apart

    def forward(self, x: Tensor) -> Tensor:
        gate = F.linear(x, self.w1.weight, None if self.apart else 2 * self.b1)
        gate = gate + self.b1 if self.apart else gate
        return F.linear(F.silu(gate) * F.linear(x, self.w2.weight), self.w3.weight)


class Alone(Called):
    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w1(x))


class SquareFromTheRight(nn.Module):
    """x @ w: the map's matrix is the transpose of the parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Parameter(torch.randn(DIM, DIM)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return (F.silu(x @ self.w1) * (x @ self.w2)) @ self.w3


def fails(gate: Tensor, up: Tensor) -> Tensor:
    raise AssertionError  # without a message


NO_FIT = "no two of its projections give the input of a third as act(gate) * up"
NO_GATE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "plain": (lambda: FeedForward(DIM, HIDDEN), "has no gate: down(gelu(up(x)))"),
    "linear": (lambda: nn.Linear(DIM, HIDDEN), ""),
    "nothing": (nn.Identity, ""),
    "attention": (Attention, NO_FIT),
    "seed 004 as printed": (Misplaced, "the probe failed: The size of tensor a"),
    "seed 004 as printed, square": (
        lambda: Misplaced(dim=24, hidden=24),
        "has no gate: down(silu(up(x)))",
    ),
    "sum": (lambda: Called(lambda gate, up: F.silu(gate) + up), NO_FIT),
    "off by two": (lambda: Called(lambda gate, up: F.silu(gate) * (up + 2)), NO_FIT),
    "a slope that is nowhere": (
        lambda: Called(lambda gate, up: gate * torch.sigmoid(1.5 * gate) * up),
        NO_FIT,
    ),
    "a power that is nowhere": (lambda: Called(lambda g, u: of_ling(g, u, 2.5)), NO_FIT),
    "bounds that are nowhere": (lambda: Called(lambda g, u: of_kimi(g, u, 4.0, 24.0)), NO_FIT),
    "clamped after": (lambda: Called(lambda g, u: clamped_after(g, u, 7.0)), NO_FIT),
    "a factor per channel": (
        lambda: Called(lambda gate, up: F.silu(gate) * up * torch.arange(1.0, HIDDEN + 1)),
        NO_FIT,
    ),
    "clamped": (lambda: Called(lambda gate, up: F.silu(gate.clamp(max=7)) * up), NO_FIT),
    "gate alone": (Alone, NO_FIT),
    "bias computed": (lambda: Biased(False), NO_FIT),
    "raises": (lambda: Called(fails), "the probe failed: AssertionError"),
    "meta": (lambda: Called(device="meta"), "its weights are on the meta device"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NO_GATE)
def test_another_function_is_no_gate_and_the_error_says_why(name: str, dtype: torch.dtype) -> None:
    build, reason = NO_GATE[name]
    model = build().to(dtype)
    with pytest.raises(ValueError, match="no gated feed-forward found") as error:
        find_gates(model)
    message = str(error.value)
    assert message.startswith(f"{type(model).__name__}: ")
    assert "\n" not in message
    assert f"(.: {reason}" in message if reason else "(" not in message.partition("separate")[2]


def test_what_does_not_fit_is_passed_over_where_another_fits() -> None:
    model = nn.ModuleDict({"attention": Attention(), "mlp": Called(), "wrong": Misplaced()})
    assert only(model).name == "mlp"


# --- the probe leaves no trace ----------------------------------------------------------------


class Counting(Called):
    """Draws random numbers and writes to its buffers, in place and anew."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        torch.rand(7)
        self.calls += 1
        self.last = torch.ones(3)
        return super().forward(x)


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "values": {k: v.clone() for k, v in (*model.named_parameters(), *model.named_buffers())},
        "identities": {k: id(v) for k, v in (*model.named_parameters(), *model.named_buffers())},
        "versions": {k: v._version for k, v in model.named_parameters()},
        "modes": [module.training for module in model.modules()],
        "hooks": [
            [list(hooks) for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)]
            for m in model.modules()
        ],
        "gradients": [parameter.requires_grad for parameter in model.parameters()],
        "rng": torch.random.get_rng_state(),
        "enabled": torch.is_grad_enabled(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert torch.equal(before.pop("rng"), after.pop("rng"))
    old, new = before.pop("values"), after.pop("values")
    assert old.keys() == new.keys()
    for name, value in old.items():
        assert torch.equal(value, new[name]), name
    assert before == after


def trained() -> nn.Module:
    model = fp8lab.convert(language_model(), DELAYED)
    model.loss(torch.randint(0, 256, (2, 9))).backward()
    return model


@pytest.mark.parametrize(
    "build",
    [
        Called,
        Counting,
        Weights,
        Misplaced,
        lambda: Called(fails),
        lambda: GatedFeedForward(DIM, HIDDEN, dropout=0.5).bfloat16(),
        trained,
    ],
    ids=["called", "counting", "uncalled", "misplaced", "raising", "dropout", "delayed"],
)
def test_the_probe_leaves_everything_as_it_was(build: Callable[[], nn.Module]) -> None:
    model = build()
    for position, module in enumerate(model.modules()):
        module.training = position % 2 == 0
    model.register_forward_hook(lambda *_: None)
    before = snapshot(model)
    try:
        find_gates(model)
    except ValueError as error:
        assert isinstance(model, Misplaced) or "AssertionError" in str(error)
    assert_same(before, snapshot(model))


def test_a_snapshot_sees_a_difference() -> None:
    model = Counting()
    before = snapshot(model)
    model(torch.ones(1, DIM))
    with pytest.raises(AssertionError):
        assert_same(before, snapshot(model))


def test_delayed_scales_do_not_move_in_the_probe() -> None:
    watched = trained()
    alone = copy.deepcopy(watched)
    tokens = torch.randint(0, 256, (2, 9))
    find_gates(watched)
    for model in (watched, alone):
        model.loss(tokens).backward()
    for one, other in zip(watched.buffers(), alone.buffers(), strict=True):
        assert torch.equal(one, other)


def test_the_message_of_a_long_failure_is_cut_to_one_line() -> None:
    def boom(gate: Tensor, up: Tensor) -> Tensor:
        raise RuntimeError("first line " + "x" * 500 + "\nsecond line")

    with pytest.raises(ValueError, match="first line x") as error:
        find_gates(Called(boom))
    assert not re.search("second|\n", str(error.value))
    assert len(str(error.value)) < 320
