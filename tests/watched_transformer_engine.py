"""What the worker of `transformer_engine_on_cpu` does for the tests of watching TE's modules.

fp8lab and TE's Python run side by side in that process. The oracle is what the stand-in's kernels
were called with and what they returned, written down at the moment of the call (`Kernels`), or what
TE's own debug features were handed; fp8lab has no part in either.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIM, HIDDEN, TOKENS = 32, 48, 24
MLP = {
    "hidden_size": DIM,
    "ffn_hidden_size": HIDDEN,
    "bias": False,
    "normalization": "RMSNorm",
    "activation": "swiglu",
}
# The stand-in has no norm fused with a cast under current scaling; this setting parts the two.
APART = {"return_layernorm_output": True}


# --- what the tests ask ------------------------------------------------------------------------


class Seen:
    """A receiver that keeps copies, and how the product was cast."""

    def __init__(self, roles: tuple[str, ...] = ("gate", "up", "product", "output")) -> None:
        self.roles = roles
        self.site: Any = None
        self.steps: list[dict[str, Any]] = []
        self.order: list[str] = []
        self.evaluates = False  # else every forward counts as training, as a watch sees it

    def wants(self, module: nn.Module, role: str) -> bool:
        return role in self.roles and torch._C._current_graph_task_id() == -1

    def sees(self, module: nn.Module, role: str, tensor: Tensor) -> None:
        from fp8lab.sites import te_casts

        if not self.steps or role in self.steps[-1]:
            self.steps.append({})
        self.order.append(role)
        seen = self.steps[-1]
        seen[role] = tensor.detach().clone()
        assert torch.is_grad_enabled() or not torch._C._is_fwd_grad_enabled() or self.evaluates
        if role == "product":
            how = te_casts.cast_in_force(self.site.down.module, "input", tensor)
            if how is not None:
                seen["cast"] = type(how.recipe).__name__, how.format.name
                seen["scale"] = how.scale.clone()
                seen["dequantized"] = how.fake_quantized()
            known = te_casts.amax_and_scale(self.site.down.module)
            if known is not None:
                seen["amax in TE"], seen["scale in TE"] = (value.clone() for value in known)


class Kernels:
    """Writes down each call of the activation kernel: what came in, and what went out."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def written_down(self, name: str) -> Iterator[None]:
        extension = sys.modules["transformer_engine_torch"]
        original = getattr(extension, name)

        def kernel(both: Tensor, quantizer: Any = None, *parameters: Any, **others: Any) -> Any:
            made = original(both, quantizer, *parameters, **others)
            if torch._C._current_graph_task_id() == -1:
                call: dict[str, Any] = {"both": both.clone()}
                if hasattr(made, "_data"):
                    codes = made._data.view(torch.float8_e4m3fn).float()
                    call |= {"product": codes * made._scale_inv, "scale_inv": made._scale_inv}
                else:
                    call["product"] = made.clone()
                self.calls.append(call)
            return made

        setattr(extension, name, kernel)
        try:
            yield
        finally:
            setattr(extension, name, original)


def _recipe(recipe: tuple[str, dict[str, Any]] | None) -> Any:
    import transformer_engine.common.recipe as recipes

    return None if recipe is None else getattr(recipes, recipe[0])(**recipe[1])


def _fresh() -> None:
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    FP8GlobalStateManager.reset()
    torch.manual_seed(0)


def layernorm_mlp(settings: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    import transformer_engine.pytorch as te

    _fresh()
    return te.LayerNormMLP(**MLP | settings, params_dtype=dtype, device="cpu")


def operations(settings: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    import transformer_engine.pytorch.ops as ops

    _fresh()
    made = {"bias": False, "device": "cpu", "dtype": dtype} | settings
    return ops.Sequential(
        ops.Linear(DIM, 2 * HIDDEN, **made), ops.SwiGLU(), ops.Linear(HIDDEN, DIM, **made)
    )


class OwnGate(nn.Module):
    """A gated feed-forward that a user wrote between TE's linear layers."""

    def __init__(self, dtype: torch.dtype) -> None:
        import transformer_engine.pytorch as te

        super().__init__()
        made = {"bias": False, "params_dtype": dtype, "device": "cpu"}
        self.one = te.Linear(DIM, HIDDEN, **made)
        self.two = te.Linear(DIM, HIDDEN, **made)
        self.three = te.Linear(HIDDEN, DIM, **made)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(F.silu(self.two(x)) * self.one(x))


class OwnFusedGate(nn.Module):
    """The same with a norm and both halves in the first layer, and biases."""

    def __init__(self, dtype: torch.dtype) -> None:
        import transformer_engine.pytorch as te

        super().__init__()
        made = {"params_dtype": dtype, "device": "cpu"}
        self.both = te.LayerNormLinear(DIM, 2 * HIDDEN, normalization="RMSNorm", **made)
        self.last = te.Linear(HIDDEN, DIM, **made)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.both(x).chunk(2, dim=-1)
        return self.last(up * F.silu(gate))


def roles_of(kind: str) -> dict[str, Any]:
    """What find_gates says of a user's gate, or of one of TE, and whether it left a trace."""
    from fp8lab.sites import find_gates

    _fresh()
    model = {
        "own": lambda: OwnGate(torch.bfloat16),
        "own, fused": lambda: OwnFusedGate(torch.bfloat16),
        "LayerNormMLP": lambda: layernorm_mlp({"bias": True}, torch.bfloat16),
        "te.ops": lambda: operations({"bias": True}, torch.bfloat16),
    }[kind]()
    before = _traces(model)
    (site,) = find_gates(nn.ModuleDict({"layer": model}))
    shown = {"name": site.name, "activation": site.activation, "left": _traces(model) == before}
    for role in ("gate", "up", "down"):
        projection = getattr(site, role)
        bias = projection.bias
        shown[role] = projection.name, projection.rows.start, tuple(projection.weight.shape)
        has_bias = bias is not None and bias.numel() > 0  # TE has an empty one for none
        shown[f"{role} bias"] = tuple(bias.shape) if has_bias else None
    return shown


def casts_of_linear(
    recipe: tuple[str, dict[str, Any]], num_steps: int
) -> list[tuple[Tensor, Tensor]]:
    """A te.Linear's input as `cast_in_force` says before the forward, and as TE's GEMM gets it."""
    import transformer_engine.pytorch as te

    from fp8lab.sites import te_casts

    _fresh()
    layer = te.Linear(DIM, DIM, bias=False, params_dtype=torch.bfloat16, device="cpu")
    said: list[Tensor] = []
    done: list[Tensor] = []

    def before(module: nn.Module, args: Any) -> None:
        how = te_casts.cast_in_force(module, "input", args[0])
        assert how is not None
        said.append(how.fake_quantized())

    layer.register_forward_pre_hook(before)
    extension = sys.modules["transformer_engine_torch"]
    original = extension.generic_gemm

    def gemm(a: Any, transpose_a: Any, b: Any, *args: Any, **kwargs: Any) -> Any:
        if transpose_a:
            done.append(b._data.view(torch.float8_e4m3fn).float() * b._scale_inv)
        return original(a, transpose_a, b, *args, **kwargs)

    extension.generic_gemm = gemm
    try:
        for step in range(num_steps):
            x = (4.0**step * torch.randn(TOKENS, DIM)).bfloat16()
            with te.autocast(enabled=True, recipe=_recipe(recipe)):
                output = layer(x.requires_grad_())
            output.backward(torch.ones_like(output))
    finally:
        extension.generic_gemm = original
    return list(zip(said, done, strict=True))


# --- training, watched and not -----------------------------------------------------------------

Wrap = Callable[[nn.Module, Tensor], Any]


def plainly(module: nn.Module, x: Tensor) -> Any:
    return module(x)


def reentrant(module: nn.Module, x: Tensor) -> Any:
    return torch.utils.checkpoint.checkpoint(module, x, use_reentrant=True)


def not_reentrant(module: nn.Module, x: Tensor) -> Any:
    return torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)


def reentrant_of_te(module: nn.Module, x: Tensor) -> Any:
    import transformer_engine.pytorch as te

    return te.checkpoint(module, x, use_reentrant=True)


def not_reentrant_of_te(module: nn.Module, x: Tensor) -> Any:
    import transformer_engine.pytorch as te

    return te.checkpoint(module, x, use_reentrant=False)


def offloaded(module: nn.Module, x: Tensor) -> Any:
    with torch.autograd.graph.save_on_cpu():
        return module(x)


def by_name(module: nn.Module, x: Tensor) -> Any:
    return module(inp=x)


def without_gradients(module: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        return module(x)


def train(
    build: Callable[..., nn.Module],
    settings: dict[str, Any],
    dtype: torch.dtype,
    recipe: tuple[str, dict[str, Any]] | None,
    num_steps: int,
    watched: bool,
    wrap: Wrap = plainly,
    kernel: str = "swiglu",
    roles: tuple[str, ...] = ("gate", "up", "product", "output"),
    backward: bool = True,
) -> dict[str, Any]:
    """Steps of SGD with batches whose size grows and falls; what was seen, and what was left."""
    import transformer_engine.pytorch as te

    from fp8lab.sites import te_modules

    chosen = _recipe(recipe)
    model = build(settings, dtype)
    generator = torch.Generator().manual_seed(1)
    receiver, kernels = Seen(roles), Kernels()
    before = _traces(model)
    handles: list[Any] = []
    receiver.evaluates = wrap is without_gradients
    if watched:
        receiver.site = te_modules.identify("mlp", model)
        handles = te_modules.attach(receiver.site, receiver)
    outputs = []
    for step in range(num_steps):
        size = (1.0, 3.0, 20.0, 0.1)[step % 4]
        x = (size * torch.randn(TOKENS, DIM, generator=generator)).to(dtype)
        x[3, 5] *= 10
        gradient = torch.randn(TOKENS, DIM, generator=generator).to(dtype)
        with kernels.written_down(kernel):
            with te.autocast(enabled=chosen is not None, recipe=chosen):
                output = wrap(model, x.requires_grad_())
            output = output[0] if isinstance(output, tuple) else output
            outputs.append(output.detach().clone())
            if output.requires_grad and backward:
                output.backward(gradient)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.01 * parameter.grad)
        model.zero_grad(set_to_none=True)
    for handle in handles:
        handle.remove()
    return {
        "seen": receiver.steps,
        "order": receiver.order,
        "kernel": kernels.calls,
        "outputs": outputs,
        "parameters": {name: value.detach() for name, value in model.named_parameters()},
        "left": _traces(model) == before,
    }


def _traces(model: nn.Module) -> list[Any]:
    """Everything by which a watch could be noticed: hooks, attributes, the lookup it may wrap."""
    import transformer_engine.pytorch.module.layernorm_mlp as home

    traces: list[Any] = [home._act_func]
    for module in model.modules():
        hooks = [name for name in vars(module) if name.endswith("hooks")]
        traces += [len(vars(module)[name]) for name in hooks]
        traces += [name for name in ("forward", "op_forward") if name in vars(module)]
    return traces


def failing(build: Callable[..., nn.Module], checkpoint: bool) -> tuple[bool, bool]:
    """Whether everything is gone after a forward that fails in its middle, before and after the
    handles are removed."""
    import transformer_engine.pytorch.module.layernorm_mlp as home

    from fp8lab.sites import te_modules

    model = build({"checkpoint": True} if checkpoint else {}, torch.bfloat16)
    before, lookup = _traces(model), home._act_func
    receiver = Seen()
    receiver.site = te_modules.identify("mlp", model)
    handles = te_modules.attach(receiver.site, receiver)
    extension = sys.modules["transformer_engine_torch"]
    original = extension.swiglu

    def broken(*_args: Any, **_kwargs: Any) -> None:
        raise ArithmeticError("the kernel")

    extension.swiglu = broken
    try:
        model(torch.randn(TOKENS, DIM).bfloat16())
    except ArithmeticError:
        in_between = home._act_func is lookup
    finally:
        extension.swiglu = original
    for handle in handles:
        handle.remove()
    return in_between, _traces(model) == before


def warnings_of(activation: str) -> tuple[list[str], list[str]]:
    """Warnings and roles of three forwards without gradients."""
    from fp8lab.sites import te_modules

    model = layernorm_mlp({"activation": activation}, torch.bfloat16)
    receiver = Seen()
    receiver.site, receiver.evaluates = te_modules.identify("mlp", model), True
    handles = te_modules.attach(receiver.site, receiver)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for _ in range(3):
            model(torch.randn(TOKENS, DIM).bfloat16())
    for handle in handles:
        handle.remove()
    return [str(warning.message) for warning in caught], receiver.order


def refused(
    build: Callable[..., nn.Module], recipe: tuple[str, dict[str, Any]] | None
) -> tuple[list[str], list[str]]:
    """Warnings and roles of three forwards if TE's kernel took the second half for the gate."""
    import transformer_engine.pytorch as te

    from fp8lab.sites import te_modules

    model = build(APART if build is layernorm_mlp else {}, torch.bfloat16)
    receiver, chosen = Seen(), _recipe(recipe)
    receiver.site = te_modules.identify("mlp", model)
    handles = te_modules.attach(receiver.site, receiver)
    extension = sys.modules["transformer_engine_torch"]
    original = extension.swiglu

    def swapped(both: Tensor, quantizer: Any = None) -> Any:
        return original(torch.cat(both.chunk(2, dim=-1)[::-1], dim=-1), quantizer)

    extension.swiglu = swapped
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                with te.autocast(enabled=chosen is not None, recipe=chosen):
                    model((torch.randn(TOKENS, DIM)).bfloat16().requires_grad_())
    finally:
        extension.swiglu = original
    for handle in handles:
        handle.remove()
    return [str(warning.message) for warning in caught], receiver.order


def sites_around(build: Callable[..., nn.Module]) -> list[list[str]]:
    """The sites found in a feed-forward of TE, and in modules that hold it, near and far."""
    from fp8lab.sites import survey

    _fresh()
    part = build({}, torch.bfloat16)
    near = nn.Sequential(part)
    models = part, near, nn.Sequential(near), nn.ModuleDict({"mlp": part})
    return [[site.name for site in survey(model).gates] for model in models]


def two_watches(build: Callable[..., nn.Module]) -> tuple[list[int], bool]:
    """Two receivers on one module, removed in the order in which they came."""
    from fp8lab.sites import te_modules

    model = build({}, torch.bfloat16)
    before = _traces(model)
    receivers = [Seen(), Seen()]
    handles = []
    for receiver in receivers:
        receiver.evaluates = True
        receiver.site = te_modules.identify("mlp", model)
        handles.append(te_modules.attach(receiver.site, receiver))
    counts = []
    for ending in (*handles, []):
        with torch.no_grad():
            model(torch.randn(TOKENS, DIM).bfloat16())
        counts.append(sum(len(receiver.steps) for receiver in receivers))
        for handle in ending:
            handle.remove()
    return counts, _traces(model) == before


# --- TE's debug features -----------------------------------------------------------------------


class Rows:
    """A sink that keeps copies."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, str, Tensor, Any]] = []
        self.step = 0

    def see(self, site: str, tensor: Tensor, how: Any = None) -> None:
        cast = None
        if how is not None:
            cast = type(how.recipe).__name__, how.format.name, how.fake_quantized()
        self.rows.append((self.step, site, tensor.clone(), cast))


def _raw_tensors(kept: list[tuple[int, str, str, Tensor, Tensor | None]]) -> None:
    """Another feature, of the tests' own: what TE hands to features, and what its cast made."""
    from nvdlfw_inspect.registry import Registry, api_method
    from transformer_engine.debug.features.api import TEConfigAPIMapper

    class RawTensors(TEConfigAPIMapper):
        @api_method
        def inspect_tensor_enabled(self, config: Any, *_: Any, **__: Any) -> tuple[bool, int]:
            return True, 0

        @api_method
        def inspect_tensor(
            self,
            config: Any,
            layer_name: str,
            tensor_name: str,
            iteration: int,
            tp_group: Any,
            tensor: Tensor,
            rowwise_quantized_tensor: Any = None,
            columnwise_quantized_tensor: Any = None,
            quantizer: Any = None,
            tp_size: int = 1,
        ) -> None:
            codes = getattr(rowwise_quantized_tensor, "_data", None)
            cast = None
            if codes is not None:
                is_gradient = tensor_name == "gradient"
                code = torch.float8_e5m2 if is_gradient else torch.float8_e4m3fn
                cast = codes.view(code).float() * rowwise_quantized_tensor._scale_inv
            kept.append((iteration, layer_name, tensor_name, tensor.clone(), cast))

    Registry.data["transformer_engine"].deferred_features.append(RawTensors)


def _block(checkpoint: bool = False) -> tuple[nn.Module, nn.Module, nn.ModuleDict]:
    """A LayerNormMLP and a Linear that TE knows by other names than the model."""
    import transformer_engine.pytorch as te

    _fresh()
    made = {"params_dtype": torch.bfloat16, "device": "cpu"}
    mlp = te.LayerNormMLP(**MLP, **made, checkpoint=checkpoint, name="block.mlp")
    head = te.Linear(DIM, DIM, bias=False, **made, name="the_head")
    return mlp, head, nn.ModuleDict({"layer": nn.ModuleDict({"mlp": mlp}), "head": head})


def fed(
    yaml: str | None,
    log_dir: str,
    recipe: tuple[str, dict[str, Any]] | None,
    num_steps: int,
    evaluate: bool = False,
    checkpoint: bool = False,
    run: str | None = None,
) -> dict[str, Any]:
    """A LayerNormMLP and a Linear, trained with TE's debug features, or without them; fed into a
    watch if there is a `run`."""
    import nvdlfw_inspect.api as api
    import transformer_engine.pytorch as te
    from transformer_engine.debug.pytorch.debug_state import TEDebugState

    import fp8lab
    from fp8lab.integrations import transformer_engine as integration

    TEDebugState._reset()  # as in a process whose first layer of TE comes now
    raw: list[Any] = []
    if yaml is not None:
        integration.register()
        _raw_tensors(raw)
        api.initialize(config_file=yaml, feature_dirs=integration.feature_dirs(), log_dir=log_dir)
    try:
        mlp, head, model = _block(checkpoint)
        sink, outputs, chosen = Rows(), [], _recipe(recipe)
        generator = torch.Generator().manual_seed(1)
        with contextlib.ExitStack() as stack:
            watch = stack.enter_context(fp8lab.watch(model, run, every=1)) if run else None
            stack.enter_context(integration.feeding(watch or sink, model))
            for step in range(num_steps):
                x = torch.randn(TOKENS, DIM, generator=generator).bfloat16()
                with te.autocast(enabled=chosen is not None, recipe=chosen):
                    output = head(mlp(x.requires_grad_()))
                    if evaluate:
                        with torch.no_grad():
                            head(mlp(x))
                output.backward(torch.ones_like(output))
                outputs.append(output.detach().clone())
                if watch is not None:
                    watch.step(step)
                api.step()
                sink.step += 1
    finally:
        api.end_debug()
        TEDebugState._reset()
    return {"rows": sink.rows, "raw": raw, "outputs": outputs}


def hooked_like_fed() -> dict[str, Any]:
    """The first step of `fed` without TE's debug features, seen by hooks."""
    from fp8lab.sites import te_modules

    mlp, _, _ = _block()
    receiver = Seen()
    receiver.site = te_modules.identify("mlp", mlp)
    handles = te_modules.attach(receiver.site, receiver)
    generator = torch.Generator().manual_seed(1)
    mlp(torch.randn(TOKENS, DIM, generator=generator).bfloat16().requires_grad_())
    for handle in handles:
        handle.remove()
    return receiver.steps[0]


# --- a watch -----------------------------------------------------------------------------------


def watched_run(
    kind: str, path: str | None, recipe: tuple[str, dict[str, Any]] | None, num_steps: int
) -> tuple[dict[str, Tensor], list[tuple[float, float]]]:
    """Parameters after training under `fp8lab.watch`, or without it where there is no path; and of
    each step the amax that TE wrote down of the product, and the scale that it used."""
    import transformer_engine.pytorch as te

    import fp8lab
    from fp8lab.sites import te_casts

    _fresh()
    part: nn.Module = {
        "LayerNormMLP": lambda: layernorm_mlp(APART, torch.bfloat16),
        "te.ops": lambda: operations({}, torch.bfloat16),
        "own": lambda: OwnGate(torch.bfloat16),
    }[kind]()
    model = nn.ModuleDict({"mlp": part})
    before, optimizer = _traces(model), torch.optim.SGD(model.parameters(), lr=1e-3)
    casting = {"LayerNormMLP": lambda: part, "te.ops": lambda: part[2].basic_ops[0]}
    casting["own"] = lambda: part.three
    noted: list[tuple[float, float]] = []

    def note(*_: Any) -> None:
        known = te_casts.amax_and_scale(casting[kind]())
        if known is not None:
            noted.append((known[0].item(), known[1].item()))

    chosen = _recipe(recipe)
    generator = torch.Generator().manual_seed(1)
    with contextlib.ExitStack() as stack:
        watch = None
        if path is not None:
            watch = stack.enter_context(fp8lab.watch(model, path, optimizer=optimizer, every=2))
        for step in range(num_steps):
            x = torch.randn(TOKENS, DIM, generator=generator).bfloat16() * (1 + step % 3)
            with te.autocast(enabled=chosen is not None, recipe=chosen):
                output = part(x.requires_grad_())
                note()
            output = output[0] if isinstance(output, tuple) else output
            output.float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if watch is not None:
                watch.step(step, loss=output.float().mean())
    assert _traces(model) == before
    return {name: value.detach() for name, value in model.named_parameters()}, noted
