"""Launching kernels: a fixed configuration by default, the fastest of a short list when asked to tune."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from flash_plugin.kernels.triton.availability import interpreted

#: A launch grid, or what computes it from the arguments and the configuration's meta-parameters, by name.
Grid = tuple[int, ...] | Callable[[Mapping[str, Any]], tuple[int, ...]]
#: Which configurations may run a call, given the arguments by name. The first one that may is the default.
Fits = Callable[["Config", Mapping[str, Any]], bool]


# Multiply and add in one rounding: Triton's own default until 3.9, and not after it.
_FUSED = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Config:
    """One way to compile a kernel.

    Attributes:
        meta: The kernel's tile sizes and other constants that tuning may choose, by name.
        num_warps: Warps of a block.
        num_stages: Tiles in flight in a pipelined loop.
    """

    meta: Mapping[str, int]
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, Any]:
        """What a launch with this configuration passes to Triton beside the arguments."""
        return {**self.meta, "num_warps": self.num_warps, "num_stages": self.num_stages, **_FUSED}


class TunedKernel:
    """A ``@triton.jit`` function and the configurations it ships with; ``kernel[grid](*args, **kwargs)`` launches it.

    It launches the first configuration that fits, always the same one for the same arguments, so that results are
    bit-for-bit reproducible across processes: resuming a run relies on that. With the environment variable
    ``FLASH_PLUGIN_AUTOTUNE=1`` it times every configuration that fits, once for each value of ``key``, and keeps the
    fastest; the choice is cached on disk beside Triton's compiled kernels. Tuning needs a GPU: the interpreter never
    tunes.

    Every launch of this package goes through :meth:`_launch`.

    Args:
        fn: The ``@triton.jit`` function.
        configs: What it may run with, the default first.
        key: Arguments whose values may change which configuration is fastest. A kernel with several configurations
            runs many times while it is tuned, so it must not accumulate into its output.
        fits: Which configurations may run a call; all of them if None.
    """

    def __init__(self, fn: Any, configs: Sequence[Config], key: Sequence[str], fits: Fits | None = None) -> None:
        unknown = [name for name in (*key, *(n for c in configs for n in c.meta)) if name not in fn.arg_names]
        assert not unknown, f"{fn.__name__} has no argument {', '.join(unknown)}"
        assert configs and (len(configs) == 1 or key), f"{fn.__name__}: several configurations need a key"
        self.fn = fn
        self.configs = tuple(configs)
        self.key = tuple(key)
        self._fits = fits
        self.__name__: str = fn.__name__

    @property
    def default(self) -> Config:
        """The configuration that runs when nothing speaks against it."""
        return self.configs[0]

    def usable(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Config, ...]:
        """The configurations that may run a call, the default first."""
        if self._fits is None:
            return self.configs
        named = dict(zip(self.fn.arg_names, args, strict=False)) | dict(kwargs)
        usable = tuple(config for config in self.configs if self._fits(config, named))
        assert usable, f"{self.fn.__name__}: no configuration fits {named}"
        return usable

    def __getitem__(self, grid: Grid) -> Callable[..., None]:
        """A function that launches the kernel over ``grid``."""
        return functools.partial(self._run, grid)

    def _run(self, grid: Grid, *args: Any, **kwargs: Any) -> None:
        usable = self.usable(args, kwargs)
        # Triton 3.6 times even a single candidate, and would run a kernel that accumulates many times over.
        tune = len(usable) > 1 and os.environ.get("FLASH_PLUGIN_AUTOTUNE") == "1" and not interpreted()
        # Triton launches on the current device, whatever device the tensors are on.
        tensor = next(argument for argument in (*args, *kwargs.values()) if isinstance(argument, Tensor))
        with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
            self._launch(grid, args, kwargs, None if tune else usable[0])

    def _launch(self, grid: Grid, args: tuple[Any, ...], kwargs: dict[str, Any], config: Config | None) -> None:
        """Launch with ``config``, or with the fastest one if None."""
        if config is None:
            self._autotuner[grid](*args, **kwargs, **_FUSED)
        else:
            self.fn[grid](*args, **kwargs, **config.options)

    @functools.cached_property
    def _autotuner(self) -> Any:
        configs = {triton.Config(dict(c.meta), num_warps=c.num_warps, num_stages=c.num_stages): c for c in self.configs}

        def prune(candidates: list[Any], named: Mapping[str, Any], **kwargs: Any) -> list[Any]:
            usable = self.usable((), {**named, **kwargs})
            return [candidate for candidate in candidates if configs[candidate] in usable]

        tune = triton.autotune(
            list(configs), list(self.key), prune_configs_by={"early_config_prune": prune}, cache_results=True
        )
        return tune(self.fn)


def tuned(configs: Sequence[Config], key: Sequence[str], fits: Fits | None = None) -> Callable[[Any], TunedKernel]:
    """Give a ``@triton.jit`` function its configurations; see :class:`TunedKernel`."""
    return lambda fn: TunedKernel(fn, configs, key, fits)
