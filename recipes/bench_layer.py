"""Time one FLASH layer beside its own projections and beside FLASH-pytorch's layer, forward and backward.

    python recipes/bench_layer.py --config configs/bench_layer.yaml

The contenders take turns, so that a machine that drifts slows all of them; ratios are taken turn by turn. Peak memory
is measured in a process of its own for each contender and length. The projections alone are the floor: whatever the
layer takes beyond them is attention, activations, norm and residual.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from measuring import QUANTILES, keep_memory, memory_mib, quantiles, surroundings, write_csv
from omegaconf import DictConfig
from torch import Tensor, nn
from torchtune import config
from tqdm import tqdm

import flash_plugin

FIELDS = ["contender", "seq_len", *(f"{what}_{name}" for what in ("ms", "ratio") for name in QUANTILES), "peak_mib"]
CPU = torch.device("cpu")


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
        vocab_size=8,
        num_layers=1,
        embed_dim=cfg.embed_dim,
        max_seq_len=seq_len,
        chunk_size=cfg.chunk_size,
        position_bias=cfg.position_bias,
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
    before = memory_mib(CPU, restart=True)
    step(module, x)()
    return memory_mib(CPU) - before


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
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peak = pool.apply(peak_memory, (cfg, name, seq_len))
        milliseconds = {key: f"{value:.1f}" for key, value in quantiles("ms", np.array(times) * 1e3).items()}
        ratios = {key: f"{value:.2f}" for key, value in quantiles("ratio", np.array(times) / floor).items()}
        rows.append({"contender": name, "seq_len": seq_len, **milliseconds, **ratios, "peak_mib": f"{peak:.0f}"})
    return rows


@config.parse
def main(cfg: DictConfig) -> None:
    """Entry point."""
    if cfg.keep_memory:
        keep_memory()
    torch.set_num_threads(cfg.num_threads)
    with tqdm(total=len(cfg.seq_lens) * (cfg.warmup + cfg.turns), desc="Timing") as progress:
        rows = [row for seq_len in cfg.seq_lens for row in measure(cfg, seq_len, progress)]
    header = [f"{name}: {value}" for name, value in surroundings(CPU).items()]
    header += [
        f"float32, batch {cfg.batch_size}, d {cfg.embed_dim}, chunk {cfg.chunk_size}, {cfg.turns} turns, "
        f"{'freed memory kept (MALLOC_*)' if cfg.keep_memory else 'default malloc'}; "
        "forward and backward; ratios are to the projections of the same turn"
    ]
    output = Path(cfg.output)
    write_csv(output, FIELDS, header, rows)
    print(output.read_text())


if __name__ == "__main__":
    sys.exit(main())
