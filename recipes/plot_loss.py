"""Draw the training curve that torchtune's ``DiskLogger`` wrote, and print where it ended.

python recipes/plot_loss.py --config configs/plot_loss.yaml log_dir=outputs/flash_debug/logs
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import matplotlib
import numpy as np
from omegaconf import DictConfig
from torchtune import config

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_ENTRY = re.compile(r"(\w+):(\S+)")


def newest_log(log_dir: Path) -> Path:
    """Return the log file in ``log_dir`` that was written last.

    Raises:
        ValueError: If there is none.
    """
    logs = sorted(log_dir.glob("log_*.txt"), key=lambda path: path.stat().st_mtime)
    if not logs:
        raise ValueError(
            f"log_dir ({log_dir}) must hold a log_*.txt of DiskLogger; train first, or name another folder"
        )
    return logs[-1]


def read_log(path: Path) -> dict[str, np.ndarray]:
    """Read one array for each quantity in a log, and ``step``.

    Raises:
        ValueError: If no line holds a loss.
    """
    rows = []
    for line in path.read_text().splitlines():
        step, separator, rest = line.partition(" | ")
        if separator and "loss:" in rest:
            rows.append({"step": float(step.removeprefix("Step ")), **{k: float(v) for k, v in _ENTRY.findall(rest)}})
    if not rows:
        raise ValueError(f"log_dir (newest log {path}) must hold at least one step with a loss; train first")
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the last ``window`` values, or as many as there are."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    return (total[end] - total[start]) / (end - start)


@config.parse
def main(cfg: DictConfig) -> None:
    """Entry point."""
    path = newest_log(Path(cfg.log_dir))
    log = read_log(path)
    mean = smooth(log["loss"], cfg.window)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(log["step"], log["loss"], color="0.8", label="each step")
    axes.plot(log["step"], mean, color="C0", label=f"mean of {cfg.window} steps")
    axes.set(xlabel="step", ylabel=cfg.ylabel, title=cfg.title)
    axes.grid(alpha=0.3)
    axes.legend()
    output = Path(cfg.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)
    print(f"{path}: {len(mean)} steps, loss {log['loss'][0]:.3f} -> {mean[-1]:.3f} (mean of last {cfg.window} steps)")
    print(f"curve drawn to {output}")


if __name__ == "__main__":
    sys.exit(main())
