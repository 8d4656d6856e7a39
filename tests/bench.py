"""`make bench`: what emulating and watching cost, as ratios within one run.

The machines that this runs on are shared and noisy, so nothing is reported in seconds. Both sides
of a ratio are timed in turns, many times, in one process with one thread; a row gives the median
of the per-turn ratios and the range of their middle half, or, where a goal must be decided, the
95 % confidence interval of the median. The first row times a thing against itself: what differs
from 1 there is noise. A goal stands beside the figure it is for, met or not.
Writes reports/benchmarks.md.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import gfloat
import gfloat.formats
import ml_dtypes
import numpy as np
import torch
from bench_ratio import Row, Work, ratio
from bench_report import with_kept
from bench_watch import other_watching_rows, scaling_rows, size_lines, watching_rows
from torch import Tensor

import fp8lab
from fp8lab import (
    BitNetScaling,
    DelayedScaling,
    Float8BlockScaling,
    Float8CurrentScaling,
    Format,
    HighPrecision,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
    RowwiseScaling,
    formats,
    kernels,
)
from fp8lab.lab.model import LanguageModel, ModelConfig

logging.getLogger("torchao").setLevel(logging.ERROR)
from torchao.float8.config import ScalingGranularity  # noqa: E402
from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic  # noqa: E402
from torchao.float8.float8_training_tensor import LinearMMConfig  # noqa: E402
from torchao.prototype.mx_formats.mx_tensor import MXTensor  # noqa: E402

REPORT = Path(__file__).resolve().parents[1] / "reports" / "benchmarks.md"
SIZE = 4096, 4096  # 16 M elements


def casting_rows() -> Iterator[Row]:
    """Fake-quantising 16 M values into a warm buffer / copying them into one."""
    values = torch.randn(SIZE, generator=torch.Generator().manual_seed(0))
    half, out = values.bfloat16(), torch.empty_like(values)
    scale = torch.tensor(100.0)

    def copy() -> Tensor:
        return out.copy_(values)

    def again() -> Tensor:
        return out.copy_(values)

    yield Row("copy (noise)", ratio(again, copy))

    def counted() -> object:
        how = formats.E4M3, scale, scale.reciprocal()
        return kernels.fake_quantize_and_count(values, *how, out)

    def cast(recipe: fp8lab.recipe.Recipe, tensor: Tensor) -> Work:
        given = scale if isinstance(recipe, DelayedScaling) else None
        return lambda: fp8lab.fake_quantize(tensor, recipe, "input", scale=given, out=out)

    name = "delayed scaling, E4M3, with amax, saturated and flushed counts"
    yield Row(name, ratio(counted, copy), "≤ 1.3")
    goals = {
        "delayed scaling, E4M3": (DelayedScaling(), "≤ 1.3"),
        "current scaling, E4M3": (Float8CurrentScaling(), "≤ 1.9"),
        "block scaling, 1 × 128": (Float8BlockScaling(), "≤ 1.6"),
        "MXFP8": (MXFP8BlockScaling(), "≤ 1.6"),
        "row-wise, torchao's": (RowwiseScaling(), ""),
        "NVFP4": (NVFP4BlockScaling(), ""),
    }
    for name, (recipe, goal) in goals.items():
        yield Row(name, ratio(cast(recipe, values), copy), goal)
        half_goal = "≤ 2" if goal else ""
        yield Row(f"{name}, BF16 input", ratio(cast(recipe, half), copy), half_goal)


def other_rows() -> Iterator[Row]:
    """The same fake-quantisation by others / by fp8lab, current scaling or MXFP8, 4 M float32."""
    values = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))
    array, out = values.numpy(), torch.empty_like(values)
    recipe, blocks = Float8CurrentScaling(), MXFP8BlockScaling()

    def ours() -> object:
        return fp8lab.fake_quantize(values, recipe, "input", out=out)

    def ours_in_blocks() -> object:
        return fp8lab.fake_quantize(values, blocks, "input", out=out)

    def plain() -> object:
        with mock.patch.object(kernels, "usable", return_value=False):
            return fp8lab.fake_quantize(values, recipe, "input", out=out)

    def torchao() -> object:
        cast = hp_tensor_to_float8_dynamic(
            values,
            torch.float8_e4m3fn,
            LinearMMConfig(),
            scaling_granularity=ScalingGranularity.TENSORWISE,
        )
        return cast.to_original_precision()

    def torchao_in_blocks() -> object:
        return MXTensor.to_mx(values, torch.float8_e4m3fn, 32).dequantize(torch.float32)

    def of_ml_dtypes() -> object:
        scale = np.float32(448.0) / np.abs(array).max()
        codes = np.clip(array * scale, -448.0, 448.0).astype(ml_dtypes.float8_e4m3fn)
        return codes.astype(np.float32) * (np.float32(1.0) / scale)

    def of_gfloat() -> object:
        scale = np.float32(448.0) / np.abs(array).max()
        codes = gfloat.round_ndarray(gfloat.formats.format_info_ocp_e4m3, array * scale, sat=True)
        return codes / scale

    others = {
        "plain torch (fp8lab without its kernels)": (plain, ours, "≥ 3"),
        "torchao, per tensor": (torchao, ours, "≥ 10 for the fastest but plain torch"),
        "ml_dtypes": (of_ml_dtypes, ours, ""),
        "gfloat": (of_gfloat, ours, ""),
        "torchao, MXFP8": (torchao_in_blocks, ours_in_blocks, ""),
        "the formula of microxcaling, MXFP8": (
            lambda: microxcaling(values),
            ours_in_blocks,
            "",
        ),
    }
    for name, (theirs, baseline, goal) in others.items():
        yield Row(name, ratio(theirs, baseline, turns=9), goal)


def microxcaling(values: Tensor) -> Tensor:
    """MXFP8 by that library's steps, for it is on no index: shared exponents by floor(log2), then
    elements rounded at their own exponents with exp2 and round. Source: its README and paper,
    2310.10537."""
    blocks = values.view(-1, 32)
    shared = torch.floor(torch.log2(blocks.abs().amax(1, keepdim=True))) - 8
    scaled = blocks / torch.exp2(shared)
    private = torch.floor(torch.log2(scaled.abs() + (scaled == 0))).clamp(min=-6)
    quantum = torch.exp2(private - 3)
    rounded = torch.round(scaled / quantum) * quantum
    return (rounded.clamp(-448, 448) * torch.exp2(shared)).view(values.shape)


def language_model_rows() -> Iterator[Row]:
    """A training step of the reference language model in emulated FP8 / the same step in FP32."""
    config = ModelConfig(dim=128, layers=4, heads=4, context=128)
    tokens = torch.randint(0, 256, (8, 129), generator=torch.Generator().manual_seed(0))

    def step_of(recipe: fp8lab.recipe.Recipe | None) -> Work:
        model = LanguageModel(config, 0)
        if recipe is not None:
            fp8lab.convert(model, recipe, exclude=("head",))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            model.loss(tokens).backward()
            optimizer.step()

        return step

    plain = step_of(None)
    yield Row("FP32 (noise)", ratio(step_of(None), plain))
    recipes: dict[str, tuple[fp8lab.recipe.Recipe, str]] = {
        "BF16": (HighPrecision(), ""),
        "delayed scaling": (DelayedScaling(), "≤ 1.15"),
        "current scaling": (Float8CurrentScaling(), "≤ 1.15"),
        "delayed scaling, Gaudi2 with E5M2 copies": (
            DelayedScaling(fp8_format=Format.GAUDI2_E5M2_COPIES),
            "≤ 1.15",
        ),
        "block scaling": (Float8BlockScaling(), "≤ 1.15"),
        "MXFP8": (MXFP8BlockScaling(), "≤ 1.15"),
        "row-wise, torchao's": (RowwiseScaling(), "≤ 1.15"),
        "BitNet": (BitNetScaling(), ""),
        "current scaling, stochastic gradients": (
            Float8CurrentScaling(stochastic_rounding=True),
            "",
        ),
        "NVFP4": (NVFP4BlockScaling(), ""),
        "NVFP4, nearest": (NVFP4BlockScaling(disable_stochastic_rounding=True), ""),
    }
    for name, (recipe, goal) in recipes.items():
        yield Row(name, ratio(step_of(recipe), plain, turns=15), goal)
    step = step_of(Float8CurrentScaling())

    def without_kernels() -> None:
        with mock.patch.object(kernels, "usable", return_value=False):
            step()

    yield Row("current scaling, plain torch", ratio(without_kernels, plain, turns=15))


def processor() -> str:
    """The model of the processor as Linux gives it, else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.machine()


def main() -> None:
    """Measure, print and write the tables."""
    torch.set_num_threads(1)
    if reason := kernels.why_unavailable():
        raise SystemExit(f"bench: no kernels to measure: {reason}")
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "numpy", "torchao", "ml_dtypes", "gfloat")
    )
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench`. Ratios of times, medians over interleaved turns, one thread.",
        "",
        f"fp8lab {fp8lab.__version__}, {versions}, Python {platform.python_version()}, "
        f"{processor()}.",
    ]
    tables = (
        *(casting_rows, other_rows, language_model_rows),
        *(watching_rows, other_watching_rows, scaling_rows),
    )
    for rows in tables:
        title = (rows.__doc__ or "").rstrip(".")
        lines += ["", f"## {title}", "", "| | median | range | goal |", "|---|---|---|---|"]
        print("\n".join(lines[-5:]), flush=True)
        for name, (low, median, high), goal in rows():
            lines.append(f"| {name} | {median:.2f} | {low:.2f}–{high:.2f} | {goal} |")
            print(lines[-1], flush=True)
    lines += ["", "## What a run weighs, and what memory watching takes", "", *size_lines()]
    REPORT.parent.mkdir(exist_ok=True)
    before = REPORT.read_text(encoding="utf-8") if REPORT.exists() else ""
    REPORT.write_text(with_kept("\n".join(lines) + "\n", before), encoding="utf-8")
    print(f"written: {REPORT.relative_to(REPORT.parents[1])}")


if __name__ == "__main__":
    main()
