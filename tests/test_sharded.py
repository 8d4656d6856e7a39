"""Emulated FP8 of tensors that are cut over processes: the casts and the training of one process.

Real processes, started by torchrun, over gloo. A cast must be that of the whole tensor to the bit,
whose largest element may lie on another process. A training sums a GEMM's shares in another order,
by which FP32 losses may differ in the last bits.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sharded_on_cpu import RECIPES, losses

pytestmark = pytest.mark.long

SCRIPT = Path(__file__).with_name("sharded_on_cpu.py")


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def sharded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    file = tmp_path_factory.mktemp("sharded") / "told.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={request.param}", str(SCRIPT), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(file.read_text())


def test_a_cast_of_a_distributed_tensor_is_that_of_the_whole(sharded: Any) -> None:
    assert sharded["differing"] == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_tensor_parallel_training_is_that_of_one_process(recipe: str, sharded: Any) -> None:
    assert sharded["losses"][recipe] == pytest.approx(losses(RECIPES[recipe], None), rel=1e-6)
