"""The study of quality trains what its config names, chooses learning rates, goes on where it stopped, and reports."""

import csv
import json
import math
import subprocess
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from tests.recipes.launching import ROOT, run

pytestmark = pytest.mark.slow

STUDIES = OmegaConf.load(ROOT / "configs/study_quality.yaml").studies
TINY = [
    *(f"~studies.{name}" for name in STUDIES if name not in ("parts", "families_longer")),
    *("studies.parts.models=[flash,global_only]", "studies.families_longer.models=[flash]"),
    "trainings.bytes_3000_steps.common.max_steps_per_epoch=15",
    *("seq_lens=[64,128]", "train_length=64", "windows=2", "jobs=1", "lrs=[0.003,1.0e9]", "seeds=[0,1]"),
    *("models.flash.embed_dim=32", "models.flash.num_layers=2", "models.flash.chunk_size=16"),
    *("common.max_steps_per_epoch=10", "common.dataset.max_tokens=30000", "common.lr_scheduler.num_warmup_steps=1"),
]


def study(folder: Path, *overrides: str, afresh: bool = False) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "recipes/study_quality.py"), "--config", str(ROOT / "configs/study_quality.yaml")]
    return run(*command, *TINY, *overrides, cwd=folder, afresh=afresh)


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


@pytest.mark.parametrize("start", [(0, 0), (2, 1), (4, 0)])
def test_the_search_ends_where_no_step_is_better(monkeypatch: pytest.MonkeyPatch, start: tuple[int, int]) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    from study_quality import climb

    slope = {(i, j): abs(i - 3) + 2.0 * abs(j - 1) for i in range(5) for j in range(3)}
    asked: list[tuple[int, ...]] = []

    def loss(place: tuple[int, ...]) -> float:
        asked.append(place)
        return slope[place]  # a KeyError beyond the grid

    assert climb((5, 3), start, loss) == (3, 1)
    assert {(2, 1), (4, 1), (3, 0), (3, 2), (3, 1)} <= set(asked)
    assert len(asked) == len(set(asked))


def test_each_model_is_tuned_and_trained_again_with_the_other_seed(studied: Path) -> None:
    found = {
        (r["model"], float(r["lr"]), float(r["embedding_std"]), int(r["seed"]), int(r["seq_len"])): r
        for r in rows(studied)
        if r["training"] == "bytes"
    }
    bits = {key: float(row["bits_per_byte"]) for key, row in found.items()}
    stds = {"flash": (0.02, 1.0), "global_only": (0.02,)}  # a variant of FLASH's keeps its embeddings
    for model, tried in stds.items():
        assert {key[2] for key in bits if key[0] == model} == set(tried)
        best = min((key for key in bits if key[0] == model and key[3:] == (0, 64)), key=lambda key: bits[key])
        assert best[1] == 0.003
        chosen = {(key[1], key[2], key[3]) for key, row in found.items() if key[0] == model and row["chosen"] == "True"}
        assert chosen == {(best[1], best[2], seed) for seed in (0, 1)}
        assert (model, 1e9, best[2], 0, 64) in bits  # the steps from the best along both lists were tried
        assert {key[2] for key in bits if key[:2] == (model, 0.003)} == set(tried)
        assert bits[(*best[:3], 0, 64)] != bits[(*best[:3], 1, 64)]
    assert {key[4] for key in bits} == {64, 128}
    assert all(math.isinf(value) or value > 20 for key, value in bits.items() if key[1] == 1e9)
    assert all(value < 8.5 for key, value in bits.items() if key[1] == 0.003)
    assert (studied / "outputs/study_quality/study_quality.png").stat().st_size > 5000


def test_a_longer_training_takes_what_was_best_in_the_shorter_one(studied: Path) -> None:
    found = {name: [r for r in rows(studied) if r["training"] == name] for name in ("bytes", "bytes_3000_steps")}
    axes = ("model", "lr", "embedding_std", "seed", "seq_len", "chosen")
    short = [[r[axis] for axis in axes] for r in found["bytes"] if r["chosen"] == "True" and r["model"] == "flash"]
    assert [[r[axis] for axis in axes] for r in found["bytes_3000_steps"]] == short
    runs = studied / "outputs/study_quality/runs/bytes_3000_steps/flash"
    assert [json.loads(path.read_text())["config"]["max_steps_per_epoch"] for path in runs.glob("*.json")] == [15, 15]


def test_what_no_training_tunes_is_refused(tmp_path: Path) -> None:
    done = study(tmp_path, "studies.families_longer.models=[llama]")
    assert done.returncode != 0
    assert "trainings.bytes_3000_steps.tuned_as ('bytes')" in done.stderr
    assert not (tmp_path / "outputs/study_quality/runs").exists()


def test_runs_that_are_there_are_not_repeated(studied: Path) -> None:
    results = sorted((studied / "outputs/study_quality/runs").rglob("*.json"))
    assert len(results) == len(rows(studied)) / 2  # lengths
    before, written = rows(studied), [path.stat().st_mtime_ns for path in results]
    marked = json.loads(results[0].read_text())
    results[0].write_text(json.dumps({**marked, "bits_per_byte": {"64": 1.25, "128": 1.5}}))
    assert study(studied).returncode == 0
    assert [path.stat().st_mtime_ns for path in results[1:]] == written[1:]
    assert {"1.2500", "1.5000"} <= {row["bits_per_byte"] for row in rows(studied)}
    assert len(rows(studied)) == len(before)


def test_models_of_unequal_size_are_refused(tmp_path: Path) -> None:
    done = study(tmp_path, "models.global_only.expansion=3", afresh=True)
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
