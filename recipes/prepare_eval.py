"""Write the data of the tasks in `configs/eval_tasks`, and the `gpt2` folder that torchtune's eval recipe asks for.

Run: python recipes/prepare_eval.py --config configs/prepare_eval.yaml

torchtune's wrapper constructs the harness's `HFLM(pretrained="gpt2")` before it puts a torchtune model in its place. A
folder of that name in the working directory satisfies it without a network; all that evaluation then takes from it
is the id that stands in front of a text that has no context.
"""

from __future__ import annotations

import functools
import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torchtune import config
from torchtune.modules.transforms.tokenizers import ModelTokenizer
from torchtune.utils import get_logger
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from flash_plugin.components.arguments import config_component
from flash_plugin.components.sources import in_split, read_documents

PROBE_KEY = "flash_plugin_probe"
CONTEXT_CHARACTERS = 300
CHOICES = 4
#: A line of fewer characters is not asked about.
SHORTEST_LINE = 16


@config_component
def prepare_eval(
    tokenizer: ModelTokenizer,
    *,
    documents: Mapping[str, Any],
    output_dir: str,
    probe_dir: str | None = "gpt2",
    validation_fraction: float = 0.02,
    num_documents: int = 32,
    document_characters: int = 8000,
    num_questions: int = 64,
    completed_characters: int = 2,
    seed: int = 0,
) -> dict[str, int]:
    """Write one .jsonl file for each task, and the probe.

    Args:
        tokenizer (ModelTokenizer): The tokenizer of the models to evaluate.
        documents (Mapping[str, Any]): The source: arguments of `flash_plugin.components.sources.read_documents`.
        output_dir (str): The folder for the data; the tasks look in outputs/eval.
        probe_dir (str | None): The folder to write the probe to, or null for none. Default is "gpt2".
        validation_fraction (float): The share of documents that training holds out. Default is 0.02.
        num_documents (int): At most so many documents, drawn at random. Default is 32.
        document_characters (int): At most so many characters of each. Default is 8,000.
        num_questions (int): Questions in each of the other two tasks. Default is 64.
        completed_characters (int): How many characters of a line are to be completed, from 1 to 15. Default is 2.
        seed (int): Decides which documents and lines are drawn. Default is 0.

    Returns:
        dict[str, int]: Rows of each file.

    Raises:
        ValueError: If an argument is out of range, no text is held out or too little of it for the questions, or
            `probe_dir` holds a model that this recipe did not write.
    """
    sizes = {"num_documents": num_documents, "document_characters": document_characters, "num_questions": num_questions}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} ({value}) must be at least 1; set {name}=1 or more")
    if not 1 <= completed_characters < SHORTEST_LINE:
        raise ValueError(
            f"completed_characters ({completed_characters}) must be at least 1 and less than {SHORTEST_LINE}, the "
            "shortest line asked about; set completed_characters=2"
        )
    if probe_dir is not None:
        write_probe(Path(probe_dir), tokenizer.bos_id)
    draw = random.Random(seed)
    held_out = [
        document.text[:document_characters]
        for document in read_documents(**documents)
        if in_split(document.name, "validation", validation_fraction)
    ]
    if not held_out:
        raise ValueError(
            f"validation_fraction ({validation_fraction}) must hold out at least one document of {dict(documents)}, "
            "and holds out none; give the fraction that training was given, or more text"
        )
    texts = draw.sample(held_out, min(num_documents, len(held_out)))
    tasks: dict[str, list[dict[str, Any]]] = {
        "heldout_text": [{"text": text} for text in texts],
        "heldout_next_line": _questions(next_line, texts, num_questions, draw),
        "heldout_complete_line": _questions(
            functools.partial(complete_line, characters=completed_characters), texts, num_questions, draw
        ),
    }
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in tasks.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    counts = {name: len(rows) for name, rows in tasks.items()}
    get_logger().info(f"{folder} holds {counts}")
    return counts


def next_line(text: str, draw: random.Random) -> dict[str, Any] | None:
    """Ask which of four lines comes next; None if the text has too few lines."""
    found = _line(text, draw)
    if found is None:
        return None
    before, line = found
    others = sorted({other for other in text.splitlines() if len(other) >= SHORTEST_LINE} - {line})
    if len(others) < CHOICES - 1:
        return None
    choices = [line, *draw.sample(others, CHOICES - 1)]
    draw.shuffle(choices)
    return {"context": before, "choices": choices, "answer": choices.index(line)}


def complete_line(text: str, draw: random.Random, *, characters: int) -> dict[str, Any] | None:
    """Ask for the last characters of a line; None if the text has no line that is long enough."""
    found = _line(text, draw)
    if found is None:
        return None
    before, line = found
    # Space at the cut belongs to the answer, as in the harness's other tasks.
    cut = len(line[:-characters].rstrip())
    return {"context": before + line[:cut], "target": line[cut:]}


def write_probe(folder: Path, bos_id: int) -> None:
    """Write a model of a few numbers, and a tokenizer whose one token is the one that starts a document.

    Raises:
        ValueError: If the folder holds another model.
    """
    configuration = folder / "config.json"
    if configuration.is_file() and PROBE_KEY not in json.loads(configuration.read_text()):
        raise ValueError(
            f"probe_dir ({folder}) must be a folder that this recipe may write, and it holds a model of another make; "
            "launch from another folder, or set probe_dir=null to keep it"
        )
    token = "<|begin_of_text|>"
    # Without words for the ids below, the tokenizer warns that they are missing.
    words = {str(number): number for number in range(bos_id)} | {token: bos_id}
    vocabulary = Tokenizer(WordLevel(words, unk_token=token))
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), token)
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, **special).save_pretrained(folder)
    sizes = {"vocab_size": 1, "n_positions": 1, "n_embd": 1, "n_layer": 1, "n_head": 1}
    GPT2LMHeadModel(GPT2Config(**sizes, **{PROBE_KEY: True})).save_pretrained(folder)
    get_logger().info(f"{folder} holds the probe; texts will start with token {bos_id}")


def _questions(
    ask: Callable[[str, random.Random], dict[str, Any] | None], texts: list[str], number: int, draw: random.Random
) -> list[dict[str, Any]]:
    """So many questions about texts in turn."""
    askable = [text for text in texts if ask(text, random.Random(0)) is not None]
    if not askable:
        raise ValueError(
            f"document_characters and num_documents must leave text with a few lines of {SHORTEST_LINE} characters to "
            "ask about, and leave none; set them higher"
        )
    answers: Iterator[dict[str, Any] | None] = (ask(text, draw) for text in itertools.cycle(askable))
    return list(itertools.islice((question for question in answers if question is not None), number))


def _line(text: str, draw: random.Random) -> tuple[str, str] | None:
    """A line drawn from behind the first, without its end, and whole lines that stand before it."""
    # Not splitlines: what stands before a line shall be what the file holds.
    lines = text.split("\n")
    candidates = [number for number, line in enumerate(lines) if number and len(line.rstrip()) >= SHORTEST_LINE]
    if not candidates:
        return None
    number = draw.choice(candidates)
    before = "\n".join(lines[:number]) + "\n"
    if len(before) > CONTEXT_CHARACTERS:
        before = before[-CONTEXT_CHARACTERS:].partition("\n")[2] or before[-CONTEXT_CHARACTERS:]
    return before, lines[number]


@config.parse
def main(cfg: DictConfig) -> None:
    """Prepare the evaluation that the configuration names."""
    get_logger("INFO")
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    if "tokenizer" in settings:
        settings["tokenizer"] = config.instantiate(cfg.tokenizer)
    prepare_eval(**settings)


if __name__ == "__main__":
    main()
