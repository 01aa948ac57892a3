"""What is changed in torchtune acts on a CPU alone."""

from __future__ import annotations

import pytest
import torch
from torchtune import training

from flash_plugin.components import host


def test_memory_statistics_of_a_cpu_are_none(caplog: pytest.LogCaptureFixture) -> None:
    statistics = training.get_memory_stats(device=torch.device("cpu"))
    assert statistics == {}
    training.log_memory_stats(statistics)
    assert not caplog.records


def test_other_devices_get_the_hosts_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(host, "_get_memory_stats", lambda *arguments: asked.append(arguments) or {"peak": 1.0})
    monkeypatch.setattr(host, "_log_memory_stats", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(host, "_cleanup_before_training", lambda: asked.append(()))
    monkeypatch.setattr(host, "get_torch_device_namespace", lambda: torch.cuda)
    device = torch.device("cuda")
    training.log_memory_stats(training.get_memory_stats(device, False), "then")
    training.cleanup_before_training()
    assert asked == [(device, False), ({"peak": 1.0}, "then"), ()]


@pytest.mark.skipif(hasattr(torch.cpu, "empty_cache"), reason="torch has it now: the change can go")
def test_training_begins_without_a_cache_to_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "get_torch_device_namespace", lambda: torch.cpu)
    training.cleanup_before_training()
