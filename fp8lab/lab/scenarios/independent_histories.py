"""Cases of a scale that its history makes wrong, by an author who had seen no rule.

Two of each cause, as unlike each other as they come in the field: what is remembered too long,
forgotten too early, not known yet, or known to another rank only. In FP32 each training is fine.
Onsets are injected.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from fp8lab.conversion import convert
from fp8lab.ffn import GatedFeedForward
from fp8lab.lab.scenarios import Draw, Label, Scenario
from fp8lab.lab.scenarios.independent_scaling import (
    Encoder,
    Residual,
    Stack,
    follow,
    normal,
    product_sites,
    whole,
)
from fp8lab.linear import Fp8Linear
from fp8lab.recipe import DelayedScaling

# --- stale scale ----------------------------------------------------------------------------------


def _sources_in_turn(draw: Draw) -> Label:
    # Two sources of data with different units take turns, and the history is shorter than a turn.
    generator = torch.Generator().manual_seed(draw.seed)
    model = Encoder(32, 48, 96, 12, "reglu", normed=True)
    teacher = Encoder(32, 48, 96, 12, "reglu", normed=True)
    convert(model, DelayedScaling(amax_history_len=whole(generator, 1, 5)), exclude=("head",))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    period, first = whole(generator, 7, 12), whole(generator, 20, 60)

    def loss_of(step: int) -> Tensor:
        x = normal(generator, 128, 32)
        # Cubes: a source whose peaks are what tells.
        x = x**3
        with torch.no_grad():
            y = teacher(x)
        if step >= first and (step - first) % period == 0:
            x = x * draw.between(20.0, 300.0)
        return functional.mse_loss(model(x), y)

    follow(draw, model, optimizer, loss_of, 240)
    return Label(cause="stale_scale", sites=("encoder:input",), onset=first)


def _missing_value(draw: Draw) -> Label:
    # One row with the code for "missing", masked in the loss; 1024 steps remember it.
    generator = torch.Generator().manual_seed(draw.seed)
    model = Encoder(40, 32, 64, 6, "swiglu", normed=False)
    teacher = Encoder(40, 32, 64, 6, "swiglu", normed=False)
    convert(model, DelayedScaling(), include=("encoder", "mlp.*"))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    at = whole(generator, 40, 120)

    def loss_of(step: int) -> Tensor:
        x = normal(generator, 128, 40)
        with torch.no_grad():
            y = (4 * teacher(x)).argmax(dim=1)
        if step == at:
            x[7, whole(generator, 0, 40)] = -draw.between(1e5, 1e8)
            y[7] = -100
        return functional.cross_entropy(model(x), y)

    follow(draw, model, optimizer, loss_of, 240)
    sites = ("encoder:input", "mlp.gate:input", "mlp.up:input", *product_sites("mlp.down"))
    return Label(cause="stale_scale", sites=sites, onset=at + 1)


# --- cold start -----------------------------------------------------------------------------------


def _raw_units(draw: Draw) -> Label:
    # Fine-tuning on inputs in raw units: the first step casts them with scale 1, and Adam does not
    # forget the gradient that comes of it.
    generator = torch.Generator().manual_seed(draw.seed)
    teacher = Encoder(32, 32, 64, 16, "swiglu", normed=False)
    unit = draw.between(2.0**11, 2.0**15)
    with torch.no_grad():
        teacher.encoder.weight *= 4 / unit
    model = Encoder(32, 32, 64, 16, "swiglu", normed=False)
    model.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        for parameter in model.mlp.parameters():
            parameter.add_(0.1 * parameter.std() * normal(generator, *parameter.shape))
    convert(model, DelayedScaling(amax_history_len=64), exclude=("head",))
    model.encoder.weight.requires_grad_(False)
    optimizer = torch.optim.Adam(model.mlp.parameters(), lr=1e-3)

    def loss_of(step: int) -> Tensor:
        x = unit * normal(generator, 128, 32)
        with torch.no_grad():
            y = teacher(x)
        return functional.mse_loss(model(x), y)

    follow(draw, model, optimizer, loss_of, 150)
    return Label(cause="cold_start", sites=("encoder:input",), onset=0)


def _lost_state(draw: Draw) -> Label:
    # Restarts from checkpoints that hold weights and optimizer but neither histories nor scales.
    generator = torch.Generator().manual_seed(draw.seed)
    size = draw.between(64.0, 200.0)
    model, teacher = Stack(32, 64, 2, 16), Stack(32, 64, 2, 16)
    for layer in model.layers:
        assert isinstance(layer, Residual)
        with torch.no_grad():
            layer.norm.weight.fill_(size)
            layer.mlp.down.weight /= size**2
    convert(model, DelayedScaling(amax_history_len=32), exclude=("head",))
    slow = [p for name, p in model.named_parameters() if ".down." in name]
    rest = [p for name, p in model.named_parameters() if ".down." not in name]
    groups: list[dict[str, Any]] = [{"params": rest}, {"params": slow, "lr": 4e-3 / size**2}]
    optimizer = torch.optim.Adam(groups, lr=4e-3)
    first, period = whole(generator, 20, 50), round(draw.between(12, 5))

    def loss_of(step: int) -> Tensor:
        x = normal(generator, 96, 32)
        with torch.no_grad():
            y = teacher(x)
        return functional.mse_loss(model(x), y)

    for _ in range(3):  # the recording begins when all is warm
        loss_of(0).backward()  # type: ignore[no-untyped-call]

    def restart(step: int) -> None:
        if step >= first and (step - first) % period == 0:
            model.load_state_dict({n: v for n, v in model.state_dict().items() if _is_learned(n)})

    follow(draw, model, optimizer, loss_of, 120, restart)
    sites = [s for i in range(2) for s in product_sites(f"layers.{i}.mlp.down")]
    return Label(cause="cold_start", sites=tuple(sites), onset=first)


def _is_learned(name: str) -> bool:
    return not name.endswith((".amax_history", ".scale"))


# --- rank-local amax ------------------------------------------------------------------------------


def _together(part: Callable[[Draw, int], None], draw: Draw) -> None:
    """Two processes, each of which trains and records its part."""
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_one_of_two, args=(part, draw, rank)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    if any(rank.exitcode for rank in ranks):
        raise RuntimeError(f"{draw.folder}: ranks ended with {[r.exitcode for r in ranks]}")


def _one_of_two(part: Callable[[Draw, int], None], draw: Draw, rank: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(draw.seed)
    meeting = Path(draw.folder, "meeting").absolute()
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    try:
        part(draw, rank)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _turns(draw: Draw) -> tuple[int, int]:
    """When the first shard of the loud source comes, and how many steps lie between two."""
    generator = torch.Generator().manual_seed(draw.seed)
    return whole(generator, 10, 20), whole(generator, 9, 13)


def _visited_rank(draw: Draw, rank: int) -> None:
    generator = torch.Generator().manual_seed(1000 * draw.seed + rank)
    model = Encoder(32, 48, 96, 12, "swiglu", normed=True)
    teacher = Encoder(32, 48, 96, 12, "swiglu", normed=True)
    convert(model, DelayedScaling(amax_history_len=16, reduce_amax=False), exclude=("head",))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    parallel = nn.parallel.DistributedDataParallel(model)
    first, period = _turns(draw)

    def loss_of(step: int) -> Tensor:
        x = normal(generator, 64, 32) ** 3
        with torch.no_grad():
            y = teacher(x)
        turn, rest = divmod(step - first, period)
        if turn >= 0 and rest == 0 and turn % 2 == rank:
            x = x * draw.between(30.0, 300.0)
        return functional.mse_loss(parallel(x), y)

    follow(draw, parallel, optimizer, loss_of, 60)


def _shards_in_turn(draw: Draw) -> Label:
    # A loud source visits the ranks in turn; together they would remember it, each alone forgets.
    _together(_visited_rank, draw)
    first, period = _turns(draw)
    return Label(cause="rank_local_amax", sites=("encoder:input",), onset=first + period)


class Gathered(nn.Module):
    """Rows that know the mean of the rows of all ranks, which travel as codes of FP8."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(32, 32, bias=False)
        self.mix = nn.Linear(32, 32, bias=False)
        self.mlp = GatedFeedForward(32, 64, "swiglu")
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.query, Fp8Linear)
        cast = self.query.cast_in_force("input", x)
        codes = [torch.empty_like(x) for _ in range(2)]
        dist.all_gather(codes, cast.rounded())
        assert cast.scale_inv is not None
        mean = (torch.cat(codes) * cast.scale_inv).mean(dim=0)
        x = torch.tanh(self.query(x)) + self.mix(mean)
        return self.head(x + self.mlp(x))  # type: ignore[no-any-return]


def _jump(draw: Draw) -> int:
    return whole(torch.Generator().manual_seed(draw.seed), 20, 40)


def _gathering_rank(draw: Draw, rank: int) -> None:
    generator = torch.Generator().manual_seed(1000 * draw.seed + rank)
    model = Gathered()
    answer = normal(torch.Generator().manual_seed(draw.seed), 32, 8) / 5
    convert(model, DelayedScaling(amax_history_len=8, reduce_amax=False), exclude=("head",))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    jump = _jump(draw)

    def loss_of(step: int) -> Tensor:
        x = normal(generator, 64, 32)
        x = x + 0.5 * normal(torch.Generator().manual_seed(step), 32)
        if rank == 1 and step >= jump:  # a few loud rows, which leave the mean what it is
            x[:4] *= draw.between(6.0, 60.0)
            x[:2] = -x[2:4]
        everyone = x.clone()
        dist.all_reduce(everyone)
        y = (everyone.mean(dim=0) @ answer).expand(64, 8)
        return functional.mse_loss(model(x), y)

    def share(*_: object) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= 2

    optimizer.register_step_pre_hook(share)
    follow(draw, model, optimizer, loss_of, 80)


def _codes_of_another(draw: Draw) -> Label:
    # The codes of a rank are read with the scale of another: sequence parallelism without a
    # reduction of amaxes. Wrong as soon as the ranks' scales part.
    _together(_gathering_rank, draw)
    sites = ("query:input", "mix:input")
    return Label(cause="rank_local_amax", sites=sites, onset=_jump(draw) + 1)


SCENARIOS: tuple[Scenario, ...] = (
    Scenario(
        name="independent-sources-in-turn",
        cause="stale_scale",
        title="two sources in different units take turns, the history is shorter than a turn",
        onset="the first step with the louder source",
        run=_sources_in_turn,
    ),
    Scenario(
        name="independent-missing-value",
        cause="stale_scale",
        title="one masked row with the code of a missing value, in a history of 1024 steps",
        onset="the step after that row",
        run=_missing_value,
    ),
    Scenario(
        name="independent-raw-units",
        cause="cold_start",
        title="fine-tuning on inputs in raw units, which scale 1 clips in the first step",
        onset="step 0",
        run=_raw_units,
    ),
    Scenario(
        name="independent-lost-state",
        cause="cold_start",
        title="restarts from checkpoints without the FP8 state",
        onset="the first restart",
        run=_lost_state,
    ),
    Scenario(
        name="independent-shards-in-turn",
        cause="rank_local_amax",
        title="a loud source visits two ranks in turn, whose histories are not shared",
        onset="the first visit to a rank while the other still remembers the last",
        run=_shards_in_turn,
    ),
    Scenario(
        name="independent-codes-of-another",
        cause="rank_local_amax",
        title="gathered codes of another rank are read with the own scale",
        onset="the first step in which the ranks' scales differ more than twofold",
        run=_codes_of_another,
    ),
)
