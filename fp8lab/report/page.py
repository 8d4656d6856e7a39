"""The page: one template lays a document out as HTML.

Everything is text until the template escapes it; pictures travel as data URIs in `<img>`, where a
script in an SVG could not run even if there were one. No date is written: same runs, same bytes.
"""

from __future__ import annotations

import base64
from pathlib import Path

from fp8lab.report import drawing, tables
from fp8lab.report.blocks import Document, Picture
from fp8lab.report.verdict import in_words

TEMPLATE = Path(__file__).with_name("page.html.j2")


def render(document: Document) -> str:
    """The page as HTML; to be called under `drawing.style`."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        vars(document), in_words=in_words, number=tables.number, uri=_uri, width=_width
    )


def _uri(picture: Picture) -> str:
    svg = base64.b64encode(drawing.to_svg(picture.figure)).decode("ascii")
    return f"data:image/svg+xml;base64,{svg}"


def _width(picture: Picture) -> float:
    """In inches."""
    return picture.figure.get_figwidth()
