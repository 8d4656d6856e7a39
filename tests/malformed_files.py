"""Malformed recipes, texts and checkpoints: files of one value each.

What a reader may raise is what its docstring says, and nothing else; what it accepts has to work: a
recipe is written and read back equal and converts a model that takes a step, a text gives batches,
a checkpoint trains on. What it refuses has changed nothing, and no pickle runs.
"""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from malformed_inputs import (
    MARK,
    NASTY,
    Draw,
    Executed,
    Kind,
    damaged_bytes,
    damaged_place,
    demand,
    invoke,
    one_line,
    pick,
    replaced,
)
from malformed_runs import warm_run

CONTEXT = 16

# --- recipes ------------------------------------------------------------------------------------

RECIPES: list[dict[str, Any]] = [
    {"recipe": "DelayedScaling", "amax_history_len": 16, "margin": 1, "exclude": ["head"]},
    {
        "recipe": "Float8CurrentScaling",
        "use_power_2_scales": True,
        "fp8_format": "HYBRID",
        "overrides": {
            "*:grad_output": "DelayedScaling",
            "0.*": {"recipe": "HighPrecision", "format": "BF16"},
            "*:input@output": {"recipe": "MXFP8BlockScaling", "scale_rounding": "even"},
        },
    },
    {"recipe": "Float8BlockScaling", "x_block_scaling_dim": 1, "include": ["*"], "exclude": []},
    {"recipe": "NVFP4BlockScaling", "disable_rht": True, "include": ["0.*", "*.up"]},
    {"recipe": "RowwiseScaling", "accumulation": {"bits": 14, "promote_every": 128}},
    {"recipe": "BitNetScaling", "accumulation": {"gemms": ["output"], "promote_every": None}},
]

TOKENS = (
    *(".nan", ".inf", "-.inf", "1e400", "0x" + "f" * 400, "9" * 5000, "10**9", "1_000", "0b1", "~"),
    *("!!python/object/apply:os.system ['touch MARK']", "!!python/name:os.system", "!!float x"),
    *(
        "!!python/object/new:pathlib.Path ['MARK']",
        "!!binary aGk=",
        "!!set {a, b}",
        "!!omap [a: 1]",
    ),
    *("!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['MARK']]",),
    *(
        "2020-13-45",
        "2020-01-01",
        "&a [*a]",
        "*undefined",
        "&a {<<: *a}",
        "{<<: [1]}",
        "{",
        "[",
        "'",
    ),
    *(
        '"\\ud800"',
        '"\\x00"',
        '"\\u202e"',
        "''",
        "<<: *base",
        "? [a]",
        "- -",
        "|",
        ">",
        "@",
        "`",
        "%",
    ),
    *("[" * 4000, "{a: " * 3000, "- " * 3000, "[]", "{}", "[[]]", "{{}: 1}", "x" * 5000, "true"),
    *(
        "yes",
        "012",
        "1:30",
        "190:20:30",
        "!",
        "!!",
        "!x y",
        "&",
        "*",
        "---\n",
        "...\n",
        "\t",
        "null",
    ),
)


def bomb(draw: Draw) -> str:
    """Lists of lists of lists, each named once: small as a text, large when it is written out."""
    opening, closing = pick(draw, (("[", "]"), ("{a: ", "}")))
    lines = [f"l0: &l0 {opening}lol{closing}"]
    depth = int(draw.integers(3, 30))
    for level in range(1, depth):
        names = ", ".join([f"*l{level - 1}"] * 9)
        merged = f"{{<<: [{names}]}}" if opening == "{a: " else f"[{names}]"
        lines.append(f"l{level}: &l{level} {merged}")
    key = pick(draw, ("include", "margin", "overrides", "accumulation", "recipe", "x"))
    return "\n".join(
        ["recipe: DelayedScaling", *lines[1:], lines[0], f"{key}: *l{depth - 1}"]
        if draw.random() < 0.1
        else [*lines, f"{key}: *l{depth - 1}", "recipe: DelayedScaling"]
    )


def make_recipe(base: Path, folder: Path, draw: Draw) -> None:
    import yaml

    (folder / "recipe.yaml").write_text(yaml.safe_dump(pick(draw, RECIPES), sort_keys=False))


def damage_recipe(folder: Path, draw: Draw) -> str:
    file = folder / "recipe.yaml"
    fate = draw.random()
    if fate < 0.04 or not file.is_file():
        damaged_place(file, draw)
        return "the file's place"
    if file.stat().st_size > 1 << 20:
        return "no further damage"
    data = file.read_bytes()
    if fate < 0.2:
        data = damaged_bytes(data, draw)
    elif fate < 0.28:
        data = bomb(draw).encode()
    elif fate < 0.31:
        data = data * int(draw.integers(2, 4000))
    elif fate < 0.62:
        data = _lines(data, draw)
    else:
        data = _values_of_a_recipe(data, draw)
    file.write_bytes(data)
    return f"recipe.yaml is {data[:300]!r}"


def _lines(data: bytes, draw: Draw) -> bytes:
    lines = data.split(b"\n")
    at, to = (int(n) for n in draw.integers(0, len(lines), 2))
    token = pick(draw, TOKENS).replace("MARK", MARK).encode("utf-8", "surrogatepass")
    fate = int(draw.integers(8))
    if fate < 4 and b":" in lines[at]:
        lines[at] = lines[at].split(b":")[0] + b": " + token
    elif fate == 4:
        lines.insert(at, lines[to])
    elif fate == 5:
        lines[at] = pick(draw, (b" ", b"\t", b"- ", b"  - ")) + lines[at]
    elif fate == 6:
        lines.insert(at, token)
    else:
        lines[at] = token + b": " + lines[at]
    return b"\n".join(lines)


def _values_of_a_recipe(data: bytes, draw: Draw) -> bytes:
    import yaml

    try:
        small = len(data) < 10_000 and b"<<" not in data
        read = yaml.safe_load(data) if small else None  # PyYAML itself is bombed by merges
        if not isinstance(read, dict):
            read = dict(pick(draw, RECIPES))
        fields = (
            "margin amax_history_len fp8_format amax_compute_algo reduce_amax include overrides "
        )
        fields += "accumulation format scale_rounding fp8_gemm_fprop use_f32_scales recipe x"
        if draw.random() < 0.6:
            read[pick(draw, fields.split())] = pick(draw, NASTY)
        else:
            read = replaced(read, draw, pick(draw, NASTY))
        return str(yaml.safe_dump(read, sort_keys=False, allow_unicode=True)).encode(
            "utf-8", "surrogatepass"
        )
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, AttributeError, KeyError):
        return data + b"\nmargin: 1" * 2


def use_recipe(folder: Path, draw: Draw) -> None:
    """ValueError or OSError; data as `recipe_from_dict` takes it the same. What is accepted is
    written and read back equal, and converts a model that then takes a step."""
    from fp8lab.plan import load_recipe, recipe_from_dict, recipe_to_dict

    accepted = []
    with one_line("recipe.yaml", ValueError, OSError):
        accepted.append(load_recipe(folder / "recipe.yaml"))
    data = copy.deepcopy(pick(draw, RECIPES))
    for _ in range(int(draw.integers(1, 3))):
        data = replaced(
            data, draw, pick(draw, [*NASTY, b"x", 1j, {1, 2}, (1,), object(), len, 1.5])
        )
    with one_line("<data>", ValueError):
        accepted.append(recipe_from_dict(data, "<data>"))
    for plan in accepted:
        written = recipe_to_dict(plan)
        demand(recipe_from_dict(written, "again") == plan, f"read back otherwise: {written}")
        json.dumps(written, allow_nan=False)
        take_a_step(plan)


@cache
def _batch() -> Any:
    import torch

    return torch.randn(32, 32)


def take_a_step(plan: Any) -> None:
    """Only ValueError, in one line, where a model does not fit the plan."""
    import torch

    from fp8lab import GatedFeedForward, convert

    model = torch.nn.Sequential(GatedFeedForward(32, 32))
    with one_line("", ValueError):
        convert(model, plan)
        loss = model(_batch()).square().mean()
        loss.backward()


def warm_recipe() -> None:
    import torch
    import yaml  # noqa: F401

    from fp8lab.plan import recipe_from_dict

    torch.set_num_threads(1)
    for data in RECIPES:
        take_a_step(recipe_from_dict(data, "a recipe"))


# --- texts --------------------------------------------------------------------------------------


def make_text(base: Path, folder: Path, draw: Draw) -> None:
    text = pick(draw, ("the quick brown fox\n" * 40, "naïve ⊙ " * 80, "x" * 100_000))
    (folder / "text.txt").write_text(text, encoding="utf-8")


def damage_text(folder: Path, draw: Draw) -> str:
    file = folder / "text.txt"
    if draw.random() < 0.3 or not file.is_file() or file.stat().st_size > 1 << 20:
        damaged_place(file, draw)
        return "the file's place"
    file.write_bytes(damaged_bytes(file.read_bytes(), draw))
    return "the file's bytes"


def use_text(folder: Path, draw: Draw) -> None:
    from fp8lab.lab.data import read_text
    from fp8lab.lab.train import NextByte

    file = folder / "text.txt"
    context = int(pick(draw, (1, 16, 16, 10**6, 0, -1, 2**40)))
    with one_line("text.txt", ValueError):
        corpus = read_text(file, context=context)
        demand(corpus.data.tobytes() == file.read_bytes(), "other bytes than the file's")
        for split in ("train", "held_out"):
            seed, step = (int(pick(draw, (0, 5, 2**32 - 1, 2**32, -1))) for _ in range(2))
            with one_line("expected", ValueError):
                batch = corpus.batch(step, seed=seed, batch=2, context=context, split=split)
                demand(tuple(batch.shape) == (2, context + 1), "another shape")
    with one_line("text.txt", ValueError):
        NextByte(str(file), 0, batch=2, context=CONTEXT).held_out(0)
    if draw.random() < 0.3:
        tiny = Path(__file__).with_name("tiny_experiment.py")
        invoke("", "run", tiny, "--text", file, "--arm", "none", "--out", folder / "out")
        demand(not (folder / "out").exists(), "a folder for runs that cannot be made")


# --- checkpoints --------------------------------------------------------------------------------


def trained() -> tuple[Any, Any]:
    """A model with delayed scales and its optimizer, after a step."""
    import torch

    from fp8lab import DelayedScaling, GatedFeedForward, Plan, convert

    model = torch.nn.Sequential(GatedFeedForward(8, 16))
    convert(model, Plan(recipe=DelayedScaling(amax_history_len=4)))
    optimizer = torch.optim.AdamW(model.parameters())
    one_step(model, optimizer)
    return model, optimizer


def one_step(model: Any, optimizer: Any) -> None:
    import torch

    optimizer.zero_grad()
    model(torch.ones(4, 8)).square().mean().backward()
    optimizer.step()


def make_checkpoint(base: Path, folder: Path, draw: Draw) -> None:
    shutil.copy(base / "c.safetensors", folder / "c.safetensors")


def damage_checkpoint(folder: Path, draw: Draw) -> str:
    file = folder / "c.safetensors"
    fate = draw.random()
    if fate < 0.06 or not file.is_file() or file.stat().st_size > 1 << 24:
        damaged_place(file, draw)
        return "the file's place"
    data = file.read_bytes()
    if fate < 0.4:
        file.write_bytes(damaged_bytes(data, draw))
        return "bytes"
    if fate < 0.5:
        pick(draw, FOREIGN)(file)
        return f"foreign: {file.read_bytes()[:100]!r}"
    size = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + size])
    except (ValueError, RecursionError):
        return "no further damage"
    if fate < 0.6:
        lie = int(pick(draw, (0, 1, size - 1, size + 1, len(data), 2**31, 2**63, 2**64 - 1, 10**8)))
        file.write_bytes(lie.to_bytes(8, "little") + data[8:])
        return f"a header of {lie} bytes"
    header, told = _damaged_header(header, draw)
    try:
        text = json.dumps(header).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        text = b"{" * 100
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    return told


def _damaged_header(header: Any, draw: Draw) -> tuple[Any, str]:
    """What a tensor is said to be, or what is said of the whole."""
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__"), dict):
        return header, "no further damage"
    about = header["__metadata__"]
    fate = int(draw.integers(6))
    if fate == 0:
        return replaced(header, draw, pick(draw, NASTY)), "header"
    if fate == 1:
        key = pick(draw, ("step", "optimizer", "optimizer_state"))
        about[key] = pick(draw, ("", "-1", "nan", "9" * 5000, "1.5", "[" * 10**5, "{", "null", "٣"))
        return header, f"{key} is {about[key][:40]!r}"
    if fate == 2:
        state = pick(
            draw, ({"0": {"step": NASTY[int(draw.integers(20))]}}, {"99": {"x": 1}}, {"-1": {}})
        )
        about["optimizer_state"] = json.dumps(state)
        return header, f"optimizer_state is {state}"
    names = [name for name in header if name != "__metadata__"]
    name = pick(draw, names)
    tensor = header[name]
    if fate == 3 and isinstance(tensor, dict):
        kinds = (
            "F32",
            "F64",
            "I32",
            "U8",
            "BF16",
            "F8_E4M3",
            "F8_E8M0",
            "F4",
            "C64",
            "X",
            "BOOL",
            "",
        )
        tensor["dtype"] = pick(draw, kinds)
    elif fate == 4 and isinstance(tensor, dict):
        shape = list(tensor.get("shape") or [1])
        shapes = (
            shape[::-1],
            [*shape, 1],
            [int(np.prod(shape, dtype=np.float64) % 2**31)],
            [1, *shape],
        )
        tensor["shape"] = pick(draw, (*shapes, [], [0], [2**63, 2**63], [-1], [2**32, 2**32, 0]))
    else:
        other = pick(
            draw, (pick(draw, names), "optimizer.0.x", "optimizer.99.exp_avg", "model.x", "x")
        )
        header[name], header[other] = header.get(other, tensor), tensor
        return header, f"{name} and {other!r} swapped"
    return header, f"{name} is {tensor}"


def _torch_saved(file: Path) -> None:
    import torch

    torch.save({"model": Executed()}, file)


def _numpy_saved(file: Path) -> None:
    with file.open("wb") as one:
        np.save(one, np.array([Executed()], dtype=object), allow_pickle=True)


def _zip_bomb(file: Path) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Executed()) + bytes(10**7))


def _long_header(file: Path) -> None:
    """A header as long as it says, of a size that nobody writes."""
    with file.open("wb") as one:
        one.write((99_999_992).to_bytes(8, "little") + b'{"a":')
        one.truncate(100_000_000)


def _many_tensors(file: Path) -> None:
    header = {
        f"model.{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(9999)
    }
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)


FOREIGN: tuple[Callable[[Path], object], ...] = (
    _torch_saved,
    _zip_bomb,
    _long_header,
    _many_tensors,
    lambda file: file.write_bytes(pickle.dumps(Executed())),
    lambda file: file.write_bytes(pickle.dumps({"step": "1", "x": [Executed()]}, protocol=2)),
    lambda file: _numpy_saved(file),
)


def use_checkpoint(folder: Path, draw: Draw) -> None:
    """ValueError, and then nothing has changed; or it is loaded, and training goes on."""
    import torch

    from fp8lab.lab.train import load_checkpoint

    file = folder / "c.safetensors"
    model, optimizer = trained()
    state, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    random = torch.get_rng_state()
    step = None
    with one_line("c.safetensors", ValueError):
        step = load_checkpoint(file, model, optimizer)
    if step is not None:
        demand(type(step) is int and step >= 0, f"step {step!r}")
        one_step(model, optimizer)
        return
    demand(torch.equal(random, torch.get_rng_state()), "the random state has changed")
    for name, value in model.state_dict().items():
        demand(torch.equal(value, state[name]), f"{name} has changed")
    for index, of in optimizer.state_dict()["state"].items():
        for name, value in of.items():
            demand(torch.equal(value, moments["state"][index][name]), f"{index}.{name} has changed")


def warm_checkpoint() -> None:
    import safetensors.torch  # noqa: F401

    warm_run()
    trained()


RECIPE = Kind(make_recipe, damage_recipe, use_recipe, warm_recipe)
TEXT = Kind(make_text, damage_text, use_text, warm_run)
CHECKPOINT = Kind(make_checkpoint, damage_checkpoint, use_checkpoint, warm_checkpoint)
