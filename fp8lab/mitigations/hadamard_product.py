"""The product turned by a random Hadamard transform, so that no channel is an outlier any more.

    y = (W_down · T) Q(T^T · product)^T,        T = diag(signs) · blockdiag(H, …, H) / √block

T is orthogonal, so the function stays as it is; what one channel had is shared out among the
channels of its block, and the amax of a lone outlier falls by √block. Down's weight is turned
alike, just in time, before it is cast. The signs come from `seed` and never change.

Found elsewhere: QuaRot (2404.00456) turns down's input so at inference, with one block over the
whole width; NVFP4 training (2509.25149) turns both operands of the weight-gradient GEMM, 16 tokens
at a time (`NVFP4BlockScaling` does). Turning the product's channels during training, for the sake
of its cast, is our combination of the two. The weight could be turned once and for all, the product
could not: nothing is folded away.

It helps a scale per tensor or per row against few hot channels. A channel that is large beside its
whole block only spreads: all of the block is then cast with an outlier's error, and with one scale
per small block (MX, NVFP4) there is little left to win (2509.23202).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fp8lab.conversion import converted_downs
from fp8lab.recipe import DelayedScaling, Float8CurrentScaling, HighPrecision
from fp8lab.rewriting import Rewritten, is_free


@dataclass(frozen=True, kw_only=True)
class HadamardProduct:
    """Turn the product and the columns of down by a random Hadamard transform before their casts.

    `block` channels are mixed with each other, a power of two that divides the width; None takes
    the largest there is.
    """

    kind: ClassVar[str] = "model"
    changes_function: ClassVar[bool] = False
    foldable: ClassVar[bool] = False
    cost: ClassVar[str] = "block multiplications for each element of the product and of W_down"
    source: ClassVar[str] = "QuaRot, 2404.00456; NVFP4 pretraining, 2509.25149"

    block: int | None = 16
    seed: int = 0

    def __post_init__(self) -> None:
        block = 2 if self.block is None else self.block
        if type(block) is not int or block < 2 or block & (block - 1):
            raise ValueError(f"HadamardProduct: block={self.block!r}, expected a power of two")
        if type(self.seed) is not int or self.seed < 0:
            raise ValueError(f"HadamardProduct: seed={self.seed!r}, expected a whole number from 0")

    def apply(self, model: nn.Module) -> nn.Module:
        """Put it on every gated feed-forward of a converted model; returns the same model.

        The turned weight changes in all its columns at every step; a delayed scale of it is made
        just in time from then on. Raises ValueError if a down projection is not converted, is
        rewritten by another mitigation, its product is not FP8, or no such block divides its width.
        """
        who = type(self).__name__
        free = []
        for name, down in converted_downs(model, who):
            width = down.in_features
            largest = width & -width
            if isinstance(down.recipe_for("input", "output"), HighPrecision):
                raise ValueError(f"{who}: the product of {name} is not FP8")
            if largest < (self.block or 2):
                expected = f"a multiple of {self.block or 2}"
                raise ValueError(f"{who}: {name} is {width} channels wide, expected {expected}")
            if is_free(f"{who}: {name}", down.rewrite, self):
                free.append((down, self.block or largest))
        for down, block in free:
            down.rewrite = Turned(self, block)
            weight = down.recipes["weight"]
            if isinstance(weight, DelayedScaling):
                down.recipes["weight"] = Float8CurrentScaling(fp8_format=weight.fp8_format)
        return model


@dataclass(frozen=True)
class Turned:
    """The product and the rows of down, both turned."""

    mitigation: HadamardProduct
    block: int

    def __call__(self, product: Tensor, weight: Tensor) -> Rewritten:
        return Rewritten(self._turned(product), self._turned(weight))

    @property
    def words(self) -> str:
        return f"turned by a Hadamard transform of {self.block} channels"

    @property
    def output_scale(self) -> None:
        return None

    def of_weight(self, weight: Tensor) -> Tensor:
        """[out, channels], turned."""
        return self._turned(weight)

    def _turned(self, tensor: Tensor) -> Tensor:
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        signs = random_signs(tensor.shape[-1], self.mitigation.seed).to(tensor.device, dtype)
        size = self.block
        matrix = hadamard_matrix(size).to(tensor.device, dtype)
        with torch.autocast(tensor.device.type, enabled=False):
            blocks = (tensor * signs).reshape(*tensor.shape[:-1], len(signs) // size, size)
            return (blocks @ matrix).reshape(tensor.shape)


def random_signs(width: int, seed: int) -> Tensor:
    """float32 [width] of ±1, the same for a seed wherever it is asked."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (width,), generator=generator).float() * 2.0 - 1.0


def hadamard_matrix(size: int) -> Tensor:
    """float64 [size, size], orthogonal: Sylvester's matrix / √size. `size` is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        top, bottom = torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)
        matrix = torch.cat([top, bottom])
    return matrix / math.sqrt(size)
