"""What swapping attention costs a pretrained model, and what LoRA and distillation bring back.

    python recipes/study_swap.py --config configs/study_swap.yaml

A small Llama is trained from scratch, its attention is swapped, and the swapped model recovers, each time by a stock
recipe of torchtune's that reads a config written to `output_dir`. After every stage held-out bits per byte are measured
at several lengths, within the training length and beyond it, and so is the speed of a training step. As a control the
original is trained on as long as the others recover.
"""

from __future__ import annotations

import csv
import inspect
import math
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torchtune import config, utils
from tqdm import tqdm

from flash_plugin import text_dataset
from flash_plugin.components.sources import in_split, read_documents

WEIGHTS = "model-00001-of-00001.bin"
FIELDS = ["stage", "swap", "seq_len", "bits_per_byte", *(f"tokens_per_s_{name}" for name in ("p20", "p50", "p80"))]

logger = utils.get_logger("INFO")


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


def checkpointer(model: dict[str, Any], output_dir: Path, start: Path | None) -> dict[str, Any]:
    """The node of a checkpointer that begins with the weights in `start`, or from scratch."""
    node: dict[str, Any] = {
        "_component_": "flash_plugin.FlashCheckpointer",
        "output_dir": str(output_dir),
        "model_type": "FLASH",
    }
    if start is None:
        return {**node, "init_model": model}
    return {**node, "checkpoint_dir": str(start), "checkpoint_files": [WEIGHTS]}


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


def run(cfg: DictConfig, stage: Stage) -> Path:
    """Write the stage's config, let the stock recipe run it, and return the folder with the trained weights."""
    folder = Path(stage.changes["output_dir"])
    written = folder.with_suffix(".yaml")
    written.parent.mkdir(parents=True, exist_ok=True)
    log_dir = {"metric_logger": {**cfg.common.metric_logger, "log_dir": str(folder / "logs")}}
    OmegaConf.save(OmegaConf.create({**OmegaConf.to_container(cfg.common), **log_dir, **stage.changes}), written)
    logger.info(f"tune run {stage.recipe} --config {written}")
    tune = str(Path(sys.executable).parent / "tune")
    subprocess.run([tune, "run", stage.recipe, "--config", str(written)], check=True)
    return folder / f"epoch_{cfg.common.epochs - 1}"


def load(node: dict[str, Any], weights: Path) -> nn.Module:
    """A model with the weights in a folder; what they lack starts where the model says."""
    model = config.instantiate(OmegaConf.create(node))
    model.load_state_dict(torch.load(weights / WEIGHTS, mmap=True))
    return model


def held_out(cfg: DictConfig) -> Tensor:
    """The beginnings of documents that no stage is trained on, each as long as the longest length."""
    longest = max(cfg.seq_lens)
    tokenizer = config.instantiate(cfg.common.tokenizer)
    source, fraction = (
        cfg.common.dataset.source,
        inspect.signature(text_dataset).parameters["validation_fraction"].default,
    )
    texts = (document.text for document in read_documents(source) if in_split(document.name, "validation", fraction))
    encoded = (tokenizer.encode(text[:longest], add_bos=False, add_eos=False)[:longest] for text in texts)
    windows = [torch.tensor(tokens) for tokens in encoded if len(tokens) == longest][: cfg.windows]
    if not windows:
        raise ValueError(
            f"seq_lens ({longest}) must fit the held-out documents, none of which is so long; set smaller ones"
        )
    return torch.stack(windows)


@torch.no_grad()
def bits_per_byte(model: nn.Module, windows: Tensor, seq_len: int) -> float:
    """Mean loss on the second half of each stretch of `seq_len` tokens, whose context is at least half of that."""
    total, count = 0.0, 0
    for stretch in windows.unfold(1, seq_len, seq_len).flatten(0, 1):
        logits, half = model(stretch[None])[0], seq_len // 2
        total += F.cross_entropy(logits[half:-1], stretch[half + 1 :], reduction="sum").item()
        count += seq_len - half - 1
    return total / count / math.log(2)


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
    windows, rows = held_out(cfg), []
    model = load(node, weights).eval()
    for seq_len in tqdm(cfg.seq_lens, desc=f"{stage} {swap}".strip()):
        rates = np.quantile(speed(model, seq_len, cfg), (0.2, 0.5, 0.8))
        loss = bits_per_byte(model, windows, seq_len)
        rows.append(dict(zip(FIELDS, (stage, swap, seq_len, round(loss, 4), *(round(r) for r in rates)), strict=True)))
    return rows


def table(cfg: DictConfig, rows: list[dict[str, Any]]) -> str:
    """Markdown: bits per byte, and thousands of tokens per second, at each length."""
    lines = ["| model | " + " | ".join(f"{n} tokens" for n in cfg.seq_lens) + " |"]
    lines.append("|---|" + "---|" * len(cfg.seq_lens))
    for name in dict.fromkeys((row["stage"], row["swap"]) for row in rows):
        own = [row for row in rows if (row["stage"], row["swap"]) == name]
        cells = [f"{row['bits_per_byte']:.3f} ({row['tokens_per_s_p50'] / 1000:.1f} k/s)" for row in own]
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
    pretrained = run(cfg, Stage("original", "full_finetune_single_device", {**changes, **cfg.pretrain}))
    rows = measure(cfg, "original", "", model, pretrained)
    folder = output_dir / "original_longer"
    changes = {"model": model, "checkpointer": checkpointer(model, folder, pretrained), "output_dir": str(folder)}
    longer = run(cfg, Stage("original_longer", "full_finetune_single_device", {**changes, **cfg.recover}))
    rows += measure(cfg, "trained on", "original", model, longer)
    for swap, choices in cfg.swaps.items():
        rows += measure(cfg, "right after the swap", swap, swapped(cfg, choices), pretrained)
        for stage in stages(cfg, swap, pretrained):
            trained = run(cfg, stage)
            kind = "after distillation" if stage.name.endswith("_kd") else "after LoRA"
            rows += measure(cfg, kind, swap, swapped(cfg, choices), trained)
    with (output_dir / "study_swap.csv").open("w", newline="") as file:
        file.write(f"# {date.today()} {platform.processor() or platform.machine()}, {cfg.num_threads} threads, ")
        packages = ("torch", "torchtune", "torchao")
        file.write(", ".join(f"{name} {version(name)}" for name in packages) + "; ")
        file.write(" ".join(["python", *sys.argv]) + "\n")
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    (output_dir / "study_swap.md").write_text(table(cfg, rows) + "\n")
    print(table(cfg, rows))


if __name__ == "__main__":
    main()
