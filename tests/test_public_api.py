"""The door: the names that users write, and that stay. A change here is a change for them."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fp8lab

NAMES = [
    "Accumulation",
    "Audit",
    "Bisection",
    "BitNetScaling",
    "Checkpoints",
    "DelayedScaling",
    "Diagnosis",
    "FeedForward",
    "FeedForwardSite",
    "Finding",
    "Float8BlockScaling",
    "Float8CurrentScaling",
    "FloatFormat",
    "Forecast",
    "Format",
    "Fp8AdamW",
    "GateSite",
    "GatedFeedForward",
    "Guard",
    "HighPrecision",
    "MXFP8BlockScaling",
    "NVFP4BlockScaling",
    "Plan",
    "Quantized",
    "RowwiseScaling",
    "Run",
    "Selection",
    "audit",
    "autocast",
    "bisect",
    "convert",
    "diagnose",
    "fake_quantize",
    "find_feed_forwards",
    "find_gates",
    "formats",
    "load_recipe",
    "mitigations",
    "open_run",
    "quantize",
    "replay",
    "round_to",
    "watch",
    "write_report",
]


def test_the_names_are_these() -> None:
    assert fp8lab.__all__ == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_name_resolves_to_something_documented(name: str) -> None:
    value = getattr(fp8lab, name)
    assert value is getattr(fp8lab, name)
    assert (getattr(value, "__name__", name)).removeprefix("fp8lab.") == name
    assert inspect.getdoc(value)


def test_every_name_resolves_first_in_a_fresh_process() -> None:
    # Resolving a name imports its room, and that must not shadow a name that comes later.
    code = (
        "import sys, fp8lab\n"
        "for name in sys.argv[1:]:\n"
        "    value = getattr(fp8lab, name)\n"
        "    kind = type(value).__name__\n"
        "    assert (kind == 'module') == (name in ('formats', 'mitigations')), name\n"
    )
    subprocess.run([sys.executable, "-c", code, *NAMES[::-1]], check=True)


def test_dir_lists_the_door_and_nothing_else() -> None:
    assert dir(fp8lab) == sorted([*NAMES, "__version__"])


def test_star_imports_the_door() -> None:
    namespace: dict[str, object] = {}
    exec("from fp8lab import *", namespace)
    assert sorted(namespace.keys() - {"__builtins__"}) == NAMES


@pytest.mark.parametrize("name", ["Watch", "_ROOMS_", "casting_", "nothing"])
def test_an_unknown_name_is_an_attribute_error(name: str) -> None:
    with pytest.raises(AttributeError) as caught:
        getattr(fp8lab, name)
    assert str(caught.value) == f"module 'fp8lab' has no attribute {name!r}"
    with pytest.raises(ImportError):
        exec(f"from fp8lab import {name}")


def test_what_type_checkers_see_is_what_resolves() -> None:
    source = Path(inspect.getfile(fp8lab)).read_text(encoding="utf-8")
    (block,) = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
    seen = {
        alias.asname: f"{node.module}.{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(name for name in seen if name is not None) == NAMES
    for name, origin in seen.items():
        room, _, attribute = origin.rpartition(".")
        if room != "fp8lab":
            assert getattr(fp8lab, str(name)) is getattr(sys.modules[room], attribute)


def test_the_version_is_that_of_the_installed_package() -> None:
    from importlib.metadata import version

    assert fp8lab.__version__ == version("fp8lab")


def test_the_door_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model: nn.Module = nn.Sequential(fp8lab.GatedFeedForward(8, 16))
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batches = [torch.randn(4, 8) for _ in range(21)]

    def train_step(model: nn.Module, batch: Tensor) -> Tensor:
        loss = (model(batch) - batch).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss

    model = fp8lab.convert(model, fp8lab.DelayedScaling())
    with fp8lab.watch(model, "runs/mine", optimizer=opt, every=10) as watch:
        for step, batch in enumerate(batches):
            loss = train_step(model, batch)
            watch.step(step, loss=loss)
    print(fp8lab.diagnose("runs/mine"))
    fp8lab.write_report(["runs/mine"], "reports/mine.html")

    assert capsys.readouterr().out == "runs/mine: nothing found\n"
    run = fp8lab.open_run("runs/mine")
    assert (run.state, len(run.steps())) == ("finished", 21)
    recorded = run.tensors().query("site == '0:gate'")
    assert recorded["step"].tolist() == [0, 10, 20]
    assert set(run.tensors().query("site == '0:product'")["step"]) == set(range(21))
    assert run.steps()["learning_rate"].tolist() == [1e-2] * 21
    assert "<html" in Path("reports/mine.html").read_text(encoding="utf-8")
