"""The kernel benchmark: one tiny run of the real script, and what its numbers rest on."""

import csv
import importlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import flash_pytorch
import pytest
import torch
from omegaconf import OmegaConf

from flash_plugin.kernels import mixed_chunk_attention, quadratic_attention
from tests.tolerances import assert_close

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs/bench_kernels.yaml"
TINY = {
    **{"num_threads": 1, "tokens": 128, "seq_lens": [64, 128], "embed_dim": 32, "qk_dim": 16, "chunk_size": 32},
    **{"head_dim": 16, "warmup": 0, "turns": 2, "matmul_size": 64, "copy_mib": 1},
}
MODULES = ("bench_kernels", "kernel_providers", "kernel_reports", "kernel_rooflines")


@pytest.fixture(scope="module")
def recipe():
    """The script and its modules, found as ``python recipes/bench_kernels.py`` finds them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "recipes"))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench_kernels")
    overrides = [f"{key}={value}".replace(" ", "") for key, value in TINY.items()]
    command = [sys.executable, str(ROOT / "recipes/bench_kernels.py"), "--config", str(CONFIG), *overrides]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, "output_dir=out"], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = (folder / "out/bench_kernels.csv").read_text().splitlines()
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    header = [line for line in lines if line.startswith("#")]
    return SimpleNamespace(folder=folder / "out", printed=done.stdout, header=header, rows=rows)


def inputs_of(recipe, **changes):
    sizes = dict(tokens=64, seq_len=64, embed_dim=16, expanded_dim=32, qk_dim=16, chunk_size=16, head_dim=16)
    sizes = recipe.kernel_rooflines.Sizes(**(sizes | changes), itemsize=4)
    return recipe.kernel_providers.Inputs(sizes, torch.device("cpu"), torch.float32)


@pytest.mark.slow
def test_every_candidate_has_a_row_for_each_length_and_direction(recipe, run):
    everybody = [(c.op, c.provider) for c in recipe.kernel_providers.candidates(inputs_of(recipe))]
    assert {op for op, _ in everybody} == set(recipe.kernel_providers.OPS)
    wanted = {(*who, way, str(s)) for who in everybody for way in ("forward", "backward", "both") for s in (64, 128)}
    found = [(row["op"], row["provider"], row["direction"], row["seq_len"]) for row in run.rows]
    assert len(found) == len(set(found))
    assert set(found) == wanted


@pytest.mark.slow
def test_whoever_ran_has_numbers_and_whoever_did_not_a_reason(run):
    for row in run.rows:
        numbers = [row[name] for name in ("ms_p20", "ms_p50", "ms_p80", "peak_mib", "floor_ms", "roofline")]
        if row["missing"]:
            assert not any(numbers)
            assert row["missing"] in run.printed
            continue
        low, middle, high, peak, floor, share = map(float, numbers)
        assert 0 < low <= middle <= high
        assert peak > 0
        assert share == pytest.approx(floor / middle, rel=0.01)
        assert int(row["batch_size"]) * int(row["seq_len"]) == TINY["tokens"]


@pytest.mark.slow
def test_this_cpu_runs_whom_it_can(run):
    missing = {(row["op"], row["provider"]): row["missing"] for row in run.rows}
    for op in ("mixed_chunk_attention", "quadratic_attention", "linear_attention", "flash_pair", "flash_quad_pair"):
        assert missing[op, "ours, reference"] == ""
        assert "CPU tensors need Triton's interpreter" in missing[op, "ours, triton"]
    for op in ("softmax_attention", "transformer_layer"):
        assert missing[op, "SDPA, flash"] == missing[op, "SDPA, math"] == ""
        assert "backend" in missing[op, "SDPA, cudnn"]
    assert missing["mixed_chunk_attention", "FLASH-pytorch FLASH"] == ""
    assert missing["quadratic_attention", "FLASH-pytorch GAU"] == ""


@pytest.mark.slow
def test_pairs_are_compared_with_the_fastest_layer_and_cores_with_their_own_rivals(run):
    times = {(r["op"], r["provider"], r["direction"], r["seq_len"]): r for r in run.rows if not r["missing"]}
    for (op, provider, direction, seq_len), row in times.items():
        if op == "flash_pair":
            layers = [times["transformer_layer", f"SDPA, {name}", direction, seq_len] for name in ("flash", "math")]
            assert row["rival"] == min(layers, key=lambda layer: float(layer["ms_p50"]))["provider"]
        if op == "mixed_chunk_attention" and provider.startswith("ours"):
            assert row["rival"] == "FLASH-pytorch FLASH"
        if row["rival"] == provider and op == "transformer_layer":
            assert float(row["speedup_p20"]) == float(row["speedup_p80"]) == 1


@pytest.mark.slow
def test_the_files_say_where_and_how_they_came_about(run):
    header = "\n".join(run.header)
    for part in ("date: ", "device: ", "driver: ", f"torch: {torch.__version__}", "command: python ", "TFLOP/s, copy"):
        assert part in header
    everything = json.loads((run.folder / "bench_kernels.json").read_text())
    assert everything["settings"]["seq_lens"] == TINY["seq_lens"]
    assert [roof["seq_len"] for roof in everything["roofs"]] == TINY["seq_lens"]
    assert len(everything["rows"]) == len(run.rows)
    for direction in ("forward", "backward", "both"):
        assert (run.folder / f"bench_kernels_{direction}.png").read_bytes()[:4] == b"\x89PNG"


def test_the_floors_are_those_that_the_design_states(recipe):
    roofs = recipe.kernel_rooflines
    h200 = roofs.Rates(flops=790e12, bytes=4.3e12)
    common = dict(tokens=65536, embed_dim=2048, expanded_dim=4096, qk_dim=128, chunk_size=256, head_dim=128, itemsize=2)

    def milliseconds(costs):
        return [roofs.floor_seconds(work, h200)[0] * 1e3 for work in costs]

    for seq_len, quadratic_forward in ((2048, 0.74), (8192, 2.9), (32768, 11.6)):
        sizes = roofs.Sizes(seq_len=seq_len, **common)
        assert milliseconds(roofs.mixed_chunk_costs(sizes)) == pytest.approx([0.65, 1.86], rel=0.1)
        assert milliseconds(roofs.quadratic_costs(sizes))[0] == pytest.approx(quadratic_forward, rel=0.1)
        # Two units' projections, of 4.2 and 8.4 ms each.
        core = roofs.Costs(roofs.Work(0, 0), roofs.Work(0, 0))
        assert milliseconds(roofs.gau_pair_costs(sizes, core)) == pytest.approx([8.4, 16.8], rel=0.1)


def test_a_floor_is_the_larger_of_two_times(recipe):
    roofs = recipe.kernel_rooflines
    rates = roofs.Rates(flops=10.0, bytes=100.0)
    assert roofs.floor_seconds(roofs.Work(30, 200), rates) == (3.0, "compute")
    assert roofs.floor_seconds(roofs.Work(10, 200), rates) == (2.0, "memory")


def test_peak_memory_counts_what_is_alive_at_once(recipe):
    x = torch.zeros(2**18, requires_grad=True)  # 1 MiB

    def forward():
        return (x + 1).exp().sin()  # never more than two at once: exp keeps its result, the sum is gone by then

    peaks = recipe.bench_kernels.peaks(
        forward, lambda out: torch.autograd.grad(out, x, torch.ones_like(out)), torch.device("cpu")
    )
    assert peaks["forward"] == pytest.approx(2, abs=0.01)
    assert peaks["both"] == max(peaks["forward"], peaks["backward"])
    assert peaks["backward"] > peaks["forward"]


@pytest.mark.parametrize("op", ["mixed_chunk_attention", "quadratic_attention"])
def test_the_cores_of_flash_pytorch_are_its_attention(recipe, monkeypatch, op):
    monkeypatch.setattr(flash_pytorch.flash_pytorch.T5RelativePositionBias, "forward", lambda self, x: 0.0)
    torch.manual_seed(0)
    inputs = inputs_of(recipe)
    (theirs,) = [
        candidate
        for candidate in recipe.kernel_providers.candidates(inputs)
        if candidate.op == op and candidate.provider.startswith("FLASH-pytorch")
    ]
    forward, wanted = theirs.build()
    local, linear, v, gate = inputs.qk[:2], inputs.qk[2:], inputs.v, inputs.gate
    if op == "mixed_chunk_attention":
        ours = mixed_chunk_attention(*local, *linear, v, gate=gate, chunk_size=16, normalizer="chunk")
        qk = [*local, *linear]
    else:
        ours = quadratic_attention(*local, v, gate=gate, normalizer="paper")
        qk = local
    out = forward()
    assert_close(out, ours, "pair_fp32")
    gradient = torch.randn_like(ours)
    found = dict(zip(map(id, wanted), torch.autograd.grad(out, wanted, gradient), strict=True))
    *expected_qk, expected_v, expected_gate = torch.autograd.grad(ours, [*qk, v, gate], gradient)
    assert_close(found.pop(id(inputs.values_and_gate)), torch.cat([expected_v, expected_gate], dim=-1), "pair_fp32")
    for leaf, expected in zip(qk, expected_qk, strict=True):
        assert_close(found.pop(id(leaf)), expected, "pair_fp32")
    assert not found


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seq_lens": [64, 100]}, ["seq_lens (100)", "chunk_size (32)"]),
        ({"seq_lens": [32]}, ["seq_lens (32)", "seq_lens=[64]"]),
        ({"tokens": 100}, ["tokens (100)", "tokens=64"]),
        ({"head_dim": 24}, ["head_dim (24)", "embed_dim (32)"]),
        ({"ops": ["softmax"]}, ["ops (softmax)", "linear_attention"]),
        ({"ops": []}, ["ops (none)"]),
        ({"turns": 0}, ["turns (0)"]),
    ],
)
def test_sizes_that_do_not_fit_are_refused(recipe, changes, words):
    cfg = OmegaConf.merge(OmegaConf.load(CONFIG), TINY, changes)
    with pytest.raises(ValueError) as refusal:
        recipe.bench_kernels.check(cfg)
    for word in words:
        assert word in str(refusal.value)


def test_the_sizes_of_both_configs_fit(recipe):
    for name in ("bench_kernels", "bench_kernels_gpu"):
        recipe.bench_kernels.check(OmegaConf.load(ROOT / f"configs/{name}.yaml"))


def test_whoever_fails_is_reported_in_one_line(recipe):
    def fail():
        warnings.warn("what it said before", stacklevel=1)
        raise AssertionError("two\n  lines")

    candidate = recipe.kernel_providers.candidates(inputs_of(recipe))[0]
    missing = recipe.bench_kernels.attempt(candidate, fail)
    assert missing == (candidate, "AssertionError: two lines; what it said before")
