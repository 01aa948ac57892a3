"""The decoding benchmark: one tiny run of the real script."""

import csv
import subprocess
from pathlib import Path

import pytest

from tests.recipes import launching
from tests.recipes.launching import ROOT

TINY = [
    *("vocab_size=40", "embed_dim=32", "num_layers=2", "qk_dim=32", "chunk_size=16", "num_heads=4", "num_kv_heads=1"),
    *("contexts=[64,512]", "precisions=[float,int8_weight_only]", "cache_budget_mib=0.2", "num_threads=1"),
    *("prefill_tokens=16", "decode_tokens=2", "warmup=0", "turns=1", "output_dir=out"),
]


def run(cwd: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "recipes/bench_decode.py"), "--config", str(ROOT / "configs/bench_decode.yaml")]
    return launching.run(*command, *TINY, *overrides, cwd=cwd)


@pytest.mark.slow
def test_a_tiny_run_times_every_contender_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = (tmp_path / "out/bench_decode.csv").read_text().splitlines()
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    kinds = [(row["contender"], row["context"]) for row in rows if row["precision"] == "float"]
    assert kinds == [("flash", "64"), ("flash_quad", "64"), ("llama", "64"), ("flash", "512"), ("llama", "512")]
    assert any(line.endswith("flash_quad at 512") for line in lines)
    assert len(rows) == 2 * len(kinds)
    for row in rows:
        assert abs(int(row["parameters"]) / int(rows[0]["parameters"]) - 1) < 0.03
        assert float(row["prefill_tokens_per_s_p50"]) > 0 and float(row["decode_tokens_per_s_p50"]) > 0
    assert len({row["cache_mib"] for row in rows if row["contender"] == "flash"}) == 1
    assert len({row["cache_mib"] for row in rows if row["contender"] == "llama"}) == 2
    assert (tmp_path / "out/bench_decode.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_a_precision_that_is_not_there_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "precisions=[int4]")
    assert done.stderr.splitlines()[-1].startswith("ValueError: precisions ('int4') must be among float")
