"""Training-time test (EAGLE-3, arXiv 2503.01840): the head trained on its own outputs, as it will be used.

Row r starts a chain at entry r. Step 0 reads the target's features of all entries up to r; step s is entry r+s, reads
the chain's own output of step s-1 and sees the features' keys up to r and the chain's s own keys. Counting rows by
where their chain starts makes the mask over the features' keys the same at every step.

A block drafter (P-EAGLE) differs in what steps after the first read: a mask's token and state, of which all are known
before the pass.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from echo_trt.models.block import ParallelEagle
from echo_trt.models.config import BlockConfig, Eagle3Config
from echo_trt.models.eagle3 import Eagle3Head
from echo_trt_lab.training.corpus import Batch

STEP_DISCOUNT = 0.8  # a later step matters only where those before it were accepted
ROWS = 32  # of logits that are worked on at once: they stay in the cache meanwhile


class ChainAttention:
    """The head's ``attend``: a layer's first call is step 0 over all entries, each later one the chains' next step."""

    def __init__(self, batch: Batch, config: Eagle3Config | BlockConfig):
        self.heads, self.dim, self.rows = config.num_kv_heads, config.head_dim, batch.rows
        index = torch.arange(batch.sequence.numel(), device=batch.rows.device)
        visible = (batch.sequence[:, None] == batch.sequence[None, :]) & (index[:, None] >= index[None, :])
        self.hidden = torch.where(visible, 0.0, -torch.inf)
        self.hidden_of_chains = self.hidden[batch.rows]
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values of the entries, by layer
        self.own: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)  # of the chains' steps

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query = query.unflatten(-1, (self.heads, -1, self.dim)).permute(1, 2, 0, 3) * self.dim**-0.5  # [Hk, G, R, D]
        key, value = (t.unflatten(-1, (self.heads, 1, self.dim)).permute(1, 2, 0, 3) for t in (key, value))
        hidden, chain = self.hidden, self.own[layer]
        if layer in self.seen:
            hidden = self.hidden_of_chains
            chain.append((key, value))
        else:
            self.seen[layer] = key, value
        keys, values = self.seen[layer]
        scores = [query @ keys.transpose(-1, -2) + hidden]
        scores += [(query * k).sum(-1, keepdim=True) for k, _ in chain]
        weights = torch.cat(scores, dim=-1).softmax(dim=-1)
        seen, *own = weights.split([keys.shape[-2], *[1] * len(chain)], dim=-1)
        output = seen @ values
        for weight, (_, v) in zip(own, chain, strict=True):
            output = output + weight * v
        return output.permute(2, 0, 1, 3).flatten(1)


def unroll(head: Eagle3Head, batch: Batch, features: Tensor, steps: int) -> Iterator[Tensor]:
    """Logits [R, draft vocabulary] of each step; those of step s at row r predict what row r+s predicts at step 0."""
    attend = ChainAttention(batch, head.config)
    block = isinstance(head, ParallelEagle)
    state = _layers(head, batch.token_ids, head.combine(features), batch.positions, attend)[batch.rows]
    yield head.logits(state)
    for step in range(1, steps):
        entry = (batch.rows + step).clamp(max=batch.token_ids.numel() - 1)
        tokens = batch.token_ids[entry]
        if block:
            tokens, state = torch.full_like(tokens, head.config.mask_token), head.mask_state.expand(len(entry), -1)
        state = _layers(head, tokens, state, batch.positions[entry], attend)
        yield head.logits(state)


def _layers(head: Eagle3Head, tokens: Tensor, state: Tensor, positions: Tensor, attend: ChainAttention) -> Tensor:
    cos, sin = head.rotary(positions)
    state = head.advance(tokens, state, cos, sin, attend)
    for layer in head.layers if isinstance(head, ParallelEagle) else ():
        state = layer(state, cos, sin, attend)
    return state


def chain_loss(head: Eagle3Head, batch: Batch, features: Tensor, target: Tensor, steps: int) -> Tensor:
    """Soft cross-entropy with the target's distribution over the draft vocabulary [R, V], averaged over the steps."""
    total, weights = features.new_zeros(()), 0.0
    for step, logits in enumerate(unroll(head, batch, features, steps)):
        ahead = batch.reaches(step)
        surprise = Surprise.apply(logits[: ahead.numel()], target[step:])
        total = total + STEP_DISCOUNT**step * (surprise * ahead).sum() / ahead.sum().clamp(min=1)
        weights += STEP_DISCOUNT**step
    return total / weights


class Surprise(torch.autograd.Function):
    """Cross-entropy [R], float32, of ``logits`` [R, V] with the distributions ``target`` [R, V].

    Its gradient is computed along the way, a few rows at a time: over a whole [R, V] each operation would go through
    the memory, which takes longer than the matrix products of a step.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor) -> Tensor:
        surprise, gradient = logits.new_empty(logits.shape[0], dtype=torch.float32), torch.empty_like(logits)
        for begin in range(0, logits.shape[0], ROWS):
            rows = slice(begin, begin + ROWS)
            some = logits[rows].float()
            total = some.logsumexp(dim=-1, keepdim=True)
            surprise[rows] = total.squeeze(-1) - torch.linalg.vecdot(target[rows], some)
            gradient[rows] = (some - total).exp_().sub_(target[rows])
        ctx.save_for_backward(gradient)
        return surprise

    @staticmethod
    def backward(ctx, outer: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[:, None].to(gradient.dtype), None
