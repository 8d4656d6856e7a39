"""The rules about gradients, blocks, sums, ranks and labels, at each of their thresholds.

Rows by hand: one value on the threshold, the next float beyond it. Real draws: cause, site and
onset of what was planted. And what these rules read that nothing else did: `gemm_error`, held
against sums that are written out here, and the linear layers of a run's model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rows_by_hand import Row, above, below
from torch import nn

from fp8lab.accumulation import SAMPLED_ROWS, error_of_sums
from fp8lab.conversion import convert
from fp8lab.diagnosis import diagnose
from fp8lab.ffn import GatedFeedForward
from fp8lab.lab.scenarios import Draw, blocks, gradients, labels, ranks
from fp8lab.linear import Fp8Linear
from fp8lab.mitigations import SmoothSwiGLU
from fp8lab.monitor import watch
from fp8lab.monitor.selection import Selection
from fp8lab.plan import Plan, recipe_to_dict
from fp8lab.recipe import (
    Accumulation,
    DelayedScaling,
    Float8CurrentScaling,
    HighPrecision,
    MXFP8BlockScaling,
    Recipe,
    RowwiseScaling,
)
from fp8lab.record import Finding
from fp8lab.scaling import power_of_two_scale
from fp8lab.store import RunWriter, open_run


def found(
    path: Path, rows: Iterable[Row], *, events: Iterable[Row] = (), **info: Any
) -> list[Finding]:
    """All findings on a run of these rows; `rank` is 0 unless a row says otherwise."""
    rows = list(rows)
    for rank in sorted({row.get("rank", 0) for row in rows} | {0}):
        writer = RunWriter.create(path, info | {"job": "one"}, rank=rank)
        mine = [row for row in rows if row.get("rank", 0) == rank]
        writer.append("tensors", [{"rank": 0} | row for row in mine])
        writer.append("events", [{"rank": 0} | event for event in events if rank == 0])
        writer.close()
    return list(diagnose(open_run(path)).findings)


def severities(findings: list[Finding], cause: str) -> list[str]:
    return [finding.severity for finding in findings if finding.cause == cause]


# --- gradient underflow -------------------------------------------------------------------------


def flushed(steps: Iterable[int], share: float = 0.7, **more: Any) -> list[Row]:
    row = {"site": "down:grad_output", "flushed": share, "format": "E4M3", "cur_amax": 1.0}
    return [{"step": step} | row | more for step in steps]


def underflow(path: Path, rows: Iterable[Row]) -> list[str]:
    return severities(found(path, rows), "gradient_underflow")


def test_gradient_underflow_is_nearly_a_majority(paths: Iterator[Path]) -> None:
    assert underflow(next(paths), flushed(range(5), 0.45)) == ["medium"]
    assert underflow(next(paths), flushed(range(5), below(0.45))) == []


def test_gradient_underflow_is_not_the_scales_fault(paths: Iterator[Path]) -> None:
    assert underflow(next(paths), flushed(range(5), staleness=0.125)) == ["medium"]
    stale = [row | {"scale": 2.0 ** row["step"]} for row in flushed(range(5), staleness=1e-3)]
    assert underflow(next(paths), stale) == []
    edge = [row | {"staleness": below(0.125)} for row in stale]
    assert underflow(next(paths), edge) == []
    # A scale that never moves has no history to blame.
    assert underflow(next(paths), [row | {"scale": 1.0} for row in stale]) == ["medium"]


def test_gradient_underflow_takes_three_steps(paths: Iterator[Path]) -> None:
    assert underflow(next(paths), flushed(range(2))) == []
    assert underflow(next(paths), flushed(range(3))) == ["medium"]


def test_gradient_underflow_lasts_for_half_of_the_steps(paths: Iterator[Path]) -> None:
    lasting = [*flushed(range(4), 0.0), *flushed(range(4, 7))]
    assert underflow(next(paths), [*lasting, *flushed(range(7, 10), 0.0)]) == ["medium"]
    assert underflow(next(paths), [*lasting, *flushed(range(7, 11), 0.0)]) == []


def test_gradient_underflow_is_bad_where_weights_stand_still(paths: Iterator[Path]) -> None:
    def weights(zeros: int) -> list[Row]:
        row = {"site": "down:grad_weight", "count": 1000, "zeros": zeros, "cur_amax": 1.0}
        return [{"step": step} | row for step in range(5)]

    assert underflow(next(paths), [*flushed(range(5)), *weights(249)]) == ["medium"]
    assert underflow(next(paths), [*flushed(range(5)), *weights(250)]) == ["high"]
    others = [row | {"site": "up:grad_weight"} for row in weights(900)]
    assert underflow(next(paths), [*flushed(range(5)), *others]) == ["medium"]
    earlier = [row | {"step": row["step"] - 5} for row in weights(900)]
    assert underflow(next(paths), [*flushed(range(5)), *earlier]) == ["medium"]


def test_what_gradient_underflow_says(paths: Iterator[Path]) -> None:
    rows = [*flushed(range(3), 0.1), *flushed([3], 0.6), *flushed(range(4, 9), 0.9)]
    (said,) = found(next(paths), rows)
    assert (said.site, said.since) == ("down:grad_output", 3)
    assert [(e.step, e.value) for e in said.evidence] == [(3, 0.6), (4, 0.9)]
    assert "E4M3" in said.summary and "90%" in said.summary
    assert underflow(next(paths), [row | {"site": "down:input"} for row in rows]) == []
    for row in rows:
        del row["flushed"]
    assert underflow(next(paths), rows) == []


# --- gradient overflow --------------------------------------------------------------------------


def overflown(steps: Iterable[int], sqnr_db: float = 3.0, **more: Any) -> list[Row]:
    row = {"site": "down:grad_output", "saturated": 0.01, "sqnr_db": sqnr_db, "cur_amax": 1.0}
    return [{"step": step} | row | more for step in steps]


def sound(steps: Iterable[int], **more: Any) -> list[Row]:
    return overflown(steps, 25.0, **{"saturated": 0.0} | more)


def overflow(path: Path, rows: Iterable[Row], **more: Any) -> list[str]:
    return severities(found(path, rows, **more), "gradient_overflow")


def test_gradient_overflow_is_more_than_one_in_a_hundred_thousand(paths: Iterator[Path]) -> None:
    assert overflow(next(paths), [*sound([0]), *overflown([4, 8, 12], saturated=1e-5)]) == []
    rows = [*sound([0]), *overflown([4, 8, 12], saturated=above(1e-5))]
    assert overflow(next(paths), rows) == ["medium"]


def at_error(error: float, beyond: float) -> float:
    """The signal-to-noise ratio of an error a hair below (beyond < 0) or above."""
    return -20.0 * math.log10(error) - 1e-12 * beyond


@pytest.mark.parametrize(("beyond", "expected"), [(1, ["medium"]), (-1, [])])
def test_gradient_overflow_is_half_of_the_gradient_in_a_quarter_of_the_steps(
    beyond: int, expected: list[str], paths: Iterator[Path]
) -> None:
    half = at_error(0.5, beyond)
    assert overflow(next(paths), [*sound(range(9)), *overflown([9, 12, 20], half)]) == expected
    sparse = [*sound([*range(9), *range(12, 17)]), *overflown([9, 10, 11], at_error(0.5, 1))]
    quarter = [*sparse, *sound(range(17, 21 if beyond > 0 else 22))]
    assert overflow(next(paths), quarter) == expected


@pytest.mark.parametrize(("beyond", "expected"), [(1, ["medium"]), (-1, [])])
def test_gradient_overflow_is_most_of_the_gradient_in_a_twentieth_of_the_steps(
    beyond: int, expected: list[str], paths: Iterator[Path]
) -> None:
    rows = [*sound(range(9)), *overflown([9, 10, 11], at_error(0.7, beyond))]
    assert overflow(next(paths), [*rows, *sound(range(12, 69))]) == expected
    rows = [*sound(range(9)), *overflown([9, 10, 11], at_error(0.7, 1))]
    assert overflow(next(paths), [*rows, *sound(range(12, 69 if beyond > 0 else 70))]) == expected
    two = [*sound(range(9)), *overflown([9, 10]), *overflown([11], at_error(0.7, beyond))]
    assert overflow(next(paths), [*two, *sound(range(12, 30))]) == expected


def test_gradient_overflow_is_beyond_the_first_step_and_comes_again(paths: Iterator[Path]) -> None:
    assert overflow(next(paths), overflown([0, 4, 8])) == []
    assert overflow(next(paths), overflown([0, 4, 8, 12])) == ["medium"]
    assert overflow(next(paths), [*sound([0]), *overflown([4, 8])]) == []


def test_gradient_overflow_follows_no_fault_of_the_forward_pass(paths: Iterator[Path]) -> None:
    def forward(step: int) -> list[Row]:
        row = {"site": "up:input", "cur_amax": 1.0}
        return [{"step": 0, "sqnr_db": 30.0} | row, {"step": step, "sqnr_db": 3.0} | row]

    rows = [*sound([0]), *overflown([40, 50, 60])]
    for step, expected in ((19, "medium"), (20, "low"), (39, "low"), (41, "medium")):
        assert overflow(next(paths), [*rows, *forward(step)]) == [expected], step
    # In the same step the gradient's is an effect, and two steps are not enough.
    for step in (40, 50, 60):
        assert overflow(next(paths), [*rows, *forward(step)]) == []
    # The run's first step is another cause's.
    first = [{"step": 25, "sqnr_db": 3.0, "site": "up:input", "cur_amax": 1.0}]
    assert overflow(next(paths), [*rows, *first]) == ["medium"]


def test_gradient_overflow_takes_less_where_the_margin_is_negative(paths: Iterator[Path]) -> None:
    for beyond, staleness, expected in (
        (1, 1.0, ["medium"]),
        (-1, 1.0, []),
        (1, above(1.0), []),
    ):
        rows = overflown(range(9, 30), at_error(0.21, beyond), staleness=staleness)
        assert overflow(next(paths), [*sound(range(9)), *rows]) == expected


def test_gradient_overflow_in_steps_that_clip_the_forward_pass_is_a_note(
    paths: Iterator[Path],
) -> None:
    def forward(*steps: int, staleness: float = above(2.0)) -> list[Row]:
        row = {"site": "up:input", "cur_amax": 1.0, "scale": 300.0, "sqnr_db": 20.0}
        return [{"step": step, "staleness": staleness} | row for step in steps]

    rows = [*sound(range(20)), *overflown([4, 8, 12, 16])]
    rows = list({row["step"]: row for row in rows}.values())
    assert overflow(next(paths), [*rows, *forward(4, 8, 12, 5, 6, 7)]) == ["low"]
    assert overflow(next(paths), [*rows, *forward(4, 8, 12, 5, 6, 7, 9)]) == ["medium"]
    assert overflow(next(paths), [*rows, *forward(4, 8)]) == ["medium"]  # chance
    assert overflow(next(paths), [*rows, *forward(4, 8, 12, staleness=2.0)]) == ["medium"]
    # Nor is it the forward pass's where the other steps are clipped more than half as often.
    rows = [*sound([0, 1, 2, 3, 5]), *overflown([4, 7, 8, 9, 10, 11, 12])]
    assert overflow(next(paths), [*rows, *forward(4, 8, 12)]) == ["low"]
    rows += overflown([13])
    assert overflow(next(paths), [*rows, *forward(4, 8, 12)]) == ["medium"]


def test_gradient_overflow_is_bad_where_the_loss_tells_soon(paths: Iterator[Path]) -> None:
    rows = [*sound([0]), *overflown([4, 8, 12])]
    for step, expected in ((62, "high"), (63, "medium"), (13, "high")):
        events = [{"step": step, "kind": "diverged", "detail": "it did"}]
        run = {"precision": {"down": {"input@output": "E4M3 X"}}}
        assert overflow(next(paths), rows, events=events, **run) == [expected], step


def test_gradient_overflow_sets_in_where_it_began_to_clip(paths: Iterator[Path]) -> None:
    growing = overflown(range(7, 11), 20.0)
    rows = [*sound(range(7)), *growing, *overflown(range(11, 20))]
    assert found(next(paths), rows)[0].since == 7
    growing[1]["saturated"] = 1e-5
    assert found(next(paths), rows)[0].since == 9


def test_what_gradient_overflow_says(paths: Iterator[Path]) -> None:
    rows = [*sound([0]), *overflown([4, 8, 12], staleness=above(2.0)), *sound([9])]
    (said,) = found(next(paths), rows)
    assert (said.site, said.since) == ("down:grad_output", 4)
    assert "made for 1/2 of it" in said.summary and "71%" in said.summary
    (said,) = found(next(paths), [*sound([0]), *overflown([4, 8, 12], staleness=2.0)])
    assert "negative margin" in said.summary


# --- rank-local amax ----------------------------------------------------------------------------


def scaled(rank: int, scale: float, step: int = 5, **more: Any) -> Row:
    row = {"step": step, "rank": rank, "site": "down:input", "recipe": "DelayedScaling"}
    return row | {"scale": scale, "staleness": 1.0} | more


def apart(path: Path, rows: Iterable[Row]) -> list[str]:
    return severities(found(path, rows), "rank_local_amax")


def test_reduced_amaxes_give_scales_that_are_equal(paths: Iterator[Path]) -> None:
    assert apart(next(paths), [scaled(0, 2.0), scaled(1, 2.0)]) == []
    assert apart(next(paths), [scaled(0, 2.0), scaled(1, above(2.0))]) == ["medium"]
    assert apart(next(paths), [scaled(0, 2.0), scaled(1, 4.0, step=6)]) == []
    assert apart(next(paths), [scaled(0, 2.0), scaled(1, 4.0, site="up:input")]) == []
    assert apart(next(paths), [scaled(0, 2.0), scaled(0, 4.0, step=6)]) == []


def test_scales_made_just_in_time_may_differ(paths: Iterator[Path]) -> None:
    current = {"recipe": "Float8CurrentScaling"}
    assert apart(next(paths), [scaled(0, 2.0, **current), scaled(1, 4.0, **current)]) == []


def test_local_amaxes_are_bad_where_one_clips_what_the_other_would_not(
    paths: Iterator[Path],
) -> None:
    for staleness, expected in ((2.0, "medium"), (above(2.0), "high")):
        rows = [scaled(0, 2.0), scaled(1, 8.0, staleness=staleness)]
        assert apart(next(paths), rows) == [expected]
    # The other's scale would have clipped it too: 8.1 / 4.
    for staleness, expected in ((8.0, "high"), (above(8.0), "medium")):
        rows = [scaled(0, 2.0), scaled(1, 8.0, staleness=staleness)]
        assert apart(next(paths), rows) == [expected]


def test_what_rank_local_amax_says(paths: Iterator[Path]) -> None:
    rows = [scaled(0, 1.0, step=0), scaled(1, 1.0, step=0), scaled(0, 1.0), scaled(1, 1.5)]
    later = {"step": 9, "site": "up:input"}
    rows += [scaled(0, 1.0) | later, scaled(1, 6.0, staleness=3.0) | later]
    (said,) = found(next(paths), rows)
    assert (said.site, said.since) == ("up:input", 9)
    assert "2 operands apart" in said.summary and "by up to 6 times" in said.summary
    assert "process 1" in said.summary


def onset(path: Path, rows: Iterable[Row]) -> tuple[str | None, int | None]:
    (said,) = (f for f in found(path, rows) if f.cause == "rank_local_amax")
    return said.site, said.since


def test_local_amaxes_set_in_two_octaves_apart_or_else_at_the_first_difference(
    paths: Iterator[Path],
) -> None:
    little = [scaled(0, 1.0, 3), scaled(1, above(1.0), 3)]
    for ratio, expected in ((4.0, ("down:input", 3)), (above(4.0), ("up:input", 7))):
        rows = [scaled(0, 1.0, 7, site="up:input"), scaled(1, ratio, 7, site="up:input")]
        assert onset(next(paths), [*little, *rows]) == expected


def test_of_sites_apart_the_one_that_runs_first_and_gradients_last(paths: Iterator[Path]) -> None:
    def pair(site: str, step: int = 5, ratio: float = 8.0) -> list[Row]:
        return [scaled(rank, 1.0 + rank * (ratio - 1.0), step, site=site) for rank in (0, 1)]

    rows = [row for site in ("mlp:product", "gate:input", "down:input") for row in pair(site)]
    assert onset(next(paths), rows) == ("gate:input", 5)
    gradients = pair("up:grad_output", 1)
    assert onset(next(paths), [*gradients, *rows]) == ("gate:input", 5)
    assert onset(next(paths), [*gradients, *pair("down:input", 9, 1.5)]) == ("down:input", 9)
    assert onset(next(paths), gradients) == ("up:grad_output", 1)


def met(step: int, *amaxes: float, made_by: float) -> list[Row]:
    """Of each process what it met, at a scale that they share."""
    return [
        scaled(rank, 448.0 / made_by, step, cur_amax=amax, staleness=amax / made_by)
        for rank, amax in enumerate(amaxes)
    ]


def test_a_scale_of_all_holds_what_any_has_met_since(paths: Iterator[Path]) -> None:
    start = [*met(0, 1.0, 1.0, made_by=1.0), *met(1, 1.0, 9.0, made_by=1.0)]
    # The first process's own amax of step 1 made the scale of step 2: the second's was missed.
    assert onset(next(paths), [*start, *met(2, 1.0, 1.0, made_by=1.0)]) == ("down:input", 2)
    assert apart(next(paths), [*start, *met(2, 1.0, 1.0, made_by=9.0)]) == []
    # What step 3 shows to be missed was met in step 1, while a larger one made the scale.
    later = [*met(0, 20.0, 1.0, made_by=20.0), *met(1, 1.5, 9.0, made_by=20.0)]
    later += [*met(2, 1.25, 1.0, made_by=20.0), *met(3, 1.0, 1.0, made_by=1.5)]
    assert onset(next(paths), later) == ("down:input", 2)
    older = [*met(0, 1.0, 9.0, made_by=1.0), *met(1, 1.5, 1.0, made_by=9.0)]
    assert apart(next(paths), [*older, *met(2, 1.0, 1.0, made_by=1.5)]) == []
    # Nothing is known of a scale whose amax was not recorded.
    assert apart(next(paths), [*start, *met(2, 1.0, 1.0, made_by=1.25)]) == []


def test_an_amax_that_differs_by_rounding_is_not_missed(paths: Iterator[Path]) -> None:
    for more, expected in ((1.0, []), (2.0**-10, ["medium"])):
        larger = (1.0 + 2.0**-16 * more) if more == 1.0 else 1.0 + more
        rows = [*met(1, 1.0, larger, made_by=1.0), *met(2, 1.0, 1.0, made_by=1.0)]
        assert apart(next(paths), rows) == expected


def test_local_amaxes_are_bad_where_one_clips_what_the_other_had_met(
    paths: Iterator[Path],
) -> None:
    start = [*met(0, 1.0, 1.0, made_by=1.0), *met(1, 1.0, 4.5, made_by=1.0)]
    for amax, expected in ((2.0, "medium"), (above(2.0), "high"), (9.0, "high"), (9.5, "medium")):
        assert apart(next(paths), [*start, *met(2, amax, 1.0, made_by=1.0)]) == [expected], amax


def test_processes_with_other_weights_have_other_layers(paths: Iterator[Path]) -> None:
    def weights(layer: str, other: float) -> list[Row]:
        site = f"{layer}:weight"
        return [scaled(r, 2.0, site=site, cur_amax=a) for r, a in enumerate((1.0, other))]

    for site, layer in (("mlp.down:input", "mlp.down"), ("mlp:product", "mlp.up")):
        rows = [scaled(0, 1.0, site=site), scaled(1, 8.0, site=site)]
        assert apart(next(paths), [*rows, *weights(layer, 1.0)]) == ["medium"]
        assert apart(next(paths), [*rows, *weights(layer, above(1.0))]) == []
        assert apart(next(paths), [*rows, *weights(layer.replace("mlp", "mlp2"), 8.0)]) == [
            "medium"
        ]


# --- short accumulator --------------------------------------------------------------------------


def summed(error: float, step: int = 0, site: str = "down:input") -> Row:
    return {"step": step, "site": site, "gemm_error": error, "cur_amax": 1.0}


def short(path: Path, rows: Iterable[Row], **info: Any) -> list[str]:
    return severities(found(path, rows, **info), "short_accumulator")


def test_short_sums_are_notable_from_one_in_a_thousand_on(paths: Iterator[Path]) -> None:
    assert short(next(paths), [summed(below(1e-3))]) == []
    assert short(next(paths), [summed(1e-3)]) == ["medium"]
    assert short(next(paths), [summed(1e-3, site="down:weight")]) == []


def test_short_sums_are_bad_where_they_err_as_much_as_the_codes(paths: Iterator[Path]) -> None:
    assert short(next(paths), [summed(below(0.0266))]) == ["medium"]
    assert short(next(paths), [summed(0.0266)]) == ["high"]


def test_what_short_accumulator_says(paths: Iterator[Path]) -> None:
    rows = [summed(2e-3, 3), summed(4e-3, 4), summed(1e-4, 2), summed(1e-3, 0, "up:grad_output")]
    info = {
        "linears": {"down": {"class": "Fp8Linear", "in": 1024, "out": 32}},
        "precision": {"down": {"input@output": "E4M3 X, summed in 12 bits, channels balanced"}},
    }
    (said,) = found(next(paths), rows, **info)
    assert (said.site, said.since) == ("down:input", 3)
    assert "output GEMM sums over 1024 elements with an error of 0.004" in said.summary
    assert "12 bits;" in said.summary and "2 operands" in said.summary
    (said,) = found(next(paths), [summed(2e-3, site="down:grad_output")], **info)
    assert "grad_input GEMM sums over 32 elements" in said.summary
    assert "says nothing" in said.summary
    (said,) = found(next(paths), [summed(2e-3, site="down:grad_weight")], **info)
    assert "the grad_weight GEMM sums with an error" in said.summary


def test_the_error_of_sums_is_that_of_sums_cut_at_every_step(paths: Iterator[Path]) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*size, generator=generator) for size in ((200, 160), (160, 8)))
    chosen = left[:: math.ceil(200 / SAMPLED_ROWS)]
    running = np.zeros((len(chosen), 8), np.float32)
    for start in range(0, 160, 32):
        running += (chosen[:, start : start + 32] @ right[start : start + 32]).numpy()
        running = (running.view(np.int32) & -(1 << 14)).view(np.float32)
    exact = (chosen @ right).numpy()
    expected = [
        np.square((running - exact).astype(float)).sum(),
        np.square(exact.astype(float)).sum(),
    ]
    got = error_of_sums(left, right, Accumulation(bits=10, promote_every=None)).tolist()
    assert got == pytest.approx(expected, rel=1e-12)


def test_the_sums_over_tokens_are_measured_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    mlp = GatedFeedForward(16, 32)
    accumulation = Accumulation(bits=9, promote_every=None, gemms=("grad_weight",))
    convert(mlp, Plan(recipe=Float8CurrentScaling(), accumulation=accumulation))
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.0)
    select, seen = Selection(tensors=("input", "grad_output", "grad_weight")), {}
    mlp.down.register_forward_pre_hook(lambda module, args: seen.update(input=args[0].detach()))
    path = tmp_path / "run"
    with watch(mlp, path, optimizer=optimizer, every=1, select=select) as watching:
        output = mlp(torch.randn(512, 16))
        output.register_hook(lambda gradient: seen.update(grad_output=gradient))
        output.square().sum().backward()
        short = mlp.down.weight.grad.clone()
        optimizer.step()
        watching.step(0)
    rows = open_run(path).tensors("gemm_error").set_index("site")["gemm_error"]
    g, x = (mlp.down.cast_in_force(o, seen[o]).fake_quantized() for o in ("grad_output", "input"))
    exact = g.t() @ x
    error = float((short - exact).norm() / exact.norm())
    assert rows["down:grad_weight"] == pytest.approx(error, rel=1e-6) and error > 1e-3
    assert rows[["down:input", "down:grad_output"]].isna().all()


@pytest.mark.parametrize("smooth", [False, True])
def test_a_row_says_how_its_gemm_sums(smooth: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    mlp = GatedFeedForward(32, 256)
    recipe, accumulation = Float8CurrentScaling(), Accumulation(bits=9, promote_every=None)
    convert(mlp, Plan(recipe=recipe, accumulation=accumulation))
    if smooth:
        SmoothSwiGLU().apply(mlp)
    select = Selection(tensors=("input", "grad_output"))
    seen: dict[str, torch.Tensor] = {}
    mlp.down.register_forward_pre_hook(lambda module, args: seen.update(input=args[0].detach()))
    with watch(mlp, tmp_path / "run", every=1, select=select) as watching:
        for step in range(1):
            output = mlp(torch.randn(48, 32))
            output.register_hook(lambda gradient: seen.update(grad_output=gradient))
            output.square().sum().backward()
            watching.step(step)
    rows = open_run(tmp_path / "run").tensors("gemm_error").set_index("site")["gemm_error"]
    down = mlp.down
    assert isinstance(down, Fp8Linear)
    down.accumulation = None
    with torch.no_grad():
        exact = down(seen["input"])
        down.accumulation = accumulation
        error = (down(seen["input"]) - exact).norm() / exact.norm()
    assert rows["down:input"] == pytest.approx(float(error), rel=1e-6)
    codes = down.cast_in_force("grad_output", seen["grad_output"]).fake_quantized()
    weight = down.cast_in_force("weight", down.weight).fake_quantized()
    if not smooth:  # else the weight is balanced too
        squares, power = error_of_sums(codes, weight, accumulation)
        assert rows["down:grad_output"] == pytest.approx(float((squares / power).sqrt()), rel=1e-9)


def test_sums_in_fp32_have_no_error_to_tell(tmp_path: Path) -> None:
    for number, accumulation in enumerate((None, Accumulation(gemms=("grad_weight",)))):
        mlp = convert(GatedFeedForward(32, 64), Float8CurrentScaling(), accumulation=accumulation)
        path, select = tmp_path / str(number), Selection(tensors=("input",))
        with watch(mlp, path, every=1, select=select) as watching:
            mlp(torch.randn(4, 32))
            watching.step(0)
        assert open_run(path).tensors("gemm_error")["gemm_error"].isna().all()


# --- shared exponent and floor saturation -------------------------------------------------------


def block(step: int, *, collapse: float = 0.0, saturated: float = 0.0, **more: Any) -> Row:
    """Magnitudes of mean 1 and variance 1/4: l1 / n = 1, l2² / n = 5/4."""
    row = {"step": step, "site": "up:weight", "recipe": "MXFP8BlockScaling", "cur_amax": 2.0}
    row |= {"count": 64, "l1_norm": 64.0, "l2_norm": math.sqrt(80.0), "mse": collapse / 4}
    return row | {"saturated": saturated} | more


def two_blocks(collapse: float, **more: Any) -> list[Row]:
    return [block(step, collapse=collapse, **more) for step in (3, 4)]


def clusters(path: Path, rows: Iterable[Row]) -> list[str]:
    return severities(found(path, rows), "shared_exponent")


def floors(path: Path, rows: Iterable[Row]) -> list[str]:
    return severities(found(path, rows), "floor_saturation")


def test_a_shared_exponent_takes_a_quarter_of_the_variation(paths: Iterator[Path]) -> None:
    # sqrt(80)² is not 80: the threshold within a few units in the last place.
    assert clusters(next(paths), two_blocks(0.25 * (1 + 1e-14))) == ["medium"]
    assert clusters(next(paths), two_blocks(0.25 * (1 - 1e-14))) == []
    assert clusters(next(paths), two_blocks(1.0 * (1 + 1e-14))) == ["high"]
    assert clusters(next(paths), two_blocks(1.0 * (1 - 1e-14))) == ["medium"]


def test_a_shared_exponent_costs_what_rounding_does(paths: Iterator[Path]) -> None:
    for beyond, expected in ((1, ["high"]), (-1, [])):
        mse = 0.0266**2 * 1.0001 * (1 + 1e-12 * beyond)
        rows = two_blocks(0.0, l2_norm=8.0 * math.sqrt(1.0001), mse=mse)
        assert clusters(next(paths), rows) == expected


def test_a_shared_exponent_is_one_of_mx_blocks_in_two_steps(paths: Iterator[Path]) -> None:
    assert clusters(next(paths), two_blocks(0.5, recipe="Float8CurrentScaling")) == []
    assert clusters(next(paths), two_blocks(0.5)[:1]) == []


def test_what_does_not_vary_cannot_lose_its_variation(paths: Iterator[Path]) -> None:
    assert clusters(next(paths), two_blocks(0.5, l2_norm=8.0)) == []
    assert clusters(next(paths), two_blocks(0.5, count=0)) == []


def test_what_shared_exponent_says(paths: Iterator[Path]) -> None:
    rows = [block(2), block(3, collapse=0.5), block(4, collapse=2.0, saturated=0.6), block(5)]
    said = next(f for f in found(next(paths), rows) if f.cause == "shared_exponent")
    assert (said.site, said.since) == ("up:weight", 4)
    assert "within 50.0% of 1" in said.summary and "costs 2 times" in said.summary
    assert "clips 60%" in said.summary


def test_a_shared_exponent_sets_in_where_most_is_clipped(paths: Iterator[Path]) -> None:
    rows = [block(step, collapse=0.5) for step in range(3)]
    for share, since in ((0.5, 3), (below(0.5), 0)):
        later = block(3, collapse=0.5, saturated=share)
        said = next(f for f in found(next(paths), [*rows, later]) if f.cause == "shared_exponent")
        assert said.since == since


def test_a_cluster_sets_in_before_it_costs_more_than_rounding(paths: Iterator[Path]) -> None:
    # 0.0266² of the power: a collapse of 0.25 is an error of 0.22, unless there is more power.
    contracts = {"l2_norm": 8.0 * math.sqrt(1.0005), "saturated": 0.9}
    cheap, dear = ({"mse": 0.0005 * collapse} | contracts for collapse in (0.9, 3.0))
    rows = [block(0, saturated=0.9), *(block(step, **cheap) for step in (1, 2))]
    rows += [block(step, **dear) for step in (3, 4)]
    said = next(f for f in found(next(paths), rows) if f.cause == "shared_exponent")
    assert (said.since, len(said.evidence)) == (1, 2)
    rows[1]["saturated"] = below(0.5)
    said = next(f for f in found(next(paths), rows) if f.cause == "shared_exponent")
    assert said.since == 2
    rows[2]["mse"] = 0.0005 * below(0.25)
    said = next(f for f in found(next(paths), rows) if f.cause == "shared_exponent")
    assert said.since == 3


def test_any_saturation_of_mx_blocks_is_a_floors(paths: Iterator[Path]) -> None:
    assert floors(next(paths), two_blocks(0.0, saturated=above(1e-5))) == ["medium"]
    assert floors(next(paths), two_blocks(0.0, saturated=1e-5)) == []
    assert floors(next(paths), two_blocks(0.0, saturated=0.01)[:1]) == []
    assert floors(next(paths), two_blocks(0.0, saturated=0.01, recipe="DelayedScaling")) == []


def test_where_values_cluster_the_floor_is_a_note(paths: Iterator[Path]) -> None:
    clustered = two_blocks(0.5, saturated=0.9)
    assert floors(next(paths), clustered) == []
    ordinary = two_blocks(0.01, saturated=0.01, site="down:input")
    assert floors(next(paths), ordinary) == ["medium"]
    assert floors(next(paths), [*clustered, *ordinary]) == ["low"]


def test_a_floor_is_harmful_from_twice_the_error_of_rounding_on(paths: Iterator[Path]) -> None:
    for beyond, expected in ((1, "high"), (-1, "medium")):
        mse = 0.0532**2 * 1.25 * (1 + 1e-12 * beyond)
        assert floors(next(paths), two_blocks(0.0, saturated=0.01, mse=mse)) == [expected]


def test_a_floor_sets_in_at_two_thirds_of_what_it_comes_to(paths: Iterator[Path]) -> None:
    later = [block(step, saturated=0.02) for step in range(4, 12)]
    for share, since in ((2 / 3 * 0.02, 3), (below(2 / 3 * 0.02), 4)):
        (said,) = found(next(paths), [block(3, saturated=share), *later])
        assert said.since == since


def test_a_floor_that_comes_sets_in_at_its_first_step(paths: Iterator[Path]) -> None:
    comes = [block(step, saturated=0.005 * step) for step in range(4, 12)]
    for none, since in ((range(1, 4), 4), (range(2, 4), 7)):
        (said,) = found(next(paths), [*(block(step) for step in none), *comes])
        assert said.since == since
    comes[4]["saturated"] = 0.0  # a tensor that is clipped now and then
    (said,) = found(next(paths), [*(block(step) for step in range(1, 4)), *comes])
    assert said.since == 7


def test_what_a_layer_rounds_to_even_is_a_note(paths: Iterator[Path]) -> None:
    torch.manual_seed(0)
    mlp = convert(GatedFeedForward(8, 16), MXFP8BlockScaling(scale_rounding="even"))
    precision = {"up": mlp.up.precision()}
    rows = two_blocks(0.0, saturated=0.01)
    assert severities(found(next(paths), rows, precision=precision), "floor_saturation") == ["low"]
    mlp = convert(GatedFeedForward(8, 16), MXFP8BlockScaling(scale_rounding="ocp_floor"))
    precision = {"up": mlp.up.precision()}
    assert "MXFP8BlockScaling, scales rounded ocp_floor" in precision["up"]["input@output"]
    said = found(next(paths), rows, precision=precision)
    assert severities(said, "floor_saturation") == ["medium"]


def test_what_floor_saturation_says(paths: Iterator[Path]) -> None:
    rows = [block(3, saturated=0.02), block(4, saturated=0.03)]
    rows += [block(step, saturated=0.015, site="down:input") for step in (5, 6)]
    (said,) = found(next(paths), rows)
    assert (said.site, said.since) == ("up:weight", 3)
    assert "2 operands" in said.summary and "2.50%" in said.summary
    assert [e.value for e in said.evidence] == [0.02, 0.03]


# --- a label that lies --------------------------------------------------------------------------

FP8_USES = {
    f"{operand}@{gemm}": "E4M3 DelayedScaling"
    for operand, gemm in (
        *(("input", "output"), ("weight", "output"), ("grad_output", "grad_input")),
        *(("weight", "grad_input"), ("grad_output", "grad_weight"), ("input", "grad_weight")),
    )
}
BF16_INPUT = {"input@output": "BF16 HighPrecision", "input@grad_weight": "FP32 HighPrecision"}


def label(
    path: Path,
    *,
    declared: Recipe | Plan | None = None,
    precision: dict[str, dict[str, str]] | None = None,
    kind: str = "Linear",
    rows: Iterable[Row] = (),
    mitigations: tuple[str, ...] = (),
    **more: Any,
) -> list[Finding]:
    """Of a model with the layers `up` and `down`, of which `precision` says something."""
    plan = recipe_to_dict(DelayedScaling() if declared is None else declared)
    precision = {"up": FP8_USES, "down": FP8_USES} if precision is None else precision
    linears = {name: {"class": kind, "in": 8, "out": 8} for name in ("up", "down")}
    config = {"recipe": plan, "mitigations": list(mitigations)}
    findings = found(path, rows, config=config, linears=linears, precision=precision, **more)
    return [f for f in findings if f.cause == "precision_label"]


def test_a_layer_that_was_never_converted_lies(paths: Iterator[Path]) -> None:
    assert label(next(paths)) == []
    (said,) = label(next(paths), precision={"up": FP8_USES})
    assert (said.site, said.since, said.severity) == ("down:input", 0, "medium")
    assert "input@output is to be E4M3 and is no cast" in said.summary
    (said,) = label(next(paths), precision={})
    assert "2 layers (up, down)" in said.summary


def test_one_operand_in_high_precision_lies(paths: Iterator[Path]) -> None:
    precision = {"up": FP8_USES, "down": FP8_USES | BF16_INPUT}
    (said,) = label(next(paths), precision=precision)
    assert (said.site, said.evidence[0].value) == ("down:input", 2.0)
    declared = ("HighPrecisionProduct",)
    assert label(next(paths), precision=precision, mitigations=declared) == []
    assert len(label(next(paths), precision={"up": FP8_USES}, mitigations=declared)) == 1


def test_what_the_plan_says_is_no_lie(paths: Iterator[Path]) -> None:
    precision = {"up": FP8_USES}
    excluded = Plan(recipe=DelayedScaling(), exclude=("down",))
    assert label(next(paths), declared=excluded, precision=precision) == []
    overridden = Plan(recipe=DelayedScaling(), overrides={"down": HighPrecision()})
    assert label(next(paths), declared=overridden, precision=precision) == []
    assert label(next(paths), declared=HighPrecision(), precision={}) == []
    inputs = Plan(recipe=DelayedScaling(), overrides={"down:input": HighPrecision()})
    given = {"up": FP8_USES, "down": FP8_USES | BF16_INPUT}
    assert label(next(paths), declared=inputs, precision=given) == []
    rowwise = RowwiseScaling(high_precision_grad_weight=True)
    wide = {"grad_output@grad_weight": "FP32 X", "input@grad_weight": "FP32 X"}
    given = {"up": FP8_USES | wide, "down": FP8_USES | wide}
    assert label(next(paths), declared=rowwise, precision=given) == []


def test_another_librarys_layer_says_nothing(paths: Iterator[Path]) -> None:
    assert label(next(paths), precision={}, kind="Float8Linear") == []


def test_a_plan_with_a_function_is_read_and_none_is_silent(paths: Iterator[Path]) -> None:
    gaudi = DelayedScaling(scaling_factor_compute_algo=power_of_two_scale)
    assert len(label(next(paths), declared=gaudi, precision={"up": FP8_USES})) == 1
    linears = {"up": {"class": "Linear", "in": 8, "out": 8}}
    for config in ({}, {"recipe": 5}, {"recipe": {"recipe": "Typo"}}):
        assert found(next(paths), [], config=config, linears=linears) == []
    assert found(next(paths), [], linears=linears) == []


def inputs(layer: str, steps: Iterable[int], fmt: str | None = "E4M3") -> list[Row]:
    row = {"site": f"{layer}:input", "count": 9, "format": fmt}
    return [{"step": step} | row for step in steps]


@pytest.mark.parametrize("fmt", ["BF16", None])
def test_a_layer_that_turns_back_lies_from_then_on(fmt: str | None, paths: Iterator[Path]) -> None:
    rows = [*inputs("up", range(10)), *inputs("down", range(7))]
    (said,) = label(next(paths), rows=[*rows, *inputs("down", range(7, 10), fmt)])
    assert (said.site, said.since, said.confidence) == ("down:input", 7, "high")
    rows += inputs("down", [7])
    assert label(next(paths), rows=[*rows, *inputs("down", range(8, 10), fmt)]) == []
    # One that is what the plan says, or that nobody declared, may be as it likes.
    excluded = Plan(recipe=DelayedScaling(), exclude=("down",))
    turned = [*inputs("up", range(10)), *inputs("down", range(5)), *inputs("down", [5, 6, 7], fmt)]
    assert label(next(paths), rows=turned, declared=excluded) == []


def test_a_layer_that_is_seen_no_more_may_have_been_replaced(paths: Iterator[Path]) -> None:
    def rows(last: int) -> list[Row]:
        return [*inputs("up", range(0, 40, 4)), *inputs("down", range(0, last + 1, 4))]

    (said,) = label(next(paths), rows=rows(24))
    assert (said.site, said.since, said.confidence) == ("down:input", 28, "medium")
    assert label(next(paths), rows=rows(28)) == []
    events = [{"step": 25, "kind": "not_recorded", "site": "down", "detail": "why"}]
    assert label(next(paths), rows=rows(24), events=events) == []


def test_a_run_lists_its_linear_layers_and_forgets_a_cast_that_is_gone(tmp_path: Path) -> None:
    mlp = GatedFeedForward(16, 32)
    convert(mlp, Float8CurrentScaling(), include=("down",))
    select = Selection(tensors=("input",))
    with watch(mlp, tmp_path / "run", every=1, select=select) as watching:
        for step in range(2):
            if step == 1:
                mlp.down.__class__ = nn.Linear
            mlp(torch.randn(4, 16))
            watching.step(step)
    run = open_run(tmp_path / "run")
    assert run.info["linears"] == {
        "gate": {"class": "Linear", "in": 16, "out": 32},
        "up": {"class": "Linear", "in": 16, "out": 32},
        "down": {"class": "Fp8Linear", "in": 32, "out": 16},
    }
    rows = run.tensors(("recipe", "format"), sites="down:input")
    assert rows["format"].fillna("none").tolist() == ["E4M3", "none"]


# --- real trainings -----------------------------------------------------------------------------

PLANTED = {one.name: one for m in (blocks, gradients, labels, ranks) for one in m.SCENARIOS}


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    [
        "gradients_of_channels",
        "gradients_no_headroom",
        "amax_of_ranks",
        "sums_shortened",
        "weights_cluster",
        "floor_comes",
        "label_never_true",
        "label_no_longer_true",
    ],
)
def test_what_was_planted_is_found(name: str, tmp_path: Path) -> None:
    scenario = PLANTED[name]
    torch.manual_seed(2)
    label = scenario.run(Draw(2, 0.5, tmp_path))
    diagnosis = diagnose(tmp_path / "run")
    assert diagnosis.findings, "nothing found"
    top = diagnosis.findings[0]
    assert top.cause == scenario.cause == label.cause
    assert top.site in label.sites and top.since is not None and label.onset is not None
    last = int(open_run(tmp_path / "run").steps("loss")["step"].max())
    assert abs(top.since - label.onset) <= 0.1 * last
