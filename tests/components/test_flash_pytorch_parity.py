"""FLASH-pytorch 0.1.9 with its weights converted to ours gives the same logits."""

import warnings

import pytest
import torch
from torch import nn

import flash_plugin
from flash_plugin.components.conversion import convert_to_ours
from flash_plugin.components.conversion_flash import unit_rules
from flash_plugin.components.positions import T5Bias
from flash_plugin.kernels import make_segments
from tests.tolerances import assert_close

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    flash_pytorch = pytest.importorskip("flash_pytorch")  # the extra `dev` installs it

VOCABULARY, DIM, QK_DIM, GROUP, DEPTH = 50, 48, 40, 16, 2


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


def ours_like(theirs: nn.Module, laplace: bool, shift: bool, causal: bool) -> nn.Module:
    options = dict(group_size=GROUP, laplace_attn_fn=laplace, shift_tokens=shift, causal=causal, max_seq_len=256)
    converted = convert_to_ours("flash_pytorch", theirs.state_dict(), options)
    model = flash_plugin.flash(**{key: value for key, value in converted.arguments.items() if key != "_component_"})
    model.load_state_dict(converted.weights)
    return model.eval()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("norm", ["scalenorm", "layernorm"])
@pytest.mark.parametrize("laplace", [True, False])
def test_transformer_gives_the_same_logits(laplace: bool, norm: str, shift: bool, causal: bool) -> None:
    torch.manual_seed(0)
    theirs = transformer(laplace, norm, shift, causal)
    ours = ours_like(theirs, laplace, shift, causal)
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
    ours = ours_like(theirs, laplace, False, causal)
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
    rules = unit_rules(
        "", "", expanded_dim=2 * DIM, norm="layernorm", offset_scale="offsetscale", order=(0, 1), to_out="to_out.0"
    )
    weights, own = theirs.state_dict(), {}
    for rule in rules:
        own.update(zip(rule.ours, rule.to_ours([weights[key] for key in rule.theirs]), strict=True))
    ours.load_state_dict(own)
    for length in (1, 37, 160):
        x = torch.randn(2, length, DIM)
        mask = torch.arange(length) < torch.tensor([[length], [(length + 1) // 2]])
        with torch.no_grad():
            assert_close(ours(x), theirs(x), "parity_fp32")
            # Padding to the same tensor length: the quadratic form divides by it.
            masked = x + unit(ours.sa_norm(x), make_segments(padding_mask=mask))
            assert_close(masked[mask], theirs(x, mask=mask)[mask], "parity_fp32")
