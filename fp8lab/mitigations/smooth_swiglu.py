"""Smooth-SwiGLU: the product scaled before its cast and unscaled behind, so that one outlier does
not take the range of all others. Three algorithms go by that name.

1. The paper's (Fishman et al., 2409.12517), a scale per *channel*, `SmoothSwiGLU()`:

    y = (W_down · diag(1/s)) Q(s ⊙ product),        s_i = 2^-ceil(log2 max_tokens |product_i|)

   Every channel is brought to an amax in (1/2, 1], and the scale is undone in down's columns
   *before* those are cast. Powers of two make both steps exact. At inference s folds into the rows
   of up and the columns of down: `fold`. The paper multiplies the linear branch by s and says that
   s comes from a per-channel maximum, not of which tensor; `branch="linear"` takes that of up,
   which bounds only half of an aligned channel's growth.

2. Its reference code's (Anonymous1252022/Megatron-DeepSpeed, class ScaledSwiglu), a scale per
   *token*, `SmoothSwiGLU.reference_code()`:

    y = s · W_down Q(act(gate) ⊙ up / s),           s_t = max_channels |up_t|

   It commutes with the GEMM, cannot be folded into weights, and leaves a hot channel hot.

3. The baseline that diverged in FOG (2505.20524; fused_scaled_swiglu.py), the same with
   s_t = max_channels |gate_t|, before the activation: `SmoothSwiGLU.fog_baseline()`.

Both codes divide up by s; here the product is divided, which differs by one rounding. Both lack
what is here: a zero maximum (then s = 1), and the maximum over tensor-parallel processes, without
which each undoes another scale than it applied.

Per channel the outlier moves: W_down / s has the range that the product had, and one scale for it
flushes all other columns unless down's column shrank as the product grew. With one of 512 channels
5.5e5 times the others, under current scaling, the bulk of the product is off by 2.6 % instead of
86 %, but 90 % of W_down is flushed and the bulk's part of the output off by 85 % instead of 87 %:
43 % with a scale per row of W_down, 11 % with one per 32 (MX), 2.7 % with the product in BF16.

Pitfalls, met by others: s of a channel sits on the down GEMM's summation axis and cannot be undone
after the GEMM; the smoothed columns change with s in every step, so the weight of down must be
scaled just in time (with a delayed scale 2 of 8 small runs still diverged); and a scale from the
step before (`timing="delayed"`) protects from no jump. None removes the alignment behind it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from fp8lab.conversion import converted_downs
from fp8lab.linear import Fp8Linear
from fp8lab.recipe import DelayedScaling, Float8CurrentScaling, HighPrecision, Operand
from fp8lab.regions import register, steps
from fp8lab.rewriting import OfAnotherForwardError, Remembering, Rewritten, is_free
from fp8lab.sites import GateSite, find_gates

Granularity = Literal["channel", "token"]
Branch = Literal["product", "linear", "gate"]
Timing = Literal["just_in_time", "delayed"]


@dataclass(frozen=True, kw_only=True)
class SmoothSwiGLU:
    """Balance the product's channels, or its tokens, before the cast.

    The maxima are those of `branch`: the product, up's raw output ("linear") or gate's. A delayed
    scale comes from the step before (in the first: of the product, just in time), at most doubles
    in a step and is at most that of the median channel, lest a channel that was quiet come back as
    an outlier; it is in the state dict, and an evaluation leaves it alone. With `detach=False` the
    scale carries the gradient of its maximum, which cancels but for the casts. `power_of_two`
    rounds the scaled amax down into (1/2, 1]; without it, it is 1.

    The maxima are taken over the processes of `group` (a torch ProcessGroup), if one is given:
    those of tensor parallelism where tokens are balanced and each process has some channels, those
    of data parallelism where channels are and each has some tokens. All of them must run the same
    forwards, those of `find_gates` and `watch` included. Where the weights are DTensors that is
    known without it. A value with a group cannot be pickled.

    Raises ValueError for what is no algorithm: a token has no step before, gate's maxima are taken
    per token, and neither a power of two, nor a delayed scale, nor one of several processes has a
    gradient.
    """

    kind: ClassVar[str] = "model"
    changes_function: ClassVar[bool] = False
    foldable: ClassVar[bool] = True  # per channel, where up is linear in the product
    cost: ClassVar[str] = (
        "a maximum per channel (token), one multiplication of the product, one of W_down (of the "
        "output); 4 bytes a channel if delayed"
    )
    source: ClassVar[str] = (
        "Fishman et al., 2409.12517, section 4.4; its reference code, ScaledSwiglu; "
        "FOG, 2505.20524, fused_scaled_swiglu.py"
    )

    granularity: Granularity = "channel"
    branch: Branch = "product"
    timing: Timing = "just_in_time"
    detach: bool = True
    power_of_two: bool = True
    group: Any = None

    def __post_init__(self) -> None:
        for field, choice in _CHOICES.items():
            if (got := getattr(self, field)) not in choice:
                raise ValueError(f"SmoothSwiGLU: {field}={got!r}, expected one of {choice}")
        refused = {
            "timing='delayed' with granularity='token'": self._is("token", "delayed"),
            "branch='gate' with granularity='channel'": self._is("channel", "gate"),
            "detach=False with power_of_two=True": not self.detach and self.power_of_two,
            "detach=False with timing='delayed'": not self.detach and self._is("delayed"),
            "detach=False with a group": not self.detach and self.group is not None,
        }
        for what, it_is in refused.items():
            if it_is:
                raise ValueError(f"SmoothSwiGLU: {what}, expected one or the other")

    def _is(self, *names: str) -> bool:
        return {*names} <= {self.granularity, self.branch, self.timing}

    def __deepcopy__(self, memo: object) -> SmoothSwiGLU:
        return self  # a frozen value; its group could not be copied

    @classmethod
    def reference_code(cls, *, detach: bool = True, group: Any = None) -> SmoothSwiGLU:
        """ScaledSwiglu of the paper's code: per token, by the maximum of up."""
        how: dict[str, Any] = {"granularity": "token", "branch": "linear", "power_of_two": False}
        return cls(**how, detach=detach, group=group)

    @classmethod
    def fog_baseline(cls, *, group: Any = None) -> SmoothSwiGLU:
        """FOG's "Llama 3 with Smooth-SwiGLU": per token, by the maximum of gate."""
        return cls(granularity="token", branch="gate", power_of_two=False, group=group)

    def apply(self, model: nn.Module) -> nn.Module:
        """Put it on every gated feed-forward of a converted model; returns the same model.

        Where channels are balanced the weight of down is scaled just in time from then on, whatever
        the recipe said; delayed scales of what is balanced start afresh. Raises ValueError if a
        down projection is not converted, is rewritten by another mitigation, or its product is not
        FP8, or if no layer is called for the branch.
        """
        who = type(self).__name__
        downs = converted_downs(model, who)
        free = []
        for site, (name, down) in zip(find_gates(model), downs, strict=True):
            if isinstance(down.recipe_for("input", "output"), HighPrecision):
                raise ValueError(f"{who}: the product of {name} is not FP8")
            projection = site.gate if self.branch == "gate" else site.up
            if self.branch != "product" and projection.module is None:
                raise ValueError(f"{who}: {name} does not call its {self.branch} projection")
            if is_free(f"{who}: {name}", down.rewrite, self):
                free.append((site, down))
        for site, down in free:
            of_channels = self.granularity == "channel"
            down.rewrite = (ChannelsBalanced if of_channels else TokensBalanced)(self, site)
            down.start_afresh("input", *(() if of_channels else ("grad_output",)))
            weight = down.recipes["weight"]
            if isinstance(weight, DelayedScaling) and of_channels:
                down.recipes["weight"] = Float8CurrentScaling(fp8_format=weight.fp8_format)
        return model

    @staticmethod
    def fold(model: nn.Module, batches: Iterable[Any] = ()) -> nn.Module:
        """Multiply the scales into the rows of up and divide the columns of down by them, and take
        the rewriting away; returns the same model, for inference.

        The scales are those in force, which delayed ones are; with `batches`, what the model is
        called with (a tuple or a mapping as its arguments), they are made of the maxima over these.
        With powers of two the folded model is the unfolded one with these scales to the bit, where
        the cast of up's weight commutes with a scale per row: without FP8, with one per row
        (`RowwiseScaling`) or block (MX). With one for all of up's weight, a delayed one made anew,
        rows now far apart in size share its range: other outputs.

        Raises ValueError, and changes nothing, if no channel is balanced, a weight is shared with
        another layer, the product is not linear in up, a hook may change what up gives or down
        takes, or scales are made just in time and there are no batches.
        """
        batches = list(batches)
        folded = []
        ids = [id(p) for module in model.modules() for p in module.parameters(recurse=False)]
        for site in find_gates(model):
            balanced = getattr(site.down.module, "rewrite", None)
            if isinstance(balanced, _Balanced):
                _check_foldable(site, balanced, bool(batches), ids)
                folded.append((site, balanced))
        if not folded:
            raise ValueError("SmoothSwiGLU.fold: expected a model with Smooth-SwiGLU on it")
        scales = _calibrated(model, folded, batches)
        for (site, balanced), scale in zip(folded, scales, strict=True):
            _fold(site, balanced, scale)
        return model


LARGEST_GROWTH = 2.0  # of a delayed scale, a step

_CHOICES: dict[str, tuple[Any, ...]] = {
    "granularity": get_args(Granularity),
    "branch": get_args(Branch),
    "timing": get_args(Timing),
    "detach": (True, False),
    "power_of_two": (True, False),
}


class _Balanced(Remembering):
    """The rewriting; delayed scales are buffers of it."""

    transient = ("_met", "_last")

    def __init__(
        self, mitigation: SmoothSwiGLU | None = None, site: GateSite | None = None
    ) -> None:
        super().__init__(None if site is None else site.down.module)
        self.mitigation = of = SmoothSwiGLU() if mitigation is None else mitigation
        self._met: Tensor | None = None  # the maxima of this forward, where a hook finds them
        self._is_taken = False
        self._last: Tensor | None = None  # the scale of the last rewriting
        self.is_delayed = of.timing == "delayed"
        self.listens = of.branch != "product" or of.group is not None
        if site is None:
            return
        if self.listens or self.is_delayed:
            self.handles += _listen(site, of.branch, self.see)
        if of.branch != "product":
            self.handles.append(self.layer.register_forward_pre_hook(self._down_runs, prepend=True))
        if self.is_delayed:
            self.allocate("smooth_scale", site.channels)
            self.allocate("_smooth_scale_before", site.channels, persistent=False)
            self.handles.append(self.layer.register_forward_hook(self._down_ran))
            register(self)

    def see(self, tensor: Tensor) -> None:
        """What the branch has given in this forward, [..., channels]."""
        amax = self.maxima(tensor)
        if not self.is_delayed:
            self._met, self._is_taken = _shared(amax, self.mitigation.group), False
        elif steps.forward_counts():
            self.collect(amax)

    def _down_runs(self, *_: object) -> None:
        # The maxima are for one run of down, and for whoever asks about it before the next.
        if self._is_taken:
            self._met = None
        self._is_taken = True

    def _down_ran(self, *_: object) -> None:
        if steps.forward_counts():
            steps.forward_ran(self)

    @torch.no_grad()
    def move_scales(self, *operands: Operand) -> None:
        """End of a step: the scales of the next come from its maxima; a channel in which nothing
        was, or something that is not finite, keeps its own."""
        if "input" not in operands:
            return
        scale, before = self.layer.smooth_scale, self.layer._smooth_scale_before
        amax = _shared(self.collected(scale), self.mitigation.group)
        told = (amax > 0) & amax.isfinite()
        new = self._scale_of(_by_parts(_at_least_the_median, amax))
        new = torch.where(scale > 0, torch.minimum(new, scale * LARGEST_GROWTH), new)
        # Where several processes take part this is asked of layers that did not run, too.
        before.copy_(torch.where((amax != 0).any(), scale, before))
        scale.copy_(torch.where(told, new, scale))

    def maxima(self, tensor: Tensor) -> Tensor:
        raise NotImplementedError

    def _scale_of(self, amax: Tensor) -> Tensor:
        return _by_parts(power_of_two_scale if self.mitigation.power_of_two else _reciprocal, amax)

    def scale_for(self, product: Tensor) -> Tensor:
        """What multiplies the product, [channels] or [..., 1]."""
        if self.is_delayed:
            repeats, down = steps.repeats_forward_of(self), self.layer
            scale: Tensor = down._smooth_scale_before if repeats else down.smooth_scale
            just_in_time = self._scale_of(self.maxima(product))
            # Another tensor: the backward pass needs it after the step has moved the buffer.
            return torch.where(scale > 0, scale, just_in_time)
        amax = self._met if self.listens else self.maxima(product)
        if amax is None:
            ran = f"down ran before its {self.mitigation.branch} branch"
            expected = "expected that first, in a recomputation too"
            raise OfAnotherForwardError(f"SmoothSwiGLU: {ran}, {expected}")
        return self._scale_of(amax)

    @property
    def words(self) -> str:
        of = self.mitigation
        by = "" if of.branch == "product" else f" by {'up' if of.branch == 'linear' else 'gate'}"
        return f"{of.granularity}s balanced{by}{', delayed' if self.is_delayed else ''}"


class ChannelsBalanced(_Balanced):
    """The product times a scale per channel, the columns of down divided by it."""

    def __call__(self, product: Tensor, weight: Tensor) -> Rewritten:
        scale = self.scale_for(product)
        self._last = scale.detach()
        return Rewritten(product * scale, weight / scale, channel_scale=scale)

    def maxima(self, tensor: Tensor) -> Tensor:
        """float32 (of float64: that) [channels]."""
        rows = tensor.detach() if self.mitigation.detach else tensor
        rows = rows.reshape(-1, tensor.shape[-1])
        amax = rows.abs().amax(dim=0) if len(rows) else rows.new_zeros(tensor.shape[-1])
        return amax.to(torch.promote_types(amax.dtype, torch.float32))

    @property
    def output_scale(self) -> None:
        return None

    def of_weight(self, weight: Tensor) -> Tensor:
        """[out, channels]: as the last rewriting made it."""
        return weight if self._last is None else weight / self._last


class TokensBalanced(_Balanced):
    """The product times a scale per token, the output divided by it."""

    def __call__(self, product: Tensor, weight: Tensor) -> Rewritten:
        scale, tokens = self.scale_for(product), product.shape[:-1]
        if scale.numel() != math.prod(tokens):
            raise OfAnotherForwardError("SmoothSwiGLU: the maxima are of another number of tokens")
        scale = scale.reshape(*tokens, 1)
        self._last = scale.detach()
        return Rewritten(product * scale, weight, scale.expand_as(product), scale.reciprocal())

    def maxima(self, tensor: Tensor) -> Tensor:
        """float32 (of float64: that) [..., 1]."""
        tensor = tensor.detach() if self.mitigation.detach else tensor
        amax = tensor.abs().amax(dim=-1, keepdim=True)
        return amax.to(torch.promote_types(amax.dtype, torch.float32))

    @property
    def output_scale(self) -> Tensor | None:
        return None if self._last is None else self._last.reciprocal()

    def of_weight(self, weight: Tensor) -> Tensor:
        """[out, channels]: as it is."""
        return weight


def power_of_two_scale(amax: Tensor) -> Tensor:
    """float32 powers of two, of amax's shape, that bring each amax into (1/2, 1].

    None is beyond 2^-126 and 2^126. An amax that is 0, infinite or NaN gets 1.
    """
    amax = amax.detach().float()
    fraction, exponent = torch.frexp(amax)
    # amax = fraction · 2^exponent with fraction in [1/2, 1): already ceil, but for exact powers.
    exponent = torch.where(fraction == 0.5, exponent - 1, exponent)
    # Beyond ±126 the scale or its reciprocal would leave the normal range and stop being exact.
    # Made from its bits: what ldexp returns is not promised to be a power of two.
    scale = ((127 - exponent.clamp(-126, 126)) << 23).view(torch.float32)
    # frexp(0) is (0, 0) and gives 1; of infinity and NaN the exponent is not specified.
    return torch.where(amax.isfinite(), scale, 1.0)


def _reciprocal(amax: Tensor) -> Tensor:
    """1 / amax where that is a number and its reciprocal is one, else 1."""
    usable = (amax >= 2.0**-126) & (amax <= 2.0**126)
    return torch.where(usable, amax, 1.0).reciprocal()


def _at_least_the_median(amax: Tensor) -> Tensor:
    """[channels]; the median is of what is finite and not 0."""
    told = torch.where((amax > 0) & amax.isfinite(), amax, torch.nan)
    return torch.fmax(amax, told.nanmedian())


def _shared(amax: Tensor, group: Any) -> Tensor:
    """The largest of a group's maxima; NaN, whose place among others is not promised, as inf."""
    if group is None:
        return amax
    amax = torch.nan_to_num(amax, nan=torch.inf, posinf=torch.inf).contiguous()
    torch.distributed.all_reduce(amax, op=torch.distributed.ReduceOp.MAX, group=group)
    return amax


def _by_parts(function: Callable[[Tensor], Tensor], amax: Any) -> Tensor:
    """function(amax); of a DTensor, by each process of its part, maxima of parts taken first."""
    if not hasattr(amax, "to_local"):
        return function(amax)
    from torch.distributed.tensor import DTensor, Replicate

    places = [Replicate() if place.is_partial() else place for place in amax.placements]
    whole = amax.redistribute(placements=places)
    made: Tensor = DTensor.from_local(
        function(whole.to_local()),
        whole.device_mesh,
        places,
        shape=whole.shape,
        stride=whole.stride(),
    )
    return made


def _listen(site: GateSite, branch: Branch, receive: Callable[[Tensor], None]) -> list[Any]:
    """Hooks that give what the branch gives to `receive` before any other hook of down runs."""
    down = site.down.module
    if branch == "product" and down is not None:
        hook = partial(_of_input, receive)
        return [down.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)]
    projection = site.gate if branch == "gate" else site.up
    assert projection.module is not None
    return [projection.module.register_forward_hook(partial(_of_output, receive, projection.rows))]


def _of_input(receive: Callable[[Tensor], None], module: object, args: Any, kwargs: Any) -> None:
    receive(next(iter((*args, *kwargs.values()))))


def _of_output(
    receive: Callable[[Tensor], None], rows: slice, module: object, args: Any, output: Any
) -> None:
    if not isinstance(output, Tensor):
        kind = type(output).__name__
        raise TypeError(f"SmoothSwiGLU: a projection gave a {kind}, expected a tensor")
    receive(output if rows == slice(None) else output[..., rows])


# --- folding ------------------------------------------------------------------------------------


def _check_foldable(site: GateSite, balanced: _Balanced, calibrated: bool, ids: list[int]) -> None:
    who = f"SmoothSwiGLU.fold: {site.name}"
    changed = site.up.parameter, site.down.parameter, getattr(site.up.module, "bias", None)
    if any(ids.count(id(parameter)) > 1 for parameter in changed):
        raise ValueError(f"{who}: up or down shares its weight or bias, expected its own")
    if isinstance(balanced, TokensBalanced):
        raise ValueError(f"{who}: tokens are balanced, expected channels: weights know no token")
    if (site.up_activation, site.up_limit, site.up_offset) != ("identity", None, 0.0):
        how = f"{site.up_activation}, limit {site.up_limit}, offset {site.up_offset}"
        raise ValueError(f"{who}: the product is not linear in up ({how})")
    own = {handle.id for handle in balanced.handles}
    after = {} if site.up.module is None else site.up.module._forward_hooks
    before = {} if site.down.module is None else site.down.module._forward_pre_hooks
    if {*after, *before} - own:
        raise ValueError(f"{who}: up or down has a hook that may change what passes, expected none")
    if not (balanced.is_delayed or calibrated):
        raise ValueError(f"{who}: scales are made just in time, expected batches to take them from")


@torch.no_grad()
def _calibrated(
    model: nn.Module, folded: list[tuple[GateSite, _Balanced]], batches: list[Any]
) -> list[Tensor]:
    """The scales to fold, float32 [channels] each."""
    if not batches:
        scales = [balanced.layer.smooth_scale for _, balanced in folded]
        return [torch.where(scale > 0, scale, 1.0) for scale in scales]
    seen: list[list[Tensor]] = [[] for _ in folded]
    handles = []
    for (site, balanced), maxima in zip(folded, seen, strict=True):
        note = partial(_note, balanced, maxima)
        handles += _listen(site, balanced.mitigation.branch, note)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for batch in batches:
            if isinstance(batch, Mapping):
                model(**batch)
            else:
                model(*batch if isinstance(batch, tuple) else (batch,))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    for (site, _), maxima in zip(folded, seen, strict=True):
        if not maxima:
            raise ValueError(f"SmoothSwiGLU.fold: {site.name} ran in none of the batches")
    amaxes = [
        _shared(torch.stack(maxima).amax(dim=0), balanced.mitigation.group)
        for (_, balanced), maxima in zip(folded, seen, strict=True)
    ]
    return [
        balanced._scale_of(_by_parts(_at_least_the_median, amax))
        for (_, balanced), amax in zip(folded, amaxes, strict=True)
    ]


def _note(balanced: _Balanced, maxima: list[Tensor], tensor: Tensor) -> None:
    maxima.append(balanced.maxima(tensor))


@torch.no_grad()
def _fold(site: GateSite, balanced: _Balanced, scale: Tensor) -> None:
    site.up.weight.mul_(scale[:, None])
    if site.up.bias is not None:
        site.up.bias.mul_(scale)
    up, down = site.up.module, site.down.module
    assert isinstance(down, Fp8Linear)
    down.weight.div_(scale)
    for layer in (up, down) if isinstance(up, Fp8Linear) else (down,):
        layer.renew_scale()
    balanced.leave()
    down.rewrite = None
