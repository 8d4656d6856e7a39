"""Another activation in the place of the gate's: ReGLU, GEGLU, squared ReLU and their like.

    product = activation(gate) * up

What else the feed-forward does to gate and up (limits, an offset) stays. It is a control: which of
what is seen belongs to SwiGLU and which to any gate (a squared ReLU makes the product cubic; the
theorem of Fishman et al. 2409.12517 asks of the activation only that its slope vanish). A gated
feed-forward without its gate is not made this way, for it has another number of matrices:
`ffn.FeedForward` is one, also with xIELU, whose parameters a foreign model could not own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from fp8lab.ffn import ACTIVATIONS
from fp8lab.mitigations.product import remake
from fp8lab.sites import Formula, GateSite


@dataclass(frozen=True, kw_only=True)
class ReplacedActivation:
    """Compute `activation` of the gate, a key of `ffn.ACTIVATIONS`."""

    kind: ClassVar[str] = "model"
    changes_function: ClassVar[bool] = True
    foldable: ClassVar[bool] = False
    cost: ClassVar[str] = "a second activation and product; the first product is thrown away"
    source: ClassVar[str] = "Shazeer 2020 (2002.05202) for the variants; So et al. 2021 for ReLU²"

    activation: str = "relu"

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"ReplacedActivation: activation={self.activation!r}, "
                f"expected one of {', '.join(ACTIVATIONS)}"
            )

    def apply(self, model: nn.Module) -> nn.Module:
        """Put it on every gated feed-forward of the model; returns the same model.

        Raises ValueError if a feed-forward has that activation already, or as `product.remake`
        does.
        """
        return remake(model, "ReplacedActivation", self._formula)

    def _formula(self, site: GateSite) -> Formula:
        if site.activation == self.activation:
            raise ValueError(f"ReplacedActivation: {site.name} has {self.activation} already")
        return replace(site.formula, activation=self.activation, beta=1.0, alphas=None)
