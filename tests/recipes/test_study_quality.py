"""The study of quality trains what its config names, chooses learning rates, goes on where it stopped, and reports."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from tests.recipes.test_stock_recipes import ROOT

pytestmark = pytest.mark.slow

STUDIES = OmegaConf.load(ROOT / "configs/study_quality.yaml").studies
TINY = [
    *(f"~studies.{name}" for name in STUDIES if name != "parts"),
    "studies.parts.models=[flash,global_only]",
    *("seq_lens=[64,128]", "train_length=64", "windows=2", "jobs=1", "lrs=[0.003,1.0e9]", "seeds=[0,1]"),
    *("models.flash.embed_dim=32", "models.flash.num_layers=2", "models.flash.chunk_size=16"),
    *("common.max_steps_per_epoch=10", "common.dataset.max_tokens=30000", "common.lr_scheduler.num_warmup_steps=1"),
]


def study(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "recipes/study_quality.py")]
    command += ["--config", str(ROOT / "configs/study_quality.yaml"), *TINY, *overrides]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500, check=False)


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    done = study(folder)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (folder / "outputs/study_quality/study_quality.md").read_text() in done.stdout + "\n"
    return folder


def rows(folder: Path) -> list[dict[str, str]]:
    lines = (folder / "outputs/study_quality/study_quality.csv").read_text().splitlines()
    header = [line for line in lines if line.startswith("# ")]
    assert any(line.startswith("# torchtune: 0.6.1") for line in header)
    assert any(line.startswith("# command: ") and "study_quality.yaml" in line for line in header)
    return list(csv.DictReader(lines[len(header) :]))


def test_each_model_is_trained_with_each_rate_and_the_best_again(studied: Path) -> None:
    found = {
        (r["model"], float(r["lr"]), int(r["seed"]), int(r["seq_len"])): float(r["bits_per_byte"])
        for r in rows(studied)
    }
    runs = [(0.003, 0), (1e9, 0), (0.003, 1)]
    assert set(found) == {(m, *run, n) for m in ("flash", "global_only") for run in runs for n in (64, 128)}
    assert all(math.isinf(bits) or bits > 20 for (_, lr, _, _), bits in found.items() if lr == 1e9)
    assert all(bits < 8.05 for (_, lr, _, _), bits in found.items() if lr == 0.003)
    assert {row["chosen"] for row in rows(studied) if row["lr"] == "0.003"} == {"True"}
    assert {row["chosen"] for row in rows(studied) if row["lr"] != "0.003"} == {"False"}
    seeds = [found["flash", 0.003, seed, 64] for seed in (0, 1)]
    assert seeds[0] != seeds[1]
    assert (studied / "outputs/study_quality/study_quality.png").stat().st_size > 5000


def test_runs_that_are_there_are_not_repeated(studied: Path) -> None:
    results = sorted((studied / "outputs/study_quality/runs").rglob("*.json"))
    assert len(results) == 6
    before, written = rows(studied), [path.stat().st_mtime_ns for path in results]
    marked = json.loads(results[0].read_text())
    results[0].write_text(json.dumps({**marked, "bits_per_byte": {"64": 1.25, "128": 1.5}}))
    assert study(studied).returncode == 0
    assert [path.stat().st_mtime_ns for path in results[1:]] == written[1:]
    assert {"1.2500", "1.5000"} <= {row["bits_per_byte"] for row in rows(studied)}
    assert len(rows(studied)) == len(before)


def test_models_of_unequal_size_are_refused(tmp_path: Path) -> None:
    done = study(tmp_path, "models.global_only.expansion=3")
    assert done.returncode != 0
    assert "studies.parts.models" in done.stderr
    assert "equal numbers of parameters" in done.stderr


def test_models_without_a_part_lack_what_they_are_named_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    import study_models

    sizes = dict(vocab_size=50, num_layers=1, embed_dim=32, qk_dim=16, max_seq_len=64, chunk_size=16)
    torch.manual_seed(0)
    local = study_models.flash_without("global", **sizes, position_bias="none").double()
    across = study_models.flash_without("local", **sizes, position_bias="none").double()
    tokens = torch.randint(0, 50, (1, 48))
    changed = tokens.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 50  # in the second of three chunks

    def moved(model: torch.nn.Module) -> set[int]:
        with torch.no_grad():
            return set((model(tokens) != model(changed)).any(-1)[0].nonzero().flatten().tolist())

    # relu2 is zero for half of all pairs, so that not every token of the chunk sees the one that changed.
    assert {20} < moved(local) <= set(range(20, 32))
    assert moved(across) == {20, *range(32, 48)}
    with pytest.raises(ValueError, match="position_bias"):
        study_models.flash_without("local", **sizes)
    with pytest.raises(ValueError, match="part"):
        study_models.flash_without("both", **sizes)
