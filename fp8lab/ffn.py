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

Rejected: one class per variant (six copies of one forward); gate and up fused into one matrix (one
launch less on a GPU, but then the two rows of a channel have no names of their own).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


class GatedFeedForward(nn.Module):
    """dropout(down(gate_activation(gate(x)) * up_activation(up(x)))); x [..., dim] -> [..., dim].

    Weights: gate and up [hidden, dim], down [dim, hidden]; nn.Linear's own initialisation. `swish`
    replaces the gate activation of "swiglu" (a fixed or a learnable beta) and is then a fourth
    child. Raises ValueError for an unknown variant, a width below 1, a dropout outside [0, 1), or a
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
    ) -> None:
        super().__init__()
        _check("GatedFeedForward", dim, hidden, dropout, variant, GLU_VARIANTS)
        if swish is not None and variant != "swiglu":
            raise ValueError(f"GatedFeedForward: swish is for variant 'swiglu', got {variant!r}")
        self.variant = variant
        self.dropout = dropout
        self.swish = swish
        self.gate = nn.Linear(dim, hidden, bias=bias)
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.down = nn.Linear(hidden, dim, bias=bias)

    def product(self, x: Tensor) -> Tensor:
        """What down receives: x [..., dim] -> [..., hidden]."""
        gate_name, up_name = GLU_VARIANTS[self.variant]
        gate_activation = ACTIVATIONS[gate_name] if self.swish is None else self.swish
        return gate_activation(self.gate(x)) * ACTIVATIONS[up_name](self.up(x))

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.down(self.product(x)), self.dropout, self.training)


class FeedForward(nn.Module):
    """dropout(down(activation(up(x)))), without a gate; x [..., dim] -> [..., dim].

    Weights: up [hidden, dim], down [dim, hidden]; nn.Linear's own initialisation. Raises ValueError
    for an unknown activation, a width below 1 or a dropout outside [0, 1).
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        activation: str = "gelu",
        *,
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check("FeedForward", dim, hidden, dropout, activation, ACTIVATIONS)
        self.activation = activation
        self.dropout = dropout
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.down = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        product = ACTIVATIONS[self.activation](self.up(x))
        return F.dropout(self.down(product), self.dropout, self.training)


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


def _check(
    owner: str, dim: int, hidden: int, dropout: float, name: str, known: Mapping[str, object]
) -> None:
    if dim < 1 or hidden < 1:
        raise ValueError(f"{owner}: dim and hidden must be at least 1, got {dim} and {hidden}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"{owner}: dropout must lie in [0, 1), got {dropout}")
    if name not in known:
        raise ValueError(f"{owner}: unknown name {name!r}, expected one of {', '.join(known)}")
