"""What may go to a terminal: text of a stranger, a model's or a file's name, moves no cursor.

Rejected: rich's own filter, which leaves escape sequences in.
"""

from __future__ import annotations

LONGEST_LINE = 1200


def printable(line: str) -> str:
    """Without what moves a terminal's cursor, and without the middle of what fills a screen."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    return line if len(line) <= LONGEST_LINE else f"{line[:500]} … {line[-500:]}"
