"""Write the tables and the front figure of the README anew from the committed results (``make figures``).

    python recipes/figures.py --config configs/figures.yaml

In the README each table stands between two comments, `<!-- figures: NAME -->` and `<!-- end -->`, with nothing of it
typed by hand; a test holds the README to what this script makes of the result files.
"""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib
from omegaconf import DictConfig
from quality_reports import bits, panel, spread
from torchtune import config

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullLocator

BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
NOT_RUN = "not run"
Rows = list[dict[str, str]]


class Results(NamedTuple):
    """The rows of each result file."""

    layer: Rows
    training: Rows
    kept: Rows
    quality: Rows
    swap: Rows


def read(cfg: DictConfig) -> Results:
    """Read the files that the config names."""

    def rows(path: str) -> Rows:
        with Path(path).open(newline="") as file:
            return list(csv.DictReader(line for line in file if not line.startswith("#")))

    return Results(*(rows(cfg.results[name]) for name in Results._fields))


def lengths(rows: Rows) -> list[int]:
    """All sequence lengths, the shortest first."""
    return sorted({int(row["seq_len"]) for row in rows})


def table(head: list[str], body: list[list[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" if line[0] != "---" else "|---" * len(line) + "|\n" for line in lines)


def layer(results: Results) -> str:
    """A layer against its own projections, ours and FLASH-pytorch's."""
    found = {(row["contender"], int(row["seq_len"])): row for row in results.layer}
    head = ["s", "FLASH layer / its projections", "FLASH-pytorch's layer / the same projections"]
    names = ("flash", "FLASH-pytorch")
    return table(head, [[f"{n:,}", *(found[name, n]["ratio_p50"] for name in names)] for n in lengths(results.layer)])


def training_row(rows: Rows, name: str, seq_len: int) -> dict[str, str]:
    """What was measured of a contender at a length."""
    return next(row for row in rows if (row["contender"], int(row["seq_len"])) == (name, seq_len))


def times(rows: Rows, name: str, seq_len: int) -> str:
    """How many times as fast FLASH is, or that the contender could not run."""
    ratio = training_row(rows, name, seq_len)["ratio_p50"]
    return f"{float(ratio):.2f}" if ratio else "did not run"


TRAINED = {"llama": "Llama", "FLASH-pytorch": "FLASH-pytorch", "flash_quad": "FLASH-Quad"}


def training(results: Results) -> str:
    """Training speed: FLASH's tokens a second, how many times as fast it is as each rival, and its share of memory."""
    rows = results.training
    head = ["s", "FLASH, tokens/s", *(f"times {name}" for name in TRAINED.values()), "memory, of Llama's"]
    body = []
    for n in lengths(rows):
        ours = training_row(rows, "flash", n)
        share = float(ours["peak_mib"]) / float(training_row(rows, "llama", n)["peak_mib"])
        ratios = [times(rows, name, n) for name in TRAINED]
        body.append([f"{n:,}", f"{float(ours['tokens_per_s_p50']):,.0f}", *ratios, f"{share:.2f}"])
    return table(head, body)


def kept(results: Results) -> str:
    """The same ratios where glibc is told to keep freed memory, which serves FLASH-pytorch best."""
    names = ("llama", "FLASH-pytorch")
    body = [[f"{n:,}", *(times(results.kept, name, n) for name in names)] for n in lengths(results.kept)]
    return table(["s", *(f"times {TRAINED[name]}" for name in names)], body)


def mean(results: Results, training: str, model: str, seq_len: int) -> str:
    """Mean and range over seeds of a model's held-out bits per byte."""
    values = bits(results.quality, training, model, seq_len)
    return spread(values) if values else NOT_RUN


FAMILIES = {
    "flash": "FLASH",
    "no_shift": "FLASH, `token_shift=False`",
    "no_shift_no_bias": "FLASH, `token_shift=False position_bias=none`",
    "flash_quad": "FLASH-Quad",
    "llama": "Llama",
    "mc_transformer": "Llama with mixed chunk attention (MC-TFM)",
}
VARIANTS = {
    "flash": "FLASH",
    "no_shift": "`token_shift=False`",
    "bias_none": "`position_bias=none`",
    "no_shift_no_bias": "`token_shift=False position_bias=none`",
    "bias_rope": "`position_bias=rope`",
    "bias_toeplitz": "`position_bias=toeplitz`",
    "normalizer_paper": "`normalizer=paper`",
    "normalizer_chunk": "`normalizer=chunk`",
    "local_only": "local part alone",
    "global_only": "global part alone, `position_bias=none`",
    "activation_laplace": "`activation=laplace`",
    "activation_softplus2": "`activation=softplus2`",
    "activation_softmax": "`activation=softmax`",
    "chunk_64": "`chunk_size=64`",
    "chunk_256": "`chunk_size=256`",
    "chunk_512": "`chunk_size=512`",
    "norm_layernorm": "`norm=layernorm`",
    "norm_scalenorm": "`norm=scalenorm`",
}
CHUNKS = {64: "chunk_64", 128: "flash", 256: "chunk_256", 512: "chunk_512"}


LONGER = "bytes_3000_steps"
#: Which columns stand on the front page: a training, the length measured at (its own one, or the longest), and a title.
COLUMNS = (
    ("bytes", 0, "500 steps"),
    (LONGER, 0, "3,000 steps"),
    (LONGER, -1, "3,000 steps, measured at {n:,}"),
    ("bpe", 0, "500 steps of BPE tokens"),
)


def quality(results: Results) -> str:
    """Held-out bits per byte of the families: after a short and a longer training, beyond its length, in BPE tokens."""
    seq_lens = lengths(results.quality)
    head = ["model", *(title.format(n=seq_lens[place]) for _, place, title in COLUMNS)]
    body = [
        [label, *(mean(results, training, model, seq_lens[place]) for training, place, _ in COLUMNS)]
        for model, label in FAMILIES.items()
    ]
    return table(head, body)


def choices(results: Results) -> str:
    """Held-out bits per byte of FLASH with one choice changed."""
    seq_lens = lengths(results.quality)
    head = ["model", *(f"{n:,} bytes" for n in seq_lens)]
    return table(head, [[label, *(mean(results, "bytes", m, n) for n in seq_lens)] for m, label in VARIANTS.items()])


def swap(results: Results) -> str:
    """What swapped attention costs, and what recovers it."""
    seq_lens = lengths(results.swap)
    body = []
    for stage, swapped in dict.fromkeys((row["stage"], row["swap"]) for row in results.swap):
        own = [row for row in results.swap if (row["stage"], row["swap"]) == (stage, swapped)]
        cells = [f"{float(r['bits_per_byte']):.3f} ({float(r['tokens_per_s_p50']) / 1000:.1f} k/s)" for r in own]
        body.append([" ".join(filter(None, (swapped, stage))), *cells])
    return table(["model", *(f"{n:,} bytes" for n in seq_lens)], body)


def claims(results: Results) -> str:
    """What the paper says, in words, beside what was measured here."""
    trained, measured = lengths(results.quality)[0], lengths(results.training)

    def loss(model: str, training: str = "bytes") -> str:
        values = bits(results.quality, training, model, trained)
        return f"{statistics.mean(values):.3f}" if values else NOT_RUN

    def later(models: dict[str, str]) -> str:
        """What the longer training says of models, by label."""
        return "; 3,000 steps: " + ", ".join(f"{label} {loss(model, LONGER)}" for label, model in models.items())

    rows = results.training
    speed = [float(training_row(rows, "flash", n)["tokens_per_s_p50"]) for n in (measured[0], measured[-1])]
    memory = [float(training_row(rows, "flash", n)["peak_mib"]) for n in (measured[0], measured[-1])]
    study, bench = ("`python recipes/study_quality.py --config configs/study_quality.yaml`",
                    "`python recipes/bench_training.py --config configs/bench_training.yaml`")  # fmt: skip
    body = [
        ["Gated attention units with quadratic attention (FLASH-Quad) are as good as Transformers of their size",
         f"FLASH-Quad {loss('flash_quad')}, without its T5 bias {loss('flash_quad_bias_none')}, "
         f"Llama {loss('llama')}" + later({"FLASH-Quad": "flash_quad", "Llama": "llama"}), study],
        ["Mixed chunk attention loses little to quadratic attention",
         f"FLASH {loss('flash')}, FLASH-Quad {loss('flash_quad')}"
         + later({"FLASH": "flash", "FLASH-Quad": "flash_quad"}), study],
        ["Local and global parts are both needed",
         f"both {loss('flash')}, local alone {loss('local_only')}; without a position bias, which is the local part's: "
         f"both {loss('bias_none')}, global alone {loss('global_only')}", study],
        ["relu² does as well as softmax in a gated attention unit",
         f"relu² {loss('flash')}, softmax {loss('activation_softmax')} (inside chunks)", study],
        ["Larger chunks are better (and slower)",
         ", ".join(f"c = {c}: {loss(model)}" for c, model in CHUNKS.items()), study],
        ["Gated attention units suit mixed chunk attention better than multi-head attention and MLP do (MC-TFM)",
         f"FLASH {loss('flash')}, without token shift and T5 bias {loss('no_shift_no_bias')}, "
         f"MC-TFM, which has neither, {loss('mc_transformer')}"
         + later({"FLASH": "flash", "without both": "no_shift_no_bias", "MC-TFM": "mc_transformer"}), study],
        ["Training time is linear in the sequence",
         f"tokens/s, as many a step: {speed[0]:,.0f} at {measured[0]:,}, {speed[1]:,.0f} at {measured[-1]:,}", bench],
        ["The longer the sequence, the faster beside a Transformer",
         ", ".join(f"{times(rows, 'llama', n)} times at {n:,}" for n in measured), bench],
        ["Memory is linear in the sequence",
         f"peak, as many a step: {memory[0]:,.0f} MiB at {measured[0]:,}, {memory[1]:,.0f} at {measured[-1]:,}", bench],
    ]  # fmt: skip
    return table(["the paper says", "measured here, on a CPU", "again"], body)


BLOCKS: dict[str, Callable[[Results], str]] = {
    function.__name__: function for function in (layer, training, kept, quality, choices, swap, claims)
}


def render(readme: str, results: Results) -> str:
    """The README with each table written anew.

    Raises:
        ValueError: If it names a table that there is not, or lacks one.
    """
    named = [name for _, name, _ in BLOCK.findall(readme)]
    if sorted(named) != sorted(BLOCKS):
        raise ValueError(
            f"readme (its tables: {sorted(named)}) must hold each of {sorted(BLOCKS)} once; put "
            "<!-- figures: NAME --> and <!-- end --> where a table belongs"
        )
    return BLOCK.sub(lambda found: found[1] + "\n" + BLOCKS[found[2]](results) + "\n" + found[3], readme)


def draw(results: Results, path: Path) -> None:
    """How fast FLASH and its rivals train, and how well they do after a short and a longer training."""
    figure, (speed, *losses) = plt.subplots(1, 3, figsize=(13, 3.6), width_ratios=[1.3, 1, 1], layout="constrained")
    seq_lens = lengths(results.training)
    for name, label in {"flash": "FLASH", **TRAINED}.items():
        rates = [training_row(results.training, name, n)["tokens_per_s_p50"] for n in seq_lens]
        speed.plot(seq_lens, [float(r or "nan") for r in rates], marker="o", markersize=4, label=label)
    speed.set(title="training, tokens/s (up is faster)", xscale="log", yscale="log", xlabel="sequence, tokens")
    speed.set_xticks(seq_lens, [f"{n:,}" for n in seq_lens])
    speed.yaxis.set_minor_formatter("{x:,.0f}")
    speed.yaxis.set_major_formatter("{x:,.0f}")
    speed.tick_params(which="both", labelsize="small")
    speed.xaxis.set_minor_locator(NullLocator())
    speed.legend(fontsize="small")
    speed.grid(alpha=0.3)
    trained = lengths(results.quality)[0]
    for axes, (training, label) in zip(losses, (("bytes", "500 steps"), (LONGER, "3,000 steps")), strict=True):
        shown = {model: name for model, name in FAMILIES.items() if bits(results.quality, training, model, trained)}
        names = [re.sub(" (position|with)", r"\n\1", name.replace("`", "")) for name in shown.values()]
        values = [bits(results.quality, training, model, trained) for model in shown]
        panel(axes, values, names if axes is losses[0] else [""] * len(names))
        axes.set_title(f"held-out bits per byte, {label}\n(left is better)", fontsize="medium")
    figure.savefig(path, dpi=120)
    plt.close(figure)


@config.parse
def main(cfg: DictConfig) -> None:
    """Entry point."""
    results, readme = read(cfg), Path(cfg.readme)
    readme.write_text(render(readme.read_text(), results))
    draw(results, Path(cfg.figure))
    print(f"Wrote the tables of {readme} and {cfg.figure}")


if __name__ == "__main__":
    main()
