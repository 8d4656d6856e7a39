"""The gate product kept in BF16: the simplest remedy, and the control experiment.

If a diverging run is saved by taking this one operand out of FP8, the product was the cause. On
Gaudi2 the price was a third of FP8's gain: +27.0 % throughput over BF16 instead of +37.1 %
(Fishman et al. 2409.12517, Table 3). Here the operand is rounded to BF16 and the other operands of
the down projection stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fp8lab.conversion import converted_downs
from fp8lab.recipe import HighPrecision


@dataclass(frozen=True, kw_only=True)
class HighPrecisionProduct:
    """Cast the product to BF16 instead of FP8."""

    kind: ClassVar[str] = "recipe"
    changes_function: ClassVar[bool] = False
    cost: ClassVar[str] = "the down projection's GEMMs with a BF16 input"

    def apply(self, model: nn.Module) -> nn.Module:
        """Put it on every gated feed-forward of a converted model; returns the same model.

        Raises ValueError if a down projection is not converted.
        """
        for _, down in converted_downs(model, type(self).__name__):
            down.recipes["input"] = HighPrecision()
        return model
