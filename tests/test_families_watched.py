"""Watching any family of models changes no bit and leaves nothing behind.

Twenty steps of AdamW with everything recorded, gradients, weights, moments, the residual stream and
what-ifs included, beside the same twenty steps alone. (Two cases in which bits may differ are not
here: `torch.compile`, whose graph breaks at a hook, and Transformer Engine's own debug path, which
rounds differently: see test_watch_options and test_te_watch.)
"""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from test_families import FAMILIES, footprint, run
from torch import Tensor, nn

import fp8lab
from fp8lab.monitor.selection import FEED_FORWARD_GRADIENTS, FEED_FORWARD_TENSORS, PARAMETER_TENSORS

SELECT = [
    fp8lab.Selection(tensors=FEED_FORWARD_GRADIENTS),
    fp8lab.Selection(tensors=PARAMETER_TENSORS, freq=3),
    fp8lab.Selection(
        tensors=FEED_FORWARD_TENSORS, statistics=("mxfp8_underflows%", "l1_norm"), freq=2
    ),
]
MORE = fp8lab.Selection(
    tensors=("residual", "grad_residual", "attention_logits", "input", "grad_input"), freq=5
)


def train(
    model: nn.Module, steps: int, watching: Any = None, optimizer: Any = None
) -> list[Tensor]:
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = run(model, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if watching is not None:
            watching.step(step, loss=loss)
    return [*losses, *(parameter.detach().clone() for parameter in model.parameters())]


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_twenty_watched_steps_are_those_without(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    alone = family.build()
    watched = copy.deepcopy(alone)
    before = footprint(watched)
    select = [*SELECT, MORE] if hasattr(watched, "config") else SELECT
    optimizer = torch.optim.AdamW(watched.parameters(), lr=1e-3)
    with fp8lab.watch(
        watched, tmp_path / "run", optimizer=optimizer, every=1, select=select
    ) as watching:
        found = train(watched, 20, watching, optimizer)
    for one, other in zip(train(alone, 20), found, strict=True):
        assert torch.equal(one, other)
    assert footprint(watched) == before
    rows = fp8lab.open_run(tmp_path / "run").tensors()
    assert fp8lab.open_run(tmp_path / "run").events().empty
    for site, *_ in family.sites:
        product = rows[rows["site"] == f"{site}:product"]
        assert product["step"].tolist() == list(range(20)), site
        # Inside an autograd.Function there is no graph, and so no gradient to be seen.
        gradients = 0 if name == "xformers" else 20
        assert (rows["site"] == f"{site}:grad_product").sum() == gradients, site
        assert product["mxfp8_underflows%"].notna().sum() == 10, site


@pytest.mark.parametrize("name", ["llama", "mixtral grouped_mm", "xformers", "ours"])
def test_an_exception_inside_leaves_nothing_behind(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name].build()
    before = footprint(model)

    def broken(*_: Any) -> None:
        raise RuntimeError("in the middle of a forward")

    with (
        pytest.raises(RuntimeError, match="in the middle"),
        fp8lab.watch(model, tmp_path / "run", every=1, select=SELECT[0]),
    ):
        inner = [module for module in model.modules() if not list(module.children())][-2]
        handle = inner.register_forward_hook(broken)
        run(model)
        broken()
    handle.remove()
    assert footprint(model) == before
    assert torch._C._len_torch_function_stack() == 0


def test_memory_is_flat(tmp_path: Path) -> None:
    """What is held goes with every step. (`make bench` prints the memory after 10,000 steps.)"""
    model = FAMILIES["ours"].build()
    held = []
    with fp8lab.watch(model, tmp_path / "run", every=1) as watching:
        for step in range(350):
            if step in (50, 350 - 1):
                watching.event(step, "flush")
                gc.collect()
                held.append(len(gc.get_objects()))
            watching.step(step, loss=run(model, step % 7))
    assert held[1] - held[0] < 300, held  # of 300 steps with four rows and eight channels each
