"""`make bench`: what emulating and watching cost, as ratios within one run.

The machines that this runs on are shared and noisy, so nothing is reported in seconds. Both sides
of a ratio are timed in turns, many times, in one process with one thread; a row gives the median
of the per-turn ratios and the range of their middle half. The first row times a thing against
itself: what differs from 1 there is noise. Writes reports/benchmarks.md.
"""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

import fp8lab
from fp8lab import DelayedScaling, Float8CurrentScaling, GatedFeedForward, HighPrecision
from fp8lab.lab.model import LanguageModel, ModelConfig

REPORT = Path(__file__).resolve().parents[1] / "reports" / "benchmarks.md"
TURNS = 31


def ratio(measured: Callable[[], object], baseline: Callable[[], object]) -> tuple[float, ...]:
    """Quartiles of measured / baseline over interleaved turns."""
    for warm_up in (measured, baseline, measured, baseline):
        warm_up()
    ratios = []
    for turn in range(TURNS):
        seconds = {}
        for side in (measured, baseline) if turn % 2 else (baseline, measured):
            start = time.perf_counter()
            side()
            seconds[side] = time.perf_counter() - start
        ratios.append(seconds[measured] / seconds[baseline])
    return tuple(statistics.quantiles(ratios, n=4))


def casting_rows() -> list[tuple[str, tuple[float, ...]]]:
    """Fake-quantising 4 M float32 against copying them."""
    values = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))
    buffer, scale = torch.empty_like(values), torch.tensor(100.0)

    def copy() -> Tensor:
        return buffer.copy_(values)

    def again() -> Tensor:
        return buffer.copy_(values)

    def delayed() -> Tensor:
        return fp8lab.fake_quantize(values, DelayedScaling(), "input", scale=scale)

    def current() -> Tensor:
        return fp8lab.fake_quantize(values, Float8CurrentScaling(), "input")

    return [
        ("copy / copy (noise)", ratio(again, copy)),
        ("fake-quantise E4M3, scale known / copy", ratio(delayed, copy)),
        ("fake-quantise E4M3, current scaling / copy", ratio(current, copy)),
    ]


def language_model_rows() -> list[tuple[str, tuple[float, ...]]]:
    """A training step of the reference language model against the same step in FP32."""
    config = ModelConfig(dim=128, layers=4, heads=4, context=128)
    tokens = torch.randint(0, 256, (8, 129), generator=torch.Generator().manual_seed(0))

    def step_of(recipe: fp8lab.recipe.Recipe | None) -> Callable[[], object]:
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
    recipes = (HighPrecision(), DelayedScaling(), Float8CurrentScaling())
    return [
        (f"language model step, {type(recipe).__name__} / FP32", ratio(step_of(recipe), plain))
        for recipe in recipes
    ]


def watching_rows() -> list[tuple[str, tuple[float, ...]]]:
    """Six SwiGLU feed-forwards 256/688, 1024 tokens, forward and backward: watched / unwatched."""
    x = torch.randn(1024, 256, generator=torch.Generator().manual_seed(0))

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*(GatedFeedForward(256, 688) for _ in range(6)))

    def train(model: nn.Module) -> None:
        model.zero_grad(set_to_none=True)
        model(x).square().mean().backward()

    plain = build()
    rows = []
    for every, name in ((1, "all statistics every step"), (10, "default: every 10 steps")):
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            model = build()
            watch = stack.enter_context(fp8lab.watch(model, Path(folder) / "run", every=every))
            step = iter(range(1_000_000))

            def ten_watched_steps() -> None:
                for _ in range(10):
                    train(model)  # noqa: B023  (called within this turn of the loop)
                    watch.step(next(step))  # noqa: B023

            def ten_steps() -> None:
                for _ in range(10):
                    train(plain)

            rows.append((f"watched / unwatched, {name}", ratio(ten_watched_steps, ten_steps)))
    return rows


def main() -> None:
    """Measure, print and write the table."""
    torch.set_num_threads(1)
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench`. Ratios, medians over interleaved turns; one thread.",
        "",
        f"fp8lab {fp8lab.__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {platform.machine()}, {TURNS} turns a row.",
        "",
        "| measured / baseline | median | middle half |",
        "|---|---|---|",
    ]
    print("\n".join(lines[-2:]), flush=True)
    for group in (casting_rows, language_model_rows, watching_rows):
        for name, (low, median, high) in group():
            lines.append(f"| {name} | {median:.2f} | {low:.2f}–{high:.2f} |")
            print(lines[-1], flush=True)
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"written: {REPORT.relative_to(REPORT.parents[1])}")


if __name__ == "__main__":
    main()
