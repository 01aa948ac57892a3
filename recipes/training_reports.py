"""How ``bench_training.py`` reports: rows, a CSV file and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from measuring import QUANTILES, Missing, quantiles, surroundings, write_csv
from omegaconf import DictConfig, OmegaConf
from torchtune.utils import get_device

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FIELDS = [
    *("contender", "seq_len", "batch_size", "parameters"),
    *(f"{what}_{name}" for what in ("ms", "tokens_per_s", "ratio") for name in QUANTILES),
    *("peak_mib", "mfu", "missing"),
]
Row = dict[str, Any]


class Result(NamedTuple):
    """What was measured of a contender at one length: seconds of its steps turn by turn, MiB at the peak of one."""

    contender: str
    parameters: int
    seconds: np.ndarray
    peak_mib: float
    model_flops: float


def rows_of(cfg: DictConfig, seq_len: int, outcomes: Sequence[Result | Missing], rate: float | None) -> list[Row]:
    """One row of :data:`FIELDS` for each contender; ``rate`` is what the matrix product reached in FLOP/s."""
    times = {outcome.contender: outcome.seconds for outcome in outcomes if isinstance(outcome, Result)}
    rows = []
    for outcome in outcomes:
        row: Row = dict.fromkeys(FIELDS)
        row |= {"seq_len": seq_len, "batch_size": cfg.tokens_per_step // seq_len}
        if isinstance(outcome, Missing):
            rows.append(row | {"contender": outcome.candidate, "missing": outcome.reason})
            continue
        seconds = outcome.seconds
        row |= {"contender": outcome.contender, "parameters": outcome.parameters, "peak_mib": outcome.peak_mib}
        row |= quantiles("ms", seconds * 1e3) | quantiles("tokens_per_s", cfg.tokens_per_step / seconds)
        if cfg.baseline in times:
            row |= quantiles("ratio", seconds / times[cfg.baseline])
        if rate is not None:
            row["mfu"] = outcome.model_flops / float(np.median(seconds)) / rate
        rows.append(row)
    return rows


def write(cfg: DictConfig, rates: dict[int, float | None], rows: list[Row]) -> None:
    """Write the CSV file and, once somebody ran, the PNG."""
    where = surroundings(get_device(cfg.device))
    header = [f"{name}: {value}" for name, value in where.items()]
    header += [f"settings: {json.dumps(OmegaConf.to_container(cfg))}"]
    header += [
        f"s {seq_len}: large matrix product {rate / 1e12:.4g} TFLOP/s" for seq_len, rate in rates.items() if rate
    ]
    header += [
        "step: forward, loss, backward, optimizer, zero_grad; ms and tokens/s of whole steps",
        f"ratio: time of a step over that of {cfg.baseline} in the same turn: how many times as fast {cfg.baseline} is",
        "peak_mib: of one step, with weights and optimizer state",
        "mfu: model FLOPs (3 forward passes, nothing recomputed) a second over the rate of the large matrix product",
    ]
    write_csv(Path(cfg.output_csv), FIELDS, header, rows)
    if any(not row["missing"] for row in rows):
        draw(Path(cfg.output_png), f"{where['device']}, {where['date']}", cfg, rows)


def draw(path: Path, where: str, cfg: DictConfig, rows: list[Row]) -> None:
    """Speed and peak memory over the length, on logarithmic axes; bars reach from p20 to p80."""
    panels = {"tokens_per_s_p50": "training, tokens/s", "peak_mib": "peak memory, MiB"}
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axis, (field, title) in zip(axes, panels.items(), strict=True):
        for number, name in enumerate(cfg.contenders):
            mine = [row for row in rows if row["contender"] == name and not row["missing"]]
            lengths = [row["seq_len"] for row in mine]
            style = {"color": f"C{number}", "marker": "os^vxD"[number % 6], "markersize": 4}
            axis.plot(lengths, [row[field] for row in mine], label=name if mine else f"{name} (missing)", **style)
            if field.startswith("tokens"):
                ends = [[row[f"tokens_per_s_{end}"] for row in mine] for end in ("p20", "p80")]
                axis.vlines(lengths, *ends, color=f"C{number}", alpha=0.5)
        axis.set(title=title, xscale="log", yscale="log", xlabel=f"sequence (steps of {cfg.tokens_per_step:,} tokens)")
        axis.set_xticks(list(cfg.seq_lens), [f"{seq_len:,}" for seq_len in cfg.seq_lens])
        axis.xaxis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    mode = "compiled" if cfg.compile else "eager"
    figure.suptitle(f"{where}\n{cfg.dtype}, {mode}, d {cfg.embed_dim}, chunk {cfg.chunk_size}", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
