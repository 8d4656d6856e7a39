"""What can be put on top of a training so that FP8 does not break it; one idea a file.

A mitigation is a frozen value. `kind` says what it changes, and with it what `apply` takes:

- "model" and "recipe": the model, changed in place and returned;
- "optimizer": the optimizer, and the model where `needs_model` says so;
- "loss": the model; what comes back is called after a forward and gives what to add to the loss;
- "architecture": the lab's `ModelConfig`, of which another comes back.

`changes_function` says whether the network computes something else with it, `foldable` whether a
trained model can be rid of it, `cost` what it adds to a step, and `source` where it is from. What
cannot work is refused with a reason before anything is changed, and what is not of the kind that
`apply` takes by a TypeError. There is no registry: import the class. `change_of_function` measures
how far a model's function moves.
"""

from fp8lab.mitigations.adagc import AdaGC
from fp8lab.mitigations.anti_windup import AntiWindup
from fp8lab.mitigations.block_changes import FOG, OutlierProtected, PlainFeedForward, QKNorm
from fp8lab.mitigations.clamped_swiglu import ClampedSwiGLU
from fp8lab.mitigations.hadamard_product import HadamardProduct
from fp8lab.mitigations.high_precision_product import HighPrecisionOperands, HighPrecisionProduct
from fp8lab.mitigations.hot_channel_patch import HotChannelPatch
from fp8lab.mitigations.no_decay_on_gate_up import NoDecayOnGateUp
from fp8lab.mitigations.powlu import PowLU
from fp8lab.mitigations.product import Change, change_of_function
from fp8lab.mitigations.qk_clip import QKClip
from fp8lab.mitigations.replaced_activation import ReplacedActivation
from fp8lab.mitigations.situ_glu import SiTUGLU
from fp8lab.mitigations.smooth_swiglu import SmoothSwiGLU
from fp8lab.mitigations.spam import SPAM
from fp8lab.mitigations.stable_adamw import StableAdamW
from fp8lab.mitigations.tweo import TWEO
from fp8lab.mitigations.z_loss import ZLoss
from fp8lab.mitigations.zclip import ZClip

__all__ = [
    "FOG",
    "SPAM",
    "TWEO",
    "AdaGC",
    "AntiWindup",
    "Change",
    "ClampedSwiGLU",
    "HadamardProduct",
    "HighPrecisionOperands",
    "HighPrecisionProduct",
    "HotChannelPatch",
    "NoDecayOnGateUp",
    "OutlierProtected",
    "PlainFeedForward",
    "PowLU",
    "QKClip",
    "QKNorm",
    "ReplacedActivation",
    "SiTUGLU",
    "SmoothSwiGLU",
    "StableAdamW",
    "ZClip",
    "ZLoss",
    "change_of_function",
]
