"""The layouts of FLASH-pytorch 0.1.9 and of those that follow it: DNAFlash, JunnYu's FLASH.

Shape legend: ``e`` expanded width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from flash_plugin.components.conversion_rules import (
    Arguments,
    Format,
    Option,
    Rule,
    Weights,
    column,
    count,
    expansion_factor,
    rows,
    same,
    shape_of,
)

_MIXED_CHUNK_ORDER = (0, 2, 1, 3)  # theirs: local q, global q, local k, global k; ours: local q, k, global q, k
_MOST_ROTATED = 32


def unit_rules(
    theirs: str,
    ours: str,
    *,
    expanded_dim: int,
    norm: str,
    offset_scale: str = "qk_offset_scale",
    gamma_beta: tuple[str, str] = ("gamma", "beta"),
    order: Sequence[int] = _MIXED_CHUNK_ORDER,
    to_out: str = "to_out",
) -> list[Rule]:
    """One FLASH layer, or, with other names and ``order``, one GAU.

    Args:
        theirs: Prefix of their names.
        ours: Prefix of ours, of a :class:`flash_plugin.FlashLayer`.
        expanded_dim: Width e.
        norm: ``scalenorm`` or ``layernorm``.
        offset_scale: Their name of the offset-scale; ``offsetscale`` in GAU.
        gamma_beta: Their names of its factors and offsets.
        order: Which row of theirs each row of our offset-scale is; ``(0, 1)`` in GAU.
        to_out: Their name of the output projection; ``to_out.0`` in GAU.
    """
    rules = []
    for kind in ("weight", "bias"):
        halves = (f"{ours}attn.v_proj.{kind}", f"{ours}attn.gate_proj.{kind}")
        rules += [
            rows(f"{theirs}to_hidden.0.{kind}", halves, (expanded_dim, expanded_dim)),
            same(f"{theirs}to_qk.0.{kind}", f"{ours}attn.qk_proj.{kind}"),
            same(f"{theirs}{to_out}.{kind}", f"{ours}attn.output_proj.{kind}"),
        ]
    for name, our_name in zip(gamma_beta, ("gamma", "beta"), strict=True):
        rules.append(
            rows(f"{theirs}{offset_scale}.{name}", (f"{ours}attn.offset_scale.{our_name}",), (len(order),), order)
        )
    bias = f"{ours}attn.mixer.position_bias.weight"
    rules.append(column(f"{theirs}rel_pos_bias.relative_attention_bias.weight", bias))
    if norm == "scalenorm":
        return [*rules, same(f"{theirs}norm.g", f"{ours}sa_norm.scale")]
    return [*rules, *(same(f"{theirs}norm.{kind}", f"{ours}sa_norm.{kind}") for kind in ("weight", "bias"))]


class _FlashLayout(Format):
    """What the three have in common; only names differ."""

    component = "flash"
    choices: ClassVar[Mapping[str, Sequence[Any]]] = {"norm": ("scalenorm", "layernorm")}
    layers: str
    embedding: str
    sinusoid_scale: str
    head_norm: str
    head: str
    gamma_beta: tuple[str, str] = ("gamma", "beta")

    def sizes(self, weights: Weights) -> dict[str, Any]:
        """Read the sizes off shapes."""
        layer = self.layers.replace(".", r"\.") + r"\d+\."
        vocab_size, embed_dim = shape_of(weights, self.embedding.replace(".", r"\."), 2)
        qk_dim, _ = shape_of(weights, layer + r"to_qk\.0\.weight", 2)
        hidden, _ = shape_of(weights, layer + r"to_hidden\.0\.weight", 2)
        scalenorm = any(name.startswith(self.layers) and name.endswith(".norm.g") for name in weights)
        return {
            "vocab_size": vocab_size,
            "num_layers": count(weights, self.layers.replace(".", r"\.") + r"(\d+)\."),
            "embed_dim": embed_dim,
            "expansion": hidden // 2 / embed_dim,
            "qk_dim": qk_dim,
            "norm": "scalenorm" if scalenorm else "layernorm",
        }

    def fixed(self, arguments: Arguments) -> dict[str, Any]:
        """What it leaves no choice of."""
        return {
            "normalizer": "chunk",
            "position_bias": "t5",
            "rope_dim": min(_MOST_ROTATED, arguments["qk_dim"]),
            "rope_base": 10000,
            "absolute_position": True,
            "norm_eps": 1e-5,
            "proj_bias": True,
            "output_bias": True,
            "final_norm": "layernorm",
            "tie_embeddings": False,
            "attention_layers": None,
            "quadratic_layers": None,
        }

    def rules(self, arguments: Arguments) -> list[Rule]:
        """What is what."""
        rules = [
            same(self.embedding, "tok_embeddings.weight"),
            same(self.sinusoid_scale, "absolute_position.scale"),
        ]
        for kind in ("weight", "bias"):
            rules += [same(f"{self.head_norm}.{kind}", f"norm.{kind}"), same(f"{self.head}.{kind}", f"output.{kind}")]
        for layer in range(arguments["num_layers"]):
            rules += unit_rules(
                f"{self.layers}{layer}.",
                f"layers.{layer}.",
                expanded_dim=round(arguments["expansion"] * arguments["embed_dim"]),
                norm=arguments["norm"],
                gamma_beta=self.gamma_beta,
            )
        return rules

    def constants(self, arguments: Arguments) -> dict[str, Tensor]:
        """What it saves though it computes it."""
        frequencies = inverse_frequencies(arguments["rope_dim"])
        return {f"{self.layers}{layer}.rotary_pos_emb.freqs": frequencies for layer in range(arguments["num_layers"])}


class FlashPytorch(_FlashLayout):
    """``flash_pytorch.FLASHTransformer``."""

    title = "FLASHTransformer of FLASH-pytorch 0.1.9"
    mark = "to_logits.0.weight"
    layers = "layers."
    embedding = "token_emb.weight"
    sinusoid_scale = "abs_pos_emb.scale"
    head_norm, head = "to_logits.0", "to_logits.1"
    weights_file, config_file = "flash_pytorch.pt", "flash_pytorch.yaml"
    options: ClassVar[Mapping[str, Option]] = {
        "group_size": Option("chunk_size", 256),
        "causal": Option("causal", False),
        "shift_tokens": Option("token_shift", True),
        "laplace_attn_fn": Option("activation", False, {False: "relu2", True: "laplace"}),
        "attn_dropout": Option("attn_dropout", 0.0),
        "max_seq_len": Option("max_seq_len", 8192),
    }

    def constants(self, arguments: Arguments) -> dict[str, Tensor]:
        """What it saves though it computes it."""
        return {
            **super().constants(arguments),
            "abs_pos_emb.inv_freq": inverse_frequencies(arguments["embed_dim"]),
        }

    def remarks(self, arguments: Arguments) -> Sequence[str]:
        """What is worth knowing."""
        if arguments["causal"]:
            return ()
        return (
            "the model is read as one with reduce_group_non_causal_attn=True; that of False, which sums keys and "
            "values within each group alone, is not to be had here",
        )

    def their_arguments(self, arguments: Arguments) -> dict[str, Any]:
        """What its constructor takes."""
        return {
            "dim": arguments["embed_dim"],
            "num_tokens": arguments["vocab_size"],
            "depth": arguments["num_layers"],
            "query_key_dim": arguments["qk_dim"],
            "expansion_factor": _expansion_factor(arguments),
            "norm_type": arguments["norm"],
            "reduce_group_non_causal_attn": True,
            **{name: value for name, value in self.written_options(arguments).items() if name != "max_seq_len"},
        }


class DnaFlash(FlashPytorch):
    """``isyslab/DNAFlash``: a ``FLASHTransformer`` of 36 layers of width 1024."""

    title = "DNAFlash (FLASH-pytorch's layout)"
    weights_file, config_file = "dnaflash.pt", "dnaflash.yaml"

    def remarks(self, arguments: Arguments) -> Sequence[str]:
        """What is worth knowing."""
        text = "defaults are FLASH-pytorch's, which DNAFlash may have been trained without: give what differs"
        return [*super().remarks(arguments), text]


class JunnyuFlash(_FlashLayout):
    """``FLASHForMaskedLM`` of JunnYu's FLASHQuad_pytorch, the models ``junnyu/flash_*_wwm_cluecorpussmall``."""

    title = "FLASHForMaskedLM of JunnYu's FLASHQuad_pytorch"
    mark = "flash.embeddings.word_embeddings.weight"
    layers = "flash.encoder.layers."
    embedding = mark
    sinusoid_scale = "flash.embeddings.scale"
    head_norm, head = "cls.predictions.LayerNorm", "cls.predictions.decoder"
    gamma_beta = ("weight", "bias")
    options: ClassVar[Mapping[str, Option]] = {
        "group_size": Option("chunk_size", 256),
        "max_position_embeddings": Option("max_seq_len", 512),
        "dropout": Option("attn_dropout", 0.0),
    }

    def remarks(self, arguments: Arguments) -> Sequence[str]:
        """What is worth knowing."""
        return (
            "what is summed across groups is divided by the length of the batch, padding included, and the published "
            "models were trained on 512 tokens: pad to 512, as their documentation asks for, to get their results",
            "their output projection is tied to the embedding in training; here the two are trained apart",
        )

    def tied(self, arguments: Arguments) -> dict[str, str]:
        """What it ties."""
        return {f"{self.head}.weight": self.embedding}

    def fixed(self, arguments: Arguments) -> dict[str, Any]:
        """What it leaves no choice of."""
        return {**super().fixed(arguments), "causal": False, "token_shift": False, "activation": "relu2"}

    def their_arguments(self, arguments: Arguments) -> dict[str, Any]:
        """What its constructor takes."""
        return {
            "architectures": ["FLASHForMaskedLM"],
            "model_type": "flash",
            "vocab_size": arguments["vocab_size"],
            "hidden_size": arguments["embed_dim"],
            "num_hidden_layers": arguments["num_layers"],
            "query_key_dim": arguments["qk_dim"],
            "expansion_factor": _expansion_factor(arguments),
            "norm_type": arguments["norm"],
            "layer_norm_eps": arguments["norm_eps"],
            "tie_word_embeddings": False,
            **self.written_options(arguments),
        }


def _expansion_factor(arguments: Arguments) -> float:
    embed_dim = arguments["embed_dim"]
    return expansion_factor(round(arguments["expansion"] * embed_dim), embed_dim)


def inverse_frequencies(dim: int) -> Tensor:
    """``10000^(-i / dim)`` for even i, rounded as both libraries round it, float32 ``[dim / 2]``."""
    return 1.0 / (10000 ** (torch.arange(0, dim, 2).float() / dim))
