"""What swapping attention costs a pretrained model, and what LoRA and distillation bring back.

    python recipes/study_swap.py --config configs/study_swap.yaml

A small Llama is trained from scratch, its attention is swapped, and the swapped model recovers, each time by a stock
recipe of torchtune's that reads a config written to `output_dir`. After every stage held-out bits per byte are measured
at several lengths, within the training length and beyond it, and so is the speed of a training step. As a control the
original is trained on as long as the others recover.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from measuring import surroundings, write_csv
from omegaconf import DictConfig, OmegaConf
from studies import bits_per_byte, checkpointer, held_out, load, run
from torch import nn
from torchtune import config
from tqdm import tqdm

FIELDS = ["stage", "swap", "seq_len", "bits_per_byte", *(f"tokens_per_s_{name}" for name in ("p20", "p50", "p80"))]


class Stage(NamedTuple):
    """A run of a stock recipe: its name, the recipe, and what in the config is not `common`."""

    name: str
    recipe: str
    changes: dict[str, Any]


def original(cfg: DictConfig, *, lora: bool = False) -> dict[str, Any]:
    """The node of the model as torchtune builds it."""
    sizes: Any = OmegaConf.to_container(cfg.sizes)
    if not lora:
        return {"_component_": cfg.builder, **sizes}
    return {"_component_": cfg.lora_builder, **sizes, **OmegaConf.to_container(cfg.lora)}


def swapped(cfg: DictConfig, choices: DictConfig, *, lora: bool = False) -> dict[str, Any]:
    """The node of a swapped model."""
    node = original(cfg, lora=lora)
    return {**node, "_component_": "flash_plugin.swap_attention", "builder": node["_component_"], **choices}


def stages(cfg: DictConfig, swap: str, pretrained: Path) -> Iterator[Stage]:
    """How a swapped model recovers."""
    model = swapped(cfg, cfg.swaps[swap], lora=True)
    output_dir = Path(cfg.output_dir, f"{swap}_lora")
    changes = {
        **OmegaConf.to_container(cfg.recover),
        "model": model,
        "checkpointer": checkpointer(model, output_dir, pretrained),
        "output_dir": str(output_dir),
    }
    yield Stage(f"{swap}_lora", "lora_finetune_single_device", changes)
    output_dir = Path(cfg.output_dir, f"{swap}_kd")
    teacher = original(cfg)
    changes = {
        **changes,
        "checkpointer": checkpointer(model, output_dir, pretrained),
        "output_dir": str(output_dir),
        "teacher_model": teacher,
        "teacher_checkpointer": checkpointer(teacher, output_dir, pretrained),
        **OmegaConf.to_container(cfg.distil),
    }
    yield Stage(f"{swap}_kd", "knowledge_distillation_single_device", changes)


def trained(cfg: DictConfig, stage: Stage) -> Path:
    """Let the stock recipe run a stage, and return the folder with the trained weights."""
    return run(stage.recipe, {**OmegaConf.to_container(cfg.common), **stage.changes})


def speed(model: nn.Module, seq_len: int, cfg: DictConfig) -> list[float]:
    """Tokens per second of forward and backward together, each turn's."""
    tokens = torch.randint(0, cfg.sizes.vocab_size, (1, seq_len), generator=torch.Generator().manual_seed(0))
    rates = []
    for turn in range(cfg.warmup + cfg.turns):
        start = time.perf_counter()
        F.cross_entropy(model(tokens)[0], tokens[0]).backward()
        if turn >= cfg.warmup:
            rates.append(seq_len / (time.perf_counter() - start))
        model.zero_grad()
    return rates


def measure(cfg: DictConfig, stage: str, swap: str, node: dict[str, Any], weights: Path) -> list[dict[str, Any]]:
    """The rows of one stage."""
    tokenizer, rows = config.instantiate(cfg.common.tokenizer), []
    windows = held_out(tokenizer, cfg.common.dataset.source, cfg.seq_lens, cfg.windows)
    model = load(node, weights).eval()
    for seq_len in tqdm(cfg.seq_lens, desc=f"{stage} {swap}".strip()):
        rates = np.quantile(speed(model, seq_len, cfg), (0.2, 0.5, 0.8))
        loss = bits_per_byte(model, windows, seq_len, tokenizer)
        rows.append(dict(zip(FIELDS, (stage, swap, seq_len, f"{loss:.4f}", *(round(r) for r in rates)), strict=True)))
    return rows


def table(cfg: DictConfig, rows: list[dict[str, Any]]) -> str:
    """Markdown: bits per byte, and thousands of tokens per second, at each length."""
    lines = ["| model | " + " | ".join(f"{n} tokens" for n in cfg.seq_lens) + " |"]
    lines.append("|---|" + "---|" * len(cfg.seq_lens))
    for name in dict.fromkeys((row["stage"], row["swap"]) for row in rows):
        own = [row for row in rows if (row["stage"], row["swap"]) == name]
        cells = [f"{float(row['bits_per_byte']):.3f} ({row['tokens_per_s_p50'] / 1000:.1f} k/s)" for row in own]
        lines.append(f"| {' '.join(part for part in name[::-1] if part)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@config.parse
def main(cfg: DictConfig) -> None:
    """Run all stages, write `study_swap.csv` and `study_swap.md`, and print the table."""
    torch.set_num_threads(cfg.num_threads)
    output_dir = Path(cfg.output_dir)
    model = original(cfg)
    folder = output_dir / "original"
    changes = {"model": model, "checkpointer": checkpointer(model, folder, None), "output_dir": str(folder)}
    pretrained = trained(cfg, Stage("original", "full_finetune_single_device", {**changes, **cfg.pretrain}))
    rows = measure(cfg, "original", "", model, pretrained)
    folder = output_dir / "original_longer"
    changes = {"model": model, "checkpointer": checkpointer(model, folder, pretrained), "output_dir": str(folder)}
    longer = trained(cfg, Stage("original_longer", "full_finetune_single_device", {**changes, **cfg.recover}))
    rows += measure(cfg, "trained on", "original", model, longer)
    for swap, choices in cfg.swaps.items():
        rows += measure(cfg, "right after the swap", swap, swapped(cfg, choices), pretrained)
        for stage in stages(cfg, swap, pretrained):
            weights = trained(cfg, stage)
            kind = "after distillation" if stage.name.endswith("_kd") else "after LoRA"
            rows += measure(cfg, kind, swap, swapped(cfg, choices), weights)
    header = [f"{name}: {value}" for name, value in surroundings(torch.device(cfg.common.device)).items()]
    write_csv(output_dir / "study_swap.csv", list(rows[0]), header, rows)
    (output_dir / "study_swap.md").write_text(table(cfg, rows) + "\n")
    print(table(cfg, rows))


if __name__ == "__main__":
    main()
