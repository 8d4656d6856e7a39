"""Where the gated feed-forwards of a model are, and which of their weights is which.

Names lie: in torchtitan `w2` is the down projection, in xformers `w3` is, and in the paper that
this tool is built around `w1` is what Llama calls up. So nothing is read from names. Every module
that owns two weights [hidden, dim] and one [dim, hidden] is *run* on a small probe, each linear map
that it computes is noted with its input and output, and the roles are those for which

    input of down == act(output of gate) * act'(output of up)

holds element by element, over all pairs of maps and all activations of `ffn`. What fits is
proved; what does not fit is no gate. The eight vectors of the probe grow from half the usual size
to 64 times, so that a clamp (ReLU6's too) shows, and the probe runs on float32 copies of the
parameters: in BF16 x·σ(1.702x) passes for GELU. For the same reason an `activation_format` of
`ffn` is lifted meanwhile (in E2M1 GELU *is* ReLU); `activated` has it again. The probe runs in
evaluation mode without gradients and leaves random state, buffers and modes as they were.

Cost: one forward of each candidate module on eight vectors, and for its time a float32 copy of a
BF16 module. Rejected: symbolic tracing, which fails on control flow and needs a rule per way of
writing an activation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fp8lab.ffn import ACTIVATIONS, GLU_VARIANTS, GatedFeedForward

Role = Literal["gate", "up", "product", "output"]


@dataclass(frozen=True, eq=False)
class Projection:
    """One linear map of a gated feed-forward: its weight [out, in], and the module that is called
    for it, None where the parent computes with the weight itself."""

    name: str
    weight: nn.Parameter
    bias: nn.Parameter | None
    module: nn.Module | None

    def __call__(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight, self.bias)


@dataclass(frozen=True, eq=False)
class GateSite:
    """A gated feed-forward: output = down(activation(gate(x)) * up_activation(up(x))).

    `name` is the module's path in the model ("." for the model itself). Activations are named as
    in `ffn.ACTIVATIONS`.
    """

    name: str
    module: nn.Module
    gate: Projection
    up: Projection
    down: Projection
    activation: str
    up_activation: str

    @property
    def hookable(self) -> bool:
        """Whether all three projections are called as modules, so that hooks see them."""
        return None not in (self.gate.module, self.up.module, self.down.module)

    def site(self, role: Role) -> str:
        """The site's name in rows, such as `layers.3.mlp:product`."""
        return f"{self.name}:{role}"

    def activated(self, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """activation(gate) and up_activation(up): the two factors of the product.

        In the precision in which the module computes them, where that is a setting.
        """
        if isinstance(self.module, GatedFeedForward):
            return self.module.activated(gate, up)
        return ACTIVATIONS[self.activation](gate), ACTIVATIONS[self.up_activation](up)


def find_gates(model: nn.Module) -> list[GateSite]:
    """Every gated feed-forward with separate projections in `model`, in module order.

    Raises ValueError, in one line, if there is none; where a module of the right shape was found
    but did not fit, the message says why.
    """
    found: list[GateSite] = []
    reasons: list[str] = []
    for name, module in model.named_modules():
        weights = _own_weights(module)
        if not _has_gated_shape(weights):
            continue
        answer = _identify(name, module, weights)
        if isinstance(answer, GateSite):
            found.append(answer)
        else:
            reasons.append(f"{name or '.'}: {answer}")
    if not found:
        looked_at = f" ({'; '.join(reasons[:3])})" if reasons else ""
        raise ValueError(
            f"{type(model).__name__}: no gated feed-forward found, expected a module computing "
            f"down(act(gate(x)) * up(x)) with separate projections{looked_at}"
        )
    return found


def _own_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The matrices of a module and of its direct children, by name."""
    weights = {}
    for name, parameter in module.named_parameters():
        if name.count(".") <= 1 and parameter.dim() == 2:
            weights[name] = parameter
    return weights


def _has_gated_shape(weights: dict[str, nn.Parameter]) -> bool:
    shapes = [tuple(weight.shape) for weight in weights.values()]
    return any(
        shapes.count(shape) >= (3 if shape[0] == shape[1] else 2) and shape[::-1] in shapes
        for shape in shapes
    )


@dataclass
class _Call:
    """One linear map that the probe saw: names of its parameters, and a copy of what went in and
    out, for an activation may work in place."""

    weight: str
    bias: str | None
    module: nn.Module | None
    input: Tensor
    output: Tensor


@dataclass
class _Tracer(TorchFunctionMode):
    """Notes every product with one of `parameters`, written as F.linear or as x @ weight.T."""

    parameters: dict[str, Tensor]
    calls: list[_Call] = field(default_factory=list)
    inside_a_module: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if not self.inside_a_module:
            if func is functional.linear:
                named = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
                self._note(named["weight"], named.get("bias"), named["input"], output)
            elif getattr(func, "__name__", "") in ("matmul", "__matmul__", "mm") and not kwargs:
                self._note(args[1].t() if args[1].dim() == 2 else None, None, args[0], output)
        return output

    def _note(self, weight: Tensor | None, bias: Any, input: Tensor, output: Tensor) -> None:
        name, bias_name = self._name_of(weight), self._name_of(bias)
        if name is not None and (bias is None or bias_name is not None):
            self.calls.append(_Call(name, bias_name, None, input.clone(), output.clone()))

    def _name_of(self, tensor: Tensor | None) -> str | None:
        for name, known in self.parameters.items():
            if tensor is not None and tensor.data_ptr() == known.data_ptr():
                # A square matrix and its transpose differ in their strides alone.
                if tensor.shape == known.shape and tensor.stride() == known.stride():
                    return name
        return None


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no random numbers used up, activations as precise as the
    tensors; everything restored."""
    modes = [(child, child.training) for child in module.modules()]
    zoo = [child for child in module.modules() if isinstance(child, GatedFeedForward)]
    formats = [child.activation_format for child in zoo]
    devices = {parameter.device for parameter in module.parameters() if parameter.is_cuda}
    try:
        for child, _ in modes:
            child.training = False
        for gated in zoo:
            gated.activation_format = None
        with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
            yield
    finally:
        for child, mode in modes:
            child.training = mode
        for gated, fmt in zip(zoo, formats, strict=True):
            gated.activation_format = fmt


def _run_probe(module: nn.Module, weights: dict[str, nn.Parameter], dim: int) -> list[_Call]:
    sizes = 2.0 ** torch.arange(-1, 7)
    probe = sizes[:, None] * torch.randn(1, 8, dim, generator=torch.Generator().manual_seed(0))
    with ExitStack() as stack:
        stack.enter_context(_undisturbed(module))
        tensors: dict[str, Tensor] = {n: p.float() for n, p in module.named_parameters()}
        tracer = _Tracer(dict(tensors))
        tensors |= {name: buffer.clone() for name, buffer in module.named_buffers()}
        for child_name, child in module.named_children():
            if f"{child_name}.weight" in weights:
                _note_calls(stack, tracer, child_name, child)
        stack.enter_context(tracer)
        device = next(iter(weights.values())).device
        torch.func.functional_call(module, tensors, (probe.to(device),))
    return [call for call in tracer.calls if call.weight in weights]


def _note_calls(stack: ExitStack, tracer: _Tracer, name: str, child: nn.Module) -> None:
    bias = f"{name}.bias" if f"{name}.bias" in tracer.parameters else None

    def enter(_module: nn.Module, _args: Any) -> None:
        tracer.inside_a_module = True

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        tracer.inside_a_module = False
        input = (*args, *kwargs.values())[0]
        call = _Call(f"{name}.weight", bias, module, input.clone(), output.clone())
        tracer.calls.append(call)

    stack.callback(child.register_forward_pre_hook(enter).remove)
    stack.callback(child.register_forward_hook(leave, with_kwargs=True).remove)


def _identify(name: str, module: nn.Module, weights: dict[str, nn.Parameter]) -> GateSite | str:
    """The site, or why the module is none."""
    if any(parameter.is_meta for parameter in module.parameters()):
        return "its weights are on the meta device, the probe cannot run"
    parameters, error = dict(module.named_parameters()), ""
    for dim in sorted({weight.shape[1] for weight in weights.values()}):
        try:
            calls = _run_probe(module, weights, dim)
        except Exception as failure:  # a foreign forward may raise anything: the module is no gate
            reason = [*str(failure).splitlines(), type(failure).__name__][0]
            error = error or f"the probe failed: {reason[:120]}"
            continue
        roles = _roles(calls)
        if roles is not None:
            gate, up, down, (activation, up_activation) = roles
            return GateSite(
                name or ".",
                module,
                _projection(gate, parameters),
                _projection(up, parameters),
                _projection(down, parameters),
                activation,
                up_activation,
            )
        error = "no two of its projections give the input of a third as act(gate) * up"
    return error


def _projection(call: _Call, parameters: dict[str, nn.Parameter]) -> Projection:
    bias = None if call.bias is None else parameters[call.bias]
    return Projection(call.weight, parameters[call.weight], bias, call.module)


def _roles(calls: list[_Call]) -> tuple[_Call, _Call, _Call, tuple[str, str]] | None:
    """The pair of maps and the pair of activations that explain the input of a third, exactly.

    Where both orders fit (bilinear: no activation at all) the map that ran first is the gate.
    """
    best: tuple[float, tuple[_Call, _Call, _Call, tuple[str, str]]] | None = None
    for position, down in enumerate(calls):
        if not down.input.any():
            continue
        for gate, up in _ordered_pairs(calls[:position], down.input.shape):
            for pair in _activation_pairs():
                error = _error(down.input, gate.output, up.output, *pair)
                if best is None or error < best[0]:
                    best = error, (gate, up, down, pair)
    if best is None or not best[0] <= 8 * torch.finfo(best[1][2].input.dtype).eps:
        return None
    return best[1]


def _ordered_pairs(calls: list[_Call], shape: torch.Size) -> Iterator[tuple[_Call, _Call]]:
    candidates = [call for call in calls if call.output.shape == shape]
    for i, one in enumerate(candidates):
        for other in candidates[i + 1 :]:
            if one.weight != other.weight:
                yield one, other
                yield other, one


def _activation_pairs() -> list[tuple[str, str]]:
    gated = [(activation, "identity") for activation in ACTIVATIONS]
    return gated + [pair for pair in GLU_VARIANTS.values() if pair[1] != "identity"]


def _error(product: Tensor, gate: Tensor, up: Tensor, activation: str, up_activation: str) -> float:
    """The largest error of an element, relative to the largest element of its vector."""
    explained = ACTIVATIONS[activation](gate) * ACTIVATIONS[up_activation](up)
    sizes = product.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(product.dtype).tiny)
    return float(((product - explained).abs() / sizes).max())


def cast_in_force(module: nn.Module | None, operand: str, tensor: Tensor) -> Any:
    """How `module` casts `tensor` as that operand now (a `casting.Cast`), None if it does not say.

    The protocol is one method of that name on the layer, so that whoever measures needs to import
    no layer class.
    """
    ask: Callable[[str, Tensor], Any] | None = getattr(module, "cast_in_force", None)
    return None if ask is None else ask(operand, tensor)
