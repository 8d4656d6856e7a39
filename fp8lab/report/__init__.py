"""Reports: recorded runs in, one page out: HTML, Markdown with its pictures beside it, or data.

An HTML page is one file: no network, pictures inline. The numbers are those of the rows, of
run.json and of the findings; a report picks, groups and draws them and computes no statistic of its
own. So it opens on a laptop without torch, and a number that looks wrong is wrong in the run.

    story     runs read, judged and put beside what was predicted; which rows to show
    verdict   the sentences
    tables    the tables
    pictures  the pictures; drawing is how they look
    sections  all of it in order, as a document of blocks
    compared  another document: arms and seeds beside each other
    page      a document as HTML, laid out by page.html.j2, with the charts of interactive
    markdown  a document as Markdown
    data      a document as data

Importing this is cheap: pandas, matplotlib and seaborn load when a report is written. Rejected: a
page that draws in the browser alone. It could not be printed, diffed or trusted to look the same in
ten years.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fp8lab.report.blocks import Document
    from fp8lab.report.story import Story

PAGES = ((b"<!doctype html", b"<html"), (b"fp8lab report",))  # how they begin: HTML, Markdown


def write_report(
    runs: Iterable[str | Path], path: str | Path, *, twin: str | Path | None = None
) -> Path:
    """Write a page about `runs` to `path`, which appears whole or not at all.

    `path` ends in .html or .htm, or in .md: then the pictures lie beside it as PNG, named as the
    page and the picture. `runs` are run directories, or folders of them, which may have an
    experiment.json at their top; `twin` is the same training in high precision, where no experiment
    says which that is. The same runs and the same versions of the libraries give the same bytes.
    Returns `path`.

    Raises RunError if one of `runs` holds neither a run nor an experiment, TypeError if `runs` is a
    single path, ValueError for another suffix or if the page or a picture would replace a file that
    is none of a report's, OSError if a file cannot be written. A run that is damaged, killed or
    still being written is no error: the page says so.
    """
    from fp8lab.report.interactive import payload
    from fp8lab.report.sections import document_of

    return _write(runs, Path(path), document_of, payload, twin)


def write_comparison(
    runs: Iterable[str | Path],
    path: str | Path,
    *,
    by: Literal["step", "tokens"] = "step",
    against: str = "bf16",
) -> Path:
    """Write a page that lays the arms of `runs` beside each other: losses as bands over their
    seeds, and one table. Raises as `write_report` does, and ValueError where losses are to be
    aligned by tokens and a run does not say how many a step has."""
    from fp8lab.report.compared import document_of

    return _write(runs, Path(path), lambda story: document_of(story, by, against), lambda _: {})


def report_data(runs: Iterable[str | Path], *, twin: str | Path | None = None) -> dict[str, Any]:
    """What the page about `runs` says, as data without pictures, see `data.as_data`; numbers may be
    NaN. Raises as `write_report` does."""
    from fp8lab.report.data import as_data
    from fp8lab.report.drawing import style
    from fp8lab.report.sections import document_of
    from fp8lab.report.story import load

    with style():
        return as_data(document_of(load(runs, twin)))


def write_pictures(runs: Iterable[str | Path], folder: str | Path) -> list[Path]:
    """Write the two main pictures as PNG into `folder`: `losses.png`, `timeline.png`.

    Returns the files written; one that cannot be drawn is left out. Raises as `write_report` does.
    """
    from fp8lab.report.drawing import style
    from fp8lab.report.sections import document_of
    from fp8lab.report.story import load

    folder = Path(folder)
    with style():
        document = document_of(load(runs))
        drawn = document.pictures()
        main = [name for name in ("losses", "timeline") if name in drawn]
        files = _as_png({folder / f"{name}.png": drawn[name].figure for name in main})
    _replace(files)
    return list(files)


def demand_replaceable(page: Path) -> None:
    """That there is nothing yet, or a page: not a run's file, not /dev/null. Raises ValueError."""
    if not page.exists() or page.is_dir():
        return
    is_page = False
    if page.is_file():
        with page.open("rb") as opened:
            beginning = opened.read(64).lstrip().lower()
        is_page = not beginning or beginning.startswith(PAGES[page.suffix.lower() == ".md"])
    if not is_page:
        what = "Markdown report" if page.suffix.lower() == ".md" else "HTML page"
        raise ValueError(f"{page}: exists and is no {what}, expected a new file")


def _write(
    runs: Iterable[str | Path],
    path: Path,
    document_of: Callable[[Story], Document],
    charts_of: Callable[[Story], Mapping[str, Any]],
    twin: str | Path | None = None,
) -> Path:
    from fp8lab.report.drawing import style
    from fp8lab.report.page import render
    from fp8lab.report.story import load

    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    suffix = path.suffix.lower()
    if suffix not in (".html", ".htm", ".md"):
        raise ValueError(f"{path}: expected a name that ends in .html, .htm or .md")
    demand_replaceable(path)
    story = load(runs, twin)
    with style():
        document = document_of(story)
        if suffix == ".md":
            files = _as_markdown(document, path)
        else:
            files = {path: _encoded(render(document, charts_of(story)))}
    _replace(files)
    return path


def _as_markdown(document: Document, path: Path) -> dict[Path, bytes]:
    """What is to be written; the page last, so that it never shows a picture that is not there."""
    from fp8lab.report.markdown import render

    text, figures = render(document, path.stem)
    files = _as_png({path.with_name(name): figure for name, figure in figures.items()})
    return files | {path: _encoded(text)}


def _as_png(figures: Mapping[Path, Figure]) -> dict[Path, bytes]:
    from fp8lab.report.drawing import to_png

    for path in figures:
        if not _may_replace(path):
            raise ValueError(f"{path}: exists and is no picture of a report")
    return {path: to_png(figure) for path, figure in figures.items()}


def _encoded(text: str) -> bytes:
    """A name may come from a file system that knows no encoding."""
    return text.encode("utf-8", errors="backslashreplace")


def _may_replace(picture: Path) -> bool:
    from fp8lab.report.drawing import MARK

    if not picture.exists():
        return True
    if not picture.is_file():
        return False
    with picture.open("rb") as opened:
        return MARK.encode() in opened.read(256)


def _replace(files: dict[Path, bytes]) -> None:
    """All files are on the disk before the first takes its place."""
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}") for path in files}
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary[path].write_bytes(content)
        for path, written in temporary.items():
            written.replace(path)
    finally:
        for written in temporary.values():
            written.unlink(missing_ok=True)
