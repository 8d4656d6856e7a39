"""`convert`: a model's `nn.Linear`s become FP8 layers, in place.

Three engines: `Fp8Linear`, which emulates on any device, and Transformer Engine's and torchao's own
layers (`engines`), which need a machine that can. The plan is the same; what an engine cannot do of
it is refused by name.

Loud or nothing. A pattern that names no layer is an error, as is a model in which nothing matched,
and a layer that would carry the label FP8 without ever running in FP8: a feed-forward that computes
with its children's weights instead of calling them is refused by name, and the first forward looks
whether what was converted is still there.

Rejected: returning a converted copy. The optimizer, the hooks and the user's own references point
at the layers that exist; they must be the layers that train.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Literal, get_args

from torch import nn
from torch.nn.parameter import is_lazy

from fp8lab.agreement import unlike, world_size
from fp8lab.casting import FusedProduct
from fp8lab.engines import torchao, transformer_engine
from fp8lab.linear import Fp8Linear
from fp8lab.plan import Plan, as_recipe, in_words, nearest_layers
from fp8lab.recipe import GEMMS, Accumulation, Recipe, shown
from fp8lab.regions import close_region, open_region, register
from fp8lab.sites import GateSite, find_gates, modules_of
from fp8lab.sites.probing import is_probing

Backend = Literal["emulated", "te", "torchao"]


def convert(
    model: nn.Module,
    recipe: Recipe | Plan,
    *,
    include: Iterable[str] = ("*",),
    exclude: Iterable[str] = (),
    overrides: Mapping[str, Recipe] | None = None,
    accumulation: Accumulation | None = None,
    backend: Backend = "emulated",
) -> nn.Module:
    """Run the linear layers of `model` in FP8; returns the same model.

    `include`, `exclude`, `overrides` and `accumulation` are those of `Plan` (`"*.down:input"` is an
    operand of a layer, `"*.down:input@output"` that of one GEMM); they are not given when `recipe`
    is a plan already. `recipe` may be one of Transformer Engine's own objects.

    `backend` is who computes. "emulated": `Fp8Linear`, on any device. Where gate, up and down of a
    gated feed-forward are all converted, their product is computed and rounded as Transformer
    Engine's fused kernel does it (`casting.FusedProduct`), which makes a difference in BF16 and
    FP16 models. "te": `te.Linear`, the model's outermost forward under `te.autocast`; one recipe of
    TE's and which layers; a forward of a layer without FP8 is an error. "torchao": `Float8Linear`,
    `Float8CurrentScaling` or `RowwiseScaling`; both operands of a GEMM may be in high precision.

    The model's outermost forward is the region after which delayed scales move, unless
    `fp8lab.autocast` is used. A checkpoint from before the conversion loads into the converted
    model, whose scales then start afresh.

    Of several processes one that converts a layer otherwise than another has warns of it: what
    wraps the model next may end the training without a word on the cause.

    Raises ValueError if no layer matched, a pattern matched none, a layer is converted already, a
    matching layer cannot be converted, or the backend cannot do what the plan says; TypeError for
    what is no model; ImportError without the backend's library, RuntimeError without the device
    that it needs. Then nothing is converted.
    """
    if backend not in get_args(Backend):
        choice = ", ".join(map(repr, get_args(Backend)))
        raise ValueError(f"convert: backend={shown(backend)}, expected one of {choice}")
    plan = _plan(recipe, _patterns(include), _patterns(exclude), overrides or {}, accumulation)
    chosen = _chosen(model, plan)
    _refuse_layers_of_other_kinds(chosen)
    gates = _gates(model)
    _refuse_layers_that_never_run(gates, chosen)
    if backend == "te":
        converted = transformer_engine.convert(model, chosen, plan)
    elif backend == "torchao":
        converted = torchao.convert(chosen, plan)
    else:
        converted = _emulate(chosen, plan)
        _fuse_products(gates)
        model.register_forward_pre_hook(open_region, prepend=True)
        model.register_forward_hook(close_region, always_call=True)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.register_forward_hook(_nothing)  # keeps it off the path around its layers
    _warn_if_unlike(model, plan, set(chosen))
    names = {id(layer): name for name, layer in chosen.items()}
    label = Label({names[id(layer)]: layer for layer in converted}, backend)
    model.register_forward_pre_hook(label)
    return model


def _chosen(model: nn.Module, plan: Plan) -> dict[str, nn.Linear]:
    linears = {n: m for n, m in modules_of(model).items() if isinstance(m, nn.Linear)}
    unmatched = plan.patterns_without_match(linears)
    if unmatched and linears:
        told = f"convert: pattern {shown(unmatched[0])} matches no linear layer"
        raise ValueError(f"{told}, expected one of {nearest_layers(unmatched[0], linears)}")
    chosen = {name: linear for name, linear in linears.items() if plan.covers(name)}
    if not chosen:
        raise ValueError(
            f"convert: nothing to convert in {type(model).__name__}: "
            f"{len(linears)} linear layers, none included"
        )
    return chosen


def _emulate(chosen: dict[str, nn.Linear], plan: Plan) -> list[nn.Module]:
    told = {name: plan.recipes_of(name, "convert") for name in chosen}
    for name, linear in chosen.items():
        layer = Fp8Linear.adopt(linear, *told[name], plan.accumulation)
        if layer.has_delayed_scales:
            register(layer, name)
    return [*chosen.values()]


def _warn_if_unlike(model: nn.Module, plan: Plan, chosen: set[str]) -> None:
    """No error: nobody can know here whether another process means the same model."""
    if world_size() == 1:
        return
    told: dict[str, dict[str, str]] = {}
    for name, layer in model.named_modules():
        weight = layer._parameters.get("weight")
        if weight is None or is_lazy(weight) or weight.dim() != 2:
            continue
        uses = [(o, gemm) for gemm, operands in GEMMS.items() for o in operands]
        told[f"{name} {weight.shape[1]}x{weight.shape[0]}"] = {  # as watch names it: in x out
            f"{o}@{gemm}": in_words(plan.recipe_for(name, o, gemm))
            for o, gemm in uses
            if name in chosen
        }
    line = None
    with suppress(RuntimeError):  # a store that compares nothing, as that of torch's fake processes
        line = unlike("convert", told)
    if line is not None:
        warnings.warn(f"convert: {line}", stacklevel=3)


class Label:
    """Forward pre-hook of a converted model: in its first forward, probes of ours not counted, the
    layers that were converted must be there, and be what they became.

    Raises RuntimeError, naming the first one that is not.
    """

    def __init__(self, layers: dict[str, nn.Module], backend: str) -> None:
        self._unseen = {name: (layer, type(layer)) for name, layer in layers.items()}
        self._backend = backend

    def __call__(self, model: nn.Module, *_: object) -> None:
        if not self._unseen or is_probing():
            return
        there = {id(module) for module in model.modules()}
        for name, (layer, kind) in self._unseen.items():
            if id(layer) not in there or not isinstance(layer, kind):
                names = {known for known, _ in model.named_modules()}
                what = "has been replaced since" if name in names else "is no longer in the model"
                raise RuntimeError(
                    f"convert: {name or 'the model'} was converted to FP8 "
                    f"(backend={self._backend!r}) and {what}: convert last, or exclude it"
                )
        self._unseen = {}


def _nothing(*_: object) -> None:
    pass


def _patterns(given: str | Iterable[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _plan(
    recipe: Recipe | Plan,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    overrides: Mapping[str, Recipe],
    accumulation: Accumulation | None,
) -> Plan:
    if not isinstance(recipe, Plan):
        return Plan(
            recipe=as_recipe(recipe, "convert"),
            include=include,
            exclude=exclude,
            overrides=overrides,
            accumulation=accumulation,
        )
    patterns = {"include": include if include != ("*",) else (), "exclude": exclude}
    for name, given in {**patterns, "overrides": overrides, "accumulation": accumulation}.items():
        if given:
            written = f"{name}: {list(patterns[name])}" if name in patterns else f"{name}: …"
            raise ValueError(
                f"convert: {name}= beside a plan, expected in the plan: `{written:.200}` in its "
                f"file, or dataclasses.replace(plan, {name}=…)"
            )
    return recipe


def _gates(model: nn.Module) -> list[GateSite]:
    try:
        return find_gates(model)
    except ValueError:  # no gated feed-forward
        return []


def _refuse_layers_of_other_kinds(chosen: dict[str, nn.Linear]) -> None:
    for name, linear in chosen.items():
        if type(linear) is not nn.Linear:
            kind = type(linear).__name__
            already = " (converted already)" if isinstance(linear, Fp8Linear) else ""
            raise ValueError(
                f"convert: {name} is a {kind}{already}, expected nn.Linear: exclude it"
            )
        if "forward" in vars(linear):  # as some libraries' hooks set it; it would stay in force
            raise ValueError(f"convert: {name} has a forward of its own: exclude it or remove that")


def _refuse_layers_that_never_run(gates: list[GateSite], chosen: dict[str, nn.Linear]) -> None:
    by_weight = {id(linear.weight): name for name, linear in chosen.items()}
    for gate in gates:
        for projection in (gate.gate, gate.up, gate.down):
            name = by_weight.get(id(projection.parameter))
            if name is not None and projection.module is None:
                raise ValueError(
                    f"convert: {name} is never called: {gate.name} computes with its weight "
                    f"itself, so it would stay in high precision; exclude it or call it"
                )


def _fuse_products(gates: list[GateSite]) -> None:
    for site in gates:
        gate, up, down = site.gate.module, site.up.module, site.down.module
        if (
            isinstance(gate, Fp8Linear)
            and isinstance(up, Fp8Linear)
            and isinstance(down, Fp8Linear)
        ):
            gate.product_out = up.product_out = down.product_in = FusedProduct()


def converted_downs(model: nn.Module, who: str) -> list[tuple[str, Fp8Linear]]:
    """The down projections of all gated feed-forwards, with the feed-forwards' names.

    Raises ValueError, opening with `who`, if one of them is not converted.
    """
    downs = []
    for gate in find_gates(model):
        if gate.down.module is None:
            raise ValueError(
                f"{who}: {gate.name} computes with down's weight itself, no layer does"
            )
        if not isinstance(gate.down.module, Fp8Linear):
            kind, expected = type(gate.down.module), "not converted, expected convert() first"
            if kind is not nn.Linear:
                expected = f"a {kind.__name__}, expected convert() with backend='emulated'"
            raise ValueError(f"{who}: {gate.name}: down is {expected}")
        downs.append((gate.name, gate.down.module))
    return downs
