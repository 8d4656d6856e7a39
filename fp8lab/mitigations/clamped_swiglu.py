"""Clamped SwiGLU: bound gate and up before they meet.

    product = silu(min(gate, limit)) * clamp(up, -limit, limit)

as DeepSeek-V4 has it with limit 10 (gpt-oss adds a slope and an offset; Step clamps after the
SiLU: other functions). The product is then at most limit². It changes the function where a clamp
bites, and no gradient passes there; the same clamp must be there at inference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from fp8lab.sites import find_gates


@dataclass(frozen=True, kw_only=True)
class ClampedSwiGLU:
    """Clamp the outputs of gate (from above) and up (from both sides) to `limit`."""

    kind: ClassVar[str] = "model"
    changes_function: ClassVar[bool] = True
    cost: ClassVar[str] = "two clamps of gate and up"

    limit: float = 10.0

    def __post_init__(self) -> None:
        if not 0.0 < self.limit < math.inf:
            raise ValueError(f"ClampedSwiGLU: limit={self.limit}, expected a positive number")

    def apply(self, model: nn.Module) -> nn.Module:
        """Put it on every gated feed-forward of the model; returns the same model.

        Raises ValueError if a feed-forward does not call its projections, or is not a SwiGLU.
        """
        sites = find_gates(model)
        for site in sites:
            if (site.activation, site.up_activation) != ("silu", "identity"):
                raise ValueError(f"ClampedSwiGLU: {site.name} has {site.activation}, expected silu")
            if site.gate.module is None or site.up.module is None:
                raise ValueError(f"ClampedSwiGLU: {site.name} does not call its projections")
            if site.gate.module is site.up.module:
                raise ValueError(f"ClampedSwiGLU: {site.name} has gate and up in one projection")
        for site in sites:
            assert site.gate.module is not None and site.up.module is not None
            site.gate.module.register_forward_hook(self._clamp_gate)
            site.up.module.register_forward_hook(self._clamp_up)
        return model

    def _clamp_gate(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.clamp(max=self.limit)

    def _clamp_up(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.clamp(-self.limit, self.limit)
