"""TWEO's loss: what the blocks give out is punished by its fourth power, far outliers alone.

    lambda · mean over blocks of mean((|A| / (tau + eps))^p)          lambda 0.01, tau 3, p 4

A is the output of a block, the residual stream after it (Liang et al. 2511.23225; formula and
constants from notes on the paper, eps = 1e-6). Of |A| well below tau next to nothing remains; at
10 tau it is 10,000. It regulates the stream and not the product of the feed-forward. The schedule
of lambda that the paper allows for is left out. In float32, or wider where A is.

The blocks are the modules in the model's one outermost `nn.ModuleList`, `model.layers` in most
language models: what `watch` has as residual rows. A model with several (an encoder and a decoder)
is refused unless `blocks` names them. Each block counts with its last output since the penalty was
last asked for, in forwards of training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fp8lab.hooking import OfOneModel
from fp8lab.mitigations.hooks import check_numbers, is_of_training
from fp8lab.sites import modules_of

_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class TWEO:
    """Add `weight` times the mean of (|A| / `tau`)^`power` over the outputs of the blocks.

    `blocks` is a pattern of module names ("decoder.layers.*", as in a shell); None: see above.
    """

    kind: ClassVar[str] = "loss"
    changes_function: ClassVar[bool] = False
    foldable: ClassVar[bool] = True  # the trained model has nothing of it
    cost: ClassVar[str] = "three passes over the output of each block, and their gradients"
    source: ClassVar[str] = "Liang et al. 2511.23225"

    weight: float = 0.01
    tau: float = 3.0
    power: float = 4.0
    blocks: str | None = None

    def __post_init__(self) -> None:
        check_numbers(self, weight=(0.0, math.inf), tau=(0.0, math.inf), power=(1.0, math.inf))

    def apply(self, model: nn.Module) -> TWEOPenalty:
        """The penalty to add to the loss, to be asked for after each forward.

        Raises ValueError if it is not clear what the blocks are.
        """
        return TWEOPenalty(self, _blocks(model, self.blocks))

    def penalty(self, outputs: list[Tensor]) -> Tensor:
        """The scalar, of outputs of any shape: float32, or float64 where one is."""
        means = [self._mean(output) for output in outputs]
        return self.weight * torch.stack([m.to(means[0].device) for m in means]).mean()

    def _mean(self, output: Tensor) -> Tensor:
        wide = output.to(torch.promote_types(output.dtype, torch.float32))
        ratios = (wide.abs() / (self.tau + _EPS)) ** self.power
        return ratios.sum() / max(ratios.numel(), 1)  # no tokens, no outliers


class TWEOPenalty:
    """Asked after a forward: a scalar, in the graph of that forward."""

    def __init__(self, value: TWEO, blocks: dict[str, nn.Module]) -> None:
        self._value, self._names = value, list(blocks)
        self._outputs: dict[str, Tensor] = {}
        self._handles = [
            block.register_forward_hook(OfOneModel(partial(self._saw, name)))
            for name, block in blocks.items()
        ]

    def _saw(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if not is_of_training():
            return
        first = output[0] if isinstance(output, tuple | list) and output else output
        if not isinstance(first, Tensor) or not first.is_floating_point():
            kind = type(first).__name__
            raise TypeError(f"TWEO: {name} gives out a {kind}, expected the residual stream")
        self._outputs[name] = first

    def __call__(self) -> Tensor:
        """Raises RuntimeError if a block has not run with gradients since the last time."""
        outputs, self._outputs = self._outputs, {}
        for name in self._names:
            # With reentrant checkpointing an output is in the graph only after its forward.
            if name not in outputs or not outputs[name].requires_grad:
                expected = "expected a forward with gradients before"
                raise RuntimeError(f"TWEO: {name} has not run, {expected}")
        return self._value.penalty([outputs[name] for name in self._names])

    def remove(self) -> None:
        """Take the hooks off."""
        self._outputs = {}
        for handle in self._handles:
            handle.remove()


def _blocks(model: nn.Module, pattern: str | None) -> dict[str, nn.Module]:
    modules = {name: module for name, module in modules_of(model).items() if name}
    if pattern is not None:
        found = {name: m for name, m in modules.items() if fnmatchcase(name, pattern)}
        # A pattern's star crosses dots: of a block its parts match too.
        blocks = {n: m for n, m in found.items() if not _is_inside(n, found)}
        if not blocks:
            raise ValueError(f"TWEO: blocks={pattern!r} matches no module of {_kind(model)}")
        return blocks
    lists = {name: m for name, m in modules.items() if isinstance(m, nn.ModuleList) and len(m)}
    if isinstance(model, nn.ModuleList):
        lists = {"": model}
    outermost = [name for name in lists if not _is_inside(name, lists)]
    if len(outermost) != 1:
        got = f"{len(outermost)} lists of modules ({', '.join(outermost[:4])})" if outermost else ""
        expected = "expected one, or blocks= with their names"
        raise ValueError(f"TWEO: {_kind(model)} has {got or 'no list of modules'}, {expected}")
    (name,) = outermost
    return {f"{name}.{n}".lstrip("."): child for n, child in lists[name].named_children()}


def _is_inside(name: str, others: Any) -> bool:
    return any(name.startswith(f"{other}.") for other in others if other != name)


def _kind(model: nn.Module) -> str:
    return type(model).__name__
