"""Runs of the stock recipes that are stopped, killed, or run out of room go on as if nothing had happened.

FLASH_TEST_KILLS=20 python -m pytest tests/recipes/test_resume.py -k random kills runs more often than CI does.
"""

from __future__ import annotations

import math
import os
import random
import re
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from torchtune import training
from torchtune.modules.transforms.tokenizers import ModelTokenizer

from flash_plugin.components.checkpoint_files import STAGING_DIRNAME, content_id
from flash_plugin.components.checkpointer import MODEL_FILE, RECIPE_STATE_FILE, FlashCheckpointer
from flash_plugin.components.datasets import text_dataset
from tests.recipes.launching import ROOT, TIMEOUT, TUNE, family, kill, start
from tests.recipes.test_stock_recipes import TINY

OUTPUT = "outputs/flash_debug"
CHUNKED = "loss=flash_plugin.CEWithChunkedOutputLoss"
PLAIN = "loss=flash_plugin.CrossEntropyLoss"
KILLS = int(os.environ.get("FLASH_TEST_KILLS", "4"))

pytestmark = pytest.mark.slow


class Run:
    """A stock recipe that ``tune`` runs, in one process or in several."""

    def __init__(self, folder: Path, *overrides: str, processes: int = 1, afresh: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        recipe = ["full_finetune_single_device"]
        if processes > 1:
            recipe = ["--nproc_per_node", str(processes), "full_finetune_distributed"]
        config = str(ROOT / "configs/flash_debug.yaml")
        self._printed = folder / "printed.txt"
        self._printed.unlink(missing_ok=True)
        command = [TUNE, "run", *recipe, "--config", config, *TINY, *overrides]
        self._process = start(*command, cwd=folder, stdout=self._printed, stderr=self._printed, afresh=afresh)

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def family(self) -> list[int]:
        return family(self._process.pid)

    def kill(self) -> None:
        kill(self._process.pid)
        self._process.wait()

    def wait_until(self, condition: Callable[..., object], *arguments: object) -> None:
        """Return when the condition holds of the arguments, or the run has ended."""
        end = time.monotonic() + TIMEOUT
        while not condition(*arguments) and not self.ended:
            assert time.monotonic() < end, self._printed.read_text()[-4000:]
            time.sleep(0.001)

    def finish(self, *, fails: bool = False) -> str:
        """Wait for the end; return what was printed."""
        self.wait_until(lambda: False)
        printed = self._printed.read_text()
        assert (self._process.poll() != 0) == fails, printed[-4000:]
        return printed


def steps(folder: Path) -> list[tuple[int, str]]:
    """Number and loss of every step in the logs, run after run."""
    logs = sorted(folder.glob(f"{OUTPUT}/logs/log_*.txt"), key=lambda path: path.stat().st_mtime)
    return [
        (int(step), loss) for log in logs for step, loss in re.findall(r"Step (\d+) \| loss:(\S+) ", log.read_text())
    ]


def save_in_progress(folder: Path) -> int | None:
    """When the save began, or went on, that has staged files: it may be of a process that was killed."""
    try:
        return (folder / OUTPUT / STAGING_DIRNAME).stat().st_ctime_ns
    except FileNotFoundError:
        return None


def epochs_run(folder: Path) -> int:
    """How many epochs the recipe state on disk knows of."""
    path = folder / OUTPUT / RECIPE_STATE_FILE
    return int(torch.load(path)[training.EPOCHS_KEY]) if path.exists() else 0


def result(folder: Path, epoch: int) -> list[str | None]:
    """Hashes of the weights of an epoch, and of the optimizer's state in the epoch before the last."""
    return [content_id(folder / OUTPUT / name) for name in (f"epoch_{epoch}/{MODEL_FILE}", RECIPE_STATE_FILE)]


def resumes(folder: Path) -> bool:
    """Whether the checkpoint in ``folder`` loads as a recipe would load it."""
    checkpointer = FlashCheckpointer(output_dir=str(folder / OUTPUT), should_load_recipe_state=True)
    return {training.MODEL_KEY, training.OPT_KEY} <= checkpointer.load_checkpoint().keys()


# Stopped at the end of an epoch


@pytest.mark.parametrize(
    ("overrides", "processes"),
    [
        (["dataset.packed=False", "gradient_accumulation_steps=2"], 1),
        (["optimizer_in_bwd=True", "clip_grad_norm=null", "optimizer=flash_plugin.adamw"], 1),
        (["dtype=bf16", CHUNKED, "model.tie_embeddings=True"], 1),
        (["dtype=bf16", CHUNKED, "gradient_accumulation_steps=2", "optimizer=flash_plugin.adamw"], 2),
    ],
    ids=["accumulated-unpacked", "optimizer-in-backward", "bf16-chunked-tied", "two-processes"],
)
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(
    tmp_path: Path, overrides: list[str], processes: int
) -> None:
    Run(tmp_path, "epochs=3", *overrides, processes=processes).finish()
    expected, expected_steps = result(tmp_path, 2), steps(tmp_path)
    assert len(expected_steps) == 18
    # A finished run leaves the state of its last epoch but one: resumed, it repeats the last.
    shutil.rmtree(tmp_path / OUTPUT / "epoch_2")
    Run(tmp_path, "epochs=3", "resume_from_checkpoint=True", *overrides, processes=processes).finish()
    assert steps(tmp_path)[18:] == expected_steps[12:]
    assert result(tmp_path, 2) == expected


# Killed


def kill_until_done(folder: Path, kills: int, *overrides: str, processes: int = 1) -> list[str]:
    """Train, up to so often killing all processes at a random moment and resuming; returns what each kill hit."""
    draw = random.Random(kills)
    found: list[str] = []
    while True:
        before, saving = epochs_run(folder), save_in_progress(folder)
        resume = f"resume_from_checkpoint={before > 0}"
        run = Run(folder, *overrides, resume, processes=processes)
        if len(found) == kills:
            run.finish()
            return found
        # In the middle of a save, after one, and at any time after the start, loading included.
        moment = ("saving", "training", "saving", "starting")[len(found) % 4]
        if moment == "saving":
            run.wait_until(lambda old: save_in_progress(folder) not in (None, old), saving)
        elif moment == "training":
            run.wait_until(lambda old: epochs_run(folder) > old, before)
        time.sleep(draw.uniform(0, {"saving": 0.2, "training": 1.0, "starting": 2.0}[moment]))
        if run.ended:
            run.finish()
            return found
        run.kill()
        after = epochs_run(folder)
        cut = save_in_progress(folder) not in (None, saving)
        found.append(f"{moment}{' (save cut short)' if cut else ''} after epoch {after}")
        assert after >= before
        assert after == 0 or resumes(folder)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(tmp_path: Path, processes: int) -> None:
    kills = KILLS if processes == 1 else (KILLS + 1) // 2
    epochs = max(kills, 3)
    # A large vocabulary, so that saving takes a while.
    large = ["model.vocab_size=60000", "batch_size=1", "max_steps_per_epoch=4"]
    overrides = [f"epochs={epochs}", *large, "checkpointer.keep_last=1"]
    whole = tmp_path / "whole"
    Run(whole, *overrides, processes=processes).finish()
    expected, left = dict(steps(whole)), sorted(path.name for path in (whole / OUTPUT).iterdir())
    while kills > 0:
        killed = tmp_path / f"{kills} kills left"
        found = kill_until_done(killed, kills, *overrides, processes=processes)
        print("killed while", "\nkilled while ".join(found))
        assert found
        kills -= len(found)
        assert result(killed, epochs - 1) == result(whole, epochs - 1)
        assert all(expected[step] == loss for step, loss in steps(killed))
        assert sorted(path.name for path in (killed / OUTPUT).iterdir()) == left, "nothing of a killed save"


def test_nothing_to_resume_yet_is_one_sentence(tmp_path: Path) -> None:
    run = Run(tmp_path, "epochs=3", "max_steps_per_epoch=1000")
    run.wait_until(lambda: steps(tmp_path))
    run.kill()
    printed = Run(tmp_path, "epochs=3", "resume_from_checkpoint=True").finish(fails=True)
    (sentence,) = [line for line in printed.splitlines() if line.startswith("ValueError: ")]
    assert "only a run that has finished one epoch of several can go on" in sentence
    assert "set resume_from_checkpoint=False" in sentence


# Out of room


@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(tmp_path: Path, processes: int) -> None:
    # Of several processes, torchrun itself must end the others.
    run = Run(tmp_path, "epochs=1000", processes=processes, afresh=processes > 1)
    run.wait_until(lambda: epochs_run(tmp_path) > 0)
    for pid in run.family():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    since = time.monotonic()
    printed = run.finish(fails=True)
    assert time.monotonic() - since < 60, "the other processes must not wait for the one that failed"
    assert re.search(
        r"RuntimeError: the checkpoint of epoch \d+ could not be written to .*earlier checkpoints", printed
    )
    assert not (tmp_path / OUTPUT / STAGING_DIRNAME).exists()
    assert resumes(tmp_path)


# Diverged


@pytest.mark.parametrize(
    ("overrides", "processes", "sentence"),
    [
        ([PLAIN], 1, r"the loss \(nan, in batch 3 of this run\) must be finite.*lower optimizer.lr"),
        # The host gives all but one of its many optimizers the full learning rate in the first step.
        ([CHUNKED, "optimizer_in_bwd=True"], 1, r"the loss \(nan, in batch 2 of this run\) must be finite"),
        ([CHUNKED], 2, r"the loss \(nan, in batch 3 of this run\) must be finite"),
        (["loss._component_=torch.nn.CrossEntropyLoss"], 1, r"the weights of epoch \d must be finite to be saved"),
    ],
    ids=["plain", "chunked-in-backward", "two-processes", "stock-loss"],
)
def test_a_run_that_diverges_stops_and_keeps_the_last_checkpoint(
    tmp_path: Path, overrides: list[str], processes: int, sentence: str
) -> None:
    # Warm-up starts at 0: the first step changes nothing, is an epoch, and is saved; the second spoils the weights.
    explosive = ["epochs=9", "max_steps_per_epoch=1", "optimizer.lr=1e30", "clip_grad_norm=null"]
    printed = Run(tmp_path, *explosive, *overrides, processes=processes).finish(fails=True)
    assert re.search(f"ValueError: {sentence}", printed)
    assert len(steps(tmp_path)) <= 3
    assert epochs_run(tmp_path) >= 1
    assert resumes(tmp_path)


class PartlyUnlabelled(Dataset):
    """Every fourth sample has nothing to predict, as where a prompt alone fills the sequence."""

    def __init__(self, tokenizer: ModelTokenizer, **arguments: Any) -> None:
        self._samples = text_dataset(tokenizer, **arguments)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self._samples[index]
        return sample | {"labels": torch.full_like(sample["labels"], -100)} if index % 4 == 1 else sample


@pytest.mark.parametrize(("processes", "unlabelled"), [(1, [2, 6]), (2, [])])
def test_batches_without_labels_neither_stop_nor_spoil_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int, unlabelled: list[int]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    dataset = ["dataset._component_=tests.recipes.test_resume.PartlyUnlabelled", "shuffle=False", "batch_size=1"]
    Run(tmp_path, *dataset, PLAIN, processes=processes).finish()
    assert (tmp_path / OUTPUT / "epoch_0" / MODEL_FILE).is_file(), "which is not saved if a weight is not finite"
    # A step of nothing else is logged as 0 / 0. With two processes, the other has labels.
    assert [step for step, loss in steps(tmp_path) if not math.isfinite(float(loss))] == unlabelled
    assert len(steps(tmp_path)) == 6
