"""Smooth-SwiGLU of Fishman et al. (2409.12517), per channel, as the paper defines it.

    y = (W_down · diag(1/s)) Q(s ⊙ product),        s_i = 2^-ceil(log2 max_tokens |product_i|)

Every channel of the product is brought to an amax in (1/2, 1] before it is cast, and the scale is
undone in the down projection's columns *before* those are cast. Powers of two make both steps
exact, so the function is unchanged but for the casts. The scales are taken just in time and carry
no gradient.

Three pitfalls, met by others: s sits on the down GEMM's summation axis and cannot be undone after
the GEMM; the smoothed columns change with s in every step, so the weight of down must be scaled
just in time (with a delayed scale 2 of 8 small runs still diverged); and a channel that is all
zero has no scale and keeps 1. The paper's reference code does something else, per token; so does
FOG's baseline. It works around the outlier and does not remove the alignment behind it.

The paper multiplies the linear branch by s and says that s comes from a per-channel maximum, not
of which tensor. Here it is the product's: a scale from the linear branch alone bounds only half
of a channel's growth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fp8lab.conversion import converted_downs
from fp8lab.recipe import DelayedScaling, Float8CurrentScaling, HighPrecision
from fp8lab.rewriting import Rewritten


@dataclass(frozen=True, kw_only=True)
class SmoothSwiGLU:
    """Balance the product's channels before the cast."""

    kind: ClassVar[str] = "model"
    changes_function: ClassVar[bool] = False
    cost: ClassVar[str] = "a maximum per channel, one multiplication of the product, one of W_down"

    granularity: Literal["channel"] = "channel"

    def __post_init__(self) -> None:
        if self.granularity != "channel":
            raise ValueError(f"SmoothSwiGLU: granularity={self.granularity!r}, expected 'channel'")

    def apply(self, model: nn.Module) -> nn.Module:
        """Put it on every gated feed-forward of a converted model; returns the same model.

        The weight of down is scaled just in time from then on, whatever the recipe said. Raises
        ValueError if a down projection is not converted or its product is not FP8.
        """
        downs = converted_downs(model, type(self).__name__)
        for name, down in downs:
            if isinstance(down.recipes["input"], HighPrecision):
                raise ValueError(f"SmoothSwiGLU: the product of {name} is not FP8")
        for _, down in downs:
            down.rewrite = ChannelsBalanced()
            weight = down.recipes["weight"]
            if isinstance(weight, DelayedScaling):
                down.recipes["weight"] = Float8CurrentScaling(fp8_format=weight.fp8_format)
        return model


@dataclass(frozen=True)
class ChannelsBalanced:
    """The product times `channel_scale`, the columns of down divided by it."""

    def __call__(self, product: Tensor, weight: Tensor) -> Rewritten:
        scale = channel_scale(product)
        return Rewritten(product * scale, weight / scale, channel_scale=scale)

    @property
    def words(self) -> str:
        return "channels balanced"


@torch.no_grad()
def channel_scale(product: Tensor) -> Tensor:
    """float32 [channels] powers of two that bring each channel's amax into (1/2, 1].

    `product` is [..., channels]; a channel whose amax is 0, infinite or NaN gets 1.
    """
    amax = product.detach().reshape(-1, product.shape[-1]).float().abs().amax(dim=0)
    fraction, exponent = torch.frexp(amax)
    # amax = fraction · 2^exponent with fraction in [1/2, 1): already ceil, but for exact powers.
    exponent = torch.where(fraction == 0.5, exponent - 1, exponent)
    # Beyond ±126 the scale or its reciprocal would leave the normal range and stop being exact.
    # Made from its bits: what ldexp returns is not promised to be a power of two.
    scale = ((127 - exponent.clamp(-126, 126)) << 23).view(torch.float32)
    # frexp(0) is (0, 0) and gives 1; of infinity and NaN the exponent is not specified.
    return torch.where(amax.isfinite(), scale, 1.0)
