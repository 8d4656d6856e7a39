"""SPAM: Adam that cuts off what dwarfs an element's own past, and now and then forgets that past.

    g_i <- sign(g_i) sqrt(theta v_i)       where g_i^2 > theta v_i, theta = 5000, v before the step
    m, v <- 0                              before every 500th step
    lr_k = lr (1 - 0.99 (1 + cos(pi (k + 1) / (N + 1))) / 2)      for N steps from there, k = 0, 1…

Huang et al. 2501.06842. theta and 500 from the paper; N = 150, and that no spike is looked for in
the first 20 steps and the 20 after a reset, when v says little yet, from notes on it and on its
code; that code warms up with the cosine above and leaves the weight decay as it is. Adam's step
count, and so its bias correction, is not reset, and v is not corrected for the comparison.

An element that never had a gradient has v = 0 and is not cut off. (As the formula stands it never
gets one: its first gradient is cut to zero, and so is every other. That is any token that first
comes after step 20.) Infinity is a spike and is cut off; NaN stays. The sparse momentum of the
paper, which saves memory and not runs, is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fp8lab.mitigations.hooks import (
    Group,
    Optimizer,
    before_update,
    check_adam,
    check_count,
    check_numbers,
    own_groups,
    parameters,
    restore_groups_after_step,
    set_groups_for_step,
)


@dataclass(frozen=True, kw_only=True)
class SPAM:
    """Clip spikes at `threshold` times the second moment, reset the moments every `interval` steps.

    `warm_up` is the number of steps, after a reset, in which the learning rate returns; `settle`
    that in which no spike is looked for, at the beginning and after a reset.
    """

    kind: ClassVar[str] = "optimizer"
    changes_function: ClassVar[bool] = False
    foldable: ClassVar[bool] = True  # the trained model has nothing of it
    cost: ClassVar[str] = "one pass over gradients and second moments"
    source: ClassVar[str] = "Huang et al. 2501.06842"

    threshold: float = 5000.0
    interval: int = 500
    warm_up: int = 150
    settle: int = 20

    def __post_init__(self) -> None:
        check_numbers(self, threshold=(0.0, math.inf))
        check_count(self, "interval", "warm_up", "settle")

    def apply(self, optimizer: Optimizer) -> Optimizer:
        """Put it on an Adam or AdamW; returns the same optimizer.

        Its state is `param_groups[0]["spam"]`, a number of steps, and in `state_dict()` with it; a
        state without it begins anew. Raises ValueError if it is on already, for another optimizer,
        for amsgrad, or for moments that are not stored as tensors of their own (`optim.Fp8AdamW`).
        """
        check_adam("SPAM", optimizer)
        if hasattr(optimizer, "moments"):
            kind = type(optimizer).__name__
            raise ValueError(f"SPAM: {kind} stores its moments quantised, expected Adam or AdamW")
        optimizer.param_groups[0].setdefault("spam", _fresh())
        restore_groups_after_step(optimizer)
        before_update("SPAM", optimizer, self._change)
        return optimizer

    def _change(self, optimizer: Optimizer) -> None:
        state: dict[str, int] = own_groups(optimizer)[0].setdefault("spam", _fresh())
        state["steps"] += 1
        since = state["steps"] % self.interval  # the last reset
        for parameter in parameters(optimizer):
            moments = optimizer.state.get(parameter, {})
            if "exp_avg_sq" not in moments:
                continue
            if since == 0:
                moments["exp_avg"].zero_()
                moments["exp_avg_sq"].zero_()
            elif parameter.grad is not None and state["steps"] >= self.settle <= since:
                _cut_spikes(parameter.grad, moments["exp_avg_sq"], self.threshold)
        if since < self.warm_up and state["steps"] >= self.interval:
            share = 1.0 - 0.99 * (1.0 + math.cos(math.pi * (since + 1) / (self.warm_up + 1))) / 2.0
            slower = [_slowed(group, share) for group in optimizer.param_groups]
            set_groups_for_step(optimizer, slower)


def _cut_spikes(gradient: Tensor, moment: Tensor, threshold: float) -> None:
    limit = (moment * threshold).sqrt().to(gradient.dtype)
    # As magnitudes: a square of what is to be cut off may overflow.
    spike = (gradient.abs() > limit) & (moment > 0)
    gradient.copy_(limit.copysign(gradient).where(spike, gradient))


def _slowed(group: Group, share: float) -> Group:
    """With that share of the learning rate, and as much weight decay as before."""
    decay: Any = group["weight_decay"]
    if group["decoupled_weight_decay"]:
        decay = decay / share
    return {**group, "lr": group["lr"] * share, "weight_decay": decay}


def _fresh() -> dict[str, int]:
    return {"steps": 0}
