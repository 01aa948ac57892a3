"""A token embedding whose table is the output projection too."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torchtune.modules import TiedLinear


class TiedEmbedding(nn.Embedding):
    """``nn.Embedding`` that also lends its table to a projection, for the length of a call.

    FSDP gathers a sharded table when its module is called and drops it again afterwards. So whoever needs the table
    must get it from within a call: an attribute read from outside is a shard.
    """

    def forward(self, input: Tensor, projection: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """Look token ids up, or project hidden states.

        Args:
            input: Token ids ``[b, s]``; with a projection what it takes, hidden states ``[b, s, d]``.
            projection: Called with ``input`` and the table ``[vocab_size, d]``.

        Returns:
            Embeddings ``[b, s, d]``, or what the projection returns.
        """
        return super().forward(input) if projection is None else projection(input, self.weight)


class TiedOutput(TiedLinear):
    """torchtune's ``TiedLinear``, with the table gathered where FSDP shards the embedding by itself.

    It is no module and owns no weight: the state dict names the table once, ``tok_embeddings.weight``. torchtune's
    activation offloading spares ``linear``, and so it is what projects here too.

    Args:
        tied_module: The token embedding.
    """

    def __init__(self, tied_module: TiedEmbedding) -> None:
        super().__init__(tied_module)

    def __call__(self, x: Tensor) -> Tensor:
        """Project hidden states ``[b, s, d]`` to logits ``[b, s, vocab_size]``, in their dtype."""
        logits: Tensor = self.tied_module(x, projection=self.linear)
        return logits
