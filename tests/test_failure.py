"""An error in one line, wherever it was raised."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp8lab.failure import in_one_line


@pytest.mark.parametrize("name", ["<string>", "made by " + 1000 * "a generator", ""])
def test_code_without_a_file_has_no_place(name: str) -> None:
    """Whatever generated code calls its file: this is asked while an error is under way, and must
    not take its place."""
    here = Path(__file__).name
    with pytest.raises(ZeroDivisionError) as caught:
        exec(compile("1 / 0", name, "exec"))
    line = caught.traceback[0].lineno + 1
    assert in_one_line(caught.value) == f"ZeroDivisionError: division by zero ({here}:{line})"
