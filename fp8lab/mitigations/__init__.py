"""What can be put on top of a model so that FP8 does not break it; one idea a file.

A mitigation is a frozen value. `kind` says what it changes (model, optimizer, loss, recipe or
lab architecture), `changes_function` whether the network computes something else with it,
`cost` what it adds to a step, and `apply(model)` puts it on every gated feed-forward of the model
or refuses with a reason. There is no registry: import the class.
"""

from fp8lab.mitigations.anti_windup import AntiWindup
from fp8lab.mitigations.clamped_swiglu import ClampedSwiGLU
from fp8lab.mitigations.high_precision_product import HighPrecisionProduct
from fp8lab.mitigations.smooth_swiglu import SmoothSwiGLU

__all__ = ["AntiWindup", "ClampedSwiGLU", "HighPrecisionProduct", "SmoothSwiGLU"]
