"""Reports: recorded runs in, one offline HTML file out.

Everything is in the file: no network, no script, pictures inline. The numbers are those of the
rows, of run.json and of the findings; a report picks, groups and draws them and computes no
statistic of its own. So it opens on a laptop without torch, and a number that looks wrong is wrong
in the run.

    story     runs read, judged and put beside what was predicted; which rows to show
    verdict   the sentences
    tables    the tables
    pictures  the pictures; drawing is how they look
    sections  all of it in order, as a document of blocks
    page      a document as HTML, laid out by page.html.j2

Importing this is cheap: pandas, matplotlib and seaborn load when a report is written. Rejected: a
page that draws in the browser. It would need a megabyte of script, and could not be printed, diffed
or trusted to look the same in ten years.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def write_report(runs: Iterable[str | Path], path: str | Path) -> Path:
    """Write one HTML page about `runs` to `path`, which appears whole or not at all.

    `runs` are run directories, or folders of them, which may have an experiment.json at their top.
    The same runs and the same versions of the libraries give the same bytes. Returns `path`.

    Raises RunError if one of `runs` holds neither a run nor an experiment, TypeError if `runs` is a
    single path, OSError if `path` cannot be written. A run that is damaged, killed or still being
    written is no error: the page says so.
    """
    from fp8lab.report.drawing import style
    from fp8lab.report.page import render
    from fp8lab.report.sections import document_of
    from fp8lab.report.story import load

    path = Path(path)
    with style():
        text = render(document_of(load(runs)))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_pictures(runs: Iterable[str | Path], folder: str | Path) -> list[Path]:
    """Write the two main pictures as PNG into `folder`: `losses.png`, `timeline.png`.

    Returns the files written; one that cannot be drawn is left out. Raises as `write_report` does.
    """
    from fp8lab.report.drawing import style, to_png
    from fp8lab.report.sections import document_of
    from fp8lab.report.story import load

    folder = Path(folder)
    with style():
        document = document_of(load(runs))
        drawn = document.pictures()
        folder.mkdir(parents=True, exist_ok=True)
        main = [name for name in ("losses", "timeline") if name in drawn]
        return [to_png(drawn[name].figure, folder / f"{name}.png") for name in main]
