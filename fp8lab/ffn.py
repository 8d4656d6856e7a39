"""The feed-forward zoo: every activation by name, one gated and one plain feed-forward.

A feed-forward is data (two activation names) and three matrices, so one module serves GLU, GTU,
Bilinear, ReGLU, GEGLU and SwiGLU (Shazeer 2020, "GLU Variants Improve Transformer"; GTU: Dauphin
et al. 2017), and a second one serves the classic form:

    gated   down(gate_activation(gate(x)) * up_activation(up(x)))
    plain   down(activation(up(x)))

The projections are called gate, up and down, never w1, w2 and w3: of the published codes some call
down w2 and others w3. Each is called as a module, once per forward, so that hooks on the children
see every operand exactly once; the product is what down receives. Dropout is a function and not a
child: gate, up, down (and a Swish or an XIELU, if there is one) are all the children.

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

from fp8lab.formats import FloatFormat as FloatFormat
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


def swish(x: Tensor, beta: float) -> Tensor:
    """x * sigmoid(beta * x), as `Swish`."""
    return x * torch.sigmoid(x * beta)


def powlu(x: Tensor, power: float = 3.0) -> Tensor:
    """x^(power / (sqrt(x) + 1)) * sigmoid(x) for x > 0 and SiLU elsewhere, PowLU's gate.

    From a note on Jiang et al. 2026 (2605.25704), whose own text was not at hand: how sure the
    formula is, is how sure the note is. With power 3 it is at most 5.32 (at 12.9), falls to 1 from
    there, and the product grows like up alone. Continuous at 0, where the slope is SiLU's 1/2 from
    the left and 0 from the right (for a power above 1); torch gives 1/2 at 0 itself. Infinity
    gives what the largest number does (1, but 1.14 in float16), with the slope 0. Any shape and
    floating dtype in, the same out.
    """
    above = x > 0
    # No branch sees what would make its slope, times 0, a NaN.
    base = torch.where(above, x, 1.0).clamp(max=torch.finfo(x.dtype).max)
    grown = base ** (power / (base.sqrt() + 1)) * torch.sigmoid(base)
    return torch.where(above, grown, F.silu(x.masked_fill(above, 0.0)))


def situ(x: Tensor, bound: float = 4.0) -> Tensor:
    """bound * tanh(x / bound) * sigmoid(x), the gate of SiTU-GLU (Kimi K3, 2607.24653).

    SiLU whose linear factor is held within the bound, softly. Any shape and floating dtype in, the
    same out.
    """
    return soft_limit(x, bound) * torch.sigmoid(x)


def soft_limit(x: Tensor, bound: float = 25.0) -> Tensor:
    """bound * tanh(x / bound), the up side of SiTU-GLU: x near 0, within the bound everywhere."""
    return bound * torch.tanh(x / bound)


def xielu(
    x: Tensor, alpha_p: float | Tensor, alpha_n: float | Tensor, beta: float | Tensor = 0.5
) -> Tensor:
    """alpha_p * x^2 + beta * x for x > 0; alpha_n * (e^x - 1 - x) + beta * x elsewhere.

    The expanded integral of ELU, Huang 2024 (2411.13010); formula and constants as Apertus'
    published code has them, whose e^x is that of min(x, -1e-6). Quadratic growth, like ReLU^2; the
    slope is beta at 0. Any shape and floating dtype in, the same out.
    """
    above, below = x.clamp(min=0.0), x.clamp(max=0.0)
    negative = alpha_n * torch.expm1(below) + (beta - alpha_n) * below
    return torch.where(x > 0, above * (alpha_p * above + beta), negative)


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

WITH_A_NUMBER: dict[str, Callable[[Tensor, float], Tensor]] = {
    "swish": swish,
    "powlu": powlu,
    "situ": situ,
    "soft_limit": soft_limit,
}
"""Name -> elementwise function of a tensor and one number (slope, power, bound)."""

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


class XIELU(nn.Module):
    """`xielu` with trainable alphas: alpha_p = softplus(its Parameter), alpha_n = beta + softplus.

    So alpha_p stays above 0 and alpha_n above beta, as published; both begin at 0.8. Any shape and
    floating dtype in, the same out. Each alpha is one scalar Parameter; beta is a float and in no
    state dict. Raises ValueError for an alpha that no Parameter gives, or for an infinite number.
    """

    def __init__(self, alpha_p: float = 0.8, alpha_n: float = 0.8, beta: float = 0.5) -> None:
        super().__init__()
        if not (0.0 < alpha_p < math.inf and -math.inf < beta < alpha_n < math.inf):
            raise ValueError(
                "XIELU: expected alpha_p > 0 and alpha_n > beta, all finite, "
                f"got {alpha_p}, {alpha_n} and {beta}"
            )
        self.beta = float(beta)
        self.alpha_p = nn.Parameter(torch.tensor(math.log(math.expm1(alpha_p))))
        self.alpha_n = nn.Parameter(torch.tensor(math.log(math.expm1(alpha_n - beta))))

    def alphas(self) -> tuple[Tensor, Tensor]:
        """alpha_p and alpha_n, scalars, in their graph."""
        return F.softplus(self.alpha_p), self.beta + F.softplus(self.alpha_n)

    def forward(self, x: Tensor) -> Tensor:
        return xielu(x, *self.alphas(), self.beta)


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
    (a fixed or a learnable beta) or `xielu` replaces the gate activation of "swiglu" and is then a
    fourth child. `activation_format` is that of `activate`, for both activations. Raises ValueError
    for an unknown variant, a width below 1, a dropout outside [0, 1), a format of scales (E8M0), a
    swish or xielu given to another variant, or both.
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
        xielu: XIELU | None = None,
        activation_format: FloatFormat | None = None,
    ) -> None:
        super().__init__()
        _check("GatedFeedForward", dim, hidden, dropout, variant, GLU_VARIANTS, activation_format)
        for name, given in (("swish", swish), ("xielu", xielu)):
            if given is not None and variant != "swiglu":
                raise ValueError(
                    f"GatedFeedForward: {name} is for variant 'swiglu', got {variant!r}"
                )
        if swish is not None and xielu is not None:
            raise ValueError("GatedFeedForward: swish and xielu, expected one of them")
        self.variant = variant
        self.dropout = dropout
        self.activation_format = activation_format
        self.swish = swish
        self.xielu = xielu
        self.gate = nn.Linear(dim, hidden, bias=bias)
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.down = nn.Linear(hidden, dim, bias=bias)

    def activated(self, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """The two factors of the product, from the outputs [..., hidden] of gate and up."""
        gate_name, up_name = GLU_VARIANTS[self.variant]
        gate_activation = self.swish or self.xielu or ACTIVATIONS[gate_name]
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

    Weights: up [hidden, dim], down [dim, hidden]; nn.Linear's own initialisation. `activation` is a
    key of ACTIVATIONS, or "xielu", which has an XIELU as a third child (Apertus and FOG).
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
        known = {**ACTIVATIONS, "xielu": xielu}
        _check("FeedForward", dim, hidden, dropout, activation, known, activation_format)
        self.activation = activation
        self.xielu = XIELU() if activation == "xielu" else None
        self.dropout = dropout
        self.activation_format = activation_format
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.down = nn.Linear(hidden, dim, bias=bias)

    def activated(self, up: Tensor) -> Tensor:
        """What down receives, from the output [..., hidden] of up."""
        function = ACTIVATIONS[self.activation] if self.xielu is None else self.xielu
        return activate(function, up, self.activation_format)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.down(self.activated(self.up(x))), self.dropout, self.training)

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
