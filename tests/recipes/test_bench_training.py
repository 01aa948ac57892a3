"""The training benchmark: one tiny run of the real script, and what its numbers rest on."""

import csv
import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torchtune import config

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs/bench_training.yaml"
TINY = {
    **{
        "num_threads": 1,
        "tokens_per_step": 256,
        "seq_lens": [64, 128],
        "embed_dim": 64,
        "qk_dim": 32,
        "chunk_size": 32,
    },
    **{"head_dim": 16, "max_seq_len": 128, "turns": 1, "matmul_size": 64, "keep_memory": False},
    "contenders.llama.model.intermediate_dim": 200,
    "output_csv": "out/result.csv",
    "output_png": "out/result.png",
}
CONTENDERS = ["flash", "flash_quad", "llama", "FLASH-pytorch"]
MODULES = ("bench_training", "training_reports", "measuring")


@pytest.fixture(scope="module")
def recipe():
    """The script and its modules, found as ``python recipes/bench_training.py`` finds them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "recipes"))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})


def settings(**changes):
    cfg = OmegaConf.load(CONFIG)
    for key, value in {**TINY, **changes}.items():
        OmegaConf.update(cfg, key.replace("__", "."), value)
    OmegaConf.resolve(cfg)
    return cfg


def read(path):
    lines = path.read_text().splitlines()
    header = [line for line in lines if line.startswith("#")]
    return header, list(csv.DictReader(line for line in lines if not line.startswith("#")))


@pytest.fixture
def run(recipe, monkeypatch, tmp_path, capsys):
    """Runs the script in this process, with steps in place of measured memory; returns the rows and what it printed."""
    script = recipe.bench_training

    def peak(cfg, name, seq_len):
        script.Trainer(cfg, name).step(*script.batch(cfg, seq_len, torch.device("cpu")))
        return 1.0

    def run(**changes):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(script, "peak_in_new_process", peak)
        script.main.__wrapped__(settings(**changes))
        return read(tmp_path / "out/result.csv")[1], capsys.readouterr().out

    return run


@pytest.mark.slow
def test_a_tiny_run_times_every_contender_at_every_length(tmp_path):
    overrides = [f"{key}={value}".replace(" ", "") for key, value in (TINY | {"keep_memory": True}).items()]
    command = [sys.executable, str(ROOT / "recipes/bench_training.py"), "--config", str(CONFIG), *overrides]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    header, rows = read(tmp_path / "out/result.csv")
    assert [(row["contender"], int(row["seq_len"])) for row in rows] == [(n, s) for s in (64, 128) for n in CONTENDERS]
    counts = [int(row["parameters"]) for row in rows]
    assert max(counts) < 1.03 * min(counts)
    for row in rows:
        assert not row["missing"]
        assert int(row["batch_size"]) * int(row["seq_len"]) == 256
        milliseconds = float(row["ms_p50"])
        (flash,) = (r for r in rows if (r["contender"], r["seq_len"]) == ("flash", row["seq_len"]))
        assert float(row["ratio_p50"]) == pytest.approx(milliseconds / float(flash["ms_p50"]), rel=2e-3)
        assert float(row["tokens_per_s_p50"]) == pytest.approx(256e3 / milliseconds, rel=2e-3)
        # Weights, gradients and Adam's two moments; activations on top.
        assert float(row["peak_mib"]) > 4 * 4 * int(row["parameters"]) / 2**20
        assert float(row["mfu"]) > 0
    said = "\n".join(header)
    for part in ("date: ", "device: ", f"torch: {torch.__version__}", "MALLOC_TRIM_THRESHOLD_: 6", "command: python "):
        assert part in said
    assert "s 128: large matrix product" in said
    assert (tmp_path / "out/result.csv").read_text() in done.stdout + "\n"
    assert (tmp_path / "out/result.png").read_bytes()[:4] == b"\x89PNG"


def test_flash_pytorch_is_reported_where_it_is_missing(monkeypatch, run):
    monkeypatch.setitem(sys.modules, "flash_pytorch", None)
    rows, printed = run(turns=2)
    missing = {row["contender"]: row["missing"] for row in rows if row["missing"]}
    assert list(missing) == ["FLASH-pytorch"]
    assert "pip install FLASH-pytorch==0.1.9" in missing["FLASH-pytorch"]
    assert f"FLASH-pytorch is missing: {missing['FLASH-pytorch']}" in printed
    assert [row["contender"] for row in rows] == 2 * CONTENDERS
    for row in rows:
        figures = [row[f"{what}_p50"] for what in ("ms", "ratio")]
        assert all(figures) != bool(row["missing"]) == (not any(figures))


def test_whoever_fails_at_a_length_is_missing_there_alone(recipe, monkeypatch, run):
    whole = recipe.bench_training.Trainer.step

    def step(self, tokens, labels):
        if self.name == "flash" and tokens.shape == (2, 128):
            raise torch.OutOfMemoryError("no\n room")
        return whole(self, tokens, labels)

    monkeypatch.setattr(recipe.bench_training.Trainer, "step", step)
    rows, _ = run()
    assert [(row["contender"], row["seq_len"], row["missing"]) for row in rows if row["missing"]] == [
        ("flash", "128", "OutOfMemoryError: no room")
    ]
    # Without the baseline there is nothing to compare with.
    assert all((row["ratio_p50"] == "") == (row["seq_len"] == "128") for row in rows)
    assert all(row["ms_p50"] for row in rows if not row["missing"])


def test_a_model_of_another_vocabulary_takes_no_part(run):
    rows, _ = run(contenders__llama__model__vocab_size=260, seq_lens=[64])
    (reason,) = (row["missing"] for row in rows if row["missing"])
    assert reason.startswith("ValueError: contenders.llama.model must give logits [")
    assert reason.endswith("260]; set its vocab_size=259")


def test_ratios_are_taken_turn_by_turn(recipe):
    # The machine is slower in each turn, and the ratio the same in the first two.
    flash, llama = np.array([1.0, 2.0, 4.0]), np.array([1.5, 3.0, 8.0])
    results = [
        recipe.training_reports.Result(name, 10, times, 1.0, 6e9)
        for name, times in (("llama", llama), ("flash", flash))
    ]
    ours, theirs = reversed(recipe.training_reports.rows_of(settings(), 64, results, 1e10))
    assert [ours[f"ratio_{name}"] for name in ("p20", "p50", "p80")] == [1, 1, 1]
    assert [theirs[f"ratio_{name}"] for name in ("p20", "p50", "p80")] == pytest.approx([1.5, 1.5, 1.8])
    assert [theirs[f"ms_{name}"] for name in ("p20", "p50", "p80")] == pytest.approx([2100, 3000, 6000])
    assert theirs["tokens_per_s_p50"] == pytest.approx(256 / 3)
    assert theirs["mfu"] == pytest.approx(6e9 / 3 / 1e10)


def test_models_of_different_sizes_are_refused(run, tmp_path):
    with pytest.raises(
        ValueError, match=r"^contenders must .* to 3%, but llama has 1.* and flash_quad has 1.*; change"
    ):
        run(contenders__llama__model__intermediate_dim=240)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"turns": 0}, ["turns (0)"]),
        ({"warmup": 0}, ["warmup (0)"]),
        ({"seq_lens": []}, ["seq_lens ([])"]),
        ({"seq_lens": [64, 96]}, ["tokens_per_step (256)", "seq_lens (96)", "tokens_per_step=96"]),
        ({"baseline": "quad"}, ["baseline (quad)", "flash_quad"]),
        ({"contenders__llama__core__attention": "soft"}, ["contenders.llama.core.attention (soft)", "softmax"]),
        ({"optimizer__lr": 1e30}, ["the loss of flash (", "finite"]),
    ],
)
def test_what_cannot_be_measured_is_refused(recipe, run, changes, words):
    with pytest.raises(ValueError) as refusal:
        run(**changes)
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize("name", CONTENDERS)
def test_a_step_trains_on_the_labels_and_leaves_no_gradients(recipe, name):
    cfg = settings(optimizer__lr=1e-2)
    trainer = recipe.bench_training.Trainer(cfg, name)
    tokens, labels = recipe.bench_training.batch(cfg, 64, torch.device("cpu"))
    assert tokens.shape == labels.shape == (4, 64)
    assert not torch.equal(tokens, labels)
    with torch.no_grad():
        expected = F.cross_entropy(trainer.model(tokens).flatten(0, 1), labels.flatten())
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    first = trainer.step(tokens, labels)
    torch.testing.assert_close(first, expected)
    after = list(trainer.model.parameters())
    assert all(parameter.grad is None for parameter in after)
    assert sum(not torch.equal(*pair) for pair in zip(before, after, strict=True)) > 0.9 * len(after)
    for _ in range(10):
        last = trainer.step(tokens, labels)
    assert last < first


def test_what_stays_between_steps_is_weights_tables_and_moments(recipe):
    cfg = settings()
    trainer = recipe.bench_training.Trainer(cfg, "llama")
    assert trainer.peak_mib(64) > trainer.held_mib()
    tables = sum(buffer.nbytes for buffer in trainer.model.buffers())
    counters = 4 * len(list(trainer.model.parameters()))
    assert trainer.held_mib() * 2**20 == 3 * 4 * trainer.parameters + tables + counters


def test_model_flops_are_three_forward_passes(recipe):
    cfg = settings()
    tokens, d, e, z, c, vocab = 256, 64, 128, 32, 32, 259
    llama = recipe.bench_training.Trainer(cfg, "llama").model_flops(128)
    # Scores and values, half of them masked.
    attention, mlp = 2 * tokens * 4 * d * d + 2 * (2 * tokens * 128 * d / 2), 2 * tokens * 3 * d * 200
    assert llama == 3 * (2 * (attention + mlp) + 2 * tokens * d * vocab)
    flash = recipe.bench_training.Trainer(cfg, "flash").model_flops(128)
    projections, local = 2 * tokens * (3 * d * e + d * z), 2 * tokens * c / 2 * (z + e)
    assert flash == 3 * (4 * (projections + local + 2 * (2 * tokens * z * e)) + 2 * tokens * d * vocab)


@pytest.mark.parametrize("name", ["bench_training", "bench_training_gpu"])
def test_the_models_of_both_configs_are_of_one_size(recipe, name):
    cfg = OmegaConf.load(ROOT / f"configs/{name}.yaml")
    OmegaConf.resolve(cfg)
    recipe.bench_training.check(cfg)
    counts = {}
    for contender, node in cfg.contenders.items():
        with torch.device("meta"):
            model = recipe.measuring.attempt(contender, lambda node=node: config.instantiate(node.model))
        if isinstance(model, recipe.measuring.Missing):
            assert contender == "fla_gla"
            assert "pip install flash-linear-attention==0.6.0" in model.reason
        else:
            counts[contender] = sum(parameter.numel() for parameter in model.parameters())
    assert set(CONTENDERS) <= set(counts)
    recipe.bench_training.check_equal_sizes("contenders", counts)
