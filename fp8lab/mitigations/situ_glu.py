"""SiTU-GLU: both factors of the product held within bounds by tanh.

    product = [b1 tanh(gate/b1) sigmoid(gate)] * [b2 tanh(up/b2)]

Near 0 it is SwiGLU, and nowhere is it larger than b1 * b2 (4 and 25, so 100): a product that E4M3
holds with room to spare. Unlike a clamp it passes some gradient everywhere, though one that falls
off like exp(-2 |x| / b); like a clamp it changes the function, and must be there at inference. It
is Kimi K3's; formula and constants are from a note on its report (2607.24653), which is said to
have no ablation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fp8lab.mitigations.product import plain_swiglu, remake
from fp8lab.sites import Formula, GateSite


@dataclass(frozen=True, kw_only=True)
class SiTUGLU:
    """Bound gate softly by `gate_bound`, up by `up_bound`."""

    kind: ClassVar[str] = "model"
    changes_function: ClassVar[bool] = True
    foldable: ClassVar[bool] = False
    cost: ClassVar[str] = "a second product, two tanh, a sigmoid; the first product is thrown away"
    source: ClassVar[str] = "Kimi K3 (2607.24653), from a note; in TransformerEngine by PR 3402"

    gate_bound: float = 4.0
    up_bound: float = 25.0

    def __post_init__(self) -> None:
        for name in ("gate_bound", "up_bound"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"SiTUGLU: {name}={getattr(self, name)}, expected a positive number"
                )

    def apply(self, model: nn.Module) -> nn.Module:
        """Put it on every gated feed-forward of the model; returns the same model.

        Raises ValueError if a feed-forward is no plain SwiGLU, or as `product.remake` does.
        """
        return remake(model, "SiTUGLU", self._formula)

    def _formula(self, site: GateSite) -> Formula:
        plain_swiglu("SiTUGLU", site)
        return Formula(
            activation="situ",
            beta=self.gate_bound,
            up_activation="soft_limit",
            up_beta=self.up_bound,
        )
