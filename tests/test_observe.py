"""What `attach` promises besides the right tensors: asked first, in order, once, and no trace.

Families of models are in `test_families`; here is what may happen to any of them: calls by keyword,
tuples, empty batches, exceptions, threads, recursion, autocast, compilation.
"""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import foreign_feed_forwards as foreign
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from fp8lab.sites import GateSite, find_gates, observe

ROLES = ["gate", "up", "product", "output"]


class Log:
    def __init__(self, *roles: str) -> None:
        self.roles = roles or tuple(ROLES)
        self.asked: list[str] = []
        self.seen: list[tuple[str, Tensor]] = []

    def wants(self, module: nn.Module, role: str) -> bool:
        self.asked.append(role)
        return role in self.roles

    def sees(self, module: nn.Module, role: str, tensor: Tensor) -> None:
        self.seen.append((role, tensor.detach().clone()))

    @property
    def order(self) -> list[str]:
        return [role for role, _ in self.seen]

    def of(self, role: str) -> list[Tensor]:
        return [tensor for seen, tensor in self.seen if seen == role]


def site_of(model: nn.Module) -> GateSite:
    (site,) = find_gates(model)
    return site


@contextmanager
def attached(model: nn.Module, *roles: str, site: GateSite | None = None) -> Iterator[Log]:
    log = Log(*roles)
    site = site or site_of(model)
    handles = observe.attach(site, log)
    try:
        yield log
    finally:
        for handle in handles:
            handle.remove()


def x(*shape: int) -> Tensor:
    return torch.randn(*(shape or (6,)), foreign.DIM)


BOTH = [foreign.Torchtitan, foreign.SeedWeights]  # by hooks, and inside


class Cautious(foreign.Torchtitan):
    """Down is called by keyword."""

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(input=F.silu(self.w1(input=x)) * self.w3(x))


class Often(foreign.SeedWeights):
    """Asks gate twice, and the second answer is another one."""

    def forward(self, x: Tensor) -> Tensor:
        product = F.silu(F.linear(x, self.w1.weight)) * F.linear(x, self.w2.weight)
        F.linear(2 * x, self.w1.weight).relu()
        return F.linear(product, self.w3.weight)


@pytest.mark.parametrize("build", [*BOTH, Cautious, foreign.SeedTwice, Often])
def test_each_role_is_shown_once_and_in_order(build: Any) -> None:
    model = build()
    with attached(model) as log:
        tokens = x()
        model(tokens)
        assert log.order == ROLES
        model(x())
        assert log.order == 2 * ROLES
    assert torch.equal(log.of("gate")[0], model.w1(tokens))


@pytest.mark.parametrize("build", BOTH)
@pytest.mark.parametrize("role", ROLES)
def test_only_what_is_wanted_is_shown(build: Any, role: str) -> None:
    model = build()
    with attached(model, role) as log:
        model(x())
    assert log.order == [role]


class Another(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_where_nothing_is_wanted_no_operation_is_looked_at() -> None:
    class Depth(foreign.SeedWeights):
        def forward(self, x: Tensor) -> Tensor:
            self.depth = len(_get_current_function_mode_stack())
            return super().forward(x)

    model = Depth()
    with attached(model, "nothing") as log:
        model(x())
        assert (model.depth, log.seen) == (0, [])
        assert set(log.asked) == set(ROLES)
    with attached(model, "product"):
        model(x())
        assert model.depth == 1


@pytest.mark.parametrize("build", BOTH)
def test_an_empty_batch_shows_nothing(build: Any) -> None:
    model = build()
    with attached(model) as log:
        assert model(x(0)).shape == (0, foreign.DIM)
        assert not log.seen
        model(x())
        assert log.order == ROLES


def test_experts_without_tokens() -> None:
    model = foreign.TorchtitanExperts()
    with attached(model) as log:
        model(x(4), torch.tensor([0, 4, 0]))
        model(x(0), torch.tensor([0, 0, 0]))
    assert log.order == ROLES
    assert log.of("product")[0].shape == (4, foreign.HIDDEN)


class Failing(foreign.SeedWeights):
    fails = False

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.w1.weight), F.linear(x, self.w2.weight)
        product = F.silu(gate) * up
        if self.fails:
            raise KeyError("inside")
        return F.linear(product, self.w3.weight)


class FailingCalled(Failing):
    def forward(self, x: Tensor) -> Tensor:
        product = F.silu(self.w1(x)) * self.w2(x)
        if self.fails:
            raise KeyError("inside")
        return self.w3(product)


@pytest.mark.parametrize("build", [Failing, FailingCalled])
def test_after_an_exception_the_next_forward_is_seen_whole(build: Any) -> None:
    model = build()
    with attached(model) as log:
        model.fails = True
        with pytest.raises(KeyError):
            model(x())
        assert _get_current_function_mode_stack() == []
        model.fails, tokens = False, x()
        log.seen.clear()
        model(tokens)
        assert log.order == ROLES
        assert torch.equal(log.of("gate")[0], model.w1(tokens))


def test_after_ctrl_c_in_a_forward_nothing_is_left() -> None:
    class Interrupted(Failing):
        def forward(self, x: Tensor) -> Tensor:
            product = F.silu(F.linear(x, self.w1.weight)) * F.linear(x, self.w2.weight)
            if self.fails:
                raise KeyboardInterrupt
            return F.linear(product, self.w3.weight)

    model, mine = Interrupted(), Another()
    (site,) = find_gates(model)
    handles = observe.attach(site, Log())
    model.fails = True
    with pytest.raises(KeyboardInterrupt):
        model(x())
    with mine:  # whoever has come since then stays
        for handle in handles:
            handle.remove()
        assert _get_current_function_mode_stack() == [mine]


@pytest.mark.parametrize("build", BOTH)
@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_is_not_watched(build: Any, how: Any) -> None:
    model, tokens = build(), x()
    expected = model(tokens)
    with attached(model) as log:
        other = how(model)
        assert torch.equal(other(tokens), expected)
        assert log.seen == [] and log.asked == []
        model(tokens)
        assert log.order == ROLES


@pytest.mark.parametrize("build", BOTH)
def test_a_receiver_that_raises_stops_the_forward_and_leaves_no_mode(build: Any) -> None:
    class Raising(Log):
        def sees(self, module: nn.Module, role: str, tensor: Tensor) -> None:
            raise ArithmeticError(role)

    model = build()
    (site,) = find_gates(model)
    handles = observe.attach(site, Raising())
    with pytest.raises(ArithmeticError, match="gate"):
        model(x())
    assert _get_current_function_mode_stack() == []
    for handle in handles:
        handle.remove()
    model(x())


@pytest.mark.parametrize("build", BOTH)
def test_two_receivers_see_the_same(build: Any) -> None:
    model = build()
    site = site_of(model)
    with attached(model, site=site) as one, attached(model, site=site) as other, Another():
        model(x())
    assert one.order == other.order == ROLES
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(one.seen, other.seen, strict=True))


class Recursive(foreign.SeedWeights):
    def forward(self, x: Tensor, again: bool = False) -> Tensor:
        gate, up = F.linear(x, self.w1.weight), F.linear(x, self.w2.weight)
        output = F.linear(F.silu(gate) * up, self.w3.weight)
        return self(output, again=False) if again else output


def test_a_module_within_itself() -> None:
    model = Recursive()
    with attached(model) as log:
        model(x(), again=True)
    assert log.order == 2 * ROLES
    assert _get_current_function_mode_stack() == []


@pytest.mark.parametrize("build", BOTH)
def test_threads_do_not_mix(build: Any) -> None:
    class Slow(build):  # type: ignore[misc]
        barrier = threading.Barrier(2)

        def forward(self, x: Tensor) -> Tensor:
            self.barrier.wait(10) if hasattr(self, "together") else None
            return super().forward(x)

    model = Slow()
    batches = [x(3), x(5)]
    with attached(model) as log:
        model.together = True
        threads = [threading.Thread(target=model, args=(batch,)) for batch in batches]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for batch in batches:
        mine = [role for role, tensor in log.seen if len(tensor) == len(batch)]
        assert mine == ROLES


def test_the_backward_that_overwrites_is_too_late() -> None:
    model, tokens = foreign.Liger(), x()
    with attached(model) as log:
        model(tokens).sum().backward()
    assert torch.equal(log.of("gate")[0], model.gate_proj(tokens))
    assert torch.equal(log.of("up")[0], model.up_proj(tokens))


def test_a_bias_that_megatron_returns_is_part_of_gate_and_up() -> None:
    model, tokens = foreign.Megatron(bias=True), x()
    with attached(model) as log:
        model(tokens)
    both = F.linear(tokens, model.linear_fc1.weight) + model.linear_fc1.bias
    assert torch.equal(torch.cat([log.of("gate")[0], log.of("up")[0]], dim=-1), both)
    output = F.linear(log.of("product")[0], model.linear_fc2.weight) + model.linear_fc2.bias
    assert torch.equal(log.of("output")[0], output)


@pytest.mark.parametrize("build", BOTH)
def test_under_autocast_the_tensors_are_those_of_autocast(build: Any) -> None:
    model, tokens = build(), x()
    with attached(model) as log, torch.autocast("cpu", torch.bfloat16):
        model(tokens)
    assert {tensor.dtype for _, tensor in log.seen} == {torch.bfloat16}
    (site,) = find_gates(model)
    error = observe.agrees(site, *(log.of(role)[0] for role in ROLES[:3]))
    assert error <= observe.tolerance(torch.bfloat16)


# --- compiled models ----------------------------------------------------------------------------


class Noisy(foreign.SeedWeights):
    """Uses random numbers and counts its forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("forwards", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        return F.dropout(super().forward(x), 0.5, self.training)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo's own doing
@pytest.mark.parametrize("build", [foreign.Torchtitan, Noisy])
def test_a_model_that_was_compiled_before(build: Any) -> None:
    """Seen by hooks, or in a second forward that leaves buffers and random numbers alone."""
    model = nn.Sequential(nn.LayerNorm(foreign.DIM), build())
    compiled = torch.compile(model, backend="eager")
    tokens = x()
    torch.manual_seed(1)
    compiled(tokens)
    torch.manual_seed(1)
    expected, state = compiled(tokens), torch.random.get_rng_state()
    with attached(model) as log:
        torch.manual_seed(1)
        assert torch.equal(compiled(tokens), expected)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert log.order == ROLES
    assert torch.equal(log.of("gate")[0], model[1].w1(model[0](tokens)))
    torch.manual_seed(1)
    assert torch.equal(compiled(tokens), expected)
    assert len(log.seen) == 4
    if build is Noisy:
        assert model[1].forwards == 4
    torch.compiler.reset()


# --- the proof on the first step ----------------------------------------------------------------


def test_agrees_tells_a_wrong_site() -> None:
    model = foreign.Torchtitan()
    with attached(model) as log:
        model(x())
    gate, up, product = (log.of(role)[0] for role in ROLES[:3])
    site = site_of(model)
    assert observe.agrees(site, gate, up, product) == 0.0
    assert observe.agrees(site, up, gate, product) > 100 * observe.tolerance(torch.float32)
    product[3, 7] += 1e-4 * product[3].abs().max()
    error = observe.agrees(site, gate, up, product)
    assert error == pytest.approx(1e-4, rel=0.01)
    assert error > observe.tolerance(torch.float32)


def test_agrees_leaves_out_what_a_dropout_has_left_out() -> None:
    model = foreign.Torchtitan()
    site, (gate, up) = site_of(model), torch.randn(2, 8, foreign.HIDDEN)
    product = F.dropout(F.silu(gate) * up, 0.5)
    assert (product == 0).any()
    assert observe.agrees(site, gate, up, product) <= observe.tolerance(torch.float32)
    assert observe.agrees(site, up, gate, product) > 0.1
    assert observe.agrees(site, gate, up, torch.zeros_like(product)) > 0.1
    model.eval()
    assert observe.agrees(site, gate, up, product) > 0.1


def test_agrees_allows_a_factor_only_where_there_is_one() -> None:
    weighted, plain = site_of(foreign.MegatronExpert()), site_of(foreign.Megatron())
    gate, up = torch.randn(2, 4, foreign.HIDDEN)
    product = F.silu(gate) * up * torch.tensor([[0.1], [0.5], [0.7], [0.9]])
    assert observe.agrees(weighted, gate, up, product) <= observe.tolerance(torch.float32)
    assert observe.agrees(plain, gate, up, product) > 0.1
    product[0, 0] *= 1.5
    assert observe.agrees(weighted, gate, up, product) > 1e-3
