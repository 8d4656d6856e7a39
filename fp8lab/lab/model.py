"""A small Llama of bytes: the model on which the lab reproduces what goes wrong in FP8.

Pre-RMSNorm blocks of causal rotary attention and a gated feed-forward, without biases, vocabulary
256, untied embedding and head: the architecture of the FP8-at-scale runs, at a width that one CPU
thread trains. There is no dropout and no sampling, so a step is a pure function of weights and
tokens. Names: `layers.{i}.attention.{query,key,value,output}`, `layers.{i}.mlp.{gate,up,down}`.

That is the default, to the bit. What the architectures that avoid outliers change (FOG, OP,
QK-norm, plain feed-forwards) are fields of its configuration, each on its own; which of them an
architecture sets is said in `mitigations.block_changes`.

The rotary table is computed in each forward (tens of microseconds) and is not a buffer: a buffer
would follow `model.to(bfloat16)` and be rounded, and every angle would be off by up to 0.2 %.

Rejected: drawing weights from the global generator (the arms of an experiment would then differ by
whatever was drawn before) and the transformers library (its models change between releases).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp8lab.ffn import ACTIVATIONS, GLU_VARIANTS, FeedForward, GatedFeedForward, matched_hidden
from fp8lab.formats import FORMATS

Norm = Literal["pre", "post", "none"]
QKNorm = Literal["none", "learned", "frozen"]

PLAIN_VARIANTS = (*ACTIVATIONS, "xielu")
VOCABULARY = 256
ROTARY_BASE = 10_000.0
NORM_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a LanguageModel: widths in elements, context in bytes.

    `variant` is a key of `ffn.GLU_VARIANTS`, or for a feed-forward without a gate its activation:
    a key of `ffn.ACTIVATIONS`, or "xielu". hidden=None gives a gated feed-forward the parameters of
    a plain one of width 4 * dim, rounded up to a multiple of 8, and a plain one exactly those of
    the gated; `feed_forward_hidden` is the width in force. `activation_format` names the format in
    which the feed-forward's activations are computed, None for the model's own dtype.

    `norm`: RMSNorm before attention and feed-forward, after them (their outputs, not the stream) or
    nowhere; `norm_gain` is what its weights begin with. `final_norm`: whether one stands before the
    head. `qk_norm`: RMSNorm of each head's queries and keys before they are turned, with weights
    that are learned or with none. `softmax_scale` multiplies the attention logits, None for
    1 / sqrt(dim / heads). `residual_weight` multiplies what attention and feed-forward add to the
    stream. Embeddings begin with the standard deviation `embedding_std`, by which the stream
    divides them.

    Raises ValueError for a size below 1, a dim that is not a multiple of 2 * heads (rotary turns
    pairs), an unknown name, or a factor that is not a positive number.
    """

    dim: int
    layers: int
    heads: int
    context: int
    hidden: int | None = None
    variant: str = "swiglu"
    activation_format: str | None = None
    norm: Norm = "pre"
    norm_gain: float = 1.0
    final_norm: bool = True
    qk_norm: QKNorm = "none"
    softmax_scale: float | None = None
    residual_weight: float = 1.0
    embedding_std: float = 1.0

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
        elements = [name for name, fmt in FORMATS.items() if fmt.signed]
        for name, known in (
            ("variant", (*GLU_VARIANTS, *PLAIN_VARIANTS)),
            ("activation_format", (None, *elements)),
            ("norm", get_args(Norm)),
            ("qk_norm", get_args(QKNorm)),
            ("final_norm", (True, False)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"ModelConfig.{name}: expected one of {', '.join(map(str, known))}, "
                    f"got {getattr(self, name)!r}"
                )
        for name in ("norm_gain", "softmax_scale", "residual_weight", "embedding_std"):
            factor = getattr(self, name)
            if factor is not None and not 0.0 < factor < math.inf:
                raise ValueError(f"ModelConfig.{name}: expected a positive number, got {factor}")

    @property
    def is_gated(self) -> bool:
        return self.variant in GLU_VARIANTS

    @property
    def feed_forward_hidden(self) -> int:
        if self.hidden is not None:
            return self.hidden
        gated = matched_hidden(4 * self.dim, 8)
        return gated if self.is_gated else 3 * gated // 2


class CausalMixing(nn.Module):
    """softmax(query key^T * scale) value, each position over itself and those before it.

    query, key and value [batch, heads, length, width]; scale None for 1 / sqrt(width). A module of
    its own, so that hooks see queries and keys as they meet: normed and turned.
    """

    def __init__(self, scale: float | None = None) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale)


class Attention(nn.Module):
    """Causal multi-head attention over rotated queries and keys; x [batch, length, dim].

    `qk_norm` and `softmax_scale` are those of ModelConfig.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        qk_norm: QKNorm = "none",
        softmax_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)
        self.query_norm, self.key_norm = (
            None
            if qk_norm == "none"
            else nn.RMSNorm(dim // heads, eps=NORM_EPS, elementwise_affine=qk_norm == "learned")
            for _ in range(2)
        )
        self.mixing = CausalMixing(softmax_scale)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        query, key, value = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        mixed = self.mixing(rotate(query, table), rotate(key, table), value)
        return self.output(mixed.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); x [batch, length, dim].

    With norm="post" x + norm(attention(x)), and likewise for the feed-forward.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = config.norm
        self.residual_weight = config.residual_weight
        self.attention_norm = _norm(config)
        self.attention = Attention(
            config.dim, config.heads, qk_norm=config.qk_norm, softmax_scale=config.softmax_scale
        )
        self.mlp_norm = _norm(config)
        name = config.activation_format
        kind = GatedFeedForward if config.is_gated else FeedForward
        self.mlp = kind(
            config.dim,
            config.feed_forward_hidden,
            config.variant,
            activation_format=None if name is None else FORMATS[name],
        )

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self._branch(x, self.attention_norm, lambda y: self.attention(y, table))
        return x + self._branch(x, self.mlp_norm, self.mlp)

    def _branch(
        self, x: Tensor, norm: nn.Module | None, compute: Callable[[Tensor], Tensor]
    ) -> Tensor:
        if norm is None:
            x = compute(x)
        else:
            x = compute(norm(x)) if self.norm == "pre" else norm(compute(x))
        return x if self.residual_weight == 1.0 else self.residual_weight * x


def _norm(config: ModelConfig) -> nn.RMSNorm | None:
    if config.norm == "none":
        return None
    norm = nn.RMSNorm(config.dim, eps=NORM_EPS)
    nn.init.constant_(norm.weight, config.norm_gain)
    return norm


class LanguageModel(nn.Module):
    """Bytes in, logits of the next byte out: tokens int64 [batch, length] -> [batch, length, 256].

    `seed` alone decides the weights: they come from a generator of their own, and the global one is
    as it was before. Linear weights are normal with variance 1/fan_in, divided by 2 * layers where
    they write to the residual stream (GPT-2's rule); the stream begins with variance 1. The head
    begins at a tenth of that size, so that an untrained model predicts nearly uniformly (5.55 nats
    per byte).
    """

    def __init__(self, config: ModelConfig, seed: int) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):  # the constructors below draw from the global one
            self.embedding = nn.Embedding(VOCABULARY, config.dim)
            self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
            self.norm = nn.RMSNorm(config.dim, eps=NORM_EPS) if config.final_norm else None
            self.head = nn.Linear(config.dim, VOCABULARY, bias=False)
        self._draw(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _draw(self, generator: torch.Generator) -> None:
        self.embedding.weight.normal_(std=self.config.embedding_std, generator=generator)
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
        if self.config.embedding_std != 1.0:
            x = x / self.config.embedding_std
        table = rotary_table(
            tokens.shape[1],
            self.config.dim // self.config.heads,
            dtype=torch.promote_types(x.dtype, torch.float32),
            device=x.device,
        )
        for layer in self.layers:
            x = layer(x, table)
        return self.head(x if self.norm is None else self.norm(x))  # type: ignore[no-any-return]

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross-entropy in nats per byte, a scalar in FP32 or wider.

        tokens int64 [batch, length + 1]: each byte but the first is predicted from those before it.
        """
        return next_byte_loss(self, tokens)


def next_byte_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """`LanguageModel.loss` of a language model that something may be wrapped around."""
    logits = model(tokens[..., :-1])
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
    variant has no gate or its up side is not linear.
    """
    if not (0.0 < factor < math.inf and math.frexp(factor)[0] == 0.5):
        raise ValueError(f"amplify: factor must be a power of two, got {factor}")
    config = model.config
    if not config.is_gated:
        raise ValueError(f"amplify: variant {config.variant!r} has no gate, expected a gated one")
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
