"""Who takes part in ``bench_kernels.py``: one candidate for each op and provider, built only when its turn comes.

A core gets its queries, keys, values and gate ready made, the same tensors for every provider, and gives gradients
for all of them. A pair or layer gets ``[b, s, d]`` and gives gradients for it and for its weights. Nobody rotates
queries and keys: a Transformer would rotate 2d features of a token, two gated attention units 8z or 4z.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from kernel_rooflines import (
    Costs,
    Sizes,
    gau_pair_costs,
    linear_costs,
    mixed_chunk_costs,
    out_pass_costs,
    quadratic_costs,
    softmax_costs,
    transformer_layer_costs,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchtune.modules import FeedForward, MultiHeadAttention, TransformerSelfAttentionLayer

import flash_plugin
from flash_plugin.kernels import linear_attention, mixed_chunk_attention, quadratic_attention

OPS = (
    "mixed_chunk_attention",
    "quadratic_attention",
    "linear_attention",
    "softmax_attention",
    "flash_pair",
    "flash_quad_pair",
    "transformer_layer",
)
#: The op whose providers the others of an op are to be compared with; their own where none is named.
RIVAL_OP = {"flash_pair": "transformer_layer", "flash_quad_pair": "transformer_layer"}
OUT_PASS = "torch.bmm of the out pass"
_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}

Forward = Callable[[], Tensor]
#: A forward pass and the tensors that its backward must give gradients for.
Built = tuple[Forward, list[Tensor]]


class Candidate(NamedTuple):
    """A provider of an op: its work, and how to build it."""

    op: str
    provider: str
    costs: Costs
    build: Callable[[], Built]

    @property
    def is_rival(self) -> bool:
        """Whether it is somebody else's implementation of the op, not ours and not a part of it."""
        return not self.provider.startswith("ours") and self.provider != OUT_PASS


class Inputs:
    """Random tensors of one problem, made when first asked for and shared by all who take them."""

    def __init__(self, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> None:
        self.sizes = sizes
        self.device = device
        self.dtype = dtype
        self._gradients: dict[int, Tensor] = {}

    def tensor(self, *shape: int) -> Tensor:
        """Draw a leaf that wants a gradient."""
        return torch.randn(shape, device=self.device, dtype=self.dtype).requires_grad_()

    def tokens(self, width: int) -> Tensor:
        """Draw ``[b, s, width]``."""
        return self.tensor(self.sizes.batch, self.sizes.seq_len, width)

    @cached_property
    def qk(self) -> list[Tensor]:
        """Local queries and keys, then global ones, each ``[b, s, z]``."""
        return [self.tokens(self.sizes.qk_dim) for _ in range(4)]

    @cached_property
    def v(self) -> Tensor:
        """Values, ``[b, s, e]``."""
        return self.tokens(self.sizes.expanded_dim)

    @cached_property
    def gate(self) -> Tensor:
        """Gate, ``[b, s, e]``."""
        return self.tokens(self.sizes.expanded_dim)

    @cached_property
    def values_and_gate(self) -> Tensor:
        """Both as the one projection of FLASH-pytorch gives them, ``[b, s, 2e]``."""
        return torch.cat([self.v, self.gate], dim=-1).detach().requires_grad_()

    @cached_property
    def heads(self) -> list[Tensor]:
        """Queries, keys and values of multi-head attention, each ``[b, h, s, d / h]``."""
        sizes = self.sizes
        shape = (sizes.batch, sizes.embed_dim // sizes.head_dim, sizes.seq_len, sizes.head_dim)
        return [self.tensor(*shape) for _ in range(3)]

    @cached_property
    def x(self) -> Tensor:
        """Hidden states, ``[b, s, d]``."""
        return self.tokens(self.sizes.embed_dim)

    def gradient(self, out: Tensor) -> Tensor:
        """A random gradient for a result, the same memory for all results of that size."""
        if out.numel() not in self._gradients:
            self._gradients[out.numel()] = torch.randn(out.numel(), device=self.device, dtype=self.dtype)
        return self._gradients[out.numel()].view(out.shape)

    def place(self, module: nn.Module) -> nn.Module:
        """Move a module's floating-point tensors to where the inputs are."""
        return module.to(device=self.device, dtype=self.dtype)


def candidates(inputs: Inputs) -> list[Candidate]:
    """Everybody, whether or not they can run here."""
    sizes = inputs.sizes
    mixed, quadratic, linear = mixed_chunk_costs(sizes), quadratic_costs(sizes), linear_costs(sizes)
    pair, quad_pair = gau_pair_costs(sizes, mixed), gau_pair_costs(sizes, quadratic)
    layer = transformer_layer_costs(sizes)
    found = []
    for impl in ("triton", "reference"):
        ours = f"ours, {impl}"
        found += [
            Candidate("mixed_chunk_attention", ours, mixed, partial(_our_mixed_chunk, inputs, impl)),
            Candidate("quadratic_attention", ours, quadratic, partial(_our_quadratic, inputs, impl)),
            Candidate("linear_attention", ours, linear, partial(_our_linear, inputs, impl)),
            Candidate("flash_pair", ours, pair, partial(_our_pair, inputs, impl, quad=False)),
            Candidate("flash_quad_pair", ours, quad_pair, partial(_our_pair, inputs, impl, quad=True)),
        ]
    found += [
        Candidate("mixed_chunk_attention", OUT_PASS, out_pass_costs(sizes), partial(_out_pass, inputs)),
        Candidate("mixed_chunk_attention", "FLASH-pytorch FLASH", mixed, partial(_their_mixed_chunk, inputs)),
        Candidate("quadratic_attention", "FLASH-pytorch GAU", quadratic, partial(_their_quadratic, inputs)),
        Candidate("flash_pair", "FLASH-pytorch FLASH", pair, partial(_their_pair, inputs)),
        Candidate("linear_attention", "fla chunk_simple_gla", linear, partial(_fla_simple_gla, inputs)),
        Candidate("linear_attention", "fla chunk_linear_attn", linear, partial(_fla_linear, inputs)),
    ]
    for name, backend in _BACKENDS.items():
        provider = f"SDPA, {name}"
        found += [
            Candidate("softmax_attention", provider, softmax_costs(sizes), partial(_softmax, inputs, backend)),
            Candidate("transformer_layer", provider, layer, partial(_transformer_layer, inputs, backend)),
        ]
    return sorted(found, key=lambda candidate: OPS.index(candidate.op))


def _our_mixed_chunk(inputs: Inputs, impl: str) -> Built:
    v, gate, size = inputs.v, inputs.gate, inputs.sizes.chunk_size
    return lambda: mixed_chunk_attention(*inputs.qk, v, gate=gate, chunk_size=size, impl=impl), [*inputs.qk, v, gate]


def _our_quadratic(inputs: Inputs, impl: str) -> Built:
    (q, k, *_), v, gate = inputs.qk, inputs.v, inputs.gate
    return lambda: quadratic_attention(q, k, v, gate=gate, impl=impl), [q, k, v, gate]


def _our_linear(inputs: Inputs, impl: str) -> Built:
    *_, q, k = inputs.qk
    v, scale = inputs.v, inputs.sizes.qk_dim**-0.5
    return lambda: linear_attention(*(t.unsqueeze(1) for t in (q, k, v)), scale=scale, impl=impl), [q, k, v]


def _our_pair(inputs: Inputs, impl: str, *, quad: bool) -> Built:
    sizes = inputs.sizes
    arguments = {
        "vocab_size": 8,
        "num_layers": 2,
        "embed_dim": sizes.embed_dim,
        "max_seq_len": sizes.seq_len,
        "expansion": sizes.expanded_dim / sizes.embed_dim,
        "qk_dim": sizes.qk_dim,
        "rope_dim": 0,
        "impl": impl,
    }
    model = (
        flash_plugin.flash_quad(**arguments) if quad else flash_plugin.flash(**arguments, chunk_size=sizes.chunk_size)
    )
    return _block(inputs, nn.Sequential(*model.layers))


def _block(inputs: Inputs, module: nn.Module) -> Built:
    x, module = inputs.x, inputs.place(module)
    return lambda: module(x), [x, *module.parameters()]


def _out_pass(inputs: Inputs) -> Built:
    sizes = inputs.sizes
    chunks, width = sizes.tokens // sizes.chunk_size, sizes.chunk_size + sizes.qk_dim
    weights, values = (inputs.tensor(chunks, *s) for s in ((sizes.chunk_size, width), (width, sizes.expanded_dim)))
    return lambda: torch.bmm(weights, values), [weights, values]


def _softmax(inputs: Inputs, backend: SDPBackend) -> Built:
    def forward() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*inputs.heads, is_causal=True)

    return forward, inputs.heads


def _transformer_layer(inputs: Inputs, backend: SDPBackend) -> Built:
    d, head_dim = inputs.sizes.embed_dim, inputs.sizes.head_dim
    names = ("q_proj", "k_proj", "v_proj", "output_proj")
    projections = {name: nn.Linear(d, d, bias=False) for name in names}
    heads = d // head_dim
    attention = MultiHeadAttention(
        embed_dim=d,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        max_seq_len=inputs.sizes.seq_len,
        **projections,
    )
    network = FeedForward(
        gate_proj=nn.Linear(d, 4 * d, bias=False), down_proj=nn.Linear(4 * d, d, bias=False), activation=nn.GELU()
    )
    layer = TransformerSelfAttentionLayer(attention, network, sa_norm=nn.RMSNorm(d), mlp_norm=nn.RMSNorm(d))
    run, wanted = _block(inputs, layer)

    def forward() -> Tensor:
        with sdpa_kernel(backend):
            return run()

    return forward, wanted


class _Supply(nn.Module):
    """Stands in for a projection: gives ready-made tensors, whatever it is given."""

    def __init__(self, tensors: Tensor | list[Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def forward(self, _: Tensor) -> Tensor | list[Tensor]:
        return self.tensors


class _Catch(nn.Module):
    """Stands in for the projection behind the core: keeps what reaches it, passes on one feature of it."""

    caught: Tensor | None = None

    def forward(self, core: Tensor) -> Tensor:
        self.caught = core
        return core[..., :1]


def _core_of(inputs: Inputs, module: nn.Module, supplied: dict[str, Tensor | list[Tensor]]) -> Built:
    """FLASH-pytorch's own forward with its norm and projections replaced, so that its attention core is what is left.

    Its T5 bias is computed and added, as its layer does on every call, but takes no gradient: ours has no bias here.
    """
    module = inputs.place(module).requires_grad_(False)
    catch = _Catch()
    for name, tensors in supplied.items():
        setattr(module, name, _Supply(tensors))
    module.to_out = catch
    x = torch.zeros(inputs.sizes.batch, inputs.sizes.seq_len, 1, device=inputs.device, dtype=inputs.dtype)

    def forward() -> Tensor:
        module(x)
        core, catch.caught = catch.caught, None
        assert core is not None
        return core

    wanted = [t for tensors in supplied.values() for t in (tensors if isinstance(tensors, list) else [tensors])]
    return forward, [tensor for tensor in wanted if tensor.requires_grad]


def _flash_pytorch_arguments(sizes: Sizes) -> dict[str, object]:
    expansion = sizes.expanded_dim / sizes.embed_dim
    return {"dim": sizes.embed_dim, "query_key_dim": sizes.qk_dim, "expansion_factor": expansion, "causal": True}


def _their_mixed_chunk(inputs: Inputs) -> Built:
    from flash_pytorch import FLASH

    layer = FLASH(group_size=inputs.sizes.chunk_size, **_flash_pytorch_arguments(inputs.sizes))
    q_local, k_local, q_global, k_global = inputs.qk
    nothing = torch.empty(0)
    qk = [q_local, q_global, k_local, k_global]
    supplied = {"norm": nothing, "to_hidden": inputs.values_and_gate, "to_qk": nothing, "qk_offset_scale": qk}
    return _core_of(inputs, layer, supplied)


def _their_quadratic(inputs: Inputs) -> Built:
    from flash_pytorch import GAU

    layer = GAU(add_residual=False, **_flash_pytorch_arguments(inputs.sizes))
    nothing = torch.empty(0)
    supplied = {"norm": nothing, "to_hidden": inputs.values_and_gate, "to_qk": nothing, "offsetscale": inputs.qk[:2]}
    return _core_of(inputs, layer, supplied)


def _their_pair(inputs: Inputs) -> Built:
    from flash_pytorch import FLASH

    arguments = _flash_pytorch_arguments(inputs.sizes)
    return _block(inputs, nn.Sequential(*(FLASH(group_size=inputs.sizes.chunk_size, **arguments) for _ in range(2))))


def _fla_simple_gla(inputs: Inputs) -> Built:
    from fla.ops.simple_gla import chunk_simple_gla

    *_, q, k = inputs.qk
    v = inputs.v
    decay = F.logsigmoid(torch.randn(*q.shape[:2], 1, device=inputs.device)).requires_grad_()
    return lambda: chunk_simple_gla(*(t.unsqueeze(2) for t in (q, k, v)), decay)[0], [q, k, v, decay]


def _fla_linear(inputs: Inputs) -> Built:
    from fla.ops.linear_attn import chunk_linear_attn

    *_, q, k = inputs.qk
    v = inputs.v
    return lambda: chunk_linear_attn(*(t.unsqueeze(2) for t in (q, k, v)), normalize=False)[0], [q, k, v]
