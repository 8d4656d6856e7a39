"""Where the feed-forwards of a model are, which of their weights is which, and how to see inside.

Names lie: in torchtitan `w2` is the down projection, in xformers `w3` is, and in the paper that
this tool is built around `w1` is what Llama calls up. So nothing is read from names. Every module
that owns matrices of fitting shapes, alone or stacked for experts, is *run* on a small probe, each
linear map that it computes is noted with its input and output (`tracing`), and the roles are those
for which the input of down is act(gate)·act'(up), element by element (`gating`). What fits is
proved; what does not fit is no gate.

The probe's tokens grow from half the usual size to 64 times, so that a clamp shows, and it runs
with float32 stand-ins of the module's matrices, made of random numbers: in BF16 x·σ(1.702x) passes
for GELU, a matrix that is zero explains nothing, a sharded one would have to be gathered, and all
experts can share one matrix in memory. For the same reason an `activation_format` of `ffn` is
lifted meanwhile (in E2M1 GELU *is* ReLU). The probe runs in evaluation mode without gradients and
leaves random state, buffers and modes as they were.

Cost: one forward of each candidate module on some tokens, and for its time a float32 copy of its
matrices, of one expert's in a mixture. Rejected: symbolic tracing, which fails on control flow and
needs a rule per way of writing an activation; a table of known classes, which is never complete.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from fp8lab.ffn import FeedForward, GatedFeedForward
from fp8lab.recipe import Operand
from fp8lab.sites.gating import Formula as Formula
from fp8lab.sites.gating import Roles, explain_gate, explain_plain
from fp8lab.sites.probing import numbers, probe, proposals
from fp8lab.sites.te_casts import cast_in_force as cast_in_force_of_te
from fp8lab.sites.te_casts import te_name
from fp8lab.sites.torchao_casts import cast_in_force as cast_in_force_of_torchao
from fp8lab.sites.torchao_casts import is_torchao
from fp8lab.sites.tracing import Source
from fp8lab.sites.tracing import output_of as output_of

Role = Literal["gate", "up", "product", "output"]
Seen = Literal["hooks", "inside", "recomputed"]
Engine = Literal["torch", "transformer_engine"]


@dataclass(frozen=True, eq=False)
class Projection:
    """One linear map of a feed-forward: a parameter, read anew each time, or some of its rows.

    `name` is the parameter's in the site's module; a fused gate and up share it. `owner` and
    `attribute` say where it is read, `module` is what is called for it, None where the parent
    computes with the parameter itself. `rows` are those of [out, in]; `transposed` says that the
    parameter is stored as [in, out], `flat` that it is stored as [n, out / n, in].
    """

    name: str
    owner: nn.Module
    attribute: str = "weight"
    bias_attribute: str | None = None
    module: nn.Module | None = None
    rows: slice = field(default_factory=lambda: slice(None))
    transposed: bool = False
    bias_owner: nn.Module | None = None  # None: the owner
    flat: bool = False

    @property
    def parameter(self) -> Tensor:
        """The parameter itself, as it is now: FSDP2 exchanges it while it is gathered."""
        parameter: Tensor = getattr(self.owner, self.attribute)
        return parameter

    @property
    def weight(self) -> Tensor:
        """[out, in], or [experts, out, in]: the parameter, or a view of its rows."""
        weight = self.parameter.flatten(0, 1) if self.flat else self.parameter
        if self.transposed:
            weight = weight.transpose(-2, -1)
        return weight if self.rows == slice(None) else weight[..., self.rows, :]

    @property
    def bias(self) -> Tensor | None:
        """[out], [experts, out], or None: the parameter, or a view of its rows."""
        if self.bias_attribute is None:
            return None
        bias: Tensor | None = getattr(self.bias_owner or self.owner, self.bias_attribute)
        return bias if bias is None or self.rows == slice(None) else bias[..., self.rows]

    @property
    def fused(self) -> bool:
        """Whether the parameter holds another projection too."""
        return self.rows != slice(None)

    def __call__(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight, self.bias)


@dataclass(frozen=True, eq=False)
class GateSite:
    """A gated feed-forward: output = down(activation(gate(x)) * up_activation(up(x))).

    `name` is the module's path in the model ("." for the model itself). Activations and their
    numbers are those of `gating.Formula`. gate is clamped to at most `gate_limit` before, up to
    ±`up_limit`, the activated gate to at most `activated_limit`; `up_offset` is added to the
    activated up. `weighted` says that the product is multiplied by a factor per token (a router's
    probability) before it reaches down. `seen` is how the product is got at (see `observe`),
    `experts` how many experts share the site: 0 where there are none. `remade` says that all this
    is a mitigation's doing, which makes the product anew.
    """

    name: str
    module: nn.Module
    gate: Projection
    up: Projection
    down: Projection
    activation: str
    up_activation: str
    seen: Seen = "hooks"
    engine: Engine = "torch"
    experts: int = 0
    beta: float = 1.0
    gate_limit: float | None = None
    up_limit: float | None = None
    up_offset: float = 0.0
    weighted: bool = False
    activated_limit: float | None = None
    up_beta: float = 1.0
    alphas: tuple[float, float] | None = None
    remade: bool = False

    @property
    def channels(self) -> int:
        """The width of the product: its last axis."""
        return self.gate.weight.shape[-2]

    @property
    def hookable(self) -> bool:
        """Whether gate, up and down are called as three modules, so that hooks see each alone."""
        called = (self.gate.module, self.up.module, self.down.module)
        return None not in called and called[0] is not called[1]

    def site(self, role: Role) -> str:
        """The site's name in rows, such as `layers.3.mlp:product`."""
        return f"{self.name}:{role}"

    def activated(self, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """The two factors of the product, from the raw outputs [..., channels] of gate and up.

        In the precision in which the module computes them, where that is a setting.
        """
        own = self.module if isinstance(self.module, GatedFeedForward) else None
        if own is not None and not self.remade:
            return own.activated(gate, up)
        return self.formula.factors(gate, up, None if own is None else own.activation_format)

    @property
    def formula(self) -> Formula:
        """What happens between the raw outputs of gate and up and the product."""
        return Formula(
            activation=self.activation,
            up_activation=self.up_activation,
            beta=self.beta,
            gate_limit=self.gate_limit,
            up_limit=self.up_limit,
            up_offset=self.up_offset,
            weighted=self.weighted,
            activated_limit=self.activated_limit,
            up_beta=self.up_beta,
            alphas=self.alphas,
        )


@dataclass(frozen=True, eq=False)
class FeedForwardSite:
    """A feed-forward without a gate: output = down(activation(up(x))), fields as in `GateSite`.

    What down receives is called product here too.
    """

    name: str
    module: nn.Module
    up: Projection
    down: Projection
    activation: str
    seen: Seen = "hooks"
    engine: Engine = "torch"
    experts: int = 0
    beta: float = 1.0
    alphas: tuple[float, float] | None = None

    @property
    def channels(self) -> int:
        """The width of the product: its last axis."""
        return self.up.weight.shape[-2]

    def site(self, role: Role) -> str:
        """The site's name in rows, such as `layers.3.mlp:product`."""
        return f"{self.name}:{role}"

    def activated(self, up: Tensor) -> Tensor:
        """The product, from the raw output [..., channels] of up."""
        if isinstance(self.module, FeedForward):
            return self.module.activated(up)
        return self.formula.activated(up)

    @property
    def formula(self) -> Formula:
        """What happens between the raw output of up and the product: up stands in gate's place."""
        return Formula(activation=self.activation, beta=self.beta, alphas=self.alphas)


class Survey(NamedTuple):
    """All feed-forwards of a model, and of what looked like a gated one, why it is none."""

    gates: list[GateSite]
    feed_forwards: list[FeedForwardSite]
    reasons: list[str]


def find_gates(model: nn.Module) -> list[GateSite]:
    """Every gated feed-forward in `model`, in module order.

    Raises ValueError, in one line, if there is none; where a module of the right shape was found
    but did not fit, the message says why.
    """
    found = survey(model)
    if not found.gates:
        plain = [f"{site.name}: has no gate: down({site.activation}(up(x)))" for site in found[1]]
        reasons = [*plain, *found.reasons][:3]
        looked_at = f" ({'; '.join(reasons)})" if reasons else ""
        raise ValueError(
            f"{type(model).__name__}: no gated feed-forward found, expected a module computing "
            f"down(act(gate(x)) * up(x)){looked_at}"
        )
    return found.gates


def find_feed_forwards(model: nn.Module) -> list[FeedForwardSite]:
    """Every feed-forward without a gate in `model`, in module order; [] if there is none."""
    return survey(model).feed_forwards


def modules_of(model: Any) -> dict[str, nn.Module]:
    """A model's modules by name, "" for itself. Raises TypeError in one line for what is none, as
    an optimizer is."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: {type(model).__name__}, expected an nn.Module")
    return dict(model.named_modules())


def survey(model: nn.Module) -> Survey:
    """Every feed-forward of `model`, gated or not, in one go. Raises what `modules_of` does."""
    found = Survey([], [], [])
    for name, module in modules_of(model).items():
        site: GateSite | FeedForwardSite | str | None
        if te_name(module) is not None:
            from fp8lab.sites import te_modules

            site = te_modules.identify(name or ".", module)
        else:
            site = _identify(name or ".", module)
        if isinstance(site, GateSite):
            found.gates.append(site)
        elif isinstance(site, FeedForwardSite):
            found.feed_forwards.append(site)
        elif site is not None:
            found.reasons.append(f"{name or '.'}: {site}")
    return found


class _Matrix(NamedTuple):
    """A candidate for a projection, and the shapes [out, in] that it may have."""

    name: str
    stacked: bool
    shapes: set[tuple[int, int]]


def _matrices(module: nn.Module) -> list[_Matrix]:
    """The matrices of a module and of its direct children, and its own stacks of matrices."""
    found = []
    for name, parameter in module.named_parameters():
        owner = module.get_submodule(name.rpartition(".")[0]) if "." in name else module
        own, depth = owner is module, name.count(".")
        if not own and te_name(owner) == "LayerNormMLP":
            continue  # a feed-forward of its own, whatever its kernels show of themselves
        if parameter.dim() not in (2, 3) or depth > 1 or (parameter.dim() == 3 and not own):
            continue
        *stack, rows, columns = parameter.shape
        shapes = {(rows, columns)} if isinstance(owner, nn.Linear) else _both_ways(rows, columns)
        if stack:
            shapes.add((stack[0] * rows, columns))
        found.append(_Matrix(name, bool(stack), shapes))
    return found


def _both_ways(rows: int, columns: int) -> set[tuple[int, int]]:
    return {(rows, columns), (columns, rows)}


def _widths(matrices: list[_Matrix]) -> tuple[list[int], list[int]]:
    """The widths of input with which the module may be a gated feed-forward, or a plain one."""
    gated, plain = set(), set()
    for down in matrices:
        others = [matrix for matrix in matrices if matrix is not down]
        for dim, hidden in down.shapes:
            ups = [matrix for matrix in others if (hidden, dim) in matrix.shapes]
            fused = [matrix for matrix in others if (2 * hidden, dim) in matrix.shapes]
            if len(ups) > 1 or fused:
                gated.add(dim)
            elif ups:
                plain.add(dim)
    return sorted(gated), sorted(plain - gated)


def _identify(name: str, module: nn.Module) -> GateSite | FeedForwardSite | str | None:
    """The site, or why the module is none; None for one that does not look like it."""
    matrices = _matrices(module)
    gated, plain = _widths(matrices)
    if not gated and not plain:
        return None
    if any(parameter.is_meta for parameter in module.parameters()):
        return "its weights are on the meta device, the probe cannot run" if gated else None
    error = ""
    for dim in (*gated, *plain):
        try:
            maps = probe(module, {matrix.name: matrix.stacked for matrix in matrices}, dim)
        except Exception as failure:  # a foreign forward may raise anything: the module is no gate
            reason = [*str(failure).splitlines(), type(failure).__name__][0]
            error = error or f"the probe failed: {reason[:120]}"
            continue
        proposed = numbers(module)
        said = proposals(module)
        roles = explain_gate(maps, proposed, said) or explain_plain(maps, proposed)
        if roles is not None:
            return _site(name, module, roles, remade=roles.formula in said)
        error = "no two of its projections give the input of a third as act(gate) * up"
    return error if gated else None


def gives(site: GateSite, formula: Formula, *, training: bool) -> bool:
    """Whether the site's module, probed in that mode, makes `formula` of its own gate and up."""
    names = {matrix.name: matrix.stacked for matrix in _matrices(site.module)}
    try:
        maps = probe(site.module, names, site.gate.weight.shape[-1], training=training)
    except Exception:  # a foreign forward may raise anything
        return False
    roles = explain_gate(maps, (), (formula,))
    return roles is not None and roles.formula == formula


def _site(
    name: str, module: nn.Module, roles: Roles, *, remade: bool
) -> GateSite | FeedForwardSite:
    sources = [roles.up, roles.down] if roles.gate is None else [roles.gate, roles.up, roles.down]
    projections = [_projection(module, roles, source) for source in sources]
    called = all(projection.module is not None for projection in projections)
    seen: Seen = "hooks" if called else "inside"
    stack = projections[-1].parameter
    experts = stack.shape[0] if stack.dim() == 3 else 0
    formula = roles.formula
    up, down = projections[-2:]
    if roles.gate is None:
        return FeedForwardSite(
            *(name, module, up, down, formula.activation, seen),
            experts=experts,
            beta=formula.beta,
            alphas=formula.alphas,
        )
    return GateSite(
        *(name, module, projections[0], up, down),
        *(formula.activation, formula.up_activation, seen),
        experts=experts,
        beta=formula.beta,
        gate_limit=formula.gate_limit,
        up_limit=formula.up_limit,
        up_offset=formula.up_offset,
        weighted=formula.weighted,
        activated_limit=formula.activated_limit,
        up_beta=formula.up_beta,
        alphas=formula.alphas,
        remade=remade,
    )


def _projection(module: nn.Module, roles: Roles, source: Source) -> Projection:
    known = roles.map_of(source)
    path, _, attribute = source.name.rpartition(".")
    bias_path, _, bias = (known.bias or "").rpartition(".")
    stop = source.first + source.step * (source.size - 1) + 1
    owner = module.get_submodule(path)
    shape: tuple[int, ...] = tuple(getattr(owner, attribute).shape)
    rows = shape[-1 if source.transposed else -2] * (shape[0] if source.flat else 1)
    step = None if source.step == 1 else source.step
    whole = (source.first, stop, source.step) == (0, rows, 1)
    return Projection(
        source.name,
        owner,
        attribute,
        bias_attribute=bias or None,
        module=known.module,
        rows=slice(None) if whole else slice(source.first, stop, step),
        transposed=source.transposed,
        bias_owner=module.get_submodule(bias_path) if bias else None,
        flat=source.flat,
    )


def cast_in_force(module: nn.Module | None, operand: Operand, tensor: Tensor) -> Any:
    """How `module` casts `tensor` as that operand now (a `casting.Cast`), None if it does not say.

    The protocol is one method of that name on the layer, so that whoever measures needs to import
    no layer class.
    """
    ask: Callable[[str, Tensor], Any] | None = getattr(module, "cast_in_force", None)
    if ask is None and module is not None and te_name(module) is not None:
        return cast_in_force_of_te(module, operand, tensor)
    if ask is None and is_torchao(module):
        return cast_in_force_of_torchao(module, operand, tensor)
    return None if ask is None else ask(operand, tensor)
