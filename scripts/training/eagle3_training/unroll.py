"""Training-time test (EAGLE-3, arXiv 2503.01840): the head trained on its own outputs, as it will be used.

Row r starts a chain at entry r. Step 0 reads the target's features of all entries up to r; step s is entry r+s, reads
the chain's own output of step s-1 and sees the features' keys up to r and the chain's s own keys. Counting rows by
where their chain starts makes the mask over the features' keys the same at every step.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from eagle3_training.corpus import Batch
from echo_trt.models.config import Eagle3Config
from echo_trt.models.eagle3 import Eagle3Head

STEP_DISCOUNT = 0.8  # a later step matters only where those before it were accepted
ROWS = 32  # of logits that are worked on at once: they stay in the cache meanwhile


class ChainAttention:
    """The head's ``attend``: the first call computes step 0 over all entries, each later one the chains' next step."""

    def __init__(self, batch: Batch, config: Eagle3Config):
        self.heads, self.dim, self.rows = config.num_kv_heads, config.head_dim, batch.rows
        index = torch.arange(batch.sequence.numel(), device=batch.rows.device)
        visible = (batch.sequence[:, None] == batch.sequence[None, :]) & (index[:, None] >= index[None, :])
        self.hidden = torch.where(visible, 0.0, -torch.inf)
        self.key: Tensor | None = None
        self.own: list[tuple[Tensor, Tensor]] = []

    def __call__(self, _layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query = query.unflatten(-1, (self.heads, -1, self.dim)).permute(1, 2, 0, 3) * self.dim**-0.5  # [Hk, G, R, D]
        key, value = (t.unflatten(-1, (self.heads, 1, self.dim)).permute(1, 2, 0, 3) for t in (key, value))
        if self.key is None:
            self.key, self.value = key, value
        else:
            if not self.own:
                self.hidden = self.hidden[self.rows]
            self.own.append((key, value))
        scores = [query @ self.key.transpose(-1, -2) + self.hidden]
        scores += [(query * k).sum(-1, keepdim=True) for k, _ in self.own]
        weights = torch.cat(scores, dim=-1).softmax(dim=-1)
        seen, *own = weights.split([self.key.shape[-2], *[1] * len(self.own)], dim=-1)
        output = seen @ self.value
        for weight, (_, v) in zip(own, self.own, strict=True):
            output = output + weight * v
        return output.permute(2, 0, 1, 3).flatten(1)


def unroll(head: Eagle3Head, batch: Batch, features: Tensor, steps: int) -> Iterator[Tensor]:
    """Logits [R, draft vocabulary] of each step; those of step s at row r predict what row r+s predicts at step 0."""
    attend = ChainAttention(batch, head.config)
    none = features.new_zeros(0, head.config.hidden_size)
    state = head(batch.token_ids, features, none, batch.positions, attend)[batch.rows]
    yield head.logits(state)
    for step in range(1, steps):
        entry = (batch.rows + step).clamp(max=batch.token_ids.numel() - 1)
        state = head(batch.token_ids[entry], features[:0], state, batch.positions[entry], attend)
        yield head.logits(state)


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
