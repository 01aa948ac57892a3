"""Where tokens lie that go behind those a decoding cache holds.

A cache remembers three numbers a row, its cursor: the position its current document began at, the position of its
last token, and how many tokens it was given. Everything else follows from these and from the new tokens' positions,
so rows may sit at different positions, and nothing is read back from an accelerator.

Shape legend: ``b`` batch, ``s`` new tokens, ``c`` chunk size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flash_plugin.kernels.segments import Segments, make_segments


@dataclass(frozen=True)
class ChunkStep:
    """One new token a row among the tokens of its chunk, which lie in a ring of c slots by position modulo c.

    Attributes:
        slot: The new token's slot, ``[b, 1, 1]``.
        visible: Slots it sees, itself included, ``[b, 1, c]``.
        hidden: All others, likewise.
        place: Of each slot's ``t - s`` in a vector over -c < t - s < c; some legal one of hidden slots; likewise.
        local_share: One over the number of visible slots, ``[b, 1, 1]`` float64.
        global_share: One over the tokens of its document in earlier chunks, 0 if there are none, likewise.
    """

    slot: Tensor
    visible: Tensor
    hidden: Tensor
    place: Tensor
    local_share: Tensor
    global_share: Tensor


@dataclass(frozen=True)
class NewTokens:
    """Tokens that go behind those of a cache; made once a forward by :func:`place_new_tokens` for all layers.

    Attributes:
        position: Position of each token in its document, ``[b, s]`` int64.
        begin: Position that the first token of its document has, ``[b, s]`` int64.
        index: Place of each token among all that the cache was given, ``[s]`` int64.
        continues: Whether a row's first new token goes on with the document in the cache, ``[b]`` bool.
        cursor: The cursor behind the new tokens, ``[b, 3]`` int64.
        segments: Documents among the new tokens; None for one token a row, which needs none.
        one_run: Whether each row is known to be one run of tokens, none of which but the first begins a document.
        empty: Whether the cache is known to hold nothing.
        steps: For one new token a row: its chunk, by chunk size.
    """

    position: Tensor
    begin: Tensor
    index: Tensor
    continues: Tensor
    cursor: Tensor
    segments: Segments | None
    one_run: bool
    empty: bool
    steps: dict[int, ChunkStep] = field(default_factory=dict)

    def step(self, chunk_size: int) -> ChunkStep:
        """The chunk of one new token a row."""
        return self.steps[chunk_size] if chunk_size in self.steps else self._step(chunk_size)

    def _step(self, chunk_size: int) -> ChunkStep:
        position, begin = self.position[..., None], self.begin[..., None]
        slot = position % chunk_size
        start = torch.maximum(begin, position - slot)
        ring = torch.arange(chunk_size, device=slot.device)
        seen, earlier = position - start + 1, start - begin
        visible = (ring <= slot) & (ring > slot - seen)
        return ChunkStep(
            slot=slot,
            visible=visible,
            hidden=~visible,
            place=slot - ring + chunk_size - 1,
            local_share=1.0 / seen.double(),
            global_share=torch.where(earlier > 0, 1.0 / earlier.clamp(min=1).double(), 0.0),
        )


def empty_cursor(batch_size: int, device: torch.device | None = None) -> Tensor:
    """The cursor ``[b, 3]`` of a cache that holds nothing: documents of no token, which position 0 goes on with.

    It is filled on ``device``, torch's default one if not given: an accelerator waits for nothing from the host.
    """
    cursor = torch.zeros(batch_size, 3, dtype=torch.int64, device=device)
    cursor[:, 1].fill_(-1)
    return cursor


def place_new_tokens(
    cursor: Tensor, position: Tensor, *, chunk_sizes: Iterable[int] = (), empty: bool = False
) -> NewTokens:
    """Work out which new tokens go on with a row's document and which begin one (DESIGN section 1).

    A row's first token goes on if its position is one more than that of the row's last token; any other, such as 0,
    begins a document.

    Args:
        cursor: Begin, last position and number of tokens of each row, ``[b, 3]``; tokens are fed to all rows at once.
        position: Position of each new token in its document, ``[1 or b, s]`` integers.
        chunk_sizes: Chunk sizes of the layers.
        empty: Whether the caller knows that the cache holds nothing.

    Returns:
        The new tokens' places.
    """
    batch, length = cursor.shape[0], position.shape[1]
    held_begin, held_last, fed = cursor.unbind(1)
    position = position.long().expand(batch, -1)
    continues = position[:, 0] == held_last + 1
    index = fed[0] + torch.arange(length, device=cursor.device)
    segments = make_segments(position).with_chunks(chunk_sizes) if length > 1 else None
    start = torch.zeros_like(position) if segments is None else segments.start
    begin = position - (torch.arange(length, device=cursor.device) - start)
    begin = torch.where((start == 0) & continues[:, None], held_begin[:, None], begin)
    cursor = torch.stack([begin[:, -1], position[:, -1], fed + length], dim=1)
    new = NewTokens(position, begin, index, continues, cursor, segments, _one_run(start), empty)
    if length == 1:
        new.steps.update({size: new._step(size) for size in dict.fromkeys(chunk_sizes)})
    return new


def _one_run(start: Tensor) -> bool:
    # Reading values would synchronise an accelerator and break a compiled graph: there, assume the general case.
    if torch.compiler.is_compiling() or start.device.type != "cpu":
        return False
    return not bool(start.any())
