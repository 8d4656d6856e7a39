"""What is recorded beyond the gates, where and when: values, checked at birth.

Options have the names and the meaning that Transformer Engine's debug features give them: a step is
recorded where it is a multiple of `freq` and lies between `start_step` and `end_step`, both
included, or in one of the pairs of `start_end_list`, which then stands instead of those two.
Sections may overlap: a tensor is recorded where any of them says so, with all the statistics that
these ask for. (In TE a layer belongs to one section.)

    gradients:                      # YAML: sections by name
      layers: ["layers.*.mlp"]
      tensors: [grad_gate, grad_up, grad_product]
      freq: 50
    what_if:
      layers: "layers.3.*"
      tensors: [product]
      statistics: [mxfp8_underflows%, fp8_current_scaling_mse]
      start_end_list: [[0, 100], [5000, 5100]]

Nothing here needs torch; PyYAML is imported by the loader.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fp8lab.plan import nearest_layers

FEED_FORWARD_TENSORS = ("gate", "up", "product", "output")
FEED_FORWARD_GRADIENTS = ("grad_gate", "grad_up", "grad_product", "grad_output")
LINEAR_TENSORS = ("input", "output", "grad_input", "grad_output")
PARAMETER_TENSORS = ("weight", "grad_weight", "exp_avg", "exp_avg_sq")
BLOCK_TENSORS = ("residual", "grad_residual", "attention_logits")
TENSORS = tuple(
    dict.fromkeys(
        FEED_FORWARD_TENSORS
        + FEED_FORWARD_GRADIENTS
        + LINEAR_TENSORS
        + PARAMETER_TENSORS
        + BLOCK_TENSORS
    )
)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Tensors of layers to record, with further statistics, at some steps.

    `layers` are patterns (`*`, `?`, `[…]`) for names of modules: of feed-forwards (`gate`, `up`,
    `product`, `output` and `grad_` of each), linear layers (`input`, `output`, `grad_…`), blocks,
    that is members of a ModuleList (`residual`, `grad_residual`, `attention_logits`), and owners of
    parameters with two dimensions or more (`weight`, `grad_weight`; `exp_avg`, `exp_avg_sq` as
    Adam's state calls its moments). `statistics` are names of `fp8lab.monitor.statistics`, kept
    besides the columns that every tensor row has. `freq` None is the `every` of `watch`. Steps are
    counted from 0 by `watch.step`.

    Raises ValueError in one line for an unknown tensor, a frequency below 1 or a range that is
    none. Unknown statistics are refused by `watch`.
    """

    tensors: tuple[str, ...]
    layers: tuple[str, ...] = ("*",)
    statistics: tuple[str, ...] = ()
    freq: int | None = None
    start_step: int | None = None
    end_step: int | None = None
    start_end_list: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        for name in ("tensors", "layers", "statistics"):
            object.__setattr__(self, name, _texts(name, getattr(self, name)))
        for tensor in self.tensors:
            if tensor not in TENSORS:
                raise ValueError(f"Selection: tensors: {_unknown(tensor, TENSORS)}")
        if not self.tensors or not self.layers:
            raise ValueError("Selection: tensors, layers: expected at least one of each")
        for name in ("freq", "start_step", "end_step"):
            _check_number(name, getattr(self, name), at_least=1 if name == "freq" else 0)
        if self.end_step is not None and self.end_step < (self.start_step or 0):
            told = f"start_step={self.start_step}, end_step={self.end_step}"
            raise ValueError(f"Selection: {told}, expected an end after the start")
        if self.start_end_list is not None:
            object.__setattr__(self, "start_end_list", _ranges(self.start_end_list))

    def names(self, layer: str, tensor: str) -> bool:
        """Whether it is about that tensor of that layer."""
        return tensor in self.tensors and any(fnmatchcase(layer, p) for p in self.layers)

    def covers(self, step: int, every: int) -> bool:
        """Whether `step` is recorded; `every` stands for a `freq` that was not given."""
        if step % (self.freq or every):
            return False
        last = step if self.end_step is None else self.end_step
        ranges = self.start_end_list or (((self.start_step or 0), last),)
        return any(first <= step <= last for first, last in ranges)


def as_selections(given: Any) -> tuple[Selection, ...]:
    """A Selection, several, a mapping of sections, or the path of a YAML file with such a mapping.

    Each section holds fields of `Selection`, and `enabled`. Raises ValueError in one line.
    """
    if isinstance(given, Selection):
        return (given,)
    if isinstance(given, str | Path):
        given = _read(Path(given))
    if isinstance(given, Mapping):
        return tuple(
            _section(str(name), section)
            for name, section in given.items()
            if not (isinstance(section, Mapping) and section.get("enabled") is False)
        )
    if isinstance(given, Iterable):
        selections = tuple(given)
        if all(isinstance(selection, Selection) for selection in selections):
            return selections
    raise ValueError(f"select: expected Selections or sections by name, got {given!r:.60}")


def require_seen(selections: Iterable[Selection], layers: Mapping[str, Iterable[str]]) -> None:
    """Raises ValueError for a selection that is about no tensor of those that `layers` have: the
    names of layers by tensor."""
    for selection in selections:
        known = {name: tensor for tensor in selection.tensors for name in layers.get(tensor, ())}
        if not any(selection.names(name, tensor) for name, tensor in known.items()):
            told = f"{', '.join(selection.tensors)} and a name like {', '.join(selection.layers)}"
            choice = f"one of {nearest_layers(selection.layers[0], known)}"
            expected = choice if known else "tensors that a layer of this model has"
            raise ValueError(f"watch: select: no layer has {told}, expected {expected}")


def _read(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        told = f"{path}: cannot be read: {error.strerror}"
        raise ValueError(f"select: {told}, expected Selections or a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ValueError(f"{path}: no YAML: {' '.join(str(error).split())[:120]}") from None


def _section(name: str, section: Any) -> Selection:
    known = [field.name for field in fields(Selection)]
    if not isinstance(section, Mapping):
        expected = f"a section, which is a mapping of {', '.join(known)}"
        raise ValueError(f"select: {name}: {section!r:.60}, expected {expected}")
    values = {str(key): value for key, value in section.items() if key != "enabled"}
    for key in values:
        if key not in known:
            raise ValueError(f"select: {name}: {_unknown(key, known)}")
    if "tensors" not in values:
        raise ValueError(f"select: {name}: tensors: missing, expected some of {', '.join(TENSORS)}")
    try:
        return Selection(**values)
    except ValueError as error:
        raise ValueError(f"select: {name}: {error}") from None


def _texts(name: str, given: Any) -> tuple[str, ...]:
    values = (given,) if isinstance(given, str) else given
    if not isinstance(values, list | tuple) or not all(isinstance(v, str) for v in values):
        raise ValueError(f"Selection: {name}: expected names, got {given!r:.60}")
    return tuple(values)


def _check_number(name: str, value: Any, *, at_least: int) -> None:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and not (is_number and value >= at_least):
        raise ValueError(f"Selection: {name}: expected an integer >= {at_least}, got {value!r:.60}")


def _ranges(given: Any) -> tuple[tuple[int, int], ...]:
    try:
        ranges = tuple((first, last) for first, last in given)
    except (TypeError, ValueError):
        ranges = ()
    for pair in ranges:
        for step in pair:
            if isinstance(step, bool) or not isinstance(step, int) or step < 0:
                ranges = ()
    if not ranges or any(first > last for first, last in ranges):
        raise ValueError(
            f"Selection: start_end_list: expected pairs [start, end] of steps, got {given!r:.60}"
        )
    return ranges


def _unknown(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"unknown name {name!r:.60}, expected " + (near[0] if near else ", ".join(known))
