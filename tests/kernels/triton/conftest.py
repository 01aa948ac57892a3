"""The tests of Triton kernels run on poisoned memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fill what torch.empty and its kind return with NaN or the largest integer: an unwritten output is then seen.

    It is a by-product of deterministic mode, which also refuses torch ops that sum in no fixed order.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)
