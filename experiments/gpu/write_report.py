"""A run of the suite into `reports/`: gpu.md, and the section on GPUs of benchmarks.md.

    python experiments/gpu/write_report.py DIR

A rehearsal is refused, and so is a run of which no part has a row: reports hold what was measured.
`make bench` leaves the section alone. Rejected: writing it where the suite runs, which is another
machine than the one on which the repository lies.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from suite import REHEARSAL

REPORTS = Path(__file__).resolve().parents[2] / "reports"
TITLE = "## On a GPU"
ORDER = "casts_against_te", "kernels", "overhead", "training"
OF_SPEED = "kernels", "overhead"


def machine_of(folder: Path) -> dict[str, str]:
    """Of a run of the suite. Raises FileNotFoundError if there is none."""
    found: dict[str, str] = json.loads((folder / "machine.json").read_text(encoding="utf-8"))
    return found


def is_rehearsal(folder: Path) -> bool:
    """Whether a run took place on a CPU."""
    return "rehearsal" in machine_of(folder)["device"]


def parts_of(folder: Path) -> list[dict[str, Any]]:
    """The pages that lie there, in the order in which they are shown."""
    files = [folder / f"{name}.json" for name in ORDER]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]


def lines_of(part: dict[str, Any], level: str) -> list[str]:
    """A part as Markdown: its tables and notes, and how it ended unless that was well."""
    lines = [f"{level} {part['title']}", ""]
    for table in part["tables"]:
        rows = [table["columns"], ["---"] * len(table["columns"]), *table["rows"]]
        lines += [f"**{table['title']}**", "", *(f"| {' | '.join(row)} |" for row in rows), ""]
    for note in part["notes"]:
        lines += [note, ""]
    if part["ended"] != "complete":
        lines += [f"*This part is not complete: {part['ended']}.*", ""]
    return [*lines, f"{part['seconds']:.0f} s.", ""]


def words(machine: dict[str, str]) -> str:
    """The machine in one line."""
    return "; ".join(
        value if name == "device" else f"{name} {value}" for name, value in machine.items()
    )


def markdown(folder: Path) -> str:
    """The whole report of a run."""
    lines = ["# On a GPU", "", "Written by `experiments/gpu/run_all.py`.", ""]
    if is_rehearsal(folder):
        lines += [f"**{REHEARSAL}.**", ""]
    lines += [words(machine_of(folder)) + ".", ""]
    for part in parts_of(folder):
        lines += lines_of(part, "##")
    return "\n".join(lines)


def replaced(text: str, section: str) -> str:
    """`text` with this section where the one on GPUs was, or at its end."""
    before, found, after = text.partition(f"{TITLE}\n")
    _, more, others = after.partition("\n## ")
    rest = f"\n## {others}" if found and more else ""
    return f"{before.rstrip()}\n\n{TITLE}\n\n{section.strip()}\n{rest}"


def main() -> int:
    """Write both reports from the folder named; 2 if it holds nothing to report."""
    if len(sys.argv) != 2:
        print("usage: write_report.py DIR", file=sys.stderr)
        return 2
    folder = Path(sys.argv[1])
    try:
        machine, parts = machine_of(folder), parts_of(folder)
    except FileNotFoundError:
        print(f"write_report: {folder}: no run of the suite there", file=sys.stderr)
        return 2
    if is_rehearsal(folder):
        print(f"write_report: {folder}: {REHEARSAL}", file=sys.stderr)
        return 2
    if not any(table["rows"] for part in parts for table in part["tables"]):
        print(f"write_report: {folder}: no part has a row", file=sys.stderr)
        return 2
    (REPORTS / "gpu.md").write_text(markdown(folder), encoding="utf-8")
    section = [f"{words(machine)}. The whole of it: [gpu.md](gpu.md).", ""]
    for part in parts:
        if part["name"] in OF_SPEED:
            section += lines_of(part, "###")
    file = REPORTS / "benchmarks.md"
    text = file.read_text(encoding="utf-8")
    file.write_text(replaced(text, "\n".join(section)), encoding="utf-8")
    print("written: reports/gpu.md, reports/benchmarks.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
