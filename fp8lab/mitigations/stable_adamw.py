"""StableAdamW: where the second moment lags behind the gradient, the step is made smaller.

    RMS_t = sqrt(mean(g_t^2 / max(v_t, eps^2)))          lr_t = lr / max(1, RMS_t)

per tensor, v_t the bias-corrected second moment with g_t in it: the update clipping of Adafactor in
AdamW (Wortsman et al. 2304.13013; the formula as stored notes on it have it). lr_t stands in
AdamW's whole update, in its weight decay too, as in the paper's algorithm (from memory) and the
optimi library. In that paper RMS_t leads a loss spike by 1 to 8 steps.

For the length of a step a tensor with RMS_t above 1 stands in a parameter group of its own, with
its own learning rate, so that the update is torch's own, to the bit that of AdamW at lr_t. A
tensor whose RMS_t is not finite is left to AdamW: it shows what is wrong. Nothing is kept from one
step to the next, so a checkpoint is as without it.

Rejected: scaling the update after the step, p + (p' - p) / RMS_t, which needs a copy of the
parameters and rounds twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fp8lab.mitigations.hooks import (
    Group,
    Optimizer,
    before_update,
    check_adam,
    restore_groups_after_step,
    set_groups_for_step,
    to_host,
    whole,
)


@dataclass(frozen=True, kw_only=True)
class StableAdamW:
    """Divide a tensor's learning rate by its RMS_t where that is above 1."""

    kind: ClassVar[str] = "optimizer"
    changes_function: ClassVar[bool] = False
    foldable: ClassVar[bool] = True  # the trained model has nothing of it
    cost: ClassVar[str] = "one pass over gradients and second moments, one transfer to the host"
    source: ClassVar[str] = "Wortsman et al. 2304.13013, StableAdamW"

    def apply(self, optimizer: Optimizer) -> Optimizer:
        """Put it on an Adam or AdamW, `optim.Fp8AdamW` among them; returns the same optimizer.

        Raises ValueError if it is on already, for another optimizer, and for amsgrad.
        """
        check_adam("StableAdamW", optimizer)
        restore_groups_after_step(optimizer)
        before_update("StableAdamW", optimizer, _clip_rates)
        return optimizer


def _clip_rates(optimizer: Optimizer) -> None:
    clipped = _clipped(optimizer)
    if clipped:
        set_groups_for_step(optimizer, _with_rates(optimizer.param_groups, clipped))


def _clipped(optimizer: Optimizer) -> dict[int, float]:
    """RMS_t of the tensors where it is above 1, by the parameter's id."""
    found = [
        (id(parameter), _mean_ratio(optimizer, parameter, group))
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    means = to_host([mean for _, mean in found])
    return {key: math.sqrt(mean) for (key, _), mean in zip(found, means, strict=True) if mean > 1.0}


def _mean_ratio(optimizer: Any, parameter: Tensor, group: Group) -> Tensor:
    """float64 scalar: mean(g^2 / max(v, eps^2)), v as this step will have it."""
    assert parameter.grad is not None
    gradient = parameter.grad.double()
    if group["weight_decay"] and not group["decoupled_weight_decay"]:
        gradient = gradient + group["weight_decay"] * parameter.double()  # what Adam's moments see
    squares = gradient.square()
    state = optimizer.state.get(parameter, {})
    beta = torch.as_tensor(group["betas"][1], dtype=torch.float64, device=squares.device)
    moment, steps = torch.zeros_like(squares), torch.ones((), dtype=torch.float64)
    if state:
        stored = state["exp_avg_sq"] if "exp_avg_sq" in state else optimizer.moments(parameter)[1]
        moment = stored.double()
        steps = torch.as_tensor(state["step"], dtype=torch.float64) + 1
    moment = (beta * moment + (1.0 - beta) * squares) / (1.0 - beta ** steps.to(beta.device))
    return whole((squares / moment.clamp(min=group["eps"] ** 2)).mean())


def _with_rates(groups: list[Group], rms: dict[int, float]) -> list[Group]:
    """The groups with every tensor of `rms` in one of its own, in the same order."""
    found: list[Group] = []
    for group in groups:
        together: list[Tensor] = []
        for parameter in group["params"]:
            if id(parameter) not in rms:
                together.append(parameter)
                continue
            rate = group["lr"] / rms[id(parameter)]
            found += [{**group, "params": together}, {**group, "params": [parameter], "lr": rate}]
            together = []
        found.append({**group, "params": together})
    return [group for group in found if group["params"]]
