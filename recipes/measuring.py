"""What the benchmarks share: where a run took place, quantiles, memory, who could not take part, and the CSV file."""

from __future__ import annotations

import csv
import ctypes
import gc
import os
import platform
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike

import flash_plugin

QUANTILES = {"p20": 0.2, "p50": 0.5, "p80": 0.8}
MIB = 2**20
#: How to install what some contenders import.
INSTALL = {"fla": "flash-linear-attention==0.6.0", "flash_pytorch": "FLASH-pytorch==0.1.9"}
# By default glibc hands every block above 32 MiB back to the kernel when it is freed; a long sequence then pays for
# fresh pages at every step, whatever computes it.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**34), "MALLOC_TRIM_THRESHOLD_": str(2**36)}
_PACKAGES = ("torch", "triton", "torchtune", "torchao", "numpy", "FLASH-pytorch", "fla-core")
# They change what our kernels run, and what memory costs.
_VARIABLES = ("FLASH_PLUGIN_AUTOTUNE", "TRITON_INTERPRET", *_KEEP_MEMORY)

#: How far the largest of compared models may be above the smallest.
APART = 0.03

T = TypeVar("T")


class Missing(NamedTuple):
    """A candidate that did not run, and why, in one line."""

    candidate: Any
    reason: str


def attempt(candidate: Any, what: Callable[[], T]) -> T | Missing:
    """Result of ``what``, or why there is none."""
    result: T | Missing
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = what()
        except Exception as error:
            # Whatever it is, it must not cost the others their turn; every output reports it.
            result = Missing(candidate, _why(error, [str(warning.message) for warning in caught]))
    if not isinstance(result, Missing):
        for warning in caught:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return result


def _why(error: Exception, said: list[str]) -> str:
    """One line. SDPA says in warnings why it has no kernel."""
    if isinstance(error, BrokenProcessPool):
        return "its process was killed, on Linux most often for want of memory"
    if isinstance(error, ImportError):
        package = INSTALL.get((error.name or "").partition(".")[0])
        said = [f"pip install {package}"] if package else []
    kind = "" if type(error) is RuntimeError else f"{type(error).__name__}: "
    return " ".join(f"{kind}{'; '.join(dict.fromkeys([str(error), *said]))}".split())


def quantiles(name: str, values: ArrayLike) -> dict[str, float]:
    """``{name}_p20`` and so on."""
    return {f"{name}_{key}": float(np.quantile(values, level)) for key, level in QUANTILES.items()}


def check_equal_sizes(argument: str, counts: Mapping[str, int]) -> None:
    """Refuse to compare models of different sizes.

    Args:
        argument: What of the config names them.
        counts: How many parameters each has.

    Raises:
        ValueError: If the largest has over 3 % more than the smallest.
    """
    if not counts:
        return
    least, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    if counts[most] > (1 + APART) * counts[least]:
        raise ValueError(
            f"{argument} must have equal numbers of parameters, to {APART:.0%}, but {most} has {counts[most]:,} and "
            f"{least} has {counts[least]:,}; change num_layers or a width of {most}"
        )


def keep_memory() -> None:
    """Start this command once more, with a glibc that keeps what is freed; it reads that when a process starts."""
    if any(os.environ.get(name) != value for name, value in _KEEP_MEMORY.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **_KEEP_MEMORY})


def memory_mib(device: torch.device, *, restart: bool = False) -> float:
    """MiB at the peak so far; with ``restart`` MiB now, from which on peaks count.

    On a CPU what is resident of the process (Linux, glibc), on a GPU what torch's allocator has given out.
    """
    if restart:
        gc.collect()
    if device.type == "cuda":
        if restart:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / MIB
    if restart:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # give back what is free
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def matrix_product(size: int, device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    """A product of two square matrices, and its FLOPs: its rate is the most that a model can compute with."""
    a, b, product = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(3))
    return lambda: torch.mm(a, b, out=product), 2.0 * size**3


def surroundings(device: torch.device) -> dict[str, str]:
    """Device, driver, versions, date and command."""
    on_gpu = device.type == "cuda"
    return {
        "date": str(date.today()),
        "device": torch.cuda.get_device_name(device)
        if on_gpu
        else f"{_processor()}, {torch.get_num_threads()} threads",
        "driver": _driver() if on_gpu else "none",
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
        "flash_plugin": flash_plugin.__version__,
        **{name: _version(name) for name in _PACKAGES},
        "torch": torch.__version__,  # PyPI's metadata leaves out which build it is
        **{name: os.environ.get(name, "unset") for name in _VARIABLES},
        "command": f"python {' '.join(sys.argv)}",
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({error})"


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", information.read_text()) if information.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def write_csv(path: Path, fields: Sequence[str], header: Iterable[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Write rows below a header of comments, numbers with four digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.writelines(f"# {line}\n" for line in header)
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _short(value) if isinstance(value, float) else value for name, value in row.items()})


def _short(number: float) -> str:
    return np.format_float_positional(number, precision=4, fractional=False, trim="-")
