"""Recipes: how each operand of a linear layer is made low-precision, as frozen values.

The vocabulary is Transformer Engine's: the same class names, field names and defaults, so that a
recipe can be read aloud to someone who knows TE. Two things differ on purpose. Values are frozen
and an unknown field is an error (TE's pydantic classes swallow both mistakes silently). And a
field whose effect fp8lab does not emulate accepts only TE's default: a run called FP8 is what its
recipe says, or it does not start. What TE has no name for stands last among a recipe's fields and
is off by default.

Where a recipe holds, and how it is read and written, is `plan`'s. Only the standard library is
imported here.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, get_args

from fp8lab import formats
from fp8lab.formats import FloatFormat

Operand = Literal["input", "weight", "grad_output"]
OPERANDS: tuple[Operand, ...] = get_args(Operand)
Gemm = Literal["output", "grad_input", "grad_weight"]
# Which operands each GEMM multiplies.
GEMMS: dict[Gemm, tuple[Operand, Operand]] = {
    "output": ("input", "weight"),
    "grad_input": ("grad_output", "weight"),
    "grad_weight": ("grad_output", "input"),
}
# TE's words for the two ways in which an operand is cast: what shares a scale lies along its last
# axis, or along its first (tokens; of a weight, its outputs). A GEMM wants it along what it sums.
Direction = Literal["rowwise", "columnwise"]


def direction_of(operand: Operand, gemm: Gemm) -> Direction:
    """How `operand` is cast for `gemm`; each operand meets one GEMM rowwise, another columnwise."""
    forward = gemm == "output" or (operand, gemm) == ("grad_output", "grad_input")
    return "rowwise" if forward else "columnwise"


class Format(Enum):
    """Element formats: of the forward pass, of gradients, and of inputs and weights in backward.

    The first four are TE's. With E5M2 copies, inputs and weights are cast a second time, to E5M2,
    for the two GEMMs of the backward pass; with E4M3 of Gaudi2 that is what the training of
    Fishman et al. (2409.12517) did.
    """

    E4M3 = (formats.E4M3, formats.E4M3, formats.E4M3)
    E5M2 = (formats.E5M2, formats.E5M2, formats.E5M2)
    HYBRID = (formats.E4M3, formats.E5M2, formats.E4M3)
    E2M1 = (formats.E2M1, formats.E2M1, formats.E2M1)
    HYBRID_E5M2_COPIES = (formats.E4M3, formats.E5M2, formats.E5M2)
    GAUDI2 = (formats.E4M3_GAUDI2, formats.E5M2, formats.E4M3_GAUDI2)
    GAUDI2_E5M2_COPIES = (formats.E4M3_GAUDI2, formats.E5M2, formats.E5M2)

    def __repr__(self) -> str:
        return f"Format.{self.name}"

    def of(self, operand: Operand, direction: Direction = "rowwise") -> FloatFormat:
        """Element format of an operand."""
        forward, gradient, copy = self.value
        if operand == "grad_output":
            return gradient
        return forward if direction == "rowwise" else copy

    @property
    def has_copies(self) -> bool:
        """Whether inputs and weights have another format in the backward pass."""
        forward, _, copy = self.value
        return bool(forward != copy)


@dataclass(frozen=True)
class MMParams:
    """TE's options of a GEMM. The emulation accumulates in FP32 whatever stands here; what a short
    accumulator would do is asked for by `Accumulation`."""

    use_split_accumulator: bool = True


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxother, self.maxstring = 1, 200, 80

    def repr_int(self, x: int, level: int) -> str:  # Python writes none of more than 4300 digits
        return repr(x) if x.bit_length() < 128 else f"a whole number of {x.bit_length()} bits"


def shown(value: object) -> str:
    """A value as an error message shows it: in one line, and never longer than a few.

    Lists in lists that name each other (YAML's aliases) are exponentially longer than their file.
    """
    return _Short().repr(value).replace("\n", " ")


def _require(condition: bool, recipe: object, field: str, expected: str) -> None:
    if not condition:
        got = shown(getattr(recipe, field))
        raise ValueError(f"{type(recipe).__name__}: {field}={got}, expected {expected}")


def _require_switches(recipe: object, *fields: str) -> None:
    for field in fields:
        _require(isinstance(getattr(recipe, field), bool), recipe, field, "True or False")


def _require_te_defaults(recipe: Any, *fields: str) -> None:
    for field in dataclasses.fields(recipe):
        if field.name in fields:
            is_default = getattr(recipe, field.name) == field.default
            expected = f"{field.default!r} (TE's default; nothing else is emulated)"
            _require(is_default, recipe, field.name, expected)


def _require_format(recipe: object, *refused: Format) -> None:
    given = getattr(recipe, "fp8_format")  # noqa: B009  (the type is any recipe that has one)
    refused = (Format.E5M2, Format.E2M1, *refused)
    known = ", ".join(f.name for f in Format if f not in refused)
    good = isinstance(given, Format) and given not in refused
    _require(good, recipe, "fp8_format", f"a Format of {known}")


_NOT_OF_BLOCKS = (Format.HYBRID_E5M2_COPIES, Format.GAUDI2, Format.GAUDI2_E5M2_COPIES)


LONGEST_HISTORY = 1 << 20  # entries, 4 MiB for each operand of each layer; TE's default is 1024
LARGEST_MARGIN = 149  # octaves: beyond, no float32 is that power of two or its inverse


@dataclass(frozen=True, kw_only=True)
class DelayedScaling:
    """Per-tensor scale from a history of past amaxes (TE `DelayedScaling`).

    `amax_compute_algo` may be a function of the history, float32 [amax_history_len], to one amax.
    The scale of step t+1 is (max(format) · 2^-margin) / amax; an amax of 0, infinity or NaN keeps
    the old scale; the first scale is 1. `scaling_factor_compute_algo` may be a function of (amax,
    old scale, max(format), recipe) to the scale, all float32 [], which then rules alone:
    `scaling.power_of_two_scale` is Gaudi's. `reduce_amax`: the history holds the largest amax of
    all ranks, which take as many regions (`fp8lab.autocast`) or, without, as many forwards.

    `stochastic_rounding` (ours) rounds gradients stochastically.
    """

    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: Literal["max", "most_recent"] | Callable[[Any], Any] = "max"
    scaling_factor_compute_algo: Callable[[Any, Any, Any, Any], Any] | None = None
    reduce_amax: bool = True
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: None = None
    stochastic_rounding: bool = False

    def __post_init__(self) -> None:
        _require_format(self)
        # `type`, for True is an int.
        length, margin = self.amax_history_len, self.margin
        whole = type(length) is int and length >= 1
        _require(whole, self, "amax_history_len", "a whole number from 1")
        _require(length <= LONGEST_HISTORY, self, "amax_history_len", f"up to {LONGEST_HISTORY}")
        whole = type(margin) is int and abs(margin) <= LARGEST_MARGIN
        expected = f"a whole number of -{LARGEST_MARGIN} to {LARGEST_MARGIN}"
        _require(whole, self, "margin", expected)
        _require_switches(self, "reduce_amax", "stochastic_rounding")
        known = callable(self.amax_compute_algo) or self.amax_compute_algo in ("max", "most_recent")
        _require(known, self, "amax_compute_algo", "'max', 'most_recent' or a function")
        scaling = self.scaling_factor_compute_algo
        good = scaling is None or callable(scaling)
        _require(good, self, "scaling_factor_compute_algo", "None or a function")
        _require_te_defaults(self, "fp8_dpa", "fp8_mha", "backward_override")


@dataclass(frozen=True, kw_only=True)
class Float8CurrentScaling:
    """Per-tensor scale from the tensor's own amax, just in time (TE `Float8CurrentScaling`).

    The scale is max(format) / amax, 1 where amax is 0, infinity or NaN, and rounded down to a power
    of two if `use_power_2_scales`. TE sets its per-operand `QParams` as class attributes; they are
    its defaults and have no field here.

    `stochastic_rounding` (ours) rounds gradients stochastically.
    """

    use_power_2_scales: bool = False
    fp8_format: Format = Format.HYBRID
    fp8_gemm_fprop: MMParams = MMParams(use_split_accumulator=False)
    fp8_gemm_dgrad: MMParams = MMParams()
    fp8_gemm_wgrad: MMParams = MMParams()
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: None = None
    stochastic_rounding: bool = False

    def __post_init__(self) -> None:
        _require_format(self)
        _require_switches(self, "use_power_2_scales", "stochastic_rounding")
        _require_te_defaults(self, "fp8_gemm_fprop", "fp8_gemm_dgrad", "fp8_gemm_wgrad")
        _require_te_defaults(self, "fp8_dpa", "fp8_mha", "backward_override")


@dataclass(frozen=True, kw_only=True)
class Float8BlockScaling:
    """A scale per block, just in time (TE `Float8BlockScaling`; DeepSeek-V3).

    Blocks are 1 × 128 along what the GEMM sums where the dimension given is 1, and 128 × 128 where
    it is 2; a partial block at an edge is a block. Scales are rounded down to powers of two unless
    `use_f32_scales` (TE reads that from the environment).
    """

    use_f32_scales: bool = False
    fp8_format: Format = Format.E4M3
    x_block_scaling_dim: int = 1
    w_block_scaling_dim: int = 2
    grad_block_scaling_dim: int = 1
    fp8_gemm_fprop: MMParams = MMParams()
    fp8_gemm_dgrad: MMParams = MMParams()
    fp8_gemm_wgrad: MMParams = MMParams()
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: None = None

    def __post_init__(self) -> None:
        _require_format(self, *_NOT_OF_BLOCKS)
        _require_switches(self, "use_f32_scales")
        dims = ("x_block_scaling_dim", "w_block_scaling_dim", "grad_block_scaling_dim")
        for field in dims:
            value = getattr(self, field)
            _require(type(value) is int and value in (1, 2), self, field, "1 or 2")
        if sum(getattr(self, field) == 2 for field in dims) > 1:
            raise ValueError("Float8BlockScaling: 2 for at most one of " + ", ".join(dims))
        _require_te_defaults(self, "fp8_gemm_fprop", "fp8_gemm_dgrad", "fp8_gemm_wgrad")
        _require_te_defaults(self, "fp8_dpa", "fp8_mha", "backward_override")


ScaleRounding = Literal["up", "ocp_floor", "ceil", "even"]


@dataclass(frozen=True, kw_only=True)
class MXFP8BlockScaling:
    """A power-of-two scale (E8M0) per 32 consecutive elements (TE `MXFP8BlockScaling`).

    `enable_2d_quantization` makes the weight's blocks 32 × 32. `margin` is TE's and unused there.

    `scale_rounding` (ours) says how amax becomes an exponent. "up", TE's and cuBLAS's: the smallest
    power of two at which nothing saturates. "ocp_floor", the one of the OCP specification: floor(
    log2 amax) - emax(format), at which elements above max saturate. "ceil": the same with ceil.
    "even": the same after amax is rounded to the format's mantissa. torchao calls them RCEIL,
    FLOOR, CEIL and EVEN.
    """

    margin: int = 0
    fp8_format: Format = Format.E4M3
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: None = None
    enable_2d_quantization: bool = False
    scale_rounding: ScaleRounding = "up"

    def __post_init__(self) -> None:
        _require_format(self, *_NOT_OF_BLOCKS)
        _require_switches(self, "enable_2d_quantization")
        choice = get_args(ScaleRounding)
        _require(self.scale_rounding in choice, self, "scale_rounding", f"one of {choice}")
        _require_te_defaults(self, "margin", "fp8_dpa", "fp8_mha", "backward_override")


@dataclass(frozen=True, kw_only=True)
class NVFP4BlockScaling:
    """E2M1 with an E4M3 scale per 16 elements and an FP32 scale per tensor (TE `NVFP4BlockScaling`;
    2509.25149).

    Weights share a scale per 16 × 16; inputs and gradients are turned by a random Hadamard
    transform, 16 tokens at a time, before the GEMM that sums over tokens; gradients are rounded
    stochastically. Each can be disabled.
    """

    disable_rht: bool = False
    disable_stochastic_rounding: bool = False
    disable_2d_quantization: bool = False
    row_scaled_activation: bool = False
    nvfp4_4over6: str = "none"
    nvfp4_4over6_e4m3_use_256: str = "all"
    nvfp4_4over6_err_mode: str = "MAE"
    fp4_format: Format = Format.E2M1
    fp8_format: Format = Format.E4M3
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: None = None

    def __post_init__(self) -> None:
        _require_switches(self, "disable_rht", "disable_stochastic_rounding")
        _require_switches(self, "disable_2d_quantization")
        _require_te_defaults(self, "row_scaled_activation", "nvfp4_4over6", "nvfp4_4over6_err_mode")
        _require_te_defaults(self, "nvfp4_4over6_e4m3_use_256", "fp4_format", "fp8_format")
        _require_te_defaults(self, "fp8_dpa", "fp8_mha", "backward_override")


@dataclass(frozen=True, kw_only=True)
class RowwiseScaling:
    """A scale per row of what the GEMM sums, just in time (torchao `Float8LinearRecipeName`).

    The defaults are torchao's ROWWISE: E4M3 everywhere, scales rounded down to powers of two, an
    amax below 1e-12 counts as 1e-12. `high_precision_grad_weight` is its ROWWISE_WITH_GW_HP: that
    GEMM's operands stay as they are, and grad_input takes a weight with one scale for the tensor.
    """

    fp8_format: Format = Format.E4M3
    round_scales_to_power_of_2: bool = True
    high_precision_grad_weight: bool = False

    def __post_init__(self) -> None:
        _require_format(self, *_NOT_OF_BLOCKS)
        _require_switches(self, "round_scales_to_power_of_2", "high_precision_grad_weight")


@dataclass(frozen=True, kw_only=True)
class BitNetScaling:
    """One-bit weights, eight-bit inputs, for comparison (BitNet, 2310.11453).

    The weight is sign(w - mean(w)) · mean(|w|), the input an integer of ±127 steps of its amax;
    gradients stay as they are and pass straight through both.
    """


@dataclass(frozen=True, kw_only=True)
class HighPrecision:
    """No FP8: the operand is rounded to `format`, without a scale. FP32 leaves it as it is."""

    format: FloatFormat = formats.BF16

    def __post_init__(self) -> None:
        wide = self.format in (formats.BF16, formats.FP16, formats.FP32)
        _require(wide, self, "format", "BF16, FP16 or FP32")


Recipe = (
    DelayedScaling
    | Float8CurrentScaling
    | Float8BlockScaling
    | MXFP8BlockScaling
    | NVFP4BlockScaling
    | RowwiseScaling
    | BitNetScaling
    | HighPrecision
)
RECIPES: dict[str, type[Recipe]] = {recipe.__name__: recipe for recipe in get_args(Recipe)}


def operand_format(
    recipe: Recipe, operand: Operand, direction: Direction = "rowwise"
) -> FloatFormat:
    """The element format that `recipe` gives to `operand`."""
    if isinstance(recipe, HighPrecision):
        return recipe.format
    if isinstance(recipe, NVFP4BlockScaling):
        return recipe.fp4_format.of(operand)
    if isinstance(recipe, BitNetScaling):
        return {"input": formats.INT8, "weight": formats.SIGN, "grad_output": formats.FP32}[operand]
    if isinstance(recipe, RowwiseScaling) and recipe.high_precision_grad_weight:
        if direction == "columnwise" and operand != "weight":
            return formats.FP32
    return recipe.fp8_format.of(operand, direction)


def recipe_in_words(recipe: Recipe) -> str:
    """Its class, and how it rounds shared exponents where that is not up."""
    rounding = getattr(recipe, "scale_rounding", "up")
    return type(recipe).__name__ + ("" if rounding == "up" else f", scales rounded {rounding}")


def gemm_in_words(precision: Mapping[str, Any], gemm: Gemm) -> str:
    """What a GEMM multiplies, from what a layer says of itself (`input@output` → format, recipe):
    `E5M2 × E4M3 DelayedScaling`, or both in full where they differ."""
    # A run of an earlier release knows its operands, not their GEMMs.
    said = [str(precision.get(f"{o}@{gemm}", precision.get(o, "–"))) for o in GEMMS[gemm]]
    (left, _, left_recipe), (right, _, right_recipe) = (one.partition(" ") for one in said)
    return f"{left} × {right} {right_recipe}" if left_recipe == right_recipe else " × ".join(said)


@dataclass(frozen=True, kw_only=True)
class Accumulation:
    """The short accumulator of Hopper's FP8 GEMMs, emulated.

    Products are summed in steps of 32; the running sum keeps `bits` bits (its implicit one
    included, the rest cut off) and after every `promote_every` elements it is added to an FP32 sum;
    None never promotes it, which is TE's `use_split_accumulator=False`. `gemms` are those that
    accumulate so; the others do in FP32. Source: DeepSeek-V3, 2412.19437, section 3.3.2.
    """

    bits: int = 14
    promote_every: int | None = 128
    gemms: tuple[Gemm, ...] = get_args(Gemm)

    def __post_init__(self) -> None:
        good = type(self.bits) is int and 2 <= self.bits <= 24
        _require(good, self, "bits", "a whole number of 2 to 24")
        every = self.promote_every
        good = every is None or (type(every) is int and every >= 32 and every % 32 == 0)
        _require(good, self, "promote_every", "a multiple of 32, or None")
        good = isinstance(self.gemms, tuple) and all(gemm in [*GEMMS] for gemm in self.gemms)
        _require(good, self, "gemms", f"a tuple of {', '.join(GEMMS)}")


def check_recipes(
    recipes: Mapping[Operand, Recipe],
    gemm_recipes: Mapping[tuple[Operand, Gemm], Recipe],
    where: str,
) -> None:
    """Raises ValueError, opening with `where`, for what a layer could not do."""
    for operand in OPERANDS:
        if operand not in recipes:
            raise ValueError(f"{where}: no recipe for {operand}")
    for (operand, gemm), recipe in gemm_recipes.items():
        if isinstance(recipe, DelayedScaling) and recipe != recipes[operand]:
            one = f"{operand}@{gemm}"
            raise ValueError(f"{where}: {one}: DelayedScaling, expected for {operand} itself")
