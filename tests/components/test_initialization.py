"""Weights drawn from scratch, without a recipe; what recipes get of them is in test_checkpointer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchtune import training

from flash_plugin.components.checkpointer import FlashCheckpointer
from flash_plugin.components.initialization import InitialWeights, initialize_weights
from tests.components.test_checkpointer import EMBEDDING, MODEL, build, digest
from tests.components.test_cross_attention_models import fused


def test_embeddings_start_as_wide_as_asked(tmp_path: Path) -> None:
    def weights(**arguments: float) -> dict[str, Tensor]:
        checkpointer = FlashCheckpointer(output_dir=str(tmp_path), init_model=MODEL, **arguments)
        return dict(checkpointer.load_checkpoint()[training.MODEL_KEY])

    narrow, wide = weights(), weights(init_embedding_std=1.0)
    torch.testing.assert_close(wide.pop(EMBEDDING), narrow.pop(EMBEDDING) / 0.02)
    assert digest(wide) == digest(narrow)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_that_modules_share_are_the_same_under_every_name(tied: bool) -> None:
    model = build(num_layers=4, tie_embeddings=tied)
    model.layers[1] = model.layers[0]  # a layer used twice
    model.layers[3].attn.v_proj.weight = model.layers[2].attn.v_proj.weight  # a weight of two modules
    weights = InitialWeights(model, seed=3)
    initialize_weights(model, seed=3)
    expected = model.state_dict()
    assert list(weights) == list(expected)
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("decoder", ["flash", "torchtune"])
def test_fusion_layers_weights_have_their_names_in_the_state_dict(decoder: str) -> None:
    model = fused(decoder, "quadratic")
    with torch.device("meta"):
        weights = InitialWeights(fused(decoder, "quadratic"), seed=3)
    initialize_weights(model, seed=3)
    assert digest(dict(weights)) == digest(model.state_dict())
    fused(decoder, "quadratic").load_state_dict(dict(weights), strict=True)
