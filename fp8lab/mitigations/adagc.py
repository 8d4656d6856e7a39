"""AdaGC: the gradient of each tensor is clipped against what that tensor's own used to be.

    g <- g · min(1, 1.05 · gamma / |g|)        gamma <- 0.98 gamma + 0.02 |g|, g as clipped

per tensor (Wang et al. 2502.11034). In the first 100 steps all gradients together are clipped to a
total norm of 1, and gamma is the smallest norm that the tensor has had. lambda_rel and beta as in
the paper's code by other hands (from notes; its own text was not at hand), as is the warm-up.

A tensor whose gradient is zero has no norm to compare with: the step does not count for it. (As the
formula stands, one zero in the warm-up makes gamma zero, and the tensor never learns again: an
expert to which no token was sent.) A tensor without a gamma is not clipped. Neither is one whose
norm is not finite, nor does it count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from fp8lab.mitigations.hooks import (
    Group,
    Optimizer,
    before_update,
    check_count,
    check_numbers,
    check_optimizer,
    norms,
    own_groups,
)


@dataclass(frozen=True, kw_only=True)
class AdaGC:
    """Clip each tensor's gradient to `relative` times the average of its own clipped norms.

    `beta` is the share of the old average in the new; for `warm_up` steps, at least 1, the total
    norm of all is clipped to `absolute` instead.
    """

    kind: ClassVar[str] = "optimizer"
    changes_function: ClassVar[bool] = False
    foldable: ClassVar[bool] = True  # the trained model has nothing of it
    cost: ClassVar[str] = "one pass over the gradients, two where clipped, one transfer to the host"
    source: ClassVar[str] = "Wang et al. 2502.11034"

    relative: float = 1.05
    absolute: float = 1.0
    beta: float = 0.98
    warm_up: int = 100

    def __post_init__(self) -> None:
        check_numbers(self, relative=(0.0, math.inf), absolute=(0.0, math.inf), beta=(0.0, 1.0))
        check_count(self, "warm_up")

    def apply(self, optimizer: Optimizer) -> Optimizer:
        """Put it on any torch optimizer but LBFGS; returns the same optimizer.

        Its state is "adagc" in each parameter group, and in `state_dict()` with it; a group without
        it begins anew. Raises ValueError if it is on already, or a norm cannot be had.
        """
        check_optimizer("AdaGC", optimizer)
        for group in optimizer.param_groups:
            group.setdefault("adagc", _fresh(group))
        before_update("AdaGC", optimizer, self._clip)
        return optimizer

    def _clip(self, optimizer: Optimizer) -> None:
        groups = own_groups(optimizer)
        for group in groups:
            group.setdefault("adagc", _fresh(group))
            group["adagc"]["step"] += 1
        found = [
            (group["adagc"], index, parameter.grad)
            for group in groups
            for index, parameter in enumerate(group["params"])
            if parameter.grad is not None
        ]
        lengths = norms(gradient for _, _, gradient in found)
        total = math.hypot(*lengths)
        for (state, index, gradient), norm in zip(found, lengths, strict=True):
            if not 0.0 < norm < math.inf:
                continue
            warming_up = state["step"] <= self.warm_up
            gamma = state["gamma"][str(index)]
            if warming_up:
                # Where another tensor's norm is not finite the total is no measure of this one.
                factor = self.absolute / total if math.isfinite(total) else 1.0
            else:
                factor = 1.0 if gamma is None else self.relative * gamma / norm
            if factor < 1.0:
                gradient.mul_(factor)
                norm *= factor
            state["gamma"][str(index)] = self._average(gamma, norm, warming_up)

    def _average(self, gamma: float | None, norm: float, warming_up: bool) -> float:
        if gamma is None:
            return norm
        if warming_up:
            return min(gamma, norm)
        return self.beta * gamma + (1.0 - self.beta) * norm


def _fresh(group: Group) -> dict[str, Any]:
    # By index, as JSON has it: a mapping of other indices is of another group, which a list hides.
    return {"step": 0, "gamma": dict.fromkeys(map(str, range(len(group["params"]))))}
