"""Panels of rows: each row is in one, and few compiled graphs serve all numbers of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from flash_plugin.kernels.panels import row_panels

LENGTHS = [2, 300, 512, 513, 600, 1024, 1030, 2047, 2048, 2049, 4096, 5000, 8191, 8192]


def cut(x: Tensor) -> list[Tensor]:
    return [x[rows] for rows in row_panels(len(x))]


def check(cut: Callable[[Tensor], list[Tensor]]) -> None:
    for length in LENGTHS:
        x = torch.arange(length)
        panels = cut(x)
        assert torch.equal(torch.cat(panels), x)
        assert all(0 < len(panel) < 512 + len(panels) for panel in panels)


def test_panels_make_up_the_rows() -> None:
    check(cut)
    assert [len(panel) for panel in cut(torch.arange(1300))] == [512, 512, 276]


def test_five_graphs_serve_all_lengths() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    check(torch.compile(cut, fullgraph=True, dynamic=True, backend=counter))
    assert counter.frame_count == 5
