"""Tokenise a source of text once, into files that `flash_plugin.token_dataset` memory-maps.

Run: python recipes/prepare_data.py --config configs/prepare_data.yaml

A run that was killed continues where it stopped when it is started again, and the result is the same to the byte.
Memory holds one batch of documents, however large the source.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf
from torchtune import config
from torchtune.modules.transforms.tokenizers import ModelTokenizer
from torchtune.utils import get_logger
from tqdm import tqdm

from flash_plugin.components.arguments import config_component
from flash_plugin.components.sources import Document, in_split, read_documents
from flash_plugin.components.token_files import TokenWriter


@config_component
def prepare_data(
    tokenizer: ModelTokenizer,
    *,
    documents: Mapping[str, Any],
    output_dir: str,
    validation_fraction: float = 0.02,
    add_eos: bool = True,
    batch_characters: int = 4_000_000,
    num_workers: int = 1,
) -> dict[str, dict[str, int]]:
    """Tokenise every document of a source into a folder.

    Args:
        tokenizer (ModelTokenizer): The tokenizer of the models that will read the tokens.
        documents (Mapping[str, Any]): The source: arguments of `flash_plugin.components.sources.read_documents`.
        output_dir (str): The folder to write; `token_dataset`'s `path`.
        validation_fraction (float): The share of documents held out as split "validation", by their names as
            `text_dataset` does it. Default is 0.02.
        add_eos (bool): Whether each document ends with the tokenizer's EOS. Default is True.
        batch_characters (int): How much text is tokenised between two commits. Default is 4,000,000.
        num_workers (int): Threads that tokenise; tiktoken's run side by side. Default is 1.

    Returns:
        dict[str, dict[str, int]]: Documents and tokens of each split.

    Raises:
        ValueError: If an argument is out of range, the source is empty or has changed since the run was begun, or
            `output_dir` holds something else.
    """
    for name, value in (("batch_characters", batch_characters), ("num_workers", num_workers)):
        if value < 1:
            raise ValueError(f"{name} ({value}) must be at least 1; set {name}=1 or more")
    in_split("", "all", validation_fraction)  # refuse a bad fraction before anything is written
    source = read_documents(**documents)
    job = {"documents": dict(documents), "validation_fraction": validation_fraction, "add_eos": add_eos}
    encode = functools.partial(_encode, tokenizer, add_eos)
    with TokenWriter(output_dir, tokenizer, job) as writer, ThreadPoolExecutor(num_workers) as pool:
        if writer.finished:
            get_logger().info(f"{writer.folder} is already complete: {writer.counts}")
            return writer.counts
        _skip_committed(source, writer)
        with tqdm(desc="Tokenizing", unit=" tokens", unit_scale=True, initial=_tokens(writer)) as progress:
            for batch in _batches(source, batch_characters):
                for document, tokens in zip(batch, pool.map(encode, batch), strict=True):
                    held_out = in_split(document.name, "validation", validation_fraction)
                    writer.append("validation" if held_out else "train", tokens)
                    progress.update(len(tokens))
                writer.commit(len(batch), batch[-1].name)
        if writer.documents_read == 0:
            raise ValueError(f"documents ({dict(documents)}) must hold at least one document with text; give more text")
        writer.finish()
    get_logger().info(f"{writer.folder} is complete: {writer.counts}")
    return writer.counts


def _encode(tokenizer: ModelTokenizer, add_eos: bool, document: Document) -> NDArray[Any]:
    """One document's ids, as an array so that a batch of them stays small."""
    return np.asarray(tokenizer.encode(text=document.text, add_bos=True, add_eos=add_eos), np.uint32)


def _tokens(writer: TokenWriter) -> int:
    """The tokens of all splits."""
    return sum(count["tokens"] for count in writer.counts.values())


def _skip_committed(source: Iterator[Document], writer: TokenWriter) -> None:
    """Advance the source behind the last committed document, and make sure that it is the same source."""
    if writer.documents_read == 0:
        return
    get_logger().info(f"Continuing after {writer.documents_read} documents, {_tokens(writer)} tokens")
    last = next(itertools.islice(source, writer.documents_read - 1, None), None)
    if last is None or last.name != writer.last_document:
        raise ValueError(
            f"documents must be the same as when output_dir ({str(writer.folder)!r}) was begun, and document "
            f"{writer.documents_read} was {writer.last_document!r} then and is {last and last.name!r} now; "
            "delete output_dir and start again"
        )


def _batches(documents: Iterable[Document], characters: int) -> Iterator[list[Document]]:
    """Documents in batches that hold at least so many characters, the last one perhaps fewer."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@config.parse
def main(cfg: DictConfig) -> None:
    """Prepare the text that the configuration names."""
    get_logger("INFO")
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    if "tokenizer" in settings:
        settings["tokenizer"] = config.instantiate(cfg.tokenizer)
    prepare_data(**settings)


if __name__ == "__main__":
    main()
