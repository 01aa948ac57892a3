"""README's figures are those of the committed results, its links lead somewhere, its Python runs."""

import csv
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def layer_results() -> dict[tuple[str, int], dict[str, str]]:
    lines = (ROOT / "recipes/results/cpu/bench_layer.csv").read_text().splitlines()
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    return {(row["contender"], int(row["seq_len"])): row for row in rows}


def test_the_table_of_ratios_is_the_result_file() -> None:
    results = layer_results()
    rows = re.findall(r"^\| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \|$", README, re.MULTILINE)
    assert len(rows) == len({seq_len for _, seq_len in results})
    for length, ours, theirs in rows:
        seq_len = int(length.replace(",", ""))
        assert ours == results["flash", seq_len]["ratio_p50"]
        assert theirs == results["FLASH-pytorch", seq_len]["ratio_p50"]


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
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)  # our own README
    assert names["out"].shape == (1, 1000, 256)
