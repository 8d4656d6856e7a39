"""`te.Linear` as a converted model has it: it runs in the FP8 that it was converted to, or stops.

Transformer Engine decides at each forward, by the autocast region that it finds, whether a layer
computes in FP8; without one it computes in high precision and says nothing. Here that is an error
that names the layer. The question is TE's own global state, a few attributes, at each forward.

A class and not a hook: a probe that replaces the layer's forward (`te_modules.plain_linears`)
replaces the check with it. A file of its own, for its import needs Transformer Engine.
"""

from __future__ import annotations

from typing import Any

import transformer_engine.pytorch as te
from torch import Tensor
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

from fp8lab.regions import inside_backward


class CheckedLinear(te.Linear):  # type: ignore[misc]
    """A `te.Linear` that computes under the recipe `declared`, one of TE's objects, or not at all.

    Raises RuntimeError, naming the layer, in a forward without FP8 or under another recipe.
    """

    declared: Any = None

    def forward(self, inp: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = FP8GlobalStateManager.get_fp8_recipe() if _enabled() else None
        if found is None or (found is not self.declared and found != self.declared):
            expected = type(self.declared).__name__
            got = "without FP8" if found is None else f"under another {type(found).__name__}"
            raise RuntimeError(
                f"{self.name or 'the model'}: Transformer Engine runs it {got}, expected the "
                f"{expected} that it was converted to{_reason(found)}"
            )
        return super().forward(inp, *args, **kwargs)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        # A checkpoint from before the conversion has no FP8 state: it starts afresh.
        super()._load_from_state_dict(state_dict, prefix, *others)
        missing, own = others[2], f"{prefix}_extra_state"
        if own in missing and f"{prefix}weight" in state_dict:
            missing.remove(own)


def _enabled() -> bool:
    return bool(FP8GlobalStateManager.is_fp8_enabled())


def _reason(found: Any) -> str:
    if found is not None:
        return "; a te.autocast inside the model says otherwise"
    if inside_backward():
        return "; a checkpoint of torch repeats it outside of its region: use te.checkpoint"
    return "; it was called outside of the model's forward, or inside of te.autocast(enabled=False)"
