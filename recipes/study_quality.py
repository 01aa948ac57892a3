"""Which choices make a better model: FLASH beside its rivals, and beside itself with one choice changed.

    python recipes/study_quality.py --config configs/study_quality.yaml

Every model is trained from scratch by torchtune's stock recipe on the same tokens, with the learning rate (and, unless
it is FLASH but for one choice, the scale of embeddings) of a small grid that does best for it, and then again with
other seeds of the weights (the recipe orders samples in one way). Held-out bits per byte are measured at the training
length and beyond it. Runs that are in `output_dir` already, with the same config, are not repeated, so that an
interrupted study goes on.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shutil
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measuring import check_equal_sizes, surroundings, write_csv
from omegaconf import DictConfig, OmegaConf
from quality_reports import draw, tables
from studies import beside, bits_per_byte, checkpointer, held_out, load, run
from torchtune import config
from torchtune.utils import get_logger
from tqdm import tqdm
from train_tokenizer import train_tokenizer

RECIPE = "full_finetune_single_device"
NOT_FINITE = "training has diverged"  # what the recipe's log says of a run that diverged

logger = get_logger("INFO")


class Run(NamedTuple):
    """One training run."""

    training: str
    model: str
    lr: float
    embedding_std: float
    seed: int

    @property
    def name(self) -> str:
        """Where its files are."""
        return f"{self.training}/{self.model}/lr_{self.lr:g}_std_{self.embedding_std:g}_seed_{self.seed}"


def is_variant(cfg: DictConfig, model: str) -> bool:
    """Whether a model's node names changes to `flash` alone."""
    return "num_layers" not in cfg.models[model]


def model_node(cfg: DictConfig, training: str, model: str) -> dict[str, Any]:
    """The node of a model, whole."""
    node: Any = OmegaConf.to_container(cfg.models[model])
    if is_variant(cfg, model):
        node = {**OmegaConf.to_container(cfg.models.flash), **node}
    return {**node, "vocab_size": cfg.trainings[training].vocab_size}


def recipe_config(cfg: DictConfig, job: Run, folder: Path) -> dict[str, Any]:
    """What the stock recipe reads."""
    node, training = model_node(cfg, job.training, job.model), cfg.trainings[job.training]
    common = OmegaConf.to_container(OmegaConf.merge(cfg.common, training.get("common", {})))
    tokenizer = OmegaConf.to_container(training.tokenizer, resolve=True)
    assert isinstance(common, dict)
    assert isinstance(tokenizer, dict)
    return {
        **common,
        "tokenizer": {**tokenizer, "max_seq_len": cfg.train_length},
        "model": node,
        "checkpointer": {**checkpointer(node, folder, None, job.seed), "init_embedding_std": job.embedding_std},
        "optimizer": {**common["optimizer"], "lr": job.lr},
        "seed": job.seed,
        "output_dir": str(folder),
    }


def train_and_measure(cfg: DictConfig, job: Run) -> dict[int, float]:
    """Bits per byte at each length; infinite if the run diverged."""
    folder = Path(cfg.output_dir, "runs", job.name)
    wanted, found = recipe_config(cfg, job, folder), beside(folder, "json")
    measured = {"seq_lens": list(cfg.seq_lens), "windows": cfg.windows, "vocabulary": vocabulary(cfg, job.training)}
    if found.exists():
        before = json.loads(found.read_text())
        if before["config"] == wanted and before["measured"] == measured:
            return {int(length): bits for length, bits in before["bits_per_byte"].items()}
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = beside(folder, "log")
    try:
        weights = run(RECIPE, wanted, log=log, num_threads=1)
    except RuntimeError:
        if NOT_FINITE not in log.read_text():
            raise
        logger.info(f"{job.name} diverged")
        bits = dict.fromkeys(cfg.seq_lens, math.inf)
    else:
        tokenizer = config.instantiate(cfg.trainings[job.training].tokenizer)
        model = load(wanted["model"], weights).eval()
        windows = held_out(tokenizer, cfg.common.dataset.source, cfg.seq_lens, cfg.windows)
        bits = {length: bits_per_byte(model, windows, length, tokenizer) for length in cfg.seq_lens}
        logger.info(f"{job.name}: " + ", ".join(f"{value:.4f} at {length}" for length, value in bits.items()))
    aside = beside(folder, "part")
    aside.write_text(json.dumps({"config": wanted, "measured": measured, "bits_per_byte": bits}, indent=1))
    aside.replace(found)
    shutil.rmtree(folder)  # weights; config, log and result stay beside it
    return bits


def vocabulary(cfg: DictConfig, training: str) -> str | None:
    """What tells a trained vocabulary from another one under the same name."""
    if "train_tokenizer" not in cfg.trainings[training]:
        return None
    return hashlib.sha256(Path(cfg.trainings[training].tokenizer.path_or_name).read_bytes()).hexdigest()


def train_tokenizers(cfg: DictConfig) -> None:
    """Train the vocabularies that a study reads and that are not there yet."""
    for name in {group.training for group in cfg.studies.values()}:
        training = cfg.trainings[name]
        if "train_tokenizer" in training and not Path(training.tokenizer.path_or_name).exists():
            documents, path = {"source": cfg.common.dataset.source}, training.tokenizer.path_or_name
            train_tokenizer(documents=documents, output_file=path, **training.train_tokenizer)


def parameters(cfg: DictConfig) -> dict[tuple[str, str], int]:
    """How many each model has, by text and name.

    Raises:
        ValueError: If models that are compared differ by more than 3 %.
    """
    counts: dict[tuple[str, str], int] = {}
    for study, group in cfg.studies.items():
        for name in group.models:
            with torch.device("meta"):
                model = config.instantiate(OmegaConf.create(model_node(cfg, group.training, name)))
            counts[group.training, name] = sum(parameter.numel() for parameter in model.parameters())
        own = {name: counts[group.training, name] for name in group.models}
        check_equal_sizes(f"studies.{study}.models", own)
    return counts


def climb(shape: Sequence[int], start: tuple[int, ...], loss: Callable[[tuple[int, ...]], float]) -> tuple[int, ...]:
    """The point of a grid from which no step along one axis makes `loss` smaller, reached from `start` step by step."""
    best, losses = start, {start: loss(start)}
    moved = True
    while moved:
        moved = False
        for axis, step in itertools.product(range(len(shape)), (1, -1)):
            place = (*best[:axis], best[axis] + step, *best[axis + 1 :])
            if place not in losses and 0 <= place[axis] < shape[axis]:
                losses[place] = loss(place)
                if losses[place] < losses[best]:
                    best, moved = place, True
    return best


class Place(NamedTuple):
    """What is tuned, as indices into the config's lists."""

    lr: int
    embedding_std: int


class Tuned(NamedTuple):
    """What was best for a model with the first seed, and all its runs."""

    best: Place
    runs: dict[Run, dict[int, float]]


def all_runs(cfg: DictConfig, training: str, model: str, best: Place | None = None) -> Tuned:
    """Tune a model unless it is known what is `best` for it, and train it so from all seeds."""
    found: dict[Run, dict[int, float]] = {}

    def measure(place: Place, seed: int) -> dict[int, float]:
        job = Run(training, model, cfg.lrs[place.lr], cfg.embedding_stds[place.embedding_std], seed)
        if job not in found:
            found[job] = train_and_measure(cfg, job)
        return found[job]

    def loss(place: tuple[int, ...]) -> float:
        bits = measure(Place(*place), cfg.seeds[0])[cfg.train_length]
        return math.inf if math.isnan(bits) else bits

    if best is None:
        # The first scale is that of FLASH's builders, and what its variants are compared at.
        shape = (len(cfg.lrs), 1 if is_variant(cfg, model) else len(cfg.embedding_stds))
        best = Place(*climb(shape, ((len(cfg.lrs) - 1) // 2, 0), loss))
    for seed in cfg.seeds:
        measure(best, seed)
    return Tuned(best, found)


def check_tuned(cfg: DictConfig, pairs: Collection[tuple[str, str]]) -> None:
    """Refuse trainings that take what was best in another one where that one does not tune their models.

    Raises:
        ValueError: If it does not.
    """
    for training, model in pairs:
        other = cfg.trainings[training].get("tuned_as")
        if other is not None and ((other, model) not in pairs or "tuned_as" in cfg.trainings[other]):
            raise ValueError(
                f"trainings.{training}.tuned_as ({other!r}) must be a training that tunes {model!r} itself; name the "
                f"model in a study of {other!r}, or remove tuned_as"
            )


def rows_of(cfg: DictConfig, counts: dict[tuple[str, str], int]) -> list[dict[str, Any]]:
    """Train all models, those first from which others take what is best."""
    runs: dict[tuple[str, str], Tuned] = {}

    def work(pair: tuple[str, str]) -> Tuned:
        other = cfg.trainings[pair[0]].get("tuned_as")
        return all_runs(cfg, *pair, None if other is None else runs[other, pair[1]].best)

    with ThreadPoolExecutor(cfg.jobs) as pool, tqdm(total=len(counts), desc="Models") as progress:
        for again in (False, True):
            pairs = [pair for pair in counts if ("tuned_as" in cfg.trainings[pair[0]]) == again]
            for pair, tuned in zip(pairs, pool.map(work, pairs), strict=True):
                runs[pair] = tuned
                progress.update()
    return [
        {
            "training": job.training,
            "model": job.model,
            "parameters": counts[job.training, job.model],
            "lr": job.lr,
            "embedding_std": job.embedding_std,
            "chosen": (job.lr, job.embedding_std) == (cfg.lrs[best.lr], cfg.embedding_stds[best.embedding_std]),
            "seed": job.seed,
            "seq_len": length,
            "bits_per_byte": f"{value:.4f}",
        }
        for pair in counts
        for best, found in [runs[pair]]
        for job, bits in sorted(found.items())
        for length, value in bits.items()
    ]


@config.parse
def main(cfg: DictConfig) -> None:
    """Write `study_quality.csv`, `.md` and `.png`, and print the tables."""
    torch.set_num_threads(1)
    if cfg.train_length not in cfg.seq_lens:
        raise ValueError(
            f"seq_lens ({list(cfg.seq_lens)}) must hold train_length ({cfg.train_length}), at which learning rates are "
            "chosen; add it"
        )
    output_dir = Path(cfg.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    train_tokenizers(cfg)
    counts = parameters(cfg)
    check_tuned(cfg, counts)
    rows = rows_of(cfg, counts)
    header = [f"{name}: {value}" for name, value in surroundings(torch.device(cfg.common.device)).items()]
    write_csv(output_dir / "study_quality.csv", list(rows[0]), header, rows)
    (output_dir / "study_quality.md").write_text(tables(cfg, rows) + "\n")
    draw(cfg, rows, output_dir / "study_quality.png")
    print(tables(cfg, rows))


if __name__ == "__main__":
    main()
