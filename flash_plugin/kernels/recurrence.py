"""The states of documents at the edges of blocks, each made from the one before it.

In a compiled graph this is one operator: a loop would be unrolled, and the graph would fit one number of blocks.

Shape legend: ``b`` batch, ``n`` blocks, ``z`` query/key width, ``e`` value width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def states_before(first: Tensor, added: Tensor, keep: Tensor, lag: int) -> tuple[Tensor, Tensor]:
    """``S_0 = first`` and ``S_{j+1} = added_j + keep_j S_j``.

    Args:
        first: State before the first block, ``[b, z, e]``.
        added: What each block adds, ``[b, n, z, e]``.
        keep: 1 where what was before the block goes on behind it, 0 where it does not, ``[b, n, 1, 1]``. It takes no
            gradient.
        lag: How many blocks before each one its state is asked for, at most n.

    Returns:
        ``S_{j-lag}`` for each block j, ``S_0`` where there is none, ``[b, n, z, e]``; and ``S_n``, ``[b, z, e]``.
    """
    return (_operator if torch.compiler.is_compiling() else _states)(first, added, keep, lag)


def _states(first: Tensor, added: Tensor, keep: Tensor, lag: int) -> tuple[Tensor, Tensor]:
    running = [first]
    for block in range(added.shape[1]):
        running.append(torch.addcmul(added[:, block], keep[:, block], running[-1]))
    return torch.stack([*running[:1] * lag, *running[: added.shape[1] - lag]], dim=1), running[-1]


_operator = torch.library.custom_op("flash_plugin::states_before", _states, mutates_args=())


@_operator.register_fake
def _(first: Tensor, added: Tensor, keep: Tensor, lag: int) -> tuple[Tensor, Tensor]:
    return added.new_empty(added.shape), torch.addcmul(added[:, 0], keep[:, 0], first)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, keep, ctx.lag = inputs
    ctx.save_for_backward(keep)


def _backward(ctx: Any, grad: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
    """The same recurrence from the last block to the first, over the gradients of the states."""
    (keep,) = ctx.saved_tensors
    early, later = grad[:, : ctx.lag], grad[:, ctx.lag :]
    grads = torch.cat([later, torch.zeros_like(early)], dim=1)
    behind, dfirst = states_before(grad_last, grads.flip(1), keep.flip(1), 0)
    return dfirst + early.sum(1), behind.flip(1), None, None


_operator.register_autograd(_backward, setup_context=_setup_context)
