"""What happens inside Transformer Engine's fused feed-forwards, seen without changing a bit.

`te.LayerNormMLP` is one autograd function from the norm to the output: no hook sees its product.
But it keeps the output of fc1, gate and up side by side, for its backward, so a forward hook reads
that from the graph, and act(gate)·up is computed again as TE's kernel computes it: in FP32, left
so where the kernel casts the FP32 values (delayed and current scaling), rounded to the model's
dtype everywhere else. Where the graph does not hold it (no gradients, `checkpoint=True`, torch's
or TE's activation checkpoints, offloading, FSDP), the layer's activation function is looked up
through a wrapper for that one forward, and the wrapper shows its argument. `te.ops.Sequential`
calls no inner hooks, so there the activation's own `op_forward` is wrapped until the handle is
removed. Nothing is inserted into the model, so no fusion changes. A feed-forward without a gate is
always seen by its activation function, or, where TE has fused GELU elsewhere, in the graph.

How TE casts the product is not guessed either: `cast_in_force` reads the recipe of the autocast
region, and under delayed scaling the very scale that TE is about to multiply by.

Linear layers of TE around a gate that the user wrote are modules like any other; only for the
time of a probe (`sites`) they compute in plain torch (`plain_linears`).

Cost: one elementwise pass over gate and up, only when somebody wants them; nothing is kept. TE is
recognised by the names of its modules and never imported before the model has done so. Rejected:
saved-tensor hooks, which replace those of a checkpoint around them; TE's debug features, which
round differently (they are an integration); inserting `MakeExtraOutput`, which ends the fusion of
activation and cast.

Not seen: what CUDA graphs replay (no Python runs), grouped MLPs, interleaved gates of te.ops, and a
fused GELU where there is no graph.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp8lab.recipe import DelayedScaling, Float8CurrentScaling
from fp8lab.sites import FeedForwardSite, GateSite, Projection, Role
from fp8lab.te_casts import amax_and_scale as amax_and_scale
from fp8lab.te_casts import cast_in_force as cast_in_force
from fp8lab.te_casts import recipe_in_force, te_name

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


_Site = GateSite | FeedForwardSite


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


class Receiver(Protocol):
    """As in `observe`."""

    def wants(self, module: nn.Module, role: Role) -> bool: ...

    def sees(self, module: nn.Module, role: Role, tensor: Tensor) -> None: ...


class Removal:
    """A handle: `remove` undoes, once."""

    def __init__(self, *undo: Callable[[], None]) -> None:
        self._undo = list(undo)

    def remove(self) -> None:
        """Leave no hook and no attribute behind."""
        while self._undo:
            self._undo.pop()()


# --- which gates are there ---------------------------------------------------------------------


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
            behind = after[1] if type([*after, op][1]).__name__ == "Bias" else None
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


# --- what passes through -----------------------------------------------------------------------


def attach(site: _Site, receiver: Receiver) -> list[Removal]:
    """Show `receiver` gate, up, product and output of `site` until the handles are removed.

    The product is float32 where TE casts the FP32 product, see `cast_in_force`. Where it cannot be
    seen, one warning says so and why.
    """
    if te_name(site.module) == "LayerNormMLP":
        return [_InsideLayerNormMLP(site, receiver).attach()]
    return [_inside_operations(site, receiver)]


def _show(site: _Site, receiver: Receiver, wanted: set[Role], both: Tensor, fused: bool) -> None:
    """Gate, up and product from what goes into the activation: gate first, then up."""
    module, both = site.module, both.detach()
    if not both.numel():
        return
    gate, up = both.chunk(2, dim=-1) if isinstance(site, GateSite) else (both, both)
    if "gate" in wanted and isinstance(site, GateSite):
        receiver.sees(module, "gate", gate)
    if "up" in wanted:
        receiver.sees(module, "up", up)
    if "product" in wanted:
        with torch.no_grad():
            product = _product(site, gate, up)
        recipe = recipe_in_force(module, "input") if fused else None
        if not isinstance(recipe, DelayedScaling | Float8CurrentScaling):
            product = product.to(both.dtype)
        receiver.sees(module, "product", product)


def _product(site: _Site, gate: Tensor, up: Tensor) -> Tensor:
    if isinstance(site, FeedForwardSite):
        return site.activated(up)
    activated_gate, activated_up = site.activated(gate, up)
    return activated_gate * activated_up


def _wanted(site: _Site, receiver: Receiver) -> set[Role]:
    roles: tuple[Role, ...] = ("gate", "up", "product", "output")
    return {role for role in roles if receiver.wants(site.module, role)}


def _first(output: Any) -> Any:
    """The output proper: TE may return a bias or the norm's output beside it."""
    return output[0] if isinstance(output, tuple) else output


def _eagerly(hook: Callable[..., None]) -> Callable[..., None]:
    """A compiled model breaks its graph here; TE's own forward breaks it anyway."""
    disabled: Callable[..., None] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return disabled


class _InsideLayerNormMLP:
    """The hooks of one LayerNormMLP; state lives from the start of a forward to its end."""

    def __init__(self, site: _Site, receiver: Receiver) -> None:
        self._site = site
        self._receiver = receiver
        self._wanted: set[Role] = set()
        self._in_graph = False
        self._lookup: Removal | None = None
        self._warned = False

    def attach(self) -> Removal:
        module = self._site.module
        # Always and first: the wrapper must go if the forward fails, and those of several watches
        # in the reverse order.
        entered, left = _eagerly(self._entered), _eagerly(self._left)
        before = module.register_forward_pre_hook(entered, with_kwargs=True)
        after = module.register_forward_hook(left, always_call=True, prepend=True)
        return Removal(self._restore, before.remove, after.remove)

    def _entered(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._restore()
        self._wanted = _wanted(self._site, self._receiver)
        self._in_graph = _graph_holds_fc1(module, (*args, *kwargs.values()))
        if self._wanted - {"output"} and not (self._in_graph and isinstance(self._site, GateSite)):
            self._lookup = self._look_through()

    def _restore(self) -> None:
        if self._lookup is not None:
            self._lookup.remove()
            self._lookup = None

    def _look_through(self) -> Removal | None:
        """Let TE's lookup of the activation function return one that shows its argument."""
        home: Any = sys.modules[_home(self._site.module)]
        original = getattr(home, "_act_func", None)
        if original is None:
            return None

        def looked_up(*args: Any) -> Any:
            forward, *others = original(*args)

            def activation(both: Tensor, quantizer: Any, *further: Any, **parameters: Any) -> Any:
                made = forward(both, quantizer, *further, **parameters)
                wanted, self._wanted = self._wanted, self._wanted & {"output"}
                _show(self._site, self._receiver, wanted, both, quantizer is not None)
                return made

            return (activation, *others)

        home._act_func = looked_up
        return Removal(lambda: setattr(home, "_act_func", original))

    def _left(self, module: nn.Module, args: Any, output: Any) -> None:
        self._restore()
        if output is None:  # the forward failed
            return
        output = _first(output)
        if self._wanted - {"output"}:
            node = _node_of(output, "_LayerNormMLPBackward") if self._in_graph else None
            both = None if node is None else _fc1_output(module, node, output)
            if both is None:
                self._warn()
            else:
                fused = not getattr(node, "debug", False)
                _show(self._site, self._receiver, self._wanted, both, fused)
        if "output" in self._wanted:
            self._receiver.sees(module, "output", output)

    def _warn(self) -> None:
        if not self._warned:
            warnings.warn(
                f"{self._site.name}: gate, up and product cannot be seen: this version of "
                "Transformer Engine has fc1's output neither in its graph nor in `_act_func`",
                stacklevel=4,
            )
        self._warned = True


def _home(module: nn.Module) -> str:
    """The file of TE that defines LayerNormMLP."""
    classes = [cls for cls in type(module).__mro__ if cls.__name__ == "LayerNormMLP"]
    return classes[-1].__module__  # a derived class may have the same name


def _graph_holds_fc1(module: Any, args: tuple[Any, ...]) -> bool:
    """Whether the backward of the forward that begins will find the output of fc1 in its graph.

    Under somebody's saved-tensor hooks it must not be asked for: a checkpoint would recompute.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if not torch.is_grad_enabled() or hooks is not None:
        return False
    if module.checkpoint or getattr(module, "fsdp_group", None) is not None:
        return False
    return any(getattr(given, "requires_grad", False) for given in (*args, *module.parameters()))


def _node_of(output: Tensor, name: str) -> Any:
    """The layer's own node of the graph: the output's, or the one before an addition of a bias."""
    node: Any = output.grad_fn
    for _ in range(3):
        if node is None or node.name() == name:
            return node
        node = node.next_functions[0][0] if node.next_functions else None
    return None


def _fc1_output(module: Any, node: Any, output: Tensor) -> Tensor | None:
    """[tokens, width of fc1] among the saved tensors: of that shape and dtype the last one, for
    fc1's input and weight are saved before it, and behind a gate nothing has its last axis.

    Without a gate this is asked only where TE fused GELU with the GEMM or with the bias; what that
    gave out is saved behind fc1's output, which the bias may still have to be added to.
    """
    width = module.fc1_weight.shape[0]
    tokens = output.numel() // output.shape[-1]
    tokens *= module.tp_size if module.sequence_parallel else 1
    found: list[Tensor] = [
        tensor
        for tensor in node.saved_tensors
        if tensor is not None
        and tensor.shape == (tokens, width)
        and tensor.dtype == module.activation_dtype
    ]
    if module.activation in _PLAIN and module.fc2_weight.requires_grad:
        found = found[:-1]
    if found and module.use_bias and getattr(node, "bias_gelu_fusion", False):
        found.append(found[-1] + module.fc1_bias.to(found[-1].dtype))
    return found[-1] if found else None


class _Operation:
    """`op_forward` of one te.ops activation, wrapped while there are listeners."""

    def __init__(self, op: Any) -> None:
        self.listeners: list[Callable[[Tensor, bool], None]] = []
        self._op = op
        self._original = op.op_forward
        op.op_forward = self

    def __call__(self, ctx: Any, input_: Any, **kwargs: Any) -> Any:
        both = input_.dequantize() if te_name(input_) else input_
        if torch.is_autocast_enabled(both.device.type):
            both = both.to(torch.get_autocast_dtype(both.device.type))
        made = self._original(ctx, input_, **kwargs)
        for listener in self.listeners:
            listener(both, kwargs.get("next_op_input_quantizer") is not None)
        return made

    def remove(self, listener: Callable[[Tensor, bool], None]) -> None:
        self.listeners.remove(listener)
        if not self.listeners:
            del self._op.op_forward


def _inside_operations(site: _Site, receiver: Receiver) -> Removal:
    module = site.module
    ((_, op, (down, bias)),) = _gates_of(module)
    last = [child for child in module.modules() if te_name(child)][-1]

    def runs(both: Tensor, fused: bool) -> None:
        _show(site, receiver, _wanted(site, receiver), both, fused)

    def ran(module: nn.Module, args: Any, output: Any) -> None:
        if receiver.wants(module, "output"):
            receiver.sees(module, "output", _first(output))

    watched = vars(op).get("op_forward")
    if not isinstance(watched, _Operation):
        watched = _Operation(op)
    watched.listeners.append(runs)
    undo = [lambda: watched.remove(runs)]
    if last in (down, bias):  # else what leaves the Sequential is not the output of down
        undo.append(module.register_forward_hook(_eagerly(ran)).remove)
    return Removal(*undo)


# --- a gate that the user wrote between TE's linear layers -------------------------------------


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
