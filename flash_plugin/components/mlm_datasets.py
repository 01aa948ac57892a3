"""Data sets for masked language modelling: some tokens of a text are hidden, and the model says what they were.

Recipes are made for next-token prediction: they compare the logits at position t with ``labels[t + 1]``, and the last
position with nothing. So labels here stand one place to the right of the tokens they belong to, and a row is one place
longer than its text: every token can be a target, the first and the last too.

How a sample is masked is a function of ``seed``, its index and the indices of the other samples of its batch, and of
nothing else. A shuffled epoch makes other batches, so a sample is masked anew in each epoch; yet the same batch is
masked the same in whatever process or worker, and in a run that was resumed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from torchtune.datasets import PackedDataset
from torchtune.modules.transforms.tokenizers import ModelTokenizer

from flash_plugin.components.arguments import config_component
from flash_plugin.components.datasets import DocumentDataset, WindowDataset, text_dataset, token_dataset
from flash_plugin.components.masking import MASK, Masker, make_masker


class MaskedSample(dict[str, list[int]]):
    """An unpacked sample: ``tokens`` as the model sees them and ``targets``, both of length n."""

    def __missing__(self, key: str) -> list[int]:
        if key == "labels":  # what torchtune's own functions look for, which say nothing of padding
            raise ValueError(
                "collate_fn (torchtune.data.padded_collate_sft if not given) must be flash_plugin.mlm_collate for "
                "unpacked samples of a masked language model, which sees padding unless it is told; set "
                "collate_fn=flash_plugin.mlm_collate, or dataset.packed=True"
            )
        raise KeyError(key)


class _Samples(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


class _MaskedDataset(Dataset):
    """Samples of ``source``, masked; see the module's docstring for what decides how.

    Args:
        source: Samples of next-token prediction.
        masker: What hides tokens.
        seed: Base of all random choices.
        maskings: How often each sample is there, masked differently.
        pad_id: Id of padding.
    """

    packed: bool

    def __init__(self, source: _Samples, masker: Masker, seed: int, maskings: int, pad_id: int) -> None:
        self._source, self._masker, self._seed, self._maskings = source, masker, seed, maskings
        self._pad_id = pad_id

    def __len__(self) -> int:
        """Count the samples, each masking of one by itself."""
        return len(self._source) * self._maskings

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample, masked as in a batch of its own."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The samples of one batch: what torch's ``DataLoader`` calls."""
        batch = [range(len(self))[index] for index in indices]
        return [self._masked(index, np.random.default_rng([self._seed, index, *batch])) for index in batch]

    def _masked(self, index: int, random: np.random.Generator) -> dict[str, Any]:
        raise NotImplementedError


class MaskedDocuments(_MaskedDataset):
    """Documents, those that are too long for a sample in several, for :func:`mlm_collate`."""

    packed = False

    def _masked(self, index: int, random: np.random.Generator) -> dict[str, list[int]]:
        tokens = np.array(self._source[index % len(self._source)]["tokens"], np.int64)
        seen, targets = self._masker(tokens, random)
        return MaskedSample(tokens=seen.tolist(), targets=targets.tolist())


class MaskedWindows(_MaskedDataset, PackedDataset):
    """Windows over packed documents, for torchtune's own ``padded_collate_packed``.

    A window ends with one place of padding, which is a document of its own.
    """

    packed = True

    def _masked(self, index: int, random: np.random.Generator) -> dict[str, Tensor]:
        window = self._source[index % len(self._source)]
        seen, targets = map(torch.from_numpy, self._masker(window["tokens"].numpy(), random))
        return {
            "tokens": pad(seen, (0, 1), value=self._pad_id),
            "labels": pad(targets, (1, 0), value=CROSS_ENTROPY_IGNORE_IDX),
            "input_pos": pad(window["input_pos"], (0, 1), value=0),
            "seq_lens": pad(window["seq_lens"], (0, 1), value=1),
        }


def mlm_collate(
    batch: Sequence[Mapping[str, Sequence[int]]], padding_idx: int = 0, ignore_idx: int = CROSS_ENTROPY_IGNORE_IDX
) -> dict[str, Tensor]:
    """Make a batch of unpacked samples of :func:`mlm_dataset`, as recipes and bidirectional models want it.

    Args:
        batch (Sequence[Mapping[str, Sequence[int]]]): Samples, each with ``tokens`` and ``targets`` of one length.
        padding_idx (int): Id of padding. Default is 0; recipes give the tokenizer's.
        ignore_idx (int): Label of positions that are no targets. Default is -100; recipes give the loss's.

    Returns:
        dict[str, Tensor]: ``tokens``; ``labels``, where ``labels[:, t + 1]`` is the target at t; and ``mask``, True at
        real tokens. All ``[b, s]``, where s is one more than the longest sample has tokens.

    Raises:
        ValueError: If the samples are not unpacked ones of :func:`mlm_dataset`.
    """
    if any("targets" not in sample for sample in batch):
        raise ValueError(
            f"batch (samples of {', '.join(batch[0])}) must hold unpacked samples of flash_plugin.mlm_dataset; set "
            "dataset._component_=flash_plugin.mlm_dataset, or leave collate_fn out (packed samples are for "
            "torchtune.data.padded_collate_packed)"
        )

    def rows(key: str, filling: int) -> Tensor:
        return pad_sequence([torch.tensor(sample[key]) for sample in batch], batch_first=True, padding_value=filling)

    tokens, targets = rows("tokens", padding_idx), rows("targets", CROSS_ENTROPY_IGNORE_IDX)
    labels = targets.masked_fill(targets == CROSS_ENTROPY_IGNORE_IDX, ignore_idx)
    lengths = torch.tensor([len(sample["tokens"]) for sample in batch])
    return {
        "tokens": pad(tokens, (0, 1), value=padding_idx),
        "labels": pad(labels, (1, 0), value=ignore_idx),
        "mask": torch.arange(tokens.shape[1] + 1) < lengths[:, None],
    }


@config_component
def mlm_dataset(
    tokenizer: ModelTokenizer,
    source: str | Sequence[str] = "python",
    *,
    packed: bool = False,
    masking: str = "token",
    mask_fraction: float = 0.15,
    mask_share: float = 0.8,
    random_share: float = 0.1,
    mask_token: str = MASK,
    maskings: int = 1,
    seed: int = 0,
    split: str = "train",
    validation_fraction: float = 0.02,
    column: str = "text",
    separator: str | None = None,
    add_eos: bool = True,
    include_tests: bool = False,
    max_documents: int | None = None,
    max_tokens: int | None = None,
    min_samples: int = 1,
    load_dataset_kwargs: Mapping[str, Any] | None = None,
) -> MaskedWindows | MaskedDocuments:
    """Text for masked language modelling, tokenised when training starts and held in memory.

    Unpacked samples need ``collate_fn: flash_plugin.mlm_collate`` in the config; recipes collate packed ones unasked.

    Args:
        tokenizer (ModelTokenizer): Given by the recipe; must have a mask token. Its ``max_seq_len`` is the length of a
            sample with the place that is added to it.
        source (str | Sequence[str]): Where text comes from, as for
            :func:`~flash_plugin.components.datasets.text_dataset`, which explains what is not explained here. Default
            is "python".
        packed (bool): Whether samples are windows over several documents, which do not see each other; the recipe reads
            this key too. Default is False.
        masking (str): ``token`` chooses each target by itself, ``span`` spans of up to 10 tokens, 3.8 on average, as
            SpanBERT does. A span that meets a special token goes on behind it. Default is "token".
        mask_fraction (float): The share of a sample's ordinary tokens that become targets; each sample has at least
            one. Special tokens are never targets. Default is 0.15.
        mask_share (float): The share of targets that the model sees as the mask token. Default is 0.8.
        random_share (float): The share of targets, or spans, that it sees as ordinary tokens drawn at random (now and
            then the right one); what is left over it sees as they are. Default is 0.1.
        mask_token (str): Name of the mask token among the tokenizer's special tokens. Default is "<|mask|>".
        maskings (int): How often the corpus is repeated in an epoch, masked differently each time. A sample is masked
            anew in each epoch because its batch is another; set this to 10, say, where that is not so: with a
            ``batch_size`` of 1, with ``shuffle: False``, or in a list of data sets. Default is 1.
        seed (int): Base of all random choices. Default is 0.
        split (str): As there. Default is "train".
        validation_fraction (float): As there. Default is 0.02.
        column (str): As there. Default is "text".
        separator (str | None): As there. Default is None.
        add_eos (bool): As there. Default is True.
        include_tests (bool): As there. Default is False.
        max_documents (int | None): As there. Default is None.
        max_tokens (int | None): As there. Default is None.
        min_samples (int): As there, before they are repeated. Default is 1.
        load_dataset_kwargs (Mapping[str, Any] | None): As there. Default is None.

    Returns:
        MaskedWindows | MaskedDocuments: The samples, packed or not.

    Raises:
        ValueError: If an argument is out of range, the tokenizer has no such mask token, the source does not exist, or
            there are too few samples.
        RuntimeError: If a Hub data set is neither cached nor reachable.
    """
    masker = make_masker(tokenizer, masking, mask_fraction, mask_share, random_share, mask_token)
    _check_repetition(maskings, seed)
    samples = text_dataset(
        _one_shorter(tokenizer),
        source,
        packed=packed,
        split=split,
        validation_fraction=validation_fraction,
        column=column,
        separator=separator,
        add_eos=add_eos,
        include_tests=include_tests,
        max_documents=max_documents,
        max_tokens=max_tokens,
        min_samples=min_samples,
        load_dataset_kwargs=load_dataset_kwargs,
    )
    return _mask(samples, masker, seed, maskings, tokenizer)


@config_component
def mlm_token_dataset(
    tokenizer: ModelTokenizer,
    path: str | Path,
    *,
    packed: bool = False,
    masking: str = "token",
    mask_fraction: float = 0.15,
    mask_share: float = 0.8,
    random_share: float = 0.1,
    mask_token: str = MASK,
    maskings: int = 1,
    seed: int = 0,
    split: str = "train",
    min_samples: int = 1,
) -> MaskedWindows | MaskedDocuments:
    """A corpus that recipes/prepare_data.py tokenised, memory-mapped, for masked language modelling.

    Arguments and result are those of :func:`mlm_dataset`; ``path``, ``split`` and errors are those of
    :func:`~flash_plugin.components.datasets.token_dataset`. The corpus must have been made with this tokenizer, mask
    token and all.
    """
    masker = make_masker(tokenizer, masking, mask_fraction, mask_share, random_share, mask_token)
    _check_repetition(maskings, seed)
    samples = token_dataset(_one_shorter(tokenizer), path, packed=packed, split=split, min_samples=min_samples)
    return _mask(samples, masker, seed, maskings, tokenizer)


def _mask(
    samples: WindowDataset | DocumentDataset, masker: Masker, seed: int, maskings: int, tokenizer: ModelTokenizer
) -> MaskedWindows | MaskedDocuments:
    kind = MaskedWindows if isinstance(samples, WindowDataset) else MaskedDocuments
    return kind(samples, masker, seed, maskings, tokenizer.pad_id)


def _one_shorter(tokenizer: ModelTokenizer) -> ModelTokenizer:
    """The tokenizer with room in ``max_seq_len`` for the place that is added to a sample."""
    limit = tokenizer.max_seq_len
    if limit is None:
        return tokenizer
    if limit < 3:
        raise ValueError(
            f"tokenizer.max_seq_len ({limit}) must be at least 3 for masked language modelling, whose samples hold one "
            "place of padding; set tokenizer.max_seq_len=512"
        )
    shorter = copy.copy(tokenizer)
    shorter.max_seq_len = limit - 1
    return shorter


def _check_repetition(maskings: int, seed: int) -> None:
    if isinstance(maskings, bool) or not isinstance(maskings, int) or maskings < 1:
        raise ValueError(f"maskings ({maskings!r}) must be a positive integer; set dataset.maskings=1")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed ({seed!r}) must be an integer of at least 0; set dataset.seed=0")
