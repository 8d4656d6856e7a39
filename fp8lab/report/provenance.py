"""What it takes to do it again: versions, machine, command, data, and the precision in force.

Facts are told as the runs recorded them, each once; what no run says is named as not recorded. What
layers computed in is what they said of themselves (Transformer Engine's after a forward), not what
was asked for; the plan that was declared stands beside it.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fp8lab.report import tables
from fp8lab.report.blocks import Block, Folded
from fp8lab.report.story import Seen, Story

_NOT_RECORDED = tables.Cell("not recorded", "quiet")


def provenance(story: Story) -> list[Block]:
    """The facts of all runs; layer by layer their precision; every run and its settings."""
    facts: dict[str, dict[str, None]] = {}
    for run in story.runs:
        for name, value in _facts(run).items():
            told = facts.setdefault(name, {})
            told |= {str(value): None} if value else {}
    for experiment in story.experiments:
        name = experiment["name"]
        again = f"fp8lab run {name} --out {name}; fp8lab report {name} -o {name}.html"
        facts.setdefault("to do it again", {})[again] = None
    facts["this page"] = {f"fp8lab {version('fp8lab')}": None}
    rows = [
        (tables.Cell(name), tables.Cell(" · ".join(values)) if values else _NOT_RECORDED)
        for name, values in facts.items()
    ]
    arms = [
        tables.precision(arm, f"{part.title}: {arm.title}")
        for part in story.parts
        for arm in part.arms
        if arm.runs
    ]
    return [
        tables.Table(head=("what", "recorded"), rows=rows),
        Folded("Precision in force: every layer and operand of every arm", arms),
        Folded("Every run", [tables.recorded_runs(story)]),
    ]


def _facts(run: Seen) -> dict[str, Any]:
    info = run.run.info
    versions = info.get("versions")
    versions = versions if isinstance(versions, dict) else {}
    return {
        "versions": ", ".join(f"{name} {value}" for name, value in versions.items()),
        "machine": info.get("machine"),
        "command": info.get("command"),
        "text": run.config.get("text"),
        "SHA-256 of the text": run.config.get("text_sha256"),
        "schema of the rows": info.get("schema_version"),
    }
