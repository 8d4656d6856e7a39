"""Emulated against Transformer Engine: codes, scales and histories of its kernels, byte by byte.

Three tables. TE's quantizers against `fp8lab.quantize` on tensors that are chosen to tell rounding,
saturation, zeros, subnormals, infinity and NaN apart: the count of bytes and of scales that differ.
A `te.Linear` under delayed scaling against a converted layer for many steps: the entries of scales
and histories that differ. A step of `te.Linear` and `te.LayerNormMLP`: the codes that entered TE's
GEMMs, read from its graph, against ours, and how far outputs and gradients are apart, for cuBLAS
does not sum in the order of an FP32 GEMM on dequantised operands.

A NaN is a NaN whatever its sign: TE and torch agree on the place and not on the bit.
Rejected: random normal tensors alone, which no wrong rule of saturation would be caught on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import engine
import torch
import torch.nn.functional as F
from suite import Page, Setting
from torch import Tensor, nn

from fp8lab import (
    DelayedScaling,
    Float8BlockScaling,
    Float8CurrentScaling,
    GatedFeedForward,
    convert,
    formats,
    quantize,
)
from fp8lab.recipe import Operand, Recipe
from fp8lab.scaling import absolute_maximum

TITLE = "Emulated against Transformer Engine, byte by byte"
ROWS, COLUMNS = 256, 512
# The operand that has the format under HYBRID, TE's dtype, torch's.
FORMATS: dict[str, tuple[Operand, str, torch.dtype]] = {
    "E4M3": ("input", "kFloat8E4M3", torch.float8_e4m3fn),
    "E5M2": ("grad_output", "kFloat8E5M2", torch.float8_e5m2),
}
DTYPES = {"BF16": torch.bfloat16, "FP32": torch.float32}


def run(setting: Setting, page: Page) -> None:
    """The tables of this part."""
    te = engine.load(setting.rehearsal)
    table = page.table(
        f"TE's quantizers and fp8lab.quantize, {len(tensors('cpu'))} tensors of {ROWS} × {COLUMNS}",
        *("recipe, format, input", "bytes", "differing bytes", "scales", "differing scales"),
        "the first tensor that differs",
    )
    for name, compare in quantizers(te, setting.device):
        table.attempt(name, compare)
    steps = setting.pick(200, 5)
    table = page.table(
        f"te.Linear and a converted layer under delayed scaling, {steps} steps",
        *("recipe", "scales", "differing", "history entries", "differing"),
    )
    for name, ours, theirs in histories():
        table.attempt(name, lambda o=ours, t=theirs: history(te, setting, steps, o, t))
    modules(te, setting, page)


def tensors(device: str) -> dict[str, Tensor]:
    """float32 [ROWS, COLUMNS] each; cast to a narrower dtype they stay what they are for."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(ROWS, COLUMNS, generator=generator)
    sizes = torch.randint(-30, 30, (ROWS, 1), generator=generator).float().exp2()
    made = {"normal": normal, "sixty octaves": normal * sizes}
    for name in ("E4M3", "E5M2"):
        grid = torch.tensor(list(getattr(formats, name).values()))
        ties = torch.cat([grid, (grid[1:] + grid[:-1]) / 2])
        made[f"ties of {name}"] = torch.cat([ties, -ties]).repeat(-(-normal.numel() // len(ties)))
        made[f"ties of {name}"] = made[f"ties of {name}"][: normal.numel()].view(ROWS, COLUMNS)
    hot = normal * 1e-3
    hot[7] *= 1e6
    made |= {"one hot token": hot, "zeros": torch.zeros(ROWS, COLUMNS)}
    made["subnormals"] = torch.arange(normal.numel()).view(ROWS, COLUMNS) * 2.0**-149
    made["tiny"] = normal * 1e-38
    made["huge"] = normal.clamp(-3, 3) * 1e38
    for name, value in (("infinity", torch.inf), ("NaN", torch.nan)):
        made[name] = normal.clone()
        made[name][3, 5], made[name][200, 400] = value, -value
    return {name: tensor.to(device) for name, tensor in made.items()}


Compared = tuple[str, Tensor, Tensor, Tensor, Tensor]  # codes of ours, TE's; scale_inv likewise


def quantizers(te: Any, device: str) -> Iterator[tuple[str, Callable[[], tuple[object, ...]]]]:
    """(row, what compares) for each recipe that Hopper has, format and input dtype."""

    def row(compare: Callable[..., Iterator[Compared]], *how: Any) -> Callable[[], Any]:
        def counted() -> tuple[object, ...]:
            with torch.no_grad():
                return count(compare(te, device, *how))

        return counted

    for dtype_name, dtype in DTYPES.items():
        for fmt in FORMATS:
            what = f"{fmt}, {dtype_name}"
            yield f"delayed, {what}", row(delayed, fmt, dtype)
            for power, words in ((False, "any scale"), (True, "powers of two")):
                yield f"current, {words}, {what}", row(current, fmt, dtype, power)
        for size in (1, 2):
            shape = "1 × 128" if size == 1 else "128 × 128"
            for power, words in ((True, "powers of two"), (False, "any scale")):
                name = f"block {shape}, {words}, E4M3, {dtype_name}"
                yield name, row(block, dtype, size, power)


def count(compared: Iterator[Compared]) -> tuple[object, ...]:
    """bytes, differing bytes, scales, differing scales, first name."""
    totals, first = [0, 0, 0, 0], ""
    for name, *pairs in compared:
        wrong = 0
        for place, (ours, theirs) in enumerate((pairs[:2], pairs[2:])):
            totals[2 * place] += ours.numel()
            totals[2 * place + 1] += (differ := differing(ours, theirs))
            wrong += differ
        first = first or (name if wrong else "")
    return (*totals, first)


def differing(ours: Tensor, theirs: Tensor) -> int:
    """How many elements of the same dtype and shape have other bits, but for two NaNs."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        raise ValueError(
            f"{ours.dtype} {list(ours.shape)} against {theirs.dtype} {list(theirs.shape)}"
        )
    both = ours.float().isnan() & theirs.float().isnan()
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[ours.element_size()]
    bits = [side.contiguous().view(whole) for side in (ours, theirs)]
    return int(((bits[0] != bits[1]) & ~both).sum())


def current(te: Any, device: str, fmt: str, dtype: torch.dtype, power: bool) -> Iterator[Compared]:
    """Per-tensor current scaling."""
    operand, named, code = FORMATS[fmt]
    recipe = Float8CurrentScaling(use_power_2_scales=power)
    for name, tensor in tensors(device).items():
        source = tensor.to(dtype)
        quantizer = te.Float8CurrentScalingQuantizer(
            getattr(te.DType, named), device=torch.device(device), force_pow_2_scales=power
        )
        theirs, ours = quantizer(source), quantize(source, recipe, operand)
        codes = theirs._data.view(code).reshape(source.shape)
        yield name, ours.codes, codes, ours.scale_inv.reshape(1), theirs._scale_inv.reshape(1)


def delayed(te: Any, device: str, fmt: str, dtype: torch.dtype) -> Iterator[Compared]:
    """A scale that is given; what counts as the scales here is the amax that TE writes down."""
    operand, named, code = FORMATS[fmt]
    for name, tensor in tensors(device).items():
        source = tensor.to(dtype)
        for factor in (1.0, 3.7, 2.0**-20, 1e20):
            scale, amax = torch.full((1,), factor, device=device), torch.zeros(1, device=device)
            theirs = te.Float8Quantizer(scale, amax, getattr(te.DType, named))(source)
            ours = quantize(source, DelayedScaling(), operand, scale=scale[0])
            codes = theirs._data.view(code).reshape(source.shape)
            yield f"{name} × {factor:g}", ours.codes, codes, absolute_maximum(source).view(1), amax


def block(te: Any, device: str, dtype: torch.dtype, size: int, power: bool) -> Iterator[Compared]:
    """Both directions; TE keeps columnwise codes transposed, and pads and turns scales."""
    recipe = Float8BlockScaling(use_f32_scales=not power)
    operand: Operand = "input" if size == 1 else "weight"
    for name, tensor in tensors(device).items():
        source = tensor.to(dtype)
        theirs = te.Float8BlockQuantizer(
            fp8_dtype=te.DType.kFloat8E4M3,
            rowwise=True,
            columnwise=True,
            amax_epsilon=0.0,
            force_pow_2_scales=power,
            block_scaling_dim=size,
        )(source)
        row, column = theirs._rowwise_scale_inv, theirs._columnwise_scale_inv
        for way, data, scales in (
            ("rowwise", theirs._rowwise_data, row.t() if size == 1 else row),
            ("columnwise", theirs._columnwise_data.t(), column if size == 1 else column.t()),
        ):
            ours = quantize(source, recipe, operand, direction=way)  # type: ignore[arg-type]
            down, across = ours.scale_inv.shape
            codes = data.contiguous().view(torch.float8_e4m3fn)
            yield (
                *(f"{name}, {way}", ours.codes, codes),
                *(ours.scale_inv, scales[:down, :across].contiguous()),
            )


def histories() -> Iterator[tuple[str, DelayedScaling, dict[str, Any]]]:
    """(name, our recipe, the fields of TE's)."""
    for algorithm in ("max", "most_recent"):
        for length, margin in ((16, 0), (1024, 1)):
            how = {"amax_history_len": length, "amax_compute_algo": algorithm, "margin": margin}
            yield f"{algorithm} of {length}, margin {margin}", DelayedScaling(**how), how  # type: ignore[arg-type]


def history(
    te: Any, setting: Setting, steps: int, ours: DelayedScaling, theirs: dict[str, Any]
) -> tuple[object, ...]:
    """Scales, differing ones, entries, differing ones over all steps and the three operands."""
    engine.fresh()
    layer, model = linears(te, setting.device, ours)
    chosen, counts = engine.recipes().DelayedScaling(**theirs), [0, 0, 0, 0]
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        size = float(torch.randn(1, generator=generator).mul(4).exp2())
        x, gradient = (torch.randn(64, 128, generator=generator) for _ in range(2))
        x, gradient = (t.bfloat16().to(setting.device) for t in (x * size, gradient / size))
        with te.autocast(enabled=True, recipe=chosen):
            output = layer(x.clone().requires_grad_())
        output.backward(gradient)
        model(x.clone().requires_grad_()).backward(gradient)
        for place, kind in enumerate(("scale", "amax_history")):
            for operand, (way, column) in enumerate((("fwd", 0), ("fwd", 1), ("bwd", 0))):
                state = getattr(layer.fp8_meta[f"scaling_{way}"], kind)[..., column]
                mine = getattr(model[0], kind)[..., operand]
                counts[2 * place] += mine.numel()
                counts[2 * place + 1] += differing(mine.reshape(-1), state.reshape(-1).clone())
    return tuple(counts)


def linears(te: Any, device: str, recipe: Recipe, size: int = 128) -> tuple[Any, nn.Module]:
    """A te.Linear and a converted layer, BF16, with the same weight."""
    torch.manual_seed(0)
    layer = te.Linear(size, size, bias=False, params_dtype=torch.bfloat16, device=device)
    model = nn.Sequential(nn.Linear(size, size, bias=False, dtype=torch.bfloat16, device=device))
    with torch.no_grad():
        layer.weight.copy_(model[0].weight)
    return layer, convert(model, recipe)


MODULES: dict[str, tuple[Recipe, dict[str, Any]]] = {
    "DelayedScaling": (DelayedScaling(amax_history_len=4), {"amax_history_len": 4}),
    "Float8CurrentScaling": (Float8CurrentScaling(), {}),
    "Float8BlockScaling": (Float8BlockScaling(), {}),
}


def modules(te: Any, setting: Setting, page: Page) -> None:
    """A few steps of TE's layers and of converted ones; what is shown is the last."""
    table = page.table(
        "TE's layers and converted ones: the codes in TE's graph, and the largest difference of a \
tensor / its largest element",
        *("layer", "codes", "differing codes", "output", "gradient of the input", "of the weight"),
    )
    for name, (recipe, fields) in MODULES.items():
        if setting.rehearsal and name == "Float8BlockScaling":
            table.add(f"te.Linear, {name}", "not in the stand-in")
            continue
        for kind, steps in (("te.Linear", linear), ("te.LayerNormMLP", layernorm_mlp)):

            def compare(
                steps: Callable[..., Any] = steps,
                how: Any = (name, recipe, fields),
            ) -> tuple[object, ...]:
                engine.fresh()
                chosen = getattr(engine.recipes(), how[0])(**how[2])
                return tuple(steps(te, setting, how[1], chosen))

            table.attempt(f"{kind}, {name}", compare)
    page.note(
        "Of a LayerNormMLP the codes are those of the product: act(gate) · up computed again from "
        "what TE's fc1 gave, and cast as fp8lab casts it."
    )


def apart(ours: Tensor | None, theirs: Tensor | None) -> float:
    """The largest difference / the largest element of `theirs`."""
    assert ours is not None and theirs is not None
    mine, other = ours.detach().float(), theirs.detach().float()
    return float((mine - other).abs().max() / other.abs().max())


def linear(te: Any, setting: Setting, recipe: Recipe, chosen: Any) -> Iterator[object]:
    """Codes, differing codes, and how far output and gradients are apart."""
    size, tokens = setting.pick(1024, 128), setting.pick(2048, 256)
    layer, model = linears(te, setting.device, recipe, size)
    taken: list[Tensor] = []

    def take(module: nn.Module, args: Any) -> None:
        for operand, tensor in (("input", args[0]), ("weight", module.weight)):
            scale = module.scale[0 if operand == "input" else 1].clone() if delayed_ else None
            both = ("rowwise", "columnwise") if blocks else ("rowwise",)
            taken.extend(
                quantize(tensor, recipe, operand, scale=scale, direction=way).codes  # type: ignore[arg-type]
                for way in both
            )

    delayed_, blocks = isinstance(recipe, DelayedScaling), isinstance(recipe, Float8BlockScaling)
    model[0].register_forward_pre_hook(take)
    for step in range(3):
        torch.manual_seed(step)
        x = torch.randn(tokens, size).bfloat16().to(setting.device) * (1 + step)
        gradient = torch.randn(tokens, size).bfloat16().to(setting.device)
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        taken.clear()
        model.zero_grad(set_to_none=True)
        layer.zero_grad(set_to_none=True)
        with te.autocast(enabled=True, recipe=chosen):
            output = layer(theirs)
        kept = engine.codes_in_graph(output, (tokens, size))
        kept += engine.codes_in_graph(output, (size, size))
        ours = model(mine)
        output.backward(gradient)
        ours.backward(gradient)
    matched = [nearest(codes, taken) for codes in kept]
    yield from (sum(codes.numel() for codes in kept), sum(matched))
    yield apart(ours, output)
    yield apart(mine.grad, theirs.grad)
    yield apart(model[0].weight.grad, layer.weight.grad)


def nearest(codes: Tensor, candidates: list[Tensor]) -> int:
    """How many bytes differ from the candidate that is most like it: which direction TE has kept,
    and of a square matrix whether transposed, is its own affair."""
    both = [turned for c in candidates for turned in (c, c.t())]
    same = [c.contiguous().view(torch.uint8) for c in both if c.shape == codes.shape]
    return min(int((c != codes).sum()) for c in same)


class NormAndMLP(nn.Module):
    """RMSNorm in FP32, rounded once, and a SwiGLU."""

    def __init__(self, size: int, hidden: int, device: str) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(size, dtype=torch.bfloat16, device=device))
        self.mlp = GatedFeedForward(size, hidden).bfloat16().to(device)

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), self.norm.shape, self.norm.float(), 1e-5)
        return self.mlp(normed.to(x.dtype))  # type: ignore[no-any-return]


def layernorm_mlp(te: Any, setting: Setting, recipe: Recipe, chosen: Any) -> Iterator[object]:
    """The same of the product's codes, and of a whole feed-forward with its norm."""
    from fp8lab.sites.te_casts import cast_in_force

    size, hidden = setting.pick(1024, 128), setting.pick(2816, 384)
    tokens = setting.pick(2048, 256)
    torch.manual_seed(0)
    model = NormAndMLP(size, hidden, setting.device)
    layer = te.LayerNormMLP(
        *(size, hidden),
        activation="swiglu",
        normalization="RMSNorm",
        bias=False,
        params_dtype=torch.bfloat16,
        device=setting.device,
    )
    with torch.no_grad():
        mlp = model.mlp
        layer.fc1_weight.copy_(torch.cat([mlp.gate.weight, mlp.up.weight]))
        layer.fc2_weight.copy_(mlp.down.weight)
    convert(model, recipe)
    for step in range(3):
        torch.manual_seed(step)
        x = torch.randn(tokens, size).bfloat16().to(setting.device) * (1 + step)
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        model.zero_grad(set_to_none=True)
        layer.zero_grad(set_to_none=True)
        with te.autocast(enabled=True, recipe=chosen):
            output = layer(theirs)
            both = next(t for t in _saved(output) if tuple(t.shape) == (tokens, 2 * hidden))
            gate, up = both.detach().float().chunk(2, dim=-1)
            product = F.silu(gate.contiguous()) * up
            fused = isinstance(recipe, DelayedScaling | Float8CurrentScaling)
            how = cast_in_force(layer, "input", product if fused else product.bfloat16())
            assert how is not None
        kept = engine.codes_in_graph(output, (tokens, hidden))
        codes = [how.rounded().to(torch.float8_e4m3fn)]
        if isinstance(recipe, Float8BlockScaling):
            columnwise = quantize(product.bfloat16(), recipe, "input", direction="columnwise")
            codes.append(columnwise.codes)
        wrong = sum(nearest(one, codes) for one in kept)
        ours = model(mine)
        output.float().square().mean().backward()
        ours.float().square().mean().backward()
    yield from (sum(one.numel() for one in kept), wrong)
    yield apart(ours, output)
    yield apart(mine.grad, theirs.grad)
    yield apart(mlp.down.weight.grad, layer.fc2_weight.grad)


def _saved(output: Tensor) -> list[Tensor]:
    node: Any = output.grad_fn
    while not hasattr(node, "saved_tensors"):
        node = node.next_functions[0][0]
    return [t for t in node.saved_tensors if t is not None and t.dtype is torch.bfloat16]
