"""Time whole training steps of FLASH and its rivals, models of equal size, at equal tokens a step.

    python recipes/bench_training.py --config configs/bench_training.yaml

A step is a forward pass, the loss, a backward pass, the optimizer's step and the release of the gradients. The
contenders (nodes of the config) take turns, so that a machine that drifts slows all of them, and ratios are taken turn
by turn. A large matrix product takes its turn too: its rate is what model FLOPs utilisation is a share of. Peak memory
is that of a step with all it needs: weights, optimizer state, gradients and activations; on a CPU it is measured in a
process of its own for each contender and length. Whoever cannot run is reported with the reason. Writes a CSV file and
a PNG, anew after each length.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from kernel_rooflines import Sizes, linear_costs, mixed_chunk_costs, quadratic_costs, softmax_costs
from measuring import MIB, Missing, attempt, check_equal_sizes, keep_memory, matrix_product, memory_mib
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torchtune import config, training
from torchtune.utils import get_device
from tqdm import tqdm
from training_reports import Result, Row, rows_of, write

CORES = {
    "mixed_chunk": mixed_chunk_costs,
    "quadratic": quadratic_costs,
    "linear": linear_costs,
    "softmax": softmax_costs,
}
# Enough to load what a first call loads, and to make the optimizer's state.
_FEW_TOKENS = 64
# What takes seconds to import, and need not in each process.
_PRELOAD = ("flash_plugin.components.builders", "matplotlib.pyplot", "torchtune.training")


class Trainer:
    """A contender: its model, its optimizer, and a step of training."""

    def __init__(self, cfg: DictConfig, name: str) -> None:
        torch.manual_seed(0)
        self.cfg, self.name, self.device = cfg, name, get_device(cfg.device)
        with training.set_default_dtype(training.get_dtype(cfg.dtype, self.device)), self.device:
            self.model: nn.Module = config.instantiate(cfg.contenders[name].model)
        self.model.train()
        self.optimizer: torch.optim.Optimizer = config.instantiate(cfg.optimizer, self.model.parameters())
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.run: Callable[[Tensor], Tensor] = torch.compile(self.model, dynamic=False) if cfg.compile else self.model

    def step(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """One step of training on ``[b, s]``; the mean loss before it."""
        logits = self.run(tokens)
        if logits.shape != (*tokens.shape, self.cfg.vocab_size):
            raise ValueError(
                f"contenders.{self.name}.model must give logits {[*tokens.shape, self.cfg.vocab_size]}, not "
                f"{[*logits.shape]}; set its vocab_size={self.cfg.vocab_size}"
            )
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def held_mib(self) -> float:
        """MiB that stay between steps: weights, buffers and the optimizer's state."""
        state = [
            value for each in self.optimizer.state.values() for value in each.values() if isinstance(value, Tensor)
        ]
        return sum(tensor.nbytes for tensor in [*self.model.parameters(), *self.model.buffers(), *state]) / MIB

    def peak_mib(self, seq_len: int) -> float:
        """MiB at the peak of one step, what stays between steps included."""
        tokens, labels = batch(self.cfg, seq_len, self.device)
        try:
            few = slice(None) if self.cfg.compile else slice(_FEW_TOKENS)  # what is compiled is so for one shape
            self.step(tokens[:, few], labels[:, few])
            before = memory_mib(self.device, restart=True)
            self.step(tokens, labels)
            wait(self.device)  # a kernel that fails must fail here
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        return memory_mib(self.device) - before + self.held_mib()

    def model_flops(self, seq_len: int) -> float:
        """FLOPs of a forward pass, and twice as many backward: what a model needs, nothing recomputed."""
        cfg, core = self.cfg, OmegaConf.to_container(self.cfg.contenders[self.name].core)
        assert isinstance(core, dict)
        costs = CORES[core.pop("attention")]
        usual = {name: cfg[name] for name in ("embed_dim", "qk_dim", "chunk_size", "head_dim")}
        sizes: dict[str, int] = {**usual, "expanded_dim": round(cfg.expansion * cfg.embed_dim), **core}
        forward = costs(Sizes(tokens=cfg.tokens_per_step, seq_len=seq_len, itemsize=1, **sizes)).forward.flops
        linears = [module.weight.numel() for module in self.model.modules() if isinstance(module, nn.Linear)]
        return 3 * (2 * cfg.tokens_per_step * sum(linears) + len(self.model.layers) * forward)


def wait(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def batch(cfg: DictConfig, seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and labels ``[b, s]``, the same for all contenders; b * s is the same at all lengths."""
    shape = (2, cfg.tokens_per_step // seq_len, seq_len)
    drawn = torch.randint(cfg.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    return drawn[0].to(device), drawn[1].to(device)


def check(cfg: DictConfig) -> None:
    """Refuse settings that cannot be measured.

    Raises:
        ValueError: If nothing is to be timed, a length does not divide the tokens of a step, the baseline is no
            contender, or a core is unknown.
    """
    if cfg.turns < 1:
        raise ValueError(f"turns ({cfg.turns}) must be at least 1; set turns=3")
    if cfg.warmup < 1:
        raise ValueError(f"warmup ({cfg.warmup}) must be at least 1: first steps load and compile; set warmup=1")
    if not cfg.seq_lens:
        raise ValueError("seq_lens ([]) must name a length; set seq_lens=[4096]")
    for seq_len in cfg.seq_lens:
        if seq_len < 1 or cfg.tokens_per_step % seq_len:
            raise ValueError(
                f"tokens_per_step ({cfg.tokens_per_step}) must be a multiple of each of seq_lens ({seq_len}); "
                f"set tokens_per_step={max(1, seq_len)}"
            )
    if cfg.baseline not in cfg.contenders:
        raise ValueError(f"baseline ({cfg.baseline}) must be one of contenders ({', '.join(cfg.contenders)}); name one")
    for name, node in cfg.contenders.items():
        if node.core.attention not in CORES:
            raise ValueError(
                f"contenders.{name}.core.attention ({node.core.attention}) must be one of {', '.join(CORES)}; set one"
            )


def peak_in_new_process(cfg: DictConfig, name: str, seq_len: int) -> float:
    """What :meth:`Trainer.peak_mib` says in a process that has done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOAD))
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_peak_of_process, cfg, name, seq_len).result()


def _peak_of_process(cfg: DictConfig, name: str, seq_len: int) -> float:
    torch.set_num_threads(cfg.num_threads)
    return Trainer(cfg, name).peak_mib(seq_len)


def race(
    trainers: list[Trainer], product: Callable[[], object], cfg: DictConfig, seq_len: int, progress: tqdm
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Seconds turn by turn, of each contender's step and of the matrix product.

    Raises:
        ValueError: If somebody's loss is not finite in the end.
    """
    device = trainers[0].device
    tokens, labels = batch(cfg, seq_len, device)
    runs: list[Callable[[], object]] = [partial(trainer.step, tokens, labels) for trainer in trainers]
    taken = []
    for turn in range(cfg.warmup + cfg.turns):
        seconds, results = [], []
        for run in [*runs, product]:
            wait(device)
            start = time.perf_counter()
            results.append(run())
            wait(device)
            seconds.append(time.perf_counter() - start)
        if turn >= cfg.warmup:
            taken.append(seconds)
        progress.update()
    for trainer, loss in zip(trainers, results, strict=False):
        if not torch.isfinite(loss):
            raise ValueError(f"the loss of {trainer.name} ({loss}) must be finite; set a lower optimizer.lr")
    *columns, rates = np.array(taken).T
    return {trainer.name: column for trainer, column in zip(trainers, columns, strict=True)}, rates


def measure(
    cfg: DictConfig, seq_len: int, contenders: dict[str, Trainer | Missing], progress: tqdm
) -> tuple[list[Result | Missing], float | None]:
    """What comes of each contender at one length, and the FLOP/s of the matrix product meanwhile."""
    device = get_device(cfg.device)
    if cfg.compile:
        torch._dynamo.reset()  # each length is compiled anew; beyond eight, the last would fall back to eager
    peaks: dict[str, Any] = {}  # MiB, or Missing
    for name, contender in contenders.items():
        progress.set_postfix_str(f"s {seq_len}: memory of {name}")
        if isinstance(contender, Missing):
            peaks[name] = contender
        elif device.type == "cuda":
            peaks[name] = attempt(name, partial(contender.peak_mib, seq_len))
            torch.cuda.empty_cache()
        else:
            peaks[name] = attempt(name, partial(peak_in_new_process, cfg, name, seq_len))
    ready = [c for name, c in contenders.items() if isinstance(c, Trainer) and not isinstance(peaks[name], Missing)]
    progress.set_postfix_str(f"s {seq_len}: {len(ready)} of {len(contenders)} can run")
    if not ready:
        return list(peaks.values()), None
    product, flops = matrix_product(cfg.matmul_size, device, training.get_dtype(cfg.dtype, device))
    times, product_times = race(ready, product, cfg, seq_len, progress)
    results = {
        trainer.name: Result(
            trainer.name, trainer.parameters, times[trainer.name], peaks[trainer.name], trainer.model_flops(seq_len)
        )
        for trainer in ready
    }
    return [results.get(name, peak) for name, peak in peaks.items()], flops / float(np.median(product_times))


@config.parse
def main(cfg: DictConfig) -> None:
    """Entry point."""
    OmegaConf.resolve(cfg)
    check(cfg)
    if cfg.keep_memory:
        keep_memory()
    torch.set_num_threads(cfg.num_threads)
    contenders = {name: attempt(name, partial(Trainer, cfg, name)) for name in cfg.contenders}
    for name, contender in contenders.items():
        if isinstance(contender, Missing):
            print(f"{name} is missing: {contender.reason}")
    check_equal_sizes("contenders", {name: c.parameters for name, c in contenders.items() if isinstance(c, Trainer)})
    rates: dict[int, float | None] = {}
    rows: list[Row] = []
    with tqdm(total=len(cfg.seq_lens) * (cfg.warmup + cfg.turns), desc="Timing") as progress:
        for seq_len in cfg.seq_lens:
            outcomes, rates[seq_len] = measure(cfg, seq_len, contenders, progress)
            rows += rows_of(cfg, seq_len, outcomes, rates[seq_len])
            # After each length, so that a run that is cut short has something to show.
            write(cfg, rates, rows)
    print(Path(cfg.output_csv).read_text())


if __name__ == "__main__":
    sys.exit(main())
