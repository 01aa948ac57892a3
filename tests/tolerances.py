"""How far two results may differ: one table, a reason beside each entry, and nowhere else.

``oracle_*`` bounds are Frobenius-relative (norm of the difference over norm of the expected tensor): errors of sums of
many products add up like noise, and single entries that cancel to nearly zero say nothing. ``law_*`` and ``parity_*``
bounds are on the largest single difference over the largest expected entry: a law holds at every token or not at all.
``step_*`` bounds are absolute, on what a training step logs.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCES: dict[str, float] = {
    # float64 against float64: both sides round at 1e-16, sums of up to 1e4 terms keep twelve digits.
    "oracle_fp64": 1e-12,
    # DESIGN section 7 measures 8e-7 for float32; a formula that is wrong anywhere is off by 1e-3 or more.
    "oracle_fp32": 2e-6,
    # Two float32 results, each within oracle_fp32 of the truth: the triangle inequality.
    "pair_fp32": 4e-6,
    # bf16 has 8 bits: rounding the weights and the output costs 1.8e-3 to 2.5e-3 (DESIGN section 7).
    "oracle_bf16": 5e-3,
    # One more rounded product than the forward pass: 3e-3, bias 3.7e-3 (DESIGN section 7).
    "oracle_bf16_grad": 6e-3,
    # fp16 has 11 bits: 2e-4 to 4.5e-4, forward and backward (DESIGN section 7).
    "oracle_fp16": 1e-3,
    "oracle_fp16_grad": 1e-3,
    # What the four laws promise (DESIGN section 1).
    "law_fp32": 1e-5,
    "law_fp64": 1e-10,
    # Another implementation with the same weights, through a few layers: the bound on logits.
    "parity_fp32": 1e-5,
    # The same steps on several processes, which add gradients up in another order: the bound on losses. Losses
    # of 5 and norms of 2 came within 1e-6; a gradient that is twice too large is off by 1e-2 at the second step.
    "step_loss_fp32": 1e-4,
    "step_grad_norm_fp32": 1e-4,
    # Rounding the sum of gradients and every weight to 8 bits moves the loss (itself float32) by 3e-4 in six steps; the
    # norm is logged in bf16, which between 2 and 4 has multiples of 1/64 alone.
    "step_loss_bf16": 2e-3,
    "step_grad_norm_bf16": 2e-2,
    # Frobenius-relative again: weights after those six steps, which move them by 7e-3 to 1, came within 6e-7.
    "stepped_weights_fp32": 1e-5,
}

# Below this root mean square an expected tensor counts as zero: relative to it alone, the bound would ask for nothing
# but rounding. Inputs are of order one, so this is nine orders under them.
SMALLEST_RMS = 1e-9


def error(actual: Tensor, expected: Tensor, *, worst: bool = False) -> float:
    """Relative difference: Frobenius norms, or the largest entries where `worst` is set."""
    a, e = actual.detach().double(), expected.detach().double()
    if worst:
        return ((a - e).abs().max() / e.abs().max().clamp(min=SMALLEST_RMS)).item()
    return (
        torch.linalg.vector_norm(a - e) / torch.linalg.vector_norm(e).clamp(min=SMALLEST_RMS * e.numel() ** 0.5)
    ).item()


def assert_close(actual: Tensor, expected: Tensor, kind: str, what: str = "result") -> None:
    """Raise unless `actual` has the expected shape, is finite and lies within the bound called `kind`."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    if actual.numel() == 0:
        return
    found = error(actual, expected, worst=kind.startswith(("law_", "parity_")))
    assert found <= TOLERANCES[kind], f"{what}: relative error {found:.2e} is above {kind} = {TOLERANCES[kind]:.0e}"
