"""The target's choice where its logits are: ``speculation.sampling`` in PyTorch, on a GPU or a CPU.

Penalties, noise and limits are computed as in ``speculation.sampling`` and in the same order, so a seed gives the same
text on host and device. Nothing here waits for the device: sizes depend on shapes alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from echo_trt.speculation.sampling.draw import BLOCK, CALLS, GREEDY, sample

_LOW = 0xFFFFFFFF
_PARTS = 32  # of a row, which a program each goes over; larger: few rows use more of a card
_DIGITS = (21, 11), (10, 11), (0, 10)  # shift and bits of a 32-bit key's digits, highest first


def choose(logits: Tensor, choice: dict[str, Tensor], limits: bool = True, max_top_k: int | None = None) -> Tensor:
    """Choose a token per row of ``logits`` float [n, V], by the arrays of a ``Choice``; masks may be missing.

    Without ``limits``, which only top-k 1 may break, no row is searched for tokens to shut out. ``max_top_k`` is
    ``Choice.largest_top_k``: without one, rows are searched as if some had a top-k and others had none.
    """
    logits = penalise(logits.to(torch.float32, copy=True), choice)
    logits.index_put_((choice["logit_bias_row"], choice["logit_bias_token"]), choice["logit_bias"], accumulate=True)
    if "masks" in choice:
        bits = (choice["masks"][:, :, None] >> torch.arange(8, device=logits.device)) & 1
        logits = torch.where(bits.flatten(1)[:, : logits.shape[1]] == 0, -torch.inf, logits)
    return draw(logits, choice, limits=limits, max_top_k=max_top_k)


def log_probabilities(logits: Tensor, tokens: Tensor, max_top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute log-probabilities of ``tokens`` int64 [n] at rows of ``logits`` float [n, V], and of the best ones.

    Returns float32 [n], and float32 and int64 [n, most]: ``max_top_k`` best tokens. Of tokens that tie the lowest ids
    are taken.
    """
    logits = logits.float()
    normaliser = logits.logsumexp(dim=1, keepdim=True)
    own = (logits.gather(1, tokens[:, None]) - normaliser)[:, 0]
    best = _largest(logits, max_top_k)
    return own, logits.gather(1, best) - normaliser, best


def draw(logits: Tensor, choice: dict[str, Tensor], limits: bool = True, max_top_k: int | None = None) -> Tensor:
    """Choose a token per row of ``logits`` float32 [n, V], as ``speculation.sampling.draw.sample`` does: int64 [n].

    choice     temperature, top_p and min_p float64 [n]; top_k, seed and place int64 [n], a seed's 64 bits
    limits     whether top-k, but for 1, top-p or min-p shuts tokens out anywhere
    max_top_k  as of ``choose``
    """
    temperature, top_k, seed, position = (choice[name] for name in ("temperature", "top_k", "seed", "position"))
    best = logits.argmax(dim=1)
    running = logits
    if limits:
        running = limited(logits, temperature, top_k, choice["top_p"], choice["min_p"], max_top_k)
    if running.device.type == "cpu":
        rows, heats, seeds, positions = (tensor.numpy() for tensor in (running, temperature, seed, position))
        off = np.zeros(len(seeds), np.int64)
        drawn = torch.from_numpy(sample(rows, heats, off, off + 1.0, seeds, positions))
    else:
        from echo_trt.backends.cuda import race_kernel

        inverse = 1 / temperature.clamp(min=GREEDY)
        drawn = race_by(race_kernel.race, running, logits.amax(dim=1), inverse, seed, position)
    return torch.where((temperature > GREEDY) & (top_k != 1), drawn, best)


def limited(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, max_top_k: int | None = None
) -> Tensor:
    """Shut tokens out by min-p, top-k and top-p, as ``speculation.sampling.draw.limited``: float32 [n, V].

    max_top_k  every drawn row's top-k is from 1 to ``max_top_k``, and only the ``max_top_k`` best tokens of a row are
               searched for
          top-p; 0: no row has a top-k; None: some may have one
    """
    size, peak = logits.shape[1], logits.amax(dim=1, keepdim=True)
    minimum = peak + (temperature * min_p.log()).float()[:, None]  # log 0 keeps all
    kept = torch.where(logits < minimum, -torch.inf, logits)
    if max_top_k and max_top_k < size:
        return _limited_among(kept, peak, temperature, top_k, top_p, max_top_k)
    if max_top_k != 0:
        shortened = (top_k > 0) & (top_k < size)
        count = torch.where(shortened, top_k, size).double()
        kept = torch.where(_fewest(_ordered(kept), torch.ones_like(kept).double(), count), kept, -torch.inf)
    # What is shut out weighs nothing; a temperature of 0 is greedy, and its row is not used.
    weights = ((kept - peak) / temperature.clamp(min=GREEDY).float()[:, None]).exp()
    mass = weights.double()
    nucleus = _fewest(weights.view(torch.int32).long(), mass, top_p * mass.sum(dim=1))
    return torch.where(nucleus | (top_p >= 1)[:, None], kept, -torch.inf)


def _limited_among(
    logits: Tensor, peak: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, max_top_k: int
) -> Tensor:
    """Shut tokens out by top-k, up to ``max_top_k``, and top-p. ``peak`` float32 [n, 1]: a row's largest logit."""
    tokens = _largest(logits, max_top_k)
    values = logits.gather(1, tokens)
    values = torch.where(torch.arange(max_top_k, device=logits.device) < top_k[:, None], values, -torch.inf)
    mass = ((values - peak) / temperature.clamp(min=GREEDY).float()[:, None]).exp().double()
    enough = (top_p * mass.sum(dim=1)).clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    nucleus = (mass.cumsum(dim=1) - mass < enough) | (top_p >= 1)[:, None]
    return torch.full_like(logits, -torch.inf).scatter_(1, tokens, torch.where(nucleus, values, -torch.inf))


def _largest(logits: Tensor, max_top_k: int) -> Tensor:
    """Return the tokens of a row's ``max_top_k`` largest logits, in order, of equal ones the lowest first: [n,
    most].
    """
    size = logits.shape[1]
    # A token's logit, and below it its index from the end: no two are equal, and of equal logits the first is larger.
    keys = (_ordered(logits) - (1 << 31) << 32) | torch.arange(size - 1, -1, -1, device=logits.device)
    return size - 1 - (keys.topk(max_top_k, dim=1).values & _LOW)


def _ordered(values: Tensor) -> Tensor:
    """Map float32 to int64 keys of 32 bits in the same order."""
    bits = (values + 0.0).view(torch.int32).long()  # + 0.0: of -0.0 and 0.0 none is larger
    return torch.where(bits < 0, -1 - bits, bits + (1 << 31)) & _LOW


def _fewest(keys: Tensor, amounts: Tensor, enough: Tensor) -> Tensor:
    """Mark the fewest items of the largest keys whose amounts reach ``enough``, at least one: bool [n, V].

    keys     int64 [n, V] of 32 bits
    amounts  float64 [n, V]
    enough   float64 [n]

    Of equal keys the first items are taken. A histogram a digit finds the last key, so nothing is sorted.
    """
    enough = enough.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    above = torch.zeros_like(enough)
    inside = torch.ones_like(keys, dtype=torch.bool)  # keys that begin with the digits of the last one
    threshold = torch.zeros_like(keys[:, :1])
    for shift, bits in _DIGITS:
        digit = (keys >> shift) & ((1 << bits) - 1)
        mass = amounts.new_zeros(len(keys), 1 << bits).scatter_add_(1, digit, torch.where(inside, amounts, 0.0))
        upward = mass.flip(1).cumsum(1).flip(1)  # of a digit and those above it
        edge = ((above + upward >= enough).sum(dim=1, keepdim=True) - 1).clamp(min=0)
        above = above + (upward - mass).gather(1, edge)
        inside &= digit == edge
        threshold = threshold | (edge << shift)
    equal = torch.where(inside, amounts, 0.0)
    return (keys > threshold) | (inside & (above + equal.cumsum(dim=1) - equal < enough))


def race_by(kernel: Any, running: Tensor, top: Tensor, inverse: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """Find who arrives first, as ``speculation.sampling.draw``, by a Triton ``kernel`` (race_kernel): int64 [n].

    running         float32 [n, V], -inf for tokens that are out
    top             float32 [n], the largest logit
    inverse         float64 [n], 1 / temperature
    seed, position  int64 [n]
    """
    count, size = running.shape
    parts = min(-(-size // BLOCK), _PARTS)
    span = -(-size // (parts * BLOCK)) * BLOCK
    arrivals = top.new_empty((count, parts * CALLS), dtype=torch.float64)
    tokens = seed.new_empty((count, parts * CALLS))
    facts = running.contiguous(), top.double(), inverse, seed, position
    kernel[count, parts](*facts, arrivals, tokens, size, span, CALLS=CALLS)
    return tokens.gather(1, arrivals.argmax(dim=1, keepdim=True))[:, 0]


def penalise(logits: Tensor, choice: dict[str, Tensor]) -> Tensor:
    """Apply penalties in place, as ``speculation.sampling.penalties.penalise``; returns ``logits`` float32 [n, V].

    choice  said_row and said_token int64 [k]: a token said before that row; said_generated bool [k]: else it is the
            prompt's; repetition, presence and frequency float64 [n]
    """
    row, token = choice["history_row"], choice["history_token"]
    repeats = choice["repetition"][row]
    value, factor = logits[row, token].double(), repeats.clamp(min=1e-6)
    logits[row, token] = torch.where(value > 0, value / factor, value * factor).float()  # x / 1 is x
    times = torch.zeros_like(logits, dtype=torch.int32)
    times.index_put_((row, token), choice["history_generated"].to(torch.int32), accumulate=True)
    times = times[row, token].double()
    less = torch.where(times > 0, choice["presence"][row] + choice["frequency"][row] * times, 0.0)
    logits[row, token] = (logits[row, token].double() - less).float()
    return logits
