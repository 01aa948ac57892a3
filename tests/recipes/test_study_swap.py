"""The study of swapped attention runs all its stages and says what it measured."""

import csv
from pathlib import Path

import pytest

from tests.recipes.launching import ROOT, run

pytestmark = pytest.mark.slow

TINY = [
    *("seq_lens=[64,128]", "windows=2", "turns=2", "num_threads=1"),
    *("sizes.num_layers=2", "sizes.embed_dim=64", "sizes.intermediate_dim=96", "lora.lora_rank=4"),
    *("pretrain.max_steps_per_epoch=40", "recover.max_steps_per_epoch=30", "common.lr_scheduler.num_warmup_steps=5"),
    *("common.tokenizer.max_seq_len=128", "common.dataset.max_tokens=60000", "recover.optimizer.lr=1e-2"),
    *("~swaps.every_2", "~swaps.linear", "swaps.chunks_of_64.chunk_size=16"),
]


def test_a_small_llama_is_trained_swapped_and_recovers(tmp_path: Path) -> None:
    command = [str(ROOT / "recipes/study_swap.py"), "--config", str(ROOT / "configs/study_swap.yaml")]
    done = run(*command, *TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    output = tmp_path / "outputs/study_swap"
    lines = (output / "study_swap.csv").read_text().splitlines()
    header = [line for line in lines if line.startswith("# ")]
    assert any(line.startswith("# torchtune: 0.6.1") for line in header)
    assert any(line.startswith("# command: ") and "study_swap.yaml" in line for line in header)
    rows = list(csv.DictReader(lines[len(header) :]))
    stages = ["original", "trained on", "right after the swap", "after LoRA", "after distillation"]
    assert [row["stage"] for row in rows] == [stage for stage in stages for _ in range(2)]
    loss = {row["stage"]: float(row["bits_per_byte"]) for row in rows if row["seq_len"] == "128"}
    assert loss["original"] < 8  # of 259 tokens, more than nothing is learned
    assert loss["right after the swap"] != loss["original"]
    assert loss["after LoRA"] < loss["right after the swap"]
    assert loss["after distillation"] < loss["right after the swap"]
    assert all(float(row["tokens_per_s_p20"]) <= float(row["tokens_per_s_p80"]) for row in rows)
    assert (output / "study_swap.md").read_text() in done.stdout + "\n"
    assert all((output / f"{name}.yaml").is_file() for name in ("original", "chunks_of_64_lora", "chunks_of_64_kd"))
