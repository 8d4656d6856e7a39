"""What is watched, as TensorBoard scalars: `watch(..., listeners=[Writer(summary_writer)])`.

The SummaryWriter is the caller's: opened, flushed and closed by the caller, in the folder of the
caller's other curves. The step is that of `watch.step`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError as error:
    raise ImportError(
        f"fp8lab.integrations.tensorboard: {error}: pip install 'fp8lab[tensorboard]'"
    ) from None

from fp8lab.integrations.headlines import HEADLINES, checked, chosen


class Writer:
    """Writes each recorded step's scalars to `summary_writer`.

    `statistics` are those to show of each site, columns and what `select` names; what belongs to
    the whole step is always shown. Raises ValueError for one that does not exist.
    """

    def __init__(
        self, summary_writer: SummaryWriter, statistics: Collection[str] = HEADLINES
    ) -> None:
        self._summary_writer = summary_writer
        self._statistics = checked(statistics)

    def __call__(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the scalars of one step."""
        for name, value in chosen(scalars, self._statistics).items():
            self._summary_writer.add_scalar(name, value, step)
