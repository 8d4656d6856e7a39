"""Clamped SwiGLU: limits on gate and up, before the SiLU or after it.

    before    product = act(min(gate, limit)) * (clamp(up, -limit, limit) + offset)
    after     product = min(silu(gate), limit) * clamp(up, -limit, limit)

with act(x) = x * sigmoid(slope * x). Published constants have names: `deepseek_v4` (before, limit
10), `gpt_oss` (before, limit 7, slope 1.702, offset 1) and `step` (after, limit 7 in the experts of
the last two layers, 16 in their shared expert). Before and after are other functions: silu(7) is
6.994, and a model trained with the one is wrong with the other. DeepSeek's and gpt-oss's formulas
are read from their published code, Step's from its code in transformers and a note.

The product is then at most limit² (limit · (limit + 1) with the offset). It changes the function
where a limit touches, and no gradient passes there; the same clamp must be there at inference,
where forgetting it has corrupted text (sglang #23776). In the only comparison that we know the
clamp delayed an FP8 loss spike, from step 76,200 to 77,000, and did not prevent it (PowLU,
2605.25704, from a note).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from fp8lab.mitigations.product import plain_swiglu, remake
from fp8lab.sites import Formula, GateSite


@dataclass(frozen=True, kw_only=True)
class ClampedSwiGLU:
    """Clamp gate (from above) and up (from both sides) to `limit`.

    `where` says whether gate is clamped before its SiLU or after it; `slope` and `offset` are those
    of the formula above, for models that learn with them.
    """

    kind: ClassVar[str] = "model"
    changes_function: ClassVar[bool] = True
    foldable: ClassVar[bool] = False
    cost: ClassVar[str] = "a second SiLU and product, two clamps; the first product is thrown away"
    source: ClassVar[str] = (
        "DeepSeek-V4 (limit 10); gpt-oss, modeling code (limit 7, slope 1.702, offset 1); "
        "Step-3.5 (after the SiLU, 7 and 16)"
    )

    limit: float = 10.0
    where: Literal["before", "after"] = "before"
    slope: float = 1.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        for name in ("limit", "slope"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"ClampedSwiGLU: {name}={getattr(self, name)}, expected a positive number"
                )
        if self.where not in ("before", "after"):
            raise ValueError(f"ClampedSwiGLU: where={self.where!r}, expected 'before' or 'after'")
        if not math.isfinite(self.offset):
            raise ValueError(f"ClampedSwiGLU: offset={self.offset}, expected a finite number")

    @classmethod
    def deepseek_v4(cls) -> ClampedSwiGLU:
        """Limit 10, before the SiLU."""
        return cls(limit=10.0)

    @classmethod
    def gpt_oss(cls) -> ClampedSwiGLU:
        """Limit 7, before; slope 1.702, and 1 added to up: GELU's approximation, not SiLU."""
        return cls(limit=7.0, slope=1.702, offset=1.0)

    @classmethod
    def step(cls, *, shared: bool = False) -> ClampedSwiGLU:
        """Limit 7, after the SiLU; of the shared expert 16."""
        return cls(limit=16.0 if shared else 7.0, where="after")

    def apply(self, model: nn.Module) -> nn.Module:
        """Put it on every gated feed-forward of the model; returns the same model.

        Raises ValueError if a feed-forward is no plain SwiGLU, or as `product.remake` does.
        """
        return remake(model, "ClampedSwiGLU", self._formula)

    def _formula(self, site: GateSite) -> Formula:
        plain_swiglu("ClampedSwiGLU", site)
        before = self.where == "before"
        return Formula(
            activation="silu" if self.slope == 1.0 else "swish",
            beta=self.slope,
            gate_limit=self.limit if before else None,
            activated_limit=None if before else self.limit,
            up_limit=self.limit,
            up_offset=self.offset,
        )
