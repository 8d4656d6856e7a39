"""Float formats as data, and the readable specification of rounding.

A format is a frozen value; everything else about it (largest value, smallest subnormal, …) is a
property worked out from its fields, so no table of constants can disagree with another. `round`
is the specification: exact, scalar, slow, made only of Python floats (binary64 holds every value
and every midpoint of every format here exactly). The tensor code in `rounding` is tested against
it on one table; neither is derived from the other.

Rejected: passing a format as an (exponent, mantissa) pair. "E4M3" names at least three formats,
which differ in what they do with the topmost codes: 448 (OCP, NVIDIA), 240 (IEEE-like, Gaudi2)
and 240 with another bias (FNUZ). `top` says which.

Sources: OCP 8-bit Floating Point Specification 1.0 (E4M3, E5M2); OCP Microscaling Formats 1.0
(E3M2, E2M3, E2M1, E8M0); Fishman et al. 2409.12517 for the 240 of Gaudi2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Rounding = Literal["nearest", "toward_zero", "stochastic"]
Overflow = Literal["saturate", "special"]

# What the topmost exponent's codes mean:
#   ieee    all of them are infinities and NaNs
#   fn      only the all-ones mantissa is NaN, there is no infinity   ("finite")
#   fnuz    none of them is special; NaN is the code of negative zero ("finite, unsigned zero")
#   finite  none of them is special and the format has no NaN at all
Top = Literal["ieee", "fn", "fnuz", "finite"]


@dataclass(frozen=True, kw_only=True, repr=False)
class FloatFormat:
    """A binary floating-point format of at most 32 bits.

    `bias` is the IEEE-style exponent bias: a normal number with exponent field e is worth
    2^(e - bias) * 1.m, and the subnormals share the exponent 1 - bias.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    top: Top
    signed: bool = True
    # E8M0 has neither zero nor subnormals: every code but NaN is a power of two.
    has_zero: bool = True

    def __repr__(self) -> str:
        return self.name

    @property
    def bits(self) -> int:
        """Width of a code."""
        return self.signed + self.exponent_bits + self.mantissa_bits

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number."""
        return 1 - self.bias if self.has_zero else -self.bias

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest finite number."""
        all_ones = (1 << self.exponent_bits) - 1
        whole_exponent_is_special = self.top == "ieee" or (
            self.top == "fn" and self.mantissa_bits == 0
        )
        return all_ones - whole_exponent_is_special - self.bias

    @property
    def max(self) -> float:
        """Largest finite value."""
        ulps_below_two = 2 if self.top == "fn" and self.mantissa_bits > 0 else 1
        significand = 2.0 - ulps_below_two * 2.0**-self.mantissa_bits
        return math.ldexp(significand, self.max_exponent)

    @property
    def smallest_normal(self) -> float:
        """Smallest positive number of full precision."""
        return math.ldexp(1.0, self.min_exponent)

    @property
    def smallest_subnormal(self) -> float:
        """Smallest positive number (the smallest normal where there are no subnormals)."""
        return math.ldexp(1.0, self.min_exponent - (self.mantissa_bits if self.has_zero else 0))

    @property
    def epsilon(self) -> float:
        """Distance from 1 to the next larger value."""
        return math.ldexp(1.0, -self.mantissa_bits)

    @property
    def overflow(self) -> Overflow:
        """What a cast does with values beyond `max`: formats of at most 8 bits saturate, as every
        cast of Transformer Engine does (SATFINITE); wider ones overflow as IEEE 754 says."""
        return "saturate" if self.bits <= 8 else "special"

    @property
    def has_infinity(self) -> bool:
        """Whether some code means infinity."""
        return self.top == "ieee"

    @property
    def has_nan(self) -> bool:
        """Whether some code means not-a-number."""
        return self.top != "finite"

    def values(self) -> Iterator[float]:
        """Every finite non-negative value, ascending (-0.0 is left out)."""
        if self.has_zero:
            yield 0.0
            for significand in range(1, 1 << self.mantissa_bits):
                yield significand * self.smallest_subnormal
        for exponent in range(self.min_exponent, self.max_exponent + 1):
            for fraction in range(1 << self.mantissa_bits):
                value = math.ldexp(1.0 + fraction * self.epsilon, exponent)
                if value <= self.max:
                    yield value

    def round(
        self,
        value: float,
        rounding: Rounding = "nearest",
        overflow: Overflow | None = None,
        draw: float = 0.0,
    ) -> float:
        """The representable value that `value` becomes.

        `rounding` is to nearest with ties to even, toward zero, or stochastic, where `draw`, a
        uniform number in [0, 1), decides. `overflow` is the format's own unless given:
        `"saturate"` makes anything larger than `max`, infinity included, ±max; `"special"` makes it
        infinity, or NaN where the format has no infinity, but toward zero a finite value stops at
        max (IEEE 754, 7.4). NaN stays NaN. Zeros keep their sign unless the format has no negative
        zero.

        Raises ValueError for NaN in a format that has none, and for a negative number or a zero
        in a format without them.
        """
        if rounding not in ("nearest", "toward_zero", "stochastic"):
            expected = "'nearest', 'toward_zero' or 'stochastic'"
            raise ValueError(f"rounding: {rounding!r}, expected {expected}")
        if overflow not in (None, "saturate", "special"):
            raise ValueError(f"overflow: {overflow!r}, expected 'saturate' or 'special'")
        if math.isnan(value):
            if not self.has_nan:
                raise ValueError(f"{self.name}: NaN cannot be represented, the format has no NaN")
            return math.nan
        if not self.signed and (value < 0 or (value == 0 and not self.has_zero)):
            raise ValueError(f"{self.name}: {value} cannot be represented, values are positive")
        magnitude = self._round_magnitude(abs(value), rounding, draw)
        if magnitude > self.max:
            stops_at_max = rounding == "toward_zero" and math.isfinite(value)
            magnitude = self.max if stops_at_max else self._overflowed(value, overflow)
        if magnitude == 0.0 and self.top == "fnuz":
            return 0.0
        return math.copysign(magnitude, value)

    def _overflowed(self, value: float, overflow: Overflow | None) -> float:
        if (overflow or self.overflow) == "saturate":
            return self.max
        if self.has_infinity:
            return math.inf
        if self.has_nan:
            return math.nan
        raise ValueError(f"{self.name}: {value} overflows and the format has no infinity")

    def _round_magnitude(self, magnitude: float, rounding: Rounding, draw: float) -> float:
        """Round |value| on the unbounded grid: the exponent may exceed the format's largest."""
        if magnitude == 0.0 or math.isinf(magnitude):
            return magnitude
        exponent = max(math.frexp(magnitude)[1] - 1, self.min_exponent)
        quantum = math.ldexp(1.0, exponent - self.mantissa_bits)
        # Exact: the quotient of a binary64 by a power of two, far from binary64's own limits.
        quotient = magnitude / quantum
        if rounding == "nearest":
            steps = round(quotient)  # Python rounds ties to even
        elif rounding == "toward_zero":
            steps = math.floor(quotient)
        else:
            steps = math.floor(quotient) + (draw < quotient - math.floor(quotient))
        if steps == 0 and not self.has_zero:
            steps = 1
        return steps * quantum


E4M3 = FloatFormat(name="E4M3", exponent_bits=4, mantissa_bits=3, bias=7, top="fn")
E4M3_GAUDI2 = FloatFormat(name="E4M3_GAUDI2", exponent_bits=4, mantissa_bits=3, bias=7, top="ieee")
E4M3FNUZ = FloatFormat(name="E4M3FNUZ", exponent_bits=4, mantissa_bits=3, bias=8, top="fnuz")
E5M2 = FloatFormat(name="E5M2", exponent_bits=5, mantissa_bits=2, bias=15, top="ieee")
E5M2FNUZ = FloatFormat(name="E5M2FNUZ", exponent_bits=5, mantissa_bits=2, bias=16, top="fnuz")
E3M2 = FloatFormat(name="E3M2", exponent_bits=3, mantissa_bits=2, bias=3, top="finite")
E2M3 = FloatFormat(name="E2M3", exponent_bits=2, mantissa_bits=3, bias=1, top="finite")
E2M1 = FloatFormat(name="E2M1", exponent_bits=2, mantissa_bits=1, bias=1, top="finite")
E8M0 = FloatFormat(
    name="E8M0",
    exponent_bits=8,
    mantissa_bits=0,
    bias=127,
    top="fn",
    signed=False,
    has_zero=False,
)
BF16 = FloatFormat(name="BF16", exponent_bits=8, mantissa_bits=7, bias=127, top="ieee")
FP16 = FloatFormat(name="FP16", exponent_bits=5, mantissa_bits=10, bias=15, top="ieee")
FP32 = FloatFormat(name="FP32", exponent_bits=8, mantissa_bits=23, bias=127, top="ieee")

# A grid without exponents is a format with one exponent bit: its normal numbers and its subnormals
# lie equally far apart. Only BitNet's recipe uses these two: integers of ±127, and the two signs.
INT8 = FloatFormat(name="INT8", exponent_bits=1, mantissa_bits=6, bias=-5, top="finite")
SIGN = FloatFormat(
    name="SIGN", exponent_bits=0, mantissa_bits=0, bias=0, top="finite", has_zero=False
)

FORMATS = {
    number_format.name: number_format
    for number_format in (
        E4M3,
        E4M3_GAUDI2,
        E4M3FNUZ,
        E5M2,
        E5M2FNUZ,
        E3M2,
        E2M3,
        E2M1,
        E8M0,
        BF16,
        FP16,
        FP32,
    )
}
