"""What rows tell of a cast with one scale, against the cast of the same tensor.

The oracle is `casting.cast_for` and its `Cast`, that is torch, on the tensor itself. A power of two
must be answered exactly, whatever the format; any other scale, and rows of an older schema, with
bounds that hold the answer.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import Tensor

from fp8lab import DelayedScaling, HighPrecision, formats
from fp8lab.casting import Cast
from fp8lab.forecast.magnitudes import Limits, Magnitudes, thresholds
from fp8lab.monitor.measure import summary
from fp8lab.sketch import Sketch, _thresholds

FORMATS = (formats.E4M3, formats.E5M2, formats.E4M3_GAUDI2, formats.E3M2, formats.E2M3)
FORMATS += (formats.E2M1,)


def draws() -> list[Tensor]:
    """Values at every edge and a few steps above it, and ordinary ones."""
    generator = torch.Generator().manual_seed(0)
    edges = torch.arange(2040, dtype=torch.int32)[:, None] << 20
    near = (edges + torch.tensor([0, 1, 2, 3, 4, 1 << 19])).view(torch.float32).flatten()
    plain = torch.randn(5000, generator=generator)
    return [
        plain,
        -near[near > 0],
        plain.bfloat16(),
        torch.exp(8 * plain).bfloat16(),
        torch.exp(8 * plain),
        torch.cat([plain * 300, torch.zeros(7), torch.tensor([torch.inf, -torch.inf, torch.nan])]),
        torch.zeros(3),
        torch.full((4,), torch.inf),
        torch.full((300,), 448.0),
        torch.tensor([3.0]),
    ]


DRAWS = draws()
# Of scale_inv in FP32, which the bounds do not know of.
ROUNDING = 1e-5


def sketch(tensor: Tensor) -> Sketch:
    return Sketch.from_packed(summary(tensor).packed.numpy())


def infs(tensors: list[Tensor]) -> NDArray[np.int64]:
    return np.array([int(tensor.isinf().sum()) for tensor in tensors])


def fine(tensors: list[Tensor]) -> Magnitudes:
    return Magnitudes.unpacked([sketch(tensor).packed_bins() for tensor in tensors], infs(tensors))


def coarse(tensors: list[Tensor]) -> Magnitudes:
    rows = [sketch(tensor).statistics() for tensor in tensors]
    starts = [row.get("histogram_start", 0) for row in rows]
    counts = [np.array(row.get("histogram", []), np.int64) for row in rows]
    return Magnitudes.coarse(starts, counts, infs(tensors))  # type: ignore[arg-type]


def cast(tensor: Tensor, fmt: formats.FloatFormat, scale: float) -> Cast:
    single = torch.tensor(scale, dtype=torch.float32)
    return Cast(tensor, DelayedScaling(), fmt, single, single.reciprocal())


def counted(tensors: list[Tensor], fmt: formats.FloatFormat, scale: float) -> list[list[int]]:
    """Saturated, flushed, subnormal of each."""
    found: list[list[int]] = [[], [], []]
    for tensor in tensors:
        how = cast(tensor, fmt, scale)
        code = how.rounded().abs()
        found[0].append(int(how.saturated().sum()))
        found[1].append(int(((how.fake_quantized() == 0) & (tensor != 0)).sum()))
        found[2].append(int(((code > 0) & (code < fmt.smallest_normal)).sum()))
    return found


def asked(of: Magnitudes, fmt: formats.FloatFormat, scale: float) -> list[Limits]:
    scales = np.full(len(of.starts), scale)
    return [of.saturated(fmt, scales), of.flushed(fmt, scales), of.subnormal(fmt, scales)]


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
@pytest.mark.parametrize("exponent", [-100, -20, -9, -3, 0, 1, 4, 11, 30, 100])
def test_a_power_of_two_is_answered_exactly(fmt: formats.FloatFormat, exponent: int) -> None:
    scale = 2.0**exponent
    expected = counted(DRAWS, fmt, scale)
    for limits, numbers in zip(asked(fine(DRAWS), fmt, scale), expected, strict=True):
        assert limits.low.tolist() == limits.high.tolist() == numbers


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
@pytest.mark.parametrize("scale", [1.0, 3.7, 448 / 3.0, 1e-6, 7e9, 0.3333])
@pytest.mark.parametrize("rows", [fine, coarse])
def test_any_scale_is_answered_within_a_bin(
    rows: Callable[[list[Tensor]], Magnitudes], fmt: formats.FloatFormat, scale: float
) -> None:
    of = rows(DRAWS)
    shift = 20 if rows is fine else 21
    codes = thresholds(fmt, np.array([scale]))[:, 0]
    for position, (limits, numbers) in enumerate(
        zip(asked(of, fmt, scale), counted(DRAWS, fmt, scale), strict=True)
    ):
        low, high = limits.low.tolist(), limits.high.tolist()
        assert all(a <= n <= b for a, n, b in zip(low, numbers, high, strict=True))
        for tensor, a, b in zip(DRAWS, low, high, strict=True):
            bits = tensor.float().abs().view(torch.int32) >> shift
            deciding = codes[[0]] if position == 0 else codes[1 : position + 1]
            in_bin = sum(int((bits == int(code) >> shift).sum()) for code in deciding)
            assert b - a <= in_bin


def test_many_rows_are_answered_as_each_alone() -> None:
    scales = 2.0 ** np.arange(len(DRAWS)) * 1.5
    together = fine(DRAWS).flushed(formats.E4M3, scales)
    for row, tensor in enumerate(DRAWS):
        alone = fine([tensor]).flushed(formats.E4M3, scales[[row]])
        of_sketch = sketch(tensor).flushed(formats.E4M3, float(scales[row]))
        assert (together.low[row], together.high[row]) == (alone.low[0], alone.high[0]) == of_sketch


NUMBERS = hnp.arrays(np.float32, (6,), elements=st.floats(2.0**-120, 2.0**120, width=32))


@settings(deadline=None, max_examples=40)
@given(NUMBERS, st.sampled_from([*FORMATS, formats.BF16, formats.FP16, formats.FP32]))
def test_thresholds_are_those_of_the_cast_itself(
    scales: NDArray[np.float32], fmt: formats.FloatFormat
) -> None:
    if fmt.bits > 8:
        scales = np.ones(1, np.float32)
    expected = [_thresholds(fmt, float(scale)) for scale in scales]
    assert thresholds(fmt, scales.astype(np.float64)).T.tolist() == [[*one] for one in expected]


@pytest.mark.parametrize("fmt", [formats.E4M3, formats.E5M2, formats.E4M3_GAUDI2], ids=repr)
@pytest.mark.parametrize("scale", [1.0, 2.0**9, 37.0, 2.0**-6])
@pytest.mark.parametrize("rows", [fine, coarse])
def test_the_error_lies_between_its_bounds(
    rows: Callable[[list[Tensor]], Magnitudes], fmt: formats.FloatFormat, scale: float
) -> None:
    tensors = [t for t in DRAWS if t.isfinite().all() and float(t.abs().max()) < 2.0**40]
    amax = np.array([float(t.abs().max()) for t in tensors])
    errors = rows(tensors).errors(fmt, np.full(len(tensors), scale), amax, np.zeros(len(tensors)))
    for row, tensor in enumerate(tensors):
        how = cast(tensor, fmt, scale)
        truth = float((how.fake_quantized().double() - tensor.double()).square().sum())
        assert errors.low[row] * (1 - ROUNDING) <= truth <= errors.high[row] * (1 + ROUNDING)
        assert errors.low[row] <= errors.likely[row] * (1 + ROUNDING)
        assert errors.likely[row] <= errors.high[row] * (1 + ROUNDING)


def test_the_likely_error_is_the_error_of_smooth_tensors() -> None:
    tensor = torch.randn(200_000, generator=torch.Generator().manual_seed(1))
    amax, everything = np.array([float(tensor.abs().max())]), np.array([np.inf])
    for scale in (448.0 / amax[0], 2.0**5, 2.0**9, 2.0**-4):
        how = cast(tensor, formats.E4M3, scale)
        truth = float((how.fake_quantized().double() - tensor.double()).square().sum())
        errors = fine([tensor]).errors(formats.E4M3, np.array([scale]), amax, everything)
        assert errors.likely[0] == pytest.approx(truth, rel=0.02)
        assert errors.bulk[0] == errors.likely[0]
        power = float(tensor.double().square().sum())
        assert errors.bulk_power[0] == pytest.approx(power, rel=1e-2)


def test_the_bulk_is_what_lies_below_the_cut() -> None:
    tensor = torch.cat([torch.linspace(1.0, 1.9, 1000), torch.full((5,), 1e6)])
    scale = 448 / 1e6
    errors = fine([tensor]).errors(
        formats.E4M3, np.array([scale]), np.array([1e6]), np.array([16.0])
    )
    bulk = tensor[:1000].double()
    assert errors.bulk_power[0] == pytest.approx(float(bulk.square().sum()), rel=1e-2)
    how = cast(tensor, formats.E4M3, scale)
    truth = float((how.fake_quantized()[:1000].double() - bulk).square().sum())
    assert errors.bulk[0] == pytest.approx(truth, rel=0.02)


@pytest.mark.parametrize("cell", [b"\0", b"\0\0\x03" + bytes(9), b"\0\0\x02" + bytes(7)])
def test_bytes_that_are_none_are_refused(cell: bytes) -> None:
    with pytest.raises(ValueError, match=f"^bins: {len(cell)} bytes, expected those of"):
        Magnitudes.unpacked([b"", cell], np.zeros(2, np.int64))


def test_numbers_of_every_width_come_back() -> None:
    for count in (1, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**40):
        made = sketch(torch.tensor([1.0, 1.5]))
        made.bins[0, made.bins[0] > 0] = count
        of = Magnitudes.unpacked([made.packed_bins()], np.zeros(1, np.int64))
        assert of.bins[0].sum() == of.nonzero[0] == 2 * count


def test_high_precision_is_a_cast_without_a_scale() -> None:
    tensors = [torch.tensor([7e4, 1.0, 2.0**-26, 2.0**-15])]
    expected = counted_without_scale(tensors[0], formats.FP16)
    found = asked(fine(tensors), formats.FP16, 1.0)
    assert [int(limits.high[0]) for limits in found] == expected == [1, 1, 1]


def counted_without_scale(tensor: Tensor, fmt: formats.FloatFormat) -> list[int]:
    how = Cast(tensor, HighPrecision(format=fmt), fmt, None, None)
    code = how.rounded().abs()
    return [
        int(how.saturated().sum()),
        int(((code == 0) & (tensor != 0)).sum()),
        int(((code > 0) & (code < fmt.smallest_normal)).sum()),
    ]
