"""Where text comes from: the standard library's own source, files, folders, globs, tables and the Hugging Face Hub.

Every document has a name that does not depend on the machine, and a hash of that name alone decides whether the
document is for training or for validation. So every program that reads the same source holds out the same text.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import logging
import os
import re
import sysconfig
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets  # type: ignore[import-untyped]
from torchtune.utils import get_logger, log_rank_zero

from flash_plugin.components.arguments import config_component

SPLITS = ("train", "validation", "all")

# Files that `datasets` reads as rows; every other file is one text.
_TABLES = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".parquet": "parquet"}
_COMPRESSIONS = {".gz", ".bz2", ".xz", ".zst"}
_BLOCK_CHARACTERS = 1 << 20


class Document(NamedTuple):
    """One text and its name, which is relative to the source it came from."""

    name: str
    text: str


@config_component
def read_documents(
    source: str | Sequence[str] = "python",
    *,
    column: str = "text",
    separator: str | None = None,
    include_tests: bool = False,
    max_documents: int | None = None,
    load_dataset_kwargs: Mapping[str, Any] | None = None,
) -> Iterator[Document]:
    """Read a source document by document, always in the same order; empty documents are left out.

    Args:
        source (str | Sequence[str]): ``python`` (the source of the standard library, which is on every machine), a
            file, a folder, a glob (``**`` reaches into subfolders), a data set on the Hugging Face Hub, or a list of
            those. .json, .jsonl, .csv and .parquet files are tables with a document in each row; any other file is a
            text, and one that is not UTF-8 is skipped with a warning. Default is "python".
        column (str): The column of a table or a Hub data set that holds the text. Default is "text".
        separator (str | None): What stands between the documents of a text file, e.g. ``<|endoftext|>``; such files
            are read piece by piece. Default is None: each text file is one document, read whole.
        include_tests (bool): Whether ``python`` includes the standard library's tests. Default is False.
        max_documents (int | None): Stop after this many. Default is None, no limit.
        load_dataset_kwargs (Mapping[str, Any] | None): Further arguments of ``datasets.load_dataset`` for a Hub data
            set, such as ``name``, ``split`` (which is "train" if not given) or ``streaming``. Default is None.

    Returns:
        Iterator[Document]: The documents.

    Raises:
        ValueError: If a source does not exist, a table has no such column, or an argument does not apply.
        RuntimeError: If the Hub cannot be reached.
    """
    if separator == "":
        raise ValueError("separator ('') must not be empty; set separator=null to read each file as one document")
    if max_documents is not None and max_documents < 1:
        raise ValueError(f"max_documents ({max_documents}) must be at least 1 or null; set max_documents=null")
    items = [source] if isinstance(source, str) else list(source)
    sources = {item: _find_files(item, include_tests) for item in items}  # a misspelt one shall fail before any is read
    if load_dataset_kwargs and None not in sources.values():
        raise ValueError(
            f"load_dataset_kwargs ({dict(load_dataset_kwargs)}) must be null for local files, and source ({source!r}) "
            "is local; remove load_dataset_kwargs"
        )

    def read() -> Iterator[Document]:
        for item, files in sources.items():
            if files is None:
                yield from _read_hub(item, column, load_dataset_kwargs or {})
            else:
                yield from _read_files(files, column, separator)

    return itertools.islice((document for document in read() if document.text), max_documents)


def in_split(name: str, split: str, validation_fraction: float) -> bool:
    """Whether the document of this name belongs to a split.

    Args:
        name (str): The document's name.
        split (str): ``train``, ``validation`` or ``all``.
        validation_fraction (float): The share of documents, in [0, 1), that is held out for validation.

    Returns:
        bool: Always the same for the same arguments, on every machine and in every process.

    Raises:
        ValueError: If the split is unknown or the fraction is out of range.
    """
    if split not in SPLITS:
        raise ValueError(
            f"split ({split!r}) must be one of {', '.join(SPLITS)}; for a split that the Hugging Face Hub defines, "
            f"set split=all and load_dataset_kwargs.split={split}"
        )
    if not 0.0 <= validation_fraction < 1.0:
        raise ValueError(f"validation_fraction ({validation_fraction}) must lie in [0, 1); set it to 0.02, for example")
    digest = hashlib.blake2b(name.encode("utf-8", errors="surrogateescape"), digest_size=8).digest()
    held_out = int.from_bytes(digest, "big") < validation_fraction * 2**64
    return split == "all" or held_out == (split == "validation")


class _Files(NamedTuple):
    """Files and the folder that their documents' names are relative to."""

    root: Path
    paths: list[Path]


def _find_files(item: str, include_tests: bool) -> _Files | None:
    """The files that one source names, sorted; None if it can only be a name on the Hub."""
    if item == "python":
        root = Path(sysconfig.get_paths()["stdlib"])
        tests = () if include_tests else ("test", "tests", "idle_test")
        return _Files(root, _walk(root, ".py", {"site-packages", "dist-packages", "__pycache__", *tests}))
    path = Path(item).expanduser()
    if path.is_file():
        return _Files(path.parent, [path])
    if path.is_dir():
        return _Files(path, _walk(path, "", {"__pycache__"}))
    if glob.has_magic(item):
        paths = sorted(match for name in glob.glob(str(path), recursive=True) if (match := Path(name)).is_file())
        if paths:
            return _Files(Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts)), paths)
    elif re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", item) and path.suffix not in {".txt", ".md", ".py", *_TABLES}:
        return None
    raise ValueError(
        f"source ({item!r}) must be python, a file, a folder, a glob that matches a file, or the name of a data set "
        f"on the Hugging Face Hub, and nothing is there (from {Path.cwd()}); correct the path"
    )


def _walk(root: Path, suffix: str, excluded: Collection[str]) -> list[Path]:
    """Every file below a folder with this suffix, sorted, outside hidden and excluded folders."""
    paths = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in excluded and not name.startswith(".")]
        paths += [Path(folder, name) for name in files if name.endswith(suffix) and not name.startswith(".")]
    return sorted(paths)


def _read_files(files: _Files, column: str, separator: str | None) -> Iterator[Document]:
    """The documents of local files; files that are not text are skipped, counted and named."""
    skipped = []
    for path in files.paths:
        name = path.relative_to(files.root).as_posix()
        suffixes = [suffix for suffix in path.suffixes if suffix not in _COMPRESSIONS]
        table = _TABLES.get(suffixes[-1]) if suffixes else None
        if table is not None:
            yield from _read_table(path, name, table, column)
            continue
        try:
            yield from _read_text(path, name, separator)
        except UnicodeDecodeError:
            skipped.append(name)
    if skipped:
        message = (
            f"Skipped {len(skipped)} of {len(files.paths)} files in {files.root}, which are not UTF-8 text "
            f"(with a separator: from the first such byte on): {', '.join(skipped[:5])}{', ...' * (len(skipped) > 5)}"
        )
        log_rank_zero(get_logger(), message, level=logging.WARNING)


def _read_table(path: Path, name: str, kind: str, column: str) -> Iterator[Document]:
    """The documents of one table."""
    if path.stat().st_size == 0:
        return  # `datasets` fails on it
    # Streaming reads a table piece by piece and leaves no copy of it in the cache of `datasets`.
    rows = datasets.load_dataset(kind, data_files=glob.escape(str(path)), split="train", streaming=True)
    try:
        yield from _read_rows(rows, column, name)
    except ValueError as error:  # the parsers' own errors are of this type, and do not name the file
        raise ValueError(f"source ({str(path)!r}) must be a well-formed {kind} table with text: {error}") from error


def _read_text(path: Path, name: str, separator: str | None) -> Iterator[Document]:
    """The documents of one text file, line ends as they are."""
    with open(path, encoding="utf-8", newline="") as file:
        if separator is None:
            yield Document(name, file.read())
            return
        number, rest = 0, ""
        while block := file.read(_BLOCK_CHARACTERS):
            *texts, rest = (rest + block).split(separator)
            for text in texts:
                yield Document(f"{name}:{number}", text)
                number += 1
        yield Document(f"{name}:{number}", rest)


def _read_hub(name: str, column: str, options: Mapping[str, Any]) -> Iterator[Document]:
    """The documents of a data set on the Hugging Face Hub, or of its local cache."""
    try:
        rows = datasets.load_dataset(name, **{"split": "train", **options})
    except ConnectionError as error:
        raise RuntimeError(
            f"source ({name!r}) must be a local path or a data set in the cache or reach of the Hugging Face Hub, and "
            "is none; correct the path, or download the data set on a machine with a network and set HF_HOME"
        ) from error
    except (FileNotFoundError, TypeError, ValueError) as error:
        raise ValueError(
            f"source ({name!r}) with load_dataset_kwargs ({dict(options)}) must be a data set on the Hugging Face Hub; "
            f"correct it: {error}"
        ) from error
    yield from _read_rows(rows, column, name)


def _read_rows(rows: Any, column: str, name: str) -> Iterator[Document]:
    """One document for each row; a row without text is an empty document."""
    for number, row in enumerate(rows):
        if column not in row:
            raise ValueError(f"column ({column!r}) must be one of {name}'s columns; choose from {', '.join(row)}")
        text = "" if row[column] is None else row[column]
        if not isinstance(text, str):
            raise ValueError(
                f"column ({column!r}) must hold text, and row {number} of {name} holds {type(text).__name__}; "
                f"choose from {', '.join(row)}"
            )
        yield Document(f"{name}:{number}", text)
