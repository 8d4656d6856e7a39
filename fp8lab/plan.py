"""Plans: which recipe holds where; read from YAML, written as plain data, to and from TE's objects.

TE gives one recipe to a whole model. The interesting experiments change *one* operand of *one*
GEMM of *one* layer, so a `Plan` adds where a recipe holds: which layers, and which overrides.
Rejected: an `override` method on recipes, which would make them hold names of layers.

Only the standard library is imported here; PyYAML is imported inside `load_recipe`, Transformer
Engine inside `to_te`.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fp8lab import formats
from fp8lab.recipe import (
    GEMMS,
    OPERANDS,
    RECIPES,
    Accumulation,
    DelayedScaling,
    Float8BlockScaling,
    Float8CurrentScaling,
    Format,
    Gemm,
    MMParams,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
    Operand,
    Recipe,
    check_recipes,
    shown,
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe and where it holds.

    `include` and `exclude` are shell-style patterns over layer names (`layers.*.mlp.down`).
    `overrides` maps `LAYERS`, `LAYERS:OPERAND`, `LAYERS@GEMM` or `LAYERS:OPERAND@GEMM` to the
    recipe that holds there instead; where several match, the last one wins. Each recipe may be one
    of Transformer Engine's own objects. `accumulation` is how the GEMMs sum, in FP32 if None.
    """

    recipe: Recipe
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    overrides: Mapping[str, Recipe] = dataclasses.field(default_factory=dict)
    accumulation: Accumulation | None = None

    def __post_init__(self) -> None:
        for where, patterns in (("include", self.include), ("exclude", self.exclude)):
            # A string is a sequence of letters, "*" perhaps among them.
            if not isinstance(patterns, tuple) or not all(isinstance(p, str) for p in patterns):
                raise ValueError(f"{where}: {shown(patterns)}, expected a tuple of layer patterns")
        object.__setattr__(self, "recipe", as_recipe(self.recipe, "recipe"))
        if not isinstance(self.overrides, Mapping):
            raise ValueError(f"overrides: {shown(self.overrides)}, expected pattern: recipe pairs")
        for pattern in self.overrides:
            if not isinstance(pattern, str):
                raise ValueError(f"override {shown(pattern)}: expected a pattern in words")
            _, operand, gemm = _parts(pattern)
            where = f"override {shown(pattern)}"
            if operand is not None and operand not in OPERANDS:
                raise ValueError(f"{where}: operand {shown(operand)}, expected {OPERANDS}")
            known = [g for g in GEMMS if operand is None or operand in GEMMS[g]]
            if gemm is not None and gemm not in known:
                choice = ", ".join(known)
                raise ValueError(f"{where}: gemm {shown(gemm)}, expected one of {choice}")
        overrides = {where: as_recipe(recipe, where) for where, recipe in self.overrides.items()}
        object.__setattr__(self, "overrides", overrides)
        if not isinstance(self.accumulation, Accumulation | None):
            got = shown(self.accumulation)
            raise ValueError(f"accumulation: {got}, expected an Accumulation")

    def covers(self, layer: str) -> bool:
        """Whether the plan converts this layer."""
        included = any(fnmatchcase(layer, pattern) for pattern in self.include)
        return included and not any(fnmatchcase(layer, pattern) for pattern in self.exclude)

    def recipe_for(self, layer: str, operand: Operand, gemm: Gemm | None = None) -> Recipe:
        """The recipe in force for one operand of one layer: for one GEMM, or where no GEMM is
        singled out."""
        chosen = self.recipe
        for pattern, recipe in self.overrides.items():
            layers, of_operand, of_gemm = _parts(pattern)
            if (
                fnmatchcase(layer, layers)
                and of_operand in (None, operand)
                and of_gemm in (None, gemm)
            ):
                chosen = recipe
        return chosen

    def singles_out(self, layer: str, operand: Operand, gemm: Gemm) -> bool:
        """Whether an override names this GEMM of the layer."""
        parts = (_parts(pattern) for pattern in self.overrides)
        return any(
            fnmatchcase(layer, layers) and of_operand in (None, operand) and of_gemm == gemm
            for layers, of_operand, of_gemm in parts
        )

    def recipes_of(
        self, layer: str, who: str
    ) -> tuple[dict[Operand, Recipe], dict[tuple[Operand, Gemm], Recipe]]:
        """The recipes in force for a layer's operands, and where a GEMM is singled out.

        Raises ValueError, opening with `who`, for what a layer could not do.
        """
        recipes: dict[Operand, Recipe] = {o: self.recipe_for(layer, o) for o in OPERANDS}
        singled_out: dict[tuple[Operand, Gemm], Recipe] = {
            (o, gemm): self.recipe_for(layer, o, gemm)
            for gemm in GEMMS
            for o in GEMMS[gemm]
            if self.singles_out(layer, o, gemm)
        }
        check_recipes(recipes, singled_out, f"{who}: {layer}")
        return recipes, singled_out

    def patterns_without_match(self, layers: Iterable[str]) -> list[str]:
        """Patterns that name no layer among `layers`: almost certainly a spelling mistake."""
        names = list(layers)
        patterns = [*self.include, *self.exclude, *(_parts(key)[0] for key in self.overrides)]
        return [p for p in patterns if not any(fnmatchcase(name, p) for name in names)]


def nearest_layers(pattern: str, layers: Iterable[str]) -> str:
    """Of layers that a pattern does not match: how many they are, and of those that differ by more
    than a number the few whose names are most like it."""
    names = list(layers)
    matcher = difflib.SequenceMatcher(b=pattern)
    near: dict[str, str] = {}

    def likeness(name: str) -> float:
        matcher.set_seq1(name)
        return matcher.ratio()

    for name in sorted(names, key=likeness, reverse=True):
        near.setdefault(re.sub(r"\d+", "#", name), name)
    return f"{len(names)}, nearest {', '.join([*near.values()][:4])}"


def _parts(pattern: str) -> tuple[str, str | None, str | None]:
    """LAYERS[:OPERAND][@GEMM]."""
    rest, at, gemm = pattern.partition("@")
    layers, colon, operand = rest.partition(":")
    return layers, operand if colon else None, gemm if at else None


def as_recipe(recipe: Any, where: str) -> Recipe:
    """A recipe of ours as it is, one of Transformer Engine's as ours.

    Raises ValueError, opening with `where`, for anything else.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if type(recipe).__module__.startswith("transformer_engine"):
        return from_te(recipe)
    choice = ", ".join(f"{name}()" for name in RECIPES)  # neither a name nor a class
    raise ValueError(f"{named(where)}: {shown(recipe)}, expected one of {choice}")


# What TE keeps beside a recipe's fields: its `QParams` per operand, and what they are by default.
_QUANTIZATION = ("fp8_quant_fwd_inp", "fp8_quant_fwd_weight", "fp8_quant_bwd_grad")
_OF_TE: tuple[type[Recipe], ...] = (
    DelayedScaling,
    Float8CurrentScaling,
    Float8BlockScaling,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
)


def from_te(recipe: Any) -> Recipe:
    """Our recipe with the fields of one of Transformer Engine's.

    Raises ValueError for a `CustomRecipe`, for what is not emulated, and where TE's per-operand
    `QParams` say something else than the fields do (TE then follows the `QParams`).
    """
    name = type(recipe).__name__
    ours = {cls.__name__: cls for cls in _OF_TE}.get(name)
    if ours is None:
        choice = ", ".join(cls.__name__ for cls in _OF_TE)
        raise ValueError(f"from_te: {name}, expected one of {choice}")
    values: dict[str, Any] = {}
    for field in dataclasses.fields(ours):
        if hasattr(recipe, field.name):
            value = getattr(recipe, field.name)
            if type(value).__name__ == "Format":
                value = Format[value.name]
            elif type(value).__name__ == "MMParams":
                value = MMParams(use_split_accumulator=value.use_split_accumulator)
            values[field.name] = value
    powers = values.get("use_power_2_scales", not values.get("use_f32_scales", True))
    for operand in _QUANTIZATION:
        how = getattr(recipe, operand, None)
        if how is not None and (how.power_2_scale, how.amax_epsilon) != (powers, 0.0):
            got = f"power_2_scale={how.power_2_scale}, amax_epsilon={how.amax_epsilon}"
            expected = f"{powers} and 0.0, as its fields say (TE goes by the former)"
            raise ValueError(f"from_te: {name}.{operand}: {got}, expected {expected}")
    return ours(**values)


def to_te(recipe: Recipe) -> Any:
    """Transformer Engine's own object with the fields of ours.

    Raises ValueError for what TE has no words for; ImportError without Transformer Engine.
    """
    name = type(recipe).__name__
    if not isinstance(recipe, _OF_TE):
        raise ValueError(f"to_te: Transformer Engine has no {name}")
    from transformer_engine.common import recipe as te

    theirs = getattr(te, name)
    known = {field.name for field in dataclasses.fields(theirs)}
    values: dict[str, Any] = {}
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if value == field.default:
            continue
        ours_alone = isinstance(value, Format) and value.name not in te.Format.__members__
        if field.name not in known or ours_alone:
            raise ValueError(f"to_te: Transformer Engine has no {name}({field.name}={value!r})")
        values[field.name] = te.Format[value.name] if isinstance(value, Format) else value
    made = theirs(**values)
    if from_te(made) != recipe:
        raise ValueError(f"to_te: {name}: TE would make something else of {values}")
    return made


def recipe_to_dict(recipe: Recipe | Plan) -> dict[str, Any]:
    """Plain JSON-able data: the class name under "recipe" and every field that is not TE's default.

    `recipe_from_dict` reads it back, unless it has a function, which is written as `function NAME`.
    """
    if isinstance(recipe, Plan):
        data = recipe_to_dict(recipe.recipe)
        if recipe.include != ("*",):
            data["include"] = list(recipe.include)
        if recipe.exclude:
            data["exclude"] = list(recipe.exclude)
        if recipe.overrides:
            data["overrides"] = {w: recipe_to_dict(r) for w, r in recipe.overrides.items()}
        if recipe.accumulation is not None:
            data["accumulation"] = dataclasses.asdict(recipe.accumulation)
            data["accumulation"]["gemms"] = list(recipe.accumulation.gemms)
        return data
    data = {"recipe": type(recipe).__name__}
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if value != field.default:
            if callable(value):
                value = f"function {getattr(value, '__name__', type(value).__name__)}"
            data[field.name] = getattr(value, "name", value)
    return data


def in_words(recipe: Recipe) -> str:
    """A recipe's name with the settings that are not TE's default."""
    settings = recipe_to_dict(recipe)
    name = settings.pop("recipe")
    told = ", ".join(f"{setting}={value}" for setting, value in settings.items())
    return f"{name} ({told})" if told else str(name)


def recipe_from_dict(data: Any, where: str) -> Plan:
    """The plan that `data` describes; `where` (a file, a key) opens every error message.

    Raises ValueError in one line for anything unknown, missing or of the wrong type.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{where}: {type(data).__name__}, expected a mapping with a key 'recipe'")
    fields = {key: value for key, value in data.items() if key in ("include", "exclude")}
    for key, value in fields.items():
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{where}: {key}: {shown(value)}, expected a list of layer patterns")
        fields[key] = tuple(value)
    overrides = data.get("overrides", {})
    if not isinstance(overrides, dict):
        raise ValueError(f"{where}: overrides: {shown(overrides)}, expected pattern: recipe pairs")
    if "accumulation" in data:
        fields["accumulation"] = _accumulation(data["accumulation"], where)
    ours = ("include", "exclude", "overrides", "accumulation")
    recipe = _one_recipe({key: data[key] for key in data if key not in ours}, where, ours)
    instead = {}
    for pattern, value in overrides.items():
        if type(pattern) is int and 0 <= pattern < 1 << 32:
            pattern = str(pattern)  # YAML's word for a layer named "0"; but 1.10 would be 1.1
        if not isinstance(pattern, str):
            got = shown(pattern)
            raise ValueError(f"{where}: overrides: {got}, expected a pattern in quotation marks")
        instead[pattern] = _one_recipe(value, f"{where}: overrides: {named(pattern)}")
    try:
        return Plan(recipe=recipe, overrides=instead, **fields)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _accumulation(data: Any, where: str) -> Accumulation:
    known = [field.name for field in dataclasses.fields(Accumulation)]
    if not isinstance(data, dict) or not set(data) <= set(known):
        choice = ", ".join(known)
        raise ValueError(f"{where}: accumulation: {shown(data)}, expected keys of {choice}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    try:
        return Accumulation(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: accumulation: {error}") from None


def _one_recipe(data: Any, where: str, beside: tuple[str, ...] = ()) -> Recipe:
    """`beside` are keys that may stand beside a recipe's own, and are not in `data`."""
    if not isinstance(data, dict):
        data = {"recipe": data}
    name = data.get("recipe")
    if not isinstance(name, str) or name not in RECIPES:
        raise ValueError(f"{where}: recipe: {shown(name)}, expected {_nearest(name, RECIPES)}")
    values = {key: value for key, value in data.items() if key != "recipe"}
    for key, names in (("fp8_format", Format.__members__), ("format", formats.FORMATS)):
        if isinstance(values.get(key), str):
            if values[key] not in names:
                choice = ", ".join(names)
                got = shown(values[key])
                raise ValueError(f"{where}: {key}: {got}, expected one of {choice}")
            values[key] = names[values[key]]
    fields_of = {one: [f.name for f in dataclasses.fields(of)] for one, of in RECIPES.items()}
    for key in values:
        if key not in fields_of[name]:
            known = [*fields_of[name], *beside]
            # Another recipe's field is spelt as meant: what is like it here may be its opposite.
            is_others = any(key in fields for fields in fields_of.values())
            expected = f"one of {', '.join(known)}" if is_others else _nearest(key, known)
            raise ValueError(f"{where}: {named(key)}: unknown field, expected {expected}")
    try:
        return RECIPES[name](**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _nearest(name: object, known: Iterable[str]) -> str:
    """The known name that was probably meant, MXFP8BlockScaling for MXFP8; else all of them."""
    known = list(known)
    is_word = isinstance(name, str) and len(name) <= 80
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.45) if is_word else []
    return near[0] if near else f"one of {', '.join(known)}"


def named(key: object) -> str:
    """A key as an error message names it: as it is, unless that is no word or very long."""
    plain = isinstance(key, str) and key.isprintable() and 0 < len(key) <= 80
    return str(key) if plain else shown(key)


LARGEST_FILE = 1 << 17  # bytes; PyYAML, in Python, reads that much in 2 s at worst


def load_recipe(path: str | Path) -> Plan:
    """Read a plan from a YAML file; a recipe's name is that recipe with its defaults, everywhere.

    ::

        recipe: DelayedScaling
        amax_history_len: 16
        exclude: ["head"]
        overrides:
          "*:grad_output": Float8CurrentScaling
          "layers.0.*": {recipe: HighPrecision, format: BF16}

    Raises ValueError in one line that names the file, the key and what was expected, the nearest
    name where one was misspelt; OSError where the file cannot be read. A key that stands twice is
    an error (PyYAML takes the last), and so is a merge (`<<`), which in a few lines can become more
    than the memory holds.
    """
    import yaml

    path = Path(path)
    name = str(path)
    # A folder may have a recipe's name, as a run's of that recipe.
    is_none = not path.exists() or (path.is_dir() and name in RECIPES)
    if is_none and path.suffix not in (".yaml", ".yml"):
        if name not in RECIPES:
            expected = f"a YAML file or {_nearest(name, RECIPES)}"
            raise ValueError(f"recipe {named(name)}: no such file, expected {expected}")
        return Plan(recipe=RECIPES[name]())
    if path.exists() and not path.is_file() and not path.is_dir():  # a pipe would never end
        raise ValueError(f"{path}: not a file, expected YAML")
    with path.open("rb") as file:
        raw = file.read(LARGEST_FILE + 1)
    if len(raw) > LARGEST_FILE:
        raise ValueError(f"{path}: expected YAML of at most {LARGEST_FILE} bytes")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file, expected YAML") from None
    try:
        fault = _fault_in(yaml.compose(text, Loader=yaml.SafeLoader))
        data = None if fault else yaml.safe_load(text)
    except Exception as error:  # PyYAML lets through what int(), date() and the stack raise
        place = getattr(error, "problem_mark", None)
        line = f", line {place.line + 1}" if place else ""
        raise ValueError(f"{path}{line}: not valid YAML") from None
    if fault is not None:
        raise ValueError(f"{path}{fault}")
    return recipe_from_dict(data, str(path))


def _fault_in(tree: Any) -> str | None:
    """The first key of a YAML tree that merges, or that its mapping has already; None if none."""
    waiting, seen = [tree], set()
    while waiting:
        node = waiting.pop()
        children = getattr(node, "value", None)
        if id(node) in seen or not isinstance(children, list):
            continue
        seen.add(id(node))
        pairs = [child for child in children if isinstance(child, tuple)]
        waiting += [one for child in children for one in (child if pairs else [child])]
        keys: set[str] = set()
        for key, _ in pairs:
            line = f", line {key.start_mark.line + 1}"
            if key.tag.endswith(":merge"):
                return f"{line}: a merge, expected the keys themselves"
            if isinstance(key.value, str) and key.value in keys:
                return f"{line}: {named(key.value)}: stands there twice, expected once"
            if isinstance(key.value, str):
                keys.add(key.value)
    return None
