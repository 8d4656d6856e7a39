"""ZClip: a gradient is clipped where its norm is far above what the last steps had.

    z = (norm - mean) / (std + eps)        if z > 2.5:  norm to be  mean + 2.5 std / (z / 2.5)

mean and variance are exponential averages (0.97) of the total norm as it was after clipping, and
begin with those of the first 25 steps, which are not clipped. The further off, the harder: at
z = 2.5 the norm becomes mean + 2.5 std, and mean in the limit. Kumar et al. 2504.02507; formula,
order (mean first, then the variance about the new mean) and eps = 1e-6 as in their published code
with its options zscore and adaptive_scaling; that code clips to 1.0 as well if not told otherwise,
which is left to the training loop here.

A norm that is not finite is neither clipped nor counted: NaN stays visible, the averages stay
finite. (The published code has them NaN for ever after.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from fp8lab.mitigations.hooks import (
    Optimizer,
    before_update,
    check_count,
    check_numbers,
    check_optimizer,
    norms,
    own_groups,
    parameters,
)

_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class ZClip:
    """Clip the total norm of the gradients where its z-score is above `z`.

    `alpha` is the share of the old average in the new, `warm_up` the number of steps, at least 1,
    from which the averages begin.
    """

    kind: ClassVar[str] = "optimizer"
    changes_function: ClassVar[bool] = False
    foldable: ClassVar[bool] = True  # the trained model has nothing of it
    cost: ClassVar[str] = "one pass over the gradients, two where clipped, one transfer to the host"
    source: ClassVar[str] = "Kumar et al. 2504.02507, its published code"

    alpha: float = 0.97
    z: float = 2.5
    warm_up: int = 25

    def __post_init__(self) -> None:
        check_numbers(self, alpha=(0.0, 1.0), z=(0.0, math.inf))
        check_count(self, "warm_up")

    def apply(self, optimizer: Optimizer) -> Optimizer:
        """Put it on any torch optimizer but LBFGS; returns the same optimizer.

        Its state is `param_groups[0]["zclip"]`, and in `state_dict()` with it; a state without it
        begins anew. Raises ValueError if it is on already, or a total norm cannot be had.
        """
        check_optimizer("ZClip", optimizer)
        optimizer.param_groups[0].setdefault("zclip", _fresh())
        before_update("ZClip", optimizer, self._clip)
        return optimizer

    def _clip(self, optimizer: Optimizer) -> None:
        state: dict[str, Any] = own_groups(optimizer)[0].setdefault("zclip", _fresh())
        gradients = [p.grad for p in parameters(optimizer) if p.grad is not None]
        norm = math.hypot(*norms(gradients))
        if not gradients or not math.isfinite(norm):
            return
        if state["mean"] is None:
            state["norms"].append(norm)
            if len(state["norms"]) >= self.warm_up:
                mean = sum(state["norms"]) / len(state["norms"])
                squares = [(one - mean) ** 2 for one in state["norms"]]
                state.update(mean=mean, variance=sum(squares) / len(squares), norms=[])
            return
        limit = self._limit(norm, state["mean"], math.sqrt(state["variance"]))
        if limit < norm:
            for gradient in gradients:
                gradient.mul_(limit / (norm + _EPS))
        state["mean"] = self.alpha * state["mean"] + (1.0 - self.alpha) * limit
        squared = (limit - state["mean"]) ** 2
        state["variance"] = self.alpha * state["variance"] + (1.0 - self.alpha) * squared

    def _limit(self, norm: float, mean: float, std: float) -> float:
        """What the norm is to be: itself where it is nothing special."""
        score = (norm - mean) / (std + _EPS)
        return mean + self.z * std / (score / self.z) if score > self.z else norm


def _fresh() -> dict[str, Any]:
    return {"norms": [], "mean": None, "variance": None}
