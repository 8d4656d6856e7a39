"""Delayed scaling over several processes: every rank's scales come from the largest amax of all.

Two real processes of gloo on this machine; each sees other data. What they must hold afterwards is
worked out from both ranks' inputs by hand.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RANK = """
import sys, torch
from torch import nn
import fp8lab
rank, store, how = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
with torch.no_grad():
    for layer in model:
        layer.weight.fill_(1.0)
recipe = fp8lab.DelayedScaling(amax_history_len=4, reduce_amax=how != "alone")
fp8lab.convert(model, recipe)
amax = [(8.0, 4.0), (1.0, 2.0)]  # the second within the scales of the first
for step in range(2):
    out = model(torch.tensor([[amax[step][rank]]]))
    out.backward(torch.tensor([[0.5 * amax[step][rank]]]))
if how == "unequal":  # a step with one micro-batch more on one rank, and one that is as any
    for batches in ([16.0, 64.0][: 1 + rank], [128.0 * (1 + rank)]):
        with fp8lab.autocast():
            for x in batches:
                model(torch.tensor([[x]])).backward(torch.tensor([[x]]))
        for layer in model:
            print(layer.amax_history[-1, [0, 2]].tolist())
    model = []
if how == "crossed":  # the ranks run two layers in another order, and one only on one of them
    pair = nn.ModuleList([nn.Linear(1, 1, bias=False) for _ in range(3)])
    fp8lab.convert(pair, recipe)
    with fp8lab.autocast():
        runs = [(pair[0], 1.0), (pair[1], 64.0)]
        for layer, x in runs if rank == 0 else runs[::-1]:
            layer(torch.tensor([[x * (rank + 1)]]))
        if rank == 1:
            pair[2](torch.tensor([[7.0]]))
    model = []
    for layer in pair:
        print(448 / layer.scale[0].item())
for layer in model:
    print([448 / layer.scale[0].item(), 57344 / layer.scale[2].item()])
    print([round(x, 4) for x in layer.amax_history[:, 0].tolist()])
torch.distributed.destroy_process_group()
"""


def on_two_ranks(tmp_path: Path, how: str) -> list[list[str]]:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / f"store-{how}"), how],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    return [out.splitlines() for out, _ in told]


@pytest.mark.parametrize("how", ["reduce", "alone"])
def test_amaxes_are_reduced_over_ranks(tmp_path: Path, how: str) -> None:
    first, second = on_two_ranks(tmp_path, how)
    if how == "reduce":
        expected = ["[8.0, 4.0]", "[0.0, 0.0, 8.0, 2.0]"] * 2
        assert first == second == expected
    else:
        assert first == ["[8.0, 4.0]", "[0.0, 0.0, 8.0, 1.0]"] * 2
        assert second == ["[4.0, 2.0]", "[0.0, 0.0, 4.0, 2.0]"] * 2


def test_ranks_may_run_their_layers_in_another_order(tmp_path: Path) -> None:
    first, second = on_two_ranks(tmp_path, "crossed")
    assert first == second == ["2.0", "128.0", "7.0"]


def test_ranks_may_have_unequal_numbers_of_micro_batches_in_a_region(tmp_path: Path) -> None:
    first, second = on_two_ranks(tmp_path, "unequal")
    # Of a step the largest of all; what goes on is clipped at the amax of the steps before.
    assert first[:2] == second[:2] == ["[64.0, 4.0]", "[8.0, 64.0]"]
    assert first[2:] == second[2:] == ["[256.0, 64.0]", "[64.0, 256.0]"]
