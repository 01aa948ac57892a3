"""Where there is no GPU, Triton kernels run in Triton's interpreter, repaired."""

from __future__ import annotations

import os
from collections.abc import Iterator

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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let workers side by side begin with the files of slow tests, so that none is left with one in the end."""
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the processes run in that tests start: one thread each, nothing to download, nothing downloaded before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("huggingface")))
        # Processes that help to compile would each import torch.
        patch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
        yield
