"""README's figures are those of the committed results, its links lead somewhere, its Python runs."""

import csv
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def layer_results() -> dict[tuple[str, int], dict[str, str]]:
    lines = (ROOT / "recipes/results/cpu/bench_layer.csv").read_text().splitlines()
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    return {(row["contender"], int(row["seq_len"])): row for row in rows}


def test_tables_are_what_make_figures_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    monkeypatch.chdir(ROOT)
    import figures

    results = figures.read(OmegaConf.load("configs/figures.yaml"))
    assert figures.render(README, results) == README
    changed = re.sub(r"\| 2,048 \| \d\.\d\d \|", "| 2,048 | 0.01 |", README)
    assert changed != README
    assert figures.render(changed, results) == README
    with pytest.raises(ValueError, match="layer"):
        figures.render(README.replace("<!-- figures: layer -->", ""), results)


def test_growth_is_the_result_file() -> None:
    results = layer_results()
    short, long = results["flash", 2048], results["flash", 16384]
    time, memory = (float(long[key]) / float(short[key]) for key in ("ms_p50", "peak_mib"))
    share = float(long["peak_mib"]) / float(results["FLASH-pytorch", 16384]["peak_mib"])
    assert (
        f"time grows {time:.1f} times and peak memory {memory:.1f} times, to {share:.2f} of FLASH-pytorch's" in README
    )


def test_relative_links_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_every_config_is_in_the_table() -> None:
    for path in (ROOT / "configs").glob("*.yaml"):
        assert f"| `{path.name}` |" in README


def test_the_python_example_runs() -> None:
    (code,) = re.findall(r"```python\n(import torch\n.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)  # our own README
    assert names["out"].shape == (1, 1000, 256)
