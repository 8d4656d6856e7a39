"""The feed-forwards of Transformer Engine: which of its modules is one, and what may be done to it.

TE says by names what its fused modules compute, so these are believed, and proved at their first
product (`te_inside`): `te.LayerNormMLP` with or without a gate, and a `te.ops.Sequential` in which
a gated activation stands between two linear maps. Gate and up are halves of one weight, gate first.
TE's kernels compute the activation in FP32, whatever the dtype of the model.

A gate that the user wrote between linear layers of TE is found like every other, by running it
(`sites`): for the time of that probe TE's linear layers compute in plain torch (`plain_linears`),
as their FP8 needs a GPU and their dtype is not that of the probe.

TE is recognised by the names of its classes and never imported before the model has done so. Not
seen: grouped MLPs, and gates of te.ops that lie interleaved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp8lab.sites import FeedForwardSite, GateSite, Projection
from fp8lab.sites.observe import Receiver
from fp8lab.sites.te_casts import te_name
from fp8lab.sites.te_inside import InsideLayerNormMLP, Removal, inside_operations

# TE's name (of te.ops: the class in lower case) -> activation and beta, as sites have them.
_GATED: dict[str, tuple[str, float]] = {
    "glu": ("sigmoid", 1.0),
    "geglu": ("gelu_tanh", 1.0),
    "qgeglu": ("swish", 1.702),
    "reglu": ("relu", 1.0),
    "sreglu": ("relu_squared", 1.0),
    "swiglu": ("silu", 1.0),
    "clamped_swiglu": ("swish", 1.702),
    "clampedswiglu": ("swish", 1.702),
}
_PLAIN: dict[str, tuple[str, float]] = {
    "gelu": ("gelu_tanh", 1.0),
    "qgelu": ("swish", 1.702),
    "relu": ("relu", 1.0),
    "srelu": ("relu_squared", 1.0),
    "silu": ("silu", 1.0),
}
# Its clamp as TE has it where nothing else is said: limit, alpha, glu_linear_offset.
_CLAMPED = {"limit": 7.0, "alpha": 1.702, "glu_linear_offset": 1.0}
# What may stand between a te.ops activation and the linear map that takes its product.
_PASSED_THROUGH = ("Identity", "MakeExtraOutput")


@dataclass(frozen=True, eq=False)
class FusedGate(GateSite):
    """One of TE's own gates: the kernel computes in FP32, whatever the dtype of the model."""

    def activated(self, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """As `GateSite.activated`, but in float32; an up without a clamp as it is."""
        # Contiguous: on a CPU torch's functions are an ulp off their own vectorised form else.
        up = up if self.up_limit is None else up.float()
        return super().activated(gate.float().contiguous(), up)


@dataclass(frozen=True, eq=False)
class FusedFeedForward(FeedForwardSite):
    """The same without a gate."""

    def activated(self, up: Tensor) -> Tensor:
        """As `FeedForwardSite.activated`, but in float32."""
        return super().activated(up.float())


def identify(name: str, module: Any) -> GateSite | FeedForwardSite | str | None:
    """The feed-forward that a LayerNormMLP, or the gated one that a te.ops.Sequential of TE is; why
    it is none, or None where it does not look like one.

    `site.down.module` is what casts the product (see `cast_in_force`).
    """
    kind = te_name(module)
    if kind == "LayerNormMLP":
        return _of_layernorm_mlp(name, module)
    if kind != "Sequential":
        return None
    found = list(_gates_of(module))
    if not found:
        return None
    if len(found) > 1:
        return f"{len(found)} gates in one te.ops.Sequential, expected one in each"
    ((before, activation, after),) = found
    half = before[0].weight.shape[0] // 2
    given = {name: vars(activation)[name] for name in _CLAMPED if name in vars(activation)}
    return _site(
        (name, module),
        _op_projection(module, before, slice(0, half)),
        _op_projection(module, before, slice(half, 2 * half)),
        _op_projection(module, after, slice(None)),
        (type(activation).__name__.lower(), given),
    )


def _of_layernorm_mlp(name: str, module: Any) -> GateSite | FeedForwardSite | str:
    bias = ("fc1_bias", "fc2_bias") if module.use_bias else (None, None)
    down = Projection("fc2_weight", module, "fc2_weight", bias[1], module=module)
    if module.activation in _PLAIN:
        activation, beta = _PLAIN[module.activation]
        up = Projection("fc1_weight", module, "fc1_weight", bias[0])
        return FusedFeedForward(
            *(name, module, up, down, activation),
            seen="recomputed",
            engine="transformer_engine",
            beta=beta,
        )
    if module.activation not in _GATED:
        return f"its activation is {module.activation}, expected one of {', '.join(_GATED)}"
    half = module.fc1_weight.shape[0] // 2
    return _site(
        (name, module),
        Projection("fc1_weight", module, "fc1_weight", bias[0], rows=slice(0, half)),
        Projection("fc1_weight", module, "fc1_weight", bias[0], rows=slice(half, 2 * half)),
        down,
        (str(module.activation), dict(module.activation_params or {})),
    )


def _site(
    where: tuple[str, nn.Module],
    gate: Projection,
    up: Projection,
    down: Projection,
    formula: tuple[str, dict[str, float]],
) -> GateSite:
    activation, beta = _GATED[formula[0]]
    clamp: dict[str, Any] = {"beta": beta}
    if formula[0].startswith("clamped"):
        values = _CLAMPED | formula[1]
        limit = float(values["limit"])
        clamp = {"beta": float(values["alpha"]), "gate_limit": limit, "up_limit": limit}
        clamp["up_offset"] = float(values["glu_linear_offset"])
    return FusedGate(
        *where, gate, up, down, activation, "identity", "recomputed", "transformer_engine", **clamp
    )


_Linear = tuple[Any, nn.Module | None]  # a BasicLinear of te.ops, and the Bias behind it


def _gates_of(sequential: Any) -> Iterator[tuple[_Linear, Any, _Linear]]:
    """(gate and up, activation, down) of a te.ops.Sequential."""
    ops: list[Any] = []
    for child in sequential.children():
        basic = getattr(child, "basic_ops", None)
        ops.extend([child] if basic is None else basic)
    for position, op in enumerate(ops):
        if (
            not te_name(op)
            or type(op).__name__.lower() not in _GATED
            or getattr(op, "glu_interleave_size", None) is not None
        ):
            continue
        before = ops[max(position - 2, 0) : position]
        if before and type(before[-1]).__name__ == "Bias":
            linear, bias = before[0], before[-1]
        else:
            linear, bias = (before or [op])[-1], None
        after = [o for o in ops[position + 1 :] if type(o).__name__ not in _PASSED_THROUGH]
        if after and type(linear).__name__ == type(after[0]).__name__ == "BasicLinear":
            behind = after[1] if len(after) > 1 else None
            behind = behind if type(behind).__name__ == "Bias" else None
            yield (linear, bias), op, (after[0], behind)


def _op_projection(sequential: nn.Module, linear: _Linear, rows: slice) -> Projection:
    op, bias = linear
    names = {id(parameter): name for name, parameter in sequential.named_parameters()}
    return Projection(
        names[id(op.weight)],
        op,
        "weight",
        None if bias is None else "bias",
        module=op if rows == slice(None) else None,
        rows=rows,
        bias_owner=bias,
    )


def attach(site: GateSite | FeedForwardSite, receiver: Receiver) -> list[Removal]:
    """Show `receiver` gate, up, product and output of `site` until the handles are removed.

    The product is float32 where TE casts the FP32 product, see `te_casts.cast_in_force`. Where it
    cannot be seen, one warning says so.
    """
    module = site.module
    if te_name(module) == "LayerNormMLP":
        return [InsideLayerNormMLP(site, receiver).attach()]
    ((_, activation, (down, bias)),) = _gates_of(module)
    last = [child for child in module.modules() if te_name(child)][-1]
    return [inside_operations(site, receiver, activation, ends_in_down=last in (down, bias))]


@contextmanager
def plain_linears(module: nn.Module) -> Iterator[None]:
    """For its time TE's linear layers among the children compute in torch: their FP8 and their CUDA
    are not needed to find out which of them is gate, up or down.

    A LayerNormLinear leaves out its norm, on which these roles do not depend.
    """
    linears = [
        child for child in module.modules() if te_name(child) in ("Linear", "LayerNormLinear")
    ]
    for child in linears:
        vars(child)["forward"] = _plain(child)
    try:
        yield
    finally:
        for child in linears:
            del vars(child)["forward"]


def _plain(layer: Any) -> Callable[..., Any]:
    def forward(input: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        if hasattr(layer, "basic_ops"):  # of te.ops
            return F.linear(input, layer.weight, layer.bias)
        weight = torch.cat([getattr(layer, name) for name in layer.weight_names])
        bias = None
        if layer.use_bias:
            bias = torch.cat([getattr(layer, name) for name in layer.bias_names])
        output = F.linear(input, weight, bias if layer.apply_bias else None)
        others = [bias] if layer.return_bias else []
        others += [input] if getattr(layer, "return_layernorm_output", False) else []
        return (output, *others) if others else output

    return forward
