"""How ``study_quality.py`` reports, and ``figures.py`` after it: spreads over seeds, tables and pictures."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from omegaconf import DictConfig

matplotlib.use("Agg")
import matplotlib.pyplot as plt

#: Of the study itself, or strings read back from its file.
Rows = Sequence[Mapping[str, Any]]


def chosen(rows: Rows, training: str, model: str) -> Rows:
    """The rows of a model where it did best."""
    return [row for row in rows if (row["training"], row["model"], str(row["chosen"])) == (training, model, "True")]


def bits(rows: Rows, training: str, model: str, seq_len: int) -> list[float]:
    """Held-out bits per byte of a model where it did best, of each seed."""
    return [float(row["bits_per_byte"]) for row in chosen(rows, training, model) if int(row["seq_len"]) == seq_len]


def spread(values: Sequence[float]) -> str:
    """Mean, and in brackets the range."""
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def panel(axes: Axes, values: Iterable[Sequence[float]], labels: Sequence[str]) -> None:
    """A row for each model: every seed a point, their mean a bar."""
    for index, own in enumerate(values):
        axes.plot(own, [index] * len(own), "o", alpha=0.6, color="C0")
        axes.plot(statistics.mean(own), index, "|", markersize=14, color="black")
    axes.set_yticks(range(len(labels)), labels, fontsize="small")
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)


def tables(cfg: DictConfig, rows: Rows) -> str:
    """Markdown: for each study where a model did best, and its mean and range over seeds at each length."""
    head = ["model", "lr", "embeddings", *(f"{n} tokens" for n in cfg.seq_lens)]
    parts = []
    for study, group in cfg.studies.items():
        lines = [f"### {study} ({group.training})", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for model in group.models:
            best = chosen(rows, group.training, model)[0]
            cells = [spread(bits(rows, group.training, model, length)) for length in cfg.seq_lens]
            best_at = [f"{best[axis]:g}" for axis in ("lr", "embedding_std")]
            lines.append(f"| {' | '.join([model, *best_at, *cells])} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def draw(cfg: DictConfig, rows: Rows, path: Path) -> None:
    """A row of panels for each study, a column for each length."""
    heights = [0.9 + 0.28 * len(group.models) for group in cfg.studies.values()]
    figure, panels = plt.subplots(
        len(cfg.studies),
        len(cfg.seq_lens),
        figsize=(4.2 * len(cfg.seq_lens), sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for panel_row, (study, group) in zip(panels, cfg.studies.items(), strict=True):
        for axes, length in zip(panel_row, cfg.seq_lens, strict=True):
            labels = list(group.models) if axes is panel_row[0] else [""] * len(group.models)
            panel(axes, [bits(rows, group.training, model, length) for model in group.models], labels)
            axes.set_title(f"{study} ({group.training}), {length} tokens", fontsize=9)
    for axes in panels[-1]:
        axes.set_xlabel("held-out bits per byte; left is better")
    figure.savefig(path, dpi=110)
    plt.close(figure)
