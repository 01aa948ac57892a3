"""The panels of rows in which a matrix of scores is worked on, one after the other."""

from __future__ import annotations

import torch

# Rows of a panel: few enough that the scores of one stay small, and a causal one never computes most of what it masks.
_ROWS = 512


def row_panels(length: int) -> list[slice]:
    """Cut rows 0 to ``length`` into panels of 512, the last of which may have fewer.

    A compiled graph has a fixed number of panels. There it is a power of two, the least that leaves a panel about 512
    rows or fewer, and one graph serves all lengths that share it: five serve up to 8192 rows.
    """
    if torch.compiler.is_compiling():
        panels = 1
        while length > panels * _ROWS:
            panels *= 2
        rows = length // panels
    else:
        rows = _ROWS
        panels = -(-length // rows)
    above = [slice(panel * rows, (panel + 1) * rows) for panel in range(panels - 1)]
    return [*above, slice((panels - 1) * rows, length)]
