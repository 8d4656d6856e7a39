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

The first product that is seen of a site is compared with the one that TE's kernel made, codes with
codes where it is quantised; if they differ the site is refused, with a warning.

Cost: one elementwise pass over gate and up, only when somebody wants them; nothing is kept.
Rejected: saved-tensor hooks, which replace those of a checkpoint around them; TE's debug features,
which round differently (they are an integration); inserting `MakeExtraOutput`, which ends the
fusion of activation and cast.

Not seen: what CUDA graphs replay (no Python runs), and a fused GELU where there is no graph.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fp8lab.recipe import DelayedScaling, Float8CurrentScaling
from fp8lab.sites import FeedForwardSite, GateSite, Role
from fp8lab.sites.observe import Receiver, eagerly
from fp8lab.sites.te_casts import cast_in_force, recipe_in_force, te_name

Site = GateSite | FeedForwardSite


class Removal:
    """A handle: `remove` undoes, once."""

    def __init__(self, *undo: Callable[[], None]) -> None:
        self._undo = list(undo)

    def remove(self) -> None:
        """Leave no hook and no attribute behind."""
        while self._undo:
            self._undo.pop()()


class _Shows:
    """What is shown of one site, and whether it was proved."""

    def __init__(self, site: Site, receiver: Receiver) -> None:
        self.site = site
        self.receiver = receiver
        self.proved: bool | None = None  # None: not yet; False: refused

    def wanted(self) -> set[Role]:
        """Asked in the forward, before anything is done."""
        roles: tuple[Role, ...] = ("gate", "up", "product", "output")
        if self.proved is False:
            roles = roles[3:]
        elif isinstance(self.site, FeedForwardSite):
            roles = roles[1:]
        return {role for role in roles if self.receiver.wants(self.site.module, role)}

    def show(self, wanted: set[Role], both: Tensor, fused: bool, made: Any = None) -> None:
        """Gate, up and product from what goes into the activation: gate first, then up.

        `fused`: TE casts in the activation's kernel. `made`: what came out of that.
        """
        module, both = self.site.module, both.detach()
        if not both.numel() or not wanted - {"output"}:
            return
        gated = isinstance(self.site, GateSite)
        gate, up = both.chunk(2, dim=-1) if gated else (both, both)
        with torch.no_grad():
            product = None
            if "product" in wanted or self.proved is None:
                recipe = recipe_in_force(module, "input") if fused else None
                product = _product(self.site, gate, up)
                if not isinstance(recipe, DelayedScaling | Float8CurrentScaling):
                    product = product.to(both.dtype)
                if self.proved is None and made is not None:
                    self._prove(product, made)
        shown: dict[Role, Tensor | None] = {"gate": gate, "up": up, "product": product}
        for role, tensor in shown.items():
            if role in wanted and tensor is not None and self.proved is not False:
                self.receiver.sees(module, role, tensor)

    def _prove(self, product: Tensor, made: Any) -> None:
        """Once: TE's kernel made of gate and up what we make of them. Nine in ten codes of its
        quantised product must be ours: whether it rounds to BF16 before changes 3 in a hundred, a
        function that is not TE's far more."""
        if te_name(made) is None:
            made, expected, allowed = made.float(), product.float(), 2.0**-6
        else:
            how = cast_in_force(self.site.down.module, "input", product)
            if how is None:  # a recipe that we have no word for
                self.proved = True
                return
            # Read back it is rounded to BF16, an eighth of the distance of two codes.
            made, expected, allowed = made.dequantize().float(), how.fake_quantized(), 2.0**-7
        far = (made.reshape(expected.shape) - expected).abs() > allowed * expected.abs()
        share = float((far & expected.isfinite()).double().mean())
        self.proved = share <= 0.1
        if not self.proved:
            warnings.warn(
                f"{self.site.name}: only its output is recorded: {share:.0%} of the product that "
                f"Transformer Engine made is not {self.site.activation} of what went in",
                stacklevel=2,
            )


def _product(site: Site, gate: Tensor, up: Tensor) -> Tensor:
    if isinstance(site, FeedForwardSite):
        return site.activated(up)
    activated_gate, activated_up = site.activated(gate, up)
    return activated_gate * activated_up


def _first(output: Any) -> Any:
    """The output proper: TE may return a bias or the norm's output beside it."""
    return output[0] if isinstance(output, tuple) else output


class InsideLayerNormMLP:
    """The hooks of one LayerNormMLP; state lives from the start of a forward to its end."""

    def __init__(self, site: Site, receiver: Receiver) -> None:
        self._shows = _Shows(site, receiver)
        self._wanted: set[Role] = set()
        self._in_graph = False
        self._lookup: Removal | None = None
        self._warned = False

    def attach(self) -> Removal:
        module = self._shows.site.module
        # Always and first: the wrapper must go if the forward fails, and those of several watches
        # in the reverse order.
        entered, left = eagerly(self._entered), eagerly(self._left)
        before = module.register_forward_pre_hook(entered, with_kwargs=True)
        after = module.register_forward_hook(left, always_call=True, prepend=True)
        return Removal(self._restore, before.remove, after.remove)

    def _entered(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._restore()
        self._wanted = self._shows.wanted()
        self._in_graph = _graph_holds_fc1(module, (*args, *kwargs.values()))
        # What the activation made proves the site, so the first time it is looked at in any case.
        enough = self._shows.proved is not None and isinstance(self._shows.site, GateSite)
        if self._wanted - {"output"} and not (self._in_graph and enough):
            self._lookup = self._look_through()

    def _restore(self) -> None:
        if self._lookup is not None:
            self._lookup.remove()
            self._lookup = None

    def _look_through(self) -> Removal | None:
        """Let TE's lookup of the activation function return one that shows its argument."""
        home: Any = sys.modules[_home(self._shows.site.module)]
        original = getattr(home, "_act_func", None)
        if original is None:
            return None

        def looked_up(*args: Any) -> Any:
            forward, *others = original(*args)

            def activation(both: Tensor, quantizer: Any, *further: Any, **parameters: Any) -> Any:
                made = forward(both, quantizer, *further, **parameters)
                wanted, self._wanted = self._wanted, self._wanted & {"output"}
                self._shows.show(wanted, both, quantizer is not None, made)
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
            both = None if node is None else _fc1_output(self._shows.site, node, output)
            if both is None:
                self._warn()
            else:
                self._shows.show(self._wanted, both, fused=not getattr(node, "debug", False))
        if "output" in self._wanted:
            self._shows.receiver.sees(module, "output", output)

    def _warn(self) -> None:
        if not self._warned:
            warnings.warn(
                f"{self._shows.site.name}: only its output can be seen: Transformer Engine keeps "
                "fc1's output for no backward here, and its activation is no function of its own",
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


def _fc1_output(site: Site, node: Any, output: Tensor) -> Tensor | None:
    """[tokens, width of fc1] among the saved tensors: of that shape and dtype the last one, for
    fc1's input and weight are saved before it, and behind a gate nothing has its last axis.

    Without a gate this is asked only where TE fused GELU with the GEMM or with the bias; what that
    gave out is saved behind fc1's output, which the bias may still have to be added to.
    """
    module: Any = site.module
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
    if isinstance(site, FeedForwardSite) and module.fc2_weight.requires_grad:
        found = found[:-1]
    if found and module.use_bias and getattr(node, "bias_gelu_fusion", False):
        found.append(found[-1] + module.fc1_bias.to(found[-1].dtype))
    return found[-1] if found else None


class _Operation:
    """`op_forward` of one te.ops activation, wrapped while there are listeners."""

    def __init__(self, op: Any) -> None:
        self.listeners: list[Callable[[Tensor, bool, Any], None]] = []
        self._op = op
        self._original = op.op_forward
        op.op_forward = self

    def __call__(self, ctx: Any, input_: Any, **kwargs: Any) -> Any:
        both = input_.dequantize() if te_name(input_) else input_
        if torch.is_autocast_enabled(both.device.type):
            both = both.to(torch.get_autocast_dtype(both.device.type))
        made = self._original(ctx, input_, **kwargs)
        for listener in self.listeners:
            listener(both, kwargs.get("next_op_input_quantizer") is not None, made)
        return made

    def remove(self, listener: Callable[[Tensor, bool, Any], None]) -> None:
        self.listeners.remove(listener)
        if not self.listeners:
            del self._op.op_forward


def inside_operations(
    site: Site, receiver: Receiver, activation: Any, *, ends_in_down: bool
) -> Removal:
    """Show what passes through `activation` of a te.ops.Sequential, and what leaves the latter if
    that is the output of down."""

    shows = _Shows(site, receiver)

    def runs(both: Tensor, fused: bool, made: Any) -> None:
        shows.show(shows.wanted(), both, fused, made)

    def ran(module: nn.Module, args: Any, output: Any) -> None:
        if receiver.wants(module, "output"):
            receiver.sees(module, "output", _first(output))

    watched = vars(activation).get("op_forward")
    if not isinstance(watched, _Operation):
        watched = _Operation(activation)
    watched.listeners.append(runs)
    undo = [lambda: watched.remove(runs)]
    if ends_in_down:
        undo.append(site.module.register_forward_hook(eagerly(ran)).remove)
    return Removal(*undo)
