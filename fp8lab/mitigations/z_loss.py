"""z-loss: the output logits are kept from drifting away together.

    weight · mean over tokens of logsumexp(logits)^2                   weight 1e-4

The softmax does not see what is added to all logits of a token, so nothing else holds them; where
they drift off they lose their low bits, or overflow. De Brebisson and Vincent 2016 (from memory),
PaLM (2204.02311) with 1e-4, and Wortsman et al. 2309.14322 against divergence at high learning
rates. In float32, or wider where the logits are. All tokens count, padding too.

The logits are what the model returns: a tensor [..., vocabulary], or an output's `logits`. Where
that is not so (a loss computed by a kernel that never has the logits, a tanh behind them), `head`
names the module whose output counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fp8lab.hooking import OfOneModel
from fp8lab.mitigations.hooks import check_numbers, is_of_training
from fp8lab.sites import modules_of


@dataclass(frozen=True, kw_only=True)
class ZLoss:
    """Add `weight` times the mean of logsumexp(logits)^2; `head` as above, None: the model."""

    kind: ClassVar[str] = "loss"
    changes_function: ClassVar[bool] = False
    foldable: ClassVar[bool] = True  # the trained model has nothing of it
    cost: ClassVar[str] = "one more logsumexp over the logits, and its gradient"
    source: ClassVar[str] = "PaLM 2204.02311; Wortsman et al. 2309.14322"

    weight: float = 1e-4
    head: str | None = None

    def __post_init__(self) -> None:
        check_numbers(self, weight=(0.0, math.inf))

    def apply(self, model: nn.Module) -> ZLossPenalty:
        """The penalty to add to the loss, to be asked for after each forward.

        Raises ValueError if there is no module of that name.
        """
        modules = modules_of(model)
        if self.head is not None and self.head not in modules:
            raise ValueError(f"ZLoss: head={self.head!r}, {type(model).__name__} has none such")
        return ZLossPenalty(self, modules[self.head or ""])

    def penalty(self, logits: Tensor) -> Tensor:
        """The scalar, of logits [..., vocabulary]: float32, or float64 where they are."""
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        squares = wide.logsumexp(dim=-1).square()
        return self.weight * squares.sum() / max(squares.numel(), 1)  # no tokens, no drift


class ZLossPenalty:
    """Asked after a forward: a scalar, in the graph of that forward."""

    def __init__(self, value: ZLoss, head: nn.Module) -> None:
        self._value = value
        self._logits: Tensor | None = None
        self._handle = head.register_forward_hook(OfOneModel(self._saw))

    def _saw(self, module: nn.Module, args: Any, output: Any) -> None:
        if not is_of_training():
            return
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or not logits.is_floating_point() or not logits.dim():
            kind = type(output).__name__
            raise TypeError(f"ZLoss: the output, a {kind}, has no logits, expected head= to be set")
        self._logits = logits

    def __call__(self) -> Tensor:
        """Raises RuntimeError if the model has not run with gradients since the last time."""
        logits, self._logits = self._logits, None
        if logits is None or not logits.requires_grad:
            raise RuntimeError("ZLoss: the model has not run, expected a forward with gradients")
        return self._value.penalty(logits)

    def remove(self) -> None:
        """Take the hook off."""
        self._logits = None
        self._handle.remove()
