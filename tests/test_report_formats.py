"""One document, three writers, and a second document that compares: they say the same.

Markdown is read by markdown-it, HTML by the standard library's parser, JSON strictly; what they
show is held against the document's own blocks. Names are hostile wherever one can be, and come out
as the text that they are. Bands are held against the standard library's statistics.
"""

import json
import math
import os
import re
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from test_report import CURRENT, DELAYED, HIGH, record
from typer.testing import CliRunner, Result

import fp8lab
from fp8lab.cli import app
from fp8lab.comparison import band_of, curve_of, furthest_common, side_by_side
from fp8lab.record import Evidence, Finding
from fp8lab.report import (
    compared,
    drawing,
    pictures,
    report_data,
    write_comparison,
    write_pictures,
    write_report,
)
from fp8lab.report.blocks import (
    Document,
    Findings,
    Folded,
    Note,
    Picture,
    Points,
    Section,
)
from fp8lab.report.data import as_data
from fp8lab.report.markdown import code, escaped, render
from fp8lab.report.sections import document_of
from fp8lab.report.story import Arm, Part, Seen, Unread, load
from fp8lab.report.tables import Cell, Table, number
from fp8lab.report.verdict import Sighting, Verdict
from fp8lab.store import Run, RunWriter, open_run

SCRIPT = "<script>alert(1)</script>"
HOSTILE = [
    SCRIPT,
    "a|b",
    "a\\|b\\",
    "``` `x`",
    "[x](javascript:alert(1))",
    "![x](y)",
    "two\n\n# lines\r\n- here",
    "<!-- x --><b onclick=alert(1)>&lt;",
    "javascript&#58;alert(1) <http://x.y> http://x.y www.x.y",
    "*a* _b_ ~~c~~ $x_2^$ **",
    "- a",
    "1. a",
    "---",
    "===",
    "\t    code",
    "\x1b[31m\x00\u202eabc",
    "[x]: /url",
    "@all a@b.cc mailto:a@b.cc a/b#12 #12 gh-12 GH-12 :+1: :a_b::c:",
    "",
]
MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])


def invoke(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments])


def shown(text: str) -> str:
    """A text as a page may show it: on one line and printable."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


def write(path: Path, losses: dict[int, float], **info: Any) -> Run:
    """A run of nothing but losses, and of further numbers where a step has a pair."""
    writer = RunWriter.create(path, info)
    writer.append("steps", [{"step": step, "rank": 0, "loss": x} for step, x in losses.items()])
    writer.close()
    return open_run(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms in two seeds, one with a layer and a title that would be mark-up; a broken run."""
    folder = tmp_path_factory.mktemp("formats") / "runs"
    for arm, recipe in {"high": HIGH, "delayed": DELAYED}.items():
        for seed in (0, 1):
            record(
                folder / arm / str(seed),
                steps=36,
                recipe=recipe,
                name=SCRIPT,
                learning_rate=1.0 if arm == "delayed" else 0.05,
                config={
                    "experiment": "e",
                    "part": "p",
                    "arm": arm,
                    "seed": seed,
                    "mitigations": [],
                },
                result={"diverged_at": 35 if arm == "delayed" else None, "final_loss": 1.0 + seed},
            )
    (folder / "broken`run").mkdir()
    (folder / "broken`run" / "run.json").write_text("{")
    arms = [
        {"name": "high", "title": HOSTILE[4], "predicted": "survives"},
        {"name": "delayed", "title": "a|b " + SCRIPT, "predicted": "survives"},
    ]
    described = {
        "name": "e",
        "question": f"Is {SCRIPT} loud?",
        "prediction": "No | yes",
        "refuted_if": "`it` is",
        "limits": ["- <b>one</b>"],
        "parts": [{"name": "p", "title": "A *part*", "seeds": [0, 1, 2], "arms": arms}],
    }
    (folder / "experiment.json").write_text(json.dumps(described))
    return folder


@pytest.fixture(scope="module")
def document(runs: Path) -> Document:
    with drawing.style():
        return document_of(load([runs]))


@pytest.fixture(scope="module")
def page(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report([runs], tmp_path_factory.mktemp("markdown") / "new" / "my report.md")


# --- Markdown -------------------------------------------------------------------------------------


def inlines(markdown: str) -> Iterator[tuple[str, Token]]:
    """Every piece of text, and what it stands in."""
    tokens = MARKDOWN.parse(markdown)
    for before, token in pairwise(tokens):
        if token.type == "inline":
            yield before.type, token


def text_of(token: Token) -> str:
    """What a reader sees of it; of a picture, what is said instead of it."""
    children = token.children or []
    return "".join(
        text_of(one) if one.type == "image" else one.content
        for one in children
        if one.content != "<!-- -->" or one.type != "html_inline"
    )


def demand_text_only(markdown: str) -> None:
    """No mark-up but what the writer makes: nothing links, and HTML folds."""
    tokens = MARKDOWN.parse(markdown)
    tokens += [child for token in tokens for child in token.children or ()]
    made = {"heading", "paragraph", "table", "thead", "tbody", "tr", "th", "td"}
    made |= {"bullet_list", "list_item", "strong"}
    allowed = {f"{one}_{end}" for one in made for end in ("open", "close")}
    allowed |= {"inline", "text", "text_special", "html_block", "image", "code_inline", "softbreak"}
    allowed |= {"html_inline"}
    assert {token.type for token in tokens} <= allowed
    assert {token.content for token in tokens if token.type == "html_inline"} <= {"<!-- -->"}
    html = {token.content.strip() for token in tokens if token.type == "html_block"}
    assert html <= {
        "<details>\n<summary>",
        "<details open>\n<summary>",
        "</summary>",
        "</details>",
    }
    for token in tokens:
        if token.type == "image":
            assert re.fullmatch(r"[\w%.-]+\.png", str(token.attrs["src"]))


def tables_of(markdown: str) -> list[list[list[str]]]:
    found: list[list[list[str]]] = []
    tokens = MARKDOWN.parse(markdown)
    for before, token in pairwise(tokens):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and before.type in ("td_open", "th_open"):
            found[-1][-1].append(text_of(token))
    return found


def tables_in(document: Document) -> Iterator[list[list[str]]]:
    """Those that a page has to show, in its order: heading and cells."""

    def rows(table: Table) -> list[list[str]]:
        return [list(table.head), *([cell.text for cell in row] for row in table.rows)]

    yield from map(rows, document.predictions)
    for block in (block for section in document.sections for block in section.blocks):
        if isinstance(block, Table):
            yield rows(block)
        elif isinstance(block, Folded):
            yield from map(rows, block.blocks)
        elif isinstance(block, Findings):
            for one in block.found:
                if one.finding.evidence:
                    head = ["step", "quantity", "value", "threshold", "threshold from"]
                    yield [head, *(evidence_row(e) for e in one.finding.evidence)]


def evidence_row(one: Evidence) -> list[str]:
    told = (str(one.step), one.quantity, number(one.value), number(one.threshold))
    return [*told, one.source or "–"]


def test_the_tables_are_those_of_the_document(page: Path, document: Document) -> None:
    expected = [[[shown(cell) for cell in row] for row in rows] for rows in tables_in(document)]
    assert tables_of(page.read_text(encoding="utf-8")) == expected
    assert len(expected) >= 6


def test_the_words_are_those_of_the_document(page: Path, document: Document) -> None:
    told = [text_of(token) for _, token in inlines(page.read_text(encoding="utf-8"))]
    assert told[0] == f"fp8lab report · {document.title}"
    assert told[1] == f"Is {SCRIPT} loud?"
    assert any(HOSTILE[4] in one for one in told)
    blocks = [block for section in document.sections for block in section.blocks]
    words = [
        document.counts,
        document.unfinished,
        *(section.title for section in document.sections),
    ]
    words += [block.text for block in blocks if isinstance(block, Note)]
    words += [block.caption for block in blocks if isinstance(block, Picture)]
    words += [block.alt for block in blocks if isinstance(block, Picture)]
    words += [text for block in blocks if isinstance(block, Points) for text in block.texts]
    for one in words:
        assert shown(one) in told, one
    whole = "\n".join(told)
    assert f"broken`run: {document.unread[0].reason}" in whole
    for run in (s for block in blocks if isinstance(block, Findings) for s in block.found):
        summary = run.finding.summary
        assert shown(summary[0].upper() + summary[1:] + ".") in told
        assert run.finding.remedy[1:] in whole


def test_every_picture_lies_beside_the_page(page: Path, document: Document) -> None:
    text = page.read_text(encoding="utf-8")
    names = [f"my report-{name}.png" for name in document.pictures()]
    assert len(names) >= 4
    beside = sorted(one.name for one in page.parent.iterdir())
    assert beside == sorted([*names, "my report.md"])
    for name in names:
        assert (page.parent / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert f"](<{name.replace(' ', '%20')}>)" in text


def test_names_in_the_markdown_stay_text(page: Path) -> None:
    demand_text_only(page.read_text(encoding="utf-8"))


def of_names(name: str) -> Document:
    """A document in which everything that could be is called `name`."""
    finding = Finding(
        cause="stale",
        summary=f"x {name}",
        severity="high",
        confidence="low",
        site=name or "s",
        channel=1,
        since=0,
        evidence=(Evidence(step=1, site=name, quantity=name, value=math.nan, source=name),),
        remedy=name,
        cannot_exclude=name,
    )
    table = Table(title=name, head=("a", name), rows=[(Cell(name), Cell(f"{name} {name}"))])
    from matplotlib.figure import Figure

    part = Part(name=name, title=name, seeds=(), arms=())
    seen = Seen.__new__(Seen)
    seen.label, seen.steps, seen.result = name, {}, {}  # type: ignore[assignment]
    seen.diagnosis = fp8lab.Diagnosis(run=name, findings=(), loss_alarm=9)
    sighting = Sighting(part=part, arm=Arm(name=name, title=name), run=seen, finding=finding)
    verdict = Verdict(
        cause="Stale",
        severity="high",
        confidence="low",
        sites=(name, name),
        channels="channel 1",
        arms=(("run", name), ("2 of 2 runs of", name)),
        since=name,
        lead=name,
        remedy=name,
        cannot_exclude=name,
        milder=(("run", name),),
    )
    blocks = [
        table,
        Picture(name="p", figure=Figure(), alt=name, caption=name),
        Picture(name="p", figure=Figure(), alt=name, caption=name),
        Note(name),
        Points([name, name]),
        Findings(name, [sighting, sighting], True),
        Folded(name, [table]),
    ]
    return Document(
        title=name,
        headline=name,
        unfinished=name,
        unread=(Unread(name, name),),
        verdicts=[verdict],
        experiments=({"question": name, "prediction": name, "refuted_if": name},),
        not_judged=("",),
        against=[name],
        predictions=[table],
        sections=[Section("a", name, blocks)],  # type: ignore[arg-type]
    )


def demand_named(name: str) -> None:
    text, figures = render(of_names(name), "stem")
    assert list(figures) == ["stem-p.png", "stem-p-2.png"]
    demand_text_only(text)
    cells = [["a", shown(name)], [shown(name), shown(f"{name} {name}")]]
    head = ["step", "quantity", "value", "threshold", "threshold from"]
    evidence = [head, ["1", shown(name), "nan", "–", shown(name or "–")]]
    assert tables_of(text) == [cells, cells, evidence, evidence, cells]
    told = Counter(text_of(token) for _, token in inlines(text))
    if shown(name) and shown(name) not in ("1", "nan", "–"):
        # title, question, headline, … : every place where a name stands alone
        assert told[shown(name)] >= 12
    heads = [text_of(t) for kind, t in inlines(text) if kind == "heading_open"]
    assert heads.count(shown(name)) >= 2


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_text_wherever_it_stands(name: str) -> None:
    demand_named(name)


MARKS = st.sampled_from(
    [*"\\`*_[](){}<>&|~#$!+-=.:;/'\"01 \n\t\r\xa0@^%", "&lt;", "http://", "www."]
)


@settings(deadline=None, max_examples=60)
@given(st.one_of(st.lists(MARKS, max_size=12).map("".join), st.text(max_size=12)))
def test_any_name_is_text_wherever_it_stands(name: str) -> None:
    demand_named(name)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_code_span_shows_the_name(name: str) -> None:
    (token,) = [token for _, token in inlines(f"at {code(name)}.")]
    span = [child for child in token.children or () if child.type == "code_inline"]
    assert [one.content.strip() for one in span] == [shown(name)]


def test_addresses_are_not_made_links() -> None:
    """GitHub links what looks like an address; markdown-it alone does not."""
    assert escaped("http://a.b www.c.d") == r"http:\//a.b www\.c.d"


def test_nobody_is_called_and_nothing_referred_to() -> None:
    """GitHub looks through what was rendered, piece by piece; a comment ends a piece."""
    text = "@all a@b.cc mailto:a@b.cc a/b#12 #12 GH-12 :+1: :a_b::c: layers.0:product"
    (token,) = [token for _, token in inlines(escaped(text))]
    shown = ["\0" if one.type == "html_inline" else one.content for one in token.children or ()]
    assert "".join(shown).replace("\0", "") == text
    told = r"@[a-z0-9]|#\w|(?i:gh)-\d|:[\w+-]+:"
    assert re.findall(told, text) == [*"@a @b @b #1 #1 GH-1 :+1: :a_b: :c:".split()]
    assert re.findall(told, "".join(shown)) == []
    assert escaped("@") != escaped("@").replace("<!-- -->", "")
    assert "<!--" not in render(of_names("@a"), "stem")[0].partition("![")[2].partition("]")[0]


# --- HTML and SVG ---------------------------------------------------------------------------------


class Elements(HTMLParser):
    """Start tags with the names of their attributes, pictures, and the words between."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: Counter[tuple[str, ...]] = Counter()
        self.pictures: list[bytes] = []
        self.words: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[(tag, *sorted(name for name, _ in attrs))] += 1
        source = str(dict(attrs).get("src"))
        if tag == "img":
            self.pictures.append(unquote_to_bytes(source.removeprefix("data:image/svg+xml,")))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_a_name_adds_no_element_to_the_page(tmp_path: Path) -> None:
    """A run whose layer has a hostile name: its page has the elements that a plain name gives."""
    pages = {}
    for name in ("plain", SCRIPT + "--&amp;"):
        run = record(tmp_path / str(len(pages)) / "run", steps=20, recipe=DELAYED, name=name)
        pages[name] = Elements(write_report([run], tmp_path / f"{len(pages)}.html"))
    plain, hostile = pages.values()
    assert hostile.tags == plain.tags
    assert not any(name.startswith("on") for tag in hostile.tags for name in tag[1:])
    assert any(SCRIPT in word for word in hostile.words)
    assert len(hostile.pictures) == len(plain.pictures) >= 4
    tags = Counter(
        element.tag for svg in hostile.pictures for element in ElementTree.fromstring(svg).iter()
    )
    assert tags["{http://www.w3.org/2000/svg}path"] > 0
    assert not [tag for tag in tags if "script" in tag.lower() or "foreign" in tag.lower()]


@pytest.mark.long
def test_the_three_say_the_same(runs: Path, page: Path, tmp_path: Path) -> None:
    """Every cell, caption, note and summary of the data is on both pages."""
    data = json.loads(invoke("report", runs, "--json").stdout, parse_constant=pytest.fail)
    html = " ".join(" ".join(Elements(write_report([runs], tmp_path / "page.htm")).words).split())
    markdown = " ".join(text_of(token) for _, token in inlines(page.read_text(encoding="utf-8")))
    blocks = [block for section in data["sections"].values() for block in section["blocks"]]
    tables = [one for one in blocks if one["kind"] == "table"]
    tables += [one for block in blocks if block["kind"] == "folded" for one in block["blocks"]]
    words = [cell for table in tables for row in table["rows"] for cell in row]
    words += [table["note"] for table in tables] + [data["counts"], data["answer"]["because"]]
    words += [one["caption"] for one in blocks if one["kind"] == "picture"] + data["missing"]
    found = [one for block in blocks if block["kind"] == "findings" for one in block["found"]]
    words += [one["finding"]["summary"] for one in found]
    words += [e["quantity"] for one in found for e in one["finding"]["evidence"]]
    words += [data["unread"][0]["reason"], data["experiments"][0]["prediction"]]
    assert len(found) >= 2 and len(words) > 60
    for one in words:
        word = shown(one).casefold()[1:]  # a sentence begins with a capital
        assert word in html.casefold() and word in markdown.casefold(), one


# --- data -----------------------------------------------------------------------------------------


def test_the_data_are_the_document(runs: Path, document: Document) -> None:
    result = invoke("report", runs, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    data = json.loads(result.stdout, parse_constant=pytest.fail)
    assert list(data["sections"]) == [section.anchor for section in document.sections]
    assert (data["title"], data["headline"]) == (document.title, document.headline)
    assert data["unread"] == [{"label": "broken`run", "reason": document.unread[0].reason}]
    for section in document.sections:
        told = data["sections"][section.anchor]
        assert told["title"] == section.title
        assert [block["kind"] for block in told["blocks"]] == [b.kind for b in section.blocks]
    assert data["verdicts"][0]["cause"] == document.verdicts[0].cause
    (outcomes,) = [one for one in data["sections"]["outcomes"]["blocks"] if "seed 0" in one["head"]]
    assert outcomes["rows"][1] == ["a|b " + SCRIPT, "diverged at 35", "diverged at 35", "–"]
    finding = data["sections"]["findings"]["blocks"][-1]["found"][0]
    expected = fp8lab.diagnose(runs / finding["run"], runs / "high" / finding["run"][-1])
    assert finding["finding"] in [json.loads(json.dumps(f.to_dict())) for f in expected.findings]
    assert (finding["arm"], finding["part"]) == ("a|b " + SCRIPT, "A *part*")
    picture = data["sections"]["loss"]["blocks"][0]
    assert set(picture) == {"name", "alt", "caption", "kind"}
    notes = [b for s in document.sections for b in s.blocks if isinstance(b, Note) and b.missing]
    assert data["missing"] == [note.text for note in notes] and notes


def test_data_without_a_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{")
    data = report_data([tmp_path])
    assert data["unread"][0]["label"] == "run" and data["missing"]
    assert as_data(of_names("x"))["sections"]["a"]["blocks"][5]["found"][0]["run"] == "x"


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["report.txt", "report", "report.md.gz", ".md"])
@pytest.mark.parametrize("verb", ["report", "compare"])
def test_another_suffix_is_one_clear_error(
    runs: Path, tmp_path: Path, verb: str, name: str
) -> None:
    result = invoke(verb, runs, "-o", tmp_path / name)
    expected = f"{tmp_path / name}: expected a name that ends in .html, .htm or .md"
    assert (result.exit_code, result.stderr) == (2, f"error: {expected}\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["report", "compare"])
def test_a_page_is_either_printed_or_written(runs: Path, tmp_path: Path, verb: str) -> None:
    result = invoke(verb, runs, "--json", "-o", tmp_path / "page.md")
    assert result.exit_code == 2 and "expected one of them" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("small") / "run", steps=2, recipe=CURRENT)


@pytest.mark.parametrize("verb", ["report", "compare"])
def test_only_a_report_is_replaced(small: Path, tmp_path: Path, verb: str) -> None:
    page = tmp_path / "README.md"
    page.write_text("# Mine\n")
    result = invoke(verb, small, "-o", page)
    expected = f"error: {page}: exists and is no Markdown report, expected a new file\n"
    assert (result.exit_code, result.stderr) == (2, expected)
    assert [one.name for one in tmp_path.iterdir()] == ["README.md"]
    assert page.read_text() == "# Mine\n"
    for _ in range(2):  # one that is not there, then one that is
        result = invoke(verb, small, "-o", tmp_path / "new.md")
        assert (result.exit_code, result.stdout) == (0, f"report: {tmp_path / 'new.md'}\n")


def test_a_file_of_someone_else_is_no_page_for_a_caller_either(small: Path, tmp_path: Path) -> None:
    for name, what in {"README.md": "Markdown report", "mine.html": "HTML page"}.items():
        page = tmp_path / name
        page.write_text("# Mine\n")
        for written in (write_report, write_comparison):
            with pytest.raises(ValueError, match=f"exists and is no {what}, expected a new file"):
                written([small], page)
            assert page.read_text() == "# Mine\n"
    assert len(list(tmp_path.iterdir())) == 2


def test_pictures_for_a_readme_are_known_again(small: Path, tmp_path: Path) -> None:
    written = write_pictures([small], tmp_path)
    assert written == write_pictures([small], tmp_path) != []
    for picture in written:
        picture.rename(tmp_path / f"page-{picture.name}")
    write_report([small], tmp_path / "page.md")
    written[0].write_bytes(b"mine")
    with pytest.raises(ValueError, match="exists and is no picture of a report"):
        write_pictures([small], tmp_path)
    assert written[0].read_bytes() == b"mine"


@pytest.mark.parametrize("what", ["file", "picture", "folder"])
def test_a_picture_of_someone_else_is_not_replaced(small: Path, tmp_path: Path, what: str) -> None:
    picture = tmp_path / "page-losses.png"
    if what == "folder":
        picture.mkdir()
    else:
        content = b"\x89PNG\r\n\x1a\n" if what == "picture" else b"mine"
        picture.write_bytes(content)
    result = invoke("report", small, "-o", tmp_path / "page.md")
    expected = f"error: {picture}: exists and is no picture of a report\n"
    assert (result.exit_code, result.stderr) == (2, expected)
    assert [one.name for one in tmp_path.iterdir()] == ["page-losses.png"]
    assert what == "folder" or picture.read_bytes() == content


def test_the_page_is_whole_or_not_at_all(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up while the last file is written: the old page and its pictures stand."""
    page = write_report([small], tmp_path / "page.md")
    page.write_text("fp8lab report · old")
    (tmp_path / "page-losses.png").write_bytes(b"fp8lab report, old")
    before = {one.name: one.read_bytes() for one in tmp_path.iterdir()}
    write_bytes = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if ".md" in path.name:
            write_bytes(path, content[:100])
            raise OSError(28, "No space left on device", str(path))
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_report([small], page)
    assert {one.name: one.read_bytes() for one in tmp_path.iterdir()} == before


@pytest.mark.long
def test_same_runs_same_bytes(runs: Path, tmp_path: Path) -> None:
    """In another process, time zone, order of hashes and language."""
    code = (
        "import sys; from fp8lab.report import *\n"
        "from fp8lab.report import write_report, write_comparison\n"
        "for name in ('a.html', 'a.md'): write_report([sys.argv[1]], sys.argv[2] + name)\n"
        "for name in ('b.html', 'b.md'): write_comparison([sys.argv[1]], sys.argv[2] + name)\n"
    )
    written = []
    for seed, zone in (("1", "Asia/Tokyo"), ("77", "America/Los_Angeles")):
        folder = tmp_path / seed
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code, str(runs), f"{folder}/"],
            env=os.environ | {"PYTHONHASHSEED": seed, "TZ": zone, "MPLBACKEND": "agg"},
            cwd=Path(fp8lab.__file__).parents[1],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        written.append({one.name: one.read_bytes() for one in sorted(folder.iterdir())})
    assert written[0] == written[1]
    assert {"a.html", "a.md", "b.html", "b.md", "b-bands.png"} <= set(written[0])


# --- comparing ------------------------------------------------------------------------------------

LOSSES = [
    {0: 9.0, 1: 5.0, 2: 4.0, 3: 3.0},
    {0: 8.0, 1: 6.0, 2: 2.0, 3: 2.5},
    {0: 7.0, 1: 4.0},
    {0: 8.5, 1: 3.0, 2: math.nan},
    {0: 9.5, 1: 7.0, 2: 1.0, 3: 1.5},
]
LOST = {0: {"diverged_at": None}, 1: {"diverged_at": None}, 4: {"diverged_at": None}}


def five(folder: Path) -> list[Run]:
    """Three that ran to their end, one that was killed, one whose loss ended not finite."""
    return [
        write(folder / str(seed), losses, result=LOST.get(seed))
        for seed, losses in enumerate(LOSSES)
    ]


@pytest.mark.parametrize("count", [4, 5])
def test_a_band_is_the_median_and_the_range_of_the_runs(tmp_path: Path, count: int) -> None:
    band = band_of([curve_of(run, "step") for run in five(tmp_path)[:count]])
    assert band is not None and band.positions.tolist() == [0, 1, 2, 3]
    for step in range(4):
        # One that merely ended tells nothing more; one that was lost is worse than all others.
        there = [
            math.inf if seed == 3 and step > 1 else losses[step]
            for seed, losses in enumerate(LOSSES[:count])
            if step in losses or seed == 3
        ]
        assert band.middle[step] == statistics.median(there)
        ordered = sorted(there)
        if count < 5:
            assert (band.low[step], band.high[step]) == (ordered[0], ordered[-1])
        else:
            quarter = (len(ordered) - 1) / 4
            assert band.low[step] == ordered[math.floor(quarter)]
            assert band.high[step] == ordered[math.ceil(3 * quarter)]


def test_no_point_no_band(tmp_path: Path) -> None:
    empty, nan = write(tmp_path / "a", {}), write(tmp_path / "b", {0: math.nan})
    assert band_of([curve_of(empty, "step"), curve_of(nan, "step")]) is None
    assert band_of([]) is None


def test_tokens_are_those_that_the_run_says(tmp_path: Path) -> None:
    sizes = {"batch": 4, "context": 8}
    by_config = write(tmp_path / "a", {0: 3.0, 1: 2.0, 5: 1.0}, config=sizes)
    assert curve_of(by_config, "tokens").positions.tolist() == [32, 64, 192]
    assert curve_of(by_config, "step").positions.tolist() == [0, 1, 5]
    writer = RunWriter.create(tmp_path / "b", {"config": sizes})
    for step, tokens in enumerate((10.0, 30.0, 5.0)):
        row = {"step": step, "rank": 0, "loss": 1.0, "metrics": {"tokens": tokens}}
        writer.append("steps", [row, row | {"rank": 1, "loss": 7.0}])
    writer.close()
    by_metric = curve_of(open_run(tmp_path / "b"), "tokens")
    assert by_metric.positions.tolist() == [10, 40, 45] and set(by_metric.losses) == {1.0}


@pytest.mark.parametrize(
    "config", [{}, {"batch": 4}, {"batch": 4, "context": "8"}, {"batch": 0, "context": 8}]
)
@pytest.mark.parametrize("flags", [(), ("--json",), ("-o", "page.md")])
def test_a_run_that_does_not_say_its_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], flags: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "run", {0: 1.0}, config=config)
    result = invoke("compare", tmp_path / "run", "--by", "tokens", *flags)
    said = "says no tokens of a step, expected a number `tokens` at every step, or `batch` and "
    expected = f"error: {tmp_path / 'run'}: {said}`context` in its config\n"
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", expected)
    assert [one.name for one in tmp_path.iterdir()] == ["run"]


def test_arms_are_compared_where_all_of_them_are(tmp_path: Path) -> None:
    """At 64 tokens: the small batch at its step 3, the large one at its step 1."""
    told = {
        "small": (2, {0: 9.0, 1: 8.0, 2: 7.0, 3: 6.0, 4: 5.0}, None),
        "large": (4, {0: 9.5, 1: 4.0}, None),
        "lost": (2, {0: 9.0, 1: 99.0}, 1),
    }
    for arm, (batch, losses, diverged) in told.items():
        config = {"part": "p", "arm": arm, "batch": batch, "context": 8}
        write(tmp_path / arm, losses, config=config, result={"diverged_at": diverged})
    runs = [open_run(tmp_path / arm) for arm in told]
    found = {row["arm"]: row for row in side_by_side(runs, "small", "tokens")}
    assert {row["aligned_at"] for row in found.values()} == {64.0}
    assert [found[f"p/{arm}"]["aligned_loss"] for arm in told] == [6.0, 4.0, math.inf]
    found = {row["arm"]: row for row in side_by_side(runs, "small", "step")}
    assert [found[f"p/{arm}"]["aligned_loss"] for arm in told] == [8.0, 4.0, 99.0]
    assert "aligned_at" not in side_by_side(runs, "small")[0]
    rows = json.loads(invoke("compare", tmp_path, "--by", "tokens", "--json").stdout)
    assert list(rows[0])[3:6] == ["final_loss", "aligned_at", "aligned_loss"]
    assert furthest_common([]) is None
    assert furthest_common([[curve_of(runs[2], "step")]]) == 1.0


def test_the_page_compares(runs: Path, tmp_path: Path) -> None:
    (part,) = load([runs]).parts
    text = write_comparison([runs], tmp_path / "page.md", against="high").read_text("utf-8")
    demand_text_only(text)
    assert (tmp_path / "page-bands.png").exists()
    rows = side_by_side([run.run for run in part.runs], "high", "step")
    (told,) = [table for table in tables_of(text) if "aligned loss" in table[0]]
    assert told[0] == [name.replace("_", " ") for name in rows[0]]
    assert [row[0] for row in told[1:]] == [HOSTILE[4], "a|b " + SCRIPT]
    names = [name for name in rows[0] if name not in ("arm", "changes_function")]
    cells = [row[1 : 1 + len(names)] for row in told[1:]]
    assert cells == [[number(row[name]) for name in names] for row in rows]
    html = write_comparison([runs], tmp_path / "page.html", against="high")
    assert len(Elements(html).pictures) == 1


def test_the_bands_are_drawn_as_they_are(tmp_path: Path) -> None:
    for arm, seeds in {"high": (0, 1), "lost": (0, 3, 3), "short": (2, 4)}.items():
        for number_of, seed in enumerate(seeds):
            config = {"part": "p", "arm": arm, "seed": number_of}
            write(tmp_path / arm / str(number_of), LOSSES[seed], config=config)
    (part,) = load([tmp_path]).parts
    with drawing.style():
        figure = compared.bands(part, "step", "high")
        assert not isinstance(figure, str)
    told = [band_of([curve_of(run.run, "step") for run in arm.runs]) for arm in part.arms]
    top = pictures.LOST * max(band.middle[0] for band in told if band is not None)
    for axes, arm, band in zip(figure.axes, part.arms, told, strict=True):
        assert band is not None and len(axes.collections) == 1
        (own, *_) = [x for x in axes.lines if x.get_color() in (drawing.BLUE, drawing.RED)]
        assert own.get_color() == (drawing.RED if np.isinf(band.middle).any() else drawing.BLUE)
        there = np.isfinite(band.middle)
        assert list(own.get_xdata()) == list(band.positions[there])
        assert list(own.get_ydata()) == list(np.minimum(band.middle[there], top))
        references = [line for line in axes.lines if line.get_color() == drawing.INK]
        assert len(references) == (arm.name != "high")


def test_a_loss_that_was_not_recorded_last_is_not_lost(tmp_path: Path) -> None:
    """What is missing is no number that is none; a run says of itself no more than its rows."""
    found = {}
    for name, last in {"missing": {"grad_norm": 1.0}, "lost": {"loss": math.nan}}.items():
        writer = RunWriter.create(tmp_path / name, {})
        rows = [*({"loss": 3.0 - step} for step in range(2)), last]
        writer.append("steps", [{"step": i, "rank": 0} | row for i, row in enumerate(rows)])
        writer.close()
        run = open_run(tmp_path / name)
        (row,) = side_by_side([run], "high", "step")
        found[name] = curve_of(run, "step").lost, row["diverged"], row["aligned_loss"]
    assert found == {"missing": (False, 0, 2.0), "lost": (True, 1, 2.0)}


def test_the_arms_of_two_experiments_stay_apart(tmp_path: Path) -> None:
    for experiment, part, losses in (
        ("e", "p", (1.0, 1.5)),
        ("f", "p", (5.0, 7.0)),
        ("f", "q", ()),
    ):
        for arm, loss in zip(("high", "fp8"), losses or (2.0, 2.0), strict=True):
            names = {"experiment": experiment, "part": part, "arm": arm, "seed": 0}
            folder = tmp_path / experiment / part / arm
            write(folder, {0: loss}, config=names, result={"final_loss": loss})
    found = [open_run(folder) for folder in sorted(tmp_path.glob("*/*/*"))]
    rows = side_by_side(found, "high", "step")
    told = {row["arm"]: (row["runs"], row["final_loss"], row["loss_gap"]) for row in rows}
    assert told == {
        "e/p/fp8": (1, 1.5, 0.5),
        "e/p/high": (1, 1.0, 0.0),
        "f/p/fp8": (1, 7.0, 2.0),
        "f/p/high": (1, 5.0, 0.0),
        "q/fp8": (1, 2.0, 0.0),
        "q/high": (1, 2.0, 0.0),
    }
    story = load([tmp_path])
    assert [part.title for part in story.parts] == ["e: p", "f: p", "q"]
    text = write_comparison([tmp_path], tmp_path / "page.md", against="high").read_text("utf-8")
    (table,) = [one for one in tables_of(text) if "aligned loss" in one[0]]
    arms = [f"{part.title}: {arm.title}" for part in story.parts for arm in part.arms]
    assert sorted(row[0] for row in table[1:]) == sorted(arms)


def test_of_how_many_steps_it_knows_what_the_cast_did(tmp_path: Path) -> None:
    """The steps that were clipped are not among those recorded in full: saturated is 0 of these."""
    for name, every in (("a", 4), ("b", 1)):
        writer = RunWriter.create(tmp_path / name, {})
        at, full = {"rank": 0, "site": "m:product"}, {"count": 8, "saturated": 0.0}
        rows = [at | {"step": i, "staleness": 7.0 if i == 5 else 1.0} for i in range(10)]
        writer.append("steps", [{"step": i, "rank": 0, "loss": 1.0} for i in range(10)])
        writer.append("tensors", [r | (full if r["step"] % every == 0 else {}) for r in rows])
        writer.close()
    told = [json.loads(invoke("compare", tmp_path / n, "--json").stdout)[0] for n in "ab"]
    assert [(row["staleness"], row["saturated"]) for row in told] == [(7.0, 0.0)] * 2
    assert [row.get("in_full") for row in told] == ["3 of 10", None]
    both = side_by_side([open_run(tmp_path / name) for name in "ab"], "high")
    assert [row["in_full"] for row in both] == ["3 of 10", "10 of 10"]
    text = write_comparison([tmp_path], tmp_path / "page.md").read_text("utf-8")
    assert "recorded at a product, the last three of the steps recorded in full." in text


def test_a_step_is_in_full_if_each_product_is_whether_cast_or_not(tmp_path: Path) -> None:
    """In BF16 nothing is saturated; of a model of which one layer is selected the rest is not."""
    both = [{"rank": 0, "site": f"{layer}:product"} for layer in "mn"]
    for name, cast in (("bf16", {}), ("fp8", {"saturated": 0.0}), ("one", {"saturated": 0.0})):
        for every in (1, 4):
            writer = RunWriter.create(tmp_path / f"{name}-{every}", {})
            full = {"count": 8, **cast}
            for step in range(10):
                told = [step % every == 0 or (name == "one" and at is both[0]) for at in both]
                rows = [
                    at | {"step": step} | (full if is_full else {})
                    for at, is_full in zip(both, told, strict=True)
                ]
                writer.append("tensors", rows)
            writer.close()
    names = ("bf16", "fp8", "one")
    often, seldom = ([open_run(tmp_path / f"{name}-{n}") for name in names] for n in (1, 4))
    assert ["in_full" in row for row in side_by_side(often, "high")] == [False] * 3
    assert [row["in_full"] for row in side_by_side(seldom, "high")] == ["3 of 10"] * 3


def test_every_run_of_a_seed_counts(tmp_path: Path) -> None:
    for name, (arm, loss) in {"a": ("x", 1.0), "b": ("x", 5.0), "c": ("high", 2.0)}.items():
        config = {"part": "p", "arm": arm, "seed": 0}
        write(tmp_path / name, {0: loss}, config=config, result={"final_loss": loss})
    rows = side_by_side([open_run(tmp_path / name) for name in "abc"], "high")
    told = [(row["runs"], row["final_loss"], row["loss_gap"]) for row in rows]
    assert told == [(2, 3.0, 1.0), (1, 2.0, 0.0)]


def test_a_negative_loss_is_drawn_as_it_is(tmp_path: Path) -> None:
    """There is no multiple of where it started, and a log axis has no place for it."""
    for arm, start in {"high": -1.0, "lost": -3.0}.items():
        losses = {step: start - step / 50 for step in range(100)}
        lost = {100: math.nan} if arm == "lost" else {}
        write(tmp_path / arm, losses | lost, config={"part": "p", "arm": arm, "seed": 0})
    (part,) = load([tmp_path]).parts
    with drawing.style():
        figure = compared.bands(part, "step", "high")
        assert not isinstance(figure, str)
    low, high = figure.axes[0].get_ylim()
    assert figure.axes[0].get_yscale() == "linear" and low < -4.98 < -1.0 < high < 0.0
    for axes, arm in zip(figure.axes, part.arms, strict=True):
        (own, *_) = [x for x in axes.lines if x.get_color() in (drawing.BLUE, drawing.RED)]
        assert list(own.get_ydata()) == list(curve_of(arm.runs[0].run, "step").losses)
    with drawing.style():
        of_twins = pictures.twin(part.arms[0].runs[0], part.arms[1].runs[0], "m", None)
        assert not isinstance(of_twins, str)
    assert [min(line.get_ydata()) for line in of_twins.axes[0].lines] == [-4.98, -2.98]
