"""Operands rewritten before they are cast: another pair whose product is the same.

    input @ weight^T  =  (input' @ weight'^T) · output_scale

A mitigation that balances, turns or splits the channels of a linear layer's input says so here, and
the layer casts what it is given back. All of it is ordinary torch, outside the casts, so autograd
finds the gradients of input and weight by itself. Rejected: a subclass of the layer for each idea,
of which a model could then carry only one, and hooks around the layer, behind which a monitor would
see one tensor and the GEMM cast another.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn


class OfAnotherForwardError(RuntimeError):
    """What a rewriting has kept is of another forward than the tensor that it is asked about."""


class Rewritten(NamedTuple):
    """The pair, [..., features] and [out, features], of as many features as the layer or more.

    `channel_scale`, float32 [features] or of the input's shape, is given where the input has been
    multiplied by it and nothing else: errors are then told of the input before. `output_scale`,
    [..., 1], multiplies the GEMM's result, before a bias is added; None where it is 1.
    """

    input: Tensor
    weight: Tensor
    channel_scale: Tensor | None = None
    output_scale: Tensor | None = None


class Rewrite(Protocol):
    """How a layer's operands are rewritten; it must answer alike as long as nothing has changed.

    The GEMMs of the backward pass have no input to rewrite by. What they take is told by the last
    rewriting: a layer that runs twice before its first backward is measured with the second's, and
    not at all where their shapes differ.
    """

    @property
    def words(self) -> str:
        """What run.json says of the input: "channels balanced"."""

    @property
    def output_scale(self) -> Tensor | None:
        """That of the last rewriting, which multiplies the gradient that its GEMMs take too."""

    def __call__(self, input: Tensor, weight: Tensor, /) -> Rewritten: ...

    def of_weight(self, weight: Tensor, /) -> Tensor:
        """The weight as the last rewriting made it; as it is before the first."""


def is_free(where: str, rewrite: Rewrite | None, mitigation: object) -> bool:
    """Whether a layer is still to be rewritten by `mitigation`, and not so already.

    Raises ValueError, opening with `where`, if another one rewrites it.
    """
    if rewrite is None:
        return True
    if getattr(rewrite, "mitigation", None) == mitigation:
        return False
    raise ValueError(f"{where} is rewritten already: {rewrite.words}; one rewriting a layer")


class Remembering:
    """A rewriting that carries something from step to step: in float32 buffers of its layer, which
    travel in the state dict and start afresh, at 0, where a checkpoint has none. (Not as a module
    in the layer: who takes a layer for a leaf, as torch's tensor parallelism, would fail.) What a
    step collects is in no buffer, which DistributedDataParallel would overwrite with rank 0's. What
    is of the running forward alone, `transient`, is no part of a copy.
    """

    transient: ClassVar[tuple[str, ...]] = ()

    def __init__(self, layer: nn.Module | None = None) -> None:
        self.layer: Any = layer
        self.handles: list[Any] = []  # of hooks
        self._buffers: list[str] = []
        self._running: Tensor | None = None

    def collect(self, values: Tensor) -> None:
        """Take the larger of these and what the step has had so far."""
        before = self._running
        self._running = values if before is None else torch.maximum(before, values)

    def collected(self, like: Tensor) -> Tensor:
        """What the step has had, 0 of nothing, for the last time."""
        running, self._running = self._running, None
        return torch.zeros_like(like) if running is None else running

    def running_amaxes(self, *operands: str) -> list[Tensor]:
        """None: those of a layer are shared by all processes, these are not."""
        return []

    def allocate(self, name: str, size: int, *, persistent: bool = True) -> None:
        """Give the layer a buffer, float32 [size]."""
        device = self.layer.weight.device
        values = torch.zeros(size, device=device, dtype=torch.float32)
        self.layer.register_buffer(name, values, persistent=persistent)
        self._buffers.append(name)
        if persistent:
            hook = partial(_start_afresh, name)
            self.handles.append(self.layer.register_load_state_dict_pre_hook(hook))

    def leave(self) -> None:
        """Take hooks and buffers off the layer."""
        for handle in self.handles:
            handle.remove()
        for name in self._buffers:
            delattr(self.layer, name)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | dict.fromkeys(self.transient)


def _start_afresh(
    name: str, layer: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    # Only where the layer is in the checkpoint at all.
    if f"{prefix}weight" in state_dict:
        state_dict.setdefault(f"{prefix}{name}", torch.zeros_like(layer.get_buffer(name)))
