"""Operands rewritten before they are cast: another pair whose product is the same.

    input @ weight^T  =  (input' @ weight'^T) · output_scale

A mitigation that balances, turns or splits the channels of a linear layer's input says so here, and
the layer casts what it is given back. All of it is ordinary torch, outside the casts, so autograd
finds the gradients of input and weight by itself. Rejected: a subclass of the layer for each idea,
of which a model could then carry only one, and hooks around the layer, behind which a monitor would
see one tensor and the GEMM cast another.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class Rewritten(NamedTuple):
    """The pair, [..., features] and [out, features], of as many features as the layer or more.

    `channel_scale`, float32 [features] or [..., 1], is given where the input has been multiplied by
    it and nothing else: errors are then told of the input before. `output_scale`, [..., 1],
    multiplies the GEMM's result, before a bias is added; None where it is 1.
    """

    input: Tensor
    weight: Tensor
    channel_scale: Tensor | None = None
    output_scale: Tensor | None = None


class Rewrite(Protocol):
    """How a layer's operands are rewritten; it must answer alike as long as nothing has changed."""

    @property
    def words(self) -> str:
        """What run.json says of the input: "channels balanced"."""

    def __call__(self, input: Tensor, weight: Tensor, /) -> Rewritten: ...
