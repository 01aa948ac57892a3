"""Optimizers a config can name: what decays, and how bfloat16 weights take in small updates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from flash_plugin.components.arguments import config_component

# OffsetScale stacks a vector for each of its at most four queries and keys: a matrix in shape alone.
_MAX_STACKED_VECTORS = 4


@config_component
def adamw(
    params: Iterable[nn.Parameter],
    *,
    lr: float = 3e-4,
    betas: Sequence[float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    fused: bool | None = None,
    stochastic_rounding: bool = False,
) -> Optimizer:
    """Build AdamW (Loshchilov & Hutter 2019) that decays matrices only.

    Norm scales, biases, position biases and OffsetScale's gamma and beta are vectors, or stacks of at most four, whose
    size means something: they do not decay. Everything else is ``torch.optim.AdamW``.

    Args:
        params: The model's parameters; the recipe passes them.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        weight_decay: Decay of matrices.
        fused: Use torch's fused kernel; None lets torch choose.
        stochastic_rounding: Round the sum of a bfloat16 weight and its update up or down with probabilities that keep
            its mean. To the nearest, a bfloat16 weight w swallows updates below ``|w| / 512``, and so most of training
            at small learning rates. torchao does it, compiled by inductor; there is no fused kernel for it.

    Raises:
        ValueError: If an argument is unknown or out of range, there are no parameters, or ``stochastic_rounding`` is
            asked for with ``fused`` or where no weight is bfloat16.
        RuntimeError: If ``stochastic_rounding`` is asked for and torchao is older than 0.11.
    """
    if len(betas) != 2:
        raise ValueError(f"betas ({list(betas)}) must be two numbers; set optimizer.betas=[0.9,0.95]")
    params = list(params)
    if not params:
        raise ValueError("params (none) must hold a parameter to train; unfreeze some of the model")
    decaying = [parameter for parameter in params if _is_matrix(parameter)]
    others = [parameter for parameter in params if not _is_matrix(parameter)]
    # optimizer_in_bwd builds an optimizer for each parameter: no group may be empty.
    groups = [
        {"params": group, "weight_decay": decay} for group, decay in ((decaying, weight_decay), (others, 0.0)) if group
    ]
    if not stochastic_rounding:
        return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=fused)
    if fused:
        raise ValueError(
            f"fused ({fused}) must be False with stochastic_rounding=True, for which torch has no fused kernel; "
            "set optimizer.fused=False"
        )
    if not any(parameter.dtype == torch.bfloat16 for parameter in params):
        raise ValueError(
            f"stochastic_rounding (True) must come with bfloat16 weights, and they are {params[0].dtype}; "
            "set dtype=bf16 or optimizer.stochastic_rounding=False"
        )
    try:
        from torchao.optim import _AdamW
    except ImportError:
        raise RuntimeError(
            "stochastic_rounding (True) needs torchao 0.11 or newer; run: pip install -U 'torchao<0.16', or set "
            "optimizer.stochastic_rounding=False"
        ) from None
    return _AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, bf16_stochastic_round=True)


def _is_matrix(parameter: nn.Parameter) -> bool:
    return parameter.dim() > 1 and min(parameter.shape) > _MAX_STACKED_VECTORS
