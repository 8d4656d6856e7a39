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
Engine: every rank must convert the same layers in the same order and take the same steps. A number
for what is reduced travels along, so that amaxes of other layers are never mixed in silence. Where
ranks have more micro-batches than others one `autocast` around those of a step makes them one. No
rank can know that another has taken a step less: the amaxes of two steps are mixed until one waits
for ever. So under torch's `Join` `reduce_amax` must be off.

Known limit: there is one set of regions in a process, so two threads must not train at once.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from fp8lab.agreement import said_of, unlike, world_size
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
# ran in a step, and in which order, they need not. With each what it is, in words.
_registered: weakref.WeakKeyDictionary[Layer, str] = weakref.WeakKeyDictionary()
# What all ranks have been found to reduce alike: a number, and as it is sent from a device.
_compared: dict[tuple[int, torch.device], Tensor] = {}
WAITED = 5.0  # seconds, for the rank that knows what differs: the training is over


def register(layer: Layer, name: str = "") -> None:
    """Take part in the reductions over ranks, by the name that the layer has on all of them."""
    if name or layer not in _registered:
        _registered[layer] = f"{name} {layer!r}".strip()


def _move(layers: Iterable[Layer], *operands: Operand) -> None:
    if world_size() > 1:
        for layer in layers:  # a copy of a model was never converted itself
            register(layer)
        layers = list(_registered)
        _share([(layer, layer.running_amaxes(*operands)) for layer in layers])
    for layer in layers:
        layer.move_scales(*operands)


def _share(running: list[tuple[Layer, list[Tensor]]]) -> None:
    """Make every amax the largest of all ranks. Raises RuntimeError where they reduce as many
    amaxes of other layers: at the first step on all ranks alike, later on those that changed."""
    amaxes = [amax for _, of_layer in running for amax in of_layer]
    if not amaxes:
        return
    words = [f"{len(of)} amaxes of {_registered[layer]}" for layer, of in running if of]
    number = zlib.crc32("\n".join(words).encode()) >> 8  # of 24 bits, exact in float32
    place = number, amaxes[0].device
    if (told := _compared.get(place)) is None:
        told = torch.tensor([number, -number], dtype=torch.float32, device=place[1])
    largest = torch.cat([torch.stack(amaxes), told])
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    if place not in _compared:  # making it and reading it wait for a device: once
        if float(largest[-2]) != -float(largest[-1]):
            _refuse(words)
        _compared[place] = told
    for amax, shared in zip(amaxes, largest, strict=False):
        amax.copy_(shared)


def _refuse(words: list[str]) -> None:
    place = "delayed scaling"
    told = {f"layer {number}": {"reduces": one} for number, one in enumerate(words)}
    line = unlike(place, told) or said_of(place, WAITED) or "ranks reduce amaxes of other layers"
    raise RuntimeError(f"{place}: {line}: convert the same layers in the same order on all ranks")


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

    Wrap what makes one optimizer step's forward passes (with gradient accumulation, all of them),
    and their backward passes where ranks have unequal numbers of them: amaxes of delayed scales are
    reduced over ranks once a region. Without it the outermost forward of a converted model is one.
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
