"""Feed-forwards in a checkpoint, by the names and shapes of its tensors alone.

Where a model can be run, `sites` proves which matrix is which; here there is only a file. So a
table has the names by which libraries call their projections, and the shapes have to agree: what is
called w2 is down in Llama's own checkpoints and up in xformers', and its shape tells. What neither
tells is said in the layout's `note`: which half of a fused matrix is gate, or whether gate and up
alternate. Alignment, norms of pairs and gains are the same with gate and up exchanged; with halves
taken for alternating rows they are those of wrong pairs.

Experts of one layer are one layout, whether a file has a tensor for each or all in one. Rejected:
building the model from its configuration, which needs its code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A projection [out, in] of one expert (or of a dense layer): where it lies in which tensor.

    `expert` is the index in a stack, None where the tensor is no stack. `flat` joins the first two
    axes of what is left, `transposed` exchanges the last two, then `rows` are taken.
    """

    tensor: str
    expert: int | None = None
    flat: bool = False
    transposed: bool = False
    rows: slice = field(default_factory=lambda: slice(None))

    def of(self, tensor: Tensor) -> Tensor:
        """A view [out, in] of the whole tensor."""
        if self.expert is not None:
            tensor = tensor[self.expert]
        if self.flat:
            tensor = tensor.flatten(0, 1)
        return (tensor.transpose(-2, -1) if self.transposed else tensor)[self.rows]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A feed-forward: a part for each expert, one where it is dense; `gate` is empty in one without
    a gate. `note` says what names and shapes leave open."""

    site: str
    gate: tuple[Part, ...]
    up: tuple[Part, ...]
    down: tuple[Part, ...]
    experts: int = 0
    note: str = ""

    @property
    def tensors(self) -> set[str]:
        """The names of its tensors."""
        return {part.tensor for part in (*self.gate, *self.up, *self.down)}


# gate, up, down
_APART = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),  # Meta, torchtitan, OLMo-core, Mixtral
    ("w1", "w2", "w3"),  # xformers unpacked
    ("w1_EFD", "w3_EFD", "w2_EDF"),
    ("fc_1", "fc_2", "proj"),  # litgpt
    ("wi_0", "wi_1", "wo"),  # T5
    ("gate", "up", "down"),
)
# gate and up in one; down
_FUSED = (
    ("gate_up_proj", "down_proj"),
    ("w13", "w2"),
    ("w12", "w3"),
    ("linear_fc1", "linear_fc2"),  # Megatron
    ("fc1", "fc2"),  # Transformer Engine
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("gate_up", "down"),
)
# up, down
_PLAIN = (
    ("up_proj", "down_proj"),
    ("linear_fc1", "linear_fc2"),
    ("fc1", "fc2"),
    ("fc_in", "fc_out"),
    ("c_fc", "c_proj"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("wi", "wo"),
    ("up", "down"),
)
_EXPERT = re.compile(r"^(.*experts?[^.]*)\.(\d+)$")
_NUMBERED = re.compile(r"^(.*)\.weight(\d+)$")

HALVES = "gate taken for the first half of {}; exchanged, all but the names of the two is the same"
ALTERNATE = "gate and up taken to alternate in {}"
SQUARE = "{} is square: down taken by its name"


class _Leaf(NamedTuple):
    tensor: str
    shape: Shape


def find_layouts(
    shapes: Mapping[str, Shape], config: Mapping[str, Any] | None = None
) -> list[Layout]:
    """Every feed-forward among tensors of these names and shapes, in their order.

    `config` is a model's config.json, if there is one: of GPT-OSS gate and up alternate.
    """
    groups: dict[str, dict[int | None, dict[str, _Leaf]]] = {}
    for name, shape in shapes.items():
        site, expert, leaf = _split(name)
        if len(shape) in (2, 3) and 0 not in shape:
            groups.setdefault(site, {}).setdefault(expert, {})[leaf] = _Leaf(name, shape)
    found = []
    for site, experts in groups.items():
        alternate = f"{site}.gate_up_proj_bias" in shapes
        alternate |= str((config or {}).get("model_type", "")).startswith("gpt_oss")
        layout = _layout(site, experts, alternate)
        if layout is not None:
            found.append(layout)
    return found


def _split(name: str) -> tuple[str, int | None, str]:
    """Site, expert and leaf: layers.0.experts.3.up_proj.weight → layers.0.experts, 3, up_proj."""
    expert = None
    if numbered := _NUMBERED.match(name):
        name, expert = numbered[1], int(numbered[2])
    else:
        name = name.removesuffix(".weight").removesuffix("_weight")
    site, _, leaf = name.rpartition(".")
    if expert is None and (of_expert := _EXPERT.match(site)):
        site, expert = of_expert[1], int(of_expert[2])
    return site or ".", expert, leaf


def _layout(
    site: str, experts: Mapping[int | None, Mapping[str, _Leaf]], alternate: bool
) -> Layout | None:
    numbered = sorted(experts.items(), key=_by_number)
    found = [one for _, leaves in numbered if (one := _parts(leaves, alternate)) is not None]
    if not found or len({bool(one.gate) for one in found}) > 1:
        return None
    gate = tuple(part for one in found for part in one.gate)
    up = tuple(part for one in found for part in one.up)
    down = tuple(part for one in found for part in one.down)
    experts_of = len(down) if down[0].expert is not None or None not in experts else 0
    note = found[0].note
    return Layout(site=site, gate=gate, up=up, down=down, experts=experts_of, note=note)


def _by_number(item: tuple[int | None, object]) -> int:
    return -1 if item[0] is None else item[0]


class _Found(NamedTuple):
    gate: list[Part]
    up: list[Part]
    down: list[Part]
    note: str


def _parts(leaves: Mapping[str, _Leaf], alternate: bool) -> _Found | None:
    for gate, up, down in _APART:
        if {gate, up, down} <= leaves.keys():
            found = _apart(leaves[gate], leaves[up], leaves[down])
            if found is not None:
                return found
    for fused, down in _FUSED:
        if {fused, down} <= leaves.keys():
            found = _fused(leaves[fused], leaves[down], alternate)
            if found is not None:
                return found
    for up, down in _PLAIN:
        if {up, down} <= leaves.keys():
            found = _plain(leaves[up], leaves[down], transposed=up == "c_fc")
            if found is not None:
                return found
    return None


def _apart(gate: _Leaf, up: _Leaf, down: _Leaf) -> _Found | None:
    if gate.shape != up.shape or len(gate.shape) != len(down.shape):
        return None
    if gate.shape[:-2] != down.shape[:-2]:
        return None
    as_stored = gate.shape[-2:] == down.shape[:-3:-1]
    if not as_stored and gate.shape[-2:] != down.shape[-2:]:
        return None  # else down is [hidden, dim], as einsum may take it
    unsure = gate.shape[-1] == gate.shape[-2] and re.search(r"\bw[23]\b", down.tensor)
    note = SQUARE.format(down.tensor) if unsure else ""
    downs = _experts(down, transposed=not as_stored)
    return _Found([*_experts(gate)], [*_experts(up)], [*downs], note)


def _fused(fused: _Leaf, down: _Leaf, alternate: bool) -> _Found | None:
    out, width = down.shape[-2:]
    if len(fused.shape) == 3 and len(down.shape) == 2:
        if fused.shape != (width, 2, out):
            return None
        halves = slice(0, None, 2), slice(1, None, 2)
        gate, up = (Part(tensor=fused.tensor, flat=True, rows=rows) for rows in halves)
        return _Found([gate], [up], [Part(tensor=down.tensor)], ALTERNATE.format(fused.tensor))
    if len(fused.shape) != len(down.shape) or fused.shape[:-2] != down.shape[:-2]:
        return None
    if fused.shape[-2:] == (2 * width, out):
        transposed, hidden = False, width
    elif fused.shape[-2:] == (width, 2 * out):
        transposed, hidden = True, out
    else:
        return None
    halves = slice(0, hidden), slice(hidden, None)
    if alternate:
        halves = slice(0, None, 2), slice(1, None, 2)
    gates, ups = ([*_experts(fused, transposed, rows)] for rows in halves)
    note = (ALTERNATE if alternate else HALVES).format(fused.tensor)
    return _Found(gates, ups, [*_experts(down, transposed)], note)


def _plain(up: _Leaf, down: _Leaf, transposed: bool) -> _Found | None:
    if len(up.shape) != len(down.shape) or up.shape[:-2] != down.shape[:-2]:
        return None
    if up.shape[-2:] != down.shape[:-3:-1]:
        return None
    # GPT-2 stores [in, out], and the hidden layer is the wider one.
    transposed = transposed and up.shape[-2] < up.shape[-1]
    return _Found([], [*_experts(up, transposed)], [*_experts(down, transposed)], "no gate")


def _experts(leaf: _Leaf, transposed: bool = False, rows: slice = slice(None)) -> Iterator[Part]:
    if len(leaf.shape) == 2:
        yield Part(tensor=leaf.tensor, transposed=transposed, rows=rows)
        return
    for expert in range(leaf.shape[0]):
        yield Part(tensor=leaf.tensor, expert=expert, transposed=transposed, rows=rows)
