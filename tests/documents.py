"""The pages of docs/, run as their readers would run them, and written anew with what was printed.

A page is a story in one fresh folder, told in order by its fenced blocks:

    python, yaml    a file; the first line is a comment with its name: `# train.py`
    sh              typed into bash, with `python` and `fp8lab` those of this checkout
    text            what the `sh` block right before it wrote to standard output
    text varying    the same, where digits depend on the machine: they are not compared
    sh on a GPU     typed likewise, but Transformer Engine's extension is the tests' stand-in
    sh torchtitan   typed likewise, but torchtitan is the tests' stand-in

Nothing else is allowed, and a file that no `sh` block names and no file imports is refused: what a
page shows is run. A command may end with 0, with 1, which is `diagnose` having found something, or
with 2 where that is an answer and no error: anything else, and a traceback, is a failure. Nothing
is downloaded: Hugging Face's libraries are told to stay offline.

`python tests/documents.py` writes all pages anew, or those that it is given: docs/cli.md is read
from the command line's own declarations and docs/gallery.md from reports/, which takes two seconds.
tests/test_docs.py asks that this changes no byte. An output whose digits alone would differ is left
as it stands.

Cost: a minute, most of it imports of libraries. Rejected: pages as notebooks, whose diffs nobody
reads, and doctest, whose prompts nobody can copy.
"""

from __future__ import annotations

import html
import inspect
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

from fp8lab import cli
from fp8lab.cli import app

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
GENERATED = ("cli.md", "gallery.md")
BLOCK = re.compile(r"^```(\w+)(?: ([^\n]+))?\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"[-+]?\d[\d,.]*(e[-+]?\d+)?(?![A-Za-z])")
LANGUAGES = ("python", "yaml", "sh", "text")
STAND_INS = {
    "on a GPU": "import transformer_engine_stand_in as it, torch; it.install(); "
    "torch.set_default_device = lambda device: None",
    "torchtitan": "import torchtitan_stand_in as it; it.install()",
}


def pages() -> list[Path]:
    """The pages that are run."""
    return [page for page in sorted(DOCS.glob("*.md")) if page.name not in GENERATED]


def renewed(text: str, folder: Path) -> str:
    """A page's text with the output that its commands have now, run in the empty `folder`.

    Raises ValueError for a block that is not as the module says, or a command that fails.
    """
    parts, end, printed = [], 0, None
    used = "\n".join(block[3] for block in BLOCK.finditer(text) if block[1] == "sh")
    used += "".join(re.findall(r"^(?:from|import) .*$", text, flags=re.MULTILINE))
    work = folder / "work"
    work.mkdir()
    for block in BLOCK.finditer(text):
        language, how, body = block[1], block[2], block[3]
        between = text[end : block.start()]
        parts.append(between)
        end = block.end()
        if language not in LANGUAGES:
            raise ValueError(f"block {language!r}, expected one of {', '.join(LANGUAGES)}")
        if language == "text":
            if printed is None or between.strip():
                raise ValueError(f"text that no sh block right before it printed: {body[:60]!r}")
            told = (
                printed
                if how is None or _without_digits(printed) != _without_digits(body)
                else body
            )
            parts.append(f"```text{'' if how is None else f' {how}'}\n{told}```")
            printed = None
            continue
        printed = None
        if language == "sh":
            printed = _typed(body, work, how)
        else:
            _write(body, work, used)
        parts.append(block[0])
    return "".join([*parts, text[end:]])


def _without_digits(text: str) -> str:
    """What is left of an output where numbers, and so the widths of columns, do not count."""
    return re.sub(r"[\s─━]+", " ", NUMBER.sub("#", text)).strip()


def _write(body: str, work: Path, used: str) -> None:
    name = re.match(r"# (\S+\.\w+)\n", body)
    if name is None:
        raise ValueError(f"a file without its name in its first line: {body[:60]!r}")
    if Path(name[1]).stem not in used:
        raise ValueError(f"{name[1]}: no sh block uses it, and no file that does")
    (work / name[1]).write_text(body, encoding="utf-8")


def _typed(body: str, work: Path, how: str | None) -> str:
    """Standard output of commands, run one after the other as far as they are fine."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("NVTE_", "PYTEST"))
    }
    programs = work.parent / "bin"
    programs.mkdir(exist_ok=True)
    # Of this checkout, wherever what is installed comes from.
    for name, call in (("python", ""), ("fp8lab", " -c 'from fp8lab.cli import app; app()'")):
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}"{call} "$@"\n', encoding="utf-8")
        program.chmod(0o755)
    places = [str(ROOT)]
    if how is not None:
        (programs / "sitecustomize.py").write_text(STAND_INS[how], encoding="utf-8")
        places += [str(programs), str(ROOT / "tests")]
    environment |= {
        "PATH": os.pathsep.join([str(programs), environment["PATH"]]),
        "PYTHONPATH": os.pathsep.join(places),
        "COLUMNS": "120",
        "NO_COLOR": "1",
        "OMP_NUM_THREADS": "1",
        # Sums in one order on every x86: a training near its edge tips over at another step else.
        "MKL_CBWR": "COMPATIBLE",
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "HF_HUB_OFFLINE": "1",
        "NVTE_PROJECT_BUILDING": "1",  # do not look for the compiled libraries
        "NVTE_TORCH_COMPILE": "0",
    }
    script = f"trap 'code=$?; [ $code -eq 1 ] || exit $code' ERR\n{body}"
    ended = subprocess.run(
        ["bash", "-c", script], cwd=work, env=environment, capture_output=True, text=True
    )
    is_answer = ended.returncode == 2 and ended.stdout and not ended.stderr
    if not (is_answer or ended.returncode in (0, 1)) or "Traceback" in ended.stderr:
        raise ValueError(f"exit code {ended.returncode}: {body}{ended.stderr}")
    return "".join(f"{line.rstrip()}\n" for line in ended.stdout.strip("\n").splitlines())


# --- what is read from the repository ------------------------------------------------------------


def cli_reference() -> str:
    """docs/cli.md, from the functions behind the commands: their signatures and docstrings."""
    lines = ["# The command line", "", "Written by `python tests/documents.py` from the code.", ""]
    lines += [f"{app.info.help}", "", " ".join(cli.__doc__.split("\n\n")[1].split())]
    for command in sorted(app.registered_commands, key=_name):
        lines += ["", f"## {_name(command)}", "", *_of_command(command)]
    return "\n".join([*lines, ""])


def _name(command: Any) -> str:
    return command.name or command.callback.__name__


def _of_command(command: Any) -> Iterator[str]:
    parameters = inspect.signature(command.callback, eval_str=True).parameters.values()
    told = [(one, *get_args(one.annotation)) for one in parameters]
    arguments = [one for one in told if type(one[2]).__name__ == "ArgumentInfo"]
    options = [one for one in told if type(one[2]).__name__ == "OptionInfo"]
    words = [_value(*one) if _needed(*one) else f"[{_value(*one)}]" for one in arguments]
    words += [_spelled(*one) for one in options if _needed(*one)]
    yield f"`fp8lab {' '.join([_name(command), *words, '[OPTIONS]'])}`".replace("` `", " ")
    for paragraph in command.callback.__doc__.split("\n\n"):
        yield f"\n{' '.join(paragraph.split())}"
    yield "\n| | | default |\n|---|---|---|"
    for one in arguments:
        yield f"| `{_value(*one)}` | {one[2].help} | {_default(*one)} |"
    for one in options:
        yield f"| `{_spelled(*one)}` | {one[2].help} | {_default(*one)} |"


def _needed(one: inspect.Parameter, kind: Any, said: Any) -> bool:
    return one.default is one.empty


def _value(one: inspect.Parameter, kind: Any, said: Any) -> str:
    """What stands for a parameter's value; of several as many as one likes."""
    names = {Path: "PATH", int: "INTEGER", float: "FLOAT", str: "TEXT"}
    inner = next(of for of in (*get_args(kind), kind) if of is not NoneType)
    is_list = list in (get_origin(kind), get_origin(inner))
    inner = next(iter(get_args(inner)), inner)
    choices = "\\|".join(inner) if issubclass(inner, Enum) else names.get(inner)
    word = said.metavar or choices
    return f"{word}…" if is_list and type(said).__name__ == "ArgumentInfo" else word


def _spelled(one: inspect.Parameter, kind: Any, said: Any) -> str:
    # What stands first in `typer.Option(...)` arrives as its default.
    first = [said.default] if str(said.default).startswith("-") else []
    long = f"--{one.name.replace('_', '-')}"
    names = [*first, *(said.param_decls or ())]
    names = names or [long, f"--no-{long[2:]}"] if kind is bool else names or [long]
    return ", ".join(names) + ("" if kind is bool else f" {_value(one, kind, said)}")


def _default(one: inspect.Parameter, kind: Any, said: Any) -> str:
    if _needed(one, kind, said):
        return "required"
    return "" if one.default in (None, False) else f"`{one.default}`"


def gallery() -> str:
    """docs/gallery.md: of every committed report its first line and its first picture."""
    lines = [
        "# Gallery",
        "",
        "What the repository really produced: every page in `reports/`, each with what it says in",
        "its first line. Written by `python tests/documents.py`.",
    ]
    reports = ROOT / "reports"
    for page in sorted(reports.glob("*.md")) + sorted(reports.glob("*.html")):
        text = page.read_text(encoding="utf-8")
        title, line = _told_of(text) if page.suffix == ".md" else _told_of_html(text)
        of_it = sorted(path.name for path in reports.glob(f"{page.stem}*.png"))
        # A page that has several shows the most telling one first.
        pictures = re.findall(r"!\[.*?\]\(<?([^)>]+)>?\)", text) if page.suffix == ".md" else []
        shown = next(iter([*pictures, *of_it]), None)
        lines += ["", f"## [{title}](../reports/{page.name})", "", line]
        if shown is not None:
            lines += ["", f"![A picture of {title}](../reports/{shown})"]
    return "\n".join([*lines, ""])


def _told_of(text: str) -> tuple[str, str]:
    """An experiment's name, question and verdict; another page's title and first sentence."""
    heading, _, rest = text.partition("\n")
    title, _, verdict = heading.removeprefix("# ").partition(": ")
    paragraphs = [part.strip() for part in rest.strip().split("\n\n")]
    if verdict:
        return title, f"{paragraphs[0]} {verdict[0].upper()}{verdict[1:]}"
    told = re.sub(r"^Written by [^.]*\.\s*", "", " ".join(" ".join(paragraphs).split()))
    return title, re.split(r"(?<=\.)\s", told)[0]


def _told_of_html(text: str) -> tuple[str, str]:
    """A report's name, the question in its heading and the paragraph below it."""
    of = r"<title>(.*?)</title>.*<h1[^>]*>(.*?)</h1>.*?<p class=\"(?:lead|headline)\">(.*?)</p>"
    found = re.search(of, text, flags=re.DOTALL)
    if found is None:
        raise ValueError("a report without a title, a heading or a paragraph below it")
    parts = [
        html.unescape(" ".join(re.sub(r"<[^>]+>", "", part).split())) for part in found.groups()
    ]
    return parts[0].removeprefix("fp8lab report: "), f"**{parts[1]}** {parts[2]}"


def main(names: list[str]) -> None:
    """Write the pages named anew, or all."""
    written = {"cli.md": cli_reference, "gallery.md": gallery}
    for page in [DOCS / name for name in names] or [*pages(), *(DOCS / name for name in written)]:
        print(page.relative_to(ROOT), flush=True)
        if page.name in written:
            text = written[page.name]()
        else:
            with tempfile.TemporaryDirectory() as folder:
                text = renewed(page.read_text(encoding="utf-8"), Path(folder))
        page.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
