"""FLASH-pytorch 0.1.9 with its weights copied into our modules gives the same logits."""

import warnings

import pytest
import torch
from torch import nn

import flash_plugin
from flash_plugin.components.positions import T5Bias
from tests.tolerances import assert_close

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    flash_pytorch = pytest.importorskip("flash_pytorch")  # the extra `dev` installs it

VOCABULARY, DIM, QK_DIM, GROUP, DEPTH = 50, 48, 40, 16, 2


@torch.no_grad()
def copy_unit(theirs: nn.Module, ours: flash_plugin.GatedAttentionUnit, qk_order: tuple[int, ...]) -> None:
    """Copy projections, offset-scale and relative bias of a FLASH-pytorch layer."""
    hidden, qk = theirs.to_hidden[0], theirs.to_qk[0]
    expanded = hidden.out_features // 2
    for name in ("weight", "bias"):
        values, gate = getattr(hidden, name).split(expanded)
        getattr(ours.v_proj, name).copy_(values)
        getattr(ours.gate_proj, name).copy_(gate)
        getattr(ours.qk_proj, name).copy_(getattr(qk, name))
    out = theirs.to_out[0] if isinstance(theirs.to_out, nn.Sequential) else theirs.to_out
    ours.output_proj.load_state_dict(out.state_dict())
    offset_scale = theirs.qk_offset_scale if hasattr(theirs, "qk_offset_scale") else theirs.offsetscale
    ours.offset_scale.gamma.copy_(offset_scale.gamma[list(qk_order)])
    ours.offset_scale.beta.copy_(offset_scale.beta[list(qk_order)])
    ours.mixer.position_bias.weight.copy_(theirs.rel_pos_bias.relative_attention_bias.weight[:, 0])


@torch.no_grad()
def copy_norm(theirs: nn.Module, ours: nn.Module) -> None:
    if isinstance(ours, nn.LayerNorm):
        ours.load_state_dict(theirs.state_dict())
    else:
        ours.scale.copy_(theirs.g)


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Weights that reach every part: FLASH-pytorch starts with queries and keys near zero."""
    for name, parameter in model.named_parameters():
        if "freqs" not in name:
            parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.5) + (parameter == 1))


def transformer(laplace: bool, norm: str, shift: bool, causal: bool, reduce_groups: bool = True) -> nn.Module:
    model = flash_pytorch.FLASHTransformer(
        dim=DIM,
        num_tokens=VOCABULARY,
        depth=DEPTH,
        group_size=GROUP,
        query_key_dim=QK_DIM,
        causal=causal,
        norm_type=norm,
        shift_tokens=shift,
        laplace_attn_fn=laplace,
        reduce_group_non_causal_attn=reduce_groups,
    ).eval()
    randomize(model)
    return model


def ours_like(theirs: nn.Module, laplace: bool, norm: str, shift: bool, causal: bool) -> nn.Module:
    model = flash_plugin.flash(
        vocab_size=VOCABULARY,
        num_layers=DEPTH,
        embed_dim=DIM,
        max_seq_len=256,
        qk_dim=QK_DIM,
        chunk_size=GROUP,
        activation="laplace" if laplace else "relu2",
        normalizer="chunk",
        position_bias="t5",
        rope_dim=32,
        absolute_position=True,
        norm=norm,
        norm_eps=1e-5,
        token_shift=shift,
        causal=causal,
        proj_bias=True,
        output_bias=True,
        final_norm="layernorm",
    ).eval()
    with torch.no_grad():
        model.tok_embeddings.load_state_dict(theirs.token_emb.state_dict())
        model.absolute_position.scale.copy_(theirs.abs_pos_emb.scale)
        for layer, their_layer in zip(model.layers, theirs.layers, strict=True):
            copy_norm(their_layer.norm, layer.sa_norm)
            # Theirs: quad_q, lin_q, quad_k, lin_k. Ours: local q, k, global q, k.
            copy_unit(their_layer, layer.attn, (0, 2, 1, 3))
        model.norm.load_state_dict(theirs.to_logits[0].state_dict())
        model.output.load_state_dict(theirs.to_logits[1].state_dict())
    return model


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("norm", ["scalenorm", "layernorm"])
@pytest.mark.parametrize("laplace", [True, False])
def test_transformer_gives_the_same_logits(laplace: bool, norm: str, shift: bool, causal: bool) -> None:
    torch.manual_seed(0)
    theirs = transformer(laplace, norm, shift, causal)
    ours = ours_like(theirs, laplace, norm, shift, causal)
    for length in (1, GROUP, 3 * GROUP, 5 * GROUP + 7):
        tokens = torch.randint(VOCABULARY, (2, length))
        with torch.no_grad():
            assert_close(ours(tokens), theirs(tokens), "parity_fp32")


@pytest.mark.parametrize("laplace", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_padding_mask_gives_the_same_logits_at_real_tokens(laplace: bool, causal: bool) -> None:
    # Right padding: with left padding theirs shifts the chunk grid and positions, which is one of its defects.
    torch.manual_seed(1)
    theirs = transformer(laplace, "layernorm", False, causal)
    ours = ours_like(theirs, laplace, "layernorm", False, causal)
    for length in (2 * GROUP, 3 * GROUP + 5):
        tokens = torch.randint(VOCABULARY, (2, length))
        mask = torch.arange(length) < torch.tensor([[length - 6], [length - GROUP - 3]])
        with torch.no_grad():
            assert_close(ours(tokens, mask=mask)[mask], theirs(tokens, mask=mask)[mask], "parity_fp32")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("laplace", [True, False])
def test_gated_attention_unit_gives_the_same_output(laplace: bool, causal: bool) -> None:
    torch.manual_seed(2)
    theirs = flash_pytorch.GAU(dim=DIM, query_key_dim=QK_DIM, causal=causal, laplace_attn_fn=laplace).eval()
    randomize(theirs)
    bias = T5Bias(multiplier=DIM**0.5, causal=causal, divide_by_length=True)
    mixer = flash_plugin.QuadraticMixer(
        position_bias=bias, activation="laplace" if laplace else "relu2", normalizer="chunk", causal=causal
    )
    unit = flash_plugin.GatedAttentionUnit(
        embed_dim=DIM, expanded_dim=2 * DIM, qk_dim=QK_DIM, mixer=mixer, proj_bias=True
    )
    ours = flash_plugin.FlashLayer(unit, sa_norm=nn.LayerNorm(DIM)).eval()
    copy_norm(theirs.norm, ours.sa_norm)
    copy_unit(theirs, unit, (0, 1))
    for length in (1, 37, 160):
        x = torch.randn(2, length, DIM)
        mask = torch.arange(length) < torch.tensor([[length], [(length + 1) // 2]])
        from flash_plugin.kernels import make_segments

        with torch.no_grad():
            assert_close(ours(x), theirs(x), "parity_fp32")
            # Padding to the same tensor length: the quadratic form divides by it.
            masked = x + unit(ours.sa_norm(x), make_segments(padding_mask=mask))
            assert_close(masked[mask], theirs(x, mask=mask)[mask], "parity_fp32")
