"""What a `Selection` asks for beyond the feed-forwards: operands and gradients of linear layers,
the residual stream, attention logits, weights, weight gradients and the optimizer's moments.

Nothing here stands in the graph. Gradients are seen by hooks on tensors and, where a tensor's own
gradient would be the sum over all who read it, by a hook on the node that computes the layer's
share. (Rejected: `register_full_backward_hook`, which puts a function of its own around the layer
and may so change the order in which three gradients are added up.) Weights, their gradients and
the moments are read at the optimizer's step: the weights and gradients before it, moments after.

Attention logits are the arguments of the softmax: recomputed as q k^T · scale where a block calls
`scaled_dot_product_attention`, seen where it calls `softmax` itself. A fused kernel of another
library hides them, and so does `nn.MultiheadAttention`: their row is then missing, and that told.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fp8lab.casting import Cast
from fp8lab.hooking import when_gradients_are_there
from fp8lab.monitor import measure
from fp8lab.monitor.probes import counts
from fp8lab.monitor.recorder import Recorder, local
from fp8lab.monitor.selection import BLOCK_TENSORS, LINEAR_TENSORS, PARAMETER_TENSORS
from fp8lab.monitor.step_probes import gradient_scale
from fp8lab.recipe import OPERANDS
from fp8lab.rewriting import OfAnotherForwardError
from fp8lab.sites import cast_in_force
from fp8lab.sites.observe import Leaving, eagerly, take_off

# So many nodes behind a layer's output are searched for the one that reads its input.
_NODES_SEARCHED = 16


class TensorTaps:
    """The hooks for everything that selections name outside of feed-forwards."""

    def __init__(
        self,
        modules: Iterable[tuple[str, nn.Module]],
        recorder: Recorder,
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        self._recorder = recorder
        self._optimizer = optimizer
        modules = list(modules)
        self._failed: set[str] = set()
        self._has_no: set[str] = set()  # of Adam's moments, told once
        self.layers: dict[str, dict[str, None]] = {}  # those that have it, by tensor
        self._linears = [
            (name, module)
            for name, module in modules
            if self._any(name, module, (*LINEAR_TENSORS, "weight"))
        ]
        self._blocks = [
            (f"{name}.{child_name}".lstrip("."), child)
            for name, module in modules
            if isinstance(module, nn.ModuleList)
            for child_name, child in module.named_children()
        ]
        self._blocks = [pair for pair in self._blocks if self._selected(pair[0], BLOCK_TENSORS)]
        self._parameters = [
            (owner, parameter)
            for name, module in modules
            for owner, parameter in _matrices(name, module)
            if self._selected(owner, PARAMETER_TENSORS)
        ]
        if self._parameters and optimizer is None:
            raise ValueError(
                f"watch: {', '.join(PARAMETER_TENSORS)} are read at the optimizer's step, "
                "expected optimizer="
            )

    def _any(self, name: str, module: nn.Module, tensors: tuple[str, ...]) -> bool:
        weight = getattr(module, "weight", None)
        is_linear = (
            isinstance(weight, Tensor) and weight.dim() == 2 and hasattr(module, "in_features")
        )
        return is_linear and self._selected(name, tensors)

    def _selected(self, layer: str, tensors: tuple[str, ...]) -> bool:
        for tensor in tensors:
            self.layers.setdefault(tensor, {})[layer] = None
        return any(self._recorder.selects(layer, tensor) for tensor in tensors)

    def attach(self) -> list[Any]:
        handles: list[Any] = []
        for name, module in self._linears:
            hook = eagerly(self._linear_ran(name))
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        for name, block in self._blocks:
            handles.append(block.register_forward_hook(eagerly(self._block_ran(name))))
        attention = {n: b for n, b in self._blocks if self._recorder.selects(n, "attention_logits")}
        for name, block in attention.items():
            handles += _LogitsTap(name, block, self._recorder, _is_within(name, attention)).attach()
        if self._parameters and self._optimizer is not None:
            handles.append(when_gradients_are_there(self._optimizer, self._before_step))
            handles.append(self._optimizer.register_step_post_hook(self._after_step))
        return handles

    def _record(
        self, layer: str, name: str, tensor: Tensor | None, caster: nn.Module | None = None
    ) -> None:
        """`caster` is the layer that casts the tensor, and may say how."""
        names = self._recorder.due(layer, name)
        if names is None or tensor is None or not tensor.numel() or layer in self._failed:
            return
        try:
            with _own_randomness(caster, tensor):
                whole = name in PARAMETER_TENSORS
                how = self._cast(f"{layer}:{name}", name, tensor, caster)
                summary = self._recorder.record(f"{layer}:{name}", tensor, names, how, whole=whole)
            if name == "residual":  # a massive activation has a channel
                found = measure.sentinel_vector(local(tensor.detach()), None, summary)
                self._recorder.add(f"{layer}:{name}", "sentinel", found)
        except OfAnotherForwardError:
            pass  # another micro-batch of the step has its part of the row
        except Exception as error:  # what cannot be measured must not end the training
            self._fail(layer, name, error)

    def _fail(self, layer: str, name: str, error: Exception) -> None:
        self._failed.add(layer)
        self._recorder.fail(layer, f"{name}: {type(error).__name__}: {error}")

    @torch.no_grad()
    def _cast(self, site: str, name: str, tensor: Tensor, caster: nn.Module | None) -> Cast | None:
        """What the cast of an operand does, as part of its row."""
        part = local(tensor.detach())
        how = cast_in_force(caster, name, part) if name in OPERANDS else None
        if isinstance(how, Cast):
            self._recorder.add(site, "sentinel", measure.sentinel_vector(part, how))
            self._recorder.add(site, "operand", measure.operand_vector(how))
            self._recorder.note_cast(site, how)
            if name != "weight":
                gemm = "output" if name == "input" else "grad_input"
                self._sum(site, caster, gemm, part)
        return how

    def _sum(self, site: str, layer: Any, gemm: str, *operands: Tensor) -> None:
        """What a short accumulator does in a GEMM of these, as part of the row of `site`."""
        ask = getattr(layer, "gemm_error", None)
        error = None if ask is None else ask(gemm, *operands)
        if error is not None:
            self._recorder.add(site, "gemm", error)

    def _record_gradient(
        self, layer: str, name: str, caster: nn.Module | None = None
    ) -> Callable[[Tensor], None]:
        return lambda gradient: self._record(layer, name, gradient, caster)

    def _linear_ran(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            input, result = _first_tensor((*args, *kwargs.values())), _first_tensor(output)
            if counts(module, self._recorder):
                self._record(name, "input", input, module)
                self._record(name, "output", result)
                self._cast_weight(name, module)
            if result is None or not result.requires_grad:
                return
            if self._recorder.due(name, "grad_output") is not None:
                result.register_hook(self._record_gradient(name, "grad_output", module))  # type: ignore[no-untyped-call]
            if input is not None and getattr(module, "accumulation", None) is not None:
                result.register_hook(self._sums_over_tokens(name, module, input.detach()))  # type: ignore[no-untyped-call]
            if input is not None and self._recorder.due(name, "grad_input") is not None:
                _hook_share_of(input, result, self._record_gradient(name, "grad_input"))

        return hook

    def _sums_over_tokens(
        self, name: str, module: nn.Module, input: Tensor
    ) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            if self._recorder.due(name, "grad_weight") is None or name in self._failed:
                return
            try:
                with torch.no_grad(), _own_randomness(module, gradient):
                    self._sum(f"{name}:grad_weight", module, "grad_weight", gradient, input)
            except OfAnotherForwardError:
                pass
            except Exception as error:  # what cannot be measured must not end the training
                self._fail(name, "grad_weight", error)

        return hook

    def _cast_weight(self, name: str, module: nn.Module) -> None:
        """When the layer runs: at the optimizer's step, when the row's other columns are measured,
        a delayed scale has moved on."""
        weight = getattr(module, "weight", None)
        if self._recorder.due(name, "weight") is None or name in self._failed:
            return
        try:
            if isinstance(weight, Tensor):
                with _own_randomness(module, weight):
                    self._cast(f"{name}:weight", "weight", weight, module)
        except Exception as error:
            self._fail(name, "weight", error)

    def _block_ran(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            stream = _first_tensor(output)
            if stream is None:
                return
            if counts(module, self._recorder):
                self._record(name, "residual", stream)
            if stream.requires_grad and self._recorder.due(name, "grad_residual") is not None:
                stream.register_hook(self._record_gradient(name, "grad_residual"))  # type: ignore[no-untyped-call]

        return hook

    @torch.no_grad()
    def _before_step(self) -> None:
        scale = gradient_scale(self._optimizer)
        for owner, parameter in self._parameters:
            self._record(owner, "weight", parameter)
            if self._recorder.due(owner, "grad_weight") is not None:
                gradient = parameter.grad
                if gradient is not None and scale is not None:
                    gradient = gradient / scale
                self._record(owner, "grad_weight", gradient)

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        groups: list[dict[str, Any]] = getattr(self._optimizer, "param_groups", [])
        held = {id(parameter) for group in groups for parameter in group["params"]}
        for owner, parameter in self._parameters:
            asked = [
                n for n in ("exp_avg", "exp_avg_sq") if self._recorder.due(owner, n) is not None
            ]
            if asked:
                moments = _moments(self._optimizer, parameter)
                for name in asked:
                    self._record(owner, name, moments.get(name))
                    # Without a gradient the optimizer leaves a parameter as it is.
                    is_due = id(parameter) in held and parameter.grad is not None
                    if is_due and name not in moments and name not in self._has_no:
                        kind = type(self._optimizer).__name__
                        self._recorder.fail(
                            "the optimizer", f"{name}: {kind} keeps none of {owner}"
                        )
                        self._has_no.add(name)


def _is_within(name: str, blocks: Container[str]) -> bool:
    """Whether one of the blocks holds that of this name."""
    parts = name.split(".")
    return any(".".join(parts[:depth]) in blocks for depth in range(1, len(parts)))


def _own_randomness(caster: nn.Module | None, tensor: Tensor) -> AbstractContextManager[None]:
    """Measuring a cast that rounds stochastically draws random numbers: not the training's."""
    if caster is None:
        return nullcontext()
    devices = [tensor.device] if tensor.is_cuda else []
    return torch.random.fork_rng(devices)


def _moments(optimizer: Any, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Adam's moments, also where they are stored in FP8 (`optim`)."""
    state = optimizer.state.get(parameter, {})
    if state and "exp_avg" not in state and hasattr(optimizer, "moments"):
        return dict(zip(("exp_avg", "exp_avg_sq"), optimizer.moments(parameter), strict=True))
    return {name: state[name] for name in ("exp_avg", "exp_avg_sq") if name in state}


def _matrices(name: str, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters that `module` owns itself, with two dimensions or more, by the row's layer."""
    return [
        (name if own == "weight" else f"{name}.{own}".lstrip("."), parameter)
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.dim() >= 2
    ]


def _first_tensor(values: Any) -> Tensor | None:
    if isinstance(values, Tensor):
        return values if values.is_floating_point() else None
    if isinstance(values, tuple | list):
        return next((t for t in map(_first_tensor, values[:1]) if t is not None), None)
    return None


def _hook_share_of(input: Tensor, output: Tensor, hook: Callable[[Tensor], None]) -> None:
    """Call `hook` with the gradient that flows from `output` into `input` alone."""
    if not input.requires_grad or output.grad_fn is None:
        return
    wanted = get_gradient_edge(input)
    waiting: list[Node] = [output.grad_fn]
    for _ in range(_NODES_SEARCHED):
        if not waiting:
            return
        node = waiting.pop(0)
        for position, (behind, number) in enumerate(node.next_functions):
            if behind is not None and _is(wanted, behind, number):
                node.register_hook(_at(position, hook))
                return
            if behind is not None:
                waiting.append(behind)


def _is(edge: GradientEdge, node: Node, number: int) -> bool:
    return edge.node == node and edge.output_nr == number


def _at(position: int, hook: Callable[[Tensor], None]) -> Callable[[Any, Any], None]:
    def of_node(grad_inputs: Any, grad_outputs: Any) -> None:
        if grad_inputs[position] is not None:
            hook(grad_inputs[position])

    return of_node


class _LogitsTap(TorchFunctionMode):
    """Sees the attention of one block: [largest magnitude, largest value] of its logits. An `inner`
    block, as an expert of another, need not have any."""

    def __init__(self, name: str, block: nn.Module, recorder: Recorder, inner: bool) -> None:
        super().__init__()
        self._name, self._block, self._recorder = name, block, recorder
        self._entered = 0
        self._is_refused = False
        self._saw_any, self._told_of_none = False, inner

    def attach(self) -> list[Any]:
        enter, leave = eagerly(self._enter), eagerly(self._leave)
        return [
            self._block.register_forward_pre_hook(enter),
            self._block.register_forward_hook(leave, always_call=True),
            Leaving(self._leave_all),
        ]

    def _leave_all(self) -> None:
        for _ in range(self._entered):
            take_off(self)
        self._entered = 0

    def _enter(self, module: nn.Module, args: Any) -> None:
        due = self._recorder.due(self._name, "attention_logits") is not None
        due = due and not self._is_refused and counts(module, self._recorder)
        if due and not torch.compiler.is_compiling():
            self._entered += 1
            self.__enter__()  # type: ignore[no-untyped-call]

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._entered:
            self._entered -= 1
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            # Of a forward that raised there is no output.
            if output is not None and not (self._saw_any or self._told_of_none):
                self._told_of_none = True
                reason = "softmax and scaled_dot_product_attention are not called where it is seen"
                self._recorder.fail(self._name, f"attention_logits: {reason}")

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        is_softmax = func in (functional.softmax, torch.softmax, Tensor.softmax)
        if not self._is_refused and (is_softmax or func is functional.scaled_dot_product_attention):
            self._saw_any = True
            try:
                self._see(is_softmax, args, kwargs)
            except Exception as error:  # what cannot be measured must not end the training
                self._is_refused = True
                reason = f"attention_logits: {type(error).__name__}: {error}"
                self._recorder.fail(self._name, reason)
        return func(*args, **kwargs)

    def _see(self, is_softmax: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not is_softmax:
            extremes = _logits_extremes(*args, **kwargs)
        else:
            logits = args[0] if args else kwargs["input"]
            if logits.dim() < 3 or not logits.is_floating_point() or not logits.numel():
                return
            extremes = _extremes(logits, logits > torch.finfo(logits.dtype).min / 2)
        if extremes is not None:
            self._recorder.add(f"{self._name}:attention_logits", "extremes", extremes)


def _extremes(logits: Tensor, allowed: Tensor) -> Tensor:
    """float64 [2]: largest magnitude and largest value of the logits that are not masked."""
    logits = logits.detach().double()
    return torch.stack(
        [
            torch.where(allowed, logits.abs(), 0.0).amax(),
            torch.where(allowed, logits, -torch.inf).amax(),
        ]
    )


@torch.no_grad()
def _logits_extremes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """Of q [..., T, d] and k [..., S, d] as `scaled_dot_product_attention` takes them, one
    sequence at a time: all logits at once would be the memory that it exists to save. None of
    nothing."""
    query, key = local(query.detach()), local(key.detach())
    if not query.numel() or not key.numel():
        return None
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    queries, keys = (t.reshape(-1, *t.shape[-2:]) for t in (query, key))
    size = queries.shape[1], keys.shape[1]
    masks = attn_mask
    if masks is not None:
        masks = masks.detach().expand(*query.shape[:-2], *size).reshape(-1, *size)
    causal = torch.ones(size, dtype=torch.bool, device=query.device).tril()
    found = []
    for index in range(len(queries)):
        with torch.autocast(query.device.type, enabled=False):
            logits = (queries[index].float() @ keys[index].float().t()) * factor
        allowed = causal if is_causal else torch.ones_like(causal)
        if masks is not None and masks.dtype == torch.bool:
            allowed = masks[index]
        elif masks is not None:
            logits = logits + masks[index]
            allowed = logits > torch.finfo(masks.dtype).min / 2
        found.append(_extremes(logits, allowed))
    return torch.stack(found).amax(dim=0)
