"""FlashCheckpointer: which epochs stay, what is not worth saving, and two processes that save at once."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import pytest
import torch
from torchtune import training

from flash_plugin.components.checkpoint_files import STAGING_DIRNAME, AtomicSave
from flash_plugin.components.checkpointer import MODEL_FILE, FlashCheckpointer
from tests.components.test_checkpoint_saving import files, resume, run_state, save, saver, values, weights_of


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "output"


def epochs(output: Path) -> list[str]:
    return sorted(path.name for path in output.glob("epoch_*"))


# keep_last


def test_all_epochs_are_kept_by_default(output: Path) -> None:
    for epoch in range(3):
        save(output, epoch)
    assert epochs(output) == ["epoch_0", "epoch_1", "epoch_2"]


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_older_epochs_go_when_a_new_one_is_saved(output: Path, keep_last: int) -> None:
    for epoch in range(5):
        save(output, epoch, keep_last=keep_last)
        assert epochs(output) == [f"epoch_{kept}" for kept in range(max(epoch + 1 - keep_last, 0), epoch + 1)]
        assert values(resume(output)) == (epoch, epoch, epoch + 1)
    assert not (output / STAGING_DIRNAME).exists()


@pytest.mark.parametrize("keep_last", [1, 2])
def test_the_epoch_of_the_recipe_state_stays_when_a_run_ends(output: Path, keep_last: int) -> None:
    for epoch in range(2):
        save(output, epoch, keep_last=keep_last)
    saver(output, keep_last=keep_last).save_checkpoint({training.MODEL_KEY: weights_of(2.0)}, epoch=2)
    assert epochs(output) == ["epoch_1", "epoch_2"]
    assert values(resume(output)) == (1.0, 1.0, 2)


def test_only_epochs_of_this_run_go(output: Path) -> None:
    """Later ones are an earlier run's; so is what is named otherwise, and what this run started from."""
    for epoch in (0, 1, 7):
        save(output, epoch)
    (output / "epoch_0_best").mkdir()
    base = output / "epoch_0"
    checkpointer = FlashCheckpointer(
        checkpoint_dir=str(base), checkpoint_files=[MODEL_FILE], output_dir=str(output), keep_last=1
    )
    checkpointer.save_checkpoint(run_state(2), 2, intermediate_checkpoint=True)
    assert epochs(output) == ["epoch_0", "epoch_0_best", "epoch_2", "epoch_7"]


def test_an_epoch_stays_when_the_new_one_cannot_be_written(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(output, 0)

    def fail(*arguments: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        with pytest.raises(RuntimeError, match="epoch 1 could not be written .*No space left on device"):
            save(output, 1, keep_last=1)
    assert values(resume(output)) == (0.0, 0.0, 1)


def test_keep_last_must_keep_one(output: Path) -> None:
    with pytest.raises(ValueError, match=r"keep_last \(0\) must be a positive integer, or null to keep all"):
        saver(output, keep_last=0)


# What is not worth saving


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("key", [training.MODEL_KEY, training.ADAPTER_KEY])
def test_weights_that_are_not_finite_are_not_saved(output: Path, key: str, value: float) -> None:
    save(output, 0)
    before = files(output)
    broken = run_state(1) | {key: {"whole": torch.ones(3), "broken": torch.tensor([1.0, value])}}
    with pytest.raises(
        ValueError, match=r"weights of epoch 1 must be finite .* infinity: broken; .*lower optimizer.lr"
    ):
        saver(output).save_checkpoint(broken, 1, intermediate_checkpoint=True)
    assert files(output) == before
    assert values(resume(output)) == (0.0, 0.0, 1)


# Two at once


def test_a_second_process_waits_until_the_first_has_saved(output: Path) -> None:
    """A launcher that is killed leaves its workers behind, which save while the resumed run does."""
    entered = threading.Event()

    def second() -> None:
        with AtomicSave(output) as save:
            entered.set()
            save.write("file", "second")

    thread = threading.Thread(target=second)
    with AtomicSave(output) as first:
        first.write("file", "first")
        thread.start()
        assert not entered.wait(0.3)
    thread.join(10)
    assert entered.is_set()
    assert torch.load(output / "file") == "second"
    assert files(output) == ["file"]
