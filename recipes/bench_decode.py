"""Time prefill and decoding against the length of the context, beside torchtune's Llama of the same size.

    python recipes/bench_decode.py --config configs/bench_decode.yaml

The context is not computed: the caches are filled with numbers as if so many tokens had gone before, which costs the
same as real ones. Then a piece of prompt is prefilled behind it, and single tokens are decoded. The contenders take
turns, so that a machine that drifts slows all of them. Peak memory is that of building the model, its caches, a prefill
and some steps: what the process grew by on a CPU, what the allocator gave out on a GPU.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from measuring import QUANTILES, memory_mib, quantiles, surroundings, write_csv
from omegaconf import DictConfig
from torch import Tensor, nn
from torchtune import config, training, utils
from torchtune.models.llama2 import llama2
from torchtune.modules import KVCache
from tqdm import tqdm

import flash_plugin

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FIELDS = [
    *("contender", "precision", "context", "parameters", "cache_mib", "peak_mib"),
    *(f"prefill_tokens_per_s_{name}" for name in QUANTILES),
    *(f"decode_tokens_per_s_{name}" for name in QUANTILES),
    "decode_ms_p50",
]
CONTENDERS = ("flash", "flash_quad", "llama")
QUANTIZERS: dict[str, Callable[[], Any] | None] = {
    "float": None,
    "int8_weight_only": flash_plugin.Int8WeightOnlyQuantizer,
    "int8_dynamic": flash_plugin.Int8DynActInt8WeightQuantizer,
}


class Row(NamedTuple):
    """One line of the result: who, in which precision, behind how many tokens."""

    contender: str
    precision: str
    context: int


def capacity(cfg: DictConfig, context: int) -> int:
    """Tokens that a cache must hold at once."""
    return context + max(cfg.prefill_tokens, cfg.decode_tokens)


def build(cfg: DictConfig, row: Row) -> nn.Module:
    """Build a model, quantized if its row says so, without caches."""
    torch.manual_seed(0)
    length, sizes = capacity(cfg, row.context), {"vocab_size": cfg.vocab_size, "embed_dim": cfg.embed_dim}
    flash_sizes = {**sizes, "num_layers": cfg.num_layers, "qk_dim": cfg.qk_dim}
    with training.set_default_dtype(training.get_dtype(cfg.dtype)), torch.device(cfg.device):
        if row.contender == "flash":
            model = flash_plugin.flash(
                **flash_sizes, max_seq_len=cfg.prefill_tokens, chunk_size=cfg.chunk_size, unlimited_decoding=True
            )
        elif row.contender == "flash_quad":
            model = flash_plugin.flash_quad(**flash_sizes, max_seq_len=length)
        else:
            model = llama2(
                **sizes,
                num_layers=cfg.num_layers // 2,
                num_heads=cfg.num_heads,
                num_kv_heads=cfg.num_kv_heads,
                max_seq_len=length,
                intermediate_dim=mlp_dim(cfg),
            )
    make_quantizer = QUANTIZERS[row.precision]
    model = model if make_quantizer is None else make_quantizer().quantize(model)
    return model.eval().requires_grad_(False)


def mlp_dim(cfg: DictConfig) -> int:
    """Width of Llama's MLP with which one of its layers has the parameters of two FLASH layers."""
    d, z = cfg.embed_dim, cfg.qk_dim
    flash = 2 * (6 * d * d + d * z + 8 * z + 32)  # 3 d e + d z with e = 2d, gammas and betas, T5's buckets
    attention = 2 * d * d * (1 + cfg.num_kv_heads / cfg.num_heads)
    return round((flash - attention) / (3 * d))


def cache_bytes(cfg: DictConfig, row: Row) -> int:
    """Bytes of the caches of one model, found without allocating them."""
    with torch.device("meta"):
        model = build(DictConfig({**cfg, "device": "meta"}), row._replace(precision="float"))
        set_up(cfg, model, row.context)
    return sum(buffer.nbytes for cache in caches(model) for buffer in cache.buffers())


def set_up(cfg: DictConfig, model: nn.Module, context: int) -> None:
    """Give a model its caches."""
    model.setup_caches(cfg.batch_size, training.get_dtype(cfg.dtype), decoder_max_seq_len=capacity(cfg, context))


def caches(model: nn.Module) -> list[nn.Module]:
    """The caches of all layers."""
    return [module for module in model.modules() if isinstance(module, flash_plugin.FlashCache | KVCache)]


def rewind(model: nn.Module, context: int, *, fill: bool = False) -> None:
    """Make caches stand behind ``context`` tokens; ``fill`` writes numbers for these, of no meaning."""
    for cache in caches(model):
        if fill:
            for buffer in cache.buffers():
                if buffer.is_floating_point():
                    buffer.fill_(0.01)
        if isinstance(cache, KVCache):
            cache.cache_pos.copy_(torch.arange(len(cache.cache_pos), device=cache.cache_pos.device) + context)
        else:
            cache.cursor.copy_(torch.tensor([0, context - 1, context], device=cache.cursor.device))
            cache.empty = False


class Runner:
    """A model behind its context, and what is timed of it."""

    def __init__(self, cfg: DictConfig, row: Row, *, compiled: bool) -> None:
        self.cfg, self.row, self.device = cfg, row, torch.device(cfg.device)
        self.model = build(cfg, row)
        with self.device:
            set_up(cfg, self.model, row.context)
        rewind(self.model, row.context, fill=True)
        self.step = torch.compile(self.model) if compiled else self.model
        self.token = torch.zeros(cfg.batch_size, 1, dtype=torch.long, device=self.device)
        self.piece = torch.zeros(cfg.batch_size, cfg.prefill_tokens, dtype=torch.long, device=self.device)
        self.position = torch.arange(capacity(cfg, row.context), device=self.device)

    def mask(self, start: int, tokens: int) -> Tensor | None:
        """What torchtune's attention needs; a FLASH model goes by positions alone."""
        if self.row.contender != "llama":
            return None
        return (self.position <= self.position[start : start + tokens, None])[None]

    def prefill(self) -> float:
        """Seconds for a piece of prompt."""
        rewind(self.model, self.row.context)
        span = slice(self.row.context, self.row.context + self.cfg.prefill_tokens)
        mask = self.mask(span.start, self.cfg.prefill_tokens)
        return self.timed(lambda: self.model(self.piece, input_pos=self.position[span], mask=mask))

    def decode(self) -> float:
        """Seconds for ``decode_tokens`` tokens, one after the other."""
        rewind(self.model, self.row.context)
        places = range(self.row.context, self.row.context + self.cfg.decode_tokens)
        masks = [self.mask(place, 1) for place in places]

        def run() -> None:
            for place, mask in zip(places, masks, strict=True):
                self.step(self.token, input_pos=self.position[place, None], mask=mask)

        return self.timed(run)

    def timed(self, run: Callable[[], object]) -> float:
        """Seconds that a call takes, the device's work included."""
        self.wait()
        start = time.perf_counter()
        with torch.no_grad():
            run()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def peak_memory(cfg: DictConfig, row: Row) -> float:
    """MiB at the peak of building a model, filling its caches, a prefill and some steps."""
    device = torch.device(cfg.device)
    before = memory_mib(device, restart=True)
    runner = Runner(cfg, row, compiled=False)  # the compiler's own memory is not the model's
    runner.prefill()
    runner.decode()
    return memory_mib(device) - before


def warm_up(cfg: DictConfig, rows: list[Row]) -> None:
    """Load in a new process what first calls load, so that it is not counted."""
    torch.set_num_threads(cfg.num_threads)
    utils.get_logger("WARNING")
    for row in {row._replace(context=1) for row in rows}:
        peak_memory(cfg, row)


def measure(cfg: DictConfig, peak_mib: dict[Row, float], progress: tqdm) -> list[dict[str, object]]:
    """Time the rows of one context, in turns."""
    rows = list(peak_mib)
    runners = {row: Runner(cfg, row, compiled=cfg.compile) for row in rows}
    prefill: dict[Row, list[float]] = {row: [] for row in rows}
    decode: dict[Row, list[float]] = {row: [] for row in rows}
    for turn in range(cfg.warmup + cfg.turns):
        for row, runner in runners.items():
            seconds = runner.prefill(), runner.decode()
            if turn >= cfg.warmup:
                prefill[row].append(seconds[0])
                decode[row].append(seconds[1])
            progress.update()
    return [result(cfg, row, runners[row].model, peak_mib[row], prefill[row], decode[row]) for row in rows]


def result(
    cfg: DictConfig, row: Row, model: nn.Module, peak_mib: float, prefill: list[float], decode: list[float]
) -> dict[str, object]:
    """One line of the CSV; times are in seconds a turn."""
    line: dict[str, object] = {
        **row._asdict(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "cache_mib": f"{cache_bytes(cfg, row) / 2**20:.2f}",
        "peak_mib": f"{peak_mib:.0f}",
    }
    for kind, tokens, times in (("prefill", cfg.prefill_tokens, prefill), ("decode", cfg.decode_tokens, decode)):
        rates = quantiles(f"{kind}_tokens_per_s", cfg.batch_size * tokens / np.array(times))
        line |= {name: f"{rate:.1f}" for name, rate in rates.items()}
    line["decode_ms_p50"] = f"{np.median(decode) / cfg.decode_tokens * 1e3:.3f}"
    return line


def draw(lines: list[dict[str, Any]], path: Path, where: str) -> None:
    """Draw speeds and memory over the context, on logarithmic axes: a colour a contender, a style a precision."""
    panels = {
        "decode_tokens_per_s_p50": "decoding, tokens/s",
        "prefill_tokens_per_s_p50": "prefill behind the context, tokens/s",
        "cache_mib": "cache, MiB",
        "peak_mib": "peak memory, MiB",
    }
    styles = dict(zip(QUANTIZERS, ("-", "--", ":"), strict=True))
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained", sharex=True)
    for axis, (field, title) in zip(axes.flat, panels.items(), strict=True):
        for number, contender in enumerate(CONTENDERS):
            for precision, style in styles.items():
                points = [line for line in lines if (line["contender"], line["precision"]) == (contender, precision)]
                axis.plot(
                    [line["context"] for line in points],
                    [float(line[field]) for line in points],
                    style + "o",
                    color=f"C{number}",
                    markersize=3,
                    label=f"{contender}, {precision}",
                )
        axis.set(title=title, xscale="log", yscale="log")
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set(xlabel="tokens of context")
    axes[0, 0].legend(fontsize=7)
    figure.suptitle(where, fontsize=9)
    figure.savefig(path, dpi=150)


@config.parse
def main(cfg: DictConfig) -> None:
    """Entry point."""
    if cfg.num_layers % 2:
        raise ValueError(f"num_layers ({cfg.num_layers}) must be even: two FLASH layers are one of Llama; add one")
    unknown = [precision for precision in cfg.precisions if precision not in QUANTIZERS]
    if unknown:
        raise ValueError(f"precisions ({unknown[0]!r}) must be among {', '.join(QUANTIZERS)}; set precisions to some")
    torch.set_num_threads(cfg.num_threads)
    utils.get_logger("WARNING")  # quantizers need not say each time what they do
    rows, left_out = [], []
    for contender, context in itertools.product(CONTENDERS, cfg.contexts):
        if cache_bytes(cfg, Row(contender, "float", context)) > cfg.cache_budget_mib * 2**20:
            left_out.append(f"{contender} at {context:,}")
        else:
            rows += [Row(contender, precision, context) for precision in cfg.precisions]
    # A process that does nothing else.
    with multiprocessing.get_context("spawn").Pool(1, warm_up, (cfg, rows)) as pool:
        found = tqdm(pool.imap(functools.partial(peak_memory, cfg), rows), "Memory", len(rows))
        peak_mib = dict(zip(rows, found, strict=True))
    lines: list[dict[str, object]] = []
    with tqdm(total=len(rows) * (cfg.warmup + cfg.turns), desc="Timing") as progress:
        for context in cfg.contexts:
            lines += measure(cfg, {row: peak for row, peak in peak_mib.items() if row.context == context}, progress)
    where = surroundings(torch.device(cfg.device))
    header = [f"{name}: {value}" for name, value in where.items()]
    header += [
        f"{cfg.dtype}, batch {cfg.batch_size}, chunk {cfg.chunk_size}, {cfg.turns} turns, "
        f"{'compiled' if cfg.compile else 'eager'} steps; prefill of {cfg.prefill_tokens} tokens",
        f"left out, their caches being above {cfg.cache_budget_mib} MiB: {', '.join(left_out) or 'none'}",
    ]
    output = Path(cfg.output_dir)
    write_csv(output / "bench_decode.csv", FIELDS, header, lines)
    draw(lines, output / "bench_decode.png", f"{where['date']}; {where['device']}")
    print((output / "bench_decode.csv").read_text())


if __name__ == "__main__":
    sys.exit(main())
