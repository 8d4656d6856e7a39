"""What is measured at a feed-forward: its gate, up, product and output, and the sentinel.

`observe` shows the tensors inside the forward; each is reduced at once, on its device, and only
short vectors are kept (`recorder`). Full steps have everything; in the others the product alone is
looked at, for the sentinel: its amax against the scale in force.

How the product is cast is asked of the down layer (`sites.cast_in_force`), the same call the layer
itself makes: what is reported is what was done. A plain BF16 layer does not answer, and its
columns stay empty.

A forward that an activation checkpoint repeats inside the backward is not counted again, nor is an
evaluation: a forward without gradients. The first forward that is counted proves the site: if
act(gate) * act'(up) is not the product that was seen, the site is wrong, and it is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fp8lab import kernels
from fp8lab.casting import Cast
from fp8lab.monitor import measure
from fp8lab.monitor.recorder import (
    Kinds,
    Recorder,
    Vector,
    finite_columns,
    has_idle_core,
    local,
    merged_kind,
    quantile,
    version_of,
)
from fp8lab.sites import FeedForwardSite, GateSite, Role, cast_in_force, observe
from fp8lab.sites.gating import Formula

# Of so many channels that were hottest so far the weights are kept with every recorded step: the
# one that breaks a run was among them long before, and is seen as it was then.
SAMPLED_CHANNELS = 3
ROLES: tuple[Role, ...] = ("gate", "up", "product", "output")


_PLAIN_SILU: dict[str, Any] = {"activation": "silu", "gate_limit": None, "activated_limit": None}
_PLAIN_UP: dict[str, Any] = {"up_activation": "identity", "up_limit": None, "up_offset": 0.0}
_SILU = Formula(activation="silu")


def counts_as_training(module: nn.Module) -> bool:
    """Whether the forward that runs now belongs to the step: not repeated, not an evaluation."""
    # Private, see linear: the only way to tell a recomputed forward in both kinds of checkpointing,
    # and the first forward of use_reentrant=True, which has no gradients, from an evaluation.
    recomputed = torch._C._current_graph_task_id() != -1
    in_function = not (torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled())
    return not recomputed and (torch.is_grad_enabled() or (in_function and module.training))


def counts(module: nn.Module, recorder: Recorder) -> bool:
    """Whether the forward that runs now is recorded."""
    counted = recorder.inference or counts_as_training(module)
    recorder.passed_over = recorder.passed_over or not counted
    return counted


def how_seen(site: GateSite | FeedForwardSite) -> str:
    """Whether the product itself is seen, or computed anew from what is seen."""
    return "recomputed" if site.seen == "recomputed" else "seen"


class FeedForwardProbe:
    """What passes through one feed-forward, gated or not, as `observe` shows it."""

    def __init__(
        self,
        site: GateSite | FeedForwardSite,
        channels: int,
        recorder: Recorder,
    ) -> None:
        self.site = site
        self.was_finite = True
        self._recorder = recorder
        self._top = channels
        self._summaries: dict[Role, measure.Summary] = {}
        # Factors that need no pass of their own, or a quicker one.
        formula = site.formula if isinstance(site, GateSite) else None
        is_exact = getattr(site.module, "activation_format", None) is None
        self._gate_is_silu = is_exact and formula == replace(formula or _SILU, **_PLAIN_SILU)
        self._up_is_factor = is_exact and formula == replace(formula or _SILU, **_PLAIN_UP)
        self._weights_step = -1
        self._unproved: dict[Role, tuple[Tensor, Tensor, int]] | None = {}
        self._is_steady = False
        self._followed: dict[int, float] = {}
        self._previous_top: set[int] = set()
        self._sampled = 1
        self._first_channel: int | None = None
        self._is_refused = False

    def attach(self) -> list[Any]:
        return list(observe.attach(self.site, self))

    def wants(self, module: nn.Module, role: Role) -> bool:
        """Asked by `observe` before any work is done."""
        if self._is_refused or not counts(module, self._recorder):
            # A checkpoint's second forward is the one whose gradients come, in its older kind.
            return not self._is_refused and self._wants_gradient(role)
        return (
            role == "product"
            or self._recorder.is_due_at(self.site.name)
            or self._wants_gradient(role)
        )

    def _wants_gradient(self, role: Role) -> bool:
        return self._recorder.due(self.site.name, f"grad_{role}") is not None

    def sees(self, module: nn.Module, role: Role, tensor: Tensor) -> None:
        """Shown by `observe`, inside the forward. A measurement that fails ends the watching of
        this feed-forward and not the training."""
        try:
            self._sees(module, role, tensor)
        except Exception as error:
            self._refuse(f"{type(error).__name__}: {error}")

    def _refuse(self, reason: str) -> None:
        if self._is_refused:  # what runs beside may fail after what is here
            return
        self._is_refused = True
        self._recorder.fail(self.site.name, reason)

    def _sees(self, module: nn.Module, role: Role, tensor: Tensor) -> None:
        if self._wants_gradient(role) and tensor.requires_grad:
            self._hook_gradient(role, tensor)
        if not counts(module, self._recorder):
            return
        if role == "output" and _is_added_up(self.site.down.weight, tensor):
            self._recorder.copies.add(self.site.site(role))
        tensor = local(tensor.detach())
        if role == "output":
            self._recorder.settle()  # from now on the model may do with its tensors what it likes
        if tensor.numel() == 0:  # an expert that got no token
            return
        with torch.no_grad():
            self._measure(role, tensor)

    def _measure(self, role: Role, tensor: Tensor) -> None:
        """Now, or beside what the model does next with the tensor."""
        names = self._recorder.due(self.site.name, role) or ()
        if role == "product":
            if self._first_channel is None:
                self._first_channel = _first_row(self.site.down.weight, 1)
            how = cast_in_force(self.site.down.module, "input", tensor)
            if self._recorder.is_due_at(self.site.name):
                job = partial(self._measure_product, tensor, names, how)
            else:
                self._measure_sentinel(tensor, how)
                return
        elif self._recorder.is_due_at(self.site.name):
            job = partial(self._measure_part, role, tensor, names)
        else:
            return
        if role != "output" and not names and self._runs_beside(tensor):
            self._recorder.beside(tensor, partial(self._guarded, job), self._changed)
        else:
            self._recorder.settle()  # in order
            job()

    def _runs_beside(self, tensor: Tensor) -> bool:
        """Where an idle core has kernels for it, and the model leaves the tensor as it is until
        down has run: that, the first forward has shown."""
        is_alone = self._unproved is None and self._is_steady and self.site.seen == "hooks"
        return is_alone and kernels.usable(tensor) and has_idle_core()

    def _guarded(self, job: Callable[[], None]) -> None:
        try:
            job()
        except Exception as error:
            self._refuse(f"{type(error).__name__}: {error}")

    def _changed(self) -> None:
        """A tensor was written to while it was measured: from now on it is measured before."""
        self._is_steady = False
        reason = "a tensor was written to while it was measured, and is missing in this step"
        self._recorder.fail(self.site.name, reason)

    def _hook_gradient(self, role: Role, tensor: Tensor) -> None:
        base, name = tensor._base, f"{self.site.name}:grad_{role}"
        # What is cut out of a larger tensor to be shown is no part of the graph: what it is cut of.
        lies_alone = tensor.dim() > 1 and tensor.shape[-1] == tensor.stride(-2)
        is_whole = base is None or tensor.numel() == base.numel()
        is_live = base is None or (self.site.seen == "hooks" and (is_whole or lies_alone))
        # The hook must not hold a tensor: the graph holds the hook, and nobody would free either.
        cut: Any = None
        if base is not None and not is_live:
            place = tensor.storage_offset() - base.storage_offset()
            cut = tuple(tensor.shape), tensor.stride(), place

        def look(gradient: Tensor, names: tuple[str, ...]) -> None:
            part = gradient if cut is None else gradient.contiguous().as_strided(*cut)
            self._recorder.record(name, part, names)

        def hook(gradient: Tensor | None) -> None:
            names = self._recorder.due(self.site.name, f"grad_{role}")
            is_there = gradient is not None and gradient.numel() > 0 and not self._is_refused
            if names is not None and gradient is not None and is_there:
                self._guarded(partial(look, gradient, names))

        whole = tensor if base is None or is_live else base
        if whole.requires_grad:
            whole.register_hook(hook)  # type: ignore[no-untyped-call]
        elif tensor.grad_fn is not None:
            # A function of its own gave a view of what is in no graph: ask the function's node.
            node, number = tensor.grad_fn.next_functions[0]
            if node is not None:
                node.register_prehook(lambda gradients: hook(gradients[number]))

    def _measure_part(self, role: Role, tensor: Tensor, names: tuple[str, ...]) -> None:
        summary = self._recorder.record(self.site.site(role), tensor, names)
        if role == "output":
            self._measure_weights()
            return
        self._recorder.add(self.site.site(role), "amaxes", summary.channels)
        if isinstance(self.site, GateSite):
            self._summaries[role] = summary
            vector = self._factor(self.site, role, tensor, summary)
            self._recorder.add(self.site.site("product"), f"activated_{role}", vector)
            if self._unproved is not None:
                # An activation may work in place.
                self._unproved[role] = tensor.clone(), tensor, version_of(tensor)

    def _factor(
        self, site: GateSite, role: Role, tensor: Tensor, summary: measure.Summary
    ) -> Tensor:
        """[amax, sum of squares] of act(gate), or of act'(up)."""
        if role == "up" and self._up_is_factor:
            return measure.amax_and_power(summary)
        if role == "gate" and self._gate_is_silu and tensor.dtype == torch.float32:
            return measure.amax_and_power_of_silu(tensor)
        gate, up = site.activated(tensor, tensor)
        return measure.amax_and_power(gate if role == "gate" else up)

    def _measure_product(self, product: Tensor, names: tuple[str, ...], how: Cast | None) -> None:
        recorder, site = self._recorder, self.site.site("product")
        summary = recorder.record(site, product, names, how)
        self._add_sentinel(measure.sentinel_vector(product, how, summary))
        recorder.add(site, "channels", summary.channels)
        recorder.add(site, "tokens", summary.tokens)
        if how is not None:
            recorder.add(site, "operand", measure.operand_vector(how))
        self._summaries["product"] = summary
        if isinstance(self.site, GateSite):
            self._prove(product)

    def _measure_sentinel(self, product: Tensor, how: Cast | None) -> None:
        def job() -> None:
            self._add_sentinel(measure.sentinel_vector(product, how))

        self._recorder.settle()  # so that one product at most outlives its use
        if how is None and self._runs_beside(product):  # a scale would change when the step ends
            self._recorder.beside(product, partial(self._guarded, job), self._changed)
        else:
            job()

    def _add_sentinel(self, vector: Tensor) -> None:
        """With the channel's number in the whole product, of which a process may have a part."""
        if self._first_channel:
            vector[1] += self._first_channel
        self._recorder.add(self.site.site("product"), "sentinel", vector)

    def _prove(self, product: Tensor) -> None:
        """Once: what is recorded is what the module computed, or the site is refused."""
        seen, self._unproved = self._unproved, None
        if not seen or "gate" not in seen or "up" not in seen:
            return
        assert isinstance(self.site, GateSite)
        self._is_steady = all(version_of(tensor) == version for _, tensor, version in seen.values())
        error = observe.agrees(self.site, seen["gate"][0], seen["up"][0], product)
        if not error <= observe.tolerance(product.dtype) and product.isfinite().all():
            self._refuse(f"the product differs from act(gate) * up by {error:.1e} of its size")

    def _measure_weights(self) -> None:
        """Where the output is seen: the weights are still there, which FSDP frees after it."""
        seen, self._summaries = self._summaries, {}
        if not isinstance(self.site, GateSite) or len(seen) < 3 or self._is_refused:
            return
        gate, up, down = (
            local(projection.weight.detach())
            for projection in (self.site.gate, self.site.up, self.site.down)
        )
        if gate.dim() != 2:
            return  # of fused experts, each with weights of its own
        summary = seen["product"]
        site = self.site.name
        if self._weights_step != self._recorder.step:  # the same in all micro-batches of a step
            matrix = measure.channel_matrix(summary, seen["gate"], seen["up"], (gate, up, down))
            self._recorder.add(site, "weights", matrix[3:].flatten())
            self._weights_step = self._recorder.step
        hottest = sorted(self._followed, key=lambda c: self._followed[c])[-SAMPLED_CHANNELS:]
        sampled = measure.sampled_rows(summary, gate, up, hottest)
        self._sampled = sampled.shape[0]
        self._recorder.add(site, "sampled", sampled.flatten())

    def rows(
        self, collected: dict[str, Kinds]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Tensor rows and channel rows of the step; micro-batches are merged."""
        name = self.site.site("product")
        kinds = collected.pop(name, {})
        if self._is_refused or "sentinel" not in kinds:  # or the module did not run in this step
            for role in ROLES:
                collected.pop(self.site.site(role), None)
            collected.pop(self.site.name, None)
            return [], []
        product = self._recorder.row(name, kinds)
        if "hot_channel" in product:
            here = product["hot_channel"] - (self._first_channel or 0)
            self._follow({here: product["cur_amax"]})
        rows = [product]
        parts: dict[Role, Kinds] = {"product": kinds}
        for role in ROLES:
            site = self.site.site(role)
            if role != "product" and site in collected:
                parts[role] = collected.pop(site)
                rows.append(self._recorder.row(site, parts[role]))
        if "channels" not in kinds:
            return rows, []
        product["seen"] = how_seen(self.site)
        if "operand" in kinds:
            product |= self._recorder.casts[name]
        return rows, self._channel_rows(parts, collected.pop(self.site.name, {}), product)

    def _follow(self, amaxes: dict[int, float]) -> None:
        """Channels once hot are followed from then on: those that were ever hottest, at most
        four times the number asked for."""
        for channel, amax in amaxes.items():
            self._followed[channel] = max(amax, self._followed.get(channel, 0.0))
        while len(self._followed) > 4 * self._top:
            del self._followed[min(self._followed, key=lambda channel: self._followed[channel])]

    def _channel_rows(
        self, parts: dict[Role, Kinds], weights: Kinds, product: dict[str, Any]
    ) -> list[dict[str, Any]]:
        channels = parts["product"]["channels"]
        columns = {"product_amax": merged_kind("channels", channels)}
        for role in ("gate", "up"):
            if role in parts and "amaxes" in parts[role]:
                columns[f"{role}_amax"] = merged_kind("amaxes", parts[role]["amaxes"])
        if "weights" in weights:
            names = measure.CHANNEL_COLUMNS[3:]
            matrix = weights["weights"][-1].reshape(len(names), -1)
            columns |= dict(zip(names, matrix, strict=True))
        amax = np.nan_to_num(columns["product_amax"], nan=-1.0, posinf=np.finfo(np.float64).max)
        top = {int(channel) for channel in np.argsort(amax)[::-1][: self._top]}
        if self._previous_top:
            product["persistence"] = len(top & self._previous_top) / len(top)
        self._previous_top = top
        self._follow({channel: float(amax[channel]) for channel in top})
        median = float(quantile(np.sort(amax), 0.5))
        sampled = self._sampled_weights(channels, weights)
        wanted = sorted(top | self._followed.keys())
        known, stacked = tuple(columns), np.stack([columns[n][wanted] for n in columns], axis=1)
        rows = []
        for channel, values in zip(wanted, stacked, strict=True):
            row: dict[str, Any] = {
                "site": self.site.name,
                "channel": channel + (self._first_channel or 0),
            }
            row |= finite_columns(known, values)
            if median > 0 and "product_amax" in row:
                row["channel_ratio"] = row["product_amax"] / median
            if channel in sampled:
                row["gate_weights"], row["up_weights"] = sampled[channel]
            rows.append(row)
        return rows

    def _sampled_weights(self, channels: list[Vector], weights: Kinds) -> dict[int, Vector]:
        """Weights [2, n] of gate and up, of the hottest channel and of those followed, from the
        micro-batch in which the product peaked."""
        if "sampled" not in weights:
            return {}
        hottest = int(np.argmax([amaxes.max() for amaxes in channels]))
        rows = weights["sampled"][hottest].reshape(self._sampled, -1)
        return {int(row[0]): row[1:].reshape(2, -1) for row in rows}


def _is_added_up(weight: Tensor, output: Tensor) -> bool:
    """Whether tensor parallelism has made an output whole that another process has as well."""
    if hasattr(output, "placements") or not hasattr(weight, "placements"):
        return False
    coordinate = weight.device_mesh.get_coordinate() or ()  # type: ignore[attr-defined]
    places = zip(coordinate, weight.placements, strict=False)
    return any(index > 0 and placement.is_shard(1) for index, placement in places)


def _first_row(weight: Tensor, dim: int) -> int:
    """Where this process's part of a weight begins along `dim`: 0 but for a sharded DTensor."""
    if not hasattr(weight, "placements"):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    where: Any = weight
    _, offset = compute_local_shape_and_global_offset(
        where.shape, where.device_mesh, where.placements
    )
    return int(offset[dim])
