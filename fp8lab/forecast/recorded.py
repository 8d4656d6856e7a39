"""What a run has recorded of the tensors that are operands: its layers, their sites, its rows.

Which layer a tensor goes into is told by run.json: its linear layers, and the gate, up and down of
its feed-forwards. A down projection's input is the product of its feed-forward, and may have been
recorded as both: then it is one tensor, called the product, with what either row says of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from glob import escape

import pandas as pd

from fp8lab.runs import Run

PATTERNS = ("*:product", "*:grad_gate", "*:grad_up", "*:grad_output", "*:input", "*:weight")
KEYS = ["step", "rank", "site"]


def layers_of_feed_forwards(run: Run) -> dict[str, dict[str, str]]:
    """Feed-forward → gate, up and down → the layer's name; run.json may be anybody's."""
    told = run.info.get("sites")
    layers: dict[str, dict[str, str]] = {}
    for one in told if isinstance(told, list) else []:
        name = one.get("site") if isinstance(one, dict) else None
        if isinstance(name, str):
            parts = {part: one.get(part) for part in ("gate", "up", "down")}
            layers[name] = {
                part: joined(name, str(parameter or part).removesuffix("weight").rstrip("."))
                for part, parameter in parts.items()
            }
    return layers


def layers_of(run: Run) -> list[str]:
    """The layers that a plan may be about: the run's linear layers and its feed-forwards' own.
    Empty where a run is so old that it does not list the former."""
    linears = run.info.get("linears")
    if not isinstance(linears, dict) or not linears:
        return []
    own = (layer for parts in layers_of_feed_forwards(run).values() for layer in parts.values())
    return list(dict.fromkeys([*map(str, linears), *own]))


def low_casts(run: Run) -> dict[tuple[str, str], str]:
    """(Layer, operand) -> its cast, of those to less than 16 bits, as the run's layers say."""
    layers = run.info.get("precision")
    told = layers.items() if isinstance(layers, dict) else ()
    return {
        (str(layer), str(use).partition("@")[0]): str(cast)
        for layer, casts in told
        for use, cast in (casts.items() if isinstance(casts, dict) else ())
        if not str(cast).startswith(("BF16", "FP16", "FP32"))
    }


def is_watchable(run: Run, layer: str) -> bool:
    """Whether it is a module: of fused experts, and of what runs inside of TE's LayerNormMLP,
    nothing can be asked."""
    linears = run.info.get("linears")
    known = linears if isinstance(linears, dict) else {layer: None}
    return layer in known and "LayerNormMLP" not in str(known[layer])


def joined(module: str, part: str) -> str:
    return f"{'' if module == '.' else module}.{part}".strip(".")


def recorded_sites(run: Run) -> list[str]:
    """The tensors with rows that may be operands, in order."""
    return sorted(set(run.tensors("site", sites=PATTERNS)["site"].dropna()))


def same_as(run: Run, sites: Collection[str]) -> dict[str, str]:
    """Of sites those whose tensor is another's too, and which: of a down projection its input is
    the product, unless a mitigation stands between them, which their amaxes tell."""
    layers = layers_of_feed_forwards(run)
    pairs = {
        f"{names['down']}:input": f"{module}:product"
        for module, names in layers.items()
        if {f"{names['down']}:input", f"{module}:product"} <= {*sites}
    }
    if not pairs:
        return {}
    rows = run.tensors(("cur_amax",), sites=[escape(one) for pair in pairs.items() for one in pair])
    amaxes = rows.drop_duplicates(KEYS, keep="last").pivot(
        index=["step", "rank"], columns="site", values="cur_amax"
    )
    both = {one: amaxes[[one, other]].dropna().to_numpy() for one, other in pairs.items()}
    return {
        one: pairs[one]
        for one, pair in both.items()
        if len(pair) and (pair[:, 0] == pair[:, 1]).all()  # no difference: of infinities it is NaN
    }


def one_each(rows: pd.DataFrame, same: Mapping[str, str]) -> pd.DataFrame:
    """The last row of each step, process and tensor: what one name of a tensor lacks, from the
    other's."""
    rows = rows.drop_duplicates(KEYS, keep="last")
    if not same:
        return rows
    twice = rows["site"].isin([*same, *same.values()])
    merged = rows[twice].assign(site=rows.loc[twice, "site"].replace(dict(same)))
    once = merged.groupby(KEYS, sort=False, as_index=False).first()
    both: pd.DataFrame = pd.concat([rows[~twice], once], ignore_index=True)
    return both.sort_values("step", kind="stable", ignore_index=True)
