"""Transformer Engine for the suite: the real one, or in a rehearsal the tests' stand-in for it.

On a bare machine TE's folder is on PYTHONPATH and little else. What TE imports and the suite never
uses (ONNX export, the einops of its inference, numpy) is stood in for while TE is imported, rather
than asked for: there is no network. Its `packaging` is torch's own copy where there is no other.
torch comes first, whose libraries TE's own ask for.

A rehearsal changes this process for good (`tests/transformer_engine_stand_in.py`): torch then
claims to have a GPU. So nothing that runs afterwards in it may be called a measurement.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

TESTS = Path(__file__).resolve().parents[2] / "tests"
# Imported by TE, unused by what runs here.
UNUSED = ("onnx", "onnxscript", "einops", "numpy")


def stood_in_for() -> list[str]:
    """Which of the packages that TE imports for nothing are not here."""
    return [name for name in UNUSED if find_spec(name) is None]


@cache
def load(rehearsal: bool) -> Any:
    """`transformer_engine.pytorch`. Raises ImportError, or whatever its loading raises."""
    if find_spec("packaging") is None:
        for name in ("packaging", "packaging.version"):
            sys.modules[name] = import_module(f"torch._vendor.{name}")
    import_module("torch._dynamo")  # TE imports it, and it must find numpy as it is
    absent = stood_in_for()
    for name in absent:
        sys.modules[name] = mock.MagicMock(__spec__=ModuleSpec(name, None))
    try:
        return _imported(rehearsal)
    finally:
        for name in absent:  # others must go on to find that these are not here
            del sys.modules[name]


def _imported(rehearsal: bool) -> Any:
    if rehearsal:
        os.environ |= {"NVTE_PROJECT_BUILDING": "1", "NVTE_TORCH_COMPILE": "0"}
        sys.path.insert(0, str(TESTS))
        import transformer_engine_stand_in

        transformer_engine_stand_in.install()
        transformer_engine_stand_in.CURRENT_BEHIND_A_NORM = True
        torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # type: ignore[method-assign, assignment]
    import transformer_engine.pytorch

    return transformer_engine.pytorch


def recipes() -> Any:
    """`transformer_engine.common.recipe`, once TE is loaded."""
    import transformer_engine.common.recipe

    return transformer_engine.common.recipe


def fresh() -> None:
    """Forget the layers of before, whose scales TE would go on to move."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    FP8GlobalStateManager.reset()


def version() -> str:
    """The version of TE's wheel."""
    from importlib.metadata import version as of

    return of("transformer_engine")


@contextmanager
def debugging(config: str, folder: Path) -> Iterator[Any]:
    """TE's debug features as this YAML says, for layers that are made inside; gives the debug API.

    Raises ImportError without nvdlfw-inspect or PyYAML.
    """
    import nvdlfw_inspect.api as api
    import transformer_engine
    from transformer_engine.debug.pytorch.debug_state import TEDebugState

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "features.yaml"
    file.write_text(config, encoding="utf-8")
    features = Path(transformer_engine.__file__).parent / "debug" / "features"
    TEDebugState._reset()  # as in a process whose first layer of TE comes now
    api.initialize(config_file=str(file), feature_dirs=[str(features)], log_dir=str(folder))
    try:
        yield api
    finally:
        api.end_debug()
        TEDebugState._reset()


def codes_in_graph(output: Tensor, shape: tuple[int, int]) -> list[Tensor]:
    """The FP8 codes [rows, columns] of that shape which the graph behind `output` keeps, as uint8,
    those that are kept transposed turned back."""
    node: Any = output.grad_fn
    while node is not None and not hasattr(node, "saved_tensors"):
        node = node.next_functions[0][0] if node.next_functions else None
    kept = [] if node is None else node.saved_tensors
    found = []
    for tensor in kept:
        if tensor is None or tensor.dtype is not torch.uint8:
            continue
        if tuple(tensor.shape) == shape:
            found.append(tensor.clone())  # the backward empties them
        elif tuple(tensor.shape) == shape[::-1]:
            found.append(tensor.t().clone())
    return found
