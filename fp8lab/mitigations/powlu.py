"""PowLU: a gate whose growth ends, so that the product grows like up and not like its square.

    product = f(gate) * up,   f(g) = g^(power / (sqrt(g) + 1)) * sigmoid(g) for g > 0, else silu(g)

With power 3 it crosses SiLU at 1 and 4, is at most 5.32 and falls to 1 for large gates. Up is not
bounded. By the paper's account (Jiang et al. 2026, 2605.25704, from a note) an FP8 run whose SwiGLU
spiked at step 76,200, and at 77,000 when clamped, did not spike with it; the price was 0.002 in
loss at 47M active parameters. The slope of f jumps at 0, from 1/2 to 0 (see `ffn.powlu`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fp8lab.mitigations.product import plain_swiglu, remake
from fp8lab.sites import Formula, GateSite


@dataclass(frozen=True, kw_only=True)
class PowLU:
    """Replace the SiLU by PowLU with `power` (m in the paper)."""

    kind: ClassVar[str] = "model"
    changes_function: ClassVar[bool] = True
    foldable: ClassVar[bool] = False
    cost: ClassVar[str] = "a second product, a power of two tensors; the first is thrown away"
    source: ClassVar[str] = "Jiang et al. 2026 (2605.25704), from a note"

    power: float = 3.0

    def __post_init__(self) -> None:
        if not 0.0 < self.power < math.inf:
            raise ValueError(f"PowLU: power={self.power}, expected a positive number")

    def apply(self, model: nn.Module) -> nn.Module:
        """Put it on every gated feed-forward of the model; returns the same model.

        Raises ValueError if a feed-forward is no plain SwiGLU, or as `product.remake` does.
        """
        return remake(model, "PowLU", self._formula)

    def _formula(self, site: GateSite) -> Formula:
        plain_swiglu("PowLU", site)
        return Formula(activation="powlu", beta=self.power)
