"""A sketch against the tensor it was made of: each statistic equals its definition in numpy.

The oracle computes in float64 on the whole tensor, and its histogram takes every magnitude apart
with math.frexp, so that neither the bit view nor the merging of power sums is trusted. Counts,
extremes and histograms are equal; a sum may differ by the rounding of its order, and what is made
of differences of sums by as much as these can lose.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import Tensor

from fp8lab.measure import sketch_vector
from fp8lab.sketch import HISTOGRAM_BINS, SCALARS, Sketch, bin_edge

EXACT = ("count", "zeros", "nans", "infs", "amax", "amin", "min", "max")
SUMS = ("sum", "sum_abs", "sum_squares", "sum_fourth_powers")
# A float64 sum of n terms is off by at most n · 2^-53 of the sum of magnitudes; torch and numpy sum
# pairwise, which leaves far less. The largest tensor here has 2^16 elements.
SUM_TOLERANCE = 1e-12


def sketch(tensor: Tensor) -> Sketch:
    return Sketch.from_vector(sketch_vector(tensor).numpy())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outlier() -> Tensor:
    tensor = normal(64, 96)
    tensor[3, 17] = 4096.5
    return tensor


def padded() -> Tensor:
    tensor = normal(32, 48)
    tensor[20:] = 0.0
    return tensor


def spoilt() -> Tensor:
    tensor = normal(16, 16).abs() + 5.0  # so that a zero in place of a NaN would be the smallest
    tensor[0, 0], tensor[1, 1], tensor[2, 2] = math.nan, math.inf, -math.inf
    return tensor


TENSORS = {
    "random": normal(128, 512),
    "outlier": outlier(),
    "padded": padded(),
    "spoilt": spoilt(),
    "positive": normal(300).abs() + 1.0,
    "negative": -normal(300).abs() - 1.0,
    "zeros": torch.zeros(4, 8),
    "negative zeros": torch.full((5,), -0.0),
    "only NaN": torch.full((3,), math.nan),
    "only infinite": torch.tensor([math.inf, -math.inf]),
    "empty": torch.zeros(0, 8),
    "scalar": torch.tensor(-3.5),
    "bf16": normal(64, 64).bfloat16(),
    "fp16": (normal(64, 64) * 1e-6).half(),  # its subnormals
    "subnormal": torch.tensor([1e-45, -3e-39, 2e-38, 0.0]),
    "huge": torch.tensor([3.4e38, -3.4e38, 1e30]),
    "powers of two": torch.tensor([2.0**k for k in range(-126, 128)]),
    "not contiguous": normal(32, 64).t(),
    "gradient": normal(8).requires_grad_(),
}


def plain(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.detach().double().numpy().ravel()


def frexp_bin(magnitude: float) -> int:
    """Bin of a positive float32 magnitude: bins of 1/4 octave, those below 2^-126 equally wide."""
    fraction, exponent = math.frexp(magnitude)  # fraction in [1/2, 1)
    if exponent - 1 < -126:
        return math.floor(math.ldexp(magnitude, 126 + 2))
    return 4 * (exponent - 1 + 127) + math.floor((2.0 * fraction - 1.0) * 4.0)


def expected_sketch(tensor: Tensor) -> dict[str, Any]:
    x = plain(tensor)
    finite = x[np.isfinite(x)]
    magnitude = np.abs(finite)
    nonzero = magnitude[magnitude > 0]
    histogram = np.zeros(HISTOGRAM_BINS, dtype=np.int64)
    for index, count in Counter(frexp_bin(m) for m in nonzero.tolist()).items():
        histogram[index] = count
    return {
        "count": x.size,
        "zeros": int((x == 0).sum()),
        "nans": int(np.isnan(x).sum()),
        "infs": int(np.isinf(x).sum()),
        "amax": magnitude.max(initial=0.0),
        "amin": nonzero.min(initial=math.inf),
        "min": finite.min(initial=math.inf),
        "max": finite.max(initial=-math.inf),
        "sum": math.fsum(finite),
        "sum_abs": math.fsum(magnitude),
        "sum_squares": math.fsum(magnitude**2),
        "sum_fourth_powers": math.fsum(magnitude**4),
        "histogram": histogram,
    }


def assert_is_sketch_of(got: Sketch, tensor: Tensor) -> None:
    expected = expected_sketch(tensor)
    for name in EXACT:
        assert getattr(got, name) == expected[name], name
    assert got.histogram.tolist() == expected["histogram"].tolist()
    for name in SUMS:
        slack = SUM_TOLERANCE * (expected["sum_abs"] if name == "sum" else expected[name])
        assert abs(getattr(got, name) - expected[name]) <= slack, name


@pytest.mark.parametrize("name", TENSORS)
def test_every_number_is_its_definition(name: str) -> None:
    assert_is_sketch_of(sketch(TENSORS[name]), TENSORS[name])


FLOATS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=1, max_dims=2, min_side=0, max_side=24),
    elements=st.floats(width=32) | st.sampled_from([0.0, -0.0, 1.0, math.nan, math.inf]),
)


@settings(deadline=None, max_examples=100)
@given(FLOATS)
def test_every_number_is_its_definition_for_any_tensor(values: NDArray[np.float32]) -> None:
    assert_is_sketch_of(sketch(torch.from_numpy(values)), torch.from_numpy(values))


@pytest.mark.parametrize("name", TENSORS)
def test_every_statistic_is_its_definition(name: str) -> None:
    x = plain(TENSORS[name])
    finite = x[np.isfinite(x)]
    row = sketch(TENSORS[name]).statistics()
    counts = ("count", "zeros", "nans", "infs")
    if finite.size == 0:
        assert tuple(row) == counts
        return
    magnitude = np.abs(finite)
    squares = np.square(finite)
    rms = math.sqrt(squares.mean())
    expected = {
        "cur_amax": magnitude.max(),
        "min": finite.min(),
        "max": finite.max(),
        "mean": finite.mean(),
        "std": finite.std(),
        "l1_norm": magnitude.sum(),
        "l2_norm": np.linalg.norm(finite),
    }
    if magnitude.max() > 0:
        expected |= {
            "crest": magnitude.max() / rms,
            "kurtosis": np.square(squares).mean() / squares.mean() ** 2,
            "dynamic_range": math.log2(magnitude.max() / magnitude[magnitude > 0].min()),
        }
        counted = expected_sketch(TENSORS[name])["histogram"]
        used = np.flatnonzero(counted)
        assert row.pop("histogram_start") == used[0]
        assert row.pop("histogram") == counted[used[0] : used[-1] + 1].tolist()
    assert set(row) == {*counts, *expected}
    for quantity in ("cur_amax", "min", "max"):
        assert row[quantity] == expected[quantity], quantity
    # Of a variance made of power sums is lost what the mean's square takes away.
    assert row["std"] ** 2 == pytest.approx(expected["std"] ** 2, rel=1e-12, abs=1e-13 * rms**2)
    assert row["mean"] == pytest.approx(expected["mean"], abs=SUM_TOLERANCE * magnitude.mean())
    for quantity in expected.keys() - {"cur_amax", "min", "max", "std", "mean"}:
        assert row[quantity] == pytest.approx(expected[quantity], rel=1e-12), quantity


def test_a_gaussian_has_kurtosis_three() -> None:
    kurtosis = sketch(normal(256, 256)).statistics()["kurtosis"]
    # The estimator's standard deviation is sqrt(96 / n) / 1, here 0.038.
    assert abs(float(kurtosis) - 3.0) < 0.15


MERGED = ("random", "outlier", "padded", "spoilt", "positive", "zeros", "only NaN", "empty")


def joined(*names: str) -> Tensor:
    return torch.cat([TENSORS[name].detach().float().flatten() for name in names])


@pytest.mark.parametrize(("one", "other"), list(itertools.product(MERGED, MERGED)))
def test_two_sketches_merge_into_that_of_both_tensors(one: str, other: str) -> None:
    merged = sketch(TENSORS[one]).merge(sketch(TENSORS[other]))
    assert_is_sketch_of(merged, joined(one, other))


@settings(deadline=None, max_examples=50)
@given(st.lists(FLOATS, min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_any_number_of_sketches_merges_in_any_order(
    parts: list[NDArray[np.float32]], order: Any
) -> None:
    sketches = [sketch(torch.from_numpy(part)) for part in parts]
    whole = torch.from_numpy(np.concatenate([part.ravel() for part in parts]))
    while len(sketches) > 1:
        order.shuffle(sketches)
        sketches.append(sketches.pop().merge(sketches.pop()))
    assert_is_sketch_of(sketches[0], whole)


def test_a_vector_holds_the_scalars_in_order_then_the_histogram() -> None:
    vector = sketch_vector(TENSORS["spoilt"])
    expected = expected_sketch(TENSORS["spoilt"])
    assert vector.dtype == torch.float64
    assert vector.shape == (len(SCALARS) + HISTOGRAM_BINS,)
    assert vector[: len(EXACT)].tolist() == [float(expected[name]) for name in EXACT]
    assert vector[len(SCALARS) :].tolist() == expected["histogram"].tolist()


def test_bin_edges_are_the_smallest_magnitudes_of_their_bins() -> None:
    for index in range(1, HISTOGRAM_BINS - 4):
        edge = bin_edge(index)
        below = float(np.nextafter(np.float32(edge), np.float32(0.0)))
        assert frexp_bin(edge) == index
        assert below == 0.0 or frexp_bin(below) == index - 1
    assert bin_edge(0) == 0.0
    assert bin_edge(HISTOGRAM_BINS - 4) == math.inf
