"""The layers that the decoder and the EAGLE-3 head share.

Tokens of all requests are packed along the first axis, so there is no batch axis and no padding. A layer gives its
packed query, key and value to the caller's ``attend``, which knows how keys and values are cached.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from echo_trt.models.config import DecoderConfig, Eagle3Config
from echo_trt.models.ranks import all_reduce

#: (layer, query [N, Hq*D], key [N, Hk*D], value [N, Hk*D]) -> output [N, Hq*D]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
Config = DecoderConfig | Eagle3Config
#: Takes the number of a part of a matrix, and returns how its checkpoint has that: ``checkpoint.HasBlocks.stored``.
ReadBlocks = Callable[[int], tuple[str, Tensor]]


def sum_ranks(part: Tensor, ranks: int) -> Tensor:
    """Add the parts that the ranks have of a layer's output."""
    return part if ranks == 1 else all_reduce(part, ranks)


def widened(weight: Tensor, x: Tensor) -> Tensor:
    """Convert a weight that is stored in a narrower type to the type of ``x``; exact, and nothing where it has it."""
    return weight if weight.dtype == x.dtype else weight.to(x.dtype)


def fused(x: Tensor) -> ModuleType | None:
    """Return Triton kernels of a layer's small steps, where ``x`` is on a GPU and nothing is trained or exported."""
    if x.device.type != "cuda" or not torch.is_inference_mode_enabled():
        return None
    from super_tree_attention import layer_kernels

    return layer_kernels


class Linear(nn.Linear):
    """A matrix product in the type of its input; its matrix may be stored in a narrower one."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False):
        super().__init__(inputs, outputs, bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, widened(self.weight, x), self.bias)


class Embedding(nn.Embedding):
    """An embedding that draws no weights on the meta device, for which torch would import its compiler."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def add(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return x + delta and its norm; ``delta`` may be missing."""
        if delta is not None and (kernels := fused(x)):
            return kernels.add_norm(x, delta, self.weight, self.eps)
        x = x if delta is None else x + delta
        return x, self(x)


class Rotary(nn.Module):
    """Rotary position embedding (arXiv 2104.09864) from a table, so that low precision never touches an angle."""

    def __init__(self, config: Config, positions: int):
        super().__init__()
        with torch.device("cpu"):  # on the meta device torch would import its compiler, which takes seconds
            inv_freq, scale = rope_frequencies(config)
            angles = torch.arange(positions, dtype=torch.float32)[:, None] * inv_freq.repeat(2)[None, :]
        self.register_buffer("cos", angles.cos() * scale, persistent=False)
        self.register_buffer("sin", angles.sin() * scale, persistent=False)
        base = config.local_rope_theta
        plain = replace(config, rope_theta=base, rope_scaling={}, local_rope_theta=0.0)
        self.local = Rotary(plain, positions) if base else None  # of the layers with a window

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Look up cos and sin, float32 [N, 1, 1, D] both, of ``positions``, int [N]."""
        return self.cos[positions][:, None, None], self.sin[positions][:, None, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [N, H, 1, D] by the angles of its tokens' positions; narrower angles rotate a head's first numbers.

    Compilers recognise these very steps on four axes as rotary embedding, and make one kernel of them.
    """
    turned, rest = cos.shape[-1], x.shape[-1] - cos.shape[-1]
    if rest:
        part, kept = x.split((turned, rest), dim=-1)
        return torch.cat((rotate(part, cos, sin), kept), dim=-1)
    half = turned // 2
    first, second = x.split((half, half), dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def rope_frequencies(config: Config) -> tuple[Tensor, Tensor | float]:
    """Return inverse frequencies, float32 [D/2], and the factor on cos and sin, one or of each number [D]."""
    dim = getattr(config, "rotary_dim", config.head_dim)
    scaling = {"rope_theta": config.rope_theta, **config.rope_scaling}
    if scaling.get("rope_type", "divisors") == "divisors":
        divisors = torch.tensor(scaling.get("divisors", 1.0))
        factor = torch.tensor(scaling.get("attention_factor", 1.0))
        frequencies = config.rope_theta ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim) / divisors
        return frequencies, factor.repeat(2) if factor.ndim else factor
    from transformers import LlamaConfig  # takes a second, and few networks need it
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    shape = LlamaConfig(rope_parameters=scaling, head_dim=dim, max_position_embeddings=config.max_position)
    scaled: tuple[Tensor, float] = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](shape)
    return scaled


class Attention(nn.Module):
    """Grouped-query attention with one merged projection, and what some families have: QK norm, a bias, no rotary."""

    def __init__(self, config: Config, layer: int, input_size: int, qk_norm: bool):
        super().__init__()
        self.layer, self.ranks, self.head_dim = layer, config.ranks, config.head_dim
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads
        self.rotated = layer not in config.unrotated_layers
        self.qkv = Linear(input_size, (self.heads + 2 * self.kv_heads) * self.head_dim, config.attention_bias)
        self.out = Linear(self.heads * self.head_dim, config.hidden_size)
        self.query_norm = RMSNorm(self.head_dim, config.norm_eps) if qk_norm else None
        self.key_norm = RMSNorm(self.head_dim, config.norm_eps) if qk_norm else None

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, rows: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Attend with x [N, input_size].

        rows  of a block drafter: for each packed row its row of x, int [N], and the output's packed rows, int [R]
        """
        projected = self.qkv(x) if rows is None else self.qkv(x)[rows[0]]
        output = attend(self.layer, *self._divided(projected, cos, sin))
        return sum_ranks(self.out(output if rows is None else output[rows[1]]), self.ranks)

    def _divided(self, projected: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Divide ``projected`` into query, key and value, with the first two normed and rotated where they are."""
        heads, norms = (self.heads, self.kv_heads), None
        if self.query_norm is not None:
            norms = self.query_norm.weight, self.key_norm.weight, self.query_norm.eps
        if self.rotated and (kernels := fused(projected)):
            return kernels.rotated(projected, cos, sin, *heads, norms)
        both, value = projected.split((sum(heads) * self.head_dim, self.kv_heads * self.head_dim), dim=-1)
        both = both.unflatten(-1, (sum(heads), 1, self.head_dim))
        if norms:
            query, key = both.split(heads, dim=1)
            both = torch.cat((self.query_norm(query), self.key_norm(key)), dim=1)
        both = rotate(both, cos, sin) if self.rotated else both
        query, key = both.flatten(1).split([h * self.head_dim for h in heads], dim=-1)
        return query, key, value


class MLP(nn.Module):
    """A gated MLP of SiLU or, with ``gelu``, of GELU by tanh, with gate and up projections merged."""

    def __init__(self, hidden: int, intermediate: int, ranks: int = 1, gelu: bool = False):
        super().__init__()
        self.ranks, self.gelu = ranks, gelu
        self.gate_up = Linear(hidden, 2 * intermediate)
        self.down = Linear(intermediate, hidden)

    def forward(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up(x)
        if not self.gelu and (kernels := fused(x)):
            return sum_ranks(self.down(kernels.silu_mul(gate_up)), self.ranks)
        gate, up = gate_up.chunk(2, dim=-1)
        return sum_ranks(self.down(self.activated(gate) * up), self.ranks)

    def activated(self, gate: Tensor) -> Tensor:
        return F.gelu(gate, approximate="tanh") if self.gelu else F.silu(gate)


class Experts(nn.Module):
    """A mixture of experts (Qwen3-MoE).

    Where PyTorch has grouped products (``has_grouped_products``), an expert computes the tokens that were routed to it
    (``_routed``). Elsewhere, and in exported graphs, which have standard operators alone, every expert computes every
    token, and weights of zero drop the rest (``_dense``), at E/k times the arithmetic.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        hidden, size, count = config.hidden_size, config.expert_size, config.num_experts
        self.ranks = config.ranks
        self.top_k, self.normalise = config.experts_per_token, config.norm_expert_weights
        self.router = Linear(hidden, count)
        self.gate_up = nn.Parameter(torch.empty(count, 2 * size, hidden))
        self.down = nn.Parameter(torch.empty(count, hidden, size))

    def forward(self, x: Tensor) -> Tensor:
        """Mix the outputs of the chosen experts for x [N, H]; returns [N, H]."""
        probs, top, chosen = self.choose(x)
        if has_grouped_products(x, self.down):
            return sum_ranks(self._routed(x, top.to(x.dtype), chosen), self.ranks)
        weights = torch.zeros_like(probs).scatter(-1, chosen, top).to(x.dtype)
        return sum_ranks(self._dense(x, weights), self.ranks)

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return all experts' shares [N, E], and the weights [N, k] of the chosen ones, int [N, k]."""
        probs = self.router(x).float().softmax(dim=-1)
        top, chosen = probs.topk(self.top_k, dim=-1)
        return probs, top / top.sum(dim=-1, keepdim=True) if self.normalise else top, chosen

    def _dense(self, x: Tensor, weights: Tensor) -> Tensor:
        """Compute all experts for x [N, H] and add them by ``weights`` [N, E]."""
        gate_up, down = (widened(weight, x).transpose(1, 2) for weight in (self.gate_up, self.down))
        copies = x.unsqueeze(0).expand(len(gate_up), -1, -1)  # OpenVINO 2026.4 loses all rows of a broadcast [1, N, H]
        gate, up = torch.matmul(copies, gate_up).chunk(2, dim=-1)  # [E, N, size]
        outputs = torch.matmul(F.silu(gate) * up, down)  # [E, N, H]
        return (outputs * weights.t().unsqueeze(-1)).sum(dim=0)

    def _routed(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Compute the ``chosen`` experts, int [N, k], for x [N, H] and add them by ``weights`` [N, k].

        Rows are sorted by expert, and one grouped product takes all. No size depends on the routing, as graphs need.
        """
        expert, order = chosen.flatten().sort(stable=True)
        experts = torch.arange(len(self.gate_up), device=x.device)
        ends = torch.searchsorted(expert, experts, right=True, out_int32=True)  # int32 [E], each expert's last row + 1
        gate_up, down = (widened(weight, x).transpose(1, 2) for weight in (self.gate_up, self.down))
        pairs, kernels = F.grouped_mm(x[order // self.top_k], gate_up, offs=ends), fused(x)  # [N k, 2 * size]
        gate, up = pairs.chunk(2, dim=-1)
        active = kernels.silu_mul(pairs) if kernels else F.silu(gate) * up
        outputs = F.grouped_mm(active, down, offs=ends)[order.argsort()]  # [N k, H], by token again
        return (outputs.unflatten(0, chosen.shape) * weights.unsqueeze(-1)).sum(dim=1)


def has_grouped_products(x: Tensor, down: Tensor) -> bool:
    """Tell whether PyTorch can multiply groups of rows like ``x`` [N, H] by ``down`` [E, H, size] on the device alone.

    Its kernel takes bfloat16 on compute capabilities 9.x and 10.x; for the rest it loops over groups on the host, which
    no CUDA graph can hold (ATen/native/cuda/GroupedBlas.cpp, PyTorch 2.10). Rows have to be multiples of 16 bytes. On a
    CPU a group of one row rounds otherwise than a larger one, so a text would depend on its neighbours.
    """
    fits = x.dtype == torch.bfloat16 and not any(size * x.element_size() % 16 for size in down.shape[1:])
    return x.device.type == "cuda" and fits and torch.cuda.get_device_capability(x.device)[0] in (9, 10)
