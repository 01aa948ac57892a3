"""Which configuration a launch runs with."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import triton
import triton.language as tl

from flash_plugin.kernels.triton import tuning
from flash_plugin.kernels.triton.tuning import Config, TunedKernel, tuned

LENGTH = 40
CONFIGS = [Config({"BLOCK": 64}, 4, 2), Config({"BLOCK": 16}, 2, 1), Config({"BLOCK": 8}, 1, 1)]


@triton.jit
def copy(x, y, n, BLOCK: tl.constexpr):
    """Copy x to y, and write the block's size behind it."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + o, mask=o < n), mask=o < n)
    tl.store(y + n, BLOCK)


def no_longer_than_n(config, arguments):
    return config.meta["BLOCK"] <= arguments["n"]


def launch(kernel: TunedKernel, grid=lambda meta: (triton.cdiv(meta["n"], meta["BLOCK"]),)) -> int:
    """The block size that ran, after a check that all blocks did."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y = torch.randn(LENGTH, device=device), torch.empty(LENGTH + 1, device=device)
    kernel[grid](x, y, n=LENGTH)
    assert torch.equal(y[:LENGTH], x)
    return int(y[LENGTH])


def test_the_first_configuration_runs_by_default():
    kernel = tuned(CONFIGS, key=["n"])(copy)
    assert kernel.default == CONFIGS[0] and kernel.__name__ == "copy" and kernel.fn is copy
    assert launch(kernel) == 64


def test_the_first_one_that_fits_runs():
    assert launch(tuned(CONFIGS, key=["n"], fits=no_longer_than_n)(copy)) == 16


def test_a_grid_may_be_a_tuple():
    assert launch(tuned(CONFIGS[1:2], key=())(copy), grid=(3,)) == 16


def test_a_call_that_nothing_fits_is_our_own_bug():
    with pytest.raises(AssertionError, match="copy: no configuration fits"):
        launch(tuned(CONFIGS, key=["n"], fits=lambda config, arguments: False)(copy))


@pytest.mark.parametrize(
    ("configs", "key"), [(CONFIGS, ["m"]), ([Config({"BLOK": 8}, 1, 1)], ()), (CONFIGS, ()), ([], ())]
)
def test_declarations_that_triton_would_swallow_are_caught(configs, key):
    with pytest.raises(AssertionError, match="copy"):
        tuned(configs, key)(copy)


def test_the_interpreter_never_tunes(monkeypatch):
    monkeypatch.setenv("FLASH_PLUGIN_AUTOTUNE", "1")
    with mock.patch.object(tuning, "interpreted", return_value=True), mock.patch.object(TunedKernel, "_launch") as run:
        launched(tuned(CONFIGS, key=["n"])(copy))
    assert run.call_args.args[-1] == CONFIGS[0]


@pytest.mark.parametrize(("setting", "configs", "tunes"), [("1", 3, True), ("0", 3, False), ("1", 1, False)])
def test_tuning_is_asked_for_and_needs_a_choice(setting, configs, tunes, monkeypatch):
    monkeypatch.setenv("FLASH_PLUGIN_AUTOTUNE", setting)
    with mock.patch.object(tuning, "interpreted", return_value=False), mock.patch.object(TunedKernel, "_launch") as run:
        launched(tuned(CONFIGS[:configs], key=["n"])(copy))
    assert run.call_args.args[-1] == (None if tunes else CONFIGS[0])


def launched(kernel: TunedKernel) -> None:
    kernel[(1,)](torch.empty(LENGTH), torch.empty(LENGTH + 1), n=LENGTH)


def test_only_configurations_that_fit_are_timed():
    tuner = tuned(CONFIGS, key=["n"], fits=no_longer_than_n)(copy)._autotuner
    assert [config.kwargs["BLOCK"] for config in tuner.configs] == [64, 16, 8]
    tuner.nargs = {"x": None, "y": None}
    assert [config.kwargs["BLOCK"] for config in tuner.prune_configs({"n": LENGTH})] == [16, 8]
    assert tuner.keys == ["n"]


@pytest.mark.gpu
def test_tuning_picks_one_that_fits_and_keeps_it(monkeypatch):
    monkeypatch.setenv("FLASH_PLUGIN_AUTOTUNE", "1")
    kernel = tuned(CONFIGS, key=["n"], fits=no_longer_than_n)(copy)
    first = launch(kernel)
    assert first in (16, 8)
    assert launch(kernel) == first
