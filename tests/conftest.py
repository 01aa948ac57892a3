"""Where there is no GPU, Triton kernels run in Triton's interpreter, repaired."""

from __future__ import annotations

import os

import pytest
import torch

from flash_plugin.kernels.triton.availability import interpreted


def pytest_configure() -> None:
    """Choose the interpreter before anything imports triton, which reads the choice whenever it defines a kernel."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    # cuBLAS is deterministic with a workspace of this size: what poisoned memory (tests/kernels/triton) demands.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if interpreted():
        from tests.interpreter import install

        install()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
