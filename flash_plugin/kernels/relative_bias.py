"""The bias between rows of queries and columns of keys, out of the vector that holds it for each distance."""

from __future__ import annotations

import torch
from torch import Tensor


def bias_between(bias: Tensor, first: int, queries: int, keys: int) -> Tensor:
    """The bias of ``queries`` consecutive tokens to ``keys`` consecutive ones, ``[queries, keys]``.

    Its rows are windows of one vector of O(queries + keys) numbers. An index of every pair would be int64, and autograd
    would keep it for the backward; of windows it keeps nothing.

    Args:
        bias: A number for each distance t - s, ``[2 m - 1]``, that of distance 0 in the middle.
        first: t - s of the first query and the first key.
        queries: Number of queries.
        keys: Number of keys.

    Returns:
        ``[queries, keys]`` in the dtype of ``bias``; distances it does not reach to have that of the last one.
    """
    reach = bias.shape[0] // 2
    distance = torch.arange(first - keys + 1, first + queries, device=bias.device)
    along = bias.index_select(0, distance.clamp(-reach, reach) + reach)
    # Window i runs from distance first + i - (keys - 1), that of the last key, up to that of the first.
    if torch.compiler.is_compiling():
        # The number of keys would be a constant of unfold's. Of repetitions that are read in rows of one number more,
        # each row begins one number later.
        size = queries + keys - 1
        repeated = along.expand(queries + 1, size).flatten()[: queries * (size + 1)]
        return repeated.unflatten(0, (queries, size + 1))[:, :keys].flip(1)
    return along.unfold(0, keys, 1).flip(1)
