"""Malformed inputs: no traceback, no hang, nothing overwritten; and each bug that they have shown.

The cases are made and run by `malformed_inputs` in processes of their own, 600 of them here and
10,000 in the slow test. A failure prints kind, seed and the least damage that shows it; so does

    cd tests; python malformed_inputs.py make V; python malformed_inputs.py V KIND SEED 1

What was found so is below by name, so that it stays found whatever the seeds become.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import malformed_inputs
import pytest
import torch
from malformed_inputs import Executed, Kind, failure, fingerprint
from safetensors.torch import load_file, safe_open, save_file
from typer.testing import CliRunner

from fp8lab import (
    DelayedScaling,
    GatedFeedForward,
    HighPrecision,
    Plan,
    load_recipe,
)
from fp8lab.cli import app
from fp8lab.lab.arm import Arm
from fp8lab.lab.data import RareToken, read_text
from fp8lab.lab.experiment import Experiment, Part, load_experiment, run_experiment
from fp8lab.lab.train import Schedule, load_checkpoint, save_checkpoint
from fp8lab.optim import Fp8AdamW
from fp8lab.plan import recipe_from_dict
from fp8lab.recipe import Accumulation
from fp8lab.store import RunError, RunWriter

SCRIPT = Path(malformed_inputs.__file__)
FEW = {"run": 240, "recipe": 170, "text": 40, "checkpoint": 80, "configuration": 70}
MANY = {"run": 4000, "recipe": 2500, "text": 500, "checkpoint": 1500, "configuration": 1500}
assert sum(FEW.values()) == 600 and sum(MANY.values()) == 10_000


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("malformed") / "valid"
    subprocess.run([sys.executable, SCRIPT, "make", folder], check=True)
    return folder


def cases(valid: Path, kind: str, first: int, count: int) -> Iterator[dict[str, Any]]:
    """What is wrong with so many cases; one that takes its process along is wrong, too."""
    end = first + count
    while first < end:
        command = [sys.executable, "-W", "error", SCRIPT, valid, kind, str(first), str(end - first)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        told = [json.loads(line) for line in done.stdout.splitlines()]
        yield from (one for one in told if "error" in one)
        if done.returncode == 0:
            assert told[-1]["done"] == end - first
            return
        assert told, done.stderr  # else it did not come as far as the first case
        seed = told[-1].get("at", told[-1].get("seed"))
        yield {"kind": kind, "seed": seed, "error": f"the process ended: {done.stderr[-3000:]}"}
        first = seed + 1


def none_wrong(found: Iterator[dict[str, Any]]) -> None:
    wrong = list(found)
    assert not wrong, "\n".join(json.dumps(one, indent=1) for one in wrong[:5])


@pytest.mark.long
@pytest.mark.parametrize("kind", FEW)
def test_malformed_inputs(valid: Path, kind: str) -> None:
    none_wrong(cases(valid, kind, 0, FEW[kind]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", MANY)
def test_ten_thousand_malformed_inputs(valid: Path, kind: str) -> None:
    none_wrong(cases(valid, kind, 10_000, MANY[kind]))


# --- the net itself -----------------------------------------------------------------------------


def raises(folder: Path) -> None:
    raise KeyError("a bug")


def overwrites(folder: Path) -> None:
    (folder / "input").write_text("mine")


def touches(folder: Path) -> None:
    os.utime(folder / "input")


def removes(folder: Path) -> None:
    (folder / "input").unlink()


def executes(folder: Path) -> None:
    pickle.loads(pickle.dumps(Executed()))


def hangs(folder: Path) -> None:
    time.sleep(5)


def says_much(folder: Path) -> None:
    with malformed_inputs.one_line("input", ValueError):
        raise ValueError("input: wrong\nin two ways")


def says_little(folder: Path) -> None:
    with malformed_inputs.one_line("input", ValueError):
        raise ValueError("wrong")


BUGS: dict[Callable[[Path], None], str] = {
    raises: "KeyError: 'a bug'",
    overwrites: "Wrong: overwritten or removed: ['input']",
    touches: "Wrong: overwritten or removed: ['input']",
    removes: "Wrong: overwritten or removed: ['input']",
    executes: "Wrong: a pickle was executed",
    hangs: "Hang: more than 0.2 s",
    says_much: "Wrong: ValueError of several lines: ",
    says_little: "Wrong: ValueError does not name input: ",
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_caught(
    bug: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(malformed_inputs, "SECONDS", 0.2)
    monkeypatch.setattr(malformed_inputs, "DAMAGES", 1)
    signals = malformed_inputs.signal
    signals.signal(signals.SIGALRM, malformed_inputs.alarm)
    signals.signal(signals.SIGPROF, malformed_inputs.alarm)
    for use, expected in ((bug, BUGS[bug]), (lambda _: None, None)):
        kind = Kind(
            make=lambda base, folder, draw: (folder / "input").write_text("yours") and None,
            damage=lambda folder, draw: "no damage",
            use=lambda folder, draw, use=use: use(folder),  # type: ignore[misc]
            warm=lambda: None,
        )
        found = failure(kind, "a kind", 3, tmp_path, tmp_path / "case", None)
        assert found is None if expected is None else found["error"].startswith(expected)
        assert found is None or (found["seed"], found["damage"]) in ((3, "no damage"), (3, ""))


# --- what was found: recipes --------------------------------------------------------------------


def refused(path: Path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 1000
    return message.removeprefix(str(path))


LAUGHS = "\n".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 25))
MERGES = "\n".join(f"l{n}: &l{n} {{<<: [{', '.join([f'*l{n - 1}'] * 9)}]}}" for n in range(1, 25))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"l0: &l0 [lol]\n{LAUGHS}\nrecipe: *l24", ": recipe: [["),
        (f"l0: &l0 [lol]\n{LAUGHS}\nrecipe: DelayedScaling\ninclude: *l24", ": include: [["),
        (f"l0: &l0 [lol]\n{LAUGHS}\nrecipe: DelayedScaling\naccumulation: *l24", ": accumulation"),
        (f"l0: &l0 {{a: lol}}\n{MERGES}\nrecipe: *l24", ", line 25: a merge, expected the keys"),
        ("recipe: DelayedScaling\nmargin: 1\nmargin: 2", ", line 3: margin: stands there twice"),
        ("recipe: HighPrecision\noverrides: {a: HighPrecision, a: BitNetScaling}", ", line 2: a: "),
        ("recipe: HighPrecision\noverrides: {1.10: BitNetScaling}", ": overrides: 1.1, expected a"),
        ("recipe: DelayedScaling\nmargin: 150", ": DelayedScaling: margin=150, expected a whole"),
        ("recipe: DelayedScaling\namax_history_len: 1000000000000", ": DelayedScaling: amax_hist"),
        ('recipe: DelayedScaling\n"a\\nb": 1', ": 'a\\nb': unknown field"),
        ("recipe: DelayedScaling\n" + "#" * (1 << 17), ": expected YAML of at most 131072 bytes"),
        ("!!python/object/apply:os.system ['touch executed']", ", line 1: not valid YAML"),
    ],
)
def test_a_recipe_that_is_refused_in_a_line(tmp_path: Path, text: str, message: str) -> None:
    assert refused(tmp_path / "recipe.yaml", text).startswith(message)


def test_anchors_that_mean_no_harm_are_read(tmp_path: Path) -> None:
    text = "recipe: HighPrecision\noverrides:\n  a: &x {recipe: DelayedScaling, margin: 1}\n  0: *x"
    (tmp_path / "recipe.yaml").write_text(text)
    overrides = load_recipe(tmp_path / "recipe.yaml").overrides
    assert overrides == dict.fromkeys(("a", "0"), DelayedScaling(margin=1))


@pytest.mark.parametrize(
    "data",
    [
        {"recipe": "DelayedScaling", "margin": 10**5000},
        {"recipe": "HighPrecision", "accumulation": {"gemms": [[]]}},
        {"recipe": "HighPrecision", "overrides": {None: "HighPrecision"}},
        {"recipe": "HighPrecision", "overrides": {10**5000: "HighPrecision"}},
        {"recipe": "HighPrecision", "overrides": {"a:\n": "HighPrecision"}},
        {"recipe": "HighPrecision", "\ud800\n": 1},
    ],
    ids=lambda data: str([*data])[:60],
)
def test_data_that_is_no_recipe_is_refused_in_a_line(data: dict[Any, Any]) -> None:
    with pytest.raises(ValueError) as caught:
        recipe_from_dict(data, "here")
    assert str(caught.value).startswith("here: ") and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "make",
    [
        lambda: Plan(recipe=HighPrecision(), include=5),  # type: ignore[arg-type]
        lambda: Plan(recipe=HighPrecision(), exclude=(5,)),  # type: ignore[arg-type]
        lambda: Plan(recipe=HighPrecision(), overrides=[]),  # type: ignore[arg-type]
        lambda: Plan(recipe=HighPrecision(), overrides={5: HighPrecision()}),  # type: ignore[dict-item]
        lambda: Accumulation(gemms=([],)),  # type: ignore[arg-type]
        lambda: Schedule(steps="many"),  # type: ignore[arg-type]
        lambda: Schedule(steps=1, diverged_above=float("nan")),
        lambda: RareToken(seed=0, dim="8"),  # type: ignore[arg-type]
        lambda: RareToken(seed=0, target_scale=10**400),
        lambda: RareToken(seed=None),  # type: ignore[arg-type]
    ],
)
def test_a_configuration_is_checked_at_birth(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        make()


# --- what was found: files that are none --------------------------------------------------------


@pytest.fixture(params=["a pipe", "/dev/zero"])
def endless(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """What can be opened and never ends; a reader that tries is interrupted."""
    trained(torch.optim.SGD)  # what torch imports at its first use takes its time
    path = tmp_path / "endless.py"
    if request.param == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    signal = malformed_inputs.signal
    before = signal.signal(signal.SIGALRM, malformed_inputs.alarm)
    signal.alarm(20)
    yield path
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_nobody_waits_for_what_never_ends(endless: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    readers: list[Callable[[], object]] = [
        lambda: load_recipe(endless),
        lambda: read_text(endless),
        lambda: load_experiment(str(endless)),
        lambda: load_checkpoint(endless, model, optimizer),
    ]
    for read in readers:
        with pytest.raises(ValueError, match=endless.name):
            read()


def test_an_experiments_folder_whose_file_never_ends(endless: Path) -> None:
    endless.rename(endless.with_name("experiment.json"))
    with pytest.raises(RunError, match="exists and holds no experiment"):
        run_experiment(Path("x.py"), tiny(), endless.parent)


def test_a_text_that_does_not_fit_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path) -> bytes:
        raise MemoryError

    monkeypatch.setattr(Path, "read_bytes", full)
    (tmp_path / "text").write_text("x" * 50)
    with pytest.raises(ValueError, match=r"text: 50 bytes, more than fit into memory"):
        read_text(tmp_path / "text")


@pytest.mark.long
def test_what_lies_in_the_cache_of_kernels_and_is_no_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fp8lab import kernels

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FP8LAB_KERNELS", raising=False)
    try:
        kernels._compiler()
    except OSError:
        pytest.skip("no C compiler here")
    kernels._load()
    (built,) = (tmp_path / "fp8lab").glob("*.so")
    prefix = built.name[: -len("0123456789abcdef.so")]
    os.mkfifo(built.with_name(f"{prefix}pipe.so"))
    built.with_name(f"{prefix}link.so").symlink_to("nowhere")
    built.with_name(f"{prefix}folder.so").mkdir()
    before = fingerprint(tmp_path)
    kernels._load()
    assert fingerprint(tmp_path) == before


# --- what was found: checkpoints ----------------------------------------------------------------


def trained(kind: Callable[..., torch.optim.Optimizer]) -> tuple[Any, torch.optim.Optimizer]:
    model = torch.nn.Sequential(GatedFeedForward(8, 16))
    optimizer = kind(model.parameters())
    model(torch.ones(4, 8)).square().mean().backward()
    optimizer.step()
    return model, optimizer


def with_metadata(path: Path, **more: str) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata=metadata | more)


def with_tensors(path: Path, **more: torch.Tensor) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = {name.replace("__", "."): value for name, value in more.items()}
    save_file(load_file(path) | tensors, path, metadata=metadata)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, Fp8AdamW])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: with_metadata(path, optimizer_state="[" * 100_000), "cannot be loaded: "),
        (lambda path: with_metadata(path, step="-1"), "cannot be loaded: step -1, expected"),
        (lambda path: with_tensors(path, optimizer__99__x=torch.ones(1)), "optimizer state 99: x"),
        (lambda path: with_tensors(path, optimizer__0__x=torch.ones(1)), "optimizer state 0: "),
        (lambda path: with_metadata(path, optimizer_state='{"0": {"y\\n": 1}}'), "optimizer state"),
        (lambda path: path.write_bytes(pickle.dumps(Executed())), "cannot be loaded: "),
        (lambda path: torch.save({"model": Executed()}, path), "cannot be loaded: "),
    ],
)
def test_a_checkpoint_is_refused_before_anything_has_changed(
    kind: Callable[..., torch.optim.Optimizer],
    damage: Callable[[Path], None],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, *trained(kind), 3)
    damage(path)
    model, optimizer = trained(kind)
    before = [value.clone() for value in model.state_dict().values()]
    with pytest.raises(ValueError) as caught:
        load_checkpoint(path, model, optimizer)
    assert str(caught.value).startswith(f"checkpoint {path}: {message}")
    assert "\n" not in str(caught.value)
    assert all(map(torch.equal, model.state_dict().values(), before))
    assert [*tmp_path.iterdir()] == [path]


def test_moments_of_another_shape_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, *trained(torch.optim.AdamW), 3)
    with_tensors(path, optimizer__0__exp_avg=torch.ones(3))
    with pytest.raises(ValueError, match=r"optimizer state 0: exp_avg: torch.float32 \[3\], exp"):
        load_checkpoint(path, *trained(torch.optim.AdamW))


# --- what was found: experiments ----------------------------------------------------------------


def arm(**more: Any) -> Arm:
    return Arm(**{"name": "a", "title": "A", "plan": Plan(recipe=HighPrecision())} | more)


def part(**more: Any) -> Part:
    fields = {"name": "p", "title": "P", "arms": (arm(),), "seeds": (0, 1), "run": print}
    return Part(**fields | more)


def tiny(**more: Any) -> Experiment:
    words = dict.fromkeys(("question", "prediction", "refuted_if"), "?")
    return Experiment(**{"name": "e", "limits": (), "parts": (part(),)} | words | more)


@pytest.mark.parametrize(
    "make",
    [
        lambda: arm(options={"x": object()}),
        lambda: arm(options={"x": float("inf")}),
        lambda: arm(options=5),
        lambda: arm(predicted="wins"),
        lambda: arm(plan=None),
        lambda: part(seeds=("../../x",)),
        lambda: part(seeds=(0, 0)),
        lambda: part(seeds=(-1,)),
        lambda: part(seeds=iter(int, 1)),
        lambda: part(arms=(5,)),
        lambda: part(run=5),
        lambda: tiny(name=5),
        lambda: tiny(name="x" * 5000),
        lambda: tiny(parts=(5,)),
        lambda: tiny(limits=(5,)),
    ],
)
def test_an_experiment_is_checked_at_birth(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert "expected" in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("statement", ["exit(0)", "raise BaseException", "import sys; sys.exit()"])
def test_an_experiments_file_that_ends_the_process(tmp_path: Path, statement: str) -> None:
    (tmp_path / "x.py").write_text(f"\n{statement}\n")
    with pytest.raises(ValueError, match=r"x.py: (SystemExit|BaseException).* \(x.py:2\)$"):
        load_experiment(str(tmp_path / "x.py"))


def test_what_lies_beside_an_experiments_file_can_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "beside_it.py").write_text("EXPERIMENT = 3\n")
    (tmp_path / "x.py").write_text("from beside_it import EXPERIMENT\n")
    with pytest.raises(ValueError, match=r"EXPERIMENT"):
        load_experiment(str(tmp_path / "x.py"))
    assert sys.path[0] == str(tmp_path)


def test_seeds_of_the_command_line_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^seed -1: expected some of 0, 1, as the experiment has"):
        run_experiment(Path("x.py"), tiny(), tmp_path / "out", seeds=[-1])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["p/a/seed-1/thesis.txt", "p/a/seed-1"])
def test_what_is_no_run_is_not_removed_and_nothing_else_is(tmp_path: Path, where: str) -> None:
    out = tmp_path / "out"
    run_experiment(Path("x.py"), tiny(), out, arms=[])
    for seed in (0, 1):
        RunWriter.create(out / "p" / "a" / f"seed-{seed}", {}).close("failed")
    if where.endswith(".txt"):
        (out / where).write_text("all of it")
    else:
        (out / where).rename(tmp_path / "elsewhere")
        (out / where).symlink_to(tmp_path / "elsewhere")
    before = fingerprint(tmp_path)
    with pytest.raises(RunError, match=r"holds 'thesis.txt'|is a link"):
        run_experiment(Path("x.py"), tiny(question="Another?"), out)
    assert fingerprint(tmp_path) == before


# --- what was found: the command line -----------------------------------------------------------


def invoke(*arguments: str | Path) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def run_with(path: Path, **info: Any) -> Path:
    RunWriter.create(path, info).close()
    return path


def test_ls_of_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    run_with(tmp_path / "other")
    run_with(tmp_path / "odd").rename(tmp_path / os.fsdecode(b"\xff"))
    assert len(json.loads(invoke("ls", tmp_path, "--json").stdout)) == 2
    result = invoke("ls", tmp_path)
    assert result.exit_code == 0 and "other" in result.stdout and "\\udcff" in result.stdout


@pytest.mark.parametrize(
    "info",
    [
        {"sites": 5},
        {"sites": [5, {}, {"site": 1}]},
        {"precision": {"a": 5, "b": []}},
        {"result": {"final_loss": "low"}},
        {"result": {"final_loss": 10**400}},
        {"config": {"part": [], "arm": {}}},
    ],
)
@pytest.mark.parametrize("verb", ["show", "ls", "compare"])
def test_a_run_that_says_odd_things_of_itself(
    tmp_path: Path, verb: str, info: dict[str, Any]
) -> None:
    for name in ("one", "two"):
        run_with(tmp_path / name, **info)
    where = tmp_path / "one" if verb == "show" else tmp_path
    for flags in ((), ("--json",)):
        assert invoke(verb, where, *flags).exit_code == 0


def test_a_table_without_a_site_is_compared(tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path / "run", {})
    writer.append("tensors", [{"step": 0, "rank": 0}, {"step": 0, "rank": 0, "site": "a:product"}])
    writer.close()
    assert invoke("compare", tmp_path).exit_code == 0


@pytest.mark.parametrize("place", ["run/run.json", "notes.txt", "pipe"])
def test_a_report_does_not_replace_what_is_no_page(tmp_path: Path, place: str) -> None:
    run_with(tmp_path / "run")
    (tmp_path / "notes.txt").write_text("all of it")
    os.mkfifo(tmp_path / "pipe")
    before = fingerprint(tmp_path)
    result = invoke("report", tmp_path / "run", "-o", tmp_path / place)
    expected = f"error: {tmp_path / place}: exists and is no HTML page, expected a new file\n"
    assert (result.exit_code, result.stderr) == (2, expected)
    assert fingerprint(tmp_path) == before


def test_an_error_moves_no_cursor_and_fills_no_screen() -> None:
    result = invoke("show", "\x1b[31m" + "x" * 5000)
    assert result.exit_code == 2 and len(result.stderr) < 1300
    assert result.stderr.startswith("error: \\x1b[31m") and result.stderr.isprintable() is False
    assert result.stderr.removesuffix("\n").isprintable()
