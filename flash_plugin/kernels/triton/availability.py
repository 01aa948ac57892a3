"""Whether Triton kernels can run on a device, and why not. Importing this file imports no triton."""

from __future__ import annotations

import functools
import os
import re
from typing import NamedTuple

import torch

#: The kernels use features and rely on fixes of this version; it is the oldest one they are tested with.
OLDEST_TRITON = (3, 6)
#: Ampere: the first architecture with bf16 tensor cores and asynchronous copies.
OLDEST_CAPABILITY = (8, 0)
# What Triton itself reads as true.
_TRUE = ("1", "true", "yes", "on", "y")


class Miscompilation(NamedTuple):
    """Triton versions that compile kernels like ours to wrong code for one architecture.

    Attributes:
        first: First version affected.
        last: Last version affected.
        capability: Compute capability affected.
        reason: What goes wrong, for the error message.
    """

    first: tuple[int, int, int]
    last: tuple[int, int, int]
    capability: tuple[int, int]
    reason: str


_RACE = "a matrix product that carries its accumulator through a loop gives other numbers each time it runs"

#: Faults that our kernels cannot avoid, and where they were reported; versions below :data:`OLDEST_TRITON` are refused
#: anyway. Faults that a kernel can avoid are not here: on Hopper, 3.4.0 to 3.7.0 transpose the result of one matrix
#: product wrongly for the next (github.com/fla-org/flash-linear-attention/issues/640), and assemblers older than CUDA
#: 13.3 may overwrite an operand that a product reads from registers (github.com/triton-lang/triton/pull/11781).
#: tests/kernels/triton/test_compilation.py looks for both in the compiled code and names the kernels that do either.
MISCOMPILATIONS = (
    # github.com/triton-lang/triton/issues/9871, mended in 3.7.0
    Miscompilation((3, 6, 0), (3, 6, 99), (10, 0), _RACE),
    # github.com/triton-lang/triton/issues/10590 and github.com/fla-org/flash-linear-attention/pull/1229
    Miscompilation((3, 6, 0), (3, 7, 99), (10, 3), _RACE),
)


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU (environment variable ``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in _TRUE


def why_unavailable(device: torch.device) -> str | None:
    """Say why Triton kernels cannot run on tensors of ``device``; None when they can. Never waits for the device."""
    installed = _installed_version()
    if installed is None:
        return "triton is not installed"
    if installed[:2] < OLDEST_TRITON:
        return f"triton {_dotted(installed)} is installed and {_dotted(OLDEST_TRITON)} is the oldest that works"
    if interpreted():
        return None if device.type == "cpu" else f"TRITON_INTERPRET=1 is set and interprets on the CPU, not on {device}"
    if device.type == "cpu":
        return "CPU tensors need Triton's interpreter (environment variable TRITON_INTERPRET=1)"
    if device.type != "cuda":
        return f"they run on CUDA devices, not on {device.type}"
    if torch.version.hip is not None:
        # They compile for MI300, but for the widest blocks, which ask for more shared memory than its 64 KiB.
        return "they are made for NVIDIA's GPUs, and this PyTorch is built for AMD's (ROCm)"
    if not torch.cuda.is_available():
        return "no CUDA device is available"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability {_dotted(capability)} and "
            f"{_dotted(OLDEST_CAPABILITY)} is the oldest that works"
        )
    return known_miscompilation(installed, capability)


# What torch.compiler.assume_constant_result does, but for its import of the whole compiler, and with it of triton:
# a trace holds the answer alone, since neither the import nor the device query can be traced.
why_unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def known_miscompilation(version: tuple[int, ...], capability: tuple[int, int]) -> str | None:
    """Say what a Triton version gets wrong on an architecture; None when nothing is known."""
    for entry in MISCOMPILATIONS:
        if entry.first <= version <= entry.last and capability == entry.capability:
            return f"triton {_dotted(version)} is known to miscompile them for this device: {entry.reason}"
    return None


@functools.cache
def _installed_version() -> tuple[int, ...] | None:
    try:
        import triton
    except ImportError:
        return None
    return tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:3])


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in version)
