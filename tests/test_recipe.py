"""Recipes as values: Transformer Engine's vocabulary, YAML there and back, and one-line refusals.

The oracle is Transformer Engine's own recipe module, read by file from its pure-Python wheel:
importing the package raises where its kernels were not built. Class names, field names and defaults
must be equal, so that a renewed pin of Transformer Engine that renames a field fails here.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fp8lab import formats, recipe
from fp8lab.plan import Plan, from_te, load_recipe, recipe_from_dict, recipe_to_dict, to_te
from fp8lab.recipe import (
    OPERANDS,
    Accumulation,
    DelayedScaling,
    Float8BlockScaling,
    Float8CurrentScaling,
    Format,
    HighPrecision,
    MMParams,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
    operand_format,
)

# Fields that Transformer Engine does not have.
OURS = {
    "DelayedScaling": {"stochastic_rounding": False},
    "Float8CurrentScaling": {"stochastic_rounding": False},
    "Float8BlockScaling": {},
    "MXFP8BlockScaling": {"scale_rounding": "up"},
    "NVFP4BlockScaling": {},
}


@pytest.fixture
def te(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Transformer Engine's recipe module, with the defaults that no environment variable moved."""
    for variable in [name for name in os.environ if name.startswith("NVTE_")]:
        monkeypatch.delenv(variable)
    wheel = importlib.metadata.distribution("transformer-engine")
    file = wheel.locate_file("transformer_engine/common/recipe/__init__.py")
    spec = importlib.util.spec_from_file_location("transformer_engine_recipe_alone", str(file))
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # pydantic looks its classes up there
    spec.loader.exec_module(module)
    return module


def defaults(cls: Any) -> dict[str, Any]:
    """Field -> default; of an enumeration member its name and of GEMM parameters their only field,
    for theirs and ours are two classes."""
    values = {field.name: field.default for field in dataclasses.fields(cls)}
    values = {name: getattr(value, "name", value) for name, value in values.items()}
    return {name: getattr(value, "use_split_accumulator", value) for name, value in values.items()}


@pytest.mark.parametrize("name", OURS)
def test_fields_and_defaults_are_those_of_transformer_engine(te: ModuleType, name: str) -> None:
    ours = defaults(getattr(recipe, name))
    assert ours == defaults(getattr(te, name)) | OURS[name]
    assert list(ours)[len(ours) - len(OURS[name]) :] == list(OURS[name])


def test_every_recipe_of_transformer_engine_is_here(te: ModuleType) -> None:
    theirs = {name for name in vars(te) if isinstance(getattr(te, name), type)}
    theirs = {name for name in theirs if issubclass(getattr(te, name), te.Recipe)}
    assert theirs - {"Recipe", "CustomRecipe"} == set(OURS)


def test_formats_have_the_maxima_of_transformer_engine(te: ModuleType) -> None:
    for theirs in te.Format:
        member = Format[theirs.name]
        assert member.of("input").max == member.of("weight").max == theirs.value.max_fwd
        assert member.of("grad_output").max == theirs.value.max_bwd
        assert not member.has_copies
    assert [f.name for f in Format if f.has_copies] == ["HYBRID_E5M2_COPIES", "GAUDI2_E5M2_COPIES"]
    for member in Format:
        forward, gradient, copy = member.value
        assert member.of("grad_output", "columnwise") is gradient
        assert member.of("weight") is member.of("input", "rowwise") is forward
        assert member.of("weight", "columnwise") is member.of("input", "columnwise") is copy


@pytest.mark.parametrize("name", OURS)
def test_recipes_travel_to_transformer_engine_and_back(
    te: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = ModuleType("transformer_engine.common")
    package.recipe = te  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformer_engine.common", package)
    changed = {
        "DelayedScaling": {"margin": 2, "amax_history_len": 16, "fp8_format": Format.E4M3},
        "Float8CurrentScaling": {"fp8_format": Format.E4M3},
        "Float8BlockScaling": {"x_block_scaling_dim": 2, "w_block_scaling_dim": 1},
        "MXFP8BlockScaling": {"enable_2d_quantization": True},
        "NVFP4BlockScaling": {"disable_rht": True},
    }
    for values in ({}, changed[name]):
        ours = getattr(recipe, name)(**values)
        theirs = to_te(ours)
        assert type(theirs) is getattr(te, name)
        for field, value in values.items():
            told = getattr(theirs, field)
            assert getattr(told, "name", told) == getattr(value, "name", value)
        assert from_te(theirs) == ours
        assert Plan(recipe=theirs, overrides={"a": theirs}).overrides["a"] == ours
    if OURS[name]:
        odd = {"stochastic_rounding": True, "scale_rounding": "even"}
        ours = getattr(recipe, name)(**{field: odd[field] for field in OURS[name]})
        with pytest.raises(ValueError, match=f"^to_te: Transformer Engine has no {name}\\("):
            to_te(ours)


def test_what_has_no_counterpart_is_refused(te: ModuleType) -> None:
    for ours in (HighPrecision(), recipe.RowwiseScaling(), recipe.BitNetScaling()):
        with pytest.raises(ValueError, match=r"^to_te: Transformer Engine has no"):
            to_te(ours)
    with pytest.raises(ValueError, match=r"^from_te: CustomRecipe, expected one of Delayed"):
        from_te(te.CustomRecipe(qfactory=print))
    # TE goes by its class attributes, whatever the field says.
    for theirs in (te.Float8CurrentScaling(use_power_2_scales=True), te.Float8BlockScaling()):
        theirs.fp8_quant_fwd_inp = te.QParams(power_2_scale=False, amax_epsilon=1e-6)
        with pytest.raises(ValueError, match="fp8_quant_fwd_inp: power_2_scale=False, amax_eps"):
            from_te(theirs)
    with pytest.raises(ValueError, match="backward_override='dequantized', expected None"):
        from_te(te.MXFP8BlockScaling(backward_override="dequantized"))


def test_power_of_two_scales_are_off_in_the_kernels_of_transformer_engine(te: ModuleType) -> None:
    # They are set by class attributes that Float8CurrentScaling documents as having no field here.
    for attribute in ("fp8_quant_fwd_inp", "fp8_quant_fwd_weight", "fp8_quant_bwd_grad"):
        parameters = getattr(te.Float8CurrentScaling, attribute)
        assert (parameters.power_2_scale, parameters.amax_epsilon) == (False, 0.0)
        assert attribute not in defaults(te.Float8CurrentScaling)


def test_every_recipe_is_frozen_and_keyword_only() -> None:
    for cls in (*recipe.RECIPES.values(), Plan):
        parameters = inspect.signature(cls).parameters.values()
        assert {parameter.kind for parameter in parameters} <= {inspect.Parameter.KEYWORD_ONLY}
    with pytest.raises(dataclasses.FrozenInstanceError):
        DelayedScaling().margin = 3
    with pytest.raises(TypeError, match="nonsense"):
        DelayedScaling(nonsense=1)


def test_operand_formats() -> None:
    hybrid, e4m3 = Float8CurrentScaling(), DelayedScaling(fp8_format=Format.E4M3)
    assert [operand_format(hybrid, o).name for o in OPERANDS] == ["E4M3", "E4M3", "E5M2"]
    assert [operand_format(e4m3, o).name for o in OPERANDS] == ["E4M3"] * 3
    wide = HighPrecision(format=formats.FP16)
    assert [operand_format(wide, o) for o in OPERANDS] == [formats.FP16] * 3


BAD_VALUES = [
    (DelayedScaling, "fp8_format", "HYBRID", "a Format of E4M3, HYBRID, HYBRID_E5M2_COPIES, G"),
    (DelayedScaling, "fp8_format", Format.E5M2, "a Format of E4M3, HYBRID, HYBRID_E5M2_COPIES"),
    (DelayedScaling, "stochastic_rounding", 1, "True or False"),
    (Float8CurrentScaling, "fp8_gemm_fprop", MMParams(), "MMParams(use_split_accumulator=Fal"),
    (Float8BlockScaling, "fp8_format", Format.GAUDI2, "a Format of E4M3, HYBRID"),
    (Float8BlockScaling, "use_f32_scales", 0, "True or False"),
    (Float8BlockScaling, "x_block_scaling_dim", 3, "1 or 2"),
    (Float8BlockScaling, "grad_block_scaling_dim", True, "1 or 2"),
    (MXFP8BlockScaling, "scale_rounding", "floor", "one of ('up', 'ocp_floor', 'ceil', 'even')"),
    (MXFP8BlockScaling, "margin", 1, "0"),
    (MXFP8BlockScaling, "enable_2d_quantization", None, "True or False"),
    (NVFP4BlockScaling, "disable_rht", "no", "True or False"),
    (NVFP4BlockScaling, "row_scaled_activation", True, "False"),
    (NVFP4BlockScaling, "nvfp4_4over6", "all", "'none'"),
    (NVFP4BlockScaling, "fp4_format", Format.E4M3, "Format.E2M1"),
    (recipe.RowwiseScaling, "fp8_format", Format.E2M1, "a Format of E4M3, HYBRID"),
    (recipe.RowwiseScaling, "round_scales_to_power_of_2", 2, "True or False"),
    (Accumulation, "bits", 1, "a whole number of 2 to 24"),
    (Accumulation, "promote_every", 100, "a multiple of 32, or None"),
    (Accumulation, "gemms", ("fprop",), "a tuple of output, grad_input, grad_weight"),
    (DelayedScaling, "fp8_format", formats.E4M3, "a Format"),
    (DelayedScaling, "amax_history_len", 0, "a whole number from 1"),
    (DelayedScaling, "amax_history_len", 2.0, "a whole number from 1"),
    (DelayedScaling, "amax_history_len", True, "a whole number from 1"),
    (DelayedScaling, "margin", "1", "a whole number"),
    (DelayedScaling, "margin", False, "a whole number"),
    (DelayedScaling, "amax_compute_algo", "mean", "'max', 'most_recent' or a function"),
    (DelayedScaling, "amax_compute_algo", None, "'max', 'most_recent' or a function"),
    (DelayedScaling, "scaling_factor_compute_algo", "max", "None or a function"),
    (DelayedScaling, "reduce_amax", "no", "True or False"),
    (DelayedScaling, "fp8_dpa", True, "False"),
    (DelayedScaling, "fp8_mha", True, "False"),
    (DelayedScaling, "backward_override", "dequantized", "None"),
    (Float8CurrentScaling, "use_power_2_scales", "false", "True or False"),
    (Float8CurrentScaling, "fp8_format", None, "a Format"),
    (Float8CurrentScaling, "fp8_dpa", True, "False"),
    (Float8CurrentScaling, "fp8_mha", "yes", "False"),
    (Float8CurrentScaling, "backward_override", "high_precision", "None"),
    (HighPrecision, "format", formats.E4M3, "BF16, FP16 or FP32"),
    (HighPrecision, "format", "BF16", "BF16, FP16 or FP32"),
]


@pytest.mark.parametrize(("cls", "field", "value", "expected"), BAD_VALUES)
def test_a_bad_value_is_refused_at_birth(cls: Any, field: str, value: Any, expected: str) -> None:
    start = f"{cls.__name__}: {field}={value!r}, expected {expected}"
    with pytest.raises(ValueError, match=re.escape(start)) as raised:
        cls(**{field: value})
    assert "\n" not in str(raised.value)


# --- plans ------------------------------------------------------------------------------------

BF16, CURRENT, DELAYED = HighPrecision(), Float8CurrentScaling(), DelayedScaling()


def test_the_last_override_that_matches_wins() -> None:
    plan = Plan(
        recipe=CURRENT,
        overrides={"layers.*": DELAYED, "layers.0.*": BF16, "*.down:input": CURRENT, "head": BF16},
    )
    assert plan.recipe_for("embedding", "weight") == CURRENT
    assert plan.recipe_for("layers.3.up", "weight") == DELAYED
    assert plan.recipe_for("layers.0.up", "weight") == BF16
    assert plan.recipe_for("layers.0.down", "weight") == BF16
    assert plan.recipe_for("layers.0.down", "input") == CURRENT
    assert plan.recipe_for("head", "grad_output") == BF16
    reversed_order = Plan(recipe=CURRENT, overrides={"layers.0.*": BF16, "layers.*": DELAYED})
    assert reversed_order.recipe_for("layers.0.up", "weight") == DELAYED


def test_patterns_are_case_sensitive_and_span_dots() -> None:
    plan = Plan(recipe=CURRENT, include=("layers.*.mlp.*", "Head"), exclude=("*.gate",))
    assert plan.covers("layers.0.mlp.up")
    assert plan.covers("layers.0.deep.mlp.inner.up")
    assert plan.covers("Head")
    assert not plan.covers("head")
    assert not plan.covers("layers.0.mlp.gate")
    assert not plan.covers("layers.0.attention.query")
    assert Plan(recipe=CURRENT).covers("anything")
    assert not Plan(recipe=CURRENT, include=()).covers("anything")


def test_patterns_without_match() -> None:
    layers = ["layers.0.up", "layers.0.down", "head"]
    plan = Plan(
        recipe=CURRENT,
        include=("*", "layer.*"),
        exclude=("head", "haed"),
        overrides={"*.down:input": BF16, "*.dwon:weight": BF16, "Head": BF16, "*.up": BF16},
    )
    assert plan.patterns_without_match(layers) == ["layer.*", "haed", "*.dwon", "Head"]
    assert Plan(recipe=CURRENT).patterns_without_match(layers) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"recipe": "DelayedScaling"}, "recipe: 'DelayedScaling', expected one of DelayedScaling"),
        ({"recipe": DelayedScaling}, "recipe: <class"),
        ({"overrides": {"head": None}}, "head: None, expected one of DelayedScaling"),
        ({"overrides": {"*:inputs": BF16}}, "override '*:inputs': operand 'inputs', expected"),
        ({"overrides": {"*:": BF16}}, "override '*:': operand '', expected"),
        ({"overrides": {"*:input:x": BF16}}, "override '*:input:x': operand 'input:x', expected"),
        ({"include": "layers.*"}, "include: 'layers.*', expected a tuple of layer patterns"),
        ({"exclude": "head"}, "exclude: 'head', expected a tuple of layer patterns"),
    ],
)
def test_a_bad_plan_is_refused_at_birth(fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Plan(**{"recipe": CURRENT, **fields})


# --- YAML -------------------------------------------------------------------------------------

PLANS = [
    Plan(recipe=DelayedScaling()),
    Plan(recipe=DelayedScaling(margin=-2, amax_history_len=16, amax_compute_algo="most_recent")),
    Plan(recipe=DelayedScaling(fp8_format=Format.E4M3, reduce_amax=False)),
    Plan(recipe=Float8CurrentScaling(use_power_2_scales=True)),
    Plan(recipe=HighPrecision(format=formats.FP32), include=("a.*", "b"), exclude=("a.0",)),
    Plan(
        recipe=CURRENT,
        overrides={"*:grad_output": DelayedScaling(margin=1), "b:input": BF16, "a": CURRENT},
    ),
]


@pytest.mark.parametrize("plan", PLANS, ids=range(len(PLANS)))
def test_yaml_there_and_back(plan: Plan, tmp_path: Path) -> None:
    import yaml

    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(recipe_to_dict(plan), sort_keys=False))
    loaded = load_recipe(file)
    assert loaded == plan
    assert list(loaded.overrides) == list(plan.overrides)  # the order decides
    assert recipe_from_dict(recipe_to_dict(plan), "here") == plan


def test_only_what_is_not_the_default_is_written() -> None:
    assert recipe_to_dict(DelayedScaling()) == {"recipe": "DelayedScaling"}
    assert recipe_to_dict(DelayedScaling(margin=1, fp8_format=Format.E4M3)) == {
        "recipe": "DelayedScaling",
        "margin": 1,
        "fp8_format": "E4M3",
    }
    assert recipe_to_dict(HighPrecision(format=formats.FP32))["format"] == "FP32"

    def largest(history: Any) -> Any:
        return history.amax()

    assert recipe_to_dict(DelayedScaling(amax_compute_algo=largest))["amax_compute_algo"] == (
        "function largest"
    )


def test_the_example_in_the_docstring_loads(tmp_path: Path) -> None:
    text = inspect.getdoc(load_recipe).partition("::\n")[2].partition("Raises")[0]
    file = tmp_path / "recipe.yaml"
    file.write_text(inspect.cleandoc(text))
    assert load_recipe(str(file)) == Plan(
        recipe=DelayedScaling(amax_history_len=16),
        exclude=("head",),
        overrides={"*:grad_output": CURRENT, "layers.0.*": BF16},
    )


BAD_FILES = {
    "empty": (b"", "", "NoneType, expected a mapping with a key 'recipe'"),
    "list": (b"- recipe: DelayedScaling", "", "list, expected a mapping"),
    "text": (b"DelayedScaling", "", "str, expected a mapping"),
    "binary": (b"\xff\xfe\x00\x81", "", "not a text file, expected YAML"),
    "control": (b"recipe: \x00", "", "not valid YAML"),
    "unclosed": (b"recipe: D\noverrides: {a: [", ", line 2", "not valid YAML"),
    "documents": (b"recipe: D\n---\nrecipe: D", ", line 2", "not valid YAML"),
    "object": (b"recipe: !!python/name:os.system", ", line 1", "not valid YAML"),
    "date": (b"recipe: DelayedScaling\nmargin: 2001-99-99", "", "not valid YAML"),
    "digits": (b"recipe: DelayedScaling\nmargin: " + b"9" * 5000, "", "not valid YAML"),
    "deep": (b"recipe: " + b"[" * 1500, "", "not valid YAML"),
    "tag": (b"recipe: DelayedScaling\nfp8_dpa: !!bool perhaps", "", "not valid YAML"),
    "no recipe": (b"margin: 1", "", "recipe: None, expected one of DelayedScaling, Float8Cur"),
    "unknown": (b"recipe: FP9", "", "recipe: 'FP9', expected one of DelayedScaling"),
    "short": (b"recipe: MXFP8", "", "recipe: 'MXFP8', expected MXFP8BlockScaling"),
    "misspelt": (b"recipe: DelayedScalling", "", "'DelayedScalling', expected DelayedScaling"),
    "misspelt field": (
        b"recipe: DelayedScaling\namax_history: 4",
        "",
        "amax_history: unknown field, expected amax_history_len",
    ),
    "misspelt key": (
        b"recipe: HighPrecision\noveride: {a: HighPrecision}",
        "",
        "overide: unknown field, expected overrides",
    ),
    "another's field": (
        b"recipe: DelayedScaling\ndisable_stochastic_rounding: true",
        "",
        "disable_stochastic_rounding: unknown field, expected one of margin, ",
    ),
    "recipes": (b"recipe: [DelayedScaling]", "", "recipe: ['DelayedScaling'], expected one"),
    "itself": (b"recipe: &a [*a]", "", "recipe: [[...]], expected one of"),
    "field": (b"recipe: HighPrecision\nmargin: 1", "", "margin: unknown field, expected one of f"),
    "number": (b"recipe: HighPrecision\n1: 2", "", "1: unknown field, expected one of format"),
    "type": (b"recipe: DelayedScaling\nmargin: much", "", "margin='much', expected a whole num"),
    "switch": (b"recipe: DelayedScaling\nmargin: true", "", "margin=True, expected a whole num"),
    "float": (b"recipe: DelayedScaling\nmargin: 1.0", "", "margin=1.0, expected a whole number"),
    "quoted": (b"recipe: DelayedScaling\nmargin: '1'", "", "margin='1', expected a whole number"),
    "null": (b"recipe: DelayedScaling\nmargin: null", "", "margin=None, expected a whole number"),
    "format": (b"recipe: DelayedScaling\nfp8_format: E5M2", "", "fp8_format=Format.E5M2, expected"),
    "narrow": (b"recipe: HighPrecision\nformat: E4M3", "", "format=E4M3, expected BF16, FP16"),
    "nonsense": (
        b"recipe: HighPrecision\nformat: E9M9",
        "",
        "format: 'E9M9', expected one of E4",
    ),
    "default": (b"recipe: DelayedScaling\nfp8_mha: true", "", "fp8_mha=True, expected False (TE"),
    "include": (b"recipe: HighPrecision\ninclude: head", "", "include: 'head', expected a list"),
    "exclude": (b"recipe: HighPrecision\nexclude: [1]", "", "exclude: [1], expected a list"),
    "overrides": (b"recipe: HighPrecision\noverrides: [a]", "", "overrides: ['a'], expected"),
    "nothing": (b"recipe: HighPrecision\noverrides:", "", "overrides: None, expected pattern"),
    "operand": (
        b"recipe: HighPrecision\noverrides: {'*:product': HighPrecision}",
        "",
        "override '*:product': operand 'product', expected",
    ),
    "override": (b"recipe: HighPrecision\noverrides: {a: FP8}", "", "overrides: a: recipe: 'FP8',"),
    "override field": (
        b"recipe: HighPrecision\noverrides: {a: {recipe: HighPrecision, margin: 1}}",
        "",
        "overrides: a: margin: unknown field",
    ),
    "override type": (
        b"recipe: HighPrecision\noverrides: {a: {recipe: DelayedScaling, amax_history_len: -1}}",
        "",
        "overrides: a: DelayedScaling: amax_history_len=-1, expected a whole number from 1",
    ),
    "override scope": (
        b"recipe: HighPrecision\noverrides: {a: {recipe: HighPrecision, exclude: [b]}}",
        "",
        "overrides: a: exclude: unknown field",
    ),
}


@pytest.mark.parametrize("content", BAD_FILES)
# A name that is also the first word of a message: every message must still name its file.
@pytest.mark.parametrize("name", ["mine.yaml", "override", "recipe"])
def test_a_bad_file_is_one_line_that_names_it(
    content: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, line, expected = BAD_FILES[content]
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(data)
    with pytest.raises(ValueError, match=f"^{name}{line}: .*{re.escape(expected)}") as raised:
        load_recipe(name)
    assert type(raised.value) is ValueError
    assert "\n" not in str(raised.value)


def test_a_recipe_is_loaded_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe("MXFP8BlockScaling") == Plan(recipe=MXFP8BlockScaling())
    Path("DelayedScaling").mkdir()  # as a run may be called
    assert load_recipe("DelayedScaling") == Plan(recipe=DelayedScaling())
    with pytest.raises(ValueError, match=r"^recipe MXFP8: no such file, .* YAML file or MXFP8Bl"):
        load_recipe("MXFP8")
    Path("MXFP8BlockScaling").write_text("recipe: HighPrecision")
    assert load_recipe("MXFP8BlockScaling") == Plan(recipe=HighPrecision())


def test_a_file_that_cannot_be_read_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_recipe(tmp_path / "absent.yaml")
    with pytest.raises(OSError, match="directory"):
        load_recipe(tmp_path)


def test_importing_recipes_imports_the_standard_library_alone() -> None:
    code = (
        "import sys; tops = lambda: {name.partition('.')[0] for name in sys.modules}; "
        "before = tops(); import fp8lab.recipe; print(tops() - before - sys.stdlib_module_names)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'fp8lab'}"
