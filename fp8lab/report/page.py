"""The page: one template lays a document out as HTML.

Everything is text until the template escapes it; pictures travel as data URIs in `<img>`, where a
script in an SVG could not run even if there were one. No date is written: same runs, same bytes.

Charts come with the page: their data, plotly's own script as its package ships it (5 MB, read and
not imported), `drawing.js` and `page.js`. A Content-Security-Policy in the file forbids whatever
could reach the network. Rejected: a CDN, without which the page would be empty on a train; and
charts alone, which nobody could print.
"""

from __future__ import annotations

import base64
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fp8lab.report import drawing, tables
from fp8lab.report.blocks import Document, Picture
from fp8lab.report.verdict import in_words

TEMPLATE = Path(__file__).with_name("page.html.j2")
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
        in_words=in_words,
        number=tables.number,
        uri=_uri,
        width=_width,
        data=as_json(charts) if charts else "",
        scripts=_scripts() if charts else [],
    )


def as_json(charts: Mapping[str, Any]) -> str:
    """JSON in which no name can end the element that holds it."""
    text = json.dumps(charts, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _scripts() -> list[str]:
    return [plotly_script(), *(file.read_text(encoding="utf-8") for file in SCRIPTS)]


def plotly_script() -> str:
    """Plotly's script from the installed package, which is found without importing it.

    Raises ModuleNotFoundError if it is not installed.
    """
    found = importlib.util.find_spec("plotly")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("plotly: not installed, expected it beside fp8lab")
    file = Path(found.submodule_search_locations[0]) / "package_data" / "plotly.min.js"
    return file.read_text(encoding="utf-8").replace("</script", "<\\/script")


def _uri(picture: Picture) -> str:
    svg = base64.b64encode(drawing.to_svg(picture.figure)).decode("ascii")
    return f"data:image/svg+xml;base64,{svg}"


def _width(picture: Picture) -> float:
    """In inches."""
    return picture.figure.get_figwidth()
