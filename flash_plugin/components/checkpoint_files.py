"""Checkpoint files on disk: read one, tell which files belong together, replace several at once or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
import zipfile
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torchtune.training.checkpointing._utils import SUFFIXES_TO_NOT_COPY, copy_files, safe_torch_load

CHECKPOINT_SUFFIXES = (".bin", ".pt", ".pth", ".safetensors")
STAGING_DIRNAME = ".saving"
EPOCH_FOLDER = r"epoch_(\d+)"
MAX_LISTED = 8


def listing(names: list[str]) -> str:
    """The names as one phrase; a long list ends in a count."""
    left_out = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {left_out} more" if left_out > 0 else "")


def first_line(error: BaseException | None) -> str:
    """What an error says, without the stack that torch's C++ errors carry below it."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def read_checkpoint(path: Path, *, weights_only: bool = True, mmap: bool = True) -> dict[str, Any]:
    """Read a checkpoint file onto the CPU.

    Args:
        path: A file written by ``torch.save``, or a ``.safetensors`` file.
        weights_only: Whether to accept nothing but tensors and plain data (quantized tensors need ``False``).
        mmap: Whether to map the file, so that tensors are read only when they are used.

    Raises:
        ValueError: If the file is truncated, corrupt or holds no dictionary.
    """
    try:
        # Only zip archives can be mapped; torch.save wrote another format before 1.6.
        content = safe_torch_load(path, weights_only=weights_only, mmap=mmap and zipfile.is_zipfile(path))
    except ValueError as error:
        raise ValueError(
            f"checkpoint {path} must be whole to be read, and it is truncated, corrupt or of another kind "
            f"({first_line(error.__cause__)}); load another file, such as the previous epoch's"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"checkpoint {path} (a {type(content).__name__}) must hold a dictionary; save model.state_dict() instead"
        )
    return content


def present(folder: Path) -> str:
    """A phrase that says which checkpoint files lie in ``folder`` and in its epoch folders."""
    if not folder.is_dir():
        return f"{folder} does not exist"
    paths = [*folder.iterdir(), *folder.glob("epoch_*/*")]
    names = sorted(str(path.relative_to(folder)) for path in paths if path.suffix in CHECKPOINT_SUFFIXES)
    return f"{folder} holds {listing(names) if names else 'no checkpoint file'}"


def find_checkpoint(argument: str, name: str, folder: Path, *, remedy: str = "name one that exists") -> Path:
    """The path of a checkpoint file that must exist.

    Args:
        argument: The argument that gave ``name``.
        name: The file, relative to ``folder``.
        folder: Where to look.
        remedy: What to do when it is not there.

    Raises:
        ValueError: If there is no such file, naming the ones that are there.
    """
    path = folder / name
    if not path.is_file():
        raise ValueError(
            f"{argument} ({name}) must be a file in {folder}, and there is none; {remedy} ({present(folder)})"
        )
    return path


def content_id(path: Path) -> str | None:
    """The hash of its content that ``torch.save`` leaves in a file, or ``None`` where it is of another kind."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".data/serialization_id")]
            return archive.read(names[0]).decode() if names else None
    except zipfile.BadZipFile:
        return None


def check_writable(folder: Path) -> None:
    """Make ``folder`` if need be.

    Raises:
        ValueError: If it cannot be made or written to: better now than after an epoch of training.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"output_dir ({folder}) must be a folder that can be written to ({error.strerror}); "
            "set checkpointer.output_dir to one that can"
        ) from error


def base_of_adapter(file: str | None, adapter: Path) -> str:
    """The name of the weights below an adapter, which only a config knows.

    Args:
        file: What the config names, if anything.
        adapter: The file of the adapter.

    Raises:
        ValueError: If the config names none.
    """
    if file is None:
        raise ValueError(
            f"checkpoint_files (None) must name the weights that the adapter {adapter} was trained on; set "
            "checkpointer.checkpoint_dir and checkpointer.checkpoint_files as in the run to resume"
        )
    return file


def check_same_epoch(trained: Path, recipe_state: Path, folder: str) -> None:
    """Refuse weights from an epoch folder that is not the recipe state's.

    Args:
        trained: The file of the weights.
        recipe_state: The file of the recipe state.
        folder: The epoch folder of the save that wrote the recipe state.

    Raises:
        ValueError: If ``trained`` lies in another epoch folder.
    """
    if re.fullmatch(EPOCH_FOLDER, trained.parent.name) and trained.parent.name != folder:
        raise ValueError(
            f"recipe_checkpoint ({recipe_state}) must be of the same epoch as {trained}, and it was saved with "
            f"{folder}; set checkpointer.checkpoint_files=null to resume from there"
        )


class AtomicSave:
    """Write several files below ``root`` so that a failure or a kill at any moment leaves the old ones usable.

    Everything is first written into one staging folder below ``root`` and forced to disk. Leaving the block renames
    the files into place one by one, in the order of :meth:`write`: whoever is killed between two renames leaves
    whole files only, of which the later ones are still the old ones. Leaving it by an error changes nothing.
    The staging folder that a killed process left behind is removed by the next save. Should two processes save at once
    (the workers of a launcher that was killed live on), the second waits for the first.

    Args:
        root: The folder that the names given to :meth:`write` are relative to.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._staging = root / STAGING_DIRNAME
        self._written: list[Path] = []
        self._retired: list[Path] = []

    def __enter__(self) -> AtomicSave:
        self._root.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self._root, os.O_RDONLY)
        try:
            # Some network file systems have no locks: there, nothing stops two processes that share a folder.
            with contextlib.suppress(OSError):
                fcntl.flock(self._lock, fcntl.LOCK_EX)
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging.mkdir()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)
            os.close(self._lock)

    def write(self, name: str, content: object) -> Path:
        """Write ``content`` aside with ``torch.save``, and return where it lies until the block is left."""
        path = self._staging / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path)
        self._written.append(path)
        return path

    def copy_companions(self, source: Path, name: str) -> None:
        """Copy what lies beside the weights in ``source`` (tokenizer, model card, ...) into the folder ``name``."""
        copy_files(source, self._staging / name, ignore_suffixes=SUFFIXES_TO_NOT_COPY)
        companions = sorted(path for path in (self._staging / name).rglob("*") if path.is_file())
        self._written.extend(path for path in companions if path not in self._written)

    def retire_epochs(self, last: int, spare: Path) -> None:
        """Remove the epoch folders up to ``last`` once everything that was written is in place.

        Args:
            last: The number of the last epoch to remove.
            spare: A folder that stays, with those that it lies in.
        """
        spared = (spare.resolve(), *spare.resolve().parents)
        for path in self._root.iterdir():
            epoch = re.fullmatch(EPOCH_FOLDER, path.name)
            if epoch and int(epoch[1]) <= last and path.resolve() not in spared:
                self._retired.append(path)

    def _publish(self) -> None:
        for path in self._written:
            _force_to_disk(path)
        for path in self._written:
            target = self._root / path.relative_to(self._staging)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
            # A rename is on disk only when its folder is, and the next rename must not get there first.
            _force_to_disk(target.parent)
        _force_to_disk(self._root)
        for folder in self._retired:
            # Whole or gone: what is moved to the staging folder goes with it, if need be at the next save.
            os.replace(folder, self._staging / f"{folder.name}.retired")


def _force_to_disk(path: Path) -> None:
    """Flush a file or a folder through the operating system's cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
