"""What the studies share: runs of stock recipes, and held-out bits per byte of what they trained."""

from __future__ import annotations

import inspect
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn
from torchtune import config, utils

from flash_plugin import text_dataset
from flash_plugin.components.sources import in_split, read_documents

WEIGHTS = "model-00001-of-00001.bin"

logger = utils.get_logger("INFO")


def checkpointer(model: Mapping[str, Any], output_dir: Path, start: Path | None, seed: int = 0) -> dict[str, Any]:
    """The node of a checkpointer that begins with the weights in `start`, or from scratch."""
    node: dict[str, Any] = {
        "_component_": "flash_plugin.FlashCheckpointer",
        "output_dir": str(output_dir),
        "model_type": "FLASH",
    }
    if start is None:
        return {**node, "init_model": model, "init_seed": seed}
    return {**node, "checkpoint_dir": str(start), "checkpoint_files": [WEIGHTS]}


def beside(folder: Path, suffix: str) -> Path:
    """A file that stands beside a run's folder and has its name."""
    return folder.with_name(f"{folder.name}.{suffix}")


def run(recipe: str, cfg: Mapping[str, Any], *, log: Path | None = None, num_threads: int | None = None) -> Path:
    """Write a config beside its `output_dir`, let the stock recipe run it, and return the folder with the weights.

    Components of the studies' own may stand in it, since this folder is on the run's path.
    """
    folder = Path(cfg["output_dir"])
    written = beside(folder, "yaml")
    written.parent.mkdir(parents=True, exist_ok=True)
    log_dir = {"metric_logger": {**cfg["metric_logger"], "log_dir": str(folder / "logs")}}
    OmegaConf.save(OmegaConf.create({**cfg, **log_dir}), written)
    command = [str(Path(sys.executable).parent / "tune"), "run", recipe, "--config", str(written)]
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    logger.info(" ".join(["tune", *command[1:]]))
    environment = {**os.environ, "PYTHONPATH": path}
    if num_threads is not None:
        environment["OMP_NUM_THREADS"] = str(num_threads)
    if log is None:
        subprocess.run(command, check=True, env=environment)
        return folder / f"epoch_{cfg['epochs'] - 1}"
    with log.open("w") as file:
        done = subprocess.run(command, check=False, env=environment, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed; the end of {log}:\n{log.read_text()[-3000:]}")
    return folder / f"epoch_{cfg['epochs'] - 1}"


def load(node: Mapping[str, Any], weights: Path) -> nn.Module:
    """A model with the weights in a folder; what they lack starts where the model says."""
    model: nn.Module = config.instantiate(OmegaConf.create(dict(node)))
    model.load_state_dict(torch.load(weights / WEIGHTS, mmap=True))
    return model


def held_out(tokenizer: Any, source: str, seq_lens: Iterable[int], count: int) -> Tensor:
    """Up to `count` stretches, each as long as the longest length, of documents that no run is trained on.

    First come the beginnings of documents, then their second stretches, and so on.
    """
    longest = max(seq_lens)
    fraction = inspect.signature(text_dataset).parameters["validation_fraction"].default
    texts = (document.text for document in read_documents(source) if in_split(document.name, "validation", fraction))
    cut: list[tuple[int, Tensor]] = []
    for text in texts:
        tokens = torch.tensor(tokenizer.encode(text, add_bos=False, add_eos=False))
        starts = range(0, len(tokens) - longest + 1, longest)
        cut += [(place, tokens[start : start + longest]) for place, start in enumerate(starts)]
    windows = [window for _, window in sorted(cut, key=lambda one: one[0])][:count]
    if not windows:
        raise ValueError(
            f"seq_lens ({longest}) must fit the held-out documents, none of which is so long; set smaller ones"
        )
    return torch.stack(windows)


@torch.no_grad()
def bits_per_byte(model: nn.Module, windows: Tensor, seq_len: int, tokenizer: Any) -> float:
    """Mean loss on the second half of each stretch of `seq_len` tokens, whose context is at least half of that.

    So other lengths score other tokens: compare models at one length, not lengths.
    """
    total, count = 0.0, 0
    for stretch in windows.unfold(1, seq_len, seq_len).flatten(0, 1):
        logits, half = model(stretch[None])[0], seq_len // 2
        total += F.cross_entropy(logits[half:-1], stretch[half + 1 :], reduction="sum").item()
        count += len(tokenizer.encoding.decode_bytes(stretch[half + 1 :].tolist()))
    return total / count / math.log(2)
