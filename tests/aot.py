"""Ahead-of-time compilation, without a GPU: what every kernel of some calls becomes on one architecture.

``python -m tests.aot 90`` compiles the calls of ``tests/aot_calls.py`` for compute capability 9.0 and prints a table of
registers, spills, shared memory, tensor-core instructions. The calls run their real launch code, on CPU tensors whose
contents nobody reads; each launch is compiled, for every configuration that fits it, instead of run. Triton itself
chooses the specialisation, as it would on a GPU. It cannot do that in a process that interprets kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from flash_plugin.kernels.triton.tuning import Config

#: Bytes of shared memory that one block may use: CUDA programming guide, technical specifications. sm_80 itself has
#: 163 KiB, but sm_86 and sm_89, which run what is compiled for it, have 99. CI compiles for CHIPS alone.
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
CHIPS = (80, 90)


@dataclass(frozen=True)
class Report:
    """One compiled kernel.

    Attributes:
        kernel: Its name.
        config: Warps, stages and what tuning chose.
        call: The first call that needed it.
        constants: Its other compile-time constants, and the element types of its tensors.
        registers: Registers of a thread.
        spilled: Bytes of them that were written to memory for want of space.
        shared: Bytes of shared memory of a block.
        products: Matrix products of 16-bit operands in the source.
        hgmma: Hopper's asynchronous tensor-core instructions, and those of sm_100 that took their place.
        hmma: Ampere's tensor-core instructions.
        serialized: Why the assembler made the tensor cores wait for each instruction; empty if it did not.
        register_operands: Asynchronous products that read an operand from registers.
        turned_products: Products of which a transposed result goes into another product.
        barriers: Barriers in the source.
    """

    kernel: str
    config: str
    call: str
    constants: str
    registers: int
    spilled: int
    shared: int
    products: int
    hgmma: int
    hmma: int
    serialized: str
    register_operands: int
    turned_products: int
    barriers: int


def compile_calls(capability: int, calls: Mapping[str, Callable[[], None]]) -> list[Report]:
    """Compile every kernel that the calls launch, each once. Not in a process that interprets kernels.

    A configuration that is not the call's default is compiled for the first call alone with elements of the same sizes.
    """
    import torch
    import triton
    from triton.backends.compiler import GPUTarget

    from flash_plugin.kernels import validation
    from flash_plugin.kernels.triton.tuning import TunedKernel

    class Driver:
        """Stands for the GPU: what Triton asks of it before a launch."""

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

    # A kernel from the cache comes without the assembler's log.
    os.environ.update(TRITON_ALWAYS_COMPILE="1", TRITON_DUMP_PTXAS_LOG="1")
    triton.runtime.driver.set_active(Driver())
    reports: list[Report] = []
    # Triton returns the same object for the same specialisation; they are kept, lest another one take an id over.
    compiled: dict[int, Any] = {}
    others: set[tuple[Any, ...]] = set()

    def compile_instead(
        self: TunedKernel, grid: Any, args: tuple[Any, ...], kwargs: dict[str, Any], default: Config
    ) -> None:
        named = dict(zip(self.fn.arg_names, args, strict=False)) | kwargs
        tensors = [value for value in named.values() if isinstance(value, torch.Tensor)]
        dtypes = " ".join(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
        for config in self.usable(args, kwargs):
            if config is not default:
                kind = (self.__name__, described(config), *(tensor.element_size() for tensor in tensors))
                if kind in others:
                    continue
                others.add(kind)
            log = io.StringIO()
            with contextlib.redirect_stdout(log):
                kernel = self.fn.warmup(*args, **kwargs, **config.options, grid=(1,))
            if id(kernel) not in compiled:
                compiled[id(kernel)] = kernel
                constants = " ".join(
                    f"{p.name}={named[p.name]}" for p in self.fn.params if p.is_constexpr and p.name in named
                )
                reports.append(
                    Report(
                        self.__name__, described(config), call, f"{constants} {dtypes}", **_read(kernel, log.getvalue())
                    )
                )

    with (
        mock.patch.object(validation, "why_unavailable", return_value=None),
        mock.patch.object(TunedKernel, "_launch", compile_instead),
    ):
        for call, run in calls.items():  # noqa: B007 compile_instead reads it
            run()
    return reports


def described(config: Config) -> str:
    """A configuration in words."""
    chosen = " ".join(f"{name}={value}" for name, value in config.meta.items())
    return f"warps={config.num_warps} stages={config.num_stages} {chosen}".strip()


def _read(kernel: Any, log: str) -> dict[str, Any]:
    """What the compiler's intermediate code and the assembler's log say."""
    source, layouts, code = kernel.asm["ttir"], kernel.asm["ttgir"], kernel.asm["ptx"]
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.search(r"Used (\d+) registers", log)
    assert spills and registers, f"the assembler's log is not understood: {log!r}"
    return {
        "registers": int(registers[1]),
        "spilled": max(int(spills[1]), int(spills[2])),
        "shared": kernel.metadata.shared,
        "products": len(re.findall(r"tt\.dot .*: tensor<\w+xb?f16> \*", source)),
        # The assembler makes one HGMMA or HMMA of each, or refuses.
        "hgmma": len(re.findall(r"\b(?:wgmma\.mma_async|tcgen05\.mma)\b", code)),
        "hmma": len(re.findall(r"\bmma\.sync\b", code)),
        "serialized": "; ".join(sorted(set(re.findall(r"instructions are serialized (?:due to )?(.*?) in ", log)))),
        "register_operands": len(re.findall(r"warp_group_dot .*: tensor<", layouts)),
        "turned_products": len(re.findall(r"tt\.trans .*: tensor<[^>]*#mma", layouts)),
        "barriers": len(re.findall(r"\b(?:gpu|ttg)\.barrier\b", source)),
    }


def table(reports: Iterable[Report]) -> str:
    """The reports in columns, for people."""
    names = [field.name for field in fields(Report) if field.name != "constants"]
    rows = [names, *([str(getattr(report, name)) for name in names] for report in reports)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(names))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def start(capability: int, output: Path, calls: str = "tests.aot_calls") -> subprocess.Popen[str]:
    """Compile a module's calls in a process of its own, which does not interpret; ``output`` gets the reports."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.aot", str(capability), "--calls", calls, "--json", str(output)]
    root = Path(__file__).parent.parent
    return subprocess.Popen(
        command, cwd=root, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen[str], output: Path) -> list[Report]:
    """Wait for what :func:`start` began."""
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    return [Report(**report) for report in json.loads(output.read_text())]


def main() -> None:
    """Compile the calls and print or write their reports."""
    parser = argparse.ArgumentParser(description="Compile every kernel that some calls launch, without a GPU.")
    parser.add_argument("capability", type=int, choices=SHARED_LIMIT)
    parser.add_argument("--calls", default="tests.aot_calls", help="module whose CALLS to compile")
    parser.add_argument("--only", default="", help="calls whose names contain this")
    parser.add_argument("--json", type=Path, help="write the reports here instead of printing them")
    arguments = parser.parse_args()
    calls = importlib.import_module(arguments.calls).CALLS
    reports = compile_calls(arguments.capability, {name: run for name, run in calls.items() if arguments.only in name})
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(report) for report in reports]))
    else:
        print(table(reports))


if __name__ == "__main__":
    main()
