"""Data sets for language modelling: any text, tokenised at the start, or a corpus that was tokenised before.

Both keep one flat array of token ids and the offsets of the documents in it, and cut samples out of it when they are
asked for. So a corpus costs 2 or 4 bytes a token (none, if it is memory-mapped), and packing costs nothing.

Unpacked samples hold up to ``max_seq_len`` tokens of one document. Packed samples, here called windows, are stretches
of exactly ``max_seq_len`` tokens, whatever documents they touch:

- each piece of a document in a window counts its positions from 0, even if the document began in an earlier window:
  a window is all that a model sees, chunk grids start with the piece, and positions stay below ``max_seq_len``;
- the first token of a piece has no left neighbour to be predicted from, so its label is ignored;
- the last window is filled up with padding, which is a piece of its own whose labels are ignored.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from torchtune.datasets import PackedDataset
from torchtune.modules.transforms.tokenizers import ModelTokenizer
from torchtune.utils import get_logger, get_world_size_and_rank, log_rank_zero
from tqdm import tqdm  # type: ignore[import-untyped]

from flash_plugin.components.arguments import config_component
from flash_plugin.components.sources import Document, in_split, read_documents
from flash_plugin.components.token_files import open_tokens, token_dtype


class WindowDataset(PackedDataset):
    """Windows of ``max_seq_len`` tokens over packed documents, built when they are asked for.

    It is torchtune's ``PackedDataset`` by type alone (nothing of it is run), because that is how torchtune's
    ``ConcatDataset`` tells packed data sets from others.

    Args:
        tokens (NDArray): The ids of all documents, ``[n]``.
        offsets (NDArray): Where documents begin, and the end of the last one, ``[documents + 1]``.
        max_seq_len (int): Tokens in a window.
        pad_id (int): What fills up the last window.
    """

    packed = True

    def __init__(
        self, tokens: NDArray[np.unsignedinteger[Any]], offsets: NDArray[np.int64], max_seq_len: int, pad_id: int
    ) -> None:
        self.max_seq_len = max_seq_len
        self._tokens, self._offsets, self._pad_id = tokens, offsets, pad_id

    def __len__(self) -> int:
        """Count the windows; a single token left over would be a window with nothing to predict, and is dropped."""
        return max(-(-(len(self._tokens) - 1) // self.max_seq_len), 0)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One window: ``tokens``, ``labels`` and ``input_pos`` ``[max_seq_len]``, ``seq_lens`` ``[pieces]``."""
        start = range(len(self))[index] * self.max_seq_len
        stop = min(start + self.max_seq_len, len(self._tokens))
        real = stop - start
        first, last = np.searchsorted(self._offsets, start, "right"), np.searchsorted(self._offsets, stop, "left")
        begins = [0, *(self._offsets[first:last] - start), *([real] if real < self.max_seq_len else [])]
        lengths = np.diff([*begins, self.max_seq_len])

        tokens = np.full(self.max_seq_len, self._pad_id, np.int64)
        tokens[:real] = self._tokens[start:stop]
        labels = tokens.copy()
        labels[begins] = CROSS_ENTROPY_IGNORE_IDX
        labels[real:] = CROSS_ENTROPY_IGNORE_IDX
        input_pos = np.arange(self.max_seq_len) - np.repeat(begins, lengths)
        sample = {"tokens": tokens, "labels": labels, "input_pos": input_pos, "seq_lens": lengths}
        return {key: torch.from_numpy(value) for key, value in sample.items()}


class DocumentDataset(Dataset):
    """Documents, those of more than ``max_seq_len`` tokens in several samples.

    Args:
        tokens (NDArray): The ids of all documents, ``[n]``.
        offsets (NDArray): Where documents begin, and the end of the last one, ``[documents + 1]``.
        max_seq_len (int | None): Most tokens in a sample; None leaves every document whole.
    """

    packed = False

    def __init__(
        self, tokens: NDArray[np.unsignedinteger[Any]], offsets: NDArray[np.int64], max_seq_len: int | None
    ) -> None:
        lengths = np.diff(offsets)
        self._tokens, self._offsets = tokens, offsets
        self._step = max_seq_len or int(lengths.max())
        # Minus one, because a single token left over would be a sample with nothing to predict.
        self._first_sample = np.concatenate([[0], np.cumsum(-(-(lengths - 1) // self._step))])

    def __len__(self) -> int:
        """Count the samples."""
        return int(self._first_sample[-1])

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """One sample: ``tokens`` and ``labels``, which the recipe shifts."""
        index = range(len(self))[index]
        document = int(np.searchsorted(self._first_sample, index, "right")) - 1
        start = int(self._offsets[document]) + (index - int(self._first_sample[document])) * self._step
        tokens = self._tokens[start : min(start + self._step, int(self._offsets[document + 1]))].tolist()
        return {"tokens": tokens, "labels": tokens.copy()}


@config_component
def text_dataset(
    tokenizer: ModelTokenizer,
    source: str | Sequence[str] = "python",
    *,
    packed: bool = False,
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
) -> WindowDataset | DocumentDataset:
    """Text for next-token prediction, tokenised when training starts and held in memory.

    Every process holds all of it; beyond some 100 million tokens use :func:`token_dataset`.

    Args:
        tokenizer (ModelTokenizer): Given by the recipe; its ``max_seq_len`` is the length of a sample.
        source (str | Sequence[str]): ``python`` (the standard library's source), a file, folder, glob, Hugging Face
            data set, or a list of those; see :func:`~flash_plugin.components.sources.read_documents`.
        packed (bool): Whether samples are windows over several documents. The recipe reads this key too, to choose how
            it batches, and takes it for False if it is missing; so does this function. Default is False.
        split (str): ``train``, ``validation`` or ``all``. Which documents are held out for validation depends on their
            names alone, so the splits never overlap. Default is "train".
        validation_fraction (float): The share of documents held out for validation. Default is 0.02.
        column (str): The column of a table or a Hub data set that holds the text. Default is "text".
        separator (str | None): What stands between the documents of a text file. Default is None, one document a file.
        add_eos (bool): Whether each document ends with the tokenizer's EOS. Default is True.
        include_tests (bool): Whether ``python`` includes the standard library's tests. Default is False.
        max_documents (int | None): Read this many documents, both splits together. Default is None, no limit.
        max_tokens (int | None): Keep the first so many tokens of the split. Default is None, no limit.
        min_samples (int): Refuse to train on fewer samples in each process than this. The recipe drops a last batch
            that is not full, so with fewer samples than ``batch_size`` it would train zero steps and save the result:
            set it to ``${batch_size}``, times the gradient accumulation steps. Processes that split a model
            (``tensor_parallel_dim``) share their samples, but which do is not known here, and each counts as one that
            has its own: too small a corpus is refused, and so is one that would just do. Default is 1.
        load_dataset_kwargs (Mapping[str, Any] | None): Further arguments of ``datasets.load_dataset`` for a Hub data
            set. Default is None.

    Returns:
        WindowDataset | DocumentDataset: The samples, packed or not.

    Raises:
        ValueError: If an argument is out of range, the source does not exist, or there are too few samples.
        RuntimeError: If a Hub data set is neither cached nor reachable.
    """
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(f"max_tokens ({max_tokens}) must be at least 2 or null; set max_tokens=null")
    in_split("", split, validation_fraction)  # refuse bad values before anything is read
    documents = read_documents(
        source,
        column=column,
        separator=separator,
        include_tests=include_tests,
        max_documents=max_documents,
        load_dataset_kwargs=load_dataset_kwargs,
    )
    chosen = (document for document in documents if in_split(document.name, split, validation_fraction))
    tokens, offsets = _tokenize(tokenizer, chosen, add_eos, max_tokens)
    origin = f"source ({source!r}), split ({split!r})"
    return _make_dataset(tokenizer, tokens, offsets, packed, tokenizer.max_seq_len, min_samples, origin)


@config_component
def token_dataset(
    tokenizer: ModelTokenizer,
    path: str | Path,
    *,
    seq_len: int | None = None,
    packed: bool = False,
    split: str = "train",
    min_samples: int = 1,
) -> WindowDataset | DocumentDataset:
    """A corpus that recipes/prepare_data.py tokenised, memory-mapped: of any size, and ready at once.

    Args:
        tokenizer (ModelTokenizer): Given by the recipe; must be the one that the corpus was made with.
        path (str | Path): The folder that recipes/prepare_data.py wrote.
        seq_len (int | None): Length of a sample. Default is None: the tokenizer's ``max_seq_len``.
        packed (bool): Whether samples are windows over several documents; see :func:`text_dataset`. Default is False.
        split (str): ``train`` or ``validation``. Default is "train".
        min_samples (int): Refuse to train on fewer samples in each process than this; see :func:`text_dataset`.
            Default is 1.

    Returns:
        WindowDataset | DocumentDataset: The samples, packed or not.

    Raises:
        ValueError: If there is no finished corpus of this tokenizer there, or it has too few samples.
        RuntimeError: If a file of the corpus is damaged.
    """
    limit = tokenizer.max_seq_len
    if seq_len is not None and (seq_len < 1 or (limit is not None and seq_len > limit)):
        raise ValueError(
            f"seq_len ({seq_len}) must be positive and at most tokenizer.max_seq_len ({limit}); set seq_len=null"
        )
    tokens, offsets = open_tokens(path, split, tokenizer)
    origin = f"path ({str(path)!r}), split ({split!r})"
    return _make_dataset(tokenizer, tokens, offsets, packed, seq_len or limit, min_samples, origin)


def _tokenize(
    tokenizer: ModelTokenizer, documents: Iterable[Document], add_eos: bool, max_tokens: int | None
) -> tuple[NDArray[np.unsignedinteger[Any]], NDArray[np.int64]]:
    """Every document's ids in one array that grows in place, and where the documents begin and end."""
    dtype = token_dtype(tokenizer)
    tokens, offsets = array(dtype.char), array("q", [0])
    silent = None if get_world_size_and_rank()[1] == 0 else True  # None: only where it is seen
    for document in tqdm(documents, desc="Tokenizing", unit=" documents", disable=silent):
        tokens.fromlist(tokenizer.encode(text=document.text, add_bos=True, add_eos=add_eos))
        if max_tokens is not None:
            del tokens[max_tokens:]
        offsets.append(len(tokens))
        if len(tokens) == max_tokens:
            break
    return np.frombuffer(tokens, dtype), np.frombuffer(offsets, np.int64)


def _make_dataset(
    tokenizer: ModelTokenizer,
    tokens: NDArray[np.unsignedinteger[Any]],
    offsets: NDArray[np.int64],
    packed: bool,
    max_seq_len: int | None,
    min_samples: int,
    origin: str,
) -> WindowDataset | DocumentDataset:
    """The samples of a corpus, if there are enough of them; ``origin`` names it in errors."""
    if min_samples < 1:
        raise ValueError(f"min_samples ({min_samples}) must be at least 1; set min_samples=${{batch_size}}")
    if packed and max_seq_len is None:
        raise ValueError("packed (True) must come with a length of the windows; set tokenizer.max_seq_len=2048")
    if len(tokens) == 0:
        raise ValueError(
            f"{origin} must hold at least one document that is not empty; "
            "give more text, or for a source of few documents set separator or another validation_fraction"
        )
    dataset: WindowDataset | DocumentDataset
    if packed:
        assert max_seq_len is not None
        dataset = WindowDataset(tokens, offsets, max_seq_len, tokenizer.pad_id)
    else:
        dataset = DocumentDataset(tokens, offsets, max_seq_len)
    processes = get_world_size_and_rank()[0]
    # The recipe's sampler gives each process the same number, repeating a few samples if need be.
    samples = -(-len(dataset) // processes)
    if samples < min_samples:
        raise ValueError(
            f"min_samples ({min_samples}) must not exceed the samples that each process gets, and {origin} has "
            f"{len(tokens)} tokens, which make {samples} for each of {processes}; give more text, or lower batch_size "
            "or tokenizer.max_seq_len"
        )
    log_rank_zero(get_logger(), f"{origin}: {len(offsets) - 1} documents, {len(tokens)} tokens, {len(dataset)} samples")
    return dataset
