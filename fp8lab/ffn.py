"""The feed-forward zoo: every activation by name, one gated and one plain feed-forward.

A feed-forward is data (two activation names) and three matrices, so one module serves GLU, GTU,
Bilinear, ReGLU, GEGLU and SwiGLU (Shazeer 2020, "GLU Variants Improve Transformer"; GTU: Dauphin
et al. 2017), and a second one serves the classic form:

    gated   down(gate_activation(gate(x)) * up_activation(up(x)))
    plain   down(activation(up(x)))

The projections are called gate, up and down, never w1, w2 and w3: of the published codes some call
down w2 and others w3. Each is called as a module, once per forward, so that hooks on the children
see every operand exactly once; the product is what down receives. Dropout is a function and not a
child: gate, up, down (and a Swish, if one is given) are all the children.

The precision in which the activation functions are computed is data too, `activation_format`: for
every format one rule, round(function(round(x))) with the function in float32, so that FP32 inside a
BF16 model, BF16 inside an FP32 one and a lookup table of FP8 codes are the same line. It costs two
roundings of each activated tensor. The product is never part of it: that rounding is the recipe's.

Rejected: one class per variant (six copies of one forward); gate and up fused into one matrix (one
launch less on a GPU, but then the two rows of a channel have no names of their own).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp8lab.formats import FloatFormat
from fp8lab.rounding import round_to


def identity(x: Tensor) -> Tensor:
    """x itself: the up side of most variants."""
    return x


def gelu_tanh(x: Tensor) -> Tensor:
    """0.5x(1 + tanh(sqrt(2/pi)(x + 0.044715x^3))), Hendrycks and Gimpel 2016.

    Within 5e-4 of the exact GELU.
    """
    return F.gelu(x, approximate="tanh")


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2, So et al. 2021 (Primer)."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": identity,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,  # slope 0.01
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,  # exact, by erf
    "gelu_tanh": gelu_tanh,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "mish": F.mish,
    "relu_squared": relu_squared,
}
"""Name -> elementwise function, any shape and floating dtype in, the same out."""

GLU_VARIANTS: dict[str, tuple[str, str]] = {
    "glu": ("sigmoid", "identity"),
    "gtu": ("tanh", "sigmoid"),
    "bilinear": ("identity", "identity"),
    "reglu": ("relu", "identity"),
    "geglu": ("gelu", "identity"),
    "swiglu": ("silu", "identity"),
}
"""Name -> (gate activation, up activation), both keys of ACTIVATIONS."""


class Swish(nn.Module):
    """x * sigmoid(beta * x), Ramachandran et al. 2017: 1 is SiLU, 0 is x/2, a large beta ReLU.

    Any shape and floating dtype in, the same out. A learnable beta is one scalar Parameter; a fixed
    one is a float and in no state dict. Raises ValueError for a beta that is not finite.
    """

    beta: nn.Parameter | float

    def __init__(self, beta: float = 1.0, learnable: bool = False) -> None:
        super().__init__()
        if not math.isfinite(beta):
            raise ValueError(f"Swish: beta must be finite, got {beta}")
        self.beta = nn.Parameter(torch.tensor(float(beta))) if learnable else float(beta)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fmt: FloatFormat) -> Tensor:
        return round_to(x, fmt)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


def _rounded(x: Tensor, fmt: FloatFormat) -> Tensor:
    return cast(Tensor, _Rounded.apply(x, fmt))  # type: ignore[no-untyped-call]


def activate(
    function: Callable[[Tensor], Tensor], x: Tensor, fmt: FloatFormat | None = None
) -> Tensor:
    """function(x) as if computed in `fmt`: any shape and floating dtype in, the same out.

    x is rounded to `fmt` without a scale, the function evaluated in float32, its result rounded to
    `fmt`. Gradients pass both roundings straight through, so the slope is that at the rounded x.
    None: function(x) in the dtype of x. identity computes nothing and is not rounded.

    Raises ValueError for float64, whose values would be rounded twice.
    """
    if fmt is None or function is identity:
        return function(x)
    if x.dtype == torch.float64:
        raise ValueError(
            f"activation_format {fmt}: {x.dtype}, expected float32, bfloat16 or float16"
        )
    return _rounded(function(_rounded(x.float(), fmt)), fmt).to(x.dtype)


class GatedFeedForward(nn.Module):
    """dropout(down(gate_activation(gate(x)) * up_activation(up(x)))); x [..., dim] -> [..., dim].

    Weights: gate and up [hidden, dim], down [dim, hidden]; nn.Linear's own initialisation. `swish`
    replaces the gate activation of "swiglu" (a fixed or a learnable beta) and is then a fourth
    child. `activation_format` is that of `activate`, for both activations. Raises ValueError for an
    unknown variant, a width below 1, a dropout outside [0, 1), a format of scales (E8M0), or a
    swish given to another variant.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        variant: str = "swiglu",
        *,
        bias: bool = False,
        dropout: float = 0.0,
        swish: Swish | None = None,
        activation_format: FloatFormat | None = None,
    ) -> None:
        super().__init__()
        _check("GatedFeedForward", dim, hidden, dropout, variant, GLU_VARIANTS, activation_format)
        if swish is not None and variant != "swiglu":
            raise ValueError(f"GatedFeedForward: swish is for variant 'swiglu', got {variant!r}")
        self.variant = variant
        self.dropout = dropout
        self.activation_format = activation_format
        self.swish = swish
        self.gate = nn.Linear(dim, hidden, bias=bias)
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.down = nn.Linear(hidden, dim, bias=bias)

    def activated(self, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """The two factors of the product, from the outputs [..., hidden] of gate and up."""
        gate_name, up_name = GLU_VARIANTS[self.variant]
        gate_activation = ACTIVATIONS[gate_name] if self.swish is None else self.swish
        fmt = self.activation_format
        return activate(gate_activation, gate, fmt), activate(ACTIVATIONS[up_name], up, fmt)

    def product(self, x: Tensor) -> Tensor:
        """What down receives: x [..., dim] -> [..., hidden]."""
        activated_gate, activated_up = self.activated(self.gate(x), self.up(x))
        return activated_gate * activated_up

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.down(self.product(x)), self.dropout, self.training)

    def extra_repr(self) -> str:
        return _format_repr(self.activation_format)


class FeedForward(nn.Module):
    """dropout(down(activation(up(x)))), without a gate; x [..., dim] -> [..., dim].

    Weights: up [hidden, dim], down [dim, hidden]; nn.Linear's own initialisation.
    `activation_format` is that of `activate`. Raises ValueError for an unknown activation, a width
    below 1, a dropout outside [0, 1) or a format of scales (E8M0).
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        activation: str = "gelu",
        *,
        bias: bool = False,
        dropout: float = 0.0,
        activation_format: FloatFormat | None = None,
    ) -> None:
        super().__init__()
        _check("FeedForward", dim, hidden, dropout, activation, ACTIVATIONS, activation_format)
        self.activation = activation
        self.dropout = dropout
        self.activation_format = activation_format
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.down = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        product = activate(ACTIVATIONS[self.activation], self.up(x), self.activation_format)
        return F.dropout(self.down(product), self.dropout, self.training)

    def extra_repr(self) -> str:
        return _format_repr(self.activation_format)


def matched_hidden(hidden: int, multiple_of: int = 1) -> int:
    """The width at which a gated feed-forward has the parameters of a plain one of width `hidden`.

    floor(2 * hidden / 3), since three matrices replace two, rounded up to `multiple_of`:
    (256, 16) -> 176, (64, 8) -> 48. Raises ValueError for a hidden below 2, which would leave
    nothing, or a multiple_of below 1.
    """
    if hidden < 2 or multiple_of < 1:
        raise ValueError(
            "matched_hidden: expected hidden >= 2 and multiple_of >= 1, "
            f"got {hidden} and {multiple_of}"
        )
    return multiple_of * ((2 * hidden // 3 + multiple_of - 1) // multiple_of)


def llama_hidden(dim: int) -> int:
    """int(2/3 * 4 * dim), the width in Llama and DeepSeek before any rounding up, as 8 * dim // 3.

    The float form has no trap to reproduce. Its 2/3 is too small by a third of a unit in the last
    place, so before the last rounding it lies 2^-54 (relative) below 8/3 * dim. Where that is a
    whole number it is at most half a spacing away, and the one tie, dim = 3 * 2^k (384, 768, ...),
    goes to the even significand, which is the power of two. Equal for every dim below 2^48.
    """
    return matched_hidden(4 * dim)


def _format_repr(fmt: FloatFormat | None) -> str:
    return "" if fmt is None else f"activation_format={fmt}"


def _check(
    owner: str,
    dim: int,
    hidden: int,
    dropout: float,
    name: str,
    known: Mapping[str, object],
    fmt: FloatFormat | None,
) -> None:
    if dim < 1 or hidden < 1:
        raise ValueError(f"{owner}: dim and hidden must be at least 1, got {dim} and {hidden}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"{owner}: dropout must lie in [0, 1), got {dropout}")
    if name not in known:
        raise ValueError(f"{owner}: unknown name {name!r}, expected one of {', '.join(known)}")
    if fmt is not None and not (isinstance(fmt, FloatFormat) and fmt.signed):
        raise ValueError(
            f"{owner}: activation_format must be None or a FloatFormat of elements, got {fmt!r}"
        )
