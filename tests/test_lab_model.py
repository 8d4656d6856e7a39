"""The lab's language model: seeded, causal, rotary, and amplified without changing its function."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from fp8lab.ffn import ACTIVATIONS, GLU_VARIANTS, FeedForward, GatedFeedForward, matched_hidden
from fp8lab.formats import E4M3
from fp8lab.lab.model import LanguageModel, ModelConfig, amplify, rotary_table, rotate

CPU = torch.device("cpu")
CONFIG = ModelConfig(dim=24, layers=2, heads=3, context=16)


def tokens(batch: int = 2, length: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, length), generator=generator)


# Configuration


def test_hidden_defaults_to_matched_parameters() -> None:
    assert CONFIG.feed_forward_hidden == matched_hidden(96, 8) == 64
    assert ModelConfig(dim=24, layers=2, heads=3, context=16, hidden=40).feed_forward_hidden == 40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 0}, "ModelConfig.dim: expected at least 1, got 0"),
        ({"layers": 0}, "ModelConfig.layers: expected at least 1, got 0"),
        ({"heads": -1}, "ModelConfig.heads: expected at least 1, got -1"),
        ({"context": 0}, "ModelConfig.context: expected at least 1, got 0"),
        ({"hidden": 0}, "ModelConfig.feed_forward_hidden: expected at least 1, got 0"),
        ({"heads": 8}, "ModelConfig.dim: expected a multiple of 2 * heads = 16, got 24"),
        (
            {"variant": "siglu"},
            f"ModelConfig.variant: expected one of glu, gtu, bilinear, reglu, geglu, swiglu, "
            f"{', '.join(ACTIVATIONS)}, xielu, got 'siglu'",
        ),
        (
            {"activation_format": "E8M0"},
            "ModelConfig.activation_format: expected one of None, E4M3, E4M3_GAUDI2, E4M3FNUZ, "
            "E5M2, E5M2FNUZ, E3M2, E2M3, E2M1, BF16, FP16, FP32, got 'E8M0'",
        ),
        ({"norm": "sandwich"}, "ModelConfig.norm: expected one of pre, post, none, got 'sandwich'"),
        ({"qk_norm": True}, "ModelConfig.qk_norm: expected one of none, learned, frozen, got True"),
        ({"final_norm": "no"}, "ModelConfig.final_norm: expected one of True, False, got 'no'"),
        ({"norm_gain": 0.0}, "ModelConfig.norm_gain: expected a positive number, got 0.0"),
        (
            {"softmax_scale": -1.0},
            "ModelConfig.softmax_scale: expected a positive number, got -1.0",
        ),
        (
            {"residual_weight": math.nan},
            "ModelConfig.residual_weight: expected a positive number, got nan",
        ),
        (
            {"embedding_std": math.inf},
            "ModelConfig.embedding_std: expected a positive number, got inf",
        ),
    ],
)
def test_config_errors(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        ModelConfig(**{"dim": 24, "layers": 2, "heads": 3, "context": 16} | change)
    assert str(caught.value) == message


# Construction


def test_names_that_sites_rely_on() -> None:
    names = {name for name, module in LanguageModel(CONFIG, 0).named_modules()}
    for layer in range(2):
        for child in ("query", "key", "value", "output"):
            assert f"layers.{layer}.attention.{child}" in names
        for child in ("gate", "up", "down"):
            assert f"layers.{layer}.mlp.{child}" in names
    model = LanguageModel(CONFIG, 0)
    assert isinstance(model.get_submodule("layers.1.mlp"), GatedFeedForward)
    assert model.head.weight is not model.embedding.weight
    assert not any("bias" in name for name, _ in model.named_parameters())


def test_activation_format_reaches_every_feed_forward() -> None:
    model = LanguageModel(dataclasses.replace(CONFIG, activation_format="E4M3"), 0)
    plain = LanguageModel(CONFIG, 0)
    for layer in range(2):
        assert model.get_submodule(f"layers.{layer}.mlp").activation_format is E4M3
        assert plain.get_submodule(f"layers.{layer}.mlp").activation_format is None
    model.load_state_dict(plain.state_dict())
    assert not torch.equal(model(tokens()), plain(tokens()))


def test_parameter_count() -> None:
    dim, hidden, layers = 24, 64, 2
    expected = layers * (4 * dim * dim + 3 * dim * hidden + 2 * dim) + 2 * 256 * dim + dim
    assert sum(p.numel() for p in LanguageModel(CONFIG, 0).parameters()) == expected


def test_weights_are_the_seeds_and_the_global_generator_is_untouched() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = LanguageModel(CONFIG, 7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = LanguageModel(CONFIG, 7)
    other = LanguageModel(CONFIG, 8)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name])
        if "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight))
        else:
            assert not (weight == other.state_dict()[name]).any()


def test_weights_have_the_stated_variances() -> None:
    model = LanguageModel(ModelConfig(dim=128, layers=8, heads=4, context=16), 0)
    hidden = model.config.feed_forward_hidden
    expected = {
        "embedding": 1.0,
        "head": 0.1 * 128**-0.5,
        "layers.3.attention.query": 128**-0.5,
        "layers.3.attention.output": (128 * 16) ** -0.5,
        "layers.3.mlp.gate": 128**-0.5,
        "layers.3.mlp.up": 128**-0.5,
        "layers.3.mlp.down": (hidden * 16) ** -0.5,
    }
    for name, std in expected.items():
        weight = model.get_parameter(f"{name}.weight")
        # The standard error of a standard deviation of n normals is std / sqrt(2n): four of them.
        assert weight.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * weight.numel()))


def test_untrained_loss_is_that_of_a_uniform_guess() -> None:
    assert LanguageModel(CONFIG, 0).loss(tokens(64, 17)).item() == pytest.approx(
        math.log(256), abs=0.05
    )


PRINT_LOSS = """
import torch
from fp8lab.lab.model import LanguageModel, ModelConfig
torch.set_num_threads(1)
torch.rand({draws})
model = LanguageModel(ModelConfig(dim=24, layers=2, heads=3, context=16), 5)
tokens = torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(0))
loss = model.loss(tokens)
loss.backward()
print(loss.item().hex(), model.embedding.weight.grad.sum().item().hex())
"""


def test_same_loss_and_gradient_in_another_process() -> None:
    printed = {
        subprocess.run(
            [sys.executable, "-c", PRINT_LOSS.format(draws=draws)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for draws in (0, 3)
    }
    model = LanguageModel(CONFIG, 5)
    loss = model.loss(tokens(2, 17))
    loss.backward()
    here = f"{loss.item().hex()} {model.embedding.weight.grad.sum().item().hex()}\n"
    assert printed == {here}


# Function


def test_a_later_token_does_not_change_earlier_logits() -> None:
    for variant in ("swiglu", "glu"):
        model = LanguageModel(
            ModelConfig(dim=24, layers=2, heads=3, context=16, variant=variant), 0
        )
        original = tokens()
        logits = model(original)
        for position in range(16):
            changed = original.clone()
            changed[:, position] = (changed[:, position] + 1) % 256
            difference = (model(changed) != logits).any(-1)
            assert not difference[:, :position].any()
            assert difference[:, position:].all()


def test_loss_is_the_mean_negative_log_probability_in_nats() -> None:
    model = LanguageModel(CONFIG, 0).double()
    text = tokens(3, 12)
    logits = model(text[:, :-1]).tolist()
    terms = []
    for row, logit_row in zip(text.tolist(), logits, strict=True):
        for target, scores in zip(row[1:], logit_row, strict=True):
            terms.append(math.log(math.fsum(map(math.exp, scores))) - scores[target])
    loss = model.loss(text)
    assert loss.shape == () and loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-13)


def test_bf16_model_has_an_fp32_rotary_table_and_loss() -> None:
    model = LanguageModel(CONFIG, 0).bfloat16()
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    model.get_submodule("layers.0.attention").register_forward_pre_hook(
        lambda _, args: seen.append((args[0].dtype, args[1][0].dtype))
    )
    loss = model.loss(tokens())
    assert seen == [(torch.bfloat16, torch.float32)]
    assert loss.dtype == torch.float32 and loss.isfinite()


def test_a_few_steps_learn() -> None:
    model = LanguageModel(CONFIG, 0)
    text = torch.arange(17).repeat(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        loss = model.loss(text)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.loss(text).item() < 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (tokens(2, 17), "LanguageModel: expected 1 to 16 positions, got 17"),
        (tokens(2, 0), "LanguageModel: expected 1 to 16 positions, got 0"),
        (tokens().int(), "LanguageModel: expected int64 tokens [batch, length], got torch.int32"),
        (tokens()[0], "LanguageModel: expected int64 tokens [batch, length], got torch.int64 [16]"),
    ],
)
def test_token_errors(text: Tensor, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        LanguageModel(CONFIG, 0)(text)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


# Rotary


def complex_rotation(x: Tensor) -> Tensor:
    """Su et al. 2021: pair i, as a complex number, times exp(1j * position * 10000^(-2i/width))."""
    *_, length, width = x.shape
    pairs = torch.complex(x[..., : width // 2], x[..., width // 2 :])
    turn = [
        [complex(math.cos(a), math.sin(a)) for a in angles]
        for angles in (
            [position / 10000 ** (2 * i / width) for i in range(width // 2)]
            for position in range(length)
        )
    ]
    turned = pairs * torch.tensor(turn, dtype=torch.complex128)
    return torch.cat((turned.real, turned.imag), dim=-1)


def test_rotary_is_complex_multiplication() -> None:
    x = torch.randn(2, 3, 50, 8, dtype=torch.float64)
    ours = rotate(x, rotary_table(50, 8, dtype=torch.float64, device=CPU))
    # An angle of at most 50 is rounded twice or so on either side, each time by 50 * 2^-53 at most.
    torch.testing.assert_close(ours, complex_rotation(x), rtol=0, atol=4 * 50 * 2.0**-53 * 5)


def test_rotary_depends_on_the_distance_only() -> None:
    query, key = torch.randn(2, 8, dtype=torch.float64)
    table = rotary_table(40, 8, dtype=torch.float64, device=CPU)
    score = rotate(query.expand(40, 8), table) @ rotate(key.expand(40, 8), table).T
    for distance in range(-39, 40):
        diagonal = score.diagonal(distance)
        assert (diagonal - diagonal[0]).abs().max() < 1e-13
    assert score[0, 0].item() == pytest.approx((query @ key).item(), abs=1e-14)


def test_rotary_of_bf16_is_that_of_fp32_rounded_once() -> None:
    x = torch.randn(2, 16, 8).bfloat16()
    table = rotary_table(16, 8, dtype=torch.float32, device=CPU)
    assert torch.equal(rotate(x, table), rotate(x.float(), table).bfloat16())


def test_attention_is_the_textbook_formula() -> None:
    model = LanguageModel(CONFIG, 0).double()
    attention = model.get_submodule("layers.0.attention")
    x = torch.randn(2, 16, 24, dtype=torch.float64)
    heads = [
        (x @ attention.get_parameter(f"{name}.weight").T).view(2, 16, 3, 8).transpose(1, 2)
        for name in ("query", "key", "value")
    ]
    score = complex_rotation(heads[0]) @ complex_rotation(heads[1]).transpose(-1, -2) / math.sqrt(8)
    future = torch.ones(16, 16, dtype=torch.bool).triu(1)
    mixed = score.masked_fill(future, -math.inf).softmax(-1) @ heads[2]
    expected = mixed.transpose(1, 2).reshape(2, 16, 24) @ attention.get_parameter("output.weight").T
    ours = attention(x, rotary_table(16, 8, dtype=torch.float64, device=CPU))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-13)


def test_block_is_prenorm_and_residual() -> None:
    model = LanguageModel(CONFIG, 0).double()
    table = rotary_table(16, 8, dtype=torch.float64, device=CPU)
    block = model.get_submodule("layers.0")
    x = torch.randn(2, 16, 24, dtype=torch.float64)

    def normed(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    middle = x + block.get_submodule("attention")(normed(x), table)
    expected = middle + block.get_submodule("mlp")(normed(middle))
    torch.testing.assert_close(block(x, table), expected, rtol=0, atol=1e-13)


# Architectures

# Losses of three steps, and a sum of weights, before ModelConfig had any field for an architecture.
BEFORE = {
    ("swiglu", None): (
        5.559296,
        4.798014,
        3.99116,
        -5.804266,
    ),
    ("glu", None): (
        5.555454,
        4.799609,
        4.002588,
        -5.786626,
    ),
    ("swiglu", "BF16"): (
        5.559299,
        4.798013,
        3.991181,
        -5.804351,
    ),
}


@pytest.mark.parametrize(("variant", "activation_format"), BEFORE)
def test_the_default_is_the_model_of_before(variant: str, activation_format: str | None) -> None:
    config = dataclasses.replace(CONFIG, variant=variant, activation_format=activation_format)
    model = LanguageModel(config, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    losses = []
    for _ in range(3):
        loss = model.loss(tokens(2, 17))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    total = model.get_parameter("layers.0.attention.query.weight").detach().double().sum()
    # Not to the bit: sums have another order on another processor, and in another torch.
    assert [*losses, total.item()] == pytest.approx(BEFORE[variant, activation_format], rel=2e-6)


def test_the_default_has_the_parameters_of_before() -> None:
    parts = [
        "attention_norm.weight",
        *(f"attention.{name}.weight" for name in ("query", "key", "value", "output")),
        "mlp_norm.weight",
        *(f"mlp.{name}.weight" for name in ("gate", "up", "down")),
    ]
    inside = [f"layers.{layer}.{part}" for layer in range(2) for part in parts]
    expected = ["embedding.weight", *inside, "norm.weight", "head.weight"]
    assert list(LanguageModel(CONFIG, 0).state_dict()) == expected


def rms_normed(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def logits_by_hand(model: LanguageModel, text: Tensor, normed_last: bool) -> Tensor:
    """From the formulas: a stream, blocks without norms before, attention position by position."""
    config = model.config
    width = config.dim // config.heads
    weights = model.state_dict()
    stream = weights["embedding.weight"][text] / config.embedding_std
    scale = config.softmax_scale or width**-0.5
    for layer in range(config.layers):
        part = {
            k.split(".", 2)[2]: v for k, v in weights.items() if k.startswith(f"layers.{layer}.")
        }
        heads = [
            (stream @ part[f"attention.{name}.weight"].T)
            .view(*text.shape, config.heads, width)
            .transpose(1, 2)
            for name in ("query", "key", "value")
        ]
        for index, name in enumerate(("query", "key")):
            gain = part.get(f"attention.{name}_norm.weight", torch.ones(width))
            heads[index] = complex_rotation(rms_normed(heads[index]) * gain)
        score = heads[0] @ heads[1].transpose(-1, -2) * scale
        future = torch.ones(text.shape[1], text.shape[1], dtype=torch.bool).triu(1)
        mixed = score.masked_fill(future, -math.inf).softmax(-1) @ heads[2]
        mixed = mixed.transpose(1, 2).flatten(-2) @ part["attention.output.weight"].T
        stream = stream + after(mixed, part, "attention_norm.weight", config)
        up = stream @ part["mlp.up.weight"].T
        product = ACTIVATIONS[config.variant](up) if "mlp.gate.weight" not in part else None
        if product is None:
            gate = stream @ part["mlp.gate.weight"].T
            product = gate * torch.sigmoid(gate) * up
        down = product @ part["mlp.down.weight"].T
        stream = stream + after(down, part, "mlp_norm.weight", config)
    last = rms_normed(stream) * weights["norm.weight"] if normed_last else stream
    return last @ weights["head.weight"].T


def after(x: Tensor, part: dict[str, Tensor], norm: str, config: ModelConfig) -> Tensor:
    return config.residual_weight * (rms_normed(x) * part[norm] if norm in part else x)


def test_fogs_block_is_its_formula() -> None:
    config = dataclasses.replace(
        CONFIG,
        variant="gelu",
        norm="post",
        norm_gain=0.7,
        final_norm=False,
        qk_norm="frozen",
        softmax_scale=0.3,
        embedding_std=0.02,
    )
    model = LanguageModel(config, 3).double()
    names = set(model.state_dict())
    assert torch.equal(
        model.state_dict()["layers.0.mlp_norm.weight"], torch.full((24,), 0.7).double()
    )
    assert not any(name.startswith(("norm", "layers.0.attention.query_norm")) for name in names)
    assert 0.018 < float(model.embedding.weight.detach().std()) < 0.022
    expected = logits_by_hand(model, tokens(), normed_last=False)
    torch.testing.assert_close(model(tokens()), expected, rtol=0, atol=1e-12)


def test_ops_block_is_its_formula() -> None:
    config = dataclasses.replace(CONFIG, norm="none", qk_norm="learned", residual_weight=0.4)
    model = LanguageModel(config, 3).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_norm.weight"):
                parameter.normal_()
    names = set(model.state_dict())
    assert "layers.1.attention.key_norm.weight" in names and "norm.weight" in names
    assert not any("mlp_norm" in name or "attention_norm" in name for name in names)
    expected = logits_by_hand(model, tokens(), normed_last=True)
    torch.testing.assert_close(model(tokens()), expected, rtol=0, atol=1e-12)


def test_weights_that_both_have_are_the_same_draws() -> None:
    plain = LanguageModel(CONFIG, 7).state_dict()
    config = dataclasses.replace(CONFIG, norm="post", qk_norm="learned", final_norm=False)
    for name, weight in LanguageModel(config, 7).state_dict().items():
        if "norm" not in name:
            assert torch.equal(weight, plain[name])


@pytest.mark.parametrize("activation", [*ACTIVATIONS, "xielu"])
def test_a_feed_forward_without_gate_has_the_parameters_of_one_with(activation: str) -> None:
    model = LanguageModel(dataclasses.replace(CONFIG, variant=activation), 0)
    mlp = model.get_submodule("layers.1.mlp")
    assert isinstance(mlp, FeedForward) and mlp.activation == activation
    gated = LanguageModel(CONFIG, 0).get_submodule("layers.1.mlp")
    matrices = [p for p in mlp.parameters() if p.dim() == 2]
    assert sum(p.numel() for p in matrices) == sum(p.numel() for p in gated.parameters())
    std = mlp.get_parameter("down.weight").detach().std()
    assert std.item() == pytest.approx((96 * 4) ** -0.5, rel=4 / math.sqrt(2 * 96 * 24))
    model.loss(tokens()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_no_name_is_both_a_gate_and_an_activation() -> None:
    assert not GLU_VARIANTS.keys() & {*ACTIVATIONS, "xielu"}


@pytest.mark.parametrize("norm", ["pre", "post", "none"])
def test_amplify_keeps_the_function_of_every_architecture(norm: str) -> None:
    config = dataclasses.replace(
        CONFIG, norm=norm, qk_norm="frozen", residual_weight=0.5, final_norm=False
    )
    model, plain = LanguageModel(config, 0), LanguageModel(config, 0)
    amplify(model, 1, 5, 2.0**12)
    assert torch.equal(model(tokens()), plain(tokens()))


@pytest.mark.parametrize("activation", ["relu", "identity", "xielu"])
def test_amplify_refuses_a_feed_forward_without_gate(activation: str) -> None:
    model = LanguageModel(dataclasses.replace(CONFIG, variant=activation), 0)
    expected = f"amplify: variant '{activation}' has no gate, expected a gated one"
    with pytest.raises(ValueError, match=f"^{expected}$"):
        amplify(model, 0, 0, 2.0)


# Amplification


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [2.0**16, 2.0**-9, 1.0])
def test_amplify_keeps_every_bit_of_the_function(dtype: torch.dtype, factor: float) -> None:
    model = LanguageModel(CONFIG, 0).to(dtype)
    plain = LanguageModel(CONFIG, 0).to(dtype)
    products: dict[nn.Module, Tensor] = {}
    for each in (model, plain):
        each.get_submodule("layers.1.mlp.down").register_forward_pre_hook(
            lambda _, args, each=each: products.update({each: args[0]})
        )
    amplify(model, 1, 5, factor)
    assert torch.equal(model(tokens()), plain(tokens()))
    scale = torch.ones(64, dtype=dtype)
    scale[5] = factor
    assert torch.equal(products[model], products[plain] * scale)


def test_amplify_touches_one_row_and_one_column() -> None:
    model, plain = LanguageModel(CONFIG, 0), LanguageModel(CONFIG, 0)
    amplify(model, 0, 63, 8.0)
    plain.get_parameter("layers.0.mlp.up.weight").data[63] *= 8
    plain.get_parameter("layers.0.mlp.down.weight").data[:, 63] /= 8
    for name, weight in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("factor", [3.0, 0.0, -2.0, math.inf, math.nan])
def test_amplify_refuses_what_is_no_power_of_two(factor: float) -> None:
    with pytest.raises(ValueError, match=f"amplify: factor must be a power of two, got {factor}"):
        amplify(LanguageModel(CONFIG, 0), 0, 0, factor)


@pytest.mark.parametrize("factor", [2.0**130, 2.0**-140, 2.0**-1074])
def test_amplify_refuses_to_lose_bits_and_leaves_the_weights_alone(factor: float) -> None:
    model, plain = LanguageModel(CONFIG, 0), LanguageModel(CONFIG, 0)
    with pytest.raises(ValueError, match="takes a weight out of"):
        amplify(model, 0, 0, factor)
    for name, weight in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)


def test_amplify_refuses_an_up_side_that_is_not_linear() -> None:
    config = ModelConfig(dim=24, layers=2, heads=3, context=16, variant="gtu")
    with pytest.raises(ValueError, match="amplify: the up side of variant 'gtu' is not linear"):
        amplify(LanguageModel(config, 0), 0, 0, 2.0)


@pytest.mark.parametrize(("layer", "channel"), [(2, 0), (-1, 0), (0, 64), (0, -1)])
def test_amplify_refuses_a_channel_that_is_not_there(layer: int, channel: int) -> None:
    with pytest.raises(IndexError) as caught:
        amplify(LanguageModel(CONFIG, 0), layer, channel, 2.0)
    assert str(caught.value) == (
        f"amplify: expected a layer below 2 and a channel below 64, got {layer} and {channel}"
    )
