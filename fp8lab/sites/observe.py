"""Being shown gate, up, product and output of a feed-forward while it runs, without a trace.

A site is seen in one of three ways (`GateSite.seen`):

- *hooks*: gate, up and down are called as modules, so forward hooks on gate and up and a pre-hook
  on down see the live tensors; a fused gate and up is shown as two views.
- *inside*: the module computes with its parameters itself, perhaps for many experts, perhaps in an
  `autograd.Function`. For the time of its forward a mode follows these parameters through views
  and copies to the products they take part in (`tracing`), and shows what goes in and out.
- *recomputed*: a kernel hides the product (Transformer Engine's, see `te_modules`).

A compiled model breaks its graph at the hooks. What was compiled before, or with hooks that are
gone, is compiled anew, for compiled code does not look. A site that is seen inside and is compiled
cannot be followed; there its forward runs once more, uncompiled and without gradients, with
buffers and random numbers put back.

The receiver is asked what it wants before anything is done for it, and shown the live tensors,
which it must reduce at once: an activation may work in place, and the backward of Liger's kernels
overwrites gate and up. Nothing returned, patched or kept: bits do not change, and when the handles
are removed nothing is left.

A gate that is called twice before the product counts once. Nobody is shown an empty tensor.
Rejected: patching `forward` or `_apply_gate` of known classes, which would have to be known.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode

from fp8lab.hooking import OfOneModel
from fp8lab.sites import FeedForwardSite, GateSite, Projection, Role
from fp8lab.sites.gating import relative_error, without_factor
from fp8lab.sites.tracing import LinearMap, Source, Trace, features_last, output_of


class Handle(Protocol):
    """What `attach` returns: after `remove` no hook, attribute or patched method is left."""

    def remove(self) -> None: ...


class Receiver(Protocol):
    """Who is shown the tensors."""

    def wants(self, module: nn.Module, role: Role) -> bool:
        """Asked inside the forward of `module` (the site's), before any work is done for a role."""
        ...

    def sees(self, module: nn.Module, role: Role, tensor: Tensor) -> None:
        """A view [..., channels] (output: [..., out]) of the live tensor, in its graph."""
        ...


def attach(site: GateSite | FeedForwardSite, receiver: Receiver) -> list[Handle]:
    """Show `receiver` what passes through `site` until the handles are removed.

    Within one forward the order is gate, up, product, output, again and again where experts run
    one after the other. A raw gate or up is what its projection gave, before limits and
    activation. Of a site without a gate the roles are up, product and output.
    """
    if site.engine == "transformer_engine":
        from fp8lab.sites import te_modules

        handles: list[Handle] = list(te_modules.attach(site, receiver))
        return handles
    if site.seen == "hooks":
        return [*_Called(site, receiver).attach(), _Forgetting()]
    return [*_Inside(site, receiver).attach(), _Forgetting()]


def agrees(site: GateSite, gate: Tensor, up: Tensor, product: Tensor) -> float:
    """How far act(gate)·act'(up) is from `product`: the largest error of an element, relative to
    the largest of its token; all [..., channels]. Of a weighted product each token's factor is
    fitted. At most `tolerance(product.dtype)` where the site is what it is said to be. What a
    dropout before down has set to zero in a training is left out, if it is less than nine in ten.
    """
    with torch.no_grad():
        activated_gate, activated_up = site.activated(gate, up)
        explained = (activated_gate * activated_up).float()
        seen = product.float()
        dropped = (seen == 0) & (explained != 0)
        drops = site.module.training and 0 < float(dropped.double().mean()) < 0.9
        explained = explained.masked_fill(dropped, 0.0) if drops else explained
        if site.weighted or drops:
            explained = without_factor(seen, explained)
        return relative_error(seen, explained)


def tolerance(dtype: torch.dtype) -> float:
    """What roundings in between may come to: activation, limit, offset and product, each rounded
    to `dtype`, where we round fewer or more times."""
    return 8 * torch.finfo(dtype).eps


class _Shows:
    """What all ways have in common: which roles were shown since the last product, per thread."""

    def __init__(self, site: GateSite | FeedForwardSite, receiver: Receiver) -> None:
        self.site, self.receiver = site, receiver
        self._local = threading.local()
        self.projections: dict[Role, Projection] = {"up": site.up, "output": site.down}
        if isinstance(site, GateSite):
            self.projections = {"gate": site.gate, **self.projections}

    @property
    def shown(self) -> set[Role]:
        shown: set[Role] = self._local.__dict__.setdefault("shown", set())
        return shown

    def show(self, role: Role, tensor: Tensor | None) -> None:
        if tensor is None or not tensor.numel():
            return
        if role in ("gate", "up"):
            if role in self.shown:
                return
            self.shown.add(role)
        if self.receiver.wants(self.site.module, role):
            self.receiver.sees(self.site.module, role, tensor)

    def started(self, input: Any) -> None:
        """Down is about to run."""
        self.shown.clear()
        if isinstance(input, Tensor):
            self.show("product", features_last(input, self.site.channels))

    def ended(self, roles: list[tuple[Role, slice]], output: Tensor | None) -> None:
        """A projection has given its output, of which each role has some columns."""
        for role, rows in roles:
            if output is not None:
                self.show(role, output if rows == slice(None) else output[..., rows])


class _Called(_Shows):
    """The three projections are modules."""

    def attach(self) -> list[Handle]:
        by_module: dict[nn.Module, list[tuple[Role, slice]]] = {}
        for role, projection in self.projections.items():
            assert projection.module is not None
            by_module.setdefault(projection.module, []).append((role, projection.rows))
        handles: list[Handle] = [self.site.module.register_forward_pre_hook(eagerly(self._begin))]
        for module, roles in by_module.items():
            handles.append(module.register_forward_hook(eagerly(self._after(roles))))
        down = self.site.down.module
        assert down is not None
        before = down.register_forward_pre_hook(eagerly(self._before_down), with_kwargs=True)
        return [*handles, before]

    def _begin(self, module: nn.Module, args: Any) -> None:
        self.shown.clear()  # what a forward that raised has left

    def _after(self, roles: list[tuple[Role, slice]]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.ended(roles, output_of(output))

        return hook

    def _before_down(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.started(next(iter((*args, *kwargs.values())), None))


class _Inside(_Shows):
    """The module computes with its parameters itself, or with some of them."""

    _warned = False

    def attach(self) -> list[Handle]:
        module = self.site.module
        handles: list[Handle] = [
            module.register_forward_pre_hook(_knowing(self._enter)),
            module.register_forward_hook(eagerly(self._leave), with_kwargs=True, always_call=True),
        ]
        for projection in self.projections.values():
            child = projection.module
            if child is not None:
                before, after = self._around(projection)
                handles.append(child.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(child.register_forward_hook(after, always_call=True))
        return [*handles, Leaving(self._leave_all)]

    def _leave_all(self) -> None:
        for trace in self._running:
            if isinstance(trace, Trace):
                take_off(trace)
        self._running.clear()

    @property
    def _running(self) -> list[Trace | Literal["dark"] | None]:
        """For every forward that this thread is in: its trace, "dark" where there can be none, None
        where nothing is wanted."""
        running: list[Trace | Literal["dark"] | None]
        running = self._local.__dict__.setdefault("running", [])
        return running

    @property
    def _trace(self) -> Trace | None:
        last = self._running[-1] if self._running else None
        return last if isinstance(last, Trace) else None

    def _enter(self, compiles: bool, module: nn.Module, args: Any) -> None:
        if self._trace is not None:  # of the forward around this one
            self._trace.finish()
        self.shown.clear()
        roles: list[Role] = ["product", *self.projections]
        if not any(self.receiver.wants(module, role) for role in roles):
            self._running.append(None)
        elif compiles:  # a mode on the stack would fail there
            self._running.append("dark")
        else:
            self._running.append(self._start())

    def _start(self) -> Trace:
        # A forward within a forward of the same module is looked at once: by its own trace.
        def begins(known: LinearMap) -> None:
            if self._trace is trace and known.source.name == self.site.down.name:
                self.started(known.input)

        def ends(known: LinearMap) -> None:
            if self._trace is trace:
                self.ended(self._roles_of(known.source), known.output)

        trace = Trace(self._parameters(), begins, ends)
        trace.__enter__()  # type: ignore[no-untyped-call]
        return trace

    def _leave(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        last = self._running[-1] if self._running else None
        try:
            if isinstance(last, Trace):
                last.__exit__(None, None, None)  # type: ignore[no-untyped-call]
                if output is not None:  # else the forward raised
                    last.finish()
        finally:
            del self._running[-1:]
        if last == "dark" and output is not None:
            self._again(args, kwargs)

    @torch.no_grad()
    def _again(self, args: Any, kwargs: dict[str, Any]) -> None:
        """The forward once more, not compiled; it leaves buffers and random numbers as they are."""
        module = self.site.module
        devices = {parameter.device for parameter in module.parameters() if parameter.is_cuda}
        before = [(buffer, buffer.clone()) for buffer in module.buffers()]
        with torch.random.fork_rng(devices=list(devices)):
            self._running.append(self._start())
            output = None
            try:
                output = module.forward(*args, **kwargs)
            finally:
                self._leave(module, args, kwargs, output)
                for buffer, values in before:
                    buffer.copy_(values)

    def _parameters(self) -> dict[str, Tensor]:
        parameters = {}
        for projection in self.projections.values():
            parameters[projection.name] = projection.parameter
            if projection.bias_attribute is not None:
                owner = projection.bias_owner or projection.owner
                bias = getattr(owner, projection.bias_attribute)
                parameters[f"{projection.name} bias"] = bias
        return parameters

    def _around(self, projection: Projection) -> tuple[Callable[..., None], Callable[..., None]]:
        source = Source(projection.name, 0, _rows_of(projection), 1)

        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if self._trace is not None:
                input = next(iter((*args, *kwargs.values())), None)
                self._trace.enter_module(source, None, module, input)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if self._trace is not None:
                self._trace.leave_module(output)

        return eagerly(before), eagerly(after)

    def _roles_of(self, source: Source) -> list[tuple[Role, slice]]:
        roles: list[tuple[Role, slice]] = []
        for role, projection in self.projections.items():
            size = _rows_of(projection)
            start, stop, step = projection.rows.indices(size)
            if projection.name != source.name:
                continue
            if source[1:4] == (0, size, 1):
                roles.append((role, projection.rows))
            elif source[1:4] == (start, len(range(start, stop, step)), step):
                roles.append((role, slice(None)))
        return roles


def _rows_of(projection: Projection) -> int:
    """How many rows [out, in] the whole parameter has."""
    shape = projection.parameter.shape
    rows = shape[-1 if projection.transposed else -2]
    return rows * shape[0] if projection.flat else rows


def eagerly(hook: Callable[..., None]) -> Callable[..., None]:
    """A compiled model breaks its graph here, so that the hook sees tensors."""
    return OfOneModel(torch.compiler.disable(hook))  # type: ignore[no-untyped-call]


def _knowing(hook: Callable[..., None]) -> Callable[..., None]:
    """The same for a hook that is told first whether frames that start after it are compiled."""
    # Private: `torch.compiler.is_compiling` is about the frame that is being traced.
    set_callback = torch._C._dynamo.eval_frame.set_eval_frame

    def told(*args: Any) -> None:
        callback = set_callback(None)
        try:
            hook(callback not in (None, False), *args)
        finally:
            set_callback(callback)

    return OfOneModel(torch.compiler.disable(told, recursive=False))  # type: ignore[no-untyped-call]


class Leaving:
    """A handle: what Ctrl-C in a forward has left is undone. (torch calls hooks after a forward
    that failed, but not after one that was interrupted.)"""

    def __init__(self, leave: Callable[[], None]) -> None:
        self.remove = leave


def take_off(mode: TorchFunctionMode) -> None:
    """Take a mode off this thread's stack, wherever it lies there, if it does."""
    above: list[TorchFunctionMode] = []
    while torch._C._len_torch_function_stack():
        top = _pop_mode()  # type: ignore[no-untyped-call]
        if top is mode:
            break
        above.append(top)
    for other in reversed(above):
        _push_mode(other)  # type: ignore[no-untyped-call]


class _Forgetting:
    """A handle: what was compiled with hooks, or before there were any, is compiled anew. (Compiled
    code does not look whether a module's hooks are still the same.)"""

    def __init__(self) -> None:
        self.remove()

    def remove(self) -> None:
        if torch._dynamo.convert_frame.FRAME_COUNTER:
            torch.compiler.reset()
