"""Malformed configurations: an experiment's file, the folder of its runs, command lines, values.

`fp8lab run` goes as far as it goes without starting a process for the runs themselves, which
`test_experiment` does. What it may replace is in its own folder and its own; a stranger's file in
there has to survive.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from malformed_inputs import (
    NASTY,
    STRANGER,
    Draw,
    Kind,
    below,
    damaged_bytes,
    damaged_place,
    invoke,
    json_text,
    one_line,
    pick,
    replaced,
)
from malformed_runs import warm_run

EXPERIMENT = '''"""An experiment that does nothing."""

from fp8lab import HighPrecision, Plan
from fp8lab.lab.arm import Arm
from fp8lab.lab.experiment import Experiment, Part


def run(job, progress):
    progress(1, 1, 0.0, 0)


OPTIONS = {"hotter": 2.0}
BF16 = Arm(name="bf16", title="BF16", plan=Plan(recipe=HighPrecision()), options=OPTIONS)
FIRST = Part(name="first", title="First", seeds=(0, 1), run=run, arms=(BF16,))
EXPERIMENT = Experiment(
    name="tiny",
    question="?",
    prediction="!",
    refuted_if="not",
    limits=("It is tiny.",),
    parts=(FIRST,),
)
'''

VALUES = (
    *(
        "None",
        "5",
        "-1",
        "()",
        "[]",
        "{}",
        "''",
        "'../x'",
        "'a/b'",
        "('a',)",
        "(BF16, BF16)",
        "object()",
    ),
    *(
        "float('nan')",
        "float('inf')",
        "10**5000",
        "(0, 0)",
        "(0.5,)",
        "(True,)",
        "('../x',)",
        "(-1,)",
    ),
    *(
        "(2**70,)",
        "{'x': object()}",
        "{'x': float('inf')}",
        "{1: 2}",
        "{'x': {1, 2}}",
        "'x' * 5000",
    ),
    *(
        "'\\ud800'",
        "b'x'",
        "lambda *a: 1",
        "run",
        "print",
        "type",
        "Plan",
        "HighPrecision()",
        "range(3)",
    ),
    *("'a\\nb'", "'.'", "'..'", "'experiment.json'", "'CON'", "'é'", "(x for x in 'ab')", "1 / 0"),
    *(
        "__import__('sys').exit(3)",
        "__import__('nowhere')",
        "(_ for _ in ()).throw(KeyError('a\\nb'))",
    ),
    *(
        "(_ for _ in ()).throw(BaseException('no'))",
        "iter(int, 1)",
        "((((",
        "0x",
        "'\\0'",
        "yield 1",
    ),
    *(
        "Arm(name='a', title=None, plan=None)",
        "FIRST if 'FIRST' in globals() else 1",
        "exit()",
        "...,",
    ),
    *(
        "(1, 'a', None)",
        "{'x': [float('-inf')]}",
        "eval('[' * 500)",
        "(lambda f: f(f))(lambda f: f(f))",
    ),
)


def make_configuration(base: Path, folder: Path, draw: Draw) -> None:
    """An experiment's file; and a folder that holds its runs, or those of another."""
    (folder / "mine.py").write_text(EXPERIMENT)
    (folder / "notes.txt").write_text("all of it")
    out = folder / "out"
    for seed in (0, 1):
        path = out / "first" / "bf16" / f"seed-{seed}"
        shutil.copytree(base / "runs" / "second" / "bf16" / "seed-0", path)
    described = json.loads((base / "runs" / "experiment.json").read_bytes())
    (out / "experiment.json").write_text(json.dumps(described))


def damage_configuration(folder: Path, draw: Draw) -> str:
    file, out = folder / "mine.py", folder / "out"
    fate = draw.random()
    if fate < 0.55 and file.is_file():
        return _damaged_source(file, draw)
    if fate < 0.6:
        damaged_place(file, draw)
        return "the file's place"
    if fate < 0.75 and (out / "experiment.json").is_file():
        try:
            described = json.loads((out / "experiment.json").read_bytes())
        except (ValueError, RecursionError):
            return "no further damage"
        described = replaced(described, draw, pick(draw, NASTY))
        (out / "experiment.json").write_bytes(json_text(described, draw))
        return f"experiment.json is {str(described)[:100]!r}"
    if fate < 0.85:
        (
            out / pick(draw, (STRANGER, f"first/{STRANGER}", f"first/bf16/seed-0/{STRANGER}"))
        ).write_text("all of it")
        return "a stranger's file"
    target = pick(draw, [path for path in below(folder) if path.name != "notes.txt"])
    damaged_place(target, draw)
    return f"place {target.name!r}"


def _damaged_source(file: Path, draw: Draw) -> str:
    data = file.read_bytes()
    fate = draw.random()
    if fate < 0.25:
        file.write_bytes(damaged_bytes(data, draw))
        return "bytes of mine.py"
    if fate < 0.3:
        odd = (
            b"-" * 10**5 + b"1",
            b"(" * 5000,
            b"a" + b".a" * 10**5,
            b"\x00",
            b"1+" * 10**5 + b"1",
        )
        odd += (b"# -*- coding: nonsense -*-\n", "\ufeff".encode() * 2, b"not " * 10**5 + b"1")
        file.write_bytes(pick(draw, odd) + b"\n" + data)
        return "an odd beginning of mine.py"
    value = pick(draw, VALUES)
    fields = (
        "name title plan seeds run arms question limits parts options OPTIONS EXPERIMENT prepare"
    )
    name = pick(draw, fields.split())
    text = data.decode("utf-8", "replace")
    places = list(re.finditer(rf"\b{name} ?= ?[^,=\n]+", text))
    if not places:
        return "no further damage"
    place = pick(draw, places)
    text = text[: place.start()] + f"{name}={value}" + text[place.end() :]
    file.write_text(text, encoding="utf-8", errors="replace")
    return f"{name}={value}"


WORDS = (
    *(
        "run",
        "ls",
        "show",
        "diagnose",
        "report",
        "compare",
        "--json",
        "--out",
        "-o",
        "--arm",
        "bf16",
    ),
    *(
        "--seed",
        "0",
        "-1",
        "--steps",
        "1",
        "--workers",
        "2",
        "--text",
        "notes.txt",
        "--twin",
        "--help",
    ),
    *(
        "nan",
        "1e9",
        "9" * 400,
        "",
        " ",
        "-",
        "--",
        "---",
        "--out=",
        "--json=1",
        "é",
        "\udcff",
        "x" * 5000,
    ),
    *(
        "mine.py",
        "out",
        "out/first/bf16/seed-0",
        ".",
        "..",
        "nowhere",
        "new",
        "new/page.html",
        "a\nb",
    ),
    *(
        "out/experiment.json",
        "-oX",
        "--version",
        "--install-completion",
        "\x1b[31m",
        "~",
        "*",
        "0x10",
    ),
)


def use_configuration(folder: Path, draw: Draw) -> str | None:
    """`fp8lab run` without its workers, random command lines, and configurations built in Python.

    Once `run` has accepted everything, it may replace what is its own.
    """
    from fp8lab.lab import workers

    workers.Workers.do = _done  # type: ignore[method-assign]  (this process ends soon)
    fate = draw.random()
    if fate < 0.6:
        out = folder / "out"
        code = invoke("", "run", folder / "mine.py", "--out", out, "--workers", "1")
        return None if code == 2 else "out"
    if fate < 0.8:
        words = [pick(draw, WORDS) for _ in range(int(draw.integers(1, 8)))]
        if "report" in words and "-o" not in words:
            words += ["-o", "new/page.html"]
        invoke("", *words)
        return "out"
    build(draw)
    return None


def _done(self: Any, jobs: Any, on_report: Any, on_end: Any) -> None:
    for index in jobs:
        on_end(index, None)


def build(draw: Draw) -> None:
    """Frozen configurations with values of any kind: ValueError at birth, in one line."""
    from fp8lab import recipe
    from fp8lab.lab.arm import Arm
    from fp8lab.lab.data import RareToken
    from fp8lab.lab.experiment import Experiment, Part
    from fp8lab.lab.train import Schedule
    from fp8lab.plan import Plan

    plan = Plan(recipe=recipe.HighPrecision())
    arm = Arm(name="a", title="A", plan=plan)
    part = Part(name="p", title="P", arms=(arm,), seeds=(0,), run=print)  # type: ignore[arg-type]
    whole = Experiment(
        name="e", question="?", prediction="", refuted_if="", limits=(), parts=(part,)
    )
    made: list[Any] = [plan, arm, part, whole, Schedule(steps=1), RareToken(seed=0)]
    made += [recipe.Accumulation(), *(one() for one in recipe.RECIPES.values())]
    one = pick(draw, made)
    fields = {field: getattr(one, field) for field in type(one).__dataclass_fields__}
    if not fields:
        return
    for _ in range(int(draw.integers(1, 3))):
        odd = [*NASTY, object(), (1, 2), ("*",), {1}, b"x", len, 1j, range(3), np.float64("nan")]
        fields[pick(draw, list(fields))] = pick(draw, odd)
    with one_line("", ValueError):
        type(one)(**fields)


CONFIGURATION = Kind(make_configuration, damage_configuration, use_configuration, warm_run)
