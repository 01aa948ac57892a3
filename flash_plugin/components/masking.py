"""Which tokens a masked language model must guess, and what it sees in their place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from torchtune.modules.transforms.tokenizers import ModelTokenizer

from flash_plugin.kernels.validation import is_number

MASK = "<|mask|>"
MASKINGS = ("token", "span")

# SpanBERT's lengths of spans: geometric with p = 0.2, none above 10 (Joshi et al. 2020, section 3.1); 3.8 on average.
_SPAN_LENGTHS = np.arange(1, 11)
_SPAN_WEIGHTS = 0.8 ** (_SPAN_LENGTHS - 1) / np.sum(0.8 ** (_SPAN_LENGTHS - 1))


@dataclass(frozen=True)
class Masker:
    """Hides tokens of a sample.

    Attributes:
        masking: ``token`` or ``span``.
        mask_fraction: The share of ordinary tokens that become targets.
        mask_share: The share of those that the model sees as the mask token.
        random_share: The share of those that the model sees as a random ordinary token.
        mask_id: Id of the mask token.
        special_ids: Ids that are never targets, sorted.
        ordinary_ids: All other ids.
    """

    masking: str
    mask_fraction: float
    mask_share: float
    random_share: float
    mask_id: int
    special_ids: NDArray[np.int64]
    ordinary_ids: NDArray[np.int64]

    def __call__(
        self, tokens: NDArray[np.int64], random: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Choose targets among ``tokens`` ``[n]`` and hide them.

        The number of targets is ``mask_fraction`` of the ordinary tokens, rounded up or down at random so that this is
        its mean, but at least 1.

        Returns:
            What the model sees and what it shall say, both ``[n]``; the latter is -100 where there is no target.
        """
        seen, targets = tokens.copy(), np.full_like(tokens, CROSS_ENTROPY_IGNORE_IDX)
        candidates = np.flatnonzero(~np.isin(tokens, self.special_ids))
        if len(candidates) == 0:
            return seen, targets
        count = max(int(self.mask_fraction * len(candidates) + random.random()), 1)
        if self.masking == "span":
            places, lengths = _spans(len(candidates), count, random)
        else:
            places, lengths = random.choice(len(candidates), count, replace=False), np.ones(count, np.int64)
        chosen = candidates[places]
        targets[chosen] = tokens[chosen]
        # A span has one fate, as in SpanBERT.
        fate = np.repeat(random.random(len(lengths)), lengths)
        seen[chosen[fate < self.mask_share]] = self.mask_id
        swapped = chosen[(fate >= self.mask_share) & (fate < self.mask_share + self.random_share)]
        seen[swapped] = random.choice(self.ordinary_ids, len(swapped))
        return seen, targets


def _spans(total: int, count: int, random: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Spans that cover ``count`` of ``total`` places: those places, span by span, and the lengths of the spans.

    The last length drawn is cut to what is missing. Spans do not touch, if there is room. They lie on a circle, so that
    the first and last places are covered as often as others: a span that meets the end goes on at the start.
    """
    lengths = random.choice(_SPAN_LENGTHS, count, p=_SPAN_WEIGHTS)
    ends = lengths.cumsum()
    lengths = lengths[: np.searchsorted(ends, count) + 1]
    lengths[-1] -= lengths.sum() - count
    random.shuffle(lengths)
    # So many gaps to put spans into are between the places that are left over.
    gaps = max(total - count, 1)
    before = np.sort(random.choice(gaps, len(lengths), replace=len(lengths) > gaps))
    return (np.repeat(before, lengths) + np.arange(count) + random.integers(total)) % total, lengths


def make_masker(
    tokenizer: ModelTokenizer, masking: str, mask_fraction: float, mask_share: float, random_share: float, name: str
) -> Masker:
    """A masker of texts of this tokenizer, whose mask token is called ``name``.

    Raises:
        ValueError: If an argument is out of range, or the tokenizer has no such mask token.
    """
    if masking not in MASKINGS:
        raise ValueError(
            f"masking ({masking!r}) must be one of {', '.join(MASKINGS)}; set dataset.masking to one of them"
        )
    if not is_number(mask_fraction) or not 0 < mask_fraction < 1:
        raise ValueError(
            f"mask_fraction ({mask_fraction!r}) must be a number between 0 and 1, both excluded; set "
            "dataset.mask_fraction=0.15"
        )
    for key, share in (("mask_share", mask_share), ("random_share", random_share)):
        if not is_number(share) or not 0 <= share <= 1:
            raise ValueError(f"{key} ({share!r}) must be a number between 0 and 1; set dataset.{key}")
    if mask_share + random_share > 1:
        raise ValueError(
            f"mask_share ({mask_share}) and random_share ({random_share}) must add up to at most 1, the rest being "
            "what stays as it is; set dataset.mask_share=0.8 and dataset.random_share=0.1"
        )
    specials: dict[str, int] = getattr(tokenizer, "special_tokens", {})
    if name not in specials:
        raise ValueError(
            f"mask_token ({name!r}) must be a special token of the tokenizer, whose special tokens are "
            f"{', '.join(specials) or 'none'}; set tokenizer.special_tokens=[{name}] and model.vocab_size to one more"
        )
    reserved = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
    if specials[name] in reserved:
        raise ValueError(
            f"mask_token ({name!r}) must not begin, end or fill up texts; set tokenizer.special_tokens=[{MASK}] and "
            f"dataset.mask_token={MASK}"
        )
    special_ids = np.array(sorted(reserved | set(specials.values())), np.int64)
    ordinary_ids = np.setdiff1d(np.arange(tokenizer.vocab_size), special_ids)
    return Masker(masking, mask_fraction, mask_share, random_share, specials[name], special_ids, ordinary_ids)
