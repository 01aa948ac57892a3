"""The layouts of GAU-alpha and of JunnYu's FLASH-Quad, both for ``transformers``.

Shape legend: ``d`` embed, ``e`` expanded width, ``z`` query/key width.
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
    count,
    expansion_factor,
    is_same,
    repeated,
    reversed_vector,
    rows,
    same,
    shape_of,
    stacked,
    zeros,
)
from flash_plugin.components.encoders import LONGEST_TOEPLITZ


def _widths(arguments: Arguments) -> tuple[int, int, int]:
    """d, e and z."""
    embed_dim = arguments["embed_dim"]
    return embed_dim, round(arguments["expansion"] * embed_dim), arguments["qk_dim"]


class GauAlpha(Format):
    """``GAUAlphaForMaskedLM`` of JunnYu's GAU-alpha-pytorch, ``junnyu/chinese_GAU-alpha-char_L-24_H-768``."""

    title = "GAUAlphaForMaskedLM of JunnYu's GAU-alpha-pytorch"
    mark = "gau_alpha.embeddings.word_embeddings.weight"
    component = "gau_alpha"
    options: ClassVar[Mapping[str, Option]] = {
        "max_position_embeddings": Option("max_seq_len", 512),
        "layer_norm_eps": Option("norm_eps", 1e-12),
        "attention_probs_dropout_prob": Option("attn_dropout", 0.1),
    }
    _layers = "gau_alpha.encoder.layer."
    _head = "cls.predictions.decoder.weight"

    def remarks(self, arguments: Arguments) -> Sequence[str]:
        """What is worth knowing."""
        return (
            "read as a model with normalization=softmax_plus, attention_scale=true and hidden_act=swish, as published",
            "their dropout of hidden states (hidden_dropout_prob, in training) is not to be had here",
        )

    def sizes(self, weights: Weights) -> dict[str, Any]:
        """Read the sizes off shapes."""
        layer = self._layers.replace(".", r"\.") + r"\d+\.gau\."
        vocab_size, embed_dim = shape_of(weights, self.mark.replace(".", r"\."), 2)
        num_token_types, _ = shape_of(weights, r"gau_alpha\.embeddings\.token_type_embeddings\.weight", 2)
        (qk_dim,) = shape_of(weights, layer + r"q_scaleoffset\.weight", 1)
        _, expanded_dim = shape_of(weights, layer + r"o_dense\.weight", 2)
        return {
            "vocab_size": vocab_size,
            "num_layers": count(weights, self._layers.replace(".", r"\.") + r"(\d+)\."),
            "embed_dim": embed_dim,
            "expansion": expanded_dim / embed_dim,
            "qk_dim": qk_dim,
            "num_token_types": num_token_types,
            "proj_bias": any(name.startswith(self._layers) and name.endswith(".bias") for name in weights),
            "tie_embeddings": self._head not in weights or is_same(weights[self._head], weights[self.mark]),
        }

    def fixed(self, arguments: Arguments) -> dict[str, Any]:
        """What it leaves no choice of."""
        return {}

    def rules(self, arguments: Arguments) -> list[Rule]:
        """What is what."""
        _, expanded_dim, qk_dim = _widths(arguments)
        rules = [
            same(self.mark, "tok_embeddings.weight"),
            same("gau_alpha.embeddings.token_type_embeddings.weight", "token_types.weight"),
        ]
        if not arguments["tie_embeddings"]:
            rules.append(same(self._head, "output.weight"))
        for layer in range(arguments["num_layers"]):
            theirs, ours = f"{self._layers}{layer}.gau.", f"layers.{layer}.attn."
            for kind in ("weight", "bias") if arguments["proj_bias"] else ("weight",):
                fused = [f"{ours}{name}_proj.{kind}" for name in ("gate", "v", "qk")]
                rules += [
                    rows(f"{theirs}i_dense.{kind}", fused, (expanded_dim, expanded_dim, qk_dim)),
                    same(f"{theirs}o_dense.{kind}", f"{ours}output_proj.{kind}"),
                ]
            names = [f"{theirs}{name}_scaleoffset" for name in ("q", "k")]
            rules.append(stacked([f"{name}.weight" for name in names], f"{ours}offset_scale.gamma"))
            if arguments["proj_bias"]:
                rules.append(stacked([f"{name}.bias" for name in names], f"{ours}offset_scale.beta"))
            else:
                rules.append(zeros(f"{ours}offset_scale.beta", (2, qk_dim)))
        return rules

    def copies(self, arguments: Arguments) -> dict[str, str]:
        """What it saves twice."""
        return {self._head: self.mark} if arguments["tie_embeddings"] else {}

    def their_arguments(self, arguments: Arguments) -> dict[str, Any]:
        """What its constructor takes."""
        embed_dim, expanded_dim, qk_dim = _widths(arguments)
        return {
            "architectures": ["GAUAlphaForMaskedLM"],
            "model_type": "gau_alpha",
            "vocab_size": arguments["vocab_size"],
            "hidden_size": embed_dim,
            "embedding_size": embed_dim,
            "intermediate_size": expanded_dim,
            "num_hidden_layers": arguments["num_layers"],
            "attention_key_size": qk_dim,
            "type_vocab_size": arguments["num_token_types"],
            "use_bias": arguments["proj_bias"],
            "tie_word_embeddings": arguments["tie_embeddings"],
            "normalization": "softmax_plus",
            "attention_scale": True,
            "hidden_act": "swish",
            **self.written_options(arguments),
        }


class JunnyuFlashQuad(Format):
    """``FLASHQuadForMaskedLM`` of JunnYu's FLASHQuad_pytorch, ``junnyu/flashquad_small_wwm_cluecorpussmall``."""

    title = "FLASHQuadForMaskedLM of JunnYu's FLASHQuad_pytorch"
    mark = "flash_quad.embeddings.word_embeddings.weight"
    component = "junnyu_flash_quad"
    options: ClassVar[Mapping[str, Option]] = {"layer_norm_eps": Option("norm_eps", 1e-5)}
    choices: ClassVar[Mapping[str, Sequence[Any]]] = {"norm": ("rmsnorm", "layernorm")}
    _layers = "flash_quad.encoder.layer."
    _embeddings = "flash_quad.embeddings."
    _head = "cls.predictions."

    def remarks(self, arguments: Arguments) -> Sequence[str]:
        """What is worth knowing."""
        return (
            "read as a model with hidden_act=silu, as published; their dropout of embeddings is not to be had here",
            "their output projection is tied to the embedding in training; here the two are trained apart",
        )

    def sizes(self, weights: Weights) -> dict[str, Any]:
        """Read the sizes off shapes."""
        layer = self._layers.replace(".", r"\.") + r"\d+\."
        vocab_size, embed_dim = shape_of(weights, self.mark.replace(".", r"\."), 2)
        num_token_types, _ = shape_of(weights, r"flash_quad\.embeddings\.token_type_embeddings\.weight", 2)
        _, qk_dim = shape_of(weights, layer + "weight", 2)
        _, expanded_dim = shape_of(weights, layer + r"o\.weight", 2)
        (distances,) = shape_of(weights, layer + "w", 1)
        scalenorm = any(name.startswith(self._layers) and name.endswith(".scala") for name in weights)
        return {
            "vocab_size": vocab_size,
            "num_layers": count(weights, self._layers.replace(".", r"\.") + r"(\d+)\."),
            "embed_dim": embed_dim,
            "max_seq_len": (distances + 1) // 2,
            "expansion": expanded_dim / embed_dim,
            "qk_dim": qk_dim,
            "num_token_types": num_token_types,
            "norm": "rmsnorm" if scalenorm else "layernorm",
        }

    def fixed(self, arguments: Arguments) -> dict[str, Any]:
        """What it leaves no choice of."""
        return {"attn_dropout": 0.0}

    def rules(self, arguments: Arguments) -> list[Rule]:
        """What is what."""
        _, expanded_dim, qk_dim = _widths(arguments)
        # They rotate feature i with feature i + z / 2, we rotate neighbours.
        order = [index // 2 + index % 2 * (qk_dim // 2) for index in range(qk_dim)]
        fused_order = [*range(2 * expanded_dim), *(2 * expanded_dim + index for index in order)]
        dense = f"{self._head}transform.dense."
        rules = [
            same(self.mark, "tok_embeddings.weight"),
            same(f"{self._embeddings}token_type_embeddings.weight", "token_types.weight"),
            same(f"{self._embeddings}scaledsin_scalar", "absolute_position.scale"),
            same(f"{self._head}decoder.weight", "output.weight"),
            same(f"{self._head}bias", "output.bias"),
            *(same(f"{dense}{kind}", f"norm.dense.{kind}") for kind in ("weight", "bias")),
            *self._norm(f"{self._embeddings}LayerNorm", "embedding_norm", arguments),
            *self._norm(f"{self._head}transform.LayerNorm", "norm.norm", arguments),
        ]
        for layer in range(arguments["num_layers"]):
            theirs, unit = f"{self._layers}{layer}.", f"layers.{layer}.attn."
            for kind, our_kind in (("weight", "gamma"), ("bias", "beta")):
                fused = [f"{unit}{name}_proj.{kind}" for name in ("gate", "v", "qk")]
                rules += [
                    rows(f"{theirs}uv.{kind}", fused, (expanded_dim, expanded_dim, qk_dim), fused_order),
                    same(f"{theirs}o.{kind}", f"{unit}output_proj.{kind}"),
                    rows(f"{theirs}{kind}", (f"{unit}offset_scale.{our_kind}",), (qk_dim,), order, dim=1),
                ]
            bias = f"{unit}mixer.position_bias."
            if arguments["max_seq_len"] <= LONGEST_TOEPLITZ:
                rules.append(reversed_vector(f"{theirs}w", f"{bias}weight"))
            else:
                rules += [_rotated(f"{theirs}{name}", f"{bias}{name}", order) for name in ("a", "b")]
            rules += self._norm(f"{theirs}LayerNorm", f"layers.{layer}.sa_norm", arguments)
        return rules

    def unused(self, arguments: Arguments) -> dict[str, Tensor]:
        """What it saves though it does not use it."""
        length, qk_dim = arguments["max_seq_len"], arguments["qk_dim"]
        if length <= LONGEST_TOEPLITZ:
            left = {"a": torch.zeros(1, qk_dim), "b": torch.zeros(1, qk_dim)}
        else:
            left = {"w": torch.zeros(2 * length - 1)}
        return {
            f"{self._layers}{layer}.{name}": tensor
            for layer in range(arguments["num_layers"])
            for name, tensor in left.items()
        }

    def constants(self, arguments: Arguments) -> dict[str, Tensor]:
        """What it saves though it computes it."""
        positions = torch.arange(arguments["max_seq_len"])
        half = arguments["embed_dim"] // 2
        angles = positions.float()[:, None] * 10000 ** (-torch.arange(half).float() / half)
        return {
            f"{self._embeddings}position_ids": positions[None],
            f"{self._embeddings}scaledsin_embeddings": torch.cat([angles.sin(), angles.cos()], dim=-1),
        }

    def copies(self, arguments: Arguments) -> dict[str, str]:
        """What it saves twice."""
        return {f"{self._head}decoder.bias": f"{self._head}bias"}

    def tied(self, arguments: Arguments) -> dict[str, str]:
        """What it ties."""
        return {f"{self._head}decoder.weight": self.mark}

    def their_arguments(self, arguments: Arguments) -> dict[str, Any]:
        """What its constructor takes."""
        embed_dim, expanded_dim, qk_dim = _widths(arguments)
        return {
            "architectures": ["FLASHQuadForMaskedLM"],
            "model_type": "flash_quad",
            "vocab_size": arguments["vocab_size"],
            "hidden_size": embed_dim,
            "expansion_factor": expansion_factor(expanded_dim, embed_dim),
            "num_hidden_layers": arguments["num_layers"],
            "s": qk_dim,
            "max_position_embeddings": arguments["max_seq_len"],
            "type_vocab_size": arguments["num_token_types"],
            "norm_type": "layer_norm" if arguments["norm"] == "layernorm" else "scale_norm",
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            **self.written_options(arguments),
        }

    @staticmethod
    def _norm(theirs: str, ours: str, arguments: Arguments) -> list[Rule]:
        if arguments["norm"] == "layernorm":
            return [same(f"{theirs}.{kind}", f"{ours}.{kind}") for kind in ("weight", "bias")]
        # Their ScaleNorm adds its epsilon to the mean square: an RMS norm with one weight for all features.
        return [repeated(f"{theirs}.scala", f"{ours}.weight", arguments["embed_dim"])]


def _rotated(theirs: str, ours: str, order: Sequence[int]) -> Rule:
    """A vector of features in one row that is a vector of ours in another order."""
    whole = rows(theirs, (ours,), (len(order),), order, dim=1)
    return Rule(
        whole.theirs,
        whole.ours,
        lambda tensors: (whole.to_ours(tensors)[0][0],),
        lambda tensors: whole.to_theirs([tensors[0][None]]),
    )
