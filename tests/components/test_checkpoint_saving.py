"""FlashCheckpointer: saves are all or nothing, and what they leave behind resumes."""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest
import torch
from torchtune import training

from flash_plugin.components.checkpoint_files import STAGING_DIRNAME, AtomicSave, content_id
from flash_plugin.components.checkpointer import ADAPTER_FILE, MODEL_FILE, RECIPE_STATE_FILE, FlashCheckpointer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "output"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Weights to finetune, with a tokenizer beside them."""
    folder = tmp_path / "base"
    (folder / "extra").mkdir(parents=True)
    torch.save({"weight": torch.zeros(3)}, folder / "base.pt")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "extra" / "card.md").write_text("card")
    return folder


def weights_of(value: float) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((3,), value)}


def run_state(epoch: int, value: float | None = None, **others: Any) -> dict[str, Any]:
    """What a recipe hands over after ``epoch``; model and optimizer hold the same ``value``, so a mix would show."""
    value = float(epoch) if value is None else value
    return {
        training.MODEL_KEY: weights_of(value),
        training.OPT_KEY: {"moment": torch.full((3,), value)},
        training.EPOCHS_KEY: epoch + 1,
        training.SEED_KEY: 5,
        **others,
    }


def saver(output: Path, **arguments: Any) -> FlashCheckpointer:
    return FlashCheckpointer(output_dir=str(output), init_model={"_component_": "never.built"}, **arguments)


def resume(output: Path, **arguments: Any) -> dict[str, Any]:
    return FlashCheckpointer(output_dir=str(output), should_load_recipe_state=True, **arguments).load_checkpoint()


def values(checkpoint: dict[str, Any]) -> tuple[float, float, int]:
    """The value of the weights, of the optimizer, and the epochs run."""
    weight, moment = checkpoint[training.MODEL_KEY]["weight"], checkpoint[training.OPT_KEY]["moment"]
    return weight[0].item(), moment[0].item(), checkpoint[training.EPOCHS_KEY]


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# The layout


def test_the_layout_is_torchtunes(output: Path) -> None:
    state = run_state(0)
    saver(output).save_checkpoint(state, epoch=0, intermediate_checkpoint=True)
    saver(output).save_checkpoint({training.MODEL_KEY: weights_of(1.0)}, epoch=1)
    assert files(output) == ["epoch_0/" + MODEL_FILE, "epoch_1/" + MODEL_FILE, "recipe_state/recipe_state.pt"]
    assert training.MODEL_KEY in state, "the recipe's own dictionary stays as it is"
    recipe_state = torch.load(output / RECIPE_STATE_FILE)
    assert recipe_state.keys() >= {training.OPT_KEY, training.EPOCHS_KEY, training.SEED_KEY}
    assert training.MODEL_KEY not in recipe_state
    assert not (output / STAGING_DIRNAME).exists()


def test_what_lies_beside_the_weights_comes_along(base: Path, output: Path) -> None:
    checkpointer = FlashCheckpointer(checkpoint_dir=str(base), checkpoint_files=["base.pt"], output_dir=str(output))
    checkpointer.save_checkpoint(run_state(0), epoch=0)
    assert files(output) == ["epoch_0/extra/card.md", "epoch_0/" + MODEL_FILE, "epoch_0/tokenizer.json"]


def test_adapters(base: Path, output: Path) -> None:
    arguments: dict[str, Any] = {"checkpoint_dir": str(base), "checkpoint_files": ["base.pt"]}
    checkpointer = FlashCheckpointer(output_dir=str(output), **arguments)
    for epoch in range(2):
        adapter = {training.ADAPTER_KEY: weights_of(10.0 + epoch), training.ADAPTER_CONFIG: {"r": 4}}
        checkpointer.save_checkpoint(run_state(epoch, **adapter), epoch, intermediate_checkpoint=True)
    checkpoint = resume(output, **arguments)
    assert values(checkpoint) == (0.0, 1.0, 2), "the base, not the merged weights"
    assert checkpoint[training.ADAPTER_KEY]["weight"][0] == 11.0
    assert training.ADAPTER_CONFIG not in checkpoint
    with pytest.raises(ValueError, match=r"epoch_0/adapter_model.pt.* it was saved with epoch_1"):
        resume(output, adapter_checkpoint="epoch_0/" + ADAPTER_FILE, **arguments)
    with pytest.raises(ValueError, match=r"checkpoint_files \(None\) must name the weights that the adapter"):
        resume(output)


def test_adapter_only(base: Path, output: Path) -> None:
    checkpointer = FlashCheckpointer(checkpoint_dir=str(base), checkpoint_files=["base.pt"], output_dir=str(output))
    checkpointer.save_checkpoint({training.ADAPTER_KEY: weights_of(1.0)}, 0, adapter_only=True)
    assert MODEL_FILE not in str(files(output))
    with pytest.raises(ValueError, match=r"adapter_only \(True\) must come with adapter weights"):
        checkpointer.save_checkpoint(run_state(1), 1, adapter_only=True)


# Resuming


def test_resume_finds_the_epoch_of_the_recipe_state(output: Path) -> None:
    for epoch in range(3):
        saver(output).save_checkpoint(run_state(epoch), epoch, intermediate_checkpoint=True)
    assert values(resume(output)) == (2.0, 2.0, 3)
    assert values(resume(output, checkpoint_files=["epoch_2/" + MODEL_FILE])) == (2.0, 2.0, 3)
    # The last epoch of a run, or a kill between two renames, leaves weights that the recipe state does not know.
    saver(output).save_checkpoint({training.MODEL_KEY: weights_of(3.0)}, epoch=3)
    assert values(resume(output)) == (2.0, 2.0, 3)


def test_stock_recipe_states_resume(output: Path) -> None:
    saver(output).save_checkpoint(run_state(0), 0, intermediate_checkpoint=True)
    torch.save({training.EPOCHS_KEY: 1, training.OPT_KEY: {"moment": torch.ones(3)}}, output / RECIPE_STATE_FILE)
    assert values(resume(output)) == (0.0, 1.0, 1)


def test_what_does_not_belong_together_is_refused(output: Path) -> None:
    for epoch in range(2):
        saver(output).save_checkpoint(run_state(epoch), epoch, intermediate_checkpoint=True)
    with pytest.raises(ValueError, match=r"epoch_0/.* it was saved with epoch_1; set .*checkpoint_files=null"):
        resume(output, checkpoint_files=["epoch_0/" + MODEL_FILE])
    with pytest.raises(ValueError, match=r"\(weights.bin\) must be a file in .* holds epoch_0/model"):
        resume(output, checkpoint_files=["weights.bin"])
    # Another run's last epoch takes the place of the weights; its predecessor's recipe state stays.
    saver(output).save_checkpoint({training.MODEL_KEY: weights_of(9.0)}, epoch=1)
    with pytest.raises(ValueError, match="must be of the same run as .*/epoch_1/.*, which has been replaced since"):
        resume(output)


def test_damaged_recipe_states_are_refused(output: Path) -> None:
    saver(output).save_checkpoint(run_state(0), 0, intermediate_checkpoint=True)
    path = output / RECIPE_STATE_FILE
    torch.save({training.OPT_KEY: {}}, path)
    with pytest.raises(ValueError, match=rf"\({path}\) must say how many epochs have run, and its epochs_run is None"):
        resume(output)
    path.write_bytes(b"PK")
    with pytest.raises(ValueError, match=f"checkpoint {path} must be whole"):
        resume(output)


def test_the_content_id_is_of_the_content(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        torch.save(weights_of(value), tmp_path / name)
    (tmp_path / "d").write_text("no archive")
    ids = [content_id(tmp_path / name) for name in "abcd"]
    assert ids[0] == ids[1] != ids[2]
    assert ids[3] is None


# Failures


def test_an_error_in_the_block_changes_nothing(tmp_path: Path) -> None:
    torch.save(1, tmp_path / "kept")
    with pytest.raises(KeyboardInterrupt), AtomicSave(tmp_path) as save:
        save.write("kept", 2)
        save.write("folder/new", 3)
        raise KeyboardInterrupt
    assert files(tmp_path) == ["kept"]
    assert torch.load(tmp_path / "kept") == 1


def test_leftovers_of_a_killed_save_are_removed_by_the_next(output: Path) -> None:
    (output / STAGING_DIRNAME / "epoch_0").mkdir(parents=True)
    (output / STAGING_DIRNAME / "epoch_0" / MODEL_FILE).write_bytes(b"half")
    saver(output).save_checkpoint(run_state(1), epoch=1)
    assert files(output) == ["epoch_1/" + MODEL_FILE]


def test_a_folder_that_vanishes_is_one_sentence(output: Path) -> None:
    checkpointer = saver(output)
    output.rmdir()
    output.write_text("in the way")
    with pytest.raises(RuntimeError, match=r"could not be written to .*output \(.*set checkpointer.output_dir"):
        checkpointer.save_checkpoint(run_state(0), 0)


# Failures that need a process of their own: each function runs in one, by name.


def run_alone(function: Callable[[Path], None], output: Path) -> str:
    script = f"from {__name__} import *; {function.__name__}(Path({str(output)!r}))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip().splitlines()[-1]


def save(output: Path, epoch: int, size: int = 3, **arguments: Any) -> None:
    state = run_state(epoch) | {training.MODEL_KEY: {"weight": torch.full((size,), float(epoch))}}
    saver(output, **arguments).save_checkpoint(state, epoch, intermediate_checkpoint=True)


def fill_the_disk(output: Path) -> None:
    """No file may grow past what the first epoch needed, so the second fails in the middle of a file."""
    save(output, 0)
    limit = max(path.stat().st_size for path in output.rglob("*.*"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        save(output, 1, size=10_000)
    except RuntimeError as error:
        print(error)


def kill_at_every_step(output: Path) -> None:
    """Children that save epoch 1 kill themselves at their n-th event of a kind; prints how often that came about."""
    kills = dict.fromkeys(("open", "os.mkdir", "os.rename"), 0)
    for event in kills:
        while True:
            save(output, 0)
            child = os.fork()
            if child == 0:
                left = itertools.count(kills[event], step=-1)
                sys.addaudithook(
                    lambda name, _: os.kill(os.getpid(), SIGKILL) if name == event and next(left) == 0 else None  # noqa: B023
                )
                save(output, 1, keep_last=1)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            found = values(resume(output))
            assert found in ((0.0, 0.0, 1), (1.0, 1.0, 2)), (event, kills, found)
            if not os.WIFSIGNALED(status):
                break
            kills[event] += 1
    print(json.dumps(kills))


def kill_at_random(output: Path) -> None:
    """Children that save one epoch after the other are killed from outside."""
    save(output, 0)
    for attempt in range(8):
        first = values(resume(output))[2]
        child = os.fork()
        if child == 0:
            for epoch in itertools.count(first):
                save(output, epoch)
        while not (output / f"epoch_{first}").exists():
            time.sleep(0.001)
        time.sleep(random.Random(attempt).uniform(0, 0.1))
        os.kill(child, SIGKILL)
        os.waitpid(child, 0)
        weight, moment, epochs = values(resume(output))
        assert weight == moment == epochs - 1, (attempt, weight, moment, epochs)
        assert epochs >= first
    save(output, epochs)
    print("staging left" if (output / STAGING_DIRNAME).exists() else "clean")


def test_a_full_disk_keeps_the_last_checkpoint(output: Path) -> None:
    sentence = run_alone(fill_the_disk, output)
    assert sentence.startswith(f"the checkpoint of epoch 1 could not be written to {output} (")
    assert "GiB are free there) and earlier checkpoints are as they were; make room" in sentence
    assert files(output) == ["epoch_0/" + MODEL_FILE, "recipe_state/recipe_state.pt"]
    assert values(resume(output)) == (0.0, 0.0, 1)


def test_a_kill_at_any_step_leaves_a_checkpoint_that_resumes(output: Path) -> None:
    kills = json.loads(run_alone(kill_at_every_step, output))
    assert kills["os.rename"] == 3, "between the weights and the recipe state, and before the last epoch goes, too"
    assert min(kills.values()) > 0


def test_a_kill_at_any_moment_leaves_a_checkpoint_that_resumes(output: Path) -> None:
    assert run_alone(kill_at_random, output) == "clean"
