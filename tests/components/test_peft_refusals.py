"""What a config can get wrong about adapters is told in a sentence."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchtune.modules.peft import DoRALinear, get_merged_lora_ckpt

from tests.components.test_peft import ALPHA, RANK, adapted


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(lora_attn_modules=["q_proj", "v_proj"]), ["q_proj", "gate_proj, v_proj, qk_proj, output_proj"]),
        (dict(lora_attn_modules=["output"]), ["lora_attn_modules (['output'])", "gate_proj"]),
        (dict(lora_attn_modules="v_proj"), ["lora_attn_modules ('v_proj')", "list"]),
        (dict(lora_attn_modules=None), ["lora_attn_modules (None)", "list"]),
        (
            dict(lora_attn_modules=["w1"], attention_layers=[0]),
            ["w1", "q_proj, k_proj, v_proj, output_proj, gate_proj"],
        ),
        (dict(apply_lora_to_mlp=1), ["apply_lora_to_mlp (1)", "True or False"]),
        (dict(apply_lora_to_mlp=True), ["apply_lora_to_mlp (True)", "False", "gate_proj,v_proj,qk_proj,output_proj"]),
        (dict(apply_lora_to_output=True, tie_embeddings=True), ["apply_lora_to_output (True)", "tie_embeddings"]),
        (dict(apply_lora_to_output="no"), ["apply_lora_to_output ('no')", "True or False"]),
        (dict(lora_rank=0), ["lora_rank (0)", "positive integer"]),
        (dict(lora_rank=4.0), ["lora_rank (4.0)", "positive integer"]),
        (dict(lora_alpha="16"), ["lora_alpha ('16')", "positive number"]),
        (dict(lora_dropout=1.0), ["lora_dropout (1.0)", "[0, 1)"]),
        (dict(use_dora=1), ["use_dora (1)", "True or False"]),
        (dict(use_dora=True, proj_bias=True), ["use_dora (True)", "layers.0.attn.gate_proj", "proj_bias=False"]),
        (
            dict(quantize_base=True, embed_dim=64),
            ["quantize_base (True)", "layers.0.attn.gate_proj", "128 x 64", "16384"],
        ),
        (dict(lora_attn_modules=[], quantize_base=True), ["lora_attn_modules ([])", "quantize_base=True"]),
        (dict(lora_attn_modules=[], use_dora=True), ["lora_attn_modules ([])", "use_dora=True"]),
        (dict(lora_rnak=4), ["lora_rnak (4)", "did you mean lora_rank?"]),
        (dict(chunck_size=4), ["chunck_size (4)", "did you mean chunk_size?"]),
    ],
)
def test_bad_arguments_get_a_sentence(arguments: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        adapted(**arguments)
    for word in words:
        assert word in str(caught.value)


def test_a_dora_bias_is_refused_because_the_host_merges_it_wrongly() -> None:
    layer = DoRALinear(8, 8, rank=RANK, alpha=ALPHA, use_bias=True)
    with torch.no_grad():
        layer.bias.fill_(1.0)
        layer.magnitude.fill_(3.0)
        merged = get_merged_lora_ckpt(dict(layer.state_dict(prefix="m.")), RANK, ALPHA)
        x = torch.randn(4, 8)
        assert (nn.functional.linear(x, merged["m.weight"], merged["m.bias"]) - layer(x)).abs().max() > 0.1
