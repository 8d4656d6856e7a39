"""Every test starts from the same seeds on one thread, so that a failure repeats.

Seeds alone are not enough: the order of a sum, and so its last bit, depends on the thread count.
The alternative, a generator in every test, cannot reach modules that initialise themselves.
"""

import random

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - code outside this project may draw from numpy's global state
    torch.manual_seed(0)
