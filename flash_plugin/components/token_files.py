"""The memory-mapped form of a tokenised corpus, and its crash-safe writer.

A folder holds, for each split, ``<split>.tokens`` (every document's ids, one after the other, little-endian uint16 or
uint32) and ``<split>.offsets`` (int64: 0, then the end of each document), and one ``metadata.json``, which appears
last and whole. Until then ``progress.json`` has its place and says how far the other files can be trusted.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from torchtune.modules.transforms.tokenizers import ModelTokenizer

METADATA, PROGRESS = "metadata.json", "progress.json"
PREPARED_SPLITS = ("train", "validation")

_PROBE = "Sphinx of black quartz, judge my vow! 0123456789\n" + "".join(map(chr, range(32, 1024)))


def token_dtype(tokenizer: ModelTokenizer) -> np.dtype[Any]:
    """The smallest little-endian type that holds every id; uint32 where the tokenizer does not say how many it has."""
    return np.dtype("<u2" if getattr(tokenizer, "vocab_size", 1 << 32) <= 1 << 16 else "<u4")


def tokenizer_fingerprint(tokenizer: ModelTokenizer) -> str:
    """A hash that differs where texts get different ids: our tokenizers' own, or that of a probe's ids for others."""
    if hasattr(tokenizer, "fingerprint"):
        return str(tokenizer.fingerprint)
    probe = tokenizer.encode(text=_PROBE, add_bos=True, add_eos=True)
    return hashlib.sha256(repr((probe, sorted(tokenizer.special_tokens.items()))).encode()).hexdigest()


def open_tokens(
    folder: str | Path, split: str, tokenizer: ModelTokenizer
) -> tuple[NDArray[np.unsignedinteger[Any]], NDArray[np.int64]]:
    """Memory-map one split of a prepared corpus.

    Args:
        folder (str | Path): The folder that recipes/prepare_data.py wrote.
        split (str): ``train`` or ``validation``.
        tokenizer (ModelTokenizer): The tokenizer of the model that will read the tokens.

    Returns:
        tuple[NDArray, NDArray]: The tokens ``[n]`` and the offsets ``[documents + 1]`` of the documents among them.

    Raises:
        ValueError: If the folder holds no finished corpus, the split is unknown or empty, or the corpus was made with
            another tokenizer.
        RuntimeError: If a file is not as long as the metadata say.
    """
    folder = Path(folder).expanduser()
    if not (folder / METADATA).is_file():
        state = "an unfinished one" if (folder / PROGRESS).is_file() else "none"
        raise ValueError(
            f"path ({str(folder)!r}) must be a folder with a finished corpus, and holds {state}; "
            "run recipes/prepare_data.py with output_dir set to it"
        )
    metadata = json.loads((folder / METADATA).read_text())
    counts = metadata["splits"].get(split, {"documents": 0})
    if counts["documents"] == 0:
        found = ", ".join(name for name, count in metadata["splits"].items() if count["documents"])
        raise ValueError(f"split ({split!r}) must be one that {folder} has documents of; set split to one of: {found}")
    if metadata["tokenizer"] != tokenizer_fingerprint(tokenizer):
        raise ValueError(
            f"path ({str(folder)!r}) must have been made with this run's tokenizer, and was made with another one, of "
            f"vocab_size {metadata['vocab_size']}; set tokenizer as in its {METADATA}, or run recipes/prepare_data.py "
            "again"
        )
    dtype = np.dtype(metadata["dtype"])
    return (
        _map(folder / f"{split}.tokens", dtype, counts["tokens"]),
        _map(folder / f"{split}.offsets", np.dtype("<i8"), counts["documents"] + 1),
    )


class TokenWriter:
    """Appends documents to a folder; whatever was committed survives a kill at any moment.

    A run that is started again on the same folder continues after the last commit, and the files come out as if it had
    never stopped. Use it as a context manager, so that its files are closed.

    Args:
        folder (str | Path): Where to write; made if it does not exist.
        tokenizer (ModelTokenizer): The tokenizer of the documents.
        job (Mapping[str, Any]): The settings that decide what is written, as JSON holds them.

    Attributes:
        finished (bool): Whether this very job is complete, so that there is nothing to write.

    Raises:
        ValueError: If the folder holds the corpus, or part of the corpus, of other settings.
    """

    def __init__(self, folder: str | Path, tokenizer: ModelTokenizer, job: Mapping[str, Any]) -> None:
        self.folder = Path(folder).expanduser()
        self.dtype = token_dtype(tokenizer)
        self._record: dict[str, Any] = {
            "format": 1,
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "vocab_size": getattr(tokenizer, "vocab_size", None),
            "dtype": self.dtype.str,
            "job": json.loads(json.dumps(job)),
            "documents_read": 0,
            "last_document": None,
            "splits": {split: {"documents": 0, "tokens": 0} for split in PREPARED_SPLITS},
        }
        self._files: dict[str, BinaryIO] = {}
        self._stack = ExitStack()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.finished = (self.folder / METADATA).is_file()
        earlier = self.folder / (METADATA if self.finished else PROGRESS)
        if earlier.is_file():
            self._adopt(json.loads(earlier.read_text()))

    @property
    def documents_read(self) -> int:
        """How many documents of the source are committed, both splits together."""
        return int(self._record["documents_read"])

    @property
    def last_document(self) -> str | None:
        """The name of the last committed document."""
        name: str | None = self._record["last_document"]
        return name

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Documents and tokens of each split, those not yet committed included."""
        splits: dict[str, dict[str, int]] = self._record["splits"]
        return splits

    def __enter__(self) -> TokenWriter:
        """Open the files at the last commit; what a killed run wrote behind it is cut off."""
        if not self.finished:
            for split, count in self.counts.items():
                self._open(f"{split}.tokens", count["tokens"] * self.dtype.itemsize)
                self._open(f"{split}.offsets", (count["documents"] + 1) * 8 if count["documents"] else 0)
                if not count["documents"]:
                    self._files[f"{split}.offsets"].write(np.zeros(1, "<i8").tobytes())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the files; what was not committed will be cut off when the run is started again."""
        self._stack.close()

    def append(self, split: str, tokens: NDArray[Any]) -> None:
        """Add one document to a split; it lasts from the next commit on."""
        count = self.counts[split]
        count["documents"] += 1
        count["tokens"] += len(tokens)
        self._files[f"{split}.tokens"].write(tokens.astype(self.dtype, copy=False).tobytes())
        self._files[f"{split}.offsets"].write(np.array(count["tokens"], "<i8").tobytes())

    def commit(self, documents: int, last_document: str) -> None:
        """Make everything appended so far last: the data first, then the record that vouches for them.

        Args:
            documents (int): How many documents of the source were appended since the last commit.
            last_document (str): The name of the last one.
        """
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self._record["documents_read"] += documents
        self._record["last_document"] = last_document
        temporary = self.folder / f"{PROGRESS}.tmp"
        with open(temporary, "w", encoding="utf-8") as record:
            json.dump(self._record, record, indent=2)
            record.flush()
            os.fsync(record.fileno())
        os.replace(temporary, self.folder / PROGRESS)

    def finish(self) -> None:
        """Declare the corpus complete, once everything is committed."""
        os.replace(self.folder / PROGRESS, self.folder / METADATA)
        self.finished = True

    def _adopt(self, earlier: dict[str, Any]) -> None:
        """Continue from the record of an earlier run, if it was the same job."""
        for key in ("format", "tokenizer", "vocab_size", "dtype", "job"):
            if earlier.get(key) != self._record[key]:
                raise ValueError(
                    f"output_dir ({str(self.folder)!r}) must be empty or belong to this very job, and holds one whose "
                    f"{key} is {earlier.get(key)}, not {self._record[key]}; set another output_dir, or delete it"
                )
        self._record = earlier

    def _open(self, name: str, size: int) -> None:
        """Open one file for appending behind its first ``size`` bytes."""
        path = self.folder / name
        path.touch()
        file = self._stack.enter_context(open(path, "r+b"))
        if path.stat().st_size < size:
            raise RuntimeError(
                f"output_dir ({str(self.folder)!r}) must hold the {size} bytes of {name} that {PROGRESS} records, and "
                "has fewer; delete the folder and start again"
            )
        file.truncate(size)
        file.seek(size)
        self._files[name] = file


def _map(path: Path, dtype: np.dtype[Any], length: int) -> NDArray[Any]:
    """Memory-map a file that must hold exactly ``length`` values."""
    size = path.stat().st_size if path.is_file() else 0
    if size != length * dtype.itemsize:
        raise RuntimeError(
            f"{path} must hold {length * dtype.itemsize} bytes, and holds {size}; delete its folder and run "
            "recipes/prepare_data.py again"
        )
    return np.memmap(path, dtype=dtype, mode="r", shape=(length,))
