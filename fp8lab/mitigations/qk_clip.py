"""QK-clip: a head whose attention logits grew too large has its queries and keys made smaller.

    after the step, per head:  W_q, W_k <- sqrt(tau / S) W_q, sqrt(tau / S) W_k     where S > tau

S is the largest logit of the head in the forwards of that step, over all sequences and positions
that are not masked, in all ranks; tau = 100. Kimi K2 (2507.20534) with Muon, here behind any
optimizer; formula from the report's notes, with S the largest value and not the largest magnitude
(notes on it have both). The logits of the same inputs would then have been at most tau. It changes
the function at that moment, and does nothing where no head is above tau. The optimizer's moments
are left as they are.

Only for the lab's `Attention`: there queries and keys can be seen as they meet, by a hook on the
module `mixing`, and each head has rows of its own. Elsewhere logits are hidden in a kernel, keys
are shared by several heads (which head's S is it?), or their turned part is shared by all (MLA).
Under QK-norm the size of W_q and W_k does not reach the logits: refused. A model that was compiled
and run before has no place for the hook: the first step says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, distributed, nn

from fp8lab.hooking import OfOneModel
from fp8lab.mitigations.hooks import (
    Optimizer,
    after_update,
    check_numbers,
    check_optimizer,
    is_of_training,
    parameters,
)
from fp8lab.sites import modules_of


@dataclass(frozen=True, kw_only=True)
class QKClip:
    """Scale the rows of query and key of a head whose largest logit was above `tau`."""

    kind: ClassVar[str] = "optimizer"
    needs_model: ClassVar[bool] = True
    changes_function: ClassVar[bool] = True
    foldable: ClassVar[bool] = True  # it is in the weights
    cost: ClassVar[str] = "the attention logits once more, one sequence at a time"
    source: ClassVar[str] = "Kimi K2 2507.20534, section 2.1"

    tau: float = 100.0

    def __post_init__(self) -> None:
        check_numbers(self, tau=(0.0, math.inf))

    def apply(self, optimizer: Optimizer, model: nn.Module) -> Optimizer:
        """Put it on any torch optimizer of `model`'s parameters; returns the same optimizer.

        Raises ValueError, with nothing changed, if it is on already, or the model has no attention
        like the lab's, or one with QK-norm, or a query or key that is not a parameter of the
        optimizer, or one of another head as well. A step raises RuntimeError whose gradients are
        from a forward in which no logit was seen.
        """
        check_optimizer("QKClip", optimizer)
        attentions = {name: m for name, m in modules_of(model).items() if _is_like_the_labs(m)}
        if not attentions:
            kinds = {type(m).__name__ for m in model.modules() if "Attention" in type(m).__name__}
            got = ", ".join(sorted(kinds)) or "no attention"
            expected = "expected one with query, key, heads and mixing, as the lab's has"
            raise ValueError(f"QKClip: {type(model).__name__} has {got}, {expected}")
        known = {id(parameter) for parameter in parameters(optimizer)}
        seen: set[int] = set()
        for name, attention in attentions.items():
            if attention.query_norm is not None:
                raise ValueError(
                    f"QKClip: {name} has QK-norm, its logits do not grow with W_q, W_k"
                )
            own = {id(attention.query.weight), id(attention.key.weight)}
            if not own <= known:
                kind = type(optimizer).__name__
                raise ValueError(f"QKClip: {name}: query or key is no parameter of the {kind}")
            if len(own) < 2 or own & seen:
                expected = "expected query and key of each head with weights of their own"
                raise ValueError(f"QKClip: {name}: query or key is shared, {expected}")
            seen |= own
        heads = [_Heads(name, attention, self.tau) for name, attention in attentions.items()]

        def clip() -> None:
            for one in heads:
                one.clip()

        after_update("QKClip", optimizer, clip)
        return optimizer


def _is_like_the_labs(module: Any) -> bool:
    own = vars(module).get("_modules", {})
    linears = [own.get(name) for name in ("query", "key")]
    return (
        {"mixing", "query_norm", "key_norm"} <= own.keys() | vars(module).keys()
        and isinstance(getattr(module, "heads", None), int)
        and all(isinstance(linear, nn.Linear) and linear.bias is None for linear in linears)
    )


class _Heads:
    """The largest logit of each head of one attention since the last step."""

    def __init__(self, name: str, attention: Any, tau: float) -> None:
        self._name, self._attention, self._tau = name, attention, tau
        self._largest: Tensor | None = None  # float32 [heads]
        attention.mixing.register_forward_pre_hook(OfOneModel(self._see))

    def _see(self, mixing: Any, args: tuple[Tensor, ...]) -> None:
        if not is_of_training():
            return
        query, key = (tensor.detach().float() for tensor in args[:2])
        scale = query.shape[-1] ** -0.5 if mixing.scale is None else mixing.scale
        masked = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device)
        masked = masked.triu(1)
        if self._largest is None:  # a batch may be empty, and was seen all the same
            self._largest = query.new_full(query.shape[1:2], torch.finfo(query.dtype).min)
        for queries, keys in zip(query, key, strict=True):
            logits = (queries @ keys.transpose(-2, -1)) * scale
            largest = logits.masked_fill_(masked, -torch.inf).amax(dim=(-2, -1))
            self._largest = torch.maximum(largest, self._largest)

    @torch.no_grad()
    def clip(self) -> None:
        weight = self._attention.query.weight
        largest, self._largest = self._largest, None
        is_unseen = largest is None
        if largest is None:
            largest = weight.new_full((self._attention.heads,), -torch.inf, dtype=torch.float32)
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(largest, distributed.ReduceOp.MAX)
        if is_unseen and weight.grad is not None and bool((largest == -torch.inf).all()):
            raise RuntimeError(
                f"QKClip: {self._name}: gradients of a forward in which no logits were seen, "
                "expected QKClip on the model before it is compiled and run"
            )
        # Neither NaN nor infinity says by how much.
        above = (largest > self._tau) & largest.isfinite()
        factor = torch.where(above, (self._tau / largest).sqrt(), 1.0)
        rows = factor.repeat_interleave(weight.shape[0] // len(factor))[:, None]
        for projection in (self._attention.query, self._attention.key):
            projection.weight.mul_(rows.to(weight.dtype))
