"""The Triton kernels: do they give what the CPU gives, and at what share of a copy's speed.

Speed is said against `out.copy_(x)` into a warm buffer, timed in turns in the same process. Of a
pass that reads a tensor and writes little (the sketch, an amax) the bandwidth counts what it reads;
of a cast what it reads and writes; of the copy both. Rejected: a share of the data sheet's
bandwidth, which no copy reaches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from casts_against_te import differing, tensors
from suite import Page, Setting, Work, seconds_of
from torch import Tensor

from fp8lab import (
    Float8BlockScaling,
    Float8CurrentScaling,
    MXFP8BlockScaling,
    RowwiseScaling,
    casting,
    formats,
)
from fp8lab.kernels import gpu_casts
from fp8lab.recipe import Recipe

try:
    from fp8lab.kernels import gpu
    from fp8lab.kernels.summary import plain
except ImportError:  # without numpy there is no sketch; casts there are
    gpu = None

TITLE = "Kernels of the GPU: equal to the CPU's, and how fast"


def run(setting: Setting, page: Page) -> None:
    """The tables of this part."""
    table = page.table(
        "The same on the GPU and on the CPU", "kernel, input", "tensors", "differing tensors"
    )
    for name, dtype in (("BF16", torch.bfloat16), ("FP32", torch.float32)):
        for what, (there, here) in comparisons().items():
            table.attempt(
                f"{what}, {name}",
                lambda d=dtype, t=there, h=here: compared(setting, d, t, h),
            )
    if gpu is None:
        page.note("numpy is missing here: no figure of the sketch.")
    for reason in reasons():
        page.note(f"Triton fails: {reason}")
    for name, dtype in (("BF16", torch.bfloat16), ("FP32", torch.float32)):
        shape = setting.pick((8192, 11008), (8, 256))
        table = page.table(
            f"Speed, {name} {shape[0]} × {shape[1]}: medians of interleaved turns",
            *("pass", "GB/s", "bandwidth / that of a copy", "time / that of a copy", "goal"),
        )
        speeds(setting, table.add, dtype, shape)


Kernel = Callable[[Tensor], tuple[Tensor, ...]]


def comparisons() -> dict[str, tuple[Kernel, Kernel]]:
    """name -> (the kernel, what it has to equal on the CPU)."""
    scale = torch.full((), 0.37)

    def counted(tensor: Tensor) -> tuple[Tensor, ...]:
        there = scale.to(tensor.device)
        out = torch.empty_like(tensor, dtype=torch.float32)
        how = formats.E4M3, there, there.reciprocal()
        return out, *worked(gpu_casts.fake_quantize_and_count(tensor, *how, out))

    def expected(tensor: Tensor) -> tuple[Tensor, ...]:
        values = tensor.float() * scale
        rounded = values.clamp(-448, 448).to(torch.float8_e4m3fn).float()
        amax = torch.nan_to_num(tensor.float().abs(), nan=0.0, posinf=torch.inf).amax()
        saturated = (values.abs() > 448 * (1 + 2.0**-23)).sum()
        flushed = ((rounded == 0) & (tensor != 0)).sum()
        return rounded * scale.reciprocal(), amax, saturated, flushed

    def by(recipe: Recipe) -> Kernel:
        def cast(tensor: Tensor) -> tuple[Tensor, ...]:
            out = torch.empty_like(tensor, dtype=torch.float32)
            return (casting.fake_quantize(tensor, recipe, "input", out=out),)

        return cast

    recipes = {"current scaling": Float8CurrentScaling(), "MXFP8": MXFP8BlockScaling()}
    recipes |= {"block scaling, 1 × 128": Float8BlockScaling()}

    of_sketch = {} if gpu is None else {"the sketch": (lambda x: worked(gpu.summary(x)), plain)}
    return of_sketch | {
        "amax": (
            lambda tensor: (worked(gpu_casts.amax(tensor)),),
            lambda tensor: (expected(tensor)[1],),
        ),
        "a cast, with its counts": (counted, expected),
        **{name: (by(recipe), by(recipe)) for name, recipe in recipes.items()},
    }


def worked(found: Any) -> Any:
    """What a kernel gave. Raises RuntimeError with Triton's reason where it gave nothing."""
    if found is None or found is False:
        raise RuntimeError("; ".join(reasons()))
    return found


def reasons() -> list[str]:
    """What Triton has failed with, of the sketch and of the casts."""
    broken = [*([] if gpu is None else gpu._broken), *gpu_casts._broken]
    return list(dict.fromkeys(" ".join(reason.split())[:300] for reason in broken))


def compared(setting: Setting, dtype: torch.dtype, there: Kernel, here: Kernel) -> tuple[int, int]:
    """tensors, tensors of which anything differs."""
    wrong, given = 0, tensors("cpu")
    for tensor in given.values():
        source = tensor.to(dtype)
        source = source[:8, :256].contiguous() if setting.rehearsal else source
        found, expected = there(source.to(setting.device)), here(source)
        wrong += any(
            differing(a.cpu(), b) if a.is_floating_point() else not torch.equal(a.cpu(), b)
            for a, b in zip(found, expected, strict=True)
        )
    return len(given), wrong


def speeds(
    setting: Setting,
    row: Callable[..., None],
    dtype: torch.dtype,
    shape: tuple[int, int],
) -> None:
    """A row for each pass."""
    x = torch.randn(shape, dtype=dtype, device=setting.device)
    warm, out = torch.empty_like(x), torch.empty_like(x, dtype=torch.float32)
    scale = torch.full((), 100.0, device=setting.device)
    how = formats.E4M3, scale, scale.reciprocal()
    read, written = x.numel() * x.element_size(), 4 * x.numel()

    def cast(recipe: Recipe) -> Work:
        return lambda: casting.fake_quantize(x, recipe, "input", out=out)

    passes: dict[str, tuple[Work, int, str]] = {
        "copy": (lambda: warm.copy_(x), 2 * read, ""),
        "copy, again (noise)": (lambda: warm.copy_(x), 2 * read, ""),
        "the sketch": (lambda: worked(gpu.summary(x)), read, "≥ 0.8 of the bandwidth"),
        "amax": (lambda: worked(gpu_casts.amax(x)), read, ""),
        "delayed scaling": (
            lambda: worked(gpu_casts.fake_quantize(x, *how, out)),
            *(read + written, "copy speed"),
        ),
        "delayed scaling, with amax and counts": (
            lambda: worked(gpu_casts.fake_quantize_and_count(x, *how, out)),
            *(read + written, "copy speed"),
        ),
        "current scaling (amax, scale, cast)": (
            cast(Float8CurrentScaling()),
            *(2 * read + written, ""),
        ),
        "block scaling, 1 × 128": (cast(Float8BlockScaling()), read + written, "copy speed"),
        "MXFP8": (cast(MXFP8BlockScaling()), read + written, "copy speed"),
        "row-wise (plain torch)": (cast(RowwiseScaling()), read + written, ""),
    }
    if gpu is None:
        del passes["the sketch"]
    alive = {name: work for name, (work, _, _) in passes.items() if runs(row, name, work)}
    took: dict[str, list[float]] = {name: [] for name in alive}
    for _ in range(setting.pick(15, 1)):
        for name, work in alive.items():
            took[name].append(seconds_of(setting, work, setting.pick(5, 1)))
    medians = {name: float(torch.tensor(times).median()) for name, times in took.items()}
    copied = passes["copy"][1] / medians["copy"]
    for name, seconds in medians.items():
        _, size, goal = passes[name]
        speed, times = size / seconds, seconds / medians["copy"]
        row(name, f"{speed / 1e9:.0f}", f"{speed / copied:.2f}", f"{times:.2f}", goal)


def runs(row: Callable[..., None], name: str, work: Work) -> bool:
    """Whether it does, twice; if not there is a row that says why."""
    try:
        work(), work()
    except TimeoutError:
        raise
    except Exception as error:
        row(name, f"no result: {' '.join(str(error).split())[:150]}")
        return False
    return True
