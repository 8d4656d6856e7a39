"""How often `replay` is right about "recipe R breaks": forecasts against really training under R.

The rare-token regression of the main experiment is trained in BF16 and watched. The run is
replayed under each recipe, and then trained under each. A run breaks when its common loss passes
1,000 within 2,000 steps. The rule's three numbers were chosen on seeds 100 to 123; the seeds here
were first used when they stood.

What it can say is limited to this family: one SwiGLU layer, plain SGD, no clipping, the gate
product as the operand that matters. With Adam or gradient clipping none of these trainings breaks,
and the same forecasts would be false alarms.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

import fp8lab
from fp8lab import Float8CurrentScaling, Plan
from fp8lab.lab import rare_tokens
from fp8lab.lab.train import Schedule, train

SEEDS = range(1000, 1008)
HISTORIES = (4, 16, 64, 1024)


class Case(NamedTuple):
    """A recipe by name, and the steps at which it was forecast to break, and did."""

    recipe: str
    forecast: int | None
    real: int | None


def plans() -> dict[str, Plan]:
    """What a run is replayed and trained under."""
    named = {f"delayed, history {length}": rare_tokens.fp8(length) for length in HISTORIES}
    return named | {"current": Plan(recipe=Float8CurrentScaling())}


def trained(seed: int, plan: Plan, path: Path | None = None) -> int | None:
    """The step at which the training diverges, None if it does not; recorded at `path`."""
    model = fp8lab.convert(rare_tokens.Student(seed), plan)
    task = rare_tokens.Regression(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rare_tokens.LEARNING_RATE)
    limit = rare_tokens.COMMON_LOSS_LIMIT
    schedule = Schedule(steps=rare_tokens.STEPS, judged_by="common_loss", diverged_above=limit)
    if path is None:
        return train(model, optimizer, task, schedule)
    with fp8lab.watch(model, path, every=1) as watch:
        return train(model, optimizer, task, schedule, watch=watch)


def cases(seeds: range) -> list[Case]:
    """Every recipe of every seed. Raises AssertionError if a BF16 run diverges."""
    found = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "bf16"
            assert trained(seed, rare_tokens.BF16, path) is None
            for name, plan in plans().items():
                forecast = fp8lab.replay(path, plan).breaks_at
                found.append(Case(name, forecast, trained(seed, plan)))
    return found


def forecast_lines(seeds: range = SEEDS) -> list[str]:
    """Markdown: precision and recall, and how far off the step is."""
    found = cases(seeds)
    lines = [
        f"Seeds {seeds[0]} to {seeds[-1]}: replayed in BF16, and then trained under each recipe.",
        "",
        "| recipe | runs | broke | forecast to break | right | missed | false alarms |",
        "|---|---|---|---|---|---|---|",
    ]
    names = list(dict.fromkeys(case.recipe for case in found))
    for name in [*names, "all"]:
        mine = [case for case in found if name in (case.recipe, "all")]
        broke, said = (sum(c[place] is not None for c in mine) for place in (2, 1))
        right = sum(c.forecast is not None and c.real is not None for c in mine)
        numbers = (len(mine), broke, said, right, broke - right, said - right)
        lines.append(f"| {name} | {' | '.join(map(str, numbers))} |")
    pairs = [(c.forecast, c.real) for c in found if None not in (c.forecast, c.real)]
    off = sorted(int(forecast or 0) - int(real or 0) for forecast, real in pairs)
    broke, said = (sum(case[place] is not None for case in found) for place in (2, 1))
    lines += [
        "",
        f"- precision {len(pairs)}/{said} ({len(pairs) / max(said, 1):.0%}), "
        f"recall {len(pairs)}/{broke} ({len(pairs) / max(broke, 1):.0%}).",
    ]
    if off:
        near = statistics.median(abs(steps) for steps in off)
        lines += [
            f"- forecast step − real step: median {statistics.median(off):+g}, from {off[0]:+d} to "
            f"{off[-1]:+d}; half of them within {near:g} steps. (forecast, real): "
            + ", ".join(f"({forecast}, {real})" for forecast, real in pairs)
            + ".",
        ]
    return [*lines, "- " + " ".join((__doc__ or "").split("\n\n")[-1].split())]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("\n".join(forecast_lines()))
