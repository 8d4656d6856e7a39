"""Which formula makes the product out of what linear maps gave: found by trying, proved by fit.

    input of down == clamp'(act(clamp(gate))) * (act'(clamp(up)) + offset)  [* a factor per token]

has to hold in every element, to eight units of float32 in the largest of its token. gate and up
may be the outputs of two maps, or the halves or the alternating columns of one. Tried first is
a mitigation says that it has put there, then what has no further numbers in it; then slopes,
powers, bounds, limits and an offset of one. Those numbers are proposed by the caller, who takes
them from the module's attributes whatever their names, beside the published ones: a wrong one does
not fit. Last comes a factor per token, by which a mixture of experts weighs the product.

Where two formulas fit (bilinear: which of the two is the gate?) the earlier map is the gate, and of
two halves the first.

Cost: some elementwise operations on as many tokens as the caller probed with. Rejected: solving
for limits and slopes, which finds numbers where there are none.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fp8lab.ffn import (
    ACTIVATIONS,
    GLU_VARIANTS,
    WITH_A_NUMBER,
    FloatFormat,
    activate,
    situ,
    soft_limit,
    xielu,
)
from fp8lab.sites.tracing import LinearMap, Source

_TOLERANCE = 8 * torch.finfo(torch.float32).eps
_QUICK_GELU = 1.702  # x·sigmoid(1.702x), Hendrycks and Gimpel 2016
_POWER = 3.0  # of PowLU, 2605.25704
_BOUNDS = 4.0, 25.0  # of SiTU-GLU's gate and up, 2607.24653
_XIELU_BETA = 0.5  # 2411.13010
# With fewer channels a factor per token explains anything.
_CHANNELS_FOR_A_FACTOR = 16
_SCREENED_CHANNELS = 64


@dataclass(frozen=True, kw_only=True)
class Formula:
    """What happens between the raw outputs of gate and up and the product.

    gate is clamped to at most `gate_limit`, its activation to at most `activated_limit`, up to
    ±`up_limit`. Activations are named as in `ffn.ACTIVATIONS`; "swish", "powlu" and "situ" have
    `beta` as slope, power or bound, an up's "soft_limit" has `up_beta`, and "xielu" has `beta` and
    `alphas`, alpha_p and alpha_n. `weighted` says that the product is also multiplied by a factor
    per token.
    """

    activation: str
    up_activation: str = "identity"
    beta: float = 1.0
    gate_limit: float | None = None
    up_limit: float | None = None
    up_offset: float = 0.0
    weighted: bool = False
    activated_limit: float | None = None
    up_beta: float = 1.0
    alphas: tuple[float, float] | None = None

    def factors(
        self, gate: Tensor, up: Tensor, fmt: FloatFormat | None = None
    ) -> tuple[Tensor, Tensor]:
        """The two factors of the product, but for that of the token; shapes and dtypes stay.

        `fmt` is the format in which activations are computed, as in `ffn.activate`.
        """
        up = up if self.up_limit is None else up.clamp(-self.up_limit, self.up_limit)
        up = activate(_function(self.up_activation, self.up_beta, None), up, fmt)
        return self.activated(gate, fmt), up + self.up_offset if self.up_offset else up

    def activated(self, gate: Tensor, fmt: FloatFormat | None = None) -> Tensor:
        """The activation of the clamped gate, clamped."""
        gate = gate if self.gate_limit is None else gate.clamp(max=self.gate_limit)
        activated = activate(_function(self.activation, self.beta, self.alphas), gate, fmt)
        limit = self.activated_limit
        return activated if limit is None else activated.clamp(max=limit)

    @property
    def facts(self) -> dict[str, Any]:
        """JSON-able: what there is of it, without what is not there."""
        there: dict[str, Any] = {"activation": self.activation}
        numbered = {**WITH_A_NUMBER, "xielu": xielu}
        there |= {"beta": self.beta} if self.activation in numbered else {}
        there |= {} if self.alphas is None else dict(zip(_ALPHAS, self.alphas, strict=True))
        there |= {"up_activation": self.up_activation}
        there |= {"up_beta": self.up_beta} if self.up_activation in numbered else {}
        limits = ("gate_limit", "activated_limit", "up_limit")
        there |= {name: getattr(self, name) for name in limits if getattr(self, name) is not None}
        return there | ({"up_offset": self.up_offset} if self.up_offset else {})


_ALPHAS = "alpha_p", "alpha_n"


def _function(
    name: str, number: float, alphas: tuple[float, float] | None
) -> Callable[[Tensor], Tensor]:
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]
    if name in WITH_A_NUMBER:
        return partial(_with_number, WITH_A_NUMBER[name], number)
    assert name == "xielu" and alphas is not None, name
    return partial(xielu, alpha_p=alphas[0], alpha_n=alphas[1], beta=number)


def _with_number(function: Callable[[Tensor, float], Tensor], number: float, x: Tensor) -> Tensor:
    return function(x, number)


class Roles(NamedTuple):
    """Which maps are gate (None: there is no gate), up and down, with the rows that each has of its
    parameter, and what happens between them."""

    gate: Source | None
    up: Source
    down: Source
    formula: Formula
    maps: dict[Source, LinearMap]

    def map_of(self, source: Source) -> LinearMap:
        """The map, which a fused gate and up share."""
        return next(known for known in self.maps.values() if known.source.name == source.name)


class _Piece(NamedTuple):
    """Candidate for gate or up: all rows that it gave, [tokens, channels], in order."""

    source: Source
    values: Tensor


def explain_gate(
    maps: Sequence[LinearMap], numbers: Sequence[float], proposed: Sequence[Formula] = ()
) -> Roles | None:
    """The roles for which one map's input is a gated product of others' outputs, None if none fit.

    `maps` are those that one forward computed, in order; `numbers` may be slopes or limits, and
    the formulas in `proposed` are tried first.
    """
    candidates = [
        (down, product, among, gate, up)
        for down, product, pieces, among in _products(maps)
        for gate, up in _pairs(pieces, product.shape)
    ]
    stages = (_plain_formulas, _sloped_formulas, _modified_formulas, _weighted_formulas)
    for stage in (lambda *_: proposed, *stages):
        best: tuple[float, Roles] | None = None
        for down, product, among, gate, up in candidates:
            for formula in stage(product, gate.values, up.values, numbers):
                error = _error(formula, product, gate.values, up.values)
                if error <= _TOLERANCE and (best is None or error < best[0]):
                    best = error, Roles(gate.source, up.source, down, formula, among)
        if best is not None:
            return best[1]
    return None


def explain_plain(maps: Sequence[LinearMap], numbers: Sequence[float]) -> Roles | None:
    """The same for a feed-forward without a gate: one map's input is an activation of another's
    output. Two linear maps with nothing in between are no feed-forward."""
    formulas = [Formula(activation=name) for name in ACTIVATIONS if name != "identity"]
    formulas += _sloped_formulas(numbers)
    for down, product, pieces, among in _products(maps):
        for piece in pieces:
            if piece.values.shape == product.shape and piece.source.size == product.shape[-1]:
                ones = torch.ones_like(product)
                for formula in (*formulas, *_of_xielu(product, piece.values, ones, numbers)):
                    if relative_error(product, formula.activated(piece.values)) <= _TOLERANCE:
                        return Roles(None, piece.source, down, formula, among)
    return None


def relative_error(product: Tensor, explained: Tensor) -> float:
    """The largest error of an element, relative to the largest element of its token."""
    return float(((product - explained).abs() / _size(product)).max())


def _size(product: Tensor) -> Tensor:
    """The largest element of each token, [..., 1]."""
    tiny = torch.finfo(product.dtype).tiny
    return product.abs().amax(dim=-1, keepdim=True).clamp(min=tiny)


def without_factor(product: Tensor, explained: Tensor) -> Tensor:
    """`explained`, each token multiplied by the factor that brings it nearest to `product`."""
    wide, other = explained.double(), product.double()
    squares = (wide * wide).sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return (wide * ((wide * other).sum(dim=-1, keepdim=True) / squares)).to(product.dtype)


def _error(formula: Formula, product: Tensor, gate: Tensor, up: Tensor) -> float:
    few = slice(None, _SCREENED_CHANNELS)
    for columns in (few, slice(None)) if product.shape[-1] > _SCREENED_CHANNELS else (few,):
        activated_gate, activated_up = formula.factors(gate[:, columns], up[:, columns])
        explained = activated_gate * activated_up
        if formula.weighted:
            explained = without_factor(product[:, columns], explained)
        error = relative_error(product[:, columns], explained)
        if not error <= _TOLERANCE:
            break
    return error


def _slopes(numbers: Sequence[float]) -> list[float]:
    return [_QUICK_GELU, *(n for n in numbers if n not in (_QUICK_GELU, 1.0))]


def _plain_formulas(*_: object) -> list[Formula]:
    pairs = [pair for pair in GLU_VARIANTS.values() if pair[1] != "identity"]
    formulas = [Formula(activation=name) for name in ACTIVATIONS]
    return formulas + [Formula(activation=one, up_activation=other) for one, other in pairs]


def _sloped_formulas(*given: object) -> list[Formula]:
    numbers = cast(Sequence[float], given[-1])
    formulas = [Formula(activation="swish", beta=beta) for beta in _slopes(numbers)]
    powers = dict.fromkeys((_POWER, *(number for number in numbers if number > 0.0)))
    return formulas + [Formula(activation="powlu", beta=power) for power in powers]


def _of_situ(
    product: Tensor, gate: Tensor, up: Tensor, numbers: Sequence[float], weighted: bool
) -> list[Formula]:
    """SiTU-GLU with those of all pairs of bounds that fit one token, [1, channels]."""
    bounds = list(dict.fromkeys((*_BOUNDS, *(number for number in numbers if number > 0.0))))
    few = slice(None, _SCREENED_CHANNELS)
    gates = torch.stack([situ(gate[0, few], bound) for bound in bounds])
    ups = torch.stack([soft_limit(up[0, few], bound) for bound in bounds])
    explained = gates[:, None] * ups
    seen = product[0, few].expand_as(explained)
    explained = without_factor(seen, explained) if weighted else explained
    errors = (seen - explained).abs().amax(dim=-1) / _size(seen)[..., 0]
    return [
        Formula(activation="situ", beta=bounds[i], up_activation="soft_limit", up_beta=bounds[j])
        for i, j in (errors <= _TOLERANCE).nonzero().tolist()
    ]


def _of_xielu(product: Tensor, gate: Tensor, up: Tensor, numbers: Sequence[float]) -> list[Formula]:
    """xIELU with the alphas that fit: one where gate is above 0, the other elsewhere.

    An alpha may be kept as what softplus makes it of.
    """
    softened = [math.log1p(math.exp(n)) for n in numbers if n < 100]
    betas = list(dict.fromkeys((_XIELU_BETA, *numbers)))
    known: list[list[float]] = [[*numbers, *softened] for _ in betas]
    choices = known, [[*numbers, *(beta + n for n in softened)] for beta in betas]
    few = slice(None, _SCREENED_CHANNELS)
    sizes = _size(product).expand_as(product)[:, few]
    seen, x, factor = product[:, few], gate[:, few], up[:, few]
    fits: list[list[list[int]]] = []
    for which, alphas in zip((x > 0, x <= 0), choices, strict=True):
        tried = torch.tensor(alphas, device=x.device)[:, :, None]
        beta = torch.tensor(betas, device=x.device)[:, None, None]
        explained = xielu(x[which][few], tried, tried, beta) * factor[which][few]
        errors = (seen[which][few] - explained).abs() / sizes[which][few]
        if not errors.numel():
            return []
        fits.append((errors.amax(dim=-1) <= _TOLERANCE).nonzero().tolist())
    return [
        Formula(activation="xielu", beta=betas[i], alphas=(choices[0][i][p], choices[1][j][n]))
        for (i, p), (j, n) in itertools.product(*fits)
        if i == j
    ]


def _modified_formulas(
    product: Tensor, gate: Tensor, up: Tensor, numbers: Sequence[float], weighted: bool = False
) -> Iterator[Formula]:
    """Limits are only put on what fits where no limit bites: in the smallest token."""
    smallest = int(torch.maximum(gate.abs(), up.abs()).amax(dim=-1).argmin())
    token = slice(smallest, smallest + 1)
    limits: list[dict[str, Any]] = [{}]
    for limit in numbers:
        if limit > 0.0:
            before, after, of_up = (
                {f"{name}_limit": limit} for name in ("gate", "activated", "up")
            )
            limits += [before | of_up, before, of_up, after | of_up, after]
    one = product[token], gate[token], up[token]
    cores = [*_plain_formulas(), *_sloped_formulas(numbers), *_of_situ(*one, numbers, weighted)]
    if not weighted:
        cores += _of_xielu(product, gate, up, numbers)
    for offset in (0.0, 1.0):
        for core in cores:
            formula = replace(core, up_offset=offset, weighted=weighted)
            if _error(formula, *one) <= _TOLERANCE:
                for limited in limits:
                    yield replace(formula, **limited)


def _weighted_formulas(
    product: Tensor, gate: Tensor, up: Tensor, numbers: Sequence[float]
) -> Iterator[Formula]:
    if product.shape[-1] >= _CHANNELS_FOR_A_FACTOR:
        yield from _modified_formulas(product, gate, up, numbers, weighted=True)


def _products(
    maps: Sequence[LinearMap],
) -> Iterator[tuple[Source, Tensor, list[_Piece], dict[Source, LinearMap]]]:
    """For every map that may be down: its inputs, and what other maps gave between two of them.

    Experts run one after the other and a gate may be asked twice: of each map counts what it gave
    first since the last product.
    """
    for down in dict.fromkeys(known.source for known in maps):
        rounds: list[dict[Source, LinearMap]] = []
        current: dict[Source, LinearMap] = {}
        for known in maps:
            current.setdefault(known.source, known)
            if known.source == down:
                if known.input.numel():
                    rounds.append(current)
                current = {}
        inputs = [_rows(one[down].input) for one in rounds]
        if not rounds or len({rows.shape[-1] for rows in inputs}) != 1:
            continue
        product = torch.cat(inputs)
        among = [s for s in rounds[0] if s != down and all(s in one for one in rounds)]
        pieces = []
        for source in among:
            values = [_rows(one[source].output) for one in rounds]
            if {rows.shape[-1] for rows in values} == {source.size}:
                pieces.append(_Piece(source, torch.cat(values)))
        if product.any() and bool(product.isfinite().all()):
            yield down, product, pieces, {s: rounds[0][s] for s in (*among, down)}


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1]).float()


def _pairs(pieces: list[_Piece], shape: torch.Size) -> Iterator[tuple[_Piece, _Piece]]:
    """Every gate with every up: of two maps, or two parts of one."""
    for one, other in itertools.combinations(pieces, 2):
        if one.values.shape == other.values.shape == shape:
            yield one, other
            yield other, one
    for piece in pieces:
        if (len(piece.values), piece.source.size) != (shape[0], 2 * shape[1]):
            continue
        (whole, values), half = piece, shape[1]
        for first, step in ((0, 1), (0, 2)):
            second = half if step == 1 else 1
            parts = []
            for start in (first, second):
                rows = whole.first + start * whole.step
                source = whole._replace(first=rows, size=half, step=step * whole.step)
                columns = slice(start, start + (half - 1) * step + 1, step)
                parts.append(_Piece(source, values[:, columns]))
            yield parts[0], parts[1]
            yield parts[1], parts[0]
