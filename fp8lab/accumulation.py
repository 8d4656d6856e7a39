"""The short accumulator of a GEMM, emulated, and what it does to the sums.

Hopper's tensor cores keep some 14 bits of the running sum of FP8 products (DeepSeek-V3, 2412.19437,
section 3.3.2). What is cut off is up to 2^-13 of the *sum so far*, again in every step, always
towards zero: so the error grows with the number of steps, K / 32, while operands' rounding errors
average out. Adding the running sum to an FP32 sum every 128 elements bounds it, which is what
`Accumulation.promote_every` does.

The error is measured on some of the rows against FP32 sums of the same operands, so that nothing
but the accumulator is in it. Cost: two GEMMs of `SAMPLED_ROWS` rows. Rejected: a bound from K and
bits alone; how much the sums cancel decides, and that the data tell.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8lab.recipe import Accumulation

SAMPLED_ROWS = 64


def multiply_in_steps(left: Tensor, right: Tensor, accumulation: Accumulation) -> Tensor:
    """left [m, k] @ right [k, n], float32, with a short accumulator.

    Each step of 32 is summed in FP32 first: of codes of at most 8 bits that sum is nearly exact,
    and what hardware loses in it is part of `bits`.
    """
    kept = -(1 << (24 - accumulation.bits))
    total = left.new_zeros(len(left), right.shape[1])
    running = torch.zeros_like(total)
    for start in range(0, left.shape[1], 32):
        if accumulation.promote_every and start and start % accumulation.promote_every == 0:
            total += running
            running = torch.zeros_like(total)
        running = running + left[:, start : start + 32] @ right[start : start + 32]
        running = (running.view(torch.int32) & kept).view(torch.float32)
    return total + running


def error_of_sums(left: Tensor, right: Tensor, accumulation: Accumulation) -> Tensor:
    """float64 [2]: sums of squares of what the accumulator changes in left [m, k] @ right [k, n],
    and of the product in FP32, of up to `SAMPLED_ROWS` rows, evenly spread."""
    rows = left[:: -(-len(left) // SAMPLED_ROWS) or 1]
    exact = rows @ right
    error = multiply_in_steps(rows, right, accumulation) - exact
    return torch.stack([error.double().square().sum(), exact.double().square().sum()])
