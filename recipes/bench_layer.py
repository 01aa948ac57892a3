"""Time one FLASH layer beside its own projections and beside FLASH-pytorch's layer, forward and backward.

    python recipes/bench_layer.py --config configs/bench_layer.yaml

The contenders take turns, so that a machine that drifts slows all of them; ratios are taken turn by turn. Peak memory
is measured in a process of its own for each contender and length. The projections alone are the floor: whatever the
layer takes beyond them is attention, activations, norm and residual.
"""

from __future__ import annotations

import csv
import multiprocessing
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torchtune import config
from tqdm import tqdm

import flash_plugin

QUANTILES = (0.2, 0.5, 0.8)
# By default glibc hands every block above 32 MiB back to the kernel when it is freed; a long sequence then pays for
# fresh pages at every step, whatever computes it.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**34), "MALLOC_TRIM_THRESHOLD_": str(2**36)}
FIELDS = ["contender", "seq_len", "ms_p20", "ms_p50", "ms_p80", "ratio_p20", "ratio_p50", "ratio_p80", "peak_mib"]


class Projections(nn.Module):
    """The matrix products of a FLASH layer and nothing else."""

    def __init__(self, layer: flash_plugin.FlashLayer) -> None:
        super().__init__()
        self.attn = layer.attn
        self.values: Tensor | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Project ``[b, s, d]`` in, and random values ``[b, s, e]`` out."""
        if self.values is None:
            self.values = torch.randn(*x.shape[:2], self.attn.output_proj.in_features, device=x.device).requires_grad_()
        self.values.grad = None
        projected = self.attn.gate_proj(x), self.attn.v_proj(x), self.attn.qk_proj(x)
        return *projected, self.attn.output_proj(self.values)


def contenders(cfg: DictConfig, seq_len: int) -> dict[str, nn.Module]:
    """Build them; the floor comes first."""
    torch.manual_seed(0)
    model = flash_plugin.flash(
        vocab_size=8, num_layers=1, embed_dim=cfg.embed_dim, max_seq_len=seq_len, chunk_size=cfg.chunk_size
    )
    built: dict[str, nn.Module] = {"projections": Projections(model.layers[0]), "flash": model.layers[0]}
    try:
        from flash_pytorch import FLASH
        from rotary_embedding_torch import RotaryEmbedding
    except ImportError:
        print("FLASH-pytorch is not installed, so it is left out; pip install FLASH-pytorch==0.1.9 to see it")
        return built
    rotary = RotaryEmbedding(dim=32)
    theirs = FLASH(dim=cfg.embed_dim, group_size=cfg.chunk_size, causal=True, rotary_pos_emb=rotary)
    return {**built, "FLASH-pytorch": theirs}


def step(module: nn.Module, x: Tensor) -> Callable[[], None]:
    """One forward and backward, gradients of inputs and weights included."""

    def run() -> None:
        module.zero_grad(set_to_none=True)
        x.grad = None
        outputs = module(x)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])

    return run


def peak_memory(cfg: DictConfig, name: str, seq_len: int) -> float:
    """MiB by which one step raises the peak resident size of a fresh process."""
    torch.set_num_threads(cfg.num_threads)
    module = contenders(cfg, seq_len)[name]
    x = torch.randn(cfg.batch_size, seq_len, cfg.embed_dim).requires_grad_()
    step(module, x[:, : min(seq_len, 64)].detach().requires_grad_())()  # loads what the first call loads
    if isinstance(module, Projections):
        module.values = None
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
    before = _peak_resident_mib()
    step(module, x)()
    return _peak_resident_mib() - before


def _peak_resident_mib() -> float:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def measure(cfg: DictConfig, seq_len: int, progress: tqdm) -> list[dict[str, object]]:
    """Time all contenders at one length, in turns."""
    modules = contenders(cfg, seq_len)
    x = torch.randn(cfg.batch_size, seq_len, cfg.embed_dim).requires_grad_()
    seconds: dict[str, list[float]] = {name: [] for name in modules}
    for turn in range(cfg.warmup + cfg.turns):
        for name, module in modules.items():
            run = step(module, x)
            start = time.perf_counter()
            run()
            if turn >= cfg.warmup:
                seconds[name].append(time.perf_counter() - start)
        progress.update()
    floor = np.array(seconds["projections"])
    rows: list[dict[str, object]] = []
    for name, times in seconds.items():
        milliseconds, ratios = np.quantile(times, QUANTILES) * 1e3, np.quantile(np.array(times) / floor, QUANTILES)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peak = pool.apply(peak_memory, (cfg, name, seq_len))
        numbers = [*(f"{m:.1f}" for m in milliseconds), *(f"{r:.2f}" for r in ratios), f"{peak:.0f}"]
        rows.append(dict(zip(FIELDS, [name, seq_len, *numbers], strict=True)))
    return rows


@config.parse
def main(cfg: DictConfig) -> None:
    """Entry point."""
    if cfg.keep_memory and any(os.environ.get(name) != value for name, value in KEEP_MEMORY.items()):
        # glibc reads these when a process starts.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})
    torch.set_num_threads(cfg.num_threads)
    with tqdm(total=len(cfg.seq_lens) * (cfg.warmup + cfg.turns), desc="Timing") as progress:
        rows = [row for seq_len in cfg.seq_lens for row in measure(cfg, seq_len, progress)]
    packages = " ".join(f"{name}=={version(name)}" for name in ("torch", "torchtune", "numpy"))
    output = Path(cfg.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as file:
        file.write(f"# {date.today()}; {platform.processor() or platform.machine()}, {cfg.num_threads} threads; ")
        file.write(f"Python {platform.python_version()}, {packages}\n# python {' '.join(sys.argv)}\n")
        file.write(f"# float32, batch {cfg.batch_size}, d {cfg.embed_dim}, chunk {cfg.chunk_size}, {cfg.turns} turns, ")
        file.write(f"{'freed memory kept (MALLOC_*)' if cfg.keep_memory else 'default malloc'}; ")
        file.write("forward and backward; ratios are to the projections of the same turn\n")
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    print(output.read_text())


if __name__ == "__main__":
    sys.exit(main())
