"""The hooks behind `watch`: what they see of one gated feed-forward, and of the optimizer.

A probe measures inside its hooks, on the tensor's device, and holds the short vectors until the
step ends; then it turns the same vectors, now on the host, into row columns. Micro-batches merge
there: counts and sums add up, extremes are extremes, a ratio is the largest one met.

How the product is cast is asked of the down layer (`sites.cast_in_force`), the same call the layer
itself makes: what is reported is what was done. A plain BF16 layer does not answer, and its
columns stay empty.

A forward that an activation checkpoint repeats inside the backward is not counted again, nor is an
evaluation: a forward without gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fp8lab import measure
from fp8lab.sites import GateSite, Role, cast_in_force
from fp8lab.sketch import Sketch

Vector = NDArray[np.float64]

# Of so many channels that were hottest so far the weights are kept with every recorded step: the
# one that breaks a run was among them long before, and is seen as it was then.
SAMPLED_CHANNELS = 3


def _counts_as_training(module: nn.Module) -> bool:
    # Private, see linear: the only way to tell a recomputed forward in both kinds of checkpointing,
    # and the first forward of use_reentrant=True, which has no gradients, from an evaluation.
    recomputed = torch._C._current_graph_task_id() != -1
    in_function = not (torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled())
    return not recomputed and (torch.is_grad_enabled() or (in_function and module.training))


class GateProbe:
    """The hooks of one gated feed-forward, and what they measured since the last step."""

    def __init__(self, site: GateSite, channels: int, records_now: Callable[[], bool]) -> None:
        self.site = site
        self.was_finite = True
        self._top = channels
        self._records_now = records_now
        self._outputs: dict[str, Tensor] = {}
        self._measured: list[tuple[str, Tensor]] = []
        self._cast: dict[str, str] = {}
        self._followed: dict[int, float] = {}
        self._sampled = 1
        self._previous_top: set[int] = set()

    def attach(self) -> list[Any]:
        site = self.site
        gate, up, down = site.gate.module, site.up.module, site.down.module
        if gate is None or up is None or down is None:
            return [site.module.register_forward_hook(self._ended, with_kwargs=True)]
        return [
            gate.register_forward_hook(self._keep("gate")),
            up.register_forward_hook(self._keep("up")),
            down.register_forward_pre_hook(self._product_ready, with_kwargs=True),
            down.register_forward_hook(self._output_ready),
        ]

    def _keep(self, role: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if self._records_now() and _counts_as_training(module):
                self._outputs[role] = output.detach().clone()  # an activation may work in place

        return hook

    def _product_ready(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if _counts_as_training(module):
            product: Tensor = (*args, *kwargs.values())[0]
            gate, up = self._outputs.pop("gate", None), self._outputs.pop("up", None)
            self._measure(product.detach(), gate, up)

    def _output_ready(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self._records_now() and _counts_as_training(module):
            self._measured.append(("output", measure.sketch_vector(output)))

    def _ended(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if _counts_as_training(module):
            self._recompute((*args, *kwargs.values())[0])

    @torch.no_grad()
    def _recompute(self, input: Tensor) -> None:
        """The projections are never called: what they computed is computed again."""
        gate, up = self.site.gate(input), self.site.up(input)
        activated_gate, activated_up = self.site.activated(gate, up)
        product = activated_gate * activated_up
        if self._records_now():
            self._measure(product, gate, up)
            self._measured.append(("output", measure.sketch_vector(self.site.down(product))))
        else:
            self._measure(product, None, None)

    @torch.no_grad()
    def _measure(self, product: Tensor, gate: Tensor | None, up: Tensor | None) -> None:
        if product.numel() == 0:  # an expert that got no token
            return
        how = cast_in_force(self.site.down.module, "input", product)
        add = self._measured.append
        add(("sentinel", measure.sentinel_vector(product, how)))
        if gate is None or up is None:
            return
        for role, tensor in (("gate", gate), ("up", up), ("product", product)):
            add((role, measure.sketch_vector(tensor)))
        add(("structure", measure.structure_vector(product)))
        activated = self.site.activated(gate, up)
        add(("amplification", measure.gate_vector(product, *activated)))
        if how is not None:
            self._cast = {"recipe": type(how.recipe).__name__, "format": how.format.name}
            add(("operand", measure.operand_vector(how)))
        gate_weight, up_weight = self.site.gate.weight, self.site.up.weight
        weights = gate_weight, up_weight, self.site.down.weight
        add(("channels", measure.channel_matrix(product, gate, up, weights)))
        hottest_ever = sorted(self._followed, key=lambda c: self._followed[c])[-SAMPLED_CHANNELS:]
        self._sampled = 1 + len(hottest_ever)
        add(("weights", measure.sampled_rows(product, gate_weight, up_weight, hottest_ever)))

    def vectors(self) -> list[Tensor]:
        """What was measured since the last call of `rows`."""
        return [vector for _, vector in self._measured]

    @property
    def count(self) -> int:
        return len(self._measured)

    def rows(self, values: list[Vector]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Tensor rows and channel rows of the step; micro-batches are merged."""
        kinds: dict[str, list[Vector]] = {}
        for (kind, _), value in zip(self._measured, values, strict=True):
            kinds.setdefault(kind, []).append(value)
        self._measured.clear()
        if "sentinel" not in kinds:  # the module did not run in this step
            return [], []
        product = self._sentinel_row(np.stack(kinds["sentinel"]))
        rows = [product]
        roles: tuple[Role, ...] = ("gate", "up", "product", "output")
        for role in roles:
            if role in kinds:
                sketch = Sketch.from_vector(kinds[role][0])
                for other in kinds[role][1:]:
                    sketch = sketch.merge(Sketch.from_vector(other))
                statistics = sketch.statistics()
                if role == "product":
                    product |= statistics
                else:
                    rows.append({"site": self.site.site(role)} | statistics)
        if "structure" not in kinds:
            return rows, []
        for kind, columns in (
            ("structure", measure.STRUCTURE_COLUMNS),
            ("amplification", measure.GATE_COLUMNS),
        ):
            product |= _finite_columns(columns, np.fmax.reduce(kinds[kind]))
        if "operand" in kinds:
            product |= self._cast | measure.operand_statistics(np.sum(kinds["operand"], axis=0))
        matrices = [v.reshape(len(measure.CHANNEL_COLUMNS), -1) for v in kinds["channels"]]
        hottest = int(np.argmax([matrix[0].max() for matrix in matrices]))
        sampled = kinds["weights"][hottest].reshape(self._sampled, -1)
        return rows, self._channel_rows(matrices, sampled, product)

    def _sentinel_row(self, sentinels: Vector) -> dict[str, Any]:
        amax, channel, scale, staleness = sentinels.T
        row: dict[str, Any] = {"site": self.site.site("product")}
        row["nonfinite"] = not np.isfinite(amax).all()
        if not row["nonfinite"]:
            row["cur_amax"] = float(amax.max())
            row["hot_channel"] = int(channel[amax.argmax()])
            self._follow({row["hot_channel"]: row["cur_amax"]})
        if np.isfinite(scale[-1]):
            row["scale"] = float(scale[-1])
        if np.isfinite(staleness).all():
            row["staleness"] = float(staleness.max())
        return row

    def _follow(self, amaxes: dict[int, float]) -> None:
        """Channels once hot are followed from then on: those that were ever hottest, at most
        four times the number asked for."""
        for channel, amax in amaxes.items():
            self._followed[channel] = max(amax, self._followed.get(channel, 0.0))
        while len(self._followed) > 4 * self._top:
            del self._followed[min(self._followed, key=lambda channel: self._followed[channel])]

    def _channel_rows(
        self, matrices: list[Vector], sampled: Vector, product: dict[str, Any]
    ) -> list[dict[str, Any]]:
        merged = np.concatenate([np.max([m[:3] for m in matrices], axis=0), matrices[-1][3:]])
        amax = np.nan_to_num(merged[0], nan=-1.0, posinf=np.finfo(np.float64).max)
        top = {int(channel) for channel in np.argsort(amax)[::-1][: self._top]}
        if self._previous_top:
            product["persistence"] = len(top & self._previous_top) / len(top)
        self._previous_top = top
        self._follow({channel: float(amax[channel]) for channel in top})
        median = float(np.median(amax))
        weights = {int(row[0]): row[1:] for row in sampled}
        rows = []
        for channel in sorted(top | self._followed.keys()):
            row: dict[str, Any] = {"site": self.site.name, "channel": channel}
            row |= _finite_columns(measure.CHANNEL_COLUMNS, merged[:, channel])
            if median > 0 and "product_amax" in row:
                row["channel_ratio"] = row["product_amax"] / median
            if channel in weights:
                row["gate_weights"], row["up_weights"] = np.split(weights[channel], 2)
            rows.append(row)
        return rows


def _finite_columns(names: tuple[str, ...], values: Vector) -> dict[str, Any]:
    pairs = zip(names, values, strict=True)
    return {name: float(value) for name, value in pairs if np.isfinite(value)}


class OutputProbe:
    """The largest magnitude of what the model returns: of its logits, in a language model.

    Looks at a tensor, or at the `logits` of an output that has them; anything else is passed over.
    """

    def __init__(self, model: nn.Module, records_now: Callable[[], bool]) -> None:
        self._model = model
        self._records_now = records_now
        self._peaks: list[Tensor] = []

    def attach(self) -> list[Any]:
        return [self._model.register_forward_hook(self._returned)]

    def _returned(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._records_now() and _counts_as_training(module):
            logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
            if isinstance(logits, Tensor) and logits.is_floating_point() and logits.numel():
                self._peaks.append(logits.detach().abs().amax().double())

    @property
    def count(self) -> int:
        return len(self._peaks)

    def vectors(self) -> list[Tensor]:
        return [peak.reshape(1) for peak in self._peaks]

    def row(self, values: list[Vector]) -> dict[str, Any]:
        self._peaks.clear()
        return {"logit_max": float(np.max(values))} if values else {}


class OptimizerProbe:
    """Reads the optimizer around its step. Sources: RMS_t is StableAdamW's (2304.13013)."""

    def __init__(self, optimizer: torch.optim.Optimizer, records_now: Callable[[], bool]) -> None:
        self._optimizer = optimizer
        self._records_now = records_now
        self._before: list[tuple[nn.Parameter, Tensor]] = []
        self._rms: list[Tensor | None] = []
        self._measured: dict[str, Tensor] = {}
        self._learning_rate: float | None = None

    def attach(self) -> list[Any]:
        return [
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        ]

    def _parameters(self) -> list[nn.Parameter]:
        groups = self._optimizer.param_groups
        return [p for group in groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def _before_step(self, *_: Any) -> None:
        parameters = self._parameters()
        self._measured.clear()
        self._learning_rate = float(self._optimizer.param_groups[0]["lr"])
        if parameters:
            gradients = [p.grad for p in parameters if p.grad is not None]
            self._measured["grad_norm"] = _l2_norm(gradients)
        if self._records_now():
            self._before = [(p, p.detach().clone()) for p in parameters]
            groups = self._optimizer.param_groups
            self._rms = [self._rms_of_stored(p, g) for g in groups for p in g["params"]]

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        if not self._before:
            return
        changes = _l2_norm(p.double() - before for p, before in self._before)
        self._measured["update_ratio"] = changes / _l2_norm(before for _, before in self._before)
        self._before = []
        groups = self._optimizer.param_groups
        rms = [_rms_t(p, self._optimizer.state.get(p, {}), g) for g in groups for p in g["params"]]
        known = [value for value in self._rms + rms if value is not None]
        if known:
            self._measured["rms_t"] = _on_one_device(known).amax()

    def _rms_of_stored(self, parameter: nn.Parameter, group: dict[str, Any]) -> Tensor | None:
        """RMS_t of a second moment that is stored in FP8: what the step is about to use, and not
        what will be left of it, where a small one is zero and RMS_t would be a million."""
        state = self._optimizer.state.get(parameter, {})
        read = getattr(self._optimizer, "moments", None)
        if read is None or "exp_avg_sq" in state or parameter.grad is None:
            return None
        beta, squares = group["betas"][1], parameter.grad.double().square()
        before = read(parameter)[1].double() if state else torch.zeros_like(squares)
        moment = beta * before + (1.0 - beta) * squares
        return _rms_t(
            parameter, {"exp_avg_sq": moment, "step": state["step"] + 1 if state else 1}, group
        )

    @property
    def count(self) -> int:
        return len(self._measured)

    def vectors(self) -> list[Tensor]:
        return [value.reshape(1) for value in self._measured.values()]

    def row(self, values: list[Vector]) -> dict[str, Any]:
        row: dict[str, Any] = {"learning_rate": self._learning_rate}
        for name, value in zip(self._measured, values, strict=True):
            row[name] = float(value[0])
        self._measured.clear()
        self._learning_rate = None
        return row


def _rms_t(parameter: nn.Parameter, state: Any, group: dict[str, Any]) -> Tensor | None:
    # Adafactor, too, has an exp_avg_sq, but no beta to correct it with.
    if "exp_avg_sq" not in state or "betas" not in group or parameter.grad is None:
        return None
    # A fused optimizer counts its steps on the device: converting to a float would wait for it.
    steps = torch.as_tensor(state["step"], dtype=torch.float64)
    second_moment = state["exp_avg_sq"].double() / (1.0 - group["betas"][1] ** steps)
    floor = second_moment.clamp(min=group["eps"] ** 2)
    rms: Tensor = (parameter.grad.double().square() / floor).mean().sqrt()
    return rms


def _l2_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Of all tensors together, in float64: BF16 gradients' norm in BF16 has two digits."""
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]
    norm: Tensor = torch.linalg.vector_norm(_on_one_device(norms))
    return norm


def _on_one_device(scalars: list[Tensor]) -> Tensor:
    return torch.stack([scalar.to(scalars[0].device) for scalar in scalars])
