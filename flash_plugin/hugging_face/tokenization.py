"""Our tokenizers for ``transformers``: the ids are those of the tokenizer that it wraps, for every text."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizer
from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

from flash_plugin.components.tokenizers import BOS, EOS, PAD, TiktokenTokenizer, tiktoken_tokenizer
from flash_plugin.hugging_face.configuration import FlashConfig
from flash_plugin.hugging_face.remote_code import reference, write_remote_code

VOCABULARY_FILE = "vocabulary.tiktoken"


class FlashTokenizer(PreTrainedTokenizer):
    """A :class:`flash_plugin.TiktokenTokenizer` with the methods of ``transformers``' tokenizers.

    Its settings are what our models are used to: ``<|begin_of_text|>`` in front unless ``add_special_tokens=False``,
    padding on the left, and text that spells out a special token is text; ``split_special_tokens=False`` in a call
    makes it the special token, as chat templates want it.

    It is not one of the ``tokenizers`` library's: its regular expressions and its order of merges are others than
    tiktoken's, so that there is text, rare as it is, which it would cut otherwise.

    Args:
        vocab_file: A ``.tiktoken`` file, with a base64 token and its rank on each line.
        special_tokens: The id of every special token.
        pattern: Regular expression that splits text before merging.
        options: What ``PreTrainedTokenizer`` takes.

    Raises:
        ValueError: If the file is malformed, an id is taken, or an ordinary token looks like a special one.
    """

    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": VOCABULARY_FILE}
    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(self, vocab_file: str, special_tokens: Mapping[str, int], pattern: str, **options: Any) -> None:
        self.flash = tiktoken_tokenizer(vocab_file, special_tokens=special_tokens, pattern=pattern)
        visible = bytes_to_unicode()
        ranks = self.flash.encoding._mergeable_ranks
        self._name_of = {rank: "".join(visible[byte] for byte in token) for token, rank in ranks.items()}
        self._id_of = {name: rank for rank, name in self._name_of.items()}
        self._bytes_of = {name: token for token, name in zip(ranks, self._name_of.values(), strict=True)}
        both = sorted(self._id_of.keys() & self.flash.special_tokens.keys())
        if both:
            raise ValueError(
                f"special_tokens ({', '.join(both)}) must not be ordinary tokens too, which transformers cannot tell "
                "apart; train a vocabulary without them"
            )
        special = {number: AddedToken(name, special=True) for name, number in self.flash.special_tokens.items()}
        others = [name for name in self.flash.special_tokens if name not in (BOS, EOS, PAD)]
        defaults: dict[str, Any] = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
        defaults["additional_special_tokens"] = others
        defaults |= {"split_special_tokens": True, "clean_up_tokenization_spaces": False}
        options = {
            **defaults,
            **options,
            "added_tokens_decoder": {**special, **options.get("added_tokens_decoder", {})},
        }
        super().__init__(special_tokens=dict(special_tokens), pattern=pattern, **options)
        self._auto_map = {"AutoTokenizer": [reference("FlashTokenizer"), None]}

    @classmethod
    def from_flash(cls, tokenizer: TiktokenTokenizer, folder: str | os.PathLike[str], **options: Any) -> FlashTokenizer:
        """Save a tokenizer of ours in ``folder``, and return what ``from_pretrained`` reads there.

        Args:
            tokenizer: From :func:`flash_plugin.byte_tokenizer` or :func:`flash_plugin.tiktoken_tokenizer`.
            folder: Where to write; made if need be.
            options: What ``PreTrainedTokenizer`` takes, such as ``model_max_length``.

        Raises:
            ValueError: If it is of another kind, or has a prompt template.
        """
        if not isinstance(tokenizer, TiktokenTokenizer):
            raise ValueError(
                f"tokenizer ({type(tokenizer).__name__}) must be flash_plugin.byte_tokenizer or "
                "flash_plugin.tiktoken_tokenizer; leave tokenizer out and save the one that transformers has for it"
            )
        if tokenizer.prompt_template is not None:
            raise ValueError(
                f"tokenizer.prompt_template ({type(tokenizer.prompt_template).__name__}) must be null, "
                "for transformers has chat templates instead; set tokenizer.prompt_template=null, and chat_template of "
                "what is written"
            )
        Path(folder).mkdir(parents=True, exist_ok=True)
        path = Path(folder) / VOCABULARY_FILE
        encoding = tokenizer.encoding
        _write_ranks(path, encoding._mergeable_ranks)
        saved = cls(str(path), special_tokens=tokenizer.special_tokens, pattern=encoding._pat_str, **options)
        saved.save_pretrained(folder)
        return saved

    def node(self, vocab_file: str) -> dict[str, Any]:
        """The ``tokenizer`` node that reads ``vocab_file`` in torchtune's recipes."""
        return {
            "_component_": "flash_plugin.tiktoken_tokenizer",
            "path_or_name": vocab_file,
            "special_tokens": dict(self.flash.special_tokens),
            "pattern": self.flash.encoding._pat_str,
        }

    @property
    def vocab_size(self) -> int:
        """Number of ordinary tokens; ``len(tokenizer)`` counts special ones too."""
        return self.flash.base_vocab_size

    def get_vocab(self) -> dict[str, int]:
        """The id of every token; bytes that are no visible character are written as GPT-2's tokenizer writes them."""
        return {**self._id_of, **self._added_tokens_encoder}

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """The tokens with ``<|begin_of_text|>`` in front; those of a second text follow."""
        return [self.flash.bos_id, *token_ids_0, *(token_ids_1 or [])]

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 at special tokens, 0 at others."""
        if already_has_special_tokens:
            return [int(token in self.all_special_ids) for token in token_ids_0]
        return [1] + [0] * (len(token_ids_0) + len(token_ids_1 or []))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens; byte sequences that are not UTF-8 become replacement characters."""
        parts = (self._bytes_of[token] if token in self._bytes_of else token.encode() for token in tokens)
        return b"".join(parts).decode("utf-8", errors="replace")

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Write the vocabulary, and the file that ``trust_remote_code=True`` asks for."""
        write_remote_code(save_directory)
        path = Path(save_directory) / "-".join(filter(None, [filename_prefix, VOCABULARY_FILE]))
        _write_ranks(path, self.flash.encoding._mergeable_ranks)
        return (str(path),)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoTokenizer") -> None:
        """Do nothing: what is saved names its code already, and a copy of ours would go stale."""

    def _tokenize(self, text: str, **_options: Any) -> list[str]:
        return [self._name_of[number] for number in self.flash.encode(text, add_bos=False, add_eos=False)]

    def _convert_token_to_id(self, token: str) -> int:
        if token not in self._id_of:
            raise ValueError(f"token ({token!r}) must be one of the vocabulary; look for it in get_vocab()")
        return self._id_of[token]

    def _convert_id_to_token(self, index: int) -> str:
        if index not in self._name_of:
            raise ValueError(
                f"token id ({index}) must be one of the vocabulary of {len(self)}; decode with the tokenizer that the "
                "model was trained with"
            )
        return self._name_of[index]

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = False,
        **kwargs: Any,
    ) -> str:
        return super()._decode(
            token_ids, skip_special_tokens, clean_up_tokenization_spaces, spaces_between_special_tokens, **kwargs
        )


def _write_ranks(path: Path, ranks: Mapping[bytes, int]) -> None:
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    path.write_text("".join(lines))


AutoTokenizer.register(FlashConfig, slow_tokenizer_class=FlashTokenizer)
