"""Architectures that grow fewer outliers: what they change in the lab's language model.

Each takes a `lab.model.ModelConfig` and returns another; the model is then built and trained anew,
for none of these functions is the old one.

- `FOG` (2505.20524, and the launch script of its code): no norm before attention and feed-forward;
  their outputs normed, with gains that begin at 1 / sqrt(layers); none before the head; queries and
  keys normed without weights, and a softmax scale instead; the input times 1 / std; no gate, xIELU
  or GELU. The script's softmax scale is 0.125, for heads of width 128; at other widths sqrt(2 /
  width), which is the same there, is ours. std is that of the embeddings, 0.02 as there; with 1, as
  the lab's are otherwise, nothing is divided.
- `OutlierProtected` (OP, 2405.19279, from memory): no norm in the block, QK-norm with weights, and
  what attention and feed-forward add times beta < 1. beta = 1 / sqrt(2 · layers), one over the root
  of how many add, is ours, and so is that it stays as it is; the norm before the head stays. The
  paper's scaling of the feed-forward's inputs is left out.
- `QKNorm`: RMSNorm of queries and keys alone (2302.05442; with weights, as in most models).
- `PlainFeedForward`: no gate, at exactly the parameters of the gated one.

Norms that another has changed, and QK-norm, are left to it: the second is refused.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from fp8lab.mitigations.hooks import check_numbers

_Config = TypeVar("_Config")


@dataclass(frozen=True, kw_only=True)
class FOG:
    """Norms behind, not before; frozen QK-norm; no gate.

    `softmax_scale` None is sqrt(2 / width of a head). `activation` is one of the model's variants.
    """

    kind: ClassVar[str] = "architecture"
    changes_function: ClassVar[bool] = True
    foldable: ClassVar[bool] = False
    cost: ClassVar[str] = "as many norms as before, and two per attention"
    source: ClassVar[str] = "Hernández-Cano et al. 2505.20524 and its code"

    activation: str = "xielu"
    softmax_scale: float | None = None
    embedding_std: float = 0.02

    def __post_init__(self) -> None:
        check_numbers(self, embedding_std=(0.0, math.inf))
        if self.softmax_scale is not None:
            check_numbers(self, softmax_scale=(0.0, math.inf))

    def apply(self, config: _Config) -> _Config:
        """Raises ValueError for what is not the lab's configuration, one with other norms already,
        or an unknown activation."""
        found = _lab_config("FOG", config)
        scale = self.softmax_scale or math.sqrt(2.0 * found.heads / found.dim)
        return _replaced(
            "FOG",
            config,
            variant=self.activation,
            norm="post",
            norm_gain=1.0 / math.sqrt(found.layers),
            final_norm=False,
            qk_norm="frozen",
            softmax_scale=scale,
            embedding_std=self.embedding_std,
        )


@dataclass(frozen=True, kw_only=True)
class OutlierProtected:
    """No norms in the block, QK-norm, and the residual branches times `residual_weight`."""

    kind: ClassVar[str] = "architecture"
    changes_function: ClassVar[bool] = True
    foldable: ClassVar[bool] = False
    cost: ClassVar[str] = "no norms in the block but two per attention, one multiplication a branch"
    source: ClassVar[str] = "He et al. 2405.19279"

    residual_weight: float | None = None

    def __post_init__(self) -> None:
        if self.residual_weight is not None:
            check_numbers(self, residual_weight=(0.0, 1.0))

    def apply(self, config: _Config) -> _Config:
        """Raises ValueError for what is not the lab's configuration, or has other norms already."""
        layers = _lab_config("OutlierProtected", config).layers
        weight = self.residual_weight or 1.0 / math.sqrt(2 * layers)
        return _replaced(
            "OutlierProtected", config, norm="none", qk_norm="learned", residual_weight=weight
        )


@dataclass(frozen=True, kw_only=True)
class QKNorm:
    """RMSNorm of each head's queries and keys; `learned` gives the norms weights."""

    kind: ClassVar[str] = "architecture"
    changes_function: ClassVar[bool] = True
    foldable: ClassVar[bool] = False
    cost: ClassVar[str] = "two norms per attention"
    source: ClassVar[str] = "Dehghani et al. 2302.05442"

    learned: bool = True

    def apply(self, config: _Config) -> _Config:
        """Raises ValueError for what is not the lab's configuration, or has other norms already."""
        _lab_config("QKNorm", config)
        return _replaced("QKNorm", config, qk_norm="learned" if self.learned else "frozen")


@dataclass(frozen=True, kw_only=True)
class PlainFeedForward:
    """down(activation(up(x))) in the place of the gated feed-forward.

    Its width gives it the parameters of the gated one that it replaces, exactly.
    """

    kind: ClassVar[str] = "architecture"
    changes_function: ClassVar[bool] = True
    foldable: ClassVar[bool] = False
    cost: ClassVar[str] = "a product half as wide again"
    source: ClassVar[str] = "Shazeer 2002.05202; So et al. 2109.08668 for relu_squared"

    activation: str = "relu_squared"

    def apply(self, config: _Config) -> _Config:
        """Raises ValueError for what is not the lab's configuration, one whose feed-forward has no
        gate already, a width that no whole number makes up for, or an unknown activation."""
        found = _lab_config("PlainFeedForward", config)
        if not found.is_gated:
            raise ValueError(f"PlainFeedForward: {found.variant} has no gate already")
        hidden = found.hidden
        if hidden is not None:
            if hidden % 2:
                raise ValueError(f"PlainFeedForward: hidden={hidden}, expected an even width")
            hidden = 3 * hidden // 2
        changed = _replaced("PlainFeedForward", config, variant=self.activation, hidden=hidden)
        if _lab_config("PlainFeedForward", changed).is_gated:
            raise ValueError(f"PlainFeedForward: activation={self.activation!r} has a gate")
        return changed


def _lab_config(who: str, config: Any) -> Any:
    names = {field.name for field in dataclasses.fields(config)} if _is_value(config) else set()
    missing = {"layers", "heads", "dim", "variant", "norm", "qk_norm", "residual_weight"} - names
    if missing:
        got = type(config).__name__
        raise TypeError(f"{who}: {got}, expected the configuration of the lab's model")
    return config


def _is_value(config: Any) -> bool:
    return dataclasses.is_dataclass(config) and not isinstance(config, type)


def _replaced(who: str, config: _Config, **changes: Any) -> _Config:
    born = {one.name: one.default for one in dataclasses.fields(config)}  # type: ignore[arg-type]
    for name in ("norm", "qk_norm"):
        found, wanted = getattr(config, name), changes.get(name)
        if wanted is not None and found not in (born[name], wanted):
            expected = f"expected {born[name]!r} to make it {wanted!r}"
            raise ValueError(f"{who}: the configuration has {name}={found!r}, {expected}")
    changed: _Config = dataclasses.replace(config, **changes)  # type: ignore[type-var]
    return changed
