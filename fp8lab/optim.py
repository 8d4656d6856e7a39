"""AdamW whose states are stored in FP8: torch's arithmetic, other storage.

Between steps the first moment lies in E4M3 and the second in E5M2 (Fishman et al. 2409.12517), as
codes of one byte and a float32 scale made just in time, max(format) / amax of the tensor. A step
dequantises one parameter's moments to float32, calls torch's own `adamw` on them, and quantises
what it leaves behind; so the update itself uses unrounded moments of this step, and the temporary
float32 copies are those of a single parameter. With nothing reduced it is torch.optim.AdamW to the
bit.

What rounding does to the two averages is worth knowing. A value below half the smallest subnormal
of its scale is stored as zero, and a second moment of zero leaves only this step's own gradient
under the root: where that happens to be small, eps is what divides. With v in E4M3 per tensor a
small language model diverges by this within 80 steps, but neither with E5M2, nor in groups of 128,
nor with an eps of 1e-6 (`experiments/fp8_adam.py`). And an average that moves by less than half
the distance of two codes (beta2=0.999 moves v by a thousandth, E5M2 has steps of a quarter) does
not move, except with the scale; in 400 steps that did no harm.

Kept per parameter, in bytes: the parameter itself (2 or 4), 1 + 1 for the moments with 8 for the
two scales of a tensor (or of each group), and with FP16 master weights 2 more; see
`bytes_per_parameter`, which measures.

Differences to torchao.optim.AdamWFp8: there the second moment is E4M3 too, scales are those of
blocks of 256 (here `group_size=256`), tensors below 4096 elements are not quantised, codes are
x / (amax / 448) and not x · (448 / amax), which differ in the last bit of a float32, and the
learning rate must be a tensor. It computes v by lerp, torch by mul and addcmul.

Rejected: a tensor subclass for the states, as torchao has. It answers every `state["exp_avg"]`,
but a checkpoint then holds a class, and an operation it does not know fails far from here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.optim.adamw import adamw

from fp8lab import formats
from fp8lab.formats import FORMATS, FloatFormat
from fp8lab.scaling import scale_for

_ONE_BYTE = {
    formats.E4M3: torch.float8_e4m3fn,
    formats.E4M3FNUZ: torch.float8_e4m3fnuz,
    formats.E5M2: torch.float8_e5m2,
    formats.E5M2FNUZ: torch.float8_e5m2fnuz,
}
_DTYPES = _ONE_BYTE | {formats.FP16: torch.float16}
_MASTERS = (formats.FP16, formats.FP32)
_REFUSED = ("amsgrad", "capturable", "differentiable")
_FORMATS = ("first_moment", "second_moment", "master_weights")
_OPTIONS = (*_FORMATS, "group_size", "expansion")


class Fp8AdamW(torch.optim.AdamW):
    """torch.optim.AdamW with moments, and if wanted master weights, in fewer bits.

    `first_moment`, `second_moment`: a format of one byte that torch has a dtype for, or None, not
    quantised. `group_size`: so many consecutive elements (of the flattened tensor; the last group
    may be shorter) share a scale; None: the whole tensor. `expansion`: a group is stored as
    sign(x) |x / amax|^k, with k such that its smallest magnitude but zero becomes the format's
    smallest subnormal: its dynamic range becomes the format's. COAT (2410.19313) is E4M3 for both
    moments, group_size=128, expansion=True; its kernel rounds k to eighths.
    `master_weights`: formats.FP16, stored with one scale per tensor (Fishman et al.), FP32, or
    None. Each of these may also be set in a parameter group. The rest is torch's.

    The arithmetic is float32 in a parameter group that has anything reduced, and a moment that is
    not quantised is float32 there; otherwise both are the parameter's dtype, as torch's are. With
    master weights the parameter is after each step exactly what its master says, in its own dtype;
    elements that something else has changed since are taken from the parameter. Without them the
    parameter is its own master, rounded once a step to its dtype. A float32 parameter keeps no
    FP32 master.

    State of a parameter: `step`; per moment `exp_avg` or, quantised, `exp_avg_codes` (shape of the
    parameter) with `exp_avg_scale_inv` (float32 [groups]) or, expanded, `exp_avg_amax` and
    `exp_avg_exponent` (the same); `master_codes` and `master_scale_inv`, or `master`. Only tensors,
    and only names in the parameter groups, so a checkpoint loads with weights_only=True. As in
    torch, the options of a loaded state replace those given here.

    Non-finite gradients do what they do in torch: the element's parameter becomes NaN, its moments
    stay non-finite (infinity is stored as NaN where the format has none), and no other element is
    touched, since scales come from the finite ones. A finite gradient that dwarfs all others does
    cost these their moments: that is what one scale for a tensor means.

    Raises ValueError for amsgrad, capturable or differentiable in a parameter group, for options
    that do not fit, and, where anything is reduced, for parameters that are not float32, bfloat16
    or float16. `step` raises RuntimeError for sparse gradients.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        first_moment: FloatFormat | None = formats.E4M3,
        second_moment: FloatFormat | None = formats.E5M2,
        group_size: int | None = None,
        expansion: bool = False,
        master_weights: FloatFormat | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        values = (first_moment, second_moment, master_weights, group_size, expansion)
        options = dict(zip(_OPTIONS, values, strict=True))
        if not isinstance(params, Tensor):  # torch's constructor says what is wrong with one
            params = list(params)
            if params and not isinstance(params[0], dict):
                params = [{"params": params}]
            params = [options | group for group in params]
        super().__init__(
            params, lr, betas, eps, weight_decay, maximize=maximize, foreach=foreach, fused=fused
        )
        self.defaults.update(options)
        # A GradScaler then unscales and skips by itself: a step that torch's fused kernel skips
        # would still be quantised again here.
        self._step_supports_amp_scaling = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; raises ValueError, and adds nothing, if the group's options do not fit."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for name in _FORMATS:
                if group[name] in FORMATS.values():
                    group[name] = group[name].name  # a checkpoint holds plain values
            _check(group)
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of AdamW; returns the closure's value."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            storages = _storages(group)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group, storages)
        return loss

    def _update(
        self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], storages: _Storages
    ) -> None:
        if gradient.is_sparse:
            raise RuntimeError("Fp8AdamW: sparse gradient, expected a dense one")
        state = self.state[parameter]
        dtype = torch.float32 if storages.reduce else parameter.dtype
        fresh = not state
        if not fresh:
            exp_avg = storages.first.read(state, "exp_avg")
            exp_avg_sq = storages.second.read(state, "exp_avg_sq")
        else:
            device = parameter.device if group["fused"] else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            exp_avg = torch.zeros_like(parameter, dtype=dtype)
            exp_avg_sq = torch.zeros_like(parameter, dtype=dtype)
        master = storages.master_of(parameter)
        weights = parameter if parameter.dtype == dtype else parameter.to(dtype)
        if master is not None and not fresh:
            kept = master.read(state, "master")
            weights = torch.where(parameter == kept.to(parameter.dtype), kept, weights)
        adamw(
            [weights],
            [gradient.to(dtype)],
            [exp_avg],
            [exp_avg_sq],
            [],
            [state["step"]],
            foreach=group["foreach"],
            fused=group["fused"],
            has_complex=parameter.is_complex(),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )
        storages.first.write(state, "exp_avg", exp_avg)
        storages.second.write(state, "exp_avg_sq", exp_avg_sq)
        if master is not None:
            master.write(state, "master", weights)
            weights = master.read(state, "master")
        if weights is not parameter:
            parameter.copy_(weights)

    def moments(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        """The first and second moment as the next step will read them, shape of the parameter.

        Raises KeyError for a parameter that has had no step.
        """
        state = self.state.get(parameter)
        if not state:
            raise KeyError("Fp8AdamW: this parameter has no moments yet")
        group = next(g for g in self.param_groups if any(p is parameter for p in g["params"]))
        storages = _storages(group)
        return storages.first.read(state, "exp_avg"), storages.second.read(state, "exp_avg_sq")

    def bytes_per_parameter(self) -> dict[str, float]:
        """Measured: what is kept between steps, in bytes per element of the parameters that have
        had a step; `parameter`, `exp_avg`, `exp_avg_sq`, `master`, `step`, and their `total`.
        Scales count to what they scale. Gradients are not counted.

        Raises ValueError before the first step.
        """
        parameters = [p for g in self.param_groups for p in g["params"] if self.state.get(p)]
        if not parameters:
            raise ValueError("bytes_per_parameter: no state yet, expected at least one step")
        sizes = {"parameter": sum(p.nbytes for p in parameters)}
        sizes |= dict.fromkeys(("exp_avg", "exp_avg_sq", "master", "step"), 0)
        for parameter in parameters:
            for name, value in self.state[parameter].items():
                sizes[_PART_OF[name]] += value.nbytes
        sizes["total"] = sum(sizes.values())
        elements = sum(p.numel() for p in parameters)
        return {name: size / elements for name, size in sizes.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but no state changes its dtype: torch casts all to the parameter's.

        Raises ValueError in one line, with nothing changed, if the state is not one of Fp8AdamW or
        not stored as its parameter groups say.
        """
        loaded: dict[str, Any] = {}

        def remember(_: Any, after_all_hooks: dict[str, Any]) -> None:
            loaded.update(after_all_hooks)
            self._check_loaded(after_all_hooks)

        handle = self.register_load_state_dict_pre_hook(remember)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        for index, parameter in _numbered(loaded["param_groups"], self.param_groups):
            for name, value in loaded["state"].get(index, {}).items():
                device = self.state[parameter][name].device
                # A copy, as torch's is where it casts: two optimizers may load one dictionary.
                self.state[parameter][name] = value.detach().to(device, copy=True)

    def _check_loaded(self, state_dict: dict[str, Any]) -> None:
        groups = state_dict["param_groups"]
        for number, group in enumerate(groups):
            if not all(name in group for name in _OPTIONS):
                expected = "expected a state of Fp8AdamW"
                raise ValueError(f"Fp8AdamW: parameter group {number}: {expected}")
        by_index = {index: group for group in groups for index in group["params"]}
        for index, parameter in _numbered(groups, self.param_groups):
            state = state_dict["state"].get(index)
            if state:
                _check_state(f"parameter {index}", state, parameter, _storages(by_index[index]))


class _Storage(NamedTuple):
    """How one moment, or the master weights, lies in a parameter's state."""

    format: FloatFormat | None
    group_size: int | None = None
    expansion: bool = False

    def names(self, name: str) -> list[str]:
        if self.format is None:
            return [name]
        how = ["amax", "exponent"] if self.expansion else ["scale_inv"]
        return [f"{name}_{part}" for part in ("codes", *how)]

    def read(self, state: dict[str, Any], name: str) -> Tensor:
        """float32; the stored tensor itself where it is not quantised."""
        if self.format is None:
            plain: Tensor = state[name]
            return plain
        codes, *how = (state[part] for part in self.names(name))
        values = self._grouped(codes.float())
        if self.expansion:
            amax, exponent = (part[:, None] for part in how)
            magnitude = values.abs().div_(self.format.max).pow_(exponent.reciprocal()).mul_(amax)
            values = magnitude.copysign_(values)
        else:
            values.mul_(how[0][:, None])
        return _ungrouped(values, codes)

    def write(self, state: dict[str, Any], name: str, values: Tensor) -> None:
        if self.format is None:
            state[name] = values
            return
        groups = self._grouped(values)
        low, high = groups.aminmax(dim=1)
        amax = torch.maximum(-low, high)
        finite = groups.device.type == "cpu" and bool(amax.isfinite().all())
        if not finite:
            # Neither a NaN nor an infinity decides the scale of its neighbours.
            amax = groups.abs().nan_to_num_(nan=0.0, posinf=0.0).amax(1)
        if self.expansion:
            exponent = _expansion_exponent(amax, groups, self.format)
            amax = torch.where(amax > 0, amax, 1.0)
            ratios = (groups.abs() / amax[:, None]).pow_(exponent[:, None])
            scaled, how = ratios.mul_(self.format.max).copysign_(groups), [amax, exponent]
        else:
            scale = scale_for(amax, self.format)
            scaled, how = groups * scale[:, None], [scale.reciprocal()]
        scaled.clamp_(-self.format.max, self.format.max)
        if not finite:
            infinity = torch.inf if self.format.has_infinity else torch.nan
            scaled = torch.where(groups.isinf(), groups * infinity, scaled)
        codes = _ungrouped(scaled.to(_DTYPES[self.format]), values)
        state.update(zip(self.names(name), (codes, *how), strict=True))

    def _grouped(self, values: Tensor) -> Tensor:
        """[groups, group_size], zeros behind the end."""
        flat = values.flatten()
        size = self.group_size or max(len(flat), 1)
        missing = -len(flat) % size
        return (pad(flat, (0, missing)) if missing else flat).view(-1, size)


def _ungrouped(groups: Tensor, like: Tensor) -> Tensor:
    """In the shape and strides of `like`: torch's fused step wants those of the parameter."""
    values = groups.flatten()[: like.numel()].view(like.shape)
    if values.stride() == like.stride():
        return values
    return torch.empty_like(like, dtype=values.dtype).copy_(values)


def _expansion_exponent(amax: Tensor, groups: Tensor, fmt: FloatFormat) -> Tensor:
    """k such that amax^k / amin^k, amin the smallest magnitude but zero, is the format's own range
    max / smallest subnormal: float32 [groups] of groups [groups, group_size]. 1 for a group whose
    magnitudes are all the same. Source: COAT (2410.19313), section 4, which rounds k to
    eighths in its kernel and takes zeros for 1e-20."""
    magnitudes = groups.abs()
    amin = magnitudes.where(magnitudes > 0, torch.inf).amin(1)  # NaN is not above zero
    # In float64, for the ratio may overflow. What lies 2^126 below amax underflows x / amax.
    spread = (amax.double().log2() - amin.double().log2()).clamp(max=126.0)
    wanted = math.log2(fmt.max / fmt.smallest_subnormal)
    return torch.where(spread > 0, wanted / spread, 1.0).float()


class _Storages(NamedTuple):
    first: _Storage
    second: _Storage
    master: _Storage | None

    @property
    def reduce(self) -> bool:
        """Whether anything differs from what torch keeps."""
        return self.master is not None or bool(self.first.format or self.second.format)

    def master_of(self, parameter: Tensor) -> _Storage | None:
        """How its master is stored; None if it is its own."""
        if self.master is None or self.master.format is not None:
            return self.master
        return None if parameter.dtype == torch.float32 else self.master


def _storages(group: dict[str, Any]) -> _Storages:
    names = (group[name] for name in _FORMATS)
    first, second, master = (None if name is None else FORMATS[name] for name in names)
    about = group["group_size"], group["expansion"]
    kept = None if master is None else _Storage(None if master == formats.FP32 else master)
    return _Storages(_Storage(first, *about), _Storage(second, *about), kept)


_PART_OF = {"step": "step"} | {
    stored: name
    for name in ("exp_avg", "exp_avg_sq", "master")
    for storage in (_Storage(None), _Storage(formats.E4M3), _Storage(formats.E4M3, None, True))
    for stored in storage.names(name)
}


def _check(group: dict[str, Any]) -> None:
    """Raises ValueError in one line for the options of a parameter group that do not fit."""
    one_byte, masters = ([fmt.name for fmt in allowed] for allowed in (_ONE_BYTE, _MASTERS))
    size = group["group_size"]
    checks = [(name, not group[name], "False: not supported") for name in _REFUSED]
    for name, names in zip(_FORMATS, (one_byte, one_byte, masters), strict=True):
        right = group[name] is None or group[name] in names
        checks.append((name, right, f"None or one of {', '.join(names)}"))
    right = size is None or (type(size) is int and size >= 1)
    checks.append(("group_size", right, "None or at least 1"))
    checks.append(("expansion", type(group["expansion"]) is bool, "True or False"))
    if group["first_moment"] is None and group["second_moment"] is None:
        for name in ("group_size", "expansion"):
            checks.append((name, not group[name], "a moment that is quantised with it"))
    for name, right, expected in checks:
        if not right:
            raise ValueError(f"Fp8AdamW: {name}={group[name]!r}, expected {expected}")
    if _storages(group).reduce:
        for parameter in group["params"]:
            if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                expected = "expected float32, bfloat16 or float16"
                raise ValueError(f"Fp8AdamW: parameter of {parameter.dtype}, {expected}")


def _check_state(where: str, state: dict[str, Any], parameter: Tensor, storages: _Storages) -> None:
    """Raises ValueError in one line for a loaded state that is not stored as its group says."""
    like, plain = tuple(parameter.shape), torch.float32 if storages.reduce else parameter.dtype
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"step": (torch.float32, ())}
    kinds: list[tuple[str, _Storage | None]] = [
        ("exp_avg", storages.first),
        ("exp_avg_sq", storages.second),
        ("master", storages.master_of(parameter)),
    ]
    for name, storage in kinds:
        if storage is not None:
            size = storage.group_size or max(parameter.numel(), 1)
            groups = (-(-parameter.numel() // size),)
            codes, *how = storage.names(name)
            dtype = plain if storage.format is None else _DTYPES[storage.format]
            expected |= {codes: (dtype, like)} | dict.fromkeys(how, (torch.float32, groups))
    for name in sorted(expected.keys() | state.keys()):
        value = state.get(name)
        found = (value.dtype, tuple(value.shape)) if isinstance(value, Tensor) else None
        if found != expected.get(name):
            raise ValueError(
                f"Fp8AdamW: {where}: {name} is {found or 'missing'}, "
                f"expected {expected.get(name, 'nothing')}"
            )


def _numbered(
    saved: Iterable[dict[str, Any]], own: Iterable[dict[str, Any]]
) -> Iterator[tuple[int, Tensor]]:
    """A saved state's index of each parameter; torch says if their numbers differ."""
    for saved_group, group in zip(saved, own, strict=False):
        yield from zip(saved_group["params"], group["params"], strict=False)
