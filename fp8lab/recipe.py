"""Recipes: how each operand of a linear layer is made low-precision, as frozen values.

The vocabulary is Transformer Engine's: the same class names, field names and defaults, so that a
recipe can be read aloud to someone who knows TE. Two things differ on purpose. Values are frozen
and an unknown field is an error (TE's pydantic classes swallow both mistakes silently). And a
field whose effect fp8lab does not emulate accepts only TE's default: a run called FP8 is what its
recipe says, or it does not start.

TE gives one recipe to a whole model. The interesting experiments change *one* operand of *one*
layer, so a `Plan` adds where a recipe holds: which layers, and which overrides. Rejected: an
`override` method on recipes, which would make them hold names of layers.

Only the standard library is imported here; PyYAML is imported inside `load_recipe`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from fp8lab import formats
from fp8lab.formats import FloatFormat

Operand = Literal["input", "weight", "grad_output"]
OPERANDS: tuple[Operand, ...] = ("input", "weight", "grad_output")


class Format(Enum):
    """Transformer Engine's choice of element formats: (forward pass, backward pass)."""

    E4M3 = (formats.E4M3, formats.E4M3)
    HYBRID = (formats.E4M3, formats.E5M2)

    def of(self, operand: Operand) -> FloatFormat:
        """Element format of an operand: inputs and weights are of the forward pass."""
        forward, backward = self.value
        return backward if operand == "grad_output" else forward


def _require(condition: bool, recipe: object, field: str, expected: str) -> None:
    if not condition:
        got = getattr(recipe, field)
        raise ValueError(f"{type(recipe).__name__}: {field}={got!r}, expected {expected}")


@dataclass(frozen=True, kw_only=True)
class DelayedScaling:
    """Per-tensor scale from a history of past amaxes (TE `DelayedScaling`).

    `amax_compute_algo` may be a function of the history, float32 [amax_history_len], to one amax.
    The scale of step t+1 is (max(format) · 2^-margin) / amax; an amax of 0, infinity or NaN keeps
    the old scale; the first scale is 1.
    """

    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: Literal["max", "most_recent"] | Callable[[Any], Any] = "max"
    scaling_factor_compute_algo: None = None
    reduce_amax: bool = True
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: None = None

    def __post_init__(self) -> None:
        _require(isinstance(self.fp8_format, Format), self, "fp8_format", "a Format")
        # `type`, for True is an int.
        whole = type(self.amax_history_len) is int and self.amax_history_len >= 1
        _require(whole, self, "amax_history_len", "a whole number from 1")
        _require(type(self.margin) is int, self, "margin", "a whole number")
        _require(isinstance(self.reduce_amax, bool), self, "reduce_amax", "True or False")
        known = callable(self.amax_compute_algo) or self.amax_compute_algo in ("max", "most_recent")
        _require(known, self, "amax_compute_algo", "'max', 'most_recent' or a function")
        _require_te_defaults(self, "scaling_factor_compute_algo", "backward_override")
        _require_te_defaults(self, "fp8_dpa", "fp8_mha")


@dataclass(frozen=True, kw_only=True)
class Float8CurrentScaling:
    """Per-tensor scale from the tensor's own amax, just in time (TE `Float8CurrentScaling`).

    The scale is max(format) / amax, 1 where amax is 0, infinity or NaN, and rounded down to a power
    of two if `use_power_2_scales`. TE sets its per-operand `QParams` and GEMM parameters as class
    attributes; they are the defaults of its kernels and have no field here.
    """

    use_power_2_scales: bool = False
    fp8_format: Format = Format.HYBRID
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: None = None

    def __post_init__(self) -> None:
        _require(isinstance(self.fp8_format, Format), self, "fp8_format", "a Format")
        is_switch = isinstance(self.use_power_2_scales, bool)
        _require(is_switch, self, "use_power_2_scales", "True or False")
        _require_te_defaults(self, "fp8_dpa", "fp8_mha", "backward_override")


@dataclass(frozen=True, kw_only=True)
class HighPrecision:
    """No FP8: the operand is rounded to `format`, without a scale. FP32 leaves it as it is."""

    format: FloatFormat = formats.BF16

    def __post_init__(self) -> None:
        wide = self.format in (formats.BF16, formats.FP16, formats.FP32)
        _require(wide, self, "format", "BF16, FP16 or FP32")


Recipe = DelayedScaling | Float8CurrentScaling | HighPrecision
RECIPES: dict[str, type[Recipe]] = {
    recipe.__name__: recipe for recipe in (DelayedScaling, Float8CurrentScaling, HighPrecision)
}


def _require_te_defaults(recipe: Recipe, *fields: str) -> None:
    for field in dataclasses.fields(recipe):
        if field.name in fields:
            is_default = getattr(recipe, field.name) == field.default
            expected = f"{field.default!r} (TE's default; nothing else is emulated)"
            _require(is_default, recipe, field.name, expected)


def operand_format(recipe: Recipe, operand: Operand) -> FloatFormat:
    """The element format that `recipe` gives to `operand`."""
    if isinstance(recipe, HighPrecision):
        return recipe.format
    return recipe.fp8_format.of(operand)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe and where it holds.

    `include` and `exclude` are shell-style patterns over layer names (`layers.*.mlp.down`).
    `overrides` maps `LAYERS` or `LAYERS:OPERAND` to the recipe that holds there instead; where
    several match, the last one wins.
    """

    recipe: Recipe
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    overrides: Mapping[str, Recipe] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for where, patterns in (("include", self.include), ("exclude", self.exclude)):
            if isinstance(patterns, str):  # a tuple of letters otherwise, "*" perhaps among them
                raise ValueError(f"{where}: {patterns!r}, expected a tuple of layer patterns")
        for where, recipe in (("recipe", self.recipe), *self.overrides.items()):
            if not isinstance(recipe, Recipe):
                raise ValueError(f"{where}: {recipe!r}, expected one of {', '.join(RECIPES)}")
        for pattern in self.overrides:
            _, colon, operand = pattern.partition(":")
            if colon and operand not in OPERANDS:
                raise ValueError(f"override {pattern!r}: operand {operand!r}, expected {OPERANDS}")

    def covers(self, layer: str) -> bool:
        """Whether the plan converts this layer."""
        included = any(fnmatchcase(layer, pattern) for pattern in self.include)
        return included and not any(fnmatchcase(layer, pattern) for pattern in self.exclude)

    def recipe_for(self, layer: str, operand: Operand) -> Recipe:
        """The recipe in force for one operand of one layer."""
        chosen = self.recipe
        for pattern, recipe in self.overrides.items():
            layers, colon, of_operand = pattern.partition(":")
            if fnmatchcase(layer, layers) and (not colon or of_operand == operand):
                chosen = recipe
        return chosen

    def patterns_without_match(self, layers: Iterable[str]) -> list[str]:
        """Patterns that name no layer among `layers`: almost certainly a spelling mistake."""
        names = list(layers)
        patterns = [*self.include, *self.exclude]
        patterns += [pattern.partition(":")[0] for pattern in self.overrides]
        return [p for p in patterns if not any(fnmatchcase(name, p) for name in names)]


def recipe_to_dict(recipe: Recipe | Plan) -> dict[str, Any]:
    """Plain JSON-able data: the class name under "recipe" and every field that is not TE's default.

    `recipe_from_dict` reads it back, unless a function was given as `amax_compute_algo`: a function
    is written as its name.
    """
    if isinstance(recipe, Plan):
        data = recipe_to_dict(recipe.recipe)
        if recipe.include != ("*",):
            data["include"] = list(recipe.include)
        if recipe.exclude:
            data["exclude"] = list(recipe.exclude)
        if recipe.overrides:
            data["overrides"] = {w: recipe_to_dict(r) for w, r in recipe.overrides.items()}
        return data
    data = {"recipe": type(recipe).__name__}
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if value != field.default:
            data[field.name] = getattr(value, "name", None) or getattr(value, "__name__", value)
    return data


def recipe_from_dict(data: Any, where: str) -> Plan:
    """The plan that `data` describes; `where` (a file, a key) opens every error message.

    Raises ValueError in one line for anything unknown, missing or of the wrong type.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{where}: {type(data).__name__}, expected a mapping with a key 'recipe'")
    fields = {key: value for key, value in data.items() if key in ("include", "exclude")}
    for key, value in fields.items():
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{where}: {key}: {value!r}, expected a list of layer patterns")
        fields[key] = tuple(value)
    overrides = data.get("overrides", {})
    if not isinstance(overrides, dict):
        raise ValueError(f"{where}: overrides: {overrides!r}, expected pattern: recipe pairs")
    own = {key: data[key] for key in data if key not in ("include", "exclude", "overrides")}
    recipe = _one_recipe(own, where)
    instead = {
        str(pattern): _one_recipe(value, f"{where}: overrides: {pattern}")
        for pattern, value in overrides.items()
    }
    try:
        return Plan(recipe=recipe, overrides=instead, **fields)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _one_recipe(data: Any, where: str) -> Recipe:
    if not isinstance(data, dict):
        data = {"recipe": data}
    name = data.get("recipe")
    if not isinstance(name, str) or name not in RECIPES:
        raise ValueError(f"{where}: recipe: {name!r}, expected one of {', '.join(RECIPES)}")
    values = {key: value for key, value in data.items() if key != "recipe"}
    for key, names in (("fp8_format", Format.__members__), ("format", formats.FORMATS)):
        if isinstance(values.get(key), str):
            if values[key] not in names:
                choice = ", ".join(names)
                raise ValueError(f"{where}: {key}: {values[key]!r}, expected one of {choice}")
            values[key] = names[values[key]]
    known = [field.name for field in dataclasses.fields(RECIPES[name])]
    for key in values:
        if key not in known:
            choice = ", ".join(known)
            raise ValueError(f"{where}: {key}: unknown field, expected one of {choice}")
    try:
        return RECIPES[name](**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def load_recipe(path: str | Path) -> Plan:
    """Read a plan from a YAML file.

    ::

        recipe: DelayedScaling
        amax_history_len: 16
        exclude: ["head"]
        overrides:
          "*:grad_output": Float8CurrentScaling
          "layers.0.*": {recipe: HighPrecision, format: BF16}

    Raises ValueError in one line that names the file, the key and what was expected; OSError where
    the file cannot be read.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file, expected YAML") from None
    try:
        data = yaml.safe_load(text)
    except Exception as error:  # PyYAML lets through what int(), date() and the stack raise
        place = getattr(error, "problem_mark", None)
        line = f", line {place.line + 1}" if place else ""
        raise ValueError(f"{path}{line}: not valid YAML") from None
    return recipe_from_dict(data, str(path))
