"""Time the attention ops and whole blocks beside other people's, forward and backward, against the roofline.

    python recipes/bench_kernels.py --config configs/bench_kernels.yaml

The contenders (``kernel_providers.py``) take turns, so that a machine that drifts slows all of them; two more are a
large matrix product and a large copy, whose rates turn the counts of ``kernel_rooflines.py`` into the least possible
time. A turn is one forward, recorded for autograd, and one backward: ``forward`` and ``backward`` are its parts and
``both`` is the whole. Whoever cannot run is reported with the reason. Writes a CSV file, a JSON file and a PNG for
each direction (``kernel_reports.py``).
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from kernel_providers import OPS, Built, Candidate, Forward, Inputs, candidates
from kernel_reports import Result, Row, rows_of, table, write
from kernel_rooflines import Rates, Sizes
from measuring import MIB, Missing, attempt, matrix_product, surroundings
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torchtune import config, training
from torchtune.utils import get_device
from tqdm import tqdm

# Written before every run on a GPU, so that nobody finds its inputs in the cache: several times the largest L2.
_CACHE_BYTES = 256 * MIB

Backward = Callable[[Tensor], object]


class Contender(NamedTuple):
    """A candidate that ran: how to run it again, and the MiB that each direction needs on top of inputs and weights."""

    candidate: Candidate
    forward: Forward
    backward: Backward
    peak_mib: dict[str, float]


class Clock:
    """Reads the time where the work runs, and never waits for it in between."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._cache = torch.empty(_CACHE_BYTES, dtype=torch.int8, device=device) if self.cuda else None

    def start(self) -> Any:
        """Fill the cache with something else, then mark the time."""
        if self._cache is not None:
            self._cache.zero_()
        return self.mark()

    def mark(self) -> Any:
        """A point in time."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, marks: Iterable[Any]) -> list[float]:
        """What passed from each mark to the next."""
        if not self.cuda:
            return [(after - before) * 1e3 for before, after in pairwise(marks)]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) for before, after in pairwise(marks)]


def check(cfg: DictConfig) -> None:
    """Refuse sizes that do not fit together.

    Raises:
        ValueError: If a length is no multiple of the chunk size or does not divide the tokens, the head size does not
            divide the width, an op is unknown, or nothing is to be timed.
    """
    if cfg.turns < 1:
        raise ValueError(f"turns ({cfg.turns}) must be at least 1; set turns=9")
    for seq_len in cfg.seq_lens:
        if seq_len % cfg.chunk_size or seq_len < 2 * cfg.chunk_size:
            raise ValueError(
                f"seq_lens ({seq_len}) must be multiples of chunk_size ({cfg.chunk_size}), of two chunks or more; "
                f"set seq_lens=[{2 * cfg.chunk_size}]"
            )
        if cfg.tokens % seq_len:
            raise ValueError(f"tokens ({cfg.tokens}) must be a multiple of each of seq_lens; set tokens={seq_len}")
    if cfg.embed_dim % cfg.head_dim:
        raise ValueError(
            f"head_dim ({cfg.head_dim}) must divide embed_dim ({cfg.embed_dim}); set head_dim={cfg.embed_dim}"
        )
    unknown = [op for op in cfg.ops if op not in OPS]
    if unknown or not cfg.ops:
        raise ValueError(f"ops ({', '.join(unknown) or 'none'}) must be some of {', '.join(OPS)}; set ops=[{OPS[0]}]")


def peaks(forward: Forward, backward: Backward, device: torch.device) -> dict[str, float]:
    """MiB by which a forward, and the backward behind it, raise what is allocated; it is the same in every run.

    On a CPU the profiler says what torch's allocator gave out and took back. What libraries hold for themselves is in
    neither count.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = forward()
        first = torch.cuda.max_memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        backward(out)
        second = torch.cuda.max_memory_allocated() - before
    else:
        out, first, held = _allocated(forward)
        _, more, _ = _allocated(lambda: backward(out))
        second = held + more
    return {"forward": first / MIB, "backward": second / MIB, "both": max(first, second) / MIB}


def _allocated(run: Callable[[], Any]) -> tuple[Any, int, int]:
    """Result of a run on the CPU, the most bytes it held at once, and the bytes it still holds."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        result = run()
    assert profile.kineto_results is not None
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([0, *(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))])
    return result, int(held.max()), int(held[-1])


def prepare(candidate: Candidate, built: Built, inputs: Inputs) -> Contender:
    """Run a candidate twice, the second time to measure its memory."""
    forward, wanted = built

    def backward(out: Tensor) -> object:
        return torch.autograd.grad(out, wanted, inputs.gradient(out))

    backward(forward())
    contender = Contender(candidate, forward, backward, peaks(forward, backward, inputs.device))
    if inputs.device.type == "cuda":
        torch.cuda.synchronize()  # a kernel that fails must fail here
    return contender


def roofs(cfg: DictConfig, device: torch.device, dtype: torch.dtype) -> tuple[list[Callable[[], object]], Rates]:
    """A large matrix product and a large copy, and the FLOPs of the one and the bytes of the other."""
    product, flops = matrix_product(cfg.matmul_size, device, dtype)
    source = torch.ones(cfg.copy_mib * MIB, device=device, dtype=torch.int8)
    target = torch.empty_like(source)
    return [product, lambda: target.copy_(source)], Rates(flops, 2.0 * source.numel())


def race(
    contenders: list[Contender], extra: list[Callable[[], object]], cfg: DictConfig, clock: Clock, progress: tqdm
) -> tuple[list[dict[str, np.ndarray]], list[np.ndarray]]:
    """Milliseconds turn by turn: of each contender by direction, and of each extra run."""
    taken: list[list[list[float]]] = []
    for turn in range(cfg.warmup + cfg.turns):
        marks = []
        for contender in contenders:
            start = clock.start()
            out = contender.forward()
            middle = clock.mark()
            contender.backward(out)
            marks.append((start, middle, clock.mark()))
            del out
        for run in extra:
            start = clock.start()
            run()
            marks.append((start, clock.mark()))
        if turn >= cfg.warmup:
            taken.append([clock.milliseconds(each) for each in marks])
        progress.update()
    columns = [np.array(column) for column in zip(*taken, strict=True)]  # [turns, 2], and [turns, 1] of the extra ones
    times = [{"forward": c[:, 0], "backward": c[:, 1], "both": c.sum(1)} for c in columns[: len(contenders)]]
    return times, [column[:, 0] for column in columns[len(contenders) :]]


def measure(
    cfg: DictConfig, seq_len: int, device: torch.device, dtype: torch.dtype, progress: tqdm
) -> tuple[Row, list[Row]]:
    """The rates and the rows of one length."""
    torch.manual_seed(0)
    gc.collect()  # the length before may have left memory in cycles
    sizes = Sizes(
        tokens=cfg.tokens,
        seq_len=seq_len,
        embed_dim=cfg.embed_dim,
        expanded_dim=round(cfg.expansion * cfg.embed_dim),
        qk_dim=cfg.qk_dim,
        chunk_size=cfg.chunk_size,
        head_dim=cfg.head_dim,
        itemsize=dtype.itemsize,
    )
    inputs = Inputs(sizes, device, dtype)
    everybody = [candidate for candidate in candidates(inputs) if candidate.op in cfg.ops]
    # What stays allocated in the race comes first, so that whoever finds memory enough now finds it then.
    runs, amounts = roofs(cfg, device, dtype)
    outcomes: list[Any] = [attempt(candidate, candidate.build) for candidate in everybody]
    for index, (candidate, built) in enumerate(zip(everybody, outcomes, strict=True)):
        progress.set_postfix_str(f"s {seq_len}: {candidate.op}, {candidate.provider}")
        if not isinstance(built, Missing):
            outcomes[index] = attempt(candidate, partial(prepare, candidate, built, inputs))
            if device.type == "cuda":
                torch.cuda.empty_cache()
    contenders = [outcome for outcome in outcomes if isinstance(outcome, Contender)]
    missing = [outcome for outcome in outcomes if isinstance(outcome, Missing)]
    progress.set_postfix_str(f"s {seq_len}: {len(contenders)} of {len(everybody)} can run")
    times, roof_times = race(contenders, runs, cfg, Clock(device), progress)
    rates = Rates(*(amount / np.median(each) * 1e3 for amount, each in zip(amounts, roof_times, strict=True)))
    results = [Result(c.candidate, each, c.peak_mib) for c, each in zip(contenders, times, strict=True)]
    roof = {"seq_len": seq_len, "matmul_tflops": rates.flops / 1e12, "copy_gbytes": rates.bytes / 1e9}
    return roof, rows_of(results, missing, rates, sizes)


@config.parse
def main(cfg: DictConfig) -> None:
    """Entry point."""
    check(cfg)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch 2.13's profiler says on stderr that it starts and stops
    device = get_device(cfg.device)
    dtype = training.get_dtype(cfg.dtype, device)
    torch.set_num_threads(cfg.num_threads)
    settings = OmegaConf.to_container(cfg, resolve=True)
    roof_rows: list[Row] = []
    rows: list[Row] = []
    with tqdm(total=len(cfg.seq_lens) * (cfg.warmup + cfg.turns), desc="Timing") as progress:
        for seq_len in cfg.seq_lens:
            roof, more = measure(cfg, seq_len, device, dtype, progress)
            roof_rows.append(roof)
            rows += more
            # After each length, so that a run that is cut short has something to show.
            write(Path(cfg.output_dir), surroundings(device), settings, roof_rows, rows)
    print(table(rows))
    print(f"written to {cfg.output_dir}")


if __name__ == "__main__":
    sys.exit(main())
