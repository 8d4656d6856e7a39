"""The document as Markdown, as an issue tracker shows it, with its pictures as PNG beside it.

GitHub's flavour: tables, and `<details>` for what the page folds away. Everything that comes from a
run is text: each character that could begin mark-up is escaped with a backslash, what would start a
new line or move the cursor is replaced, and the HTML that is here holds no text at all. So a layer
may be called `<script>`, `|` or `[x](javascript:…)`, and that is what a reader sees.

The alternative, a code span around every name, would need to know where in a sentence a name is;
sites, which stand alone, are in one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING
from urllib.parse import quote

from fp8lab.report.answer import QUESTION, Answer
from fp8lab.report.blocks import Block, Document, Findings, Folded, Note, Picture, Points
from fp8lab.report.tables import Table, number
from fp8lab.report.verdict import Sighting, Verdict, in_words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEGINNING = "fp8lab report · "
"""How every page begins: by it a page is known again."""


def render(document: Document, stem: str) -> tuple[str, dict[str, Figure]]:
    """The page, and the figures by the names of the files that it shows.

    These are `stem`-picture.png; of several pictures with one name the second is -2, and so on.
    """
    figures: dict[str, Figure] = {}
    blocks = [*_head(document), *_predictions(document)]
    for section in document.sections:
        blocks.append(f"## {escaped(section.title)}")
        for block in section.blocks:
            blocks += _shown(block, figures, stem)
    return "\n\n".join(blocks) + "\n", figures


def escaped(text: str) -> str:
    """Any text as Markdown that shows it, on one line, in a sentence, a heading or a table."""
    # What names a user, an issue or an emoji, or is an e-mail's address, is looked for in what was
    # read, where an entity or a backslash is gone; nothing of it goes on behind a comment.
    pattern = r"@|\\#(?=\w)|:(?=[\w+\\-]+:)|(?i:gh-)(?=\d)"
    return re.sub(pattern, r"\g<0><!-- -->", _escaped(text))


def _escaped(text: str) -> str:
    """Also where a comment would be shown: instead of a picture."""
    line = re.sub(r"[\\`*_\[\]<>&|~#$]", r"\\\g<0>", _line(text))
    line = re.sub(r"(?i)(?<=www)\.|(?<=:)/(?=/)", r"\\\g<0>", line)  # else a link
    # At the beginning "1." and "-" would be a list, "---" a rule, "===" a heading.
    return re.sub(r"^(\d{0,9}|[-+=]*)([-+=.)])(?=\s|$)", r"\1\\\2", line)


def code(text: str) -> str:
    """A name as a code span, whatever back-ticks it has; not for tables, whose bar ends a cell."""
    line = _line(text) or " "
    fence = "`" * (1 + max((len(ticks) for ticks in re.findall("`+", line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}"


def _line(text: str) -> str:
    """On one line, without what cannot be printed."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


def _bold(text: str) -> str:
    return f"**{escaped(text)}**" if _line(text) else ""


def _sentence(text: str) -> str:
    return escaped(f"{text[:1].upper()}{text[1:]}.")


def _head(document: Document) -> Iterator[str]:
    yield BEGINNING + escaped(document.title)
    experiments = document.experiments
    yield f"# {escaped(str(experiments[0]['question'])) if experiments else 'What the runs say'}"
    if document.answer is None:
        yield escaped(document.headline)
    else:
        yield from _answer(document.answer)
        yield escaped(document.counts)
    for one in document.against:
        yield f"**Against the prediction:** {_sentence(one)}"
    for verdict in document.verdicts:
        yield from _verdict(verdict)
    if not document.verdicts:
        yield f"**Nothing found.** {document.nothing_found}."
    if document.unfinished:
        yield escaped(document.unfinished)
    if document.unread:
        yield "**Could not be read, and left out:**"
        yield "\n".join(f"- {code(one.label)}: {escaped(one.reason)}" for one in document.unread)


def _answer(answer: Answer) -> Iterator[str]:
    sure = f"(confidence {answer.confidence})"
    yield f"**{QUESTION} {answer.word}** {sure}. {_sentence(answer.because)}"
    if answer.summary:
        yield f"**How it shows:** {_sentence(answer.summary)}"
    if answer.remedy:
        yield f"**What to do:** {_sentence(answer.remedy)}"
    if answer.cannot_exclude:
        yield f"**Cannot exclude:** {_sentence(answer.cannot_exclude)}"


def _verdict(verdict: Verdict) -> Iterator[str]:
    sites = f" at {', '.join(map(code, verdict.sites))}" if verdict.sites else ""
    channels = f", {escaped(verdict.channels)}" if verdict.channels else ""
    since = f": since {escaped(verdict.since)}" if verdict.since else ""
    lead = f"; {escaped(verdict.lead)}" if verdict.lead else ""
    remedy = f" **Remedy:** {_sentence(verdict.remedy)}" if verdict.remedy else ""
    where = f"{sites}{channels}, in {_arms(verdict.arms)}{since}{lead}."
    sure = f"severity {verdict.severity}, confidence {verdict.confidence}"
    yield f"**{escaped(verdict.cause)}** ({sure}){where}{remedy}"
    if verdict.cannot_exclude:
        yield f"Cannot exclude {escaped(verdict.cannot_exclude)}."
    if verdict.milder:
        yield f"The same, milder, in {_arms(verdict.milder)}."


def _arms(pairs: Iterable[tuple[str, str]]) -> str:
    told = [f"{escaped(count)} {_bold(title)}" for count, title in pairs]
    return " and ".join([", ".join(told[:-1]), told[-1]] if told[1:] else told)


def _predictions(document: Document) -> Iterator[str]:
    count = len(document.against)
    so_far = f"{count} contradiction{'s' * (count != 1)}"
    so_far = so_far if count else "no arm's runs ended otherwise than predicted"
    for experiment, cut in zip(document.experiments, document.not_judged, strict=True):
        yield "## Predicted before the first run, and seen"
        told = {
            "question": str(experiment["question"]),
            "prediction": str(experiment["prediction"]),
            "refuted if": str(experiment["refuted_if"]),
            "so far": cut or so_far,
        }
        yield "\n".join(f"- {name}: {escaped(text)}" for name, text in told.items())
    for table in document.predictions:
        yield from _table(table)


def _shown(block: Block, figures: dict[str, Figure], stem: str) -> Iterator[str]:
    """A block of a section; pictures are put into `figures`."""
    if isinstance(block, Picture):
        count, file = 1, f"{stem}-{block.name}.png"
        while file in figures:
            count += 1
            file = f"{stem}-{block.name}-{count}.png"
        figures[file] = block.figure
        yield f"![{_escaped(block.alt)}](<{quote(file)}>)"
        yield escaped(block.caption)
    elif isinstance(block, Table):
        yield from _table(block)
    elif isinstance(block, Findings):
        yield from _folded(block.title, block.unfolded, _findings(block.found))
    elif isinstance(block, Folded):
        inside = (text for table in block.blocks for text in _table(table))
        yield from _folded(block.title, False, inside)
    elif isinstance(block, Points):
        yield "\n".join(f"- {escaped(one)}" for one in block.texts)
    elif isinstance(block, Note):
        yield escaped(block.text)


def _folded(title: str, unfolded: bool, inside: Iterable[str]) -> Iterator[str]:
    yield "<details open>\n<summary>" if unfolded else "<details>\n<summary>"
    yield _bold(title)
    yield "</summary>"
    yield from inside
    yield "</details>"


def _table(table: Table) -> Iterator[str]:
    if table.title:
        yield _bold(table.title)
    yield _rows(table.head, ([cell.text for cell in row] for row in table.rows))
    if table.note:
        yield escaped(table.note)


def _rows(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = list(head)
    cells = [[escaped(name) for name in names], ["---"] * len(names)]
    cells += [[escaped(text) for text in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _findings(found: list[Sighting]) -> Iterator[str]:
    for position, one in enumerate(found):
        finding, last = one.finding, position + 1 == len(found)
        where = [escaped(one.run.label)]
        where += [code(finding.site)] if finding.site else []
        where += [f"channel {finding.channel}"] if finding.channel is not None else []
        if finding.since is not None:
            where.append(f"since {escaped(one.run.when(finding.since))}")
        if one.lead is not None and one.lead > 0 and not one.run.doses:
            where.append(f"{one.lead} steps before the loss's own alarm")
        where.append(f"confidence {finding.confidence}")
        yield f"#### {escaped(in_words(finding.cause))} ({finding.severity})"
        yield " · ".join(where)
        yield _sentence(finding.summary)
        if finding.evidence:
            head = ("step", "quantity", "value", "threshold", "threshold from")
            rows = (
                (str(e.step), e.quantity, number(e.value), e.bound or "–", e.source or "–")
                for e in finding.evidence
            )
            yield _rows(head, rows)
        concludes = last or found[position + 1].finding.remedy != finding.remedy
        if concludes and finding.remedy:
            yield f"**Remedy.** {_sentence(finding.remedy)}"
        if concludes and finding.cannot_exclude:
            yield f"**Cannot exclude** {escaped(finding.cannot_exclude)}."
