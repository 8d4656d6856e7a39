"""Every family of models that we know of: its sites, and what is seen there.

The classes of `transformers` and torchao are the real ones, small and with random weights; the
others are imitated in `foreign_feed_forwards`. What is seen has to be what the model itself used:
an oracle listens in another way (a patched forward of down, or of the function that multiplies) in
the same run, and its tensors are equal to the bit. Watching changes no bit of the training and
leaves nothing behind.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import foreign_feed_forwards as foreign
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from fp8lab.ffn import FeedForward, GatedFeedForward, Swish
from fp8lab.sites import FeedForwardSite, GateSite, find_gates, observe, survey

VOCABULARY = 64
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "intermediate_size": 48,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def hugging_face(family: str, prefix: str, config: str = "", **sizes: Any) -> nn.Module:
    modeling = import_module(f"transformers.models.{family}.modeling_{family}")
    configuration = import_module(f"transformers.models.{family}.configuration_{family}")
    settings = getattr(configuration, config or f"{prefix}Config")(**{**SIZES, **sizes})
    model: nn.Module = getattr(modeling, f"{prefix}ForCausalLM")(settings)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def deepseek(implementation: str) -> nn.Module:
    return hugging_face(
        "deepseek_v3",
        "DeepseekV3",
        head_dim=8,
        q_lora_rank=16,
        kv_lora_rank=16,
        v_head_dim=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=24,
        first_k_dense_replace=1,
        experts_implementation=implementation,
    )


def gpt_oss(implementation: str) -> nn.Module:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    return hugging_face(
        "gpt_oss",
        "GptOss",
        **EXPERTS,
        rope_parameters=rope,
        experts_implementation=implementation,
    )


def float8_llama() -> nn.Module:
    logging.getLogger("torchao").setLevel(logging.ERROR)
    float8 = import_module("torchao.float8")
    llama = hugging_face("llama", "Llama")
    config = float8.Float8LinearConfig(emulate=True)
    return float8.convert_to_float8_training(
        llama, config=config, module_filter_fn=lambda module, name: "mlp" in name
    )


@dataclass(frozen=True)
class Family:
    """`sites`: (name, activation, how it is seen, how many times a forward shows it; 0: any)."""

    build: Callable[[], nn.Module]
    sites: tuple[tuple[str, str, str], ...]
    formula: tuple[float, float | None, float | None, float] = (1.0, None, None, 0.0)


def layers(name: str, activation: str = "silu", seen: str = "hooks") -> Any:
    return tuple((f"model.layers.{layer}.{name}", activation, seen) for layer in range(2))


FAMILIES: dict[str, Family] = {
    "llama": Family(lambda: hugging_face("llama", "Llama"), layers("mlp")),
    "mistral": Family(lambda: hugging_face("mistral", "Mistral"), layers("mlp")),
    "qwen3": Family(lambda: hugging_face("qwen3", "Qwen3"), layers("mlp")),
    "gemma2": Family(lambda: hugging_face("gemma2", "Gemma2"), layers("mlp", "gelu_tanh")),
    "gemma3": Family(
        lambda: hugging_face("gemma3", "Gemma3", "Gemma3TextConfig"), layers("mlp", "gelu_tanh")
    ),
    "phi3": Family(lambda: hugging_face("phi3", "Phi3"), layers("mlp")),
    "llama4": Family(
        lambda: hugging_face(
            "llama4",
            "Llama4",
            "Llama4TextConfig",
            num_local_experts=4,
            intermediate_size_mlp=48,
            interleave_moe_layer_step=1,
        ),
        tuple(
            (f"model.layers.{layer}.feed_forward.{name}", "silu", seen)
            for layer in range(2)
            for name, seen in (("experts", "inside"), ("shared_expert", "hooks"))
        ),
    ),
    "torchao Float8Linear": Family(float8_llama, layers("mlp")),
}
for _how in ("grouped_mm", "batched_mm", "eager"):
    FAMILIES |= {
        f"mixtral {_how}": Family(
            lambda how=_how: hugging_face(
                "mixtral", "Mixtral", **EXPERTS, experts_implementation=how
            ),
            layers("mlp.experts", seen="inside"),
        ),
        f"qwen3_moe {_how}": Family(
            lambda how=_how: hugging_face(
                "qwen3_moe",
                "Qwen3Moe",
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=48,
                experts_implementation=how,
            ),
            layers("mlp.experts", seen="inside"),
        ),
        f"deepseek_v3 {_how}": Family(
            lambda how=_how: deepseek(how),
            (
                ("model.layers.0.mlp", "silu", "hooks"),
                ("model.layers.1.mlp.experts", "silu", "inside"),
                ("model.layers.1.mlp.shared_experts", "silu", "hooks"),
            ),
        ),
        f"gpt_oss {_how}": Family(
            lambda how=_how: gpt_oss(how),
            layers("mlp.experts", "swish", "inside"),
            (1.702, 7.0, 7.0, 1.0),
        ),
    }
FAMILIES |= {
    "torchtitan": Family(foreign.Torchtitan, ((".", "silu", "hooks"),)),
    "torchtitan, down uncalled": Family(foreign.TorchtitanDownUncalled, ((".", "silu", "inside"),)),
    "torchtitan, fused": Family(foreign.TorchtitanFused, ((".", "silu", "inside"),)),
    "torchtitan, experts": Family(foreign.TorchtitanExperts, ((".", "silu", "inside"),)),
    "litgpt": Family(foreign.Litgpt, ((".", "silu", "hooks"),)),
    "megatron": Family(foreign.Megatron, ((".", "silu", "hooks"),)),
    "megatron, expert": Family(foreign.MegatronExpert, ((".", "silu", "hooks"),)),
    "xformers": Family(foreign.Xformers, ((".", "silu", "inside"),)),
    "liger": Family(foreign.Liger, ((".", "silu", "hooks"),)),
    "seed 000": Family(foreign.SeedTwice, ((".", "silu", "hooks"),)),
    "seed 002": Family(foreign.SeedWeights, ((".", "silu", "inside"),)),
    "einsum": Family(foreign.Einsum, ((".", "gelu", "inside"),)),
    "deepseek_v4": Family(foreign.Clamped, ((".", "silu", "hooks"),), (1.0, 7.0, 7.0, 0.0)),
    "ours": Family(lambda: GatedFeedForward(16, 40, "geglu"), ((".", "gelu", "hooks"),)),
    "ours, swish": Family(
        lambda: GatedFeedForward(16, 40, swish=Swish(1.5, learnable=True)),
        ((".", "swish", "hooks"),),
        (1.5, None, None, 0.0),
    ),
    "nanochat": Family(foreign.Nanochat, ((".", "relu_squared", "hooks"),)),
    "plain, uncalled": Family(foreign.PlainWeights, ((".", "gelu", "inside"),)),
    "ours, plain": Family(lambda: FeedForward(16, 40, "mish"), ((".", "mish", "hooks"),)),
}


class Log:
    """A receiver that keeps everything, and uses what may be changed later at once."""

    def __init__(self, roles: tuple[str, ...] = ("gate", "up", "product", "output")) -> None:
        self.roles = roles
        self.seen: list[tuple[str, Tensor]] = []

    def wants(self, module: nn.Module, role: str) -> bool:
        return role in self.roles

    def sees(self, module: nn.Module, role: str, tensor: Tensor) -> None:
        self.seen.append((role, tensor.detach().clone()))

    def of(self, role: str) -> list[Tensor]:
        return [tensor for seen, tensor in self.seen if seen == role]


def sites_of(model: nn.Module) -> list[GateSite | FeedForwardSite]:
    found = survey(model)
    return [*found.gates, *found.feed_forwards]


def run(model: nn.Module, seed: int = 0) -> Tensor:
    """One forward on its own kind of input; a loss."""
    generator = torch.Generator().manual_seed(seed)
    if hasattr(model, "config"):
        tokens = torch.randint(1, VOCABULARY, (2, 8), generator=generator)
        loss: Tensor = model(input_ids=tokens, labels=tokens).loss
        return loss
    x = torch.randn(6, foreign.DIM, generator=generator).to(next(model.parameters()).dtype)
    further = [torch.tensor([1, 0, 5])] if isinstance(model, foreign.TorchtitanExperts) else []
    output: Tensor = model(x, *further)
    return output.square().mean()


# --- what is found ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_sites_of_every_family(name: str, dtype: torch.dtype) -> None:
    family = FAMILIES[name]
    sites = sites_of(family.build().to(dtype))
    assert [(s.name, s.activation, s.seen) for s in sites] == list(family.sites)
    for site in sites:
        if isinstance(site, GateSite):
            formula = site.beta, site.gate_limit, site.up_limit, site.up_offset
            assert formula == (family.formula if site.experts or len(sites) < 3 else formula)
            assert site.weighted == (name == "megatron, expert")
            assert site.gate.weight.shape == site.up.weight.shape
        *stack, out, width = site.down.weight.shape
        assert (site.channels, site.up.weight.shape[-1]) == (width, out)
        assert stack == ([site.experts] if site.experts else [])


def test_what_has_no_gate_is_said_to_have_none() -> None:
    with pytest.raises(ValueError, match="has no gate") as error:
        find_gates(foreign.Nanochat())
    assert r".: has no gate: down(relu_squared(up(x)))" in str(error.value)


# --- what is seen -------------------------------------------------------------------------------


@contextmanager
def patched(owner: Any, name: str, listen: Callable[..., Any]) -> Iterator[None]:
    """`owner.name` with somebody listening: `listen(result, *args)`."""
    original, own = getattr(owner, name), name in vars(owner)

    def function(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        listen(result, *args)
        return result

    function.__name__ = getattr(original, "__name__", name)
    replace = object.__setattr__  # nn.Module's own would look at what it is given
    replace(owner, name, function)
    try:
        yield
    finally:
        if own:
            replace(owner, name, original)
        else:
            object.__delattr__(owner, name)


@contextmanager
def products_of(site: Any) -> Iterator[list[Tensor]]:
    """What the model itself multiplies with down, overheard where this family does it."""
    heard: list[Tensor] = []
    module, inside = site.module, []
    with ExitStack() as stack:

        def hear(owner: Any, name: str, position: int) -> None:
            def listen(result: Any, *args: Any) -> None:
                if inside and args[position].shape[-1] == site.channels:
                    heard.append(args[position].clone())

            stack.enter_context(patched(owner, name, listen))

        in_gate = hasattr(module, "_apply_gate") and (
            hasattr(module, "alpha") or module.config._experts_implementation != "eager"
        )
        if site.down.module is not None:
            down = site.down.module
            stack.enter_context(patched(down, "forward", lambda _, x, *__: heard.append(x.clone())))
        elif in_gate:
            stack.enter_context(
                patched(module, "_apply_gate", lambda product, *_: heard.append(product.clone()))
            )
        else:
            handles = [
                module.register_forward_pre_hook(lambda *_: inside.append(True)),
                module.register_forward_hook(lambda *_: inside.clear()),
            ]
            for handle in handles:
                stack.callback(handle.remove)
            for owner, name in ((F, "linear"), (F, "grouped_mm"), (torch, "bmm")):
                hear(owner, name, 0)
            hear(torch, "einsum", 1)
        yield heard


HEARD = [name for name in FAMILIES if name not in ("xformers", "plain, uncalled")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", HEARD)
def test_the_product_that_is_seen_is_the_one_that_is_used(name: str, dtype: torch.dtype) -> None:
    model = FAMILIES[name].build().to(dtype)
    for site in sites_of(model):
        log = Log()
        handles = observe.attach(site, log)
        with products_of(site) as heard:
            run(model)
        for handle in handles:
            handle.remove()
        assert len(heard) == len(log.of("product")) > 0
        for used, seen in zip(heard, log.of("product"), strict=True):
            assert torch.equal(used, seen)
        assert_consistent(site, log)


def assert_consistent(site: GateSite | FeedForwardSite, log: Log) -> None:
    """Gate, up and output belong to the product, and come in order."""
    per_product = [role for role, _ in log.seen]
    count = per_product.count("product")
    if isinstance(site, FeedForwardSite):
        assert per_product == ["up", "product", "output"] * count
        for up, product in zip(log.of("up"), log.of("product"), strict=True):
            torch.testing.assert_close(site.activated(up), product)
        return
    for start in range(0, 4 * count, 4):
        assert set(per_product[start : start + 2]) == {"gate", "up"}
        assert per_product[start + 2 : start + 4] == ["product", "output"]
    for gate, up, product, output in zip(
        *(log.of(role) for role in ("gate", "up", "product", "output")), strict=True
    ):
        assert gate.shape == up.shape == product.shape
        assert output.shape[:-1].numel() == product.shape[:-1].numel()
        error = observe.agrees(site, gate, up, product)
        assert error <= observe.tolerance(product.dtype)
        assert observe.agrees(site, up, gate, product) > observe.tolerance(product.dtype)


def test_what_passes_inside_an_autograd_function() -> None:
    model = foreign.Xformers()
    (site,) = sites_of(model)
    log, x = Log(), torch.randn(6, foreign.DIM)
    observe.attach(site, log)
    model(x)
    gate, up = (x @ weight.t() for weight in model.w12.weight.view(2, foreign.HIDDEN, foreign.DIM))
    assert torch.equal(log.of("gate")[0], gate)
    assert torch.equal(log.of("up")[0], up)
    assert torch.equal(log.of("product")[0], F.silu(gate) * up)
    assert_consistent(site, log)


def test_a_plain_feed_forward_with_a_bias_apart() -> None:
    model = foreign.PlainWeights()
    (site,) = sites_of(model)
    log, x = Log(), torch.randn(6, foreign.DIM)
    observe.attach(site, log)
    model(x)
    up = x @ model.up.T + model.bias
    assert site.up.bias is model.bias
    assert torch.equal(log.of("up")[0], up)
    assert torch.equal(log.of("product")[0], F.gelu(up))


@pytest.mark.parametrize("how", ["grouped_mm", "batched_mm", "eager"])
def test_gate_and_up_of_experts_are_what_the_weights_give(how: str) -> None:
    """Against the formula of the class, written anew for each token and expert."""
    model = FAMILIES[f"gpt_oss {how}"].build()
    for name, parameter in model.named_parameters():
        if name.endswith("_proj_bias"):
            nn.init.normal_(parameter)
    site = sites_of(model)[0]
    log, calls = Log(), []
    observe.attach(site, log)
    with patched(site.module, "forward", lambda _, *args: calls.append(args)):
        run(model)
    ((tokens, chosen, _),) = calls
    if how == "eager":  # expert by expert, in each its tokens' first choices first
        slots = sorted((int(e), k, t) for t, row in enumerate(chosen) for k, e in enumerate(row))
        pairs = [(e, t) for e, _, t in slots]
    else:
        order = torch.sort(chosen.flatten()).indices if how == "grouped_mm" else range(32)
        pairs = [(int(chosen.flatten()[i]), int(i) // 2) for i in order]
    rows = torch.stack([tokens[t] for _, t in pairs])
    weights, biases = site.module.gate_up_proj, site.module.gate_up_proj_bias
    both = torch.stack([r @ weights[e] + biases[e] for r, (e, _) in zip(rows, pairs, strict=True)])
    torch.testing.assert_close(torch.cat(log.of("gate")), both[:, ::2])
    torch.testing.assert_close(torch.cat(log.of("up")), both[:, 1::2])
    down, bias = site.module.down_proj, site.module.down_proj_bias
    products = zip(torch.cat(log.of("product")), pairs, strict=True)
    torch.testing.assert_close(
        torch.cat(log.of("output")), torch.stack([p @ down[e] + bias[e] for p, (e, _) in products])
    )


# --- what watching leaves -----------------------------------------------------------------------


def footprint(model: nn.Module) -> list[Any]:
    """Attributes, and hooks of every kind, of every module."""
    return [
        {
            key: list(value) if key.endswith("_hooks") or "_hooks_" in key else id(value)
            for key, value in vars(module).items()
            if not isinstance(value, bool | int | float | str)
        }
        for module in model.modules()
    ]


def train(model: nn.Module, steps: int = 3) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        run(model, step).backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("name", FAMILIES)
def test_training_is_the_same_to_the_bit_and_nothing_is_left(name: str) -> None:
    alone = FAMILIES[name].build()
    watched = copy.deepcopy(alone)
    before = footprint(watched)
    logs = [Log() for _ in FAMILIES[name].sites]
    pairs = zip(sites_of(watched), logs, strict=True)
    handles = [handle for site, log in pairs for handle in observe.attach(site, log)]
    seen = train(watched)
    for handle in handles:
        handle.remove()
    assert all(log.seen for log in logs)
    assert all(torch.equal(a, b) for a, b in zip(train(alone), seen, strict=True))
    assert footprint(watched) == before
    lengths = [len(log.seen) for log in logs]
    run(watched)
    assert [len(log.seen) for log in logs] == lengths


@pytest.mark.parametrize("name", FAMILIES)
def test_a_forward_that_raises_leaves_nothing_and_spoils_nothing(name: str) -> None:
    model = FAMILIES[name].build()
    before = footprint(model)
    (site, *_) = sites_of(model)
    log = Log()
    handles = observe.attach(site, log)
    broken = site.down.parameter
    values = broken.data
    broken.data = torch.zeros(*values.shape[:-2], 3, 5)
    with pytest.raises(RuntimeError):
        run(model)
    broken.data = values
    assert _get_current_function_mode_stack() == []
    log.seen.clear()
    run(model)
    assert_consistent(site, log)
    for handle in handles:
        handle.remove()
    assert footprint(model) == before


# --- what others do with such sites -------------------------------------------------------------


def test_mitigations_say_where_they_cannot_reach() -> None:
    from fp8lab.mitigations import ClampedSwiGLU, HighPrecisionProduct

    fused, experts = foreign.Megatron(), foreign.TorchtitanExperts()
    ClampedSwiGLU().apply(fused)
    assert find_gates(fused)[0].gate_limit == 10.0
    with pytest.raises(ValueError, match=r"ClampedSwiGLU: \. does not call its projections"):
        ClampedSwiGLU().apply(experts)
    with pytest.raises(ValueError, match=r"HighPrecisionProduct: \. computes with down's weight"):
        HighPrecisionProduct().apply(experts)


def test_a_fused_projection_that_is_converted_is_seen_as_it_is_cast() -> None:
    import fp8lab

    model = hugging_face("phi3", "Phi3").bfloat16()
    fp8lab.convert(model, fp8lab.Float8CurrentScaling(), include=["*.mlp.*"])
    site = sites_of(model)[0]
    log = Log()
    observe.attach(site, log)
    run(model).backward()
    gate, up, product = (log.of(role)[0] for role in ("gate", "up", "product"))
    assert gate.dtype == product.dtype == torch.float32  # as TE's fused kernel has them
    assert observe.agrees(site, gate, up, product) <= observe.tolerance(torch.float32)
