"""The gate product kept in BF16: the simplest remedy, and the control experiment.

If a diverging run is saved by taking this one operand out of FP8, the product was the cause. On
Gaudi2 the price was a third of FP8's gain: +27.0 % throughput over BF16 instead of +37.1 %
(Fishman et al. 2409.12517, Table 3). Here the operand is rounded to BF16 and the other operands of
the down projection stay as they are. `HighPrecisionOperands` does the same to any operand of any
layer, to find out which one it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import ClassVar

from torch import nn

from fp8lab import formats
from fp8lab.conversion import converted_downs
from fp8lab.formats import FloatFormat
from fp8lab.linear import Fp8Linear
from fp8lab.plan import Plan
from fp8lab.recipe import GEMMS, OPERANDS, BitNetScaling, HighPrecision
from fp8lab.sites import modules_of


@dataclass(frozen=True, kw_only=True)
class HighPrecisionProduct:
    """Cast the product to BF16 instead of FP8."""

    kind: ClassVar[str] = "recipe"
    changes_function: ClassVar[bool] = False
    foldable: ClassVar[bool] = False
    cost: ClassVar[str] = "the down projection's GEMMs with a BF16 input"
    source: ClassVar[str] = "Fishman et al., 2409.12517, Table 3"

    def apply(self, model: nn.Module) -> nn.Module:
        """Put it on every gated feed-forward of a converted model; returns the same model.

        Raises ValueError if a down projection is not converted, is rewritten by another mitigation,
        or gives no gradient where the product saturates: nothing would be left for either to do.
        """
        downs = converted_downs(model, type(self).__name__)
        for name, down in downs:
            other = None if down.rewrite is None else down.rewrite.words
            if down.gradient_of_saturated == "zero":
                other = "no gradient where saturated"
            if other is not None:
                raise ValueError(f"HighPrecisionProduct: {name}: {other}, expected neither")
        for _, down in downs:
            down.recipes["input"] = HighPrecision()
            for gemm in GEMMS:
                down.gemm_recipes.pop(("input", gemm), None)
        return model


@dataclass(frozen=True, kw_only=True)
class HighPrecisionOperands:
    """Cast the operands that `where` names to `format` instead of FP8.

    Patterns are those of a plan's overrides: `LAYERS`, `LAYERS:OPERAND`, `LAYERS@GEMM` or
    `LAYERS:OPERAND@GEMM`, shell-style (`"*.attention.*:grad_output"`).
    """

    kind: ClassVar[str] = "recipe"
    changes_function: ClassVar[bool] = False
    foldable: ClassVar[bool] = False
    cost: ClassVar[str] = "GEMMs with a wide operand"
    source: ClassVar[str] = "the selective high precision of NVFP4 pretraining, 2509.25149"

    where: tuple[str, ...]
    format: FloatFormat = formats.BF16

    def __post_init__(self) -> None:
        if not self.where or isinstance(self.where, str):
            got = repr(self.where)
            raise ValueError(f"HighPrecisionOperands: where={got}, expected a tuple of patterns")
        self._plans()

    def _plans(self) -> dict[str, Plan]:
        # Of any other recipe, so that what a pattern names is told by what it changes.
        wide = HighPrecision(format=self.format)
        return {p: Plan(recipe=BitNetScaling(), overrides={p: wide}) for p in self.where}

    def apply(self, model: nn.Module) -> nn.Module:
        """Put it on the converted layers of the model; returns the same model.

        Raises ValueError if a pattern names no converted layer.
        """
        layers = {n: m for n, m in modules_of(model).items() if isinstance(m, Fp8Linear)}
        plans = self._plans()
        for pattern, plan in plans.items():
            if plan.patterns_without_match(layers):
                raise ValueError(f"HighPrecisionOperands: {pattern!r} names no converted layer")
        for plan, (name, layer), operand in product(plans.values(), layers.items(), OPERANDS):
            gemms = [gemm for gemm in GEMMS if operand in GEMMS[gemm]]
            recipe = plan.recipe_for(name, operand)
            if isinstance(recipe, HighPrecision):
                layer.recipes[operand] = recipe
                for gemm in gemms:
                    layer.gemm_recipes.pop((operand, gemm), None)
            for gemm in gemms:
                if plan.singles_out(name, operand, gemm):
                    layer.gemm_recipes[operand, gemm] = plan.recipe_for(name, operand, gemm)
        return model
