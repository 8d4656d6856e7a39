"""A small Llama of bytes: the model on which the lab reproduces what goes wrong in FP8.

Pre-RMSNorm blocks of causal rotary attention and a gated feed-forward, without biases, vocabulary
256, untied embedding and head: the architecture of the FP8-at-scale runs, at a width that one CPU
thread trains. There is no dropout and no sampling, so a step is a pure function of weights and
tokens. Names: `layers.{i}.attention.{query,key,value,output}`, `layers.{i}.mlp.{gate,up,down}`.

The rotary table is computed in each forward (tens of microseconds) and is not a buffer: a buffer
would follow `model.to(bfloat16)` and be rounded, and every angle would be off by up to 0.2 %.

Rejected: drawing weights from the global generator (the arms of an experiment would then differ by
whatever was drawn before) and the transformers library (its models change between releases).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp8lab.ffn import GLU_VARIANTS, GatedFeedForward, matched_hidden
from fp8lab.formats import FORMATS

VOCABULARY = 256
ROTARY_BASE = 10_000.0
NORM_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a LanguageModel: widths in elements, context in bytes.

    hidden=None gives the feed-forward the parameters of a plain one of width 4 * dim, rounded up to
    a multiple of 8; `feed_forward_hidden` is the width in force. `activation_format` names the
    format in which the feed-forward's activations are computed, None for the model's own dtype.
    Raises ValueError for a size below 1, a dim that is not a multiple of 2 * heads (rotary turns
    pairs), or an unknown variant or format.
    """

    dim: int
    layers: int
    heads: int
    context: int
    hidden: int | None = None
    variant: str = "swiglu"
    activation_format: str | None = None

    def __post_init__(self) -> None:
        for name in ("dim", "layers", "heads", "context", "feed_forward_hidden"):
            size = getattr(self, name)
            if size < 1:
                raise ValueError(f"ModelConfig.{name}: expected at least 1, got {size}")
        if self.dim % (2 * self.heads):
            raise ValueError(
                f"ModelConfig.dim: expected a multiple of 2 * heads = {2 * self.heads}, "
                f"got {self.dim}"
            )
        if self.variant not in GLU_VARIANTS:
            raise ValueError(
                f"ModelConfig.variant: expected one of {', '.join(GLU_VARIANTS)}, "
                f"got {self.variant!r}"
            )
        elements = [name for name, fmt in FORMATS.items() if fmt.signed]
        if self.activation_format is not None and self.activation_format not in elements:
            raise ValueError(
                f"ModelConfig.activation_format: expected None or one of {', '.join(elements)}, "
                f"got {self.activation_format!r}"
            )

    @property
    def feed_forward_hidden(self) -> int:
        return matched_hidden(4 * self.dim, 8) if self.hidden is None else self.hidden


class Attention(nn.Module):
    """Causal multi-head attention over rotated queries and keys; x [batch, length, dim]."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        query, key, value = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(
            rotate(query, table), rotate(key, table), value, is_causal=True
        )
        return self.output(mixed.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); x [batch, length, dim]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=NORM_EPS)
        self.attention = Attention(config.dim, config.heads)
        self.mlp_norm = nn.RMSNorm(config.dim, eps=NORM_EPS)
        name = config.activation_format
        self.mlp = GatedFeedForward(
            config.dim,
            config.feed_forward_hidden,
            config.variant,
            activation_format=None if name is None else FORMATS[name],
        )

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.attention_norm(x), table)
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


class LanguageModel(nn.Module):
    """Bytes in, logits of the next byte out: tokens int64 [batch, length] -> [batch, length, 256].

    `seed` alone decides the weights: they come from a generator of their own, and the global one is
    as it was before. Linear weights are normal with variance 1/fan_in, divided by 2 * layers where
    they write to the residual stream (GPT-2's rule); embeddings have variance 1. The head begins at
    a tenth of that size, so that an untrained model predicts nearly uniformly (5.55 nats per byte).
    """

    def __init__(self, config: ModelConfig, seed: int) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):  # the constructors below draw from the global one
            self.embedding = nn.Embedding(VOCABULARY, config.dim)
            self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
            self.norm = nn.RMSNorm(config.dim, eps=NORM_EPS)
            self.head = nn.Linear(config.dim, VOCABULARY, bias=False)
        self._draw(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _draw(self, generator: torch.Generator) -> None:
        self.embedding.weight.normal_(generator=generator)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                std = 1 / math.sqrt(module.in_features)
                if name.endswith((".attention.output", ".mlp.down")):
                    std /= math.sqrt(2 * self.config.layers)
                elif name == "head":
                    std /= 10
                module.weight.normal_(std=std, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """Raises ValueError unless tokens are int64 [batch, 1 to context]."""
        if tokens.dtype != torch.int64 or tokens.ndim != 2:
            raise ValueError(
                f"LanguageModel: expected int64 tokens [batch, length], "
                f"got {tokens.dtype} {list(tokens.shape)}"
            )
        if not 1 <= tokens.shape[1] <= self.config.context:
            raise ValueError(
                f"LanguageModel: expected 1 to {self.config.context} positions, "
                f"got {tokens.shape[1]}"
            )
        x = self.embedding(tokens)
        table = rotary_table(
            tokens.shape[1],
            self.config.dim // self.config.heads,
            dtype=torch.promote_types(x.dtype, torch.float32),
            device=x.device,
        )
        for layer in self.layers:
            x = layer(x, table)
        return self.head(self.norm(x))  # type: ignore[no-any-return]

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross-entropy in nats per byte, a scalar in FP32 or wider.

        tokens int64 [batch, length + 1]: each byte but the first is predicted from those before it.
        """
        logits = self(tokens[..., :-1])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits.flatten(0, 1), tokens[..., 1:].flatten())


def rotary_table(
    length: int, width: int, *, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each [length, width / 2], of position * 10000^(-2i / width), Su et al. 2021.

    The angles are computed in FP64: at position p an FP32 angle is off by up to p * 2^-24.
    """
    pair = torch.arange(0, width, 2, dtype=torch.float64, device=device)
    position = torch.arange(length, dtype=torch.float64, device=device)
    angle = torch.outer(position, ROTARY_BASE ** (-pair / width))
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pair (i, i + width / 2) of each position by its angle; x [..., length, width].

    Computed in the table's dtype (FP32 for a BF16 x), returned in x's.
    """
    cosine, sine = table
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((first * cosine - second * sine, first * sine + second * cosine), dim=-1)
    return turned.to(x.dtype)


@torch.no_grad()
def amplify(model: LanguageModel, layer: int, channel: int, factor: float) -> None:
    """Make one channel of one gate product `factor` times larger and leave the function as it is.

    In place: up's row is multiplied by factor, down's column divided by it. A power of two moves
    only exponents, so in floating point without overflow or underflow every output keeps its bits,
    and what changes in FP8 is the outlier's doing alone. (Scaling gate's row instead would be
    inexact: silu is not linear.) Raises IndexError for a layer or channel that is not there, and
    ValueError if factor is not a power of two, if a weight would overflow or underflow, or if the
    variant's up side is not linear.
    """
    if not (0.0 < factor < math.inf and math.frexp(factor)[0] == 0.5):
        raise ValueError(f"amplify: factor must be a power of two, got {factor}")
    config = model.config
    if GLU_VARIANTS[config.variant][1] != "identity":
        raise ValueError(f"amplify: the up side of variant {config.variant!r} is not linear")
    if not (0 <= layer < config.layers and 0 <= channel < config.feed_forward_hidden):
        raise IndexError(
            f"amplify: expected a layer below {config.layers} and a channel below "
            f"{config.feed_forward_hidden}, got {layer} and {channel}"
        )
    mlp = cast(Block, model.layers[layer]).mlp
    row, column = mlp.up.weight[channel], mlp.down.weight[:, channel]
    for weights, scale in ((row, factor), (column, 1 / factor)):
        if not torch.equal(weights * scale / scale, weights):
            raise ValueError(f"amplify: factor {factor} takes a weight out of {weights.dtype}")
    row *= factor
    column /= factor
