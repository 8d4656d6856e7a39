"""Every test starts from the same seeds on one thread, so that a failure repeats.

Seeds alone are not enough: the order of a sum, and so its last bit, depends on the thread count.
The alternative, a generator in every test, cannot reach modules that initialise themselves.
"""

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

torch.set_num_threads(1)
GPU_TESTS = pytest.StashKey[list[pytest.Item]]()


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - code outside this project may draw from numpy's global state
    torch.manual_seed(0)


@pytest.fixture
def paths(tmp_path: Path) -> Iterator[Path]:
    """Places for so many runs as a test likes."""
    return (tmp_path / f"run-{number}" for number in range(1000))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        config.stash[GPU_TESTS] = [item for item in items if "gpu" in item.keywords]
        items[:] = [item for item in items if "gpu" not in item.keywords]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if left_out := config.stash.get(GPU_TESTS, []):
        counts = Counter(item.path.name for item in left_out)
        of_files = ", ".join(f"{count} of {name}" for name, count in counts.most_common())
        line = f"no GPU here: one would add {len(left_out)} tests: {of_files}"
        terminalreporter.write_line(f"{line}; and what experiments/gpu measures")
