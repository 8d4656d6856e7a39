"""The product of a foreign feed-forward made anew from what its gate and up gave.

A mitigation of the function replaces what lies between the projections, which are modules, and is
itself no module: libraries write it into their forward. So hooks behind gate and up (or behind the
one that is both) remember their raw outputs, and a hook before down puts another product in the
place of the model's own, for which no gradient is then computed. Everything else, parameters,
names, state dict and what a monitor sees, stays as it is; `find_gates` finds the new formula, for
the hook says it and the fit proves it.

That it works is proved before it is kept, by probes as `sites` runs them: in training mode the
model's own product must be what its formula says (a dropout in between would be lost), and the new
one what is wanted (an activation that works in place would change what is remembered). Refused are
feed-forwards that compute with their weights themselves, whose product is hidden in a kernel or
weighed by a router, and those whose product is made anew already.

What is remembered goes when down has taken it, and when the forward ends or fails. Under activation
checkpointing the hooks run again and remember again. `torch.compile` traces them without a break;
what was compiled before is compiled anew. Layers that are exchanged later (not turned into others
in place, as `convert` does) leave their hooks behind: then the forward raises.

It costs the model's own activation and product, which are computed and thrown away, beside the new
ones. Rejected: patching `forward`, which has to know the class, and clamps as hooks on gate and up
alone, which know no other activation and show a monitor limits as if they were the data's.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fp8lab import formats
from fp8lab.linear import Fp8Linear
from fp8lab.recipe import OPERANDS, HighPrecision
from fp8lab.sites import Formula, GateSite, Projection, find_gates, gives, output_of


def remake(model: nn.Module, who: str, formula_of: Callable[[GateSite], Formula]) -> nn.Module:
    """Put another formula between gate, up and down of every gated feed-forward of `model`; returns
    the same model.

    Raises ValueError, opening with `who` and changing nothing, where one of them cannot be reached;
    `formula_of` may raise it too.
    """
    sites = find_gates(model)
    wanted = []
    for site in sites:
        _check(who, site)
        wanted.append(formula_of(site))
    for site in sites:
        if not gives(site, site.formula, training=True):
            raise ValueError(
                f"{who}: in training the product of {site.name} is not "
                f"{site.activation}(gate) * up: something random is in between"
            )
    handles: list[Any] = []
    for site, formula in zip(sites, wanted, strict=True):
        handles += Remade(who, site, formula).attach()
        if not all(gives(site, formula, training=training) for training in (False, True)):
            for handle in handles:
                handle.remove()
            raise ValueError(
                f"{who}: {site.name} works in place on what its gate or up gave, "
                f"or does not call down once for each product"
            )
    _forget_what_is_compiled()
    return model


def plain_swiglu(who: str, site: GateSite) -> None:
    """Raises ValueError, opening with `who`, unless the site's product is silu(gate) * up."""
    if (site.activation, site.up_activation) != ("silu", "identity"):
        raise ValueError(f"{who}: {site.name} has {site.activation}, expected silu")
    if site.formula != Formula(activation="silu"):
        raise ValueError(f"{who}: {site.name} has limits or an offset already, expected none")


def _check(who: str, site: GateSite) -> None:
    if site.remade:
        raise ValueError(f"{who}: the product of {site.name} is made anew already")
    if site.seen != "hooks":
        raise ValueError(f"{who}: {site.name} does not call its projections")
    if site.weighted:
        raise ValueError(f"{who}: {site.name} multiplies its product by a factor per token")


class _Remembered(threading.local):
    """What gate and up of the forward that runs have given, in each thread."""

    gate: Tensor | None = None
    up: Tensor | None = None
    was_used = False

    def __reduce__(self) -> tuple[type[_Remembered], tuple[()]]:
        return _Remembered, ()  # a copy of the model has a forward of its own


class Remade:
    """The hooks of one feed-forward. `formula` is what `sites` proves."""

    def __init__(self, who: str, site: GateSite, formula: Formula) -> None:
        self.formula = formula
        self._who, self._name, self._module = who, site.name, site.module
        self._gate, self._up, self._down = site.gate, site.up, site.down
        self._remembered = _Remembered()

    def attach(self) -> list[Any]:
        """Handles; after their `remove` nothing is left."""
        gate, up, down = self._gate.module, self._up.module, self._down.module
        assert gate is not None and up is not None and down is not None
        behind = (
            [gate.register_forward_hook(self._after_both)]
            if gate is up
            else [
                gate.register_forward_hook(self._after_gate),
                up.register_forward_hook(self._after_up),
            ]
        )
        # First of all: who looks at down's input from before sees what down gets.
        before = down.register_forward_pre_hook(self._before_down, with_kwargs=True, prepend=True)
        around = self._module.register_forward_hook(self._after_all, always_call=True)
        return [*behind, before, around]

    def _after_gate(self, module: nn.Module, args: Any, output: Any) -> None:
        self._remembered.gate = _rows(output, self._gate)

    def _after_up(self, module: nn.Module, args: Any, output: Any) -> None:
        self._remembered.up = _rows(output, self._up)

    def _after_both(self, module: nn.Module, args: Any, output: Any) -> None:
        self._after_gate(module, args, output)
        self._after_up(module, args, output)

    def _before_down(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        gate, up = self._remembered.gate, self._remembered.up
        self._forget()
        self._remembered.was_used = True
        name = None if args else next(iter(kwargs))
        given: Tensor = args[0] if name is None else kwargs[name]
        if gate is None or up is None:
            raise RuntimeError(f"{self._who}: {self._name}: down ran without its gate and up")
        if gate.numel() != given.numel():
            raise RuntimeError(
                f"{self._who}: {self._name}: down was given {tuple(given.shape)}, "
                f"gate gave {tuple(gate.shape)}"
            )
        fmt = getattr(self._module, "activation_format", None)
        activated_gate, activated_up = self.formula.factors(gate, up, fmt)
        product = (activated_gate * activated_up).to(given.dtype).reshape(given.shape)
        if name is None:
            return (product, *args[1:]), kwargs
        return args, {**kwargs, name: product}

    def _after_all(self, module: nn.Module, args: Any, output: Any) -> None:
        was_used, self._remembered.was_used = self._remembered.was_used, False
        self._forget()
        if output is not None and not was_used:  # None: the forward raised
            raise RuntimeError(
                f"{self._who}: {self._name} ran without it: a layer was exchanged afterwards, "
                f"apply the mitigation last"
            )

    def _forget(self) -> None:
        self._remembered.gate = self._remembered.up = None


def _rows(result: Any, projection: Projection) -> Tensor | None:
    output = output_of(result)
    if output is None or projection.rows == slice(None):
        return output
    return output[..., projection.rows]


def _forget_what_is_compiled() -> None:
    """Compiled code does not look whether a module's hooks are still the same."""
    compiling = sys.modules.get("torch._dynamo.convert_frame")
    if compiling is not None and compiling.FRAME_COUNTER:
        torch.compiler.reset()


# --- the change of the function -----------------------------------------------------------------


class OfAModel(Protocol):
    """A mitigation whose `apply` takes a model."""

    @property
    def kind(self) -> str: ...

    def apply(self, model: nn.Module) -> nn.Module: ...


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a mitigation does to the function of one model, on given inputs.

    `difference` is the norm of the change of the output, relative to the output's. `clamped` is the
    share of all product elements whose gate or up a limit touches: 0 where there is no limit.
    """

    difference: float
    clamped: float


def change_of_function(model: nn.Module, mitigation: OfAModel, inputs: Any) -> Change:
    """How far the function of `model` is another with `mitigation`, in FP32, in evaluation mode.

    `inputs` are the arguments of the model: a tensor, a tuple of them, or a mapping of keywords;
    what it returns is a tensor, or has one called logits, or begins with one. The model stays as it
    is: this takes two copies of it in float32. What is converted is computed without casts, so
    only the formula counts. Raises ValueError for a mitigation that takes no model, and whatever
    its `apply` raises.
    """
    if mitigation.kind not in ("model", "recipe"):
        raise ValueError(
            f"change_of_function: {type(mitigation).__name__} is of kind {mitigation.kind}, "
            f"expected one that takes a model"
        )
    before, after = copy.deepcopy(model), copy.deepcopy(model)
    mitigation.apply(after)
    counted = [_Touched(site) for site in _sites(after)]
    outputs = []
    for one in (before, after):
        _without_casts(one.float().eval())
        with torch.no_grad():
            outputs.append(_call(one, inputs).double())
    difference = torch.linalg.vector_norm(outputs[1] - outputs[0])
    size = torch.linalg.vector_norm(outputs[0])
    touched, elements = (sum(getattr(c, name) for c in counted) for name in ("touched", "elements"))
    return Change(
        difference=float(difference / size) if difference else 0.0,
        clamped=touched / max(1, elements),
    )


def _sites(model: nn.Module) -> list[GateSite]:
    try:
        return [site for site in find_gates(model) if site.seen == "hooks"]
    except ValueError:  # no gated feed-forward
        return []


def _without_casts(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, Fp8Linear):
            layer.recipes = dict.fromkeys(OPERANDS, HighPrecision(format=formats.FP32))
            layer.gemm_recipes = {}
            layer.accumulation = None


def _call(model: nn.Module, inputs: Any) -> Tensor:
    if isinstance(inputs, Mapping):
        result = model(**_wide(inputs))
    else:
        result = model(*_wide(inputs if isinstance(inputs, tuple) else (inputs,)))
    result = getattr(result, "logits", result)
    output: Tensor = result if isinstance(result, Tensor) else result[0]
    return output


def _wide(inputs: Any) -> Any:
    """Floating tensors in float32, as the copies of the model are."""
    if isinstance(inputs, Mapping):
        return {name: _wide(value) for name, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(_wide(value) for value in inputs)
    is_floating = isinstance(inputs, Tensor) and inputs.is_floating_point()
    return inputs.float() if is_floating else inputs


class _Touched:
    """Counts the product elements whose gate or up is beyond a limit of the site's formula."""

    def __init__(self, site: GateSite) -> None:
        self.touched = self.elements = 0
        self._site = site
        self._raw: dict[str, Tensor] = {}
        for name, projection in (("gate", site.gate), ("up", site.up)):
            assert projection.module is not None
            projection.module.register_forward_hook(self._seen(name, projection))

    def _seen(self, name: str, projection: Projection) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            rows = _rows(output, projection)
            if rows is not None:
                self._raw[name] = rows
            if len(self._raw) == 2:
                self._count(self._raw.pop("gate"), self._raw.pop("up"))

        return hook

    def _count(self, gate: Tensor, up: Tensor) -> None:
        formula = self._site.formula
        touched = torch.zeros_like(gate, dtype=torch.bool)
        if formula.gate_limit is not None:
            touched |= gate > formula.gate_limit
        if formula.activated_limit is not None:
            touched |= formula.activated(gate) >= formula.activated_limit
        if formula.up_limit is not None:
            touched |= up.abs() > formula.up_limit
        self.touched += int(touched.sum())
        self.elements += touched.numel()
