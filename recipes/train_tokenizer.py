"""Train a byte-level BPE vocabulary on your text, and write it as a file that `flash_plugin.tiktoken_tokenizer` reads.

Run: python recipes/train_tokenizer.py --config configs/train_tokenizer.yaml
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from tiktoken.load import dump_tiktoken_bpe
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer
from torchtune import config
from torchtune.models.llama3._tokenizer import CL100K_PATTERN
from torchtune.utils import get_logger

from flash_plugin.components.arguments import config_component
from flash_plugin.components.sources import in_split, read_documents
from flash_plugin.components.tokenizers import TiktokenTokenizer, tiktoken_tokenizer

_CHECKED_CHARACTERS = 1_000_000


@config_component
def train_tokenizer(
    *,
    documents: Mapping[str, Any],
    output_file: str,
    vocab_size: int = 4096,
    min_frequency: int = 2,
    pattern: str | None = None,
    validation_fraction: float = 0.02,
) -> TiktokenTokenizer:
    """Train a byte-level BPE vocabulary and write it as a .tiktoken file.

    Args:
        documents (Mapping[str, Any]): The source: arguments of `flash_plugin.components.sources.read_documents`.
        output_file (str): The .tiktoken file to write; must not exist.
        vocab_size (int): Tokens in the file; the tokenizer adds its special ones. Default is 4096.
        min_frequency (int): How often a pair must occur to be merged. Default is 2.
        pattern (str | None): Regular expression that splits text before merging; where you set one, give it to
            `tiktoken_tokenizer` too. Default is None: that of cl100k_base and Llama 3.
        validation_fraction (float): The share of documents held out, as `text_dataset` does it, so that the vocabulary
            has not seen the validation text. Default is 0.02.

    Returns:
        TiktokenTokenizer: The tokenizer that the file holds.

    Raises:
        ValueError: If an argument is out of range, the file exists, or the text yields fewer than `vocab_size` tokens.
        RuntimeError: If tiktoken would tokenise the text otherwise than the vocabulary was trained.
    """
    if vocab_size < 256:
        raise ValueError(f"vocab_size ({vocab_size}) must be at least 256, the number of bytes; set vocab_size=4096")
    path = Path(output_file).expanduser()
    if path.exists():
        raise ValueError(
            f"output_file ({output_file!r}) must not exist, for models may depend on it; set another, or delete it"
        )
    in_split("", "train", validation_fraction)  # refuse a bad fraction before anything is read

    def texts() -> Iterator[str]:
        for document in read_documents(**documents):
            if in_split(document.name, "train", validation_fraction):
                yield document.text

    trained = Tokenizer(BPE())
    split = Split(Regex(pattern or CL100K_PATTERN), "isolated")
    trained.pre_tokenizer = Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = BpeTrainer(
        vocab_size=vocab_size, min_frequency=min_frequency, initial_alphabet=ByteLevel.alphabet(), show_progress=True
    )
    trained.train_from_iterator(texts(), trainer)
    if trained.get_vocab_size() < vocab_size:
        raise ValueError(
            f"vocab_size ({vocab_size}) must not exceed the {trained.get_vocab_size()} tokens that this text yields "
            f"with min_frequency {min_frequency}; give more text, or lower vocab_size or min_frequency"
        )

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    dump_tiktoken_bpe(_byte_ranks(trained), str(temporary))
    tokenizer = tiktoken_tokenizer(str(temporary), pattern=pattern)
    characters = _check_equal(tokenizer, trained, texts())
    os.replace(temporary, path)
    get_logger().info(
        f"Wrote {path}: {vocab_size} tokens; with its special tokens a model needs vocab_size={tokenizer.vocab_size}. "
        f"tiktoken and the trained vocabulary agree on the first {characters} characters"
    )
    return tokenizer


def _byte_ranks(trained: Tokenizer) -> dict[bytes, int]:
    """Ranks by token, as bytes: a byte-level vocabulary writes bytes that are no visible character as other ones."""
    visible = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    hidden = [byte for byte in range(256) if byte not in visible]
    byte_of = {chr(byte): byte for byte in visible} | {chr(256 + index): byte for index, byte in enumerate(hidden)}
    return {bytes(byte_of[character] for character in token): rank for token, rank in trained.get_vocab().items()}


def _check_equal(tokenizer: TiktokenTokenizer, trained: Tokenizer, texts: Iterable[str]) -> int:
    """Make sure that merging by rank (tiktoken) gives what merging by the trained rules does; count what was compared.

    The two are the same but for contrived rules and for characters that only one of the two regular expression engines
    knows, so it is checked rather than assumed.
    """
    characters = 0
    for text in texts:
        text = text[: _CHECKED_CHARACTERS - characters]
        if tokenizer.encode(text, add_bos=False, add_eos=False) != trained.encode(text).ids:
            raise RuntimeError(
                "tiktoken must tokenise the training text as its vocabulary was trained, and does not from "
                f"{text[:60]!r} on; set another vocab_size or pattern"
            )
        characters += len(text)
        if characters >= _CHECKED_CHARACTERS:
            break
    return characters


@config.parse
def main(cfg: DictConfig) -> None:
    """Train on the text that the configuration names."""
    get_logger("INFO")
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    train_tokenizer(**settings)


if __name__ == "__main__":
    main()
