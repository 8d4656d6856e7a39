"""Hot-Channel Patch: what the casts lose in the k hottest channels goes into the GEMM once more.

    x̂ = Q(x), Δx = x - x̂;  ŵ, Δw alike;  I the k hottest channels
    y = [x̂ | Q(Δx_I) | Q(x_I)] · [ŵ | Q(w_I) | Q(Δw_I)]^T

One GEMM with 2k further columns; to first order the channels in I are multiplied as if they had not
been cast, and Δx·Δw is left. Source: CHON (2602.02047), whose text we have not read: from its
abstract, that hot channels are found online and their residuals re-injected by one kernel; from a
reader's notes, the decomposition, the score s_j = mean|Δx_j| + mean|Δw_j|, the choice "single
kernel, second order, both operands", that channels are found periodically and then kept, and an
overhead of 9–13 %.

Ours, where those are silent: the patch is put on down's product alone; scores by the product's
amax as well; "persistent" channels are those of the largest running average of the score, moved at
the end of a step as delayed scales are (in the first step: just in time); the further columns are
cast by the layer's own recipe, and where blocks share a scale they begin a block of their own
(zeros fill it). A residual is a constant to the backward pass, so both copies of a channel together
get the gradient that is right to first order: g · (ŵ + Δŵ) and g^T · (x̂ + Δx̂). Where an operand is
cast anew for the backward GEMMs (MX, NVFP4, rows) the residual belongs to other codes, and its copy
is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp8lab.conversion import converted_downs
from fp8lab.linear import Fp8Linear
from fp8lab.recipe import (
    BitNetScaling,
    Float8BlockScaling,
    HighPrecision,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
    Operand,
)
from fp8lab.regions import register, steps
from fp8lab.rewriting import Remembering, Rewritten, is_free

# What shares a scale along a GEMM's sum, and the least common multiple of its blocks.
_BLOCKWISE = Float8BlockScaling | MXFP8BlockScaling | NVFP4BlockScaling
_BLOCK = 128


@dataclass(frozen=True, kw_only=True)
class HotChannelPatch:
    """Re-inject what the cast of the product, of down's weight, or of both loses in `channels`.

    `score` says how hot a channel is: by the mean residuals of both operands ("residual", the
    paper's) or by the product's amax. `timing`: just in time, or the channels of the largest
    running average, which keeps `memory` of itself in every step.
    """

    kind: ClassVar[str] = "model"
    changes_function: ClassVar[bool] = False
    foldable: ClassVar[bool] = False
    cost: ClassVar[str] = (
        "2k further columns in down's GEMMs, a second cast of product and W_down, a score a channel"
    )
    source: ClassVar[str] = "CHON, 2602.02047 (abstract and a reader's notes)"

    channels: int = 8
    operands: Literal["both", "input", "weight"] = "both"
    score: Literal["residual", "amax"] = "residual"
    timing: Literal["just_in_time", "persistent"] = "just_in_time"
    memory: float = 0.9

    def __post_init__(self) -> None:
        if type(self.channels) is not int or self.channels < 1:
            got = repr(self.channels)
            raise ValueError(f"HotChannelPatch: channels={got}, expected a whole number from 1")
        for field, choice in _CHOICES.items():
            if (got := getattr(self, field)) not in choice:
                raise ValueError(f"HotChannelPatch: {field}={got!r}, expected one of {choice}")
        if not 0.0 <= self.memory < 1.0:
            raise ValueError(f"HotChannelPatch: memory={self.memory}, expected 0 to below 1")

    def apply(self, model: nn.Module) -> nn.Module:
        """Put it on every gated feed-forward of a converted model; returns the same model.

        Raises ValueError if a down projection is not converted, is rewritten by another mitigation,
        has fewer channels, its product is not FP8, or its recipe is BitNet's, whose weight is a
        mean away from zero.
        """
        who = type(self).__name__
        free = []
        for name, down in converted_downs(model, who):
            if isinstance(down.recipe_for("input", "output"), HighPrecision):
                raise ValueError(f"{who}: the product of {name} is not FP8")
            if any(isinstance(recipe, BitNetScaling) for recipe in down.recipes.values()):
                raise ValueError(f"{who}: {name} is cast by BitNetScaling, which has no zero")
            if down.in_features < self.channels:
                width = down.in_features
                raise ValueError(f"{who}: {name} has {width} channels, expected {self.channels}")
            if is_free(f"{who}: {name}", down.rewrite, self):
                free.append(down)
        for down in free:
            down.rewrite = Patched(self, down)
        return model


_CHOICES: dict[str, tuple[Any, ...]] = {
    "operands": ("both", "input", "weight"),
    "score": ("residual", "amax"),
    "timing": ("just_in_time", "persistent"),
}


class Patched(Remembering):
    """The rewriting; the running average of scores is a buffer of it."""

    transient = ("_scores", "_hot")

    def __init__(self, mitigation: HotChannelPatch, down: Fp8Linear) -> None:
        super().__init__(down)
        self.mitigation = mitigation
        self._scores: Tensor | None = None  # of the last rewriting, and its channels
        self._hot: Tensor | None = None
        self.is_persistent = mitigation.timing == "persistent"
        if self.is_persistent:
            self.allocate("patch_average", down.in_features)
            self.allocate("_patch_average_before", down.in_features, persistent=False)
            self.handles.append(down.register_forward_hook(self._down_ran))
            register(self)

    def __call__(self, product: Tensor, weight: Tensor) -> Rewritten:
        lost, lost_of_weight = self._lost("input", product), self._lost("weight", weight)
        self._scores = self._scores_of(product, lost, lost_of_weight)
        self._hot = hot = self._hottest(self._scores)
        inputs = [product]
        if self.mitigation.operands != "weight":
            inputs.append(lost[..., hot])
        if self.mitigation.operands != "input":
            copy = product[..., hot]
            inputs.append(copy.detach() if self.layer.is_cast_twice("weight") else copy)
        return Rewritten(self._joined(inputs), self._weights(weight, lost_of_weight, hot))

    def _weights(self, weight: Tensor, lost: Tensor, hot: Tensor) -> Tensor:
        weights = [weight]
        if self.mitigation.operands != "weight":
            copy = weight[:, hot]
            weights.append(copy.detach() if self.layer.is_cast_twice("input") else copy)
        if self.mitigation.operands != "input":
            weights.append(lost[:, hot])
        return self._joined(weights)

    @property
    def words(self) -> str:
        of = self.mitigation
        return f"patched in {of.channels} hot channels ({of.operands}, {of.score}, {of.timing})"

    @property
    def output_scale(self) -> None:
        return None

    def of_weight(self, weight: Tensor) -> Tensor:
        """[out, channels and more], with the channels of the last rewriting."""
        if self._hot is None:
            return weight
        return self._weights(weight, self._lost("weight", weight), self._hot)

    @torch.no_grad()
    def _lost(self, operand: Operand, tensor: Tensor) -> Tensor:
        """What the layer's cast for the forward GEMM loses, of the tensor's shape, float32."""
        how = self.layer.cast_as_given(operand, tensor.detach(), "output")
        lost: Tensor = how.tensor.float() - how.fake_quantized()
        return lost

    @torch.no_grad()
    def _scores_of(self, product: Tensor, lost: Tensor, lost_of_weight: Tensor) -> Tensor:
        """float32 [channels]."""
        rows = product if self.mitigation.score == "amax" else lost
        rows = rows.detach().reshape(-1, rows.shape[-1]).float().abs()
        if not len(rows):
            return rows.new_zeros(rows.shape[-1])
        if self.mitigation.score == "amax":
            return rows.amax(dim=0)
        return rows.mean(dim=0) + lost_of_weight.abs().mean(dim=0)

    @torch.no_grad()
    def _hottest(self, scores: Tensor) -> Tensor:
        """int64 [k], ascending."""
        if self.is_persistent:
            repeats, down = steps.repeats_forward_of(self), self.layer
            average = down._patch_average_before if repeats else down.patch_average
            scores = torch.where(average.any(), average, scores)
        return scores.topk(self.mitigation.channels).indices.sort().values

    def _joined(self, pieces: list[Tensor]) -> Tensor:
        """The columns side by side; where blocks share a scale, each piece in its own blocks."""
        down = self.layer
        recipes = [*down.recipes.values(), *down.gemm_recipes.values()]
        if any(isinstance(recipe, _BLOCKWISE) for recipe in recipes):
            pieces = [F.pad(piece, (0, -piece.shape[-1] % _BLOCK)) for piece in pieces]
        return torch.cat(pieces, dim=-1)

    def _down_ran(self, *_: object) -> None:
        if steps.forward_counts() and self._scores is not None:
            self.collect(self._scores)
            steps.forward_ran(self)

    @torch.no_grad()
    def move_scales(self, *operands: Operand) -> None:
        """End of a step: its scores enter the average."""
        if "input" not in operands:
            return
        average = self.layer.patch_average
        running = self.collected(average)
        before, now = self.layer._patch_average_before, torch.nan_to_num(running)
        # Where several processes take part this is asked of layers that did not run, too.
        ran = (running != 0).any()
        before.copy_(torch.where(ran, average, before))
        moved = average.lerp(now, 1.0 - self.mitigation.memory)
        average.copy_(torch.where(ran, moved, average))
