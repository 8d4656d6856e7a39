"""The neck of the hourglass: what a run consists of, as plain typed rows.

Everything that watches writes these rows and everything that judges reads them; nothing else passes
between the two. A number that was not measured is missing (null), never zero. Each column says its
unit and meaning, once, here; the schemas carry them into the files.

Rejected: one narrow table of (step, site, statistic, value). Reading one statistic of a run is
the common case, and a column store does that for nothing when a statistic is a column.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import pyarrow as pa

SCHEMA_VERSION = 3


class Column(NamedTuple):
    """A column of a table: Arrow type, unit ("" for a pure number) and meaning."""

    name: str
    type: pa.DataType
    unit: str
    meaning: str


_WHERE = (
    Column("step", pa.int64(), "steps", "training step, as the caller counts"),
    Column("rank", pa.int32(), "", "process that recorded the row; -1: all processes together"),
)
_F64, _I64, _TEXT = pa.float64(), pa.int64(), pa.string()

STEPS = (
    *_WHERE,
    Column("loss", _F64, "", "as given to watch.step"),
    Column("learning_rate", _F64, "", "of the first parameter group, at the optimizer's step"),
    Column(
        "grad_norm",
        _F64,
        "",
        "l2 norm of all gradients as the optimizer gets them: clipped, if they are",
    ),
    Column("update_ratio", _F64, "", "l2 norm of the update / l2 norm of the parameters"),
    Column("rms_t", _F64, "", "largest over tensors: sqrt(mean(g^2 / max(v, eps^2))), Adam only"),
    Column("logit_max", _F64, "", "largest magnitude of the model's output"),
    Column("seconds", _F64, "s", "since the previous step"),
    Column("metrics", pa.map_(_TEXT, _F64), "", "further numbers given to watch.step"),
)

TENSORS = (
    *_WHERE,
    Column("site", _TEXT, "", "module:role, such as layers.3.mlp:product"),
    Column("count", _I64, "elements", "elements seen in the step"),
    Column("zeros", _I64, "elements", "exact zeros"),
    Column("nans", _I64, "elements", "not-a-number"),
    Column("infs", _I64, "elements", "infinite"),
    Column("cur_amax", _F64, "", "largest magnitude"),
    Column("min", _F64, "", "smallest finite value"),
    Column("max", _F64, "", "largest finite value"),
    Column("mean", _F64, "", "of the finite elements"),
    Column("std", _F64, "", "of the finite elements, divisor n - 1 as in Transformer Engine"),
    Column("l1_norm", _F64, "", "sum of magnitudes"),
    Column("l2_norm", _F64, "", "root of the sum of squares"),
    Column("dynamic_range", _F64, "octaves", "log2 amax - log2 smallest non-zero magnitude"),
    Column("crest", _F64, "", "amax / rms"),
    Column("kurtosis", _F64, "", "mean(x^4) / mean(x^2)^2, uncentred"),
    Column("histogram_start", pa.int32(), "bin", "bin of the first count; 4 bins an octave"),
    Column("histogram", pa.list_(_I64), "elements", "of non-zero magnitudes, see sketch.bin_edge"),
    Column("bins", pa.binary(), "elements", "of them in 8 bins an octave, see Sketch.packed_bins"),
    Column("token_ratio", _F64, "", "per-token amax: 99.9th percentile / median"),
    Column("channel_ratio", _F64, "", "largest channel amax / median channel amax"),
    Column("hot_channel", pa.int32(), "channel", "the channel with the largest amax"),
    Column("persistence", _F64, "", "share of the top channels that were top before"),
    Column("amplification", _F64, "", "crest(product) / max(crest(act(gate)), crest(up))"),
    Column("coincidence", _F64, "", "amax(product) / (amax(act(gate)) amax(up))"),
    Column("recipe", _TEXT, "", "recipe of the operand, null where it is not cast"),
    Column("format", _TEXT, "", "element format of the operand"),
    Column("scale", _F64, "", "factor in force when the operand was cast"),
    Column("staleness", _F64, "", "amax / the amax that made the scale in force; 1 just in time"),
    Column("saturated", _F64, "share", "elements beyond the format's largest value"),
    Column("flushed", _F64, "share", "non-zero elements that became zero"),
    Column("subnormal", _F64, "share", "elements cast into the format's subnormals"),
    Column("mse", _F64, "", "mean squared error of the cast"),
    Column("sqnr_db", _F64, "dB", "10 log10(signal power / error power) of the cast"),
    Column("cosine", _F64, "", "between the operand and its cast"),
    Column("bulk_error", _F64, "", "relative l2 error of the cast, outlier channels left out"),
    Column("gemm_error", _F64, "", "relative l2 error of its GEMM's sums (grad_weight: to it)"),
    Column("seen", _TEXT, "", "how the product came: seen, or recomputed from what was seen"),
    Column(
        "statistics",
        pa.map_(_TEXT, _F64),
        "",
        "further ones, by name: monitor/statistics.py",
    ),
)
# Of a product, and kept at every step.
SENTINEL_COLUMNS = ("site", "cur_amax", "hot_channel", "scale", "staleness")

CHANNELS = (
    *_WHERE,
    Column("site", _TEXT, "", "the gated feed-forward, such as layers.3.mlp"),
    Column("channel", pa.int32(), "channel", "hidden unit: a row of gate and up, a column of down"),
    Column("product_amax", _F64, "", "largest magnitude of the product in this channel"),
    Column("gate_amax", _F64, "", "largest magnitude of the gate projection's output"),
    Column("up_amax", _F64, "", "largest magnitude of the up projection's output"),
    Column("channel_ratio", _F64, "", "product_amax / median channel amax"),
    Column("alignment", _F64, "", "cosine of the channel's gate row and up row"),
    Column("permuted_alignment", _F64, "", "control: the same gate row with another up row"),
    Column("gate_norm", _F64, "", "l2 norm of the gate row"),
    Column("up_norm", _F64, "", "l2 norm of the up row"),
    Column("down_norm", _F64, "", "l2 norm of the down column"),
    Column("gate_weights", pa.list_(pa.float32()), "", "gate row of the hottest channel, sampled"),
    Column("up_weights", pa.list_(pa.float32()), "", "up row of the hottest channel, sampled"),
)

EVENTS = (
    *_WHERE,
    Column("kind", _TEXT, "", "what happened, such as nonfinite_loss, diverged"),
    Column("site", _TEXT, "", "where, null for the whole run"),
    Column("detail", _TEXT, "", "in words"),
)


def _schema(columns: tuple[Column, ...]) -> pa.Schema:
    return pa.schema(
        [
            pa.field(c.name, c.type, metadata={"unit": c.unit, "meaning": c.meaning})
            for c in columns
        ],
        metadata={"fp8lab_schema": str(SCHEMA_VERSION)},
    )


Table = Literal["steps", "tensors", "channels", "events"]
TABLES: dict[Table, pa.Schema] = {
    "steps": _schema(STEPS),
    "tensors": _schema(TENSORS),
    "channels": _schema(CHANNELS),
    "events": _schema(EVENTS),
}
# What a column was called in runs of an older schema version: that name -> today's.
FORMER_NAMES: dict[Table, dict[str, str]] = {table: {} for table in TABLES}

# An amax more than an octave beyond the one that made the scale in force: the operand is clipped.
CLIPPED_STALENESS = 2.0
# Events after which rows are not what "steps a to b of this recipe" says.
NOT_AS_TOLD = (
    *("resumed", "rewound", "repeated", "not_merged"),
    *("not_seen", "not_run", "unlike", "converted", "unconverted"),
)
# How the detail of `resumed` ends where steps are missing before it.
NOTHING_BETWEEN = "of those between nothing is recorded"

Severity = Literal["high", "medium", "low"]
SEVERITIES: tuple[Severity, ...] = ("high", "medium", "low")


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """One row's number beside the threshold that it reaches, from below or, `at_most`, from above;
    without one where it reaches none and is shown all the same."""

    step: int
    site: str
    quantity: str
    value: float
    threshold: float | None = None
    source: str = ""  # where the threshold is from
    at_most: bool = False

    @property
    def beyond(self) -> float:
        """How many times the threshold the number is, or the threshold the number; of decibels
        their powers. NaN without."""
        if self.quantity.endswith("_db") and self.threshold is not None:
            return float(10 ** ((self.threshold - self.value) / 10))
        parts = (self.threshold, self.value) if self.at_most else (self.value, self.threshold)
        return math.nan if parts[0] is None or not parts[1] else parts[0] / parts[1]

    @property
    def bound(self) -> str:
        """The threshold in words; empty without one."""
        if self.threshold is None:
            return ""
        return f"{'at most ' * self.at_most}{self.threshold:.4g}"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A cause, where and since when, and what speaks for it.

    `severity` is how bad it is, `confidence` how sure the rule is; `cannot_exclude` says what
    would look the same in these rows.
    """

    cause: str
    summary: str
    severity: Severity
    confidence: Severity
    site: str | None = None
    channel: int | None = None
    since: int | None = None
    evidence: tuple[Evidence, ...] = ()
    remedy: str = ""
    cannot_exclude: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    def __str__(self) -> str:
        where = f" at {self.site}" if self.site else ""
        where += f", channel {self.channel}" if self.channel is not None else ""
        since = f", since step {self.since}" if self.since is not None else ""
        lines = [f"[{self.severity}] {self.cause}{where}{since}", f"  {self.summary}"]
        lines += [
            f"  step {e.step}: {e.quantity} = {e.value:.4g}"
            + (f" (threshold {e.bound})" if e.bound else "")
            for e in self.evidence
        ]
        if self.remedy:
            lines.append(f"  remedy: {self.remedy}")
        if self.cannot_exclude:
            lines.append(f"  cannot exclude: {self.cannot_exclude}")
        return "\n".join(lines)
