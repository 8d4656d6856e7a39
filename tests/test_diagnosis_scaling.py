"""Rules on the scales of forward operands: at each of their thresholds, and on real trainings.

Rows by hand have one thing wrong each, on the threshold and a step beyond. The contradictions are
tested too: what looks alike and belongs to another rule. The real trainings are scenarios, whose
labels come from their own tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rows_by_hand import Row, above, below

from fp8lab.diagnosis import (
    bulk_underflow,
    casts,
    cold_start,
    delayed_saturation,
    diagnose,
    judge,
    stale_scale,
    token_outlier,
)
from fp8lab.diagnosis.rows import Loaded
from fp8lab.lab.scenarios import draw_of, scenarios
from fp8lab.record import Finding
from fp8lab.runs import Run, open_run
from fp8lab.store import RunWriter

GATE, UP, DOWN, PRODUCT = "a.mlp.gate:input", "a.mlp.up:input", "a.mlp.down:input", "a.mlp:product"
WEIGHT = "a.mlp.up:weight"


def cast(step: int, site: str = GATE, staleness: float | None = 1.0, **more: Any) -> Row:
    """A healthy row of a delayed cast, but for what is said."""
    row: Row = {"step": step, "rank": 0, "site": site, "staleness": staleness, "hot_channel": 3}
    row |= {"cur_amax": 1.0, "scale": 400.5, "flushed": 0.0, "subnormal": 0.01, "sqnr_db": 31.0}
    row["bulk_error"] = 0.027
    if site in (PRODUCT, DOWN):  # the same tensor
        row["cur_amax"] = 1.5
    if site == PRODUCT:
        row |= {"token_ratio": 4.0, "channel_ratio": 3.0}
    return row | more


def healthy(site: str = GATE, steps: Iterable[int] = range(30), **more: Any) -> list[Row]:
    return [cast(step, site, **more) for step in steps]


def write(
    path: Path,
    rows: Iterable[Row],
    *,
    losses: Iterable[float] = (),
    gradients: Iterable[float] = (),
    events: Iterable[Row] = (),
    channels: Iterable[Row] = (),
) -> Run:
    """A run of these rows; later ones stand for earlier ones of the same step and site."""
    writer = RunWriter.create(path, {})
    writer.append("tensors", list({(row["step"], row["site"]): row for row in rows}.values()))
    steps: dict[int, Row] = {}
    for name, values in (("loss", losses), ("grad_norm", gradients)):
        for step, value in enumerate(values):
            steps.setdefault(step, {"step": step, "rank": 0})[name] = value
    writer.append("steps", list(steps.values()))
    writer.append("events", [{"rank": 0} | event for event in events])
    writer.append("channels", [{"rank": 0} | row for row in channels])
    writer.close()
    return open_run(path)


def found(rule: Any, path: Path, rows: Iterable[Row], **more: Any) -> list[Finding]:
    found: list[Finding] = rule.find(Loaded(write(path, rows, **more)), None)
    return found


# --- casts ----------------------------------------------------------------------------------------


def test_a_scale_of_one_is_cold_where_nothing_was_before(paths: Iterator[Path]) -> None:
    for scales, expected in (
        ([1.0, 300.0, 300.0], [True, False, False]),
        ([1.0, 1.0, 300.0], [True, True, False]),
        ([300.0, 1.0, 1.0], [False, True, True]),
        # A power of two may be 1 by itself; an amax of 448 has a scale of 1 too.
        ([256.0, 1.0, 2.0], [False, False, False]),
    ):
        rows = [cast(step, scale=scale) for step, scale in enumerate(scales)]
        read = casts.forward_casts(Loaded(write(next(paths), rows)))
        assert read["cold"].tolist() == expected
    just_in_time = [cast(0, scale=1.0, staleness=None)]
    assert casts.forward_casts(Loaded(write(next(paths), just_in_time)))["cold"].tolist() == [False]


def test_a_product_stands_where_downs_input_stood_and_is_read_once(paths: Iterator[Path]) -> None:
    sites = [PRODUCT, GATE, WEIGHT, DOWN, "a.mlp.down:grad_output", "b.gate:input"]
    rows = casts.forward_casts(Loaded(write(next(paths), [cast(0, site) for site in sites])))
    ordered = rows.sort_values("depth")["site"].tolist()
    assert ordered == [GATE, WEIGHT, PRODUCT, "b.gate:input"]
    # What is not the same tensor is not the same row.
    apart = [cast(0, PRODUCT), cast(0, DOWN, cur_amax=2.0)]
    assert len(casts.forward_casts(Loaded(write(next(paths), apart)))) == 2


def test_a_token_stands_out_by_three_times_the_usual_ratio(paths: Iterator[Path]) -> None:
    for ratio, expected in ((below(12.0), []), (12.0, [7, 7]), (None, [7, 7])):
        rows = [*healthy(), *healthy(PRODUCT), cast(7, PRODUCT, token_ratio=ratio)]
        read = casts.forward_casts(Loaded(write(next(paths), rows)))
        assert read.loc[read["by_token"], "step"].tolist() == expected
    never = healthy(PRODUCT, token_ratio=None)
    assert not casts.forward_casts(Loaded(write(next(paths), never)))["by_token"].any()


# --- delayed saturation ---------------------------------------------------------------------------


def jump(step: int, staleness: float = 9.0, amax: float = 9.0, **more: Any) -> Row:
    return cast(step, PRODUCT, staleness, cur_amax=amax, token_ratio=40.0, **more)


def test_a_product_whose_input_jumps_is_left_to_other_rules(paths: Iterator[Path]) -> None:
    rows = [*healthy(PRODUCT), jump(9, 9.0)]
    for stale, count in ((below(3.0), 1), (3.0, 0)):
        both = [*healthy(GATE), cast(9, GATE, stale), *rows, cast(9, DOWN, 9.0, cur_amax=9.0)]
        both += healthy(DOWN, [step for step in range(30) if step != 9])
        assert len(found(delayed_saturation, next(paths), both)) == count
    # Not one that runs behind it.
    behind = [*healthy(DOWN), cast(9, DOWN, 9.0, cur_amax=9.0), *rows, *healthy("b.gate:input")]
    behind.append(cast(9, "b.gate:input", 9.0))
    assert len(found(delayed_saturation, next(paths), behind)) == 1


def test_delayed_saturation_is_not_of_a_scale_of_one(paths: Iterator[Path]) -> None:
    rows = [cast(0, PRODUCT, 9.0, scale=1.0), *healthy(PRODUCT, range(1, 30))]
    assert found(delayed_saturation, next(paths), rows) == []


def test_clipping_to_less_than_a_quarter_is_no_harm(paths: Iterator[Path]) -> None:
    for staleness, severity in ((below(4.0), "low"), (4.0, "medium")):
        (it,) = found(delayed_saturation, next(paths), [*healthy(PRODUCT), jump(9, staleness)])
        assert it.severity == severity


def test_a_single_step_that_nothing_follows_for_long_is_a_note(paths: Iterator[Path]) -> None:
    for last, severity in ((59, "medium"), (60, "low")):
        rows = [*healthy(PRODUCT, range(last + 1)), jump(9, 4.0)]
        (it,) = found(delayed_saturation, next(paths), rows)
        assert it.severity == severity
        (it,) = found(delayed_saturation, next(paths), [*rows, jump(6, 4.0)])
        assert it.severity == "medium"
        # What is clipped to less than a quarter does not make two of it.
        (it,) = found(delayed_saturation, next(paths), [*rows, jump(6, below(4.0))])
        assert it.severity == severity


def test_growth_of_all_steps_is_no_wind_up(paths: Iterator[Path]) -> None:
    def growing(factor: float) -> list[Row]:
        usual = [cast(s, PRODUCT, cur_amax=1.0 if s < 15 else factor) for s in range(30)]
        return [*usual, jump(8, amax=10.0), jump(24, amax=40.0)]

    assert found(delayed_saturation, next(paths), growing(1.0))[0].severity == "high"
    assert found(delayed_saturation, next(paths), growing(above(1.0)))[0].severity == "medium"


def test_the_alignment_of_the_channel_is_evidence(paths: Iterator[Path]) -> None:
    events = [{"step": 12, "kind": "diverged", "detail": ""}]
    for alignment, confidence in ((below(0.9), "medium"), (0.9, "high"), (-0.9, "high")):
        channels: list[Row] = [
            {"step": 8, "site": "a.mlp", "channel": 3, "alignment": alignment},
            {"step": 8, "site": "a.mlp", "channel": 4, "alignment": 0.99},
            {"step": 10, "site": "a.mlp", "channel": 3, "alignment": 0.99},
        ]
        rows = [*healthy(PRODUCT), jump(9)]
        (it,) = found(delayed_saturation, next(paths), rows, events=events, channels=channels)
        assert (it.severity, it.confidence) == ("high", confidence)
        assert [(e.step, e.value) for e in it.evidence][-1] == (8, alignment)
        assert ("aligned" in it.summary) == (confidence == "high")


# --- bulk underflow -------------------------------------------------------------------------------


def hot(step: int, site: str = PRODUCT, **more: Any) -> Row:
    ratio = {"channel_ratio": 1e5} if site == PRODUCT else {}
    return cast(step, site, bulk_error=0.6, flushed=0.5, **ratio, **more)


def test_a_hot_channel_stays_hot(paths: Iterator[Path]) -> None:
    usual = healthy(PRODUCT)
    half = [hot(step) for step in range(10, 20)]  # of the twenty since the first
    assert found(bulk_underflow, next(paths), [*usual, *half]) == []
    (it,) = found(bulk_underflow, next(paths), [*usual, *half, hot(20)])
    assert (it.cause, it.severity, it.since, it.channel) == ("bulk_underflow", "high", 10, 3)


def test_a_hot_channel_is_an_outlier_among_channels(paths: Iterator[Path]) -> None:
    for ratio, count in ((below(16.0), 0), (16.0, 1), (None, 1)):
        rows = [hot(step) | {"channel_ratio": ratio} for step in range(30)]
        assert len(found(bulk_underflow, next(paths), rows)) == count


def test_a_hot_channel_needs_a_scale_of_this_step(paths: Iterator[Path]) -> None:
    for staleness, count in ((below(0.125), 0), (0.125, 1), (None, 1)):
        rows = [hot(step, staleness=staleness) for step in range(30)]
        assert len(found(bulk_underflow, next(paths), rows)) == count
    first = [hot(0, scale=1.0), *healthy(PRODUCT, range(1, 2))]
    assert found(bulk_underflow, next(paths), first) == []


def test_a_hot_channel_is_found_in_inputs_and_not_in_weights(paths: Iterator[Path]) -> None:
    (it,) = found(bulk_underflow, next(paths), [hot(step, GATE) for step in range(30)])
    assert (it.site, it.since) == (GATE, 0) and "the largest" in it.summary
    assert found(bulk_underflow, next(paths), [hot(step, WEIGHT) for step in range(30)]) == []


def test_a_hot_channel_shortly_before_the_loss_tells_is_what_blew_up(paths: Iterator[Path]) -> None:
    rows = [hot(step) for step in range(10, 20)]
    for alarm, severity in ((13, "low"), (14, "high")):
        events = [{"step": alarm, "kind": "diverged", "detail": ""}]
        (it,) = found(bulk_underflow, next(paths), rows, events=events)
        assert it.severity == severity


def emptied(step: int, flushed: float = 0.5, **more: Any) -> list[Row]:
    """The product of which one channel is left, and up's weight, whose cast is why."""
    left = {"channel_ratio": None, "bulk_error": None, "scale": 300.5} | more
    return [cast(step, WEIGHT, flushed=flushed), cast(step, PRODUCT) | left, cast(step, DOWN)]


def test_a_hot_row_of_a_weight_empties_the_product(paths: Iterator[Path]) -> None:
    for flushed, count in ((0.5, 1), (below(0.5), 0)):
        rows = [row for step in range(20) for row in emptied(step, flushed)]
        named = found(bulk_underflow, next(paths), rows)
        assert [(f.severity, f.site, f.channel, f.since) for f in named] == [
            ("high", PRODUCT, 3, 0)
        ] * count
    assert WEIGHT in found(bulk_underflow, next(paths), emptied(0))[0].summary
    for more in ({"channel_ratio": 1e9}, {"token_ratio": None}):  # a median; nothing measured
        assert found(bulk_underflow, next(paths), emptied(0, **more)) == []
    # Not down's weight, which is cast behind it, nor another block's.
    for site in ("a.mlp.down:weight", "b.mlp.up:weight"):
        (_, *rest) = emptied(0)
        assert found(bulk_underflow, next(paths), [*rest, cast(0, site, flushed=0.9)]) == []


# --- token outlier --------------------------------------------------------------------------------


def spike(step: int, flushed: float = 0.9, ratio: float | None = 2.0**12, **more: Any) -> Row:
    row = cast(step, PRODUCT, flushed=flushed, token_ratio=ratio, cur_amax=2.0**12)
    return row | more


def test_a_token_takes_the_range_of_the_majority(paths: Iterator[Path]) -> None:
    for flushed, count in ((below(0.5), 0), (0.5, 1)):
        rows = [*healthy(PRODUCT), spike(7, flushed)]
        assert len(found(token_outlier, next(paths), rows)) == count


def test_a_token_outlier_is_bad_where_it_comes_again(paths: Iterator[Path]) -> None:
    once = [*healthy(PRODUCT), spike(7)]
    (it,) = found(token_outlier, next(paths), once)
    assert (it.severity, it.site, it.since) == ("medium", PRODUCT, 7)
    (it,) = found(token_outlier, next(paths), [*once, spike(17)])
    assert (it.severity, it.since) == ("high", 7)
    assert [(e.step, e.quantity) for e in it.evidence] == [
        (7, "flushed"),
        (17, "flushed"),
        (7, "token_ratio"),
    ]


def test_a_token_outlier_comes_and_goes(paths: Iterator[Path]) -> None:
    for usual, count in ((4.0, 1), (above(4.0), 0)):
        rows = [*healthy(PRODUCT, cur_amax=usual), spike(7), spike(17)]
        assert len(found(token_outlier, next(paths), rows)) == count
    # In half of the steps since the first, or more, it is what is usual.
    many = [spike(step) for step in range(10, 19)]
    assert len(found(token_outlier, next(paths), [*healthy(PRODUCT, range(29)), *many])) == 1
    assert found(token_outlier, next(paths), [*healthy(PRODUCT, range(28)), *many]) == []


def test_a_token_outlier_is_one_token(paths: Iterator[Path]) -> None:
    for ratio, count in ((below(2.0**10), 0), (2.0**10, 1), (None, 1)):
        rows = [*healthy(PRODUCT), spike(7, ratio=ratio)]
        assert len(found(token_outlier, next(paths), rows)) == count
    as_always = [*healthy(PRODUCT, token_ratio=2.0**11), spike(7)]
    assert found(token_outlier, next(paths), as_always) == []


def test_a_token_outlier_needs_a_scale_of_this_step(paths: Iterator[Path]) -> None:
    for staleness, count in ((below(0.125), 0), (0.125, 1), (2.0, 1), (above(2.0), 0)):
        rows = [*healthy(PRODUCT), spike(7, staleness=staleness)]
        assert len(found(token_outlier, next(paths), rows)) == count
    assert found(token_outlier, next(paths), [spike(0, scale=1.0), *healthy(PRODUCT, [1, 2])]) == []


def test_a_token_is_named_where_it_comes_in(paths: Iterator[Path]) -> None:
    sites = (GATE, WEIGHT, DOWN, "b.gate:input")
    rows = [row for site in (PRODUCT, *sites) for row in healthy(site)]
    rows += [spike(7), *(cast(7, site, flushed=0.9, cur_amax=2.0**12) for site in sites)]
    (it,) = found(token_outlier, next(paths), rows)
    assert (it.site, it.since) == (GATE, 7)


def test_a_delayed_scale_clips_the_token(paths: Iterator[Path]) -> None:
    rows = [*healthy(GATE), *healthy(PRODUCT), *healthy(DOWN)]
    for staleness, count in ((2.0, 0), (above(2.0), 1)):
        jumps = [cast(7, GATE, staleness), cast(7, PRODUCT, token_ratio=40.0)]
        named = found(token_outlier, next(paths), [*rows, *jumps])
        assert [(f.severity, f.confidence, f.site) for f in named] == [
            ("medium", "medium", GATE)
        ] * count
    # What is larger as a whole is no token's, and behind a product that jumps it is the product's.
    assert found(token_outlier, next(paths), [*rows, cast(7, GATE, 9.0)]) == []
    behind = "b.gate:input"
    for before, count in ((below(3.0), 1), (3.0, 0)):
        jumps = [cast(7, PRODUCT, before, token_ratio=40.0), cast(7, DOWN, before)]
        jumps += [*healthy(behind), cast(7, behind, 9.0)]
        assert len(found(token_outlier, next(paths), [*rows, *jumps])) == count


# --- stale scale ----------------------------------------------------------------------------------


def stale(step: int, flushed: float = 0.6, staleness: float = 2.0**-12, **more: Any) -> Row:
    return cast(step, more.pop("site", GATE), staleness, flushed=flushed, **more)


def test_a_scale_of_before_flushes_for_three_steps(paths: Iterator[Path]) -> None:
    usual = healthy()
    two = [*usual, stale(11), stale(12)]
    assert found(stale_scale, next(paths), two) == []
    (it,) = found(stale_scale, next(paths), [*two, stale(13)])
    assert (it.cause, it.severity, it.confidence) == ("stale_scale", "high", "high")
    assert (it.site, it.since) == (GATE, 11) and "shorter" in it.remedy


def test_the_step_that_is_remembered_is_the_onset(paths: Iterator[Path]) -> None:
    rows = [*healthy(), *(stale(step) for step in range(11, 20))]
    for amax, since in ((below(2.0**11), 11), (2.0**11, 7)):
        (it,) = found(stale_scale, next(paths), [*rows, cast(7, cur_amax=amax)])
        assert it.since == since


def test_a_stale_scale_is_six_octaves_off(paths: Iterator[Path]) -> None:
    for staleness, count in ((2.0**-6, 1), (above(2.0**-6), 0)):
        rows = [*healthy(), *(stale(step, staleness=staleness) for step in range(11, 20))]
        assert len(found(stale_scale, next(paths), rows)) == count


def test_a_stale_scale_is_bad_where_it_takes_the_majority(paths: Iterator[Path]) -> None:
    for flushed, expected in (
        (below(0.25), []),
        (0.25, ["medium"]),
        (below(0.5), ["medium"]),
        (0.5, ["high"]),
    ):
        rows = [*healthy(), *(stale(step, flushed) for step in range(11, 20))]
        assert [f.severity for f in found(stale_scale, next(paths), rows)] == expected


def test_a_stale_scale_that_leaves_little_but_subnormals_counts_too(paths: Iterator[Path]) -> None:
    for error, expected in ((above(21.9), []), (21.9, ["medium"])):
        rows = [*healthy(), *(stale(step, 0.2, sqnr_db=error) for step in range(11, 20))]
        assert [f.severity for f in found(stale_scale, next(paths), rows)] == expected


def test_what_a_fresh_scale_flushes_too_is_not_stale(paths: Iterator[Path]) -> None:
    for usual, count in ((0.3, 1), (above(0.3), 0)):
        rows = [*healthy(flushed=usual), *(stale(step) for step in range(11, 20))]
        assert len(found(stale_scale, next(paths), rows)) == count
    for fresh, count in ((0.5, 1), (above(0.5), 0)):
        rows = [*healthy(staleness=fresh, flushed=0.9), *(stale(step) for step in range(11, 20))]
        assert len(found(stale_scale, next(paths), rows)) == count


def test_a_scale_of_one_or_just_in_time_is_not_stale(paths: Iterator[Path]) -> None:
    cold = [stale(step, scale=1.0) for step in range(5)]
    assert found(stale_scale, next(paths), [*cold, *healthy(steps=range(5, 30))]) == []
    just_in_time = [*healthy(), *(cast(step, staleness=None, flushed=0.9) for step in range(9))]
    assert found(stale_scale, next(paths), just_in_time) == []


def again(step: int, staleness: float = 9.0, amax: float = 9.0, **more: Any) -> Row:
    row = cast(step, more.pop("site", GATE), staleness, cur_amax=amax, sqnr_db=5.0)
    return row | more


def test_a_short_history_forgets_what_comes_back_twice(paths: Iterator[Path]) -> None:
    two = [*healthy(), again(5), again(12)]
    assert found(stale_scale, next(paths), two) == []
    (it,) = found(stale_scale, next(paths), [*two, again(19)])
    assert (it.cause, it.severity, it.site, it.since) == ("stale_scale", "high", GATE, 5)
    assert "longer" in it.remedy


def test_a_jump_to_where_it_never_was_is_not_forgotten(paths: Iterator[Path]) -> None:
    for factor, count in ((2.0, 1), (above(2.0), 0)):
        sizes = (8.0, 8.0 * factor, 8.0 * factor * factor)
        rows = [again(step, amax=amax) for step, amax in zip((5, 12, 19), sizes, strict=True)]
        assert len(found(stale_scale, next(paths), [*healthy(), *rows])) == count


def test_a_short_history_is_bad_where_clipping_is(paths: Iterator[Path]) -> None:
    for error, severity in ((10.0, "high"), (above(10.0), "low")):
        rows = [again(step, sqnr_db=error) for step in (5, 12, 19)]
        (it,) = found(stale_scale, next(paths), [*healthy(), *rows])
        assert it.severity == severity


def test_what_is_bad_began_where_clipping_was(paths: Iterator[Path]) -> None:
    bad = [again(step) for step in (5, 12, 19)]
    for error, since in ((10.0, 2), (above(10.0), 5)):
        rows = [*healthy(), again(2, sqnr_db=error), *bad]
        assert found(stale_scale, next(paths), rows)[0].since == since


def test_clipping_begins_at_an_octave(paths: Iterator[Path]) -> None:
    for staleness, count in ((2.0, 0), (above(2.0), 1)):
        rows = [again(step, staleness) for step in (5, 12, 19)]
        assert len(found(stale_scale, next(paths), [*healthy(), *rows])) == count


def test_what_comes_back_in_one_token_or_in_the_product_alone_is_not_forgotten(
    paths: Iterator[Path],
) -> None:
    inputs = [*healthy(GATE), *(again(step) for step in (5, 12, 19))]
    products = [*healthy(PRODUCT), *healthy(DOWN)]
    for step in (5, 12, 19):
        products += [again(step, site=PRODUCT), again(step, site=DOWN)]
    for rows, count in ((products, 0), ([*inputs, *products], 1)):
        named = found(stale_scale, next(paths), [*healthy(WEIGHT), *rows])
        assert [f.site for f in named] == [GATE] * count
    tokens = [cast(step, PRODUCT, token_ratio=40.0) for step in (5, 12, 19)]
    assert found(stale_scale, next(paths), [*inputs, *healthy(PRODUCT), *tokens]) == []


# --- cold start -----------------------------------------------------------------------------------


def cold(step: int = 0, error: float = 2.0, **more: Any) -> Row:
    site = more.pop("site", GATE)
    return cast(step, site, more.pop("staleness", 30.0), scale=1.0, sqnr_db=error, **more)


SUFFERED = [0.1, *[1.0] * 29]
UNTOUCHED = [1.0] * 30


def start(*rows: Row) -> list[Row]:
    return [*healthy(), *rows]


def test_a_cold_start_must_cost_half_of_an_operand(paths: Iterator[Path]) -> None:
    for error, count in ((below(6.0), 1), (6.0, 0)):
        named = found(cold_start, next(paths), start(cold(error=error)), gradients=SUFFERED)
        assert [(f.cause, f.severity, f.site, f.since) for f in named] == [
            ("cold_start", "medium", GATE, 0)
        ] * count


def test_a_cold_start_is_a_note_where_the_step_does_not_show_it(paths: Iterator[Path]) -> None:
    for gradient, severity in (
        (0.25, "medium"),
        (above(0.25), "low"),
        (below(4.0), "low"),
        (4.0, "medium"),
    ):
        gradients = [gradient, *UNTOUCHED[1:]]
        (it,) = found(cold_start, next(paths), start(cold()), gradients=gradients)
        assert it.severity == severity
    # The loss of a first step has nothing to be held against.
    losses = [9.0, *UNTOUCHED[1:]]
    (it,) = found(cold_start, next(paths), start(cold()), gradients=UNTOUCHED, losses=losses)
    assert it.severity == "low"
    assert found(cold_start, next(paths), start(cold()))[0].severity == "low"


def test_a_resume_without_state_shows_in_the_loss(paths: Iterator[Path]) -> None:
    for loss, severity in ((below(1.5), "low"), (1.5, "high")):
        losses = [loss if step == 12 else 1.0 for step in range(30)]
        rows = start(cold(12))
        (it,) = found(cold_start, next(paths), rows, losses=losses, gradients=UNTOUCHED)
        assert (it.severity, it.since) == (severity, 12)


def test_a_loss_that_tells_within_fifty_steps_makes_a_cold_start_bad(
    paths: Iterator[Path],
) -> None:
    for step, severity in ((0, "high"), (50, "high"), (51, "low")):
        events = [{"step": step, "kind": "diverged", "detail": ""}]
        (it,) = found(cold_start, next(paths), start(cold()), gradients=UNTOUCHED, events=events)
        assert it.severity == severity


def test_what_the_first_measured_scale_casts_as_badly_is_no_cold_start(
    paths: Iterator[Path],
) -> None:
    for error, count in ((6.0, 1), (below(6.0), 0)):
        rows = start(cold(), cast(1, sqnr_db=error))
        assert len(found(cold_start, next(paths), rows)) == count


def test_every_start_has_one_finding_at_the_operand_that_runs_first(paths: Iterator[Path]) -> None:
    rows = [*healthy(WEIGHT), *healthy(UP), *start(cold(0), cold(0, 1.0, site=UP))]
    rows += [cold(0, below(6.0), site=WEIGHT, staleness=0.001), cold(1, site=UP), cold(14)]
    first, second = found(cold_start, next(paths), rows)
    assert (first.site, first.since, second.site, second.since) == (WEIGHT, 0, GATE, 14)
    assert "3 operands" in first.summary and "flushed" in first.summary
    rows += [cold(0, 6.0, site=WEIGHT, staleness=0.001)]
    assert found(cold_start, next(paths), rows)[0].site == UP
    assert "1 operands" in second.summary and "clipped" in second.summary


# --- all together ---------------------------------------------------------------------------------


def test_a_healthy_run_has_no_finding(paths: Iterator[Path]) -> None:
    sites = (GATE, UP, WEIGHT, DOWN, PRODUCT)
    rows = [row for site in sites for row in healthy(site)]
    rows += [cast(0, site, 0.01, scale=1.0, sqnr_db=20.0) for site in sites]
    assert diagnose(write(next(paths), rows, losses=UNTOUCHED)).findings == ()


def test_runs_that_recorded_next_to_nothing(paths: Iterator[Path]) -> None:
    rules = (bulk_underflow, cold_start, delayed_saturation, stale_scale, token_outlier)
    nothing = {"step": 0, "rank": 0, "site": PRODUCT}
    for rows in ([], [nothing], [nothing | {"staleness": 9.0}], [nothing | {"flushed": 1.0}]):
        for rule in rules:
            assert found(rule, next(paths), rows) == []


DRAWS = (
    ("rare_token", 2),
    ("hot_channel_stack", 1),
    ("rare_spike", 5),
    ("rare_feature", 2),
    ("history_too_long", 1),
    ("history_too_long", 2),
    ("history_too_short", 1),
    ("cold_start", 1),
    ("resume_without_state", 1),
)


@pytest.mark.long
@pytest.mark.parametrize(("name", "number"), DRAWS)
def test_the_cause_of_a_training_is_named(tmp_path: Path, name: str, number: int) -> None:
    draw, scenario = draw_of("development", name, number, tmp_path), scenarios()[name]
    draw.folder.mkdir(parents=True)
    torch.manual_seed(draw.seed)
    label = scenario.run(draw)
    assert label.onset is not None
    rows = Loaded(open_run(draw.folder / "run"))
    read = casts.forward_casts(rows).copy()
    first = judge(rows).findings[0]
    assert casts.forward_casts(rows).equals(read)  # rules share it
    assert (first.cause, first.severity != "low") == (scenario.cause, True)
    assert first.site in label.sites
    steps = open_run(draw.folder / "run").steps("loss")["step"]
    assert first.since is not None and abs(first.since - label.onset) <= len(steps) / 10
