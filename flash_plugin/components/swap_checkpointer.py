"""Hugging Face checkpoints of models with swapped attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torchtune import training
from torchtune.training import FullModelHFCheckpointer

#: Beside the weights, which stay a checkpoint of the original architecture: what swapped attention has besides.
GLOBAL_PATH_FILE = "global_path.pt"
# A module each: of mixed chunk attention, and of a layer of flash-linear-attention's.
_PARTS = (".attn.global_path.", ".attn.fla.")


class SwapCheckpointer(FullModelHFCheckpointer):
    """torchtune's Hugging Face checkpointer, for models with mixed chunk attention in the place of their own.

    The stock one loads a pretrained model into a swapped one as well, but cannot save it: it knows no Hugging Face name
    for the global path, or for layers of flash-linear-attention's. Here these go into ``epoch_N/global_path.pt``,
    beside weights in their usual names; a folder that has such a file is loaded with it. Arguments are those of
    ``torchtune.training.FullModelHFCheckpointer``.
    """

    def load_checkpoint(self) -> dict[str, Any]:
        """Load the weights, and the global path where the checkpoint has one."""
        checkpoint: dict[str, Any] = super().load_checkpoint()
        for key, folder in (
            (training.MODEL_KEY, Path(self._checkpoint_paths[0]).parent),
            (training.ADAPTER_KEY, self._adapter_checkpoint and Path(self._adapter_checkpoint).parent),
        ):
            if folder and (folder / GLOBAL_PATH_FILE).is_file():
                saved = training.checkpointing._utils.safe_torch_load(folder / GLOBAL_PATH_FILE)
                checkpoint[key].update(saved[key])
        return checkpoint

    def save_checkpoint(
        self,
        state_dict: dict[str, Any],
        epoch: int,
        intermediate_checkpoint: bool = False,
        adapter_only: bool = False,
    ) -> None:
        """Save an epoch; arguments and errors are those of ``FullModelHFCheckpointer.save_checkpoint``."""
        taken = {}
        for key in (training.MODEL_KEY, training.ADAPTER_KEY):
            weights = state_dict.get(key, {})
            taken[key] = {name: weights[name] for name in weights if _is_new(name)}
            if key in state_dict:
                state_dict[key] = {name: weights[name] for name in weights if not _is_new(name)}
        folder = self._output_dir / f"epoch_{epoch}"
        folder.mkdir(parents=True, exist_ok=True)
        # First, so that a kill in between leaves no checkpoint that has lost it.
        torch.save(taken, folder / GLOBAL_PATH_FILE)
        super().save_checkpoint(state_dict, epoch, intermediate_checkpoint, adapter_only)


def _is_new(name: str) -> bool:
    """Whether the original architecture has no such weight."""
    return any(part in name for part in _PARTS)
