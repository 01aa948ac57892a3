"""Every kernel that ships, compiled for Ampere and Hopper without a GPU: it fits, and its products are the chip's own.

``pytest -s`` prints the table of registers; ``python -m tests.aot 90`` prints it without the test.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from flash_plugin.kernels import triton as kernels
from flash_plugin.kernels.triton.tuning import TunedKernel
from tests import aot
from tests.aot import Report
from tests.aot_calls import CALLS

pytestmark = pytest.mark.slow


class Stated(NamedTuple):
    """A fault that some compiled kernels may have.

    Attributes:
        fault: Name of the fault, a key of ``FAULTS``.
        kernel: Name of the kernel.
        where: What its constants must contain.
        most: The largest size of the fault that is allowed.
        reason: Why it is.
    """

    fault: str
    kernel: str
    where: str
    most: int
    reason: str


#: What a compiled kernel must not have, as a number that must be 0, by architecture.
FAULTS: dict[str, Callable[[Report, int], int]] = {
    "bytes of registers spilled": lambda report, chip: report.spilled,
    "bytes of shared memory too many": lambda report, chip: max(0, report.shared - aot.SHARED_LIMIT[chip]),
    "products of 16-bit operands off the tensor cores": lambda report, chip: (
        report.products * ((report.hgmma if chip == 90 else report.hmma) == 0)
    ),
    # On Hopper, Ampere's instructions reach half the rate.
    "products by the last generation's instructions": lambda report, chip: report.hmma * (chip == 90),
    "reasons to wait for each tensor-core instruction": lambda report, chip: int(report.serialized != ""),
    # Both may be miscompiled: availability.py says where that was reported.
    "asynchronous products with an operand in registers": lambda report, chip: report.register_operands,
    "products of a transposed product": lambda report, chip: report.turned_products * (chip == 90),
}

_SPILLED = "bytes of registers spilled"
_EPILOGUE = "a sum of 128 by 256 takes half of the registers; gate and output, read and written once, want the rest"
_PLAIN = "float32 products run on the plain cores, where the assembler keeps to 96 registers and may miss a few"

STATED: tuple[Stated, ...] = (
    Stated(_SPILLED, "mix_kernel", "TILE=128", 72, _EPILOGUE),
    Stated(_SPILLED, "scores_kernel", "TILE=64", 32, _PLAIN),
    Stated(_SPILLED, "scores_kernel", "LOCAL=True DIRECT=True", 48, "weights, slopes and both masks, on sm_80 alone"),
    Stated(_SPILLED, "state_gradient_kernel", "TILE=64", 32, _PLAIN),
    Stated(_SPILLED, "value_gradient_kernel", "PRECISION=ieee float16", 8, "two registers of 255, on sm_80 alone"),
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[int, list[Report]]:
    folder: Path = tmp_path_factory.mktemp("aot")
    running = {chip: aot.start(chip, folder / f"{chip}.json") for chip in aot.CHIPS}
    reports = {chip: aot.finish(process, folder / f"{chip}.json") for chip, process in running.items()}
    for chip, of_chip in reports.items():
        print(f"\nsm_{chip}\n{aot.table(of_chip)}")
    return reports


def allowance(fault: str, report: Report) -> int:
    return max((e.most for e in STATED if applies(e, fault, report)), default=0)


def applies(stated: Stated, fault: str, report: Report) -> bool:
    return stated[:2] == (fault, report.kernel) and stated.where in report.constants


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("chip", aot.CHIPS)
def test_no_kernel_has_a_fault_that_is_not_stated(chip, fault, compiled):
    faulty = [report for report in compiled[chip] if FAULTS[fault](report, chip) > allowance(fault, report)]
    listed = [f"{FAULTS[fault](r, chip)}: {r.kernel} ({r.config}), {r.call}: {r.constants}" for r in faulty]
    assert not listed, "\n".join([f"sm_{chip}, {fault}:", *listed])


def test_every_stated_fault_is_still_there(compiled):
    for stated in STATED:
        reports = [(chip, report) for chip in compiled for report in compiled[chip]]
        found = [
            FAULTS[stated.fault](report, chip) for chip, report in reports if applies(stated, stated.fault, report)
        ]
        assert max(found, default=0) > 0, f"{stated} is no longer there; take it off the list"


def test_linear_pairs_are_written_behind_a_barrier(compiled):
    """Over what other threads wrote: Triton's interpreter runs in order and cannot miss it."""
    for chip, reports in compiled.items():
        direct = [r for r in reports if r.kernel == "scores_kernel" and "DIRECT=True" in r.constants]
        assert direct, f"sm_{chip}"
        assert all(report.barriers for report in direct), f"sm_{chip}"


def test_every_call_is_compiled(compiled):
    """A call that launches nothing new must not stand in the list: it would only look like a check."""
    for chip, reports in compiled.items():
        assert {report.call for report in reports} == set(CALLS), f"sm_{chip}"


def test_every_kernel_and_configuration_of_the_package_is_compiled(compiled):
    modules = [importlib.import_module(f"{kernels.__name__}.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
    shipped = {kernel for module in modules for kernel in vars(module).values() if isinstance(kernel, TunedKernel)}
    expected = {(kernel.__name__, aot.described(config)) for kernel in shipped for config in kernel.configs}
    assert expected, "the package has no kernels"
    for chip, reports in compiled.items():
        assert expected == {(report.kernel, report.config) for report in reports}, f"sm_{chip}"


@pytest.mark.parametrize("chip", aot.CHIPS)
def test_faults_are_noticed(chip, tmp_path):
    """A control kernel has each fault in turn; a check that misses it would pass anything."""
    output = tmp_path / "controls.json"
    reports = aot.finish(aot.start(chip, output, "tests.aot_controls"), output)
    by_call = {report.call: report for report in reports}
    found = {call: {fault for fault in FAULTS if FAULTS[fault](report, chip)} for call, report in by_call.items()}
    spilled, memory, off, old, waits, from_registers, turned = FAULTS
    assert "plain again" not in found, "the same specialisation was compiled twice"
    assert found["plain"] == set()
    assert found["float32"] == {memory}
    assert spilled in found["crowded"]
    if chip == 90:
        assert found["turned"] == {from_registers, turned}
        assert from_registers in found["from registers"]
        assert waits in found["crowded"]
    plain = by_call["plain"]
    assert plain.products == 1 and 0 < plain.registers < 255
    assert FAULTS[off](replace(plain, hgmma=0, hmma=0), chip)
    assert bool(FAULTS[old](replace(plain, hmma=1), chip)) == (chip == 90)
