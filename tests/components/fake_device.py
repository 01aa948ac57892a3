"""A device that is no CPU, without a GPU, on which whatever makes the host wait is an error.

torch's Python backend stands for it, and its tensors are fake: ``tensor.item()``, ``if tensor`` and indexing by a mask
have no answer. Operations that mix it with the CPU are errors as well: a constant made on the host, a list that indexes
a tensor. On a GPU that is an error too, or a copy for which the host waits. Triton's operators run their own code up to
the launches.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.library import CustomOpDef
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchtune import training

from flash_plugin.kernels import rms_norm, validation
from flash_plugin.kernels import triton as kernels
from flash_plugin.kernels.triton.tuning import TunedKernel

Case = Callable[[], None]
Build = Callable[[], nn.Module]

NAME = "gpu"
ROOT = Path(__file__).parents[2]
FAKE = FakeTensorMode()


class DevicesMixed(Exception):
    """An operation took or gave tensors of the CPU and of the device: it copies, or is given what is on the host."""


class Watch(TorchDispatchMode):
    """Lets no operation mix devices, in a forward or in a backward. What stays on the CPU makes nobody wait."""

    supports_higher_order_operators = True  # torchao's int8 product is one

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = _devices((args, kwargs))
        out = func(*args, **(kwargs or {})) if len(given) < 2 else None
        if len(given | _devices(out)) > 1:
            raise DevicesMixed(f"{func} mixes {' and '.join(sorted(given | _devices(out)))}")
        return out


def _devices(values: Any) -> set[str]:
    return {value.device.type for value in tree_leaves(values) if isinstance(value, Tensor)}


class Backend(backend_registration._DummyBackendModule):
    """The device's module, with what activation checkpointing asks it for."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Dtypes of an autocast that is never on."""
        return [torch.bfloat16]


@contextmanager
def registered() -> Iterator[None]:
    """Make the device. ``auto`` means there what it means on CUDA, and operators do all that they do but launch."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, Backend())
    modules = [importlib.import_module(f"{kernels.__name__}.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
    operators = {value for module in modules for value in vars(module).values() if isinstance(value, CustomOpDef)}
    choose = validation.use_triton

    def as_on_cuda(impl: str, tensor: Tensor, unsupported: str | None = None) -> bool:
        return choose("triton" if impl == "auto" and unsupported is None else impl, tensor, unsupported)

    def watched(operator: CustomOpDef, *args: Any) -> Any:
        with Watch():  # its own operations are otherwise none of a mode's business
            return operator._init_fn(*args)

    choosing = [module for name, module in sys.modules.items() if name.startswith("flash_plugin.kernels.")]
    patches = [
        mock.patch.object(validation, "why_unavailable", return_value=None),
        mock.patch.object(TunedKernel, "_launch"),
        *(mock.patch.object(m, "use_triton", as_on_cuda) for m in choosing if hasattr(m, "use_triton")),
        *(mock.patch.object(operator, "_abstract_fn", partial(watched, operator)) for operator in operators),
    ]
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def device() -> torch.device:
    """The device, with a number: torch would make a tensor to learn it."""
    return torch.device(NAME, 0)


def on_device(build: Build) -> nn.Module:
    """The bfloat16 model that ``build`` builds, its parameters and buffers fake and on the device."""
    with unset_fake_temporarily(), training.set_default_dtype(torch.bfloat16):
        model = build()
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                moved = FAKE.from_tensor(value).detach().to(device())
                module._parameters[name] = nn.Parameter(moved, requires_grad=value.requires_grad)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = FAKE.from_tensor(value).to(device())
    return model


def error_of(case: Case) -> str | None:
    """What goes wrong in a case, and on which line outside torch; None if nothing does."""
    try:
        with FAKE:
            case()
    except Exception as error:
        torchs = f"{Path(torch.__file__).parent}/"
        lines = traceback.extract_tb(error.__traceback__)
        at = [line for line in lines if not line.filename.startswith(torchs) and line.name != "__torch_dispatch__"][-1]
        said = f"{type(error).__name__}: {str(error)[:200]}"
        path = at.filename.removeprefix(f"{Path(torch.__file__).parents[1]}/").removeprefix(f"{ROOT}/")
        return f"{said} (at {path}:{at.lineno}: {at.line})"
    return None


def _watched(fault: Callable[[Tensor], object]) -> None:
    x = torch.ones(3, 4, device=device())
    with Watch():
        fault(x)


def _in_backward(fault: Callable[[Tensor], object]) -> None:
    class Faulty(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            fault(grad)
            return grad

    _watched(lambda x: Faulty.apply(x.requires_grad_()).sum().backward())


def _in_launch(fault: Callable[[Tensor], object]) -> None:
    with mock.patch.object(TunedKernel, "_launch", lambda _kernel, _grid, args, *_rest: fault(args[0])):
        _watched(lambda x: rms_norm(x[None], x[0], 1e-6, token_shift=True))


#: Faults that must be found, and the error that says so; a list is copied below what a mode of torch 2.13 sees.
FAULTS: dict[str, tuple[Case, str]] = {
    f"{fault}{where}": (partial(run, read), error)
    for where, run in {"": _watched, ", in a backward": _in_backward, ", before a launch": _in_launch}.items()
    for fault, (read, error) in {
        "a list that indexes": (lambda x: x[:, [0, 2]], "DevicesMixed|NotImplementedError"),
        "a list made a tensor": (lambda x: torch.tensor([0, 2], device=x.device), "DevicesMixed|NotImplementedError"),
        "a list made a tensor, then moved": (lambda x: torch.tensor([0, 2]).to(x.device), "DevicesMixed"),
        "a number made a tensor": (lambda x: x * torch.tensor(2.0), "DevicesMixed"),
        "a constant of the host": (lambda x: x + torch.ones(4), "DevicesMixed"),
        "a table of the host": (lambda x: torch.arange(3)[x.long()], "DevicesMixed"),
        "a copy to the host": (lambda x: x.cpu(), "DevicesMixed"),
        "a number read": (lambda x: x.sum().item(), "DataDependentOutputException"),
        "a condition": (lambda x: bool(x.any()), "DataDependentOutputException"),
        "a mask that indexes": (lambda x: x[x > 0], "DynamicOutputShapeException"),
    }.items()
}
