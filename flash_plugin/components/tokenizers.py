"""Tokenizers: plain bytes, or any tiktoken vocabulary, as torchtune's recipes and datasets expect them.

Both builders return one class. Text is always encoded as text: a document that spells out ``<|end_of_text|>``
gets the ids of those characters, never the special id, so no data can end a document or forge a prompt.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tiktoken
from torchtune.data import Message
from torchtune.data._prompt_templates import _get_prompt_template
from torchtune.models.llama3._tokenizer import CL100K_PATTERN
from torchtune.modules.transforms import Transform
from torchtune.modules.transforms.tokenizers import ModelTokenizer

from flash_plugin.components.arguments import config_component

BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"

# tiktoken panics (the stack of its regular expressions overflows) on some 100,000 characters of whitespace, and up to
# 0.12 its merging is quadratic in the length of a word. torchtune cuts runs of either kind at 25,000 characters, in a
# Python loop over the characters; this one is over runs, with the same cuts.
_LONGEST_RUN = 25_000
_RUN = re.compile(r"\s+|\S+")

_BYTE_RANKS = {bytes([byte]): byte for byte in range(256)}


class TiktokenTokenizer(ModelTokenizer, Transform):
    """A tiktoken ``Encoding`` with the methods and attributes of a torchtune model tokenizer.

    Args:
        encoding (tiktoken.Encoding): The vocabulary; must hold ``<|begin_of_text|>``, ``<|end_of_text|>``, ``<|pad|>``.
        max_seq_len (int | None): Longest training sample of ``tokenize_messages``, and the window length of our
            datasets. None for no limit.
        prompt_template (str | dict | None): torchtune prompt template: a dotpath, or ``{role: [before, after]}``.

    Attributes:
        bos_id, eos_id, pad_id (int): Ids of the three special tokens every vocabulary here has.
        stop_tokens (list[int]): What ends generation: ``[eos_id]``.
        special_tokens (dict[str, int]): Every special token and its id.
        base_vocab_size (int): Number of ordinary tokens.
        vocab_size (int): Largest id plus one, special tokens included: what a model's ``vocab_size`` must reach.

    Raises:
        ValueError: If ``max_seq_len`` is not a positive integer, or the prompt template is unknown.
    """

    def __init__(
        self,
        encoding: tiktoken.Encoding,
        max_seq_len: int | None = None,
        prompt_template: str | dict[str, Sequence[str]] | None = None,
    ) -> None:
        if max_seq_len is not None and (not isinstance(max_seq_len, int) or max_seq_len < 1):
            raise ValueError(f"max_seq_len ({max_seq_len!r}) must be a positive integer or null; set max_seq_len=2048")
        self.encoding = encoding
        self.max_seq_len = max_seq_len
        self.prompt_template = None if prompt_template is None else _get_prompt_template(prompt_template)
        self.special_tokens: dict[str, int] = dict(encoding._special_tokens)
        self.bos_id, self.eos_id, self.pad_id = (self.special_tokens[name] for name in (BOS, EOS, PAD))
        self.stop_tokens = [self.eos_id]
        self.base_vocab_size = len(encoding._mergeable_ranks)
        self.vocab_size = encoding.n_vocab
        self._special_ids = frozenset(self.special_tokens.values())
        self._ids_are_bytes = encoding._mergeable_ranks == _BYTE_RANKS

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides which ids a text gets."""
        ranks, specials = self.encoding._mergeable_ranks.items(), self.special_tokens.items()
        content = (self.encoding._pat_str, sorted(ranks), sorted(specials))
        return hashlib.sha256(repr(content).encode()).hexdigest()

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        """Turn text into token ids; lone surrogates, which no UTF-8 text contains, become replacement characters.

        Args:
            text (str): Any text; the names of special tokens in it are ordinary text.
            add_bos (bool): Whether to put ``bos_id`` in front. Default is True.
            add_eos (bool): Whether to put ``eos_id`` behind. Default is True.

        Returns:
            list[int]: The token ids.
        """
        if self._ids_are_bytes:  # an order of magnitude faster than a regular expression and a merge per byte
            tokens = list(text.encode("utf-8", errors="replace"))
        else:
            tokens = [token for part in _cut_long_runs(text) for token in self.encoding.encode_ordinary(part)]
        if add_bos:
            tokens.insert(0, self.bos_id)
        if add_eos:
            tokens.append(self.eos_id)
        return tokens

    def decode(self, token_ids: Sequence[int], truncate_at_eos: bool = True, skip_special_tokens: bool = True) -> str:
        """Turn token ids into text; byte sequences that are not UTF-8 become replacement characters.

        Args:
            token_ids (Sequence[int]): Ids of this vocabulary.
            truncate_at_eos (bool): Whether to stop at the first ``eos_id``. Default is True.
            skip_special_tokens (bool): Whether to leave special tokens out. Default is True.

        Returns:
            str: The text.

        Raises:
            ValueError: If an id is not in the vocabulary.
        """
        tokens = list(token_ids)
        if truncate_at_eos and self.eos_id in tokens:
            tokens = tokens[: tokens.index(self.eos_id)]
        if skip_special_tokens:
            tokens = [token for token in tokens if token not in self._special_ids]
        try:
            return self.encoding.decode(tokens)
        except (KeyError, OverflowError):
            raise ValueError(
                f"token_ids (largest {max(tokens)}, smallest {min(tokens)}) must all be tokens of this vocabulary of "
                f"{self.vocab_size}; decode with the tokenizer that the model was trained with"
            ) from None

    def tokenize_messages(self, messages: list[Message], *, add_eos: bool = True) -> tuple[list[int], list[bool]]:
        """Concatenate messages: BOS once, each message's text as it stands, EOS behind every assistant message.

        Args:
            messages (list[Message]): The dialogue; the prompt template, if there is one, is applied first.
            add_eos (bool): Whether a last message by the assistant is complete and gets its EOS. False lets the model
                continue it; then nothing is cut to ``max_seq_len`` either. Default is True.

        Returns:
            tuple[list[int], list[bool]]: The token ids, at most ``max_seq_len``, and which of them the loss ignores.

        Raises:
            ValueError: If a message holds anything but text, or an unfinished prompt exceeds ``max_seq_len``.
        """
        if self.prompt_template is not None:
            messages = self.prompt_template(messages, inference=not add_eos)
        tokens, mask = [self.bos_id], [True]
        for index, message in enumerate(messages):
            if message.contains_media:
                raise ValueError(f"messages[{index}] ({message.role}) must be text only; remove its images")
            finished = add_eos or index + 1 < len(messages)
            ids = self.encode(message.text_content, add_bos=False, add_eos=finished and message.role == "assistant")
            tokens += ids
            mask += [message.masked] * len(ids)
        if self.max_seq_len is not None and len(tokens) > self.max_seq_len and not add_eos:
            # A cut prompt would lose its end, the very text to continue.
            raise ValueError(
                f"messages ({len(tokens)} tokens) must fit max_seq_len ({self.max_seq_len}) to be continued; "
                "shorten the prompt or raise tokenizer.max_seq_len"
            )
        return tokens[: self.max_seq_len], mask[: self.max_seq_len]

    def __call__(self, sample: Mapping[str, Any], inference: bool = False) -> dict[str, Any]:
        """Replace a sample's "messages" by "tokens" and "mask".

        Args:
            sample (Mapping[str, Any]): Anything with a "messages" field; left as it is.
            inference (bool): Whether the model shall continue the messages, so that no EOS ends them.

        Returns:
            dict[str, Any]: The sample's other fields, with "tokens" and "mask".
        """
        tokens, mask = self.tokenize_messages(sample["messages"], add_eos=not inference)
        return {**{key: value for key, value in sample.items() if key != "messages"}, "tokens": tokens, "mask": mask}


@config_component
def byte_tokenizer(
    max_seq_len: int | None = None,
    special_tokens: Sequence[str] | Mapping[str, int] | None = None,
    prompt_template: str | dict[str, Sequence[str]] | None = None,
) -> TiktokenTokenizer:
    """A tokenizer that needs no file: the id of byte ``b`` is ``b``, and the special tokens follow from 256.

    Args:
        max_seq_len (int | None): Longest training sample, in bytes. Default is None, no limit.
        special_tokens (Sequence[str] | Mapping[str, int] | None): More special tokens, or a mapping that also fixes
            ids. Default is None: ``<|begin_of_text|>`` 256, ``<|end_of_text|>`` 257, ``<|pad|>`` 258.
        prompt_template (str | dict | None): As for :class:`TiktokenTokenizer`.

    Returns:
        TiktokenTokenizer: Its ``vocab_size`` is 259 plus the further special tokens; it is not rounded up.

    Raises:
        ValueError: If a special token is given twice or its id is taken.
    """
    encoding = _make_encoding("bytes", r"(?s:.)", _BYTE_RANKS, {}, special_tokens)
    return TiktokenTokenizer(encoding, max_seq_len, prompt_template)


@config_component
def tiktoken_tokenizer(
    path_or_name: str,
    max_seq_len: int | None = None,
    special_tokens: Sequence[str] | Mapping[str, int] | None = None,
    pattern: str | None = None,
    prompt_template: str | dict[str, Sequence[str]] | None = None,
) -> TiktokenTokenizer:
    """A byte-level BPE tokenizer from a ``.tiktoken`` file, or one of tiktoken's named encodings.

    Args:
        path_or_name (str): A file with a base64 token and its rank on each line (recipes/train_tokenizer.py writes
            one; Llama 3's ``tokenizer.model`` is one), or a name such as ``gpt2`` or ``cl100k_base``.
        max_seq_len (int | None): Longest training sample, in tokens. Default is None, no limit.
        special_tokens (Sequence[str] | Mapping[str, int] | None): More special tokens, or a mapping that also fixes
            ids (for a vocabulary whose model is already trained). ``<|begin_of_text|>``, ``<|end_of_text|>`` and
            ``<|pad|>`` follow the vocabulary unless the mapping places them. Default is None.
        pattern (str | None): Regular expression that splits text before merging; must be the one the file was trained
            with. Default is None: that of cl100k_base and Llama 3, and of recipes/train_tokenizer.py.
        prompt_template (str | dict | None): As for :class:`TiktokenTokenizer`.

    Returns:
        TiktokenTokenizer: The tokenizer.

    Raises:
        ValueError: If there is no such file or name, the file is malformed, a special token's id is taken, or a
            pattern is given for a named encoding.
        RuntimeError: If a named encoding is neither cached nor downloadable.
    """
    names = tiktoken.list_encoding_names()
    path = Path(path_or_name).expanduser()
    if path.is_file():
        ranks = _read_ranks(path)
        encoding = _make_encoding(path.stem, pattern or CL100K_PATTERN, ranks, {}, special_tokens)
    elif path_or_name not in names:
        raise ValueError(
            f"path_or_name ({path_or_name!r}) must be an existing .tiktoken file or one of {', '.join(names)}; "
            "correct the path, or make a file with recipes/train_tokenizer.py"
        )
    elif pattern is not None:
        raise ValueError(f"pattern ({pattern!r}) must be null for {path_or_name}, which has its own; remove pattern")
    else:
        named = _load_named(path_or_name)
        encoding = _make_encoding(
            path_or_name, named._pat_str, named._mergeable_ranks, named._special_tokens, special_tokens
        )
    return TiktokenTokenizer(encoding, max_seq_len, prompt_template)


def _cut_long_runs(text: str) -> Iterator[str]:
    """The text in as few parts as leave no run of whitespace, or of anything else, that is too long for tiktoken."""
    cuts = [0]
    if len(text) > _LONGEST_RUN:
        for run in _RUN.finditer(text):
            cuts += range(run.start() + _LONGEST_RUN, run.end(), _LONGEST_RUN)
    return (text[start:stop] for start, stop in itertools.pairwise([*cuts, len(text)]))


def _make_encoding(
    name: str,
    pattern: str,
    ranks: dict[bytes, int],
    own_specials: dict[str, int],
    special_tokens: Sequence[str] | Mapping[str, int] | None,
) -> tiktoken.Encoding:
    """An encoding with the given special tokens: fixed ids first, every other name on the next free id."""
    fixed = dict(special_tokens) if isinstance(special_tokens, Mapping) else {}
    names = [] if special_tokens is None or fixed else list(special_tokens)
    if isinstance(special_tokens, str) or not all(isinstance(token, str) and token for token in [*names, *fixed]):
        raise ValueError(
            f"special_tokens ({special_tokens!r}) must be a list of names or a mapping from names to ids; "
            "set special_tokens=[<|user|>,<|assistant|>]"
        )
    specials, taken = dict(own_specials), set(ranks.values()) | set(own_specials.values())
    for token, token_id in fixed.items():
        if not isinstance(token_id, int) or token_id < 0 or token_id in taken or token in specials:
            raise ValueError(
                f"special_tokens[{token!r}] ({token_id!r}) must be a free token id; choose one from {max(taken) + 1} up"
            )
        specials[token] = token_id
        taken.add(token_id)
    free = (token_id for token_id in itertools.count(max(ranks.values()) + 1) if token_id not in taken)
    for token in [*(default for default in (BOS, EOS, PAD) if default not in specials), *names]:
        if token in specials:
            raise ValueError(
                f"special_tokens ({token!r}) must name each token once, and not {BOS}, {EOS} or {PAD}, "
                "which are always there; remove it from the list"
            )
        specials[token] = next(free)
    try:
        return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
    except ValueError as error:
        raise ValueError(f"pattern ({pattern!r}) must be a valid regular expression; correct it: {error}") from None


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Read a .tiktoken file, and refuse one that could not encode every text.

    tiktoken's own loader caches local files by their path, so it would return the old vocabulary for a file that was
    trained again, and would fail where TIKTOKEN_CACHE_DIR is read-only.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"path_or_name ({str(path)!r}) must hold a base64 token and its rank on each line, and line {number} "
                "does not; give a .tiktoken file, such as recipes/train_tokenizer.py writes"
            ) from None
    if not _BYTE_RANKS.keys() <= ranks.keys() or len(set(ranks.values())) != len(ranks):
        raise ValueError(
            f"path_or_name ({str(path)!r}) must hold all 256 single bytes and each rank once; "
            "train it again with recipes/train_tokenizer.py"
        )
    return ranks


def _load_named(name: str) -> tiktoken.Encoding:
    """One of tiktoken's own encodings, from its cache or from the network."""
    try:
        return tiktoken.get_encoding(name)
    except OSError as error:  # every network error of requests is one
        raise RuntimeError(
            f"path_or_name ({name!r}) must be in tiktoken's cache or downloadable, and is neither "
            f"({type(error).__name__}); set TIKTOKEN_CACHE_DIR to a cache made on a machine with a network, "
            "or give a .tiktoken file"
        ) from error
