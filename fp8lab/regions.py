"""When a step ends: the regions after which delayed scales move.

Scales move once per region: `with autocast():`, or the outermost forward of a converted model, or a
bare call of a layer. Forward operands move when the region closes; gradients when the backward pass
ends, or when the region closes if the backward ran inside it. Nothing moves without gradients
(evaluation), and a forward that runs *inside* a backward pass (activation checkpointing) uses the
scales of the forward it repeats; the first run is the one that counts, with use_reentrant=True too,
where it runs without gradients. Rejected: moving scales inside the layer's own forward, which
breaks gradient accumulation.

With several processes the amaxes of a step are reduced to their maximum over all of them before
the scales move, in one call for all converted layers, whether they ran or not, as in Transformer
Engine: every rank must convert the same layers in the same order and take the same steps.

Known limit: there is one set of regions in a process, so two threads must not train at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from fp8lab.recipe import Operand


class Layer(Protocol):
    """What has delayed scales."""

    def running_amaxes(self, *operands: Operand) -> list[Tensor]:
        """float32 [], this step's amaxes that all ranks share, to be changed in place."""
        ...

    def move_scales(self, *operands: Operand) -> None:
        """End of a step for these operands."""
        ...


# Every layer with delayed scales, in the order of conversion, which all ranks share; which of them
# ran in a step, and in which order, they need not.
_registered: weakref.WeakKeyDictionary[Layer, None] = weakref.WeakKeyDictionary()


def register(layer: Layer) -> None:
    """Take part in the reductions over ranks."""
    _registered[layer] = None


def _move(layers: Iterable[Layer], *operands: Operand) -> None:
    distributed = torch.distributed
    started = distributed.is_available() and distributed.is_initialized()
    if started and distributed.get_world_size() > 1:
        for layer in layers:  # a copy of a model was never converted itself
            register(layer)
        layers = list(_registered)
        amaxes = [amax for layer in layers for amax in layer.running_amaxes(*operands)]
        if amaxes:
            largest = torch.stack(amaxes)
            distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
            for amax, shared in zip(amaxes, largest, strict=True):
                amax.copy_(shared)
    for layer in layers:
        layer.move_scales(*operands)


class Steps:
    """Which layers ran since their scales last moved, and whether a region is open."""

    def __init__(self) -> None:
        self.depth = 0
        self.opened_with_gradients = False
        self.forward_layers: dict[Layer, None] = {}
        self.backward_layers: dict[Layer, None] = {}
        self.end_of_backward: Callable[[], object] = lambda: None
        self._at_close: list[Callable[[], object]] = []

    def open(self) -> None:
        if self.depth == 0:
            self.opened_with_gradients = with_gradients()
        self.depth += 1

    def close(self) -> None:
        # torch also closes a forward that raised in another pre-hook, before it was opened.
        self.depth = max(self.depth - 1, 0)
        if self.depth == 0 and self.opened_with_gradients and not inside_backward():
            self._move_forward()
            self._move_backward()
        if self.depth == 0:
            ends, self._at_close = self._at_close, []
            for end in reversed(ends):
                end()

    def at_close(self, end: Callable[[], object]) -> None:
        """Call `end` when the region that is open closes, the last one first: another engine's
        region that is to last as long."""
        self._at_close.append(end)

    def forward_counts(self) -> bool:
        """Whether the amaxes of the forward that now begins enter the history."""
        if inside_backward():
            self._await_end_of_backward()
            return False
        return with_gradients() and (self.depth == 0 or self.opened_with_gradients)

    def forward_ran(self, layer: Layer) -> None:
        self.forward_layers[layer] = None
        if self.depth == 0:
            self._move_forward()

    def backward_ran(self, layer: Layer) -> None:
        self.backward_layers[layer] = None
        self._await_end_of_backward()

    def repeats_forward_of(self, layer: Layer) -> bool:
        """Whether a forward of `layer` now repeats one whose scales have moved since."""
        return inside_backward() and layer not in self.forward_layers

    def _await_end_of_backward(self) -> None:
        # One callback, on the outermost pass: use_reentrant=True repeats a forward in one pass and
        # runs another inside it. The engine alone owns the callback, so a pass that raised takes it
        # along and leaves nothing behind.
        if self.end_of_backward() is None:
            callback = partial(self._backward_ended)
            self.end_of_backward = weakref.ref(callback)
            torch.autograd.Variable._execution_engine.queue_callback(callback)

    def _backward_ended(self) -> None:
        if self.depth == 0:
            self._move_backward()

    def _move_forward(self) -> None:
        layers, self.forward_layers = self.forward_layers, {}
        _move(layers, "input", "weight")

    def _move_backward(self) -> None:
        layers, self.backward_layers = self.backward_layers, {}
        _move(layers, "grad_output")


steps = Steps()


def inside_backward() -> bool:
    """Whether a backward pass is under way: what runs forward now is repeated."""
    # Private, and the only way that tells a recomputed forward from a first one in both kinds of
    # activation checkpointing: with use_reentrant=False gradients are enabled both times.
    return torch._C._current_graph_task_id() != -1


def with_gradients() -> bool:
    """Whether a forward that runs now has gradients, or will have once it is repeated."""
    # Or in `autograd.Function.forward`, where use_reentrant=True does its first run, torch's and
    # every library's own: unlike `torch.no_grad` it turns forward-mode gradients off too.
    inside_function = not (torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled())
    return torch.is_grad_enabled() or inside_function


class autocast:
    """One step's region: delayed scales move when the outermost one closes, once.

    Wrap what makes one optimizer step's forward passes (with gradient accumulation, all of them).
    Without it the outermost forward of a converted model is the region.
    """

    def __enter__(self) -> autocast:
        steps.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        steps.close()


def open_region(*_: object) -> None:
    """Forward pre-hook of a converted model."""
    steps.open()


def close_region(*_: object) -> None:
    """Forward hook of a converted model, called even if the forward raised."""
    steps.close()
