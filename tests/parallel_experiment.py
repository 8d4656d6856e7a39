"""An experiment of seconds whose runs several processes may do, for test_distributed.

The environment says what befalls a rank: PARALLEL_EXPERIMENT is JSON that maps an arm to "raises"
or "killed", which befalls the last rank in the third step; "pause" is the seconds that every step
takes.
"""

from __future__ import annotations

import json
import os
import signal
import time
from functools import partial

import torch.distributed as dist
from torch import Tensor, nn

from fp8lab import DelayedScaling, Float8CurrentScaling, Plan
from fp8lab.lab.arm import Arm
from fp8lab.lab.experiment import Experiment, Job, Part, Progress
from fp8lab.lab.language import BF16, Setup, train_bytes
from fp8lab.lab.model import ModelConfig
from fp8lab.lab.train import NextByte
from fp8lab.mitigations import ClampedSwiGLU

BEFALLS = json.loads(os.environ.get("PARALLEL_EXPERIMENT", "{}"))


class Doomed(NextByte):
    fate: str | None = None

    def loss(self, model: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
        time.sleep(BEFALLS.get("pause", 0.0))
        if step == 2 and dist.is_initialized() and dist.get_rank() == dist.get_world_size() - 1:
            if self.fate == "raises":
                print("half a line", end="", flush=True)
                raise RuntimeError("it raised\nand said more")
            if self.fate == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(model, step)


def learn(job: Job, progress: Progress) -> None:
    Doomed.fate = BEFALLS.get(job.arm.name)
    train_bytes(job, progress, setup=SETUP)


SETUP = Setup(
    config=ModelConfig(dim=32, layers=2, heads=2, context=16),
    steps=4,
    quick=2,
    learning_rate=0.01,
    batch=4,
    every=1,
    task=Doomed,
)
ARMS = (
    Arm(name="bf16", title="BF16", plan=BF16),
    Arm(
        name="delayed",
        title="FP8, delayed",
        plan=Plan(recipe=DelayedScaling(amax_history_len=4), exclude=("head",)),
    ),
    Arm(name="current", title="FP8, just in time", plan=Plan(recipe=Float8CurrentScaling())),
)
PARTS = (
    Part(name="first", title="First", arms=ARMS, seeds=(0,), run=learn, parallel=True),
    Part(name="alone", title="Alone", arms=ARMS, seeds=(0,), run=learn),
    Part(
        name="clamped",
        title="Clamped",
        arms=(Arm(name="clamped", title="c", plan=BF16, mitigations=(ClampedSwiGLU(),)),),
        seeds=(0,),
        run=partial(train_bytes, setup=SETUP),
        parallel=True,
    ),
)


def experiment(*parts: Part) -> Experiment:
    return Experiment(
        name="parallel",
        question="Do several processes learn what one learns?",
        prediction="They do.",
        refuted_if="They do not.",
        limits=("It is small.",),
        parts=parts,
    )


EXPERIMENT = experiment(PARTS[0])
