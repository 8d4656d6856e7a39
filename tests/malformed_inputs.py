"""Malformed inputs from seeds: run directories, recipes, configurations, texts, checkpoints.

A case is a kind and a seed. The seed copies one valid input, damages it in up to three ways (bytes
flipped, cut, swapped; values replaced by what no reader wants; folders, pipes, sockets, devices,
links in the place of files) and gives it to the library as a user would. What is demanded:

    no traceback    the documented error in one line that names the input, and nothing else
    no hang         an alarm after `SECONDS` of work, or six times that of waiting;
                    what holds the interpreter's lock is shot a bit later
    no overwriting  every entry below the case's folder is, by content and time, what it was
    no explosion    the process may grow by `MEMORY` bytes; a pickle that is loaded leaves a mark

    python malformed_inputs.py make FOLDER                     the valid inputs, recorded for real
    python malformed_inputs.py FOLDER KIND FIRST COUNT         cases; a line of JSON each that fails
    python malformed_inputs.py FOLDER KIND SEED 1 --only 2     one of a case's damages alone

Cases run in a process of their own, for a reader that crashes takes its process along; the seed
that it was at is on its last line. Rejected: hypothesis, which would shrink better, but what it
draws depends on what it drew before, so that no part of 10,000 can be run alone or again.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import json
import os
import pickle
import re
import resource
import signal
import socket
import stat
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Draw = np.random.Generator
SECONDS = 10.0
MEMORY = 1 << 30
STRANGER = "thesis.txt"
MARK = "a pickle was executed"
DAMAGES = 3
WHOLE = 1 << 22  # files up to this size are compared by content


class Wrong(Exception):
    """What must not happen has happened."""


class Hang(BaseException):
    """Raised by the alarm; not an Exception, so that no reader takes it for bad input."""


class Executed:
    """Unpickled, it leaves a mark in the working directory."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(MARK),)


def pick(draw: Draw, choices: Any) -> Any:
    return choices[int(draw.integers(len(choices)))]


# --- damage to values ---------------------------------------------------------------------------


def nested(depth: int, leaf: Any = 0, key: str | None = None) -> Any:
    for _ in range(depth):
        leaf = [leaf] if key is None else {key: leaf}
    return leaf


NASTY: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**30, 10**400, 0.5, -0.0, 1e308),
    *(
        float("nan"),
        float("inf"),
        float("-inf"),
        "",
        " ",
        "a\nb",
        "\ud800",
        "\x00",
        "\x1b[31m",
        "²",
    ),
    *("../../x", "/dev/zero", "nan", "True", "x" * 10_000, "é\u202e", "[bold]", "{{ 1 }}", "<b>"),
    *([], {}, [[]], [None], [{}], {"a": []}, {"": 0}, [1, "a", None], {"a": {"b": 1}}, {"0": {}}),
    *(nested(40), nested(300), nested(300, key="k"), [0] * 1000, {str(i): i for i in range(300)}),
]


def replaced(data: Any, draw: Draw, value: Any) -> Any:
    """`data` with one place of it, drawn from all, replaced, removed or doubled."""
    if isinstance(data, dict | list) and data and draw.random() < 0.85:
        keys = list(data) if isinstance(data, dict) else list(range(len(data)))
        key = pick(draw, keys)
        copy = dict(data) if isinstance(data, dict) else list(data)
        fate = draw.random()
        if fate < 0.1:
            del copy[key]
        elif fate < 0.15 and isinstance(copy, dict):
            copy[pick(draw, ("", "\ud800", "recipe", "unknown", "x" * 500))] = copy[key]
        elif fate < 0.2 and isinstance(copy, list):
            copy.append(copy[key])
        else:
            copy[key] = replaced(copy[key], draw, value)
        return copy
    return value


def json_text(data: Any, draw: Draw) -> bytes:
    """As JSON, now and then in a way that only a lenient parser takes."""
    try:
        text = json.dumps(data, indent=pick(draw, (None, 1)))
    except (RecursionError, ValueError):
        text = "[" * 500 + "]" * 500
    fate = int(draw.integers(24))
    twisted: dict[int, Callable[[], bytes]] = {
        0: lambda: b"\xef\xbb\xbf" + text.encode(),
        1: lambda: text.encode("utf-16"),
        2: lambda: re.sub(r"\d+", "9" * 5000, text, count=1).encode(),
        3: lambda: b'{"schema_version": 1, "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        4: lambda: (text[:1] + '"state": 5, ' + text[1:]).encode(),
        5: lambda: text.replace('"', "'").encode(),
        6: lambda: text.encode() + b"\x00" * 20,
        7: lambda: b'{"schema_version": 1, "x": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001,
    }
    return twisted.get(fate, text.encode)()


# --- damage to bytes ----------------------------------------------------------------------------

SPLINTERS = (
    *(b"", b"\x00" * 8, b"\xff" * 8, b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80", b"ARROW1\x00\x00"),
    *(b"PAR1", b"\xef\xbb\xbf", b"\xff\xfe", b"\r\n", b"\x80abc", b"PK\x03\x04", b"\x1f\x8b"),
    *((2**63 - 1).to_bytes(8, "little"), (1 << 40).to_bytes(8, "little"), b"\x80\x02cos\nsystem\n"),
)


def damaged_bytes(data: bytes, draw: Draw) -> bytes:
    size = len(data)
    low, high = sorted(int(n) for n in draw.integers(0, size + 1, 2))
    flipped = bytearray(data)
    for _ in range(int(draw.integers(1, 9)) if size else 0):
        flipped[int(draw.integers(size))] ^= 1 << int(draw.integers(8))
    eight = min(low // 8 * 8, size)
    return bytes(
        pick(
            draw,
            (
                flipped,
                flipped,
                flipped,
                data[:low],
                data[low:],
                data[: max(0, size - int(draw.integers(1, 20)))],
                data[:low] + bytes(high - low) + data[high:],
                data[:low] + draw.bytes(high - low) + data[high:],
                data[:low] + data[high:],
                data + data[low:high],
                data[:low] + data[low:high] * 3 + data[high:],
                data[:low] + pick(draw, SPLINTERS) + data[low:],
                data[:eight] + draw.bytes(4) + data[eight + 4 :],
                data[:eight] + pick(draw, SPLINTERS)[:8] + data[eight + 8 :],
                data[: max(0, size - 12)] + draw.bytes(4) + data[max(0, size - 8) :],
                b"",
                b"not what was expected\n" * int(draw.integers(1, 4)),
                draw.bytes(int(draw.integers(1, 400))),
                pickle.dumps(Executed()),
                pick(draw, SPLINTERS),
            ),
        )
    )


# --- damage to places ---------------------------------------------------------------------------


def gone(path: Path) -> Path:
    """`path` with nothing there any more, and its parent folder in place."""
    with contextlib.suppress(OSError):
        clear(path)
    return path


def clear(path: Path) -> None:
    """Remove a tree of any depth, whatever is in it."""
    folders, waiting = [], [path]
    while waiting:
        one = waiting.pop()
        if stat.S_ISDIR(one.lstat().st_mode):
            folders.append(one)
            one.chmod(0o700)
            waiting += one.iterdir()
        else:
            one.unlink()
    for one in reversed(folders):
        one.rmdir()


def _socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # an address holds some hundred characters
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name[:90])
    finally:
        os.chdir(here)


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


def deep(path: Path) -> None:
    path.mkdir()
    for _ in range(min(1200, (4000 - len(str(path))) // 2)):
        path /= "d"
        path.mkdir()


PLACES: tuple[Callable[[Path], object], ...] = (
    lambda path: path,  # nothing there
    lambda path: path.mkdir(),
    lambda path: (path.mkdir(), (path / "run.json").write_text("{}")),
    lambda path: os.mkfifo(path),
    lambda path: _socket(path),
    lambda path: path.symlink_to(path.name),
    lambda path: path.symlink_to("nowhere"),
    lambda path: path.symlink_to("/dev/zero"),
    lambda path: path.symlink_to("/dev/null"),
    lambda path: path.symlink_to(".."),
    lambda path: _sparse(path),
    lambda path: path.touch(mode=0),
)


def damaged_place(path: Path, draw: Draw) -> None:
    place = pick(draw, PLACES)
    if path.parent.is_dir():
        place(gone(path))


def damage_bytes(path: Path, draw: Draw) -> str:
    path.write_bytes(damaged_bytes(path.read_bytes(), draw))
    return f"bytes of {path.name}"


def small_files(folder: Path) -> list[Path]:
    """Regular files with something in them, which the damages so far have left."""
    files = [path for path in below(folder) if path.is_file() and not path.is_symlink()]
    return [path for path in files if 0 < path.stat().st_size < 1 << 20]


def below(folder: Path) -> list[Path]:
    """Entries below a folder, links not followed, in an order that does not depend on the disk."""
    found: list[Path] = []
    waiting = [folder]
    while waiting:
        children = list(waiting.pop().iterdir())
        found += children
        waiting += [child for child in children if stat.S_ISDIR(child.lstat().st_mode)]
    return sorted(found)


def fingerprint(folder: Path) -> dict[str, tuple[Any, ...]]:
    """What every entry is, when it was written, and what is in it."""
    prints = {}
    for path in below(folder):
        about = path.lstat()
        content = ""
        if stat.S_ISLNK(about.st_mode):
            content = str(path.readlink())
        elif stat.S_ISREG(about.st_mode) and about.st_size <= WHOLE:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        dated = 0 if stat.S_ISDIR(about.st_mode) else about.st_mtime_ns
        prints[str(path.relative_to(folder))] = (about.st_mode, about.st_size, dated, content)
        if stat.S_ISDIR(about.st_mode):
            prints[str(path.relative_to(folder))] = (about.st_mode,)
    return prints


# --- what is demanded ---------------------------------------------------------------------------


def demand(condition: object, message: str) -> None:
    if not condition:
        raise Wrong(message)


@contextlib.contextmanager
def one_line(name: str, *errors: type[Exception]) -> Iterator[None]:
    """Nothing but these errors, in one line that names the input."""
    try:
        yield
    except errors as error:
        text = str(error)
        demand(
            len(text.splitlines()) == 1, f"{type(error).__name__} of several lines: {text[:300]!r}"
        )
        demand(len(text) < 2000, f"{type(error).__name__} of {len(text)} characters")
        demand(name in text, f"{type(error).__name__} does not name {name}: {text[:300]!r}")


def invoke(name: str, *arguments: str | Path) -> int:
    """The command line, in this process: its exit code."""
    from typer.testing import CliRunner

    from fp8lab.cli import app

    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    told = f"fp8lab {' '.join(map(repr, map(str, arguments)))}"[:300]
    error = result.exception
    if error is not None and not isinstance(error, SystemExit):
        raise error
    demand("Traceback" not in result.stdout + result.stderr, f"{told}: a traceback")
    demand(result.exit_code in (0, 1, 2), f"{told}: exit code {result.exit_code}")
    # `diagnose` and `replay` end with 2 where nothing was recorded to answer from, and say so.
    is_answer = arguments[:1] in (("diagnose",), ("replay",)) and bool(result.stdout)
    if result.exit_code == 2 and (result.stderr or arguments) and not is_answer:
        line = result.stderr
        demand(line.startswith("error: ") and line.count("\n") == 1, f"{told}: {line[:300]!r}")
        demand(len(line) < 2000, f"{told}: a line of {len(line)} characters")
        demand(name in line, f"{told}: does not name {name}: {line[:300]!r}")
    elif "run" not in arguments:
        demand(result.stderr == "", f"{told}: {result.stderr[:300]!r}")
    return int(result.exit_code)


class Kind(NamedTuple):
    """How an input is made from the valid ones, damaged, and used."""

    make: Callable[[Path, Path, Draw], None]
    damage: Callable[[Path, Draw], str]
    use: Callable[[Path, Draw], str | None]  # returns where something may have been replaced
    warm: Callable[[], None]


def attempt(
    kind: Kind, name: str, seed: int, base: Path, folder: Path, only: int | None
) -> list[str]:
    """One case; returns what was done to the input. Raises where a demand is not met."""
    start = zlib.crc32(name.encode())
    gone(folder).mkdir(parents=True)
    kind.make(base, folder, np.random.default_rng((start, seed, 0)))
    count = 1 + int(np.random.default_rng((start, seed, 1)).integers(DAMAGES))
    told = []
    faulthandler.dump_traceback_later(8 * SECONDS, exit=True)
    for index in range(count):
        if only in (None, index):
            try:
                told.append(kind.damage(folder, np.random.default_rng((start, seed, 2, index))))
            except (OSError, MemoryError, RecursionError) as error:
                told.append(f"no further damage ({type(error).__name__})")
    before = fingerprint(folder)
    os.chdir(folder)
    set_alarm(SECONDS)
    try:
        mine = kind.use(folder, np.random.default_rng((start, seed, 3)))
    except (Exception, Hang) as error:
        set_alarm(0)
        error.add_note("; ".join(told))
        raise
    finally:
        set_alarm(0)
        faulthandler.cancel_dump_traceback_later()
        os.chdir(base)
    after = fingerprint(folder)
    lost = [path for path, what in before.items() if after.get(path) != what]
    lost = [path for path in lost if not mine or not path.startswith(mine) or STRANGER in path]
    demand(not lost, f"overwritten or removed: {lost[:5]}")
    demand(not any(path.endswith(MARK) for path in after), "a pickle was executed")
    return told


def failure(kind: Kind, name: str, seed: int, base: Path, folder: Path, only: int | None) -> Any:
    """What is wrong with a case, None if nothing is; the fewest damages that show it."""
    try:
        attempt(kind, name, seed, base, folder, only)
    except (Exception, Hang) as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "fp8lab/" in f.filename]
        where = [f"{Path(f.filename).name}:{f.lineno}" for f in frames[-2:]]
        about = {
            "kind": name,
            "seed": seed,
            "error": f"{type(error).__name__}: {str(error)[:400]}",
            "where": where,
            "damage": getattr(error, "__notes__", [""])[-1][:600],
            "only": only,
        }
        for index in range(DAMAGES) if only is None else ():
            smaller = failure(kind, name, seed, base, folder, index)
            if (
                smaller is not None
                and smaller["error"].split(":")[0] == about["error"].split(":")[0]
            ):
                return smaller
        return about
    return None


def set_alarm(seconds: float) -> None:
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 6 * seconds)


def alarm(*_: object) -> None:
    raise Hang(f"more than {SECONDS:g} s")


def limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main(arguments: list[str]) -> None:
    from malformed_experiments import CONFIGURATION
    from malformed_files import CHECKPOINT, RECIPE, TEXT
    from malformed_runs import RUN, make_valid

    kinds = {"run": RUN, "recipe": RECIPE, "text": TEXT, "checkpoint": CHECKPOINT}
    kinds["configuration"] = CONFIGURATION
    base = Path(arguments[1 if arguments[0] == "make" else 0]).resolve()
    if arguments[0] == "make":
        make_valid(base)
        return
    name, first, count = arguments[1], int(arguments[2]), int(arguments[3])
    only = int(arguments[5]) if "--only" in arguments else None
    kind = kinds[name]
    faulthandler.enable()
    signal.signal(signal.SIGALRM, alarm)
    signal.signal(signal.SIGPROF, alarm)
    kind.warm()
    limit_memory()
    folder = base / f"case-{os.getpid()}"
    began = time.monotonic()
    slowest = (0.0, first)
    for seed in range(first, first + count):
        print(json.dumps({"at": seed}), flush=True)
        then = time.monotonic()
        wrong = failure(kind, name, seed, base, folder, only)
        slowest = max(slowest, (round(time.monotonic() - then, 2), seed))
        if wrong is not None:
            print(json.dumps(wrong), flush=True)
    gone(folder)
    print(
        json.dumps(
            {"done": count, "seconds": round(time.monotonic() - began, 1), "slowest": slowest}
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])
