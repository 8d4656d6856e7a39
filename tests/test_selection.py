"""What a Selection is about: Transformer Engine's own rule for steps, and errors in one line."""

from __future__ import annotations

import types
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fp8lab.monitor.selection import Selection, as_selections


def next_enabled_iter() -> Any:
    """Transformer Engine's function of that name, run from its file without the package."""
    wheel = distribution("transformer_engine")
    path = str(wheel.locate_file("transformer_engine/debug/features/utils/__init__.py"))
    source = Path(path).read_text()
    module = types.ModuleType("te_debug_utils")
    start = source.index("def next_enabled_iter")
    exec(compile(source[start:], path, "exec"), module.__dict__)
    return module.next_enabled_iter


THEIRS = next_enabled_iter()
STEPS = st.integers(0, 60)
RANGES = st.lists(st.tuples(STEPS, STEPS).map(lambda p: (min(p), max(p))), max_size=3)


@given(
    step=STEPS,
    freq=st.integers(1, 12),
    start=st.none() | STEPS,
    end=st.none() | STEPS,
    ranges=st.none() | RANGES.filter(bool),
)
def test_steps_are_those_of_transformer_engine(
    step: int, freq: int, start: int | None, end: int | None, ranges: list[tuple[int, int]] | None
) -> None:
    assume(end is None or end >= (start or 0))  # refused: TE would record nothing, silently
    ours = Selection(
        tensors=("product",),
        freq=freq,
        start_step=start,
        end_step=end,
        start_end_list=None if ranges is None else tuple(ranges),
    )
    # TE looks at its pairs in turn until one has a step to come, so pairs that overlap may be
    # missed there; its documentation says that they must not overlap.
    alone = [pair for pair in ranges or [] if pair[0] <= step <= pair[1]][:1]
    theirs, _ = THEIRS(start, end, alone if ranges else None, freq, step)
    if ranges and not alone:
        theirs = False
    assert ours.covers(step, every=7) == theirs


def test_without_a_frequency_it_is_that_of_the_watch() -> None:
    selection = Selection(tensors=("weight",))
    assert [step for step in range(10) if selection.covers(step, every=4)] == [0, 4, 8]


def test_layers_are_patterns() -> None:
    selection = Selection(tensors=("gate", "weight"), layers=("layers.*.mlp", "head"))
    assert selection.names("layers.3.mlp", "gate")
    assert selection.names("head", "weight")
    assert not selection.names("layers.3.mlp", "up")
    assert not selection.names("layers.3.mlp.down", "weight")


def test_sections_of_a_file_and_of_a_mapping_are_the_same(tmp_path: Path) -> None:
    text = """
gradients: {layers: ["*.mlp"], tensors: [grad_gate, grad_up], freq: 50}
off: {enabled: False, tensors: [weight]}
what_if:
  enabled: True
  tensors: product
  statistics: [mxfp8_mse]
  start_end_list: [[0, 10], [20, 30]]
"""
    path = tmp_path / "select.yaml"
    path.write_text(text)
    expected = (
        Selection(layers=("*.mlp",), tensors=("grad_gate", "grad_up"), freq=50),
        Selection(
            tensors=("product",),
            statistics=("mxfp8_mse",),
            start_end_list=((0, 10), (20, 30)),
        ),
    )
    assert as_selections(path) == as_selections(str(path)) == expected
    assert as_selections(expected) == expected
    assert as_selections(expected[0]) == expected[:1]
    assert as_selections(()) == ()


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"a": {"tensors": ["produkt"]}}, "select: a: Selection: tensors: unknown name 'produkt', "
         "expected product"),
        ({"a": {"tensors": ["gate"], "frq": 3}}, "select: a: unknown name 'frq', expected freq"),
        ({"a": {"layers": "x"}}, "select: a: tensors: missing"),
        ({"a": ["gate"]}, "select: a: ['gate'], expected a section"),
        ({"a": {"tensors": ["gate"], "freq": 0}}, "freq: expected an integer >= 1, got 0"),
        ({"a": {"tensors": ["gate"], "freq": True}}, "freq: expected an integer >= 1, got True"),
        ({"a": {"tensors": ["gate"], "end_step": -1}}, "end_step: expected an integer >= 0"),
        ({"a": {"tensors": ["gate"], "start_end_list": [[3, 1]]}}, "start_end_list: expected"),
        ({"a": {"tensors": ["gate"], "start_end_list": [[1]]}}, "start_end_list: expected pairs"),
        ({"a": {"tensors": ["gate"], "start_step": 10, "end_step": 5}},
         "Selection: start_step=10, end_step=5, expected an end after the start"),
        ({"a": {"tensors": []}}, "expected at least one of each"),
        ({"a": {"tensors": [3]}}, "tensors: expected names"),
        (7, "select: expected Selections or sections by name, got 7"),
        ([7], "select: expected Selections or sections by name"),
    ],
)  # fmt: skip
def test_what_is_no_selection_is_refused_in_one_line(given: Any, reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        as_selections(given)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a: [", b"!!python/object:os.system {}", b"- 1"])
def test_a_file_that_is_none_is_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        as_selections(tmp_path / "bad.yaml")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        as_selections(tmp_path / "none.yaml")
