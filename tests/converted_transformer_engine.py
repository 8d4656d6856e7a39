"""What the worker of `transformer_engine_on_cpu` does for the tests of `convert(backend="te")`.

TE's own Python decides what is cast when, in a model that fp8lab converted and in one that was
written with `te.Linear` by hand; the kernels are the stand-in's in both, so what is equal is equal
to the bit.
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIM, HIDDEN, TOKENS = 32, 48, 24
Made = Callable[[int, int], nn.Module]


class Layer(nn.Module):
    def __init__(self, linear: Made) -> None:
        super().__init__()
        self.gate, self.up = linear(DIM, HIDDEN), linear(DIM, HIDDEN)
        self.down = linear(HIDDEN, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Model(nn.Module):
    """Two feed-forwards and a head."""

    def __init__(self, linear: Made, head: Made) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(linear) for _ in range(2))
        self.head = head(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def _fresh() -> None:
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    FP8GlobalStateManager.reset()  # it would go on to move the scales of another model


def plain(dtype: torch.dtype, bias: bool = True) -> Model:
    if sys.modules.get("transformer_engine.pytorch") is not None:
        _fresh()
    torch.manual_seed(0)

    def linear(inputs: int, outputs: int) -> nn.Module:
        return nn.Linear(inputs, outputs, bias=bias, dtype=dtype)

    return Model(linear, linear)


def written(dtype: torch.dtype, bias: bool = True, wide_head: bool = False) -> Model:
    """The same by hand, with the same numbers in it."""
    import transformer_engine.pytorch as te

    model = plain(dtype, bias)

    def linear(inputs: int, outputs: int) -> nn.Module:
        return te.Linear(inputs, outputs, bias=bias, params_dtype=dtype, device="cpu")

    def head(inputs: int, outputs: int) -> nn.Module:
        return nn.Linear(inputs, outputs, bias=bias, dtype=dtype)

    made = Model(linear, head if wide_head else linear)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(model.get_parameter(name))
    return made


def _te_recipe(recipe: Any) -> Any:
    from fp8lab.plan import to_te

    return to_te(recipe)


def _batches(num_steps: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = [(1.0, 3.0, 20.0, 0.1)[step % 4] for step in range(num_steps)]
    return [(s * torch.randn(TOKENS, DIM, generator=generator)).to(dtype) for s in sizes]


def trained(
    by: str,
    recipe: Any,
    num_steps: int,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    wide_head: bool = False,
    accumulate: int = 1,
    recompute: bool = False,
    path: str | None = None,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses and final parameters of AdamW steps of `accumulate` micro-batches, the optimizer made
    before the conversion. `by`: "convert", or "hand", where TE's own autocast is around a step, or
    "both".
    `recompute`: the second feed-forward runs in TE's checkpoint."""
    import transformer_engine.pytorch as te

    import fp8lab

    model = written(dtype, bias, wide_head) if by == "hand" else plain(dtype, bias)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    region: Callable[[], Any] = contextlib.nullcontext
    if by != "hand":
        exclude = ["head"] if wide_head else []
        fp8lab.convert(model, recipe, exclude=exclude, backend="te")
        region = fp8lab.autocast if accumulate > 1 else region
    if by != "convert":
        theirs = _te_recipe(recipe)

        def region() -> Any:
            return te.autocast(enabled=True, recipe=theirs)

    losses = []
    with contextlib.ExitStack() as stack:
        watch = (
            stack.enter_context(fp8lab.watch(model, path, optimizer=optimizer)) if path else None
        )
        batches = iter(_batches(num_steps * accumulate, dtype))
        for step in range(num_steps):
            with region():
                total = sum(model(next(batches)).float().square().mean() for _ in range(accumulate))
            total.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total.detach())
            if watch:
                watch.step(step, loss=total)
    return losses, {name: value.detach() for name, value in model.named_parameters()}


def said_when_refused(convert: dict[str, Any], change: str = "") -> tuple[str, bool]:
    """The error of a conversion, and whether the model is what it was."""
    import transformer_engine.pytorch as te

    import fp8lab

    model: nn.Module = plain(torch.float32)
    changes: dict[str, Callable[[], Any]] = {
        "odd": lambda: setattr(model, "head", nn.Linear(DIM, 40)),
        "thirds": lambda: setattr(model, "head", nn.Linear(DIM, 48)),
        "double": model.double,
    }
    if change in changes:
        changes[change]()
    worlds: dict[str, Any] = {
        "cpu": (torch.Tensor, "is_cuda", False),
        "no gpu": (torch.cuda, "is_available", lambda: False),
        "old gpu": (te, "is_fp8_available", lambda **_: (False, "in words of TE")),
    }
    before = _described(model)
    with contextlib.ExitStack() as stack:
        if change in worlds:
            stack.enter_context(mock.patch.object(*worlds[change]))
        try:
            fp8lab.convert(model, backend="te", **convert)
        except Exception as error:
            return f"{type(error).__name__}: {error}", _described(model) == before
    return "", False


def _described(model: nn.Module) -> list[Any]:
    return [
        (name, type(module), sorted(vars(module)), len(module._forward_hooks))
        for name, module in model.named_modules()
    ]


@contextlib.contextmanager
def _errors(said: list[str]) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        said.append(str(error))


def said_of_layers_without_fp8() -> list[str]:
    """What is said where a converted layer would run without FP8, or under another recipe."""
    import transformer_engine.common.recipe as recipes
    import transformer_engine.pytorch as te
    from torch.utils.checkpoint import checkpoint

    import fp8lab

    said: list[str] = []
    for how in ("disabled", "other", "alone", "replaced", "repeated"):
        model, x = plain(torch.float32), torch.ones(TOKENS, DIM)
        inner = model.layers[1].forward
        if how == "disabled":
            region = te.autocast(enabled=False)
        elif how == "other":
            region = te.autocast(enabled=True, recipe=recipes.Float8CurrentScaling())
        if how in ("disabled", "other"):

            def within(x: Tensor, inner: Any = inner, region: Any = region) -> Tensor:
                with region:
                    return inner(x)

            model.layers[1].forward = within
        if how == "repeated":

            def again(x: Tensor, inner: Any = inner) -> Tensor:
                return checkpoint(inner, x, use_reentrant=False)

            model.layers[1].forward = again
        fp8lab.convert(model, fp8lab.DelayedScaling(), backend="te")
        if how == "replaced":
            model.layers[1].up = nn.Linear(DIM, HIDDEN)
        with _errors(said):
            if how == "alone":
                model.layers[0](x)
            else:
                model(x.requires_grad_()).sum().backward()
    return said


def said_of_a_repeated_model(recipe: Any) -> list[str]:
    """What is said where the whole converted model is in a checkpoint, of torch in both ways and of
    TE, and where TE's own autocast is around that; "equal" where gradients are those without."""
    import transformer_engine.pytorch as te
    from torch.utils.checkpoint import checkpoint

    import fp8lab

    ways: list[Callable[[nn.Module, Tensor], Tensor]] = [
        lambda model, x: model(x),
        lambda model, x: checkpoint(model, x, use_reentrant=False),
        lambda model, x: checkpoint(model, x, use_reentrant=True),
        lambda model, x: te.checkpoint(model, x),
        lambda model, x: _within(te.autocast(recipe=theirs), te.checkpoint, model, x),
    ]
    theirs, said, expected = _te_recipe(recipe), [], []
    for way in ways:
        model, gradients = plain(torch.float32), []
        fp8lab.convert(model, recipe, backend="te")
        try:
            for x in _batches(3, torch.float32):
                way(model, x.requires_grad_()).square().sum().backward()
                gradients += [parameter.grad.clone() for parameter in model.parameters()]
                model.zero_grad()
        except RuntimeError as error:
            said.append(str(error))
            continue
        expected = expected or gradients
        same = all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
        said.append("equal" if same else "other gradients")
    return said[1:]


def _within(region: Any, call: Callable[..., Tensor], *args: Any) -> Tensor:
    with region:
        return call(*args)


def said_of_two_recipes() -> list[str]:
    """Of a second conversion of one model: the same recipe, others; and of another one's part."""
    import fp8lab

    delayed, said = fp8lab.DelayedScaling(), []
    others = [delayed, fp8lab.Float8CurrentScaling(), fp8lab.DelayedScaling(margin=1)]
    for other in others:
        model = plain(torch.float32)
        fp8lab.convert(model, delayed, include=["layers.0.*"], backend="te")
        try:
            fp8lab.convert(model, other, include=["layers.1.*"], backend="te")
            model(torch.ones(TOKENS, DIM)).sum().backward()
            said.append("ran")
        except ValueError as error:
            said.append(f"{error} {type(model.layers[1].up).__name__}")
    model = plain(torch.float32)
    for layer, recipe in zip(model.layers, others[:2], strict=True):
        fp8lab.convert(layer, recipe, backend="te")
    model(torch.ones(TOKENS, DIM)).sum().backward()
    return said


def kept_by_conversion() -> dict[str, bool]:
    """What the conversion leaves: hooks, references, parameters, the state of another life."""
    import transformer_engine.pytorch as te

    import fp8lab

    model = plain(torch.float32, bias=False)
    before, calls = copy.deepcopy(model.state_dict()), []
    down, parameters = model.layers[0].down, list(model.parameters())
    down.register_forward_hook(lambda *_: calls.append("forward"))
    down.weight.register_hook(lambda _: calls.append("gradient"))
    rng = torch.get_rng_state()
    model.eval()
    converted = fp8lab.convert(model, fp8lab.DelayedScaling(), exclude=["head"], backend="te")
    calls.clear()  # the search for gates runs the layers
    same_rng = torch.equal(torch.get_rng_state(), rng)
    model(torch.ones(TOKENS, DIM)).sum().backward()
    copied = copy.deepcopy(model)
    copied(torch.ones(TOKENS, DIM)).sum().backward()
    # TE waits for its GPU, and reads a pickle of its own only if told that it may.
    may = mock.patch.dict(os.environ, NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE="1")
    with may, mock.patch.object(torch.cuda, "synchronize"):
        own = model.load_state_dict(model.state_dict())
    return {
        "the model itself": converted is model,
        "references": model.layers[0].down is down and isinstance(down, te.Linear),
        "parameters": all(a is b for a, b in zip(parameters, model.parameters(), strict=True)),
        "hooks": calls == ["forward", "gradient", "forward"],
        "excluded": type(model.head) is nn.Linear,
        "mode": not down.training,
        "random numbers": same_rng,
        "old checkpoint": str(model.load_state_dict(before)) == "<All keys matched successfully>",
        "own checkpoint": str(own) == "<All keys matched successfully>",
        "name": down.name == "layers.0.down",
    }


def watched(kind: str, recipe: Any, path: str, declared: Any) -> None:
    """Two recorded steps of a model of TE's modules that nobody converted, each after an evaluation
    under the other precision; `declared` stands in the run's config."""
    import transformer_engine.pytorch as te
    import watched_transformer_engine as modules

    import fp8lab
    from fp8lab.plan import recipe_to_dict

    mlp = {
        "LayerNormMLP": lambda: modules.layernorm_mlp(modules.APART, torch.bfloat16),
        "te.ops": lambda: modules.operations({}, torch.bfloat16),
        "own": lambda: modules.OwnGate(torch.bfloat16),
        "fused": lambda: modules.OwnFusedGate(torch.bfloat16),
    }[kind]()
    model, config = nn.ModuleDict({"mlp": mlp}), {"recipe": recipe_to_dict(declared)}
    theirs = None if recipe is None else _te_recipe(recipe)
    with fp8lab.watch(model, path, every=1, config=config) as watch:
        for step in range(2):
            x = torch.randn(TOKENS, DIM, dtype=torch.bfloat16, requires_grad=True)
            if kind != "fused":
                other = _te_recipe(declared) if recipe is None else None
                with torch.no_grad(), te.autocast(enabled=other is not None, recipe=other):
                    mlp(x)
            with te.autocast(enabled=theirs is not None, recipe=theirs):
                output = mlp(x)
            output = output[0] if isinstance(output, tuple) else output
            output.sum().backward()
            watch.step(step)


def read_in_the_middle(recipe: Any, path: str) -> dict[str, Any]:
    """What run.json says after the first step of a run that is not over."""
    import transformer_engine.pytorch as te
    import watched_transformer_engine as modules

    import fp8lab

    model = nn.ModuleDict({"mlp": modules.OwnGate(torch.bfloat16)})
    with fp8lab.watch(model, path, every=1) as watch:
        with te.autocast(enabled=True, recipe=_te_recipe(recipe)):
            output = model["mlp"](torch.randn(TOKENS, DIM, dtype=torch.bfloat16))
        output.sum().backward()
        watch.step(0)
        return dict(fp8lab.open_run(path).info)


def warmed_up(path: str, is_fp8: list[bool]) -> None:
    """Steps of TE's own layers, every second one recorded, of which some are in FP8."""
    import transformer_engine.pytorch as te
    import watched_transformer_engine as modules

    import fp8lab

    _fresh()
    model = nn.ModuleDict({"mlp": modules.OwnGate(torch.bfloat16)})
    recipe = _te_recipe(fp8lab.DelayedScaling())
    with fp8lab.watch(model, path, every=2) as watch:
        for step, enabled in enumerate(is_fp8):
            with te.autocast(enabled=enabled, recipe=recipe):
                output = model["mlp"](torch.randn(TOKENS, DIM, dtype=torch.bfloat16))
            output.sum().backward()
            watch.step(step)


def read_and_not_run(path: str) -> list[list[Any]]:
    """A layer of TE's whose weight alone is used, one that runs, and one that is frozen."""
    import transformer_engine.pytorch as te
    import watched_transformer_engine as modules

    import fp8lab

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = modules.OwnGate(torch.bfloat16)
            self.read, self.runs, self.frozen = (
                te.Linear(DIM, DIM, bias=False, params_dtype=torch.bfloat16, device="cpu")
                for _ in range(3)
            )
            self.frozen.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.linear(x, self.frozen.weight) + self.mlp(x)
            return self.runs(x) + nn.functional.linear(x, self.read.weight)

    _fresh()
    model = Reads()
    with warnings.catch_warnings(record=True), fp8lab.watch(model, path, every=1) as watch:
        warnings.simplefilter("always")
        for step in range(2):
            model(torch.randn(TOKENS, DIM, dtype=torch.bfloat16)).sum().backward()
            watch.step(step)
    assert not any(parameter._backward_hooks for parameter in model.parameters())
    events = fp8lab.open_run(path).events()
    return events[["step", "kind", "site"]].values.tolist()  # type: ignore[no-any-return]


def of_two_processes(folder: str, is_fp8: list[bool]) -> tuple[list[list[Any]], list[str]]:
    """Events of the second of two processes that only a store joins, and what it was warned of:
    each runs TE's layers in FP8 or not, and both record the same run."""
    import transformer_engine.pytorch as te
    import watched_transformer_engine as modules

    import fp8lab
    from fp8lab import agreement

    store, rank_of, times = agreement._store, agreement.rank_of, agreement._times
    shared, place = torch.distributed.HashStore(), Path.cwd()
    said: list[str] = []
    try:
        for rank, enabled in enumerate(is_fp8):
            _fresh()
            agreement._store = lambda: shared
            agreement.rank_of = lambda rank=rank: rank  # type: ignore[misc]
            agreement._times = type(times)()
            Path(folder, str(rank)).mkdir()
            os.chdir(Path(folder, str(rank)))
            model = nn.ModuleDict({"mlp": modules.OwnGate(torch.bfloat16)})
            recipe = _te_recipe(fp8lab.DelayedScaling())
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                with fp8lab.watch(model, "run", every=1) as watch:
                    for step in range(2):
                        with te.autocast(enabled=enabled, recipe=recipe):
                            x = torch.randn(TOKENS, DIM, dtype=torch.bfloat16)
                            output = model["mlp"](x)
                        output.sum().backward()
                        watch.step(step)
            said = [str(one.message) for one in warned]
        events = fp8lab.open_run("run").events()
        return events[["step", "kind", "site", "detail"]].values.tolist(), said
    finally:
        agreement._store, agreement.rank_of, agreement._times = store, rank_of, times
        os.chdir(place)


def words_of_converted(recipe: Any) -> dict[str, dict[str, str]]:
    """What a process whose model was converted to TE's layers tells the others."""
    import fp8lab
    from fp8lab.monitor.precision import in_full

    _fresh()
    return in_full(fp8lab.convert(plain(torch.bfloat16), recipe, backend="te"))
