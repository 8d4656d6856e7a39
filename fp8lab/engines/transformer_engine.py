"""Transformer Engine: every chosen layer a `te.Linear`, the model's forward under `te.autocast`.

TE knows one recipe for a region, and of a layer either all or nothing, so a plan for it is one
recipe and which layers; what else a plan can say is refused by name. Whether this machine can do
the recipe TE is asked itself, before anything is touched.

The region is the model's outermost forward. Inside `fp8lab.autocast` it lasts until that closes, so
that scales move once a step; for that time other layers of TE are in it too, as in `te.autocast`.
Inside somebody's own `te.autocast` of the same recipe none is opened, and inside of another one it
is a region in a region: the converted layers keep their recipe. Rejected: a region in a region in
every case. TE moves the scales of gradients once for each, though it is one step. Nor does one open
where a checkpoint repeats the whole model in the backward, if scales have moved since: that would
cast with others than the forward did, and is an error.

Amaxes are reduced over all processes (TE's default group) if the recipe's `reduce_amax` says so.
TE's own `name` of a layer is its name in the model; TE's debug features know it by that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fp8lab.engines import become, narrow, shown_use, why
from fp8lab.plan import Plan, to_te
from fp8lab.recipe import HighPrecision, MXFP8BlockScaling, Recipe, recipe_in_words
from fp8lab.regions import inside_backward, steps

_WHERE = "convert: backend='te'"
# What both sizes of a layer's weight are to be multiples of.
_SIZES, _MX_SIZES = 16, 32
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Recipe -> the question of TE whether this machine can do it.
_SUPPORT = {
    "Float8BlockScaling": "is_fp8_block_scaling_available",
    "MXFP8BlockScaling": "is_mxfp8_available",
    "NVFP4BlockScaling": "is_nvfp4_available",
}


def convert(model: nn.Module, chosen: Mapping[str, nn.Linear], plan: Plan) -> list[nn.Module]:
    """Turn the `chosen` layers into layers of TE, and put `model` under its autocast; the layers.

    Raises ValueError for what TE cannot do, ImportError without TE, RuntimeError without a GPU that
    can do the recipe: one line each, and nothing is changed.
    """
    if plan.accumulation is not None:
        raise ValueError(f"{_WHERE}: accumulation: {plan.accumulation}, expected None: it is TE's")
    layers, recipe = _one_recipe(chosen, plan)
    te = _imported()
    try:
        theirs = to_te(recipe)
    except ValueError as error:
        raise ValueError(f"{_WHERE}: {error}") from None
    _require_one_region(model, theirs)
    _require_support(te, recipe)
    for name, linear in layers.items():
        _require_sizes(name, linear, recipe)
    made = {name: _made(te, name, linear, theirs) for name, linear in layers.items()}
    for name, linear in layers.items():
        become(linear, made[name])
        if linear.bias is None:
            del linear._parameters["bias"]  # TE's none is an empty tensor
            vars(linear)["bias"] = linear.weight.new_empty(0)
    region = Region(theirs)
    model.register_forward_pre_hook(region.open, prepend=True)
    model.register_forward_hook(region.close, always_call=True)
    return list(layers.values())


def _one_recipe(chosen: Mapping[str, nn.Linear], plan: Plan) -> tuple[dict[str, nn.Linear], Recipe]:
    found: Recipe | None = None
    layers = {}
    for name, (linear, uses) in narrow(chosen, plan, _WHERE).items():
        if found is None:
            found = next(r for r in uses.values() if not isinstance(r, HighPrecision))
        for use, recipe in uses.items():
            if recipe != found:
                got, expected = recipe_in_words(recipe), recipe_in_words(found)
                raise ValueError(
                    f"{_WHERE}: {shown_use(name, use)}: {got}, expected {expected} as everywhere: "
                    f"TE has one recipe for a model, and a layer as a whole in high precision"
                )
        layers[name] = linear
    assert found is not None  # `narrow` leaves at least one layer
    return layers, found


def _imported() -> ModuleType:
    try:
        import transformer_engine.pytorch as te
    except (ImportError, OSError, RuntimeError) as error:
        raise ImportError(
            f"{_WHERE}: Transformer Engine cannot be imported: {why(error)}; "
            f"pip install 'transformer-engine[pytorch]'"
        ) from None
    assert isinstance(te, ModuleType)
    return te


def _require_one_region(model: nn.Module, recipe: Any) -> None:
    for hook in model._forward_pre_hooks.values():
        region = getattr(hook, "__self__", None)
        if isinstance(region, Region) and region.recipe != recipe:
            got, expected = type(recipe).__name__, type(region.recipe).__name__
            fields = " of other fields" if got == expected else ""
            raise ValueError(
                f"{_WHERE}: {got}{fields}, expected the {expected} that the model is converted to "
                f"already: convert its parts one by one"
            )


def _require_support(te: Any, recipe: Recipe) -> None:
    if not torch.cuda.is_available():
        raise RuntimeError(f"{_WHERE}: expected a GPU that computes in FP8, and torch sees none")
    questions = ["is_fp8_available", _SUPPORT.get(type(recipe).__name__, "is_fp8_available")]
    for question in questions:
        can, reason = getattr(te, question)(return_reason=True)
        if not can:
            raise RuntimeError(f"{_WHERE}: {recipe_in_words(recipe)}: {reason}")


def _require_sizes(name: str, linear: nn.Linear, recipe: Recipe) -> None:
    multiple = _MX_SIZES if isinstance(recipe, MXFP8BlockScaling) else _SIZES
    sizes = linear.in_features, linear.out_features
    if any(size % multiple for size in sizes):
        raise ValueError(
            f"{_WHERE}: {name}: {sizes[0]} → {sizes[1]} features, expected multiples of {multiple}:"
            f" exclude it"
        )
    if not linear.weight.is_cuda:
        device = linear.weight.device
        raise ValueError(f"{_WHERE}: {name} is on {device}, expected a GPU: move the model first")
    dtypes = {parameter.dtype for parameter in linear.parameters()}
    if len(dtypes) > 1 or linear.weight.dtype not in _DTYPES:
        got = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(f"{_WHERE}: {name}: {got}, expected one of FP32, BF16 and FP16")


def _made(te: Any, name: str, linear: nn.Linear, recipe: Any) -> nn.Module:
    from fp8lab.engines.te_linear import CheckedLinear

    # On "meta": no memory, and no random number drawn.
    made = CheckedLinear(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        params_dtype=linear.weight.dtype,
        device="meta",
        name=name,
    )
    made.declared = recipe
    layer: nn.Module = made
    return layer


class Region:
    """Hooks of a converted model: its outermost forward is a region of `te.autocast`."""

    def __init__(self, recipe: Any) -> None:
        self._recipe = recipe
        self._ends: list[Callable[[], None]] = []

    @property
    def recipe(self) -> Any:
        """TE's object."""
        return self._recipe

    def open(self, *_: object) -> None:
        """Forward pre-hook. Raises RuntimeError where the backward repeats this forward and its
        scales have moved since."""
        import transformer_engine.pytorch as te
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager as manager

        if manager.is_fp8_enabled() and manager.get_fp8_recipe() == self._recipe:
            self._ends.append(_nothing)
            return
        if inside_backward() and self._recipe.delayed():
            raise RuntimeError(
                f"{_WHERE}: a checkpoint repeats the converted model outside of its region, whose "
                f"{type(self._recipe).__name__} has moved its scales since: use te.checkpoint "
                f"inside of the model"
            )
        region = te.autocast(enabled=True, recipe=self._recipe)
        region.__enter__()
        end = partial(region.__exit__, None, None, None)
        if steps.depth and manager.quantization_state.autocast_depth == 1:
            steps.at_close(end)
            end = partial(_nothing)
        self._ends.append(end)

    def close(self, *_: object) -> None:
        """Forward hook, called even if the forward raised; also where it never began."""
        if self._ends:
            self._ends.pop()()


def _nothing() -> None:
    pass
