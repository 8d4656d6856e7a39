"""The casts of a run's forward operands, as the rules on scales read them.

One row a step and site, of inputs, weights and gate products. Where a product is also recorded as
the input of down, only the product's row stays: it knows more. Added to each row:

    cold        the scale is 1 because nothing has been measured yet, at the start or once more
    depth       where in the forward pass the site lies, as far as the order of the rows tells
    by_token    in this step a product's largest token stands out as it does not otherwise

The scale of 1 is told from one that happens to be 1 by what was before: nothing, or a scale that is
no power of two. Operands are recorded in the order in which they run, and a product stands where
down's input stood; without operands the order is that of the products.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from fp8lab.diagnosis.rows import Rows, once
from fp8lab.record import CLIPPED_STALENESS
from fp8lab.runs import hottest

_COLUMNS = (
    *("cur_amax", "hot_channel", "scale", "staleness", "flushed", "subnormal", "sqnr_db"),
    *("bulk_error", "token_ratio", "channel_ratio"),
)
_SITES = ("*:product", "*:input", "*:weight")

# How much larger than usual (its median) a product's ratio of the largest token to the median one
# is where a jump is one token's. A batch that is larger as a whole leaves the ratio as it is; in
# the rare-token training the clipped steps have 4 to 100 times the usual ratio.
ONE_TOKEN = 3.0


@once
def forward_casts(run: Rows) -> pd.DataFrame:
    """The rows, sorted by step; those that say nothing of a cast are left out."""
    rows = hottest(run.tensors(_COLUMNS, sites=_SITES))
    rows = rows[rows["staleness"].notna() | rows["flushed"].notna()]
    order = {str(site): index for index, site in enumerate(rows["site"].unique())}
    for product, copy in _copies(rows).items():
        order[product] = order.pop(copy)
    if len(order) < rows["site"].nunique():
        rows = rows[rows["site"].isin(list(order))]
    return rows.assign(
        depth=rows["site"].map(order).astype("int64"),
        cold=_cold(rows),
        by_token=rows["step"].isin(_steps_of_one_token(rows)),
    )


def clipped(rows: pd.DataFrame) -> pd.DataFrame:
    """Those of `forward_casts` whose delayed scale is that of less than half of the amax."""
    return rows[(rows["staleness"] > CLIPPED_STALENESS) & ~rows["cold"]]


def comes_from_input(products: pd.DataFrame, rows: pd.DataFrame) -> pd.Series:
    """Of clipped products, whether an input that runs before jumps in the same step as well.

    A product is quadratic in what goes in: an input whose staleness is at least the root of the
    product's accounts for it.
    """
    return _accounted_for(products, rows[rows["site"].str.endswith(":input")])


def follows_product(inputs: pd.DataFrame, rows: pd.DataFrame) -> pd.Series:
    """Of clipped inputs, whether a product that runs before jumps in the same step by at least
    the root of as much: a residual stream dilutes it."""
    return _accounted_for(inputs, rows[rows["site"].str.endswith(":product")])


def _accounted_for(jumps: pd.DataFrame, rows: pd.DataFrame) -> pd.Series:
    before = rows.loc[rows["staleness"].notna() & ~rows["cold"], ["step", "staleness", "depth"]]
    before = before[before["step"].isin(jumps["step"])]
    jumps = jumps[["step", "staleness", "depth"]]
    pairs = jumps.reset_index().merge(before, on="step", suffixes=("", "_before"))
    accounts = (pairs["depth_before"] < pairs["depth"]) & (
        pairs["staleness_before"] >= pairs["staleness"] ** 0.5
    )
    return pd.Series(jumps.index.isin(pairs.loc[accounts, "index"]), index=jumps.index)


def _copies(rows: pd.DataFrame) -> dict[str, str]:
    """Product -> the input that is the same tensor, the last if several are like it."""
    by_site = rows.groupby("site", sort=False, observed=True)
    amaxes = {str(site): of.set_index("step")["cur_amax"] for site, of in by_site}
    found: dict[str, str] = {}
    for site in amaxes:
        if site.endswith(":product"):
            inside = site.removesuffix("product").replace(":", ".")
            for other in amaxes:
                if other.startswith(inside) and other.endswith(":input"):
                    both = pd.concat([amaxes[site], amaxes[other]], axis=1, join="inner")
                    if len(both) and both.iloc[:, 0].eq(both.iloc[:, 1]).all():
                        found[site] = other
    return found


def _cold(rows: pd.DataFrame) -> pd.Series:
    ordered = rows[["site", "step", "scale", "staleness"]]
    ordered = ordered.sort_values(["site", "step"], kind="stable")
    is_one = ordered["scale"].eq(1.0) & ordered["staleness"].notna()
    before = ordered.groupby("site", observed=True)["scale"].shift()
    starts = is_one & ~(before.notna() & np.frexp(before.fillna(1.0))[0].eq(0.5))
    # A run of ones is cold as a whole, if its first is.
    runs = (~is_one | starts).cumsum()
    cold: pd.Series = is_one & starts.groupby(runs).transform("any")
    return cold.reindex(rows.index)


def _steps_of_one_token(rows: pd.DataFrame) -> list[int]:
    products = rows[rows["site"].str.endswith(":product") & rows["flushed"].notna()]
    usual = products.groupby("site", observed=True)["token_ratio"].transform("median")
    # Where it is missing as an exception, the median token is zero: the others are gone already.
    stands_out = (products["token_ratio"] >= ONE_TOKEN * usual) | (
        products["token_ratio"].isna() & usual.notna()
    )
    return products.loc[stands_out, "step"].tolist()
