"""The page: one template lays a document out as HTML.

Everything is text until the template escapes it; pictures travel as data URIs in `<img>`, where a
script in an SVG could not run even if there were one. No date is written: same runs, same bytes.

Charts come with the page: their data, plotly's own script as its package ships it (read and not
imported), `drawing.js` and `page.js`. The first two are gzip in base64, which the browser unpacks:
2 MB for plotly's 5, and the page's words are there before the script is. A Content-Security-Policy
in the file forbids whatever could reach the network. Rejected: a CDN, without which the page would
be empty on a train; charts alone, which nobody could print; and pictures that are unpacked, which
nobody could see without scripts.
"""

from __future__ import annotations

import base64
import gzip
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fp8lab.report import drawing, tables
from fp8lab.report.blocks import Document, Picture
from fp8lab.report.verdict import in_words

TEMPLATE = Path(__file__).with_name("page.html.j2")
URI_SAFE = ' "!$()*+,-./:;=?@_~'
SCRIPTS = [Path(__file__).with_name(name) for name in ("drawing.js", "page.js")]


def render(document: Document, charts: Mapping[str, Any] | None = None) -> str:
    """The page as HTML; to be called under `drawing.style`.

    `charts` is what `interactive.payload` picked; without any, no script is in the page.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        vars(document),
        nothing_found=document.nothing_found,
        is_part=document.is_part,
        in_words=in_words,
        number=tables.number,
        uri=_uri,
        width=_width,
        data=_packed(json.dumps(charts, allow_nan=False, separators=(",", ":"))) if charts else "",
        library=_packed(plotly_script()) if charts else "",
        scripts=[file.read_text(encoding="utf-8") for file in SCRIPTS] if charts else [],
    )


def _packed(text: str) -> str:
    """What page.js unpacks; of no name is anything left that could end an element."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode("ascii")


def plotly_script() -> str:
    """Plotly's script from the installed package, which is found without importing it.

    Raises ModuleNotFoundError if it is not installed.
    """
    found = importlib.util.find_spec("plotly")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("plotly: not installed, expected it beside fp8lab")
    file = Path(found.submodule_search_locations[0]) / "package_data" / "plotly.min.js"
    return file.read_text(encoding="utf-8")


def _uri(picture: Picture) -> str:
    """For an attribute between single quotes, as they and all of <>&#% are escaped; a third shorter
    than base64. Nothing but the kind of white space changes, which has no meaning in an SVG."""
    svg = b" ".join(drawing.to_svg(picture.figure).split())
    return f"data:image/svg+xml,{quote(svg, safe=URI_SAFE)}"


def _width(picture: Picture) -> float:
    """In inches."""
    return picture.figure.get_figwidth()
