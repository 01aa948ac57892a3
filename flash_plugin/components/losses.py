"""Cross-entropies that stop a run when it diverges, before its weights are spoilt and saved.

Named as the ones they extend: recipes tell the chunked one from others by its class's name. To change over, change the
path in a config: ``torch.nn.CrossEntropyLoss`` to ``flash_plugin.CrossEntropyLoss``, and
``torchtune.modules.loss.CEWithChunkedOutputLoss`` to ``flash_plugin.CEWithChunkedOutputLoss``.

They return the same loss, bit for bit, except that:

- a loss that is not finite is an error, raised before its gradients are worked out;
- a batch without a label to predict has the loss 0, and not 0 / 0. (If that is so on all of several processes in one
  step, the recipe itself divides zero gradients by zero labels, and the next batch is an error.)

For that the loss is read back from the device: one wait in each batch, beside those of the recipe, which copies the
batch there and reads the loss of each step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torchtune.modules import loss as host

from flash_plugin.components.arguments import config_component
from flash_plugin.kernels.validation import is_number

#: What to do then. A checkpoint's optimizer state holds the learning rate too, and torchtune resumes with that one.
AFTER_DIVERGENCE = (
    "start a new run from the last good checkpoint (checkpointer.checkpoint_dir and checkpoint_files) with a lower "
    "optimizer.lr, or resume with clip_grad_norm=1.0 (a resumed run keeps its learning rate)"
)


class _StopsWhenDiverged(nn.Module):
    """Put before a loss class: checks what its ``forward`` returns."""

    ignore_index: int
    _batches = 0

    def forward(self, logits: Tensor | list[Tensor], labels: Tensor) -> Tensor:
        """Mean cross-entropy of the labels that are not ignored.

        Args:
            logits: Logits ``[n, vocab]``, or those of each chunk ``[b, s / chunks, vocab]``.
            labels: Ids to predict, ``[n]`` or ``[b, s]``.

        Returns:
            The loss, 0 where all labels are ignored.

        Raises:
            ValueError: If the loss is not finite.
        """
        return self._checked(super().forward(logits, labels), logits, labels)

    @torch.compiler.disable  # distillation recipes compile the whole loss
    def _checked(self, loss: Tensor, logits: Tensor | list[Tensor], labels: Tensor) -> Tensor:
        self._batches += 1
        value = loss.item()
        if math.isfinite(value):
            return loss
        if (labels == self.ignore_index).all():
            return _nothing_to_learn(loss, logits)
        raise ValueError(
            f"the loss ({value}, in batch {self._batches} of this run) must be finite, and training has diverged (or "
            "in the step before no process had a label, by whose number gradients are divided); "
            f"{AFTER_DIVERGENCE}"
        )


def _nothing_to_learn(loss: Tensor, logits: Tensor | list[Tensor]) -> Tensor:
    """Zero, as the loss of a batch without labels."""
    if torch.distributed.is_initialized():
        # Every process must take part in a backward pass: a sum over nothing has gradients of zero.
        chunks = logits if isinstance(logits, list) else [logits]
        return torch.stack([chunk.flatten()[:0].sum() for chunk in chunks]).sum().to(loss.dtype)
    # The recipe divides all gradients of a step by its number of labels. If there is none, weights must have no
    # gradient at all: one of zero would become 0 / 0.
    return torch.zeros_like(loss, requires_grad=True)


class CrossEntropyLoss(_StopsWhenDiverged, nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss`` that stops a run when it diverges.

    Recipes multiply it by the number of labels, so it is always their mean.

    Args:
        ignore_index (int): The label of tokens that are not to be predicted. Default is -100.
        label_smoothing (float): How much of each target is spread over the vocabulary. Default is 0.0.
    """

    @config_component
    def __init__(self, ignore_index: int = -100, label_smoothing: float = 0.0) -> None:
        if not is_number(label_smoothing) or not 0 <= label_smoothing <= 1:
            raise ValueError(
                f"label_smoothing ({label_smoothing!r}) must lie between 0 and 1; set loss.label_smoothing=0.0"
            )
        super().__init__(ignore_index=ignore_index, label_smoothing=label_smoothing)


class CEWithChunkedOutputLoss(_StopsWhenDiverged, host.CEWithChunkedOutputLoss):
    """``torchtune.modules.loss.CEWithChunkedOutputLoss`` that stops a run when it diverges.

    Args:
        num_output_chunks (int): In how many chunks the logits are computed. Default is 8.
        ignore_index (int): The label of tokens that are not to be predicted. Default is -100.

    Raises:
        ValueError: If there is not at least one chunk.
    """

    @config_component
    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        if isinstance(num_output_chunks, bool) or not isinstance(num_output_chunks, int) or num_output_chunks < 1:
            raise ValueError(
                f"num_output_chunks ({num_output_chunks!r}) must be a positive integer; set loss.num_output_chunks=8"
            )
        super().__init__(num_output_chunks=num_output_chunks, ignore_index=ignore_index)
