"""Which implementation runs, and what is said when Triton was asked for and cannot."""

from __future__ import annotations

import subprocess
import sys
from unittest import mock

import pytest
import torch

from flash_plugin.kernels.triton import availability
from flash_plugin.kernels.triton.availability import known_miscompilation, why_unavailable
from flash_plugin.kernels.validation import check_attention, use_triton

CPU, META = torch.empty(1), torch.empty(1, device="meta")


@pytest.fixture
def interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def installed(version):
    return mock.patch.object(availability, "_installed_version", return_value=version)


def a_gpu(capability):
    return mock.patch.multiple(
        torch.cuda,
        is_available=lambda: True,
        get_device_capability=lambda device: capability,
        get_device_name=lambda device: "a GPU",
    )


class OnCuda:
    """Stands for a CUDA tensor where there is none: the choice reads its device alone."""

    device = torch.device("cuda:0")


def test_the_interpreter_runs_on_the_cpu_if_asked_for(interpreter):
    assert use_triton("triton", CPU)
    assert why_unavailable(CPU.device) is None


def test_auto_never_interprets(interpreter):
    assert not use_triton("auto", CPU)


def test_reference_is_never_triton(interpreter):
    assert not use_triton("reference", CPU)
    assert not use_triton("reference", CPU, unsupported="activation='softmax'")


def test_the_cpu_without_the_interpreter_is_refused_with_the_remedy(no_interpreter):
    assert not use_triton("auto", CPU)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1.*; set impl='auto' or impl='reference'"):
        use_triton("triton", CPU)


def test_other_devices_are_refused_by_name(no_interpreter):
    assert not use_triton("auto", META)
    with pytest.raises(RuntimeError, match="meta"):
        use_triton("triton", META)


def test_the_interpreter_does_not_run_on_a_gpu(interpreter):
    with a_gpu((9, 0)), pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 is set"):
        use_triton("triton", OnCuda)


def test_what_the_kernels_lack_is_refused_if_asked_for_and_not_chosen_by_itself(interpreter):
    assert not use_triton("auto", CPU, unsupported="activation='softmax'")
    with pytest.raises(ValueError, match="activation='softmax'.*; set impl='auto'"):
        use_triton("triton", CPU, unsupported="activation='softmax'")


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)], ids=str)
def test_auto_is_triton_on_a_gpu_that_runs_it(capability, no_interpreter):
    with a_gpu(capability), installed((3, 9, 0)):
        assert use_triton("auto", OnCuda)
        assert use_triton("triton", OnCuda)
        assert not use_triton("auto", OnCuda, unsupported="activation='softmax'")


def test_an_old_gpu_is_refused_by_name(no_interpreter):
    with a_gpu((7, 5)), installed((3, 9, 0)):
        assert not use_triton("auto", OnCuda)
        with pytest.raises(RuntimeError, match=r"a GPU has compute capability 7\.5 and 8\.0 is the oldest"):
            use_triton("triton", OnCuda)


def test_a_gpu_of_amd_is_refused(no_interpreter, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with a_gpu((9, 4)), installed((3, 9, 0)):
        assert not use_triton("auto", OnCuda)
        with pytest.raises(RuntimeError, match="made for NVIDIA's GPUs"):
            use_triton("triton", OnCuda)


def test_a_missing_gpu_is_said(no_interpreter):
    with mock.patch.object(torch.cuda, "is_available", return_value=False):
        assert "no CUDA device" in why_unavailable(OnCuda.device)


@pytest.mark.parametrize(("version", "words"), [(None, "not installed"), ((3, 5, 1), r"3\.5\.1.*3\.6 is the oldest")])
def test_a_missing_or_old_triton_is_refused(version, words, no_interpreter):
    with a_gpu((9, 0)), installed(version):
        assert not use_triton("auto", OnCuda)
        with pytest.raises(RuntimeError, match=words):
            use_triton("triton", OnCuda)


@pytest.mark.parametrize(
    ("version", "capability", "wrong"),
    [
        ((3, 6, 0), (10, 0), True),
        ((3, 7, 0), (10, 0), False),
        ((3, 6, 0), (10, 3), True),
        ((3, 7, 1), (10, 3), True),
        ((3, 8, 0), (10, 3), False),
        ((3, 6, 0), (9, 0), False),
        ((3, 6, 0), (8, 0), False),
    ],
    ids=str,
)
def test_versions_known_to_miscompile_are_refused(version, capability, wrong, no_interpreter):
    assert (known_miscompilation(version, capability) is not None) is wrong
    with a_gpu(capability), installed(version):
        assert use_triton("auto", OnCuda) is not wrong
        if wrong:
            with pytest.raises(RuntimeError, match=f"triton {'.'.join(map(str, version))} is known to miscompile"):
                use_triton("triton", OnCuda)


def test_a_module_that_asks_for_triton_can_be_built_where_it_cannot_run(no_interpreter):
    check_attention(activation="relu2", normalizer="visible", dropout=0.0, impl="triton")


@pytest.mark.parametrize("impl", ["auto", "triton", "reference"])
def test_the_choice_does_not_break_a_traced_graph(impl, interpreter):
    def chosen(x):
        return x + 1 if use_triton(impl, x) else x - 1

    compiled = torch.compile(chosen, backend="eager", fullgraph=True)
    assert torch.equal(compiled(CPU), chosen(CPU))


def test_choosing_imports_no_triton():
    script = (
        "import sys, torch\n"
        "import flash_plugin.kernels.triton.availability\n"
        "from flash_plugin.kernels import linear_attention\n"
        "from flash_plugin.kernels.validation import use_triton\n"
        "assert not use_triton('auto', torch.empty(1))\n"
        "x = torch.ones(1, 1, 2, 2)\n"
        "linear_attention(x, x, x)\n"
        "assert 'triton' not in sys.modules\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
