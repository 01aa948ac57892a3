"""Synthetic weights in the layouts that others have published, and their models as plain float64 formulas.

Nothing here is shared with ``flash_plugin``: names, shapes and formulas are written down from the published
descriptions, one document at a time, with explicit masks and loops where that is clearest.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Weights = dict[str, Tensor]
VOCABULARY, DIM, EXPANDED, QK_DIM, DEPTH, TYPES = 40, 24, 48, 12, 2, 2


def drawn(shapes: dict[str, tuple[int, ...]], seed: int) -> Weights:
    """Weights that reach every part of a model."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * (0.25 if len(shape) > 1 else 0.7)
        for name, shape in shapes.items()
    }


def gau_alpha_weights(*, bias: bool = False, tied: bool = True, depth: int = DEPTH) -> Weights:
    shapes: dict[str, tuple[int, ...]] = {
        "gau_alpha.embeddings.word_embeddings.weight": (VOCABULARY, DIM),
        "gau_alpha.embeddings.token_type_embeddings.weight": (TYPES, DIM),
    }
    for layer in range(depth):
        unit = f"gau_alpha.encoder.layer.{layer}.gau."
        shapes |= {
            f"{unit}i_dense.weight": (2 * EXPANDED + QK_DIM, DIM),
            f"{unit}o_dense.weight": (DIM, EXPANDED),
            f"{unit}q_scaleoffset.weight": (QK_DIM,),
            f"{unit}k_scaleoffset.weight": (QK_DIM,),
        }
        if bias:
            shapes |= {
                f"{unit}i_dense.bias": (2 * EXPANDED + QK_DIM,),
                f"{unit}o_dense.bias": (DIM,),
                f"{unit}q_scaleoffset.bias": (QK_DIM,),
                f"{unit}k_scaleoffset.bias": (QK_DIM,),
            }
    shapes["cls.predictions.decoder.weight"] = (VOCABULARY, DIM)
    weights = drawn(shapes, 1)
    if tied:
        weights["cls.predictions.decoder.weight"] = weights["gau_alpha.embeddings.word_embeddings.weight"]
    return weights


def flash_quad_weights(*, layernorm: bool = False, longest: int = 64, depth: int = DEPTH) -> Weights:
    def norm(name: str) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (DIM,), f"{name}.bias": (DIM,)} if layernorm else {f"{name}.scala": (1,)}

    head, embeddings = "cls.predictions.", "flash_quad.embeddings."
    shapes: dict[str, tuple[int, ...]] = {
        f"{embeddings}word_embeddings.weight": (VOCABULARY, DIM),
        f"{embeddings}token_type_embeddings.weight": (TYPES, DIM),
        f"{embeddings}scaledsin_scalar": (1,),
        **norm(f"{embeddings}LayerNorm"),
        f"{head}bias": (VOCABULARY,),
        f"{head}transform.dense.weight": (DIM, DIM),
        f"{head}transform.dense.bias": (DIM,),
        **norm(f"{head}transform.LayerNorm"),
        f"{head}decoder.weight": (VOCABULARY, DIM),
    }
    for layer in range(depth):
        unit = f"flash_quad.encoder.layer.{layer}."
        shapes |= {
            f"{unit}uv.weight": (2 * EXPANDED + QK_DIM, DIM),
            f"{unit}uv.bias": (2 * EXPANDED + QK_DIM,),
            f"{unit}weight": (2, QK_DIM),
            f"{unit}bias": (2, QK_DIM),
            f"{unit}o.weight": (DIM, EXPANDED),
            f"{unit}o.bias": (DIM,),
            **norm(f"{unit}LayerNorm"),
            f"{unit}w": (2 * longest - 1,),
            f"{unit}a": (1, QK_DIM),
            f"{unit}b": (1, QK_DIM),
        }
    weights = drawn(shapes, 2)
    weights[f"{head}decoder.bias"] = weights[f"{head}bias"]
    weights[f"{embeddings}position_ids"] = torch.arange(longest)[None]
    weights[f"{embeddings}scaledsin_embeddings"] = sinusoids(longest, torch.float32)
    return weights


def sinusoids(length: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """``[sin | cos]`` of position times 10000^(-i / (d / 2)), ``[length, d]``."""
    half = DIM // 2
    angle = torch.arange(length).to(dtype)[:, None] * 10000 ** (-torch.arange(half).to(dtype) / half)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def rotated(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """``[s, z]`` with each pair (first, second) of features turned by position * 10000^(-i / (z / 2))."""
    half = x.shape[1] // 2
    angle = torch.arange(x.shape[0]).double()[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
    out = torch.empty_like(x)
    out[:, first] = x[:, first] * angle.cos() - x[:, second] * angle.sin()
    out[:, second] = x[:, second] * angle.cos() + x[:, first] * angle.sin()
    return out


def gau_alpha_logits(weights: Weights, tokens: Tensor, types: Tensor) -> Tensor:
    """GAU-alpha of one text ``[s]``: every unit is followed by residual and norm, no norm has a weight."""
    held = {name: tensor.double() for name, tensor in weights.items()}

    def norm(x: Tensor) -> Tensor:
        return x / (x.square().mean(dim=1, keepdim=True) + 1e-12).sqrt()

    embeddings = "gau_alpha.embeddings."
    word, kind = held[f"{embeddings}word_embeddings.weight"], held[f"{embeddings}token_type_embeddings.weight"]
    x = norm(word[tokens] + kind[types])
    length = tokens.shape[0]
    even, odd = torch.arange(0, QK_DIM, 2), torch.arange(1, QK_DIM, 2)
    layer = 0
    while f"gau_alpha.encoder.layer.{layer}.gau.o_dense.weight" in held:
        unit = f"gau_alpha.encoder.layer.{layer}.gau."
        fused = silu(x @ held[f"{unit}i_dense.weight"].T + held.get(f"{unit}i_dense.bias", torch.zeros(1)))
        u, v, base = fused[:, :EXPANDED], fused[:, EXPANDED : 2 * EXPANDED], fused[:, 2 * EXPANDED :]
        q, k = (
            rotated(
                base * held[f"{unit}{n}_scaleoffset.weight"] + held.get(f"{unit}{n}_scaleoffset.bias", 0), even, odd
            )
            for n in "qk"
        )
        scores = q @ k.T / math.sqrt(QK_DIM)
        sharp = torch.exp(scores * math.log(length) / math.log(512))
        mixed = (sharp / sharp.sum(dim=1, keepdim=True)) @ v
        out = (u * mixed) @ held[f"{unit}o_dense.weight"].T + held.get(f"{unit}o_dense.bias", torch.zeros(1))
        x = norm(x + out)
        layer += 1
    return x @ held["cls.predictions.decoder.weight"].T


def flash_quad_logits(weights: Weights, tokens: Tensor, types: Tensor, *, longest: int = 64) -> Tensor:
    """JunnYu's FLASH-Quad of one text ``[s]``: pre-norm, relu^2 of q.k / longest + bias, BERT's head."""
    held = {name: tensor.double() for name, tensor in weights.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        if f"{name}.scala" in held:
            return x / (x.square().mean(dim=1, keepdim=True) + 1e-5).sqrt() * held[f"{name}.scala"]
        x = x - x.mean(dim=1, keepdim=True)
        return x / (x.square().mean(dim=1, keepdim=True) + 1e-5).sqrt() * held[f"{name}.weight"] + held[f"{name}.bias"]

    length, embeddings, head = tokens.shape[0], "flash_quad.embeddings.", "cls.predictions."
    x = held[f"{embeddings}word_embeddings.weight"][tokens] + held[f"{embeddings}token_type_embeddings.weight"][types]
    x = norm(x + sinusoids(length) * held[f"{embeddings}scaledsin_scalar"], f"{embeddings}LayerNorm")
    low, high = torch.arange(QK_DIM // 2), torch.arange(QK_DIM // 2, QK_DIM)
    for layer in range(DEPTH):
        unit = f"flash_quad.encoder.layer.{layer}."
        fused = silu(norm(x, f"{unit}LayerNorm") @ held[f"{unit}uv.weight"].T + held[f"{unit}uv.bias"])
        u, v, base = fused.split([EXPANDED, EXPANDED, QK_DIM], dim=1)
        q, k = (rotated(base * held[f"{unit}weight"][i] + held[f"{unit}bias"][i], low, high) for i in range(2))
        bias = torch.empty(length, length, dtype=torch.float64)
        if longest <= 512:
            for query in range(length):
                for key in range(length):
                    bias[query, key] = held[f"{unit}w"][key - query + longest - 1]
        else:
            a, b = (rotated(held[f"{unit}{name}"].repeat(length, 1), low, high) for name in "ab")
            bias = a @ b.T
        kernel = (q @ k.T / longest + bias).clamp(min=0).square()
        x = x + (u * (kernel @ v)) @ held[f"{unit}o.weight"].T + held[f"{unit}o.bias"]
    x = silu(x @ held[f"{head}transform.dense.weight"].T + held[f"{head}transform.dense.bias"])
    return norm(x, f"{head}transform.LayerNorm") @ held[f"{head}decoder.weight"].T + held[f"{head}bias"]
