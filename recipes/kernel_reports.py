"""How ``bench_kernels.py`` reports: rows, a CSV and a JSON file, pictures, a table for the screen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from kernel_providers import OPS, OUT_PASS, RIVAL_OP, Candidate
from kernel_rooflines import Costs, Rates, Sizes, floor_seconds
from measuring import QUANTILES, Missing, quantiles, write_csv

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DIRECTIONS = ("forward", "backward", "both")
FIELDS = [
    *("op", "provider", "direction", "seq_len", "batch_size"),
    *(f"ms_{name}" for name in QUANTILES),
    *("peak_mib", "floor_ms", "bound", "roofline"),
    *("rival", *(f"speedup_{name}" for name in QUANTILES)),
    "missing",
]
NOTES = (
    "ms: forward as in training, and backward to all inputs (and weights), device time on a GPU",
    "peak_mib: on top of inputs and weights; the same in every run",
    "roofline: floor_ms / ms_p50, the floor from recipes/kernel_rooflines.py and the rates above",
    "speedup: time of the fastest rival over this one's, turn by turn",
    "cores of FLASH-pytorch add their T5 bias, without its gradient; nobody rotates queries and keys",
)
# What an op would replace: drawn grey behind it.
_BEHIND = {**dict.fromkeys(OPS[:3], "softmax_attention"), **RIVAL_OP}

Row = dict[str, Any]


class Result(NamedTuple):
    """What was measured of a candidate: milliseconds by turn and peak MiB, both by direction."""

    candidate: Candidate
    times: dict[str, np.ndarray]
    peak_mib: dict[str, float]


def rows_of(results: list[Result], missing: list[Missing], rates: Rates, sizes: Sizes) -> list[Row]:
    """One row of :data:`FIELDS` for each candidate and direction; None where there is nothing to say."""
    rows = []
    for result in [*results, *missing]:
        for direction in DIRECTIONS:
            row: Row = dict.fromkeys(FIELDS)
            row |= {"op": result.candidate.op, "provider": result.candidate.provider, "direction": direction}
            row |= {"seq_len": sizes.seq_len, "batch_size": sizes.batch}
            if isinstance(result, Missing):
                row["missing"] = result.reason
            else:
                row |= _measured(result, direction, rates) | _compared(result, direction, results)
            rows.append(row)
    return sorted(rows, key=lambda row: OPS.index(row["op"]))


def _measured(result: Result, direction: str, rates: Rates) -> Row:
    milliseconds = quantiles("ms", result.times[direction])
    floor, bound = _floor(result.candidate.costs, direction, rates)
    share = {"floor_ms": floor, "bound": bound, "roofline": floor / milliseconds["ms_p50"]}
    return milliseconds | {"peak_mib": result.peak_mib[direction]} | share


def _compared(result: Result, direction: str, results: list[Result]) -> Row:
    """With the fastest of those who are not ours, in the same op or in the one it stands against."""
    op = RIVAL_OP.get(result.candidate.op, result.candidate.op)
    rivals = [other for other in results if other.candidate.op == op and other.candidate.is_rival]
    if not rivals or result.candidate.provider == OUT_PASS:
        return {}
    rival = min(rivals, key=lambda other: np.median(other.times[direction]))
    return {"rival": rival.candidate.provider} | quantiles("speedup", rival.times[direction] / result.times[direction])


def _floor(costs: Costs, direction: str, rates: Rates) -> tuple[float, str]:
    """Least milliseconds, and what sets them; a forward and a backward follow one another."""
    parts = {"forward": [costs.forward], "backward": [costs.backward], "both": list(costs)}[direction]
    floors = [floor_seconds(work, rates) for work in parts]
    return sum(seconds for seconds, _ in floors) * 1e3, "+".join(dict.fromkeys(bound for _, bound in floors))


def write(folder: Path, where: dict[str, str], settings: dict[str, Any], roofs: list[Row], rows: list[Row]) -> None:
    """Write ``bench_kernels.csv``, ``bench_kernels.json`` and, once somebody ran, ``bench_kernels_<direction>.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    everything = {"surroundings": where, "settings": settings, "notes": NOTES, "roofs": roofs, "rows": rows}
    (folder / "bench_kernels.json").write_text(json.dumps(everything, indent=1) + "\n")
    rates = [f"s {r['seq_len']}: {r['matmul_tflops']:.4g} TFLOP/s, copy {r['copy_gbytes']:.4g} GB/s" for r in roofs]
    header = [f"{name}: {value}" for name, value in where.items()]
    header += [f"settings: {json.dumps(settings)}", *rates, *NOTES]
    write_csv(folder / "bench_kernels.csv", FIELDS, header, rows)
    if all(row["missing"] for row in rows):
        return  # nobody ran: nothing to draw
    for direction in DIRECTIONS:
        _draw(folder / f"bench_kernels_{direction}.png", direction, where, settings, rows)


def table(rows: list[Row]) -> str:
    """One line for each candidate and length: median milliseconds (fraction of the roofline), peak MiB, speedup."""
    titles = "".join(f"{direction:>18}" for direction in DIRECTIONS)
    lines = [f"{'s':>6} {'op':22} {'provider':24}{titles}{'MiB':>9}  speedup"]
    for first in range(0, len(rows), len(DIRECTIONS)):
        group = rows[first : first + len(DIRECTIONS)]
        row = group[-1]
        line = f"{row['seq_len']:>6} {row['op']:22} {row['provider']:24}"
        if row["missing"]:
            lines.append(f"{line}  missing: {row['missing']}")
            continue
        cells = [f"{each['ms_p50']:.4g} ({each['roofline']:.0%})" for each in group]
        line += "".join(f"{cell:>18}" for cell in cells)
        rival = f"  {row['speedup_p50']:.2f} x {row['rival']}" if row["rival"] else ""
        lines.append(f"{line}{row['peak_mib']:>9.0f}{rival}")
    return "\n".join(lines)


def _draw(path: Path, direction: str, where: dict[str, str], settings: dict[str, Any], rows: list[Row]) -> None:
    """Times above, fractions of the roofline below; a column for each op, in front of what it would replace."""
    rows = [row for row in rows if row["direction"] == direction and not row["missing"]]
    run = list(dict.fromkeys(row["op"] for row in rows))
    ops = [op for op in run if op in _BEHIND] or run
    figure, grid = plt.subplots(
        2, len(ops), figsize=(4.2 * len(ops), 7.5), sharex=True, sharey="row", squeeze=False, layout="constrained"
    )
    for (above, below), op in zip(grid.T, ops, strict=True):
        for shown in (_BEHIND.get(op), op):
            _plot(above, below, [row for row in rows if row["op"] == shown], behind=shown != op)
        above.set(title=op, xscale="log", yscale="log")
        above.legend(fontsize="x-small")
        below.set(xlabel=f"sequence (batches of {settings['tokens']:,} tokens)", ylim=(0, None))
        below.set_xticks(settings["seq_lens"], [f"{seq_len:,}" for seq_len in settings["seq_lens"]], rotation=45)
        below.minorticks_off()
        for axes in (above, below):
            axes.grid(alpha=0.3)
    grid[0, 0].set(ylabel=f"{direction}, ms")
    grid[1, 0].set(ylabel="fraction of the roofline")
    sizes = ", ".join(f"{name} {settings[name]}" for name in ("embed_dim", "expansion", "qk_dim", "chunk_size"))
    figure.suptitle(f"{where['device']}, {where['date']}\n{settings['dtype']}, {sizes}", fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _plot(above: Any, below: Any, rows: list[Row], *, behind: bool) -> None:
    for number, provider in enumerate(dict.fromkeys(row["provider"] for row in rows)):
        mine = [row for row in rows if row["provider"] == provider]
        style = {"marker": "os^vx"[number % 5], "markersize": 4, "label": provider}
        style |= {"color": "0.65", "linestyle": ":"} if behind else {"color": f"C{number}"}
        lengths = [row["seq_len"] for row in mine]
        above.plot(lengths, [row["ms_p50"] for row in mine], **style)
        below.plot(lengths, [row["roofline"] for row in mine], **style)
