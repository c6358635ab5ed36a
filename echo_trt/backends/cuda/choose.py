"""The target's choice where its logits are: ``speculation.sampling`` by Triton kernels on a GPU.

A seed gives the same text on host and device. Nothing here waits for the device but the copy of the tokens.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from echo_trt.backends.cuda.calls import Staging
from echo_trt.backends.cuda.transfers import fetch
from echo_trt.speculation.sampling import draw as host
from echo_trt.speculation.sampling.draw import GREEDY, SamplingBatch, part_of
from super_tree_attention.kernel_plan import ROUNDING, SAMPLING

_LOW = 0xFFFFFFFF
#: Bytes of logits in float32, and of counts beside them, that penalties and biases change at once. Larger: fewer
#: launches, and more memory that the KV pool must leave free.
_AT_ONCE = 256 << 20
_ENTRIES = 1024  # of penalties and biases that a program writes
_LANES = 512  # of a sampling program, for four tokens each; larger: more registers
_NO_MASK = np.zeros((0, 0), np.uint8)


def choose(
    logits: Tensor,
    rows: np.ndarray,
    choice: SamplingBatch,
    parent: np.ndarray | None = None,
    drafted: np.ndarray | None = None,
    kernels: Any = None,
) -> np.ndarray:
    """Choose a token at ``rows`` int64 [n] of ``logits`` float [m, V], by ``choice``: int64 [n].

    parent   int64 [n], where rows are nodes of trees: an index of an earlier row, or -1
    drafted  int64 [n], the nodes' own tokens. Where another one is chosen at the parent, the walk cannot visit the
             node, which may get -2 in place of a token
    kernels  the module of the kernels, or an interpreted copy; by default the kernels on a GPU, and on a CPU the host's
             choice
    """
    if len(rows) == 0:
        return np.zeros(0, np.int64)
    if kernels is None:
        if logits.device.type == "cpu":
            return host.choose(logits[torch.from_numpy(rows)].float().numpy(), choice)
        from super_tree_attention import sampling_kernels as kernels
    none = np.full(len(rows), -1)
    parent, drafted = none if parent is None else parent, none if drafted is None else drafted
    tokens = torch.full((len(rows),), -1, dtype=torch.int64, device=logits.device)
    adjusted = np.zeros(len(rows), bool)
    adjusted[choice.history_row] = adjusted[choice.logit_bias_row] = True
    changed, size = adjusted.nonzero()[0], max(_AT_ONCE // (8 * logits.shape[1]), 1)
    for part in ((~adjusted).nonzero()[0], *np.split(changed, range(size, len(changed), size))):
        if len(part):
            nodes = {"row": rows[part], "index": part, "parent": parent[part], "drafted": drafted[part]}
            _launch(kernels, logits, nodes, part_of(choice, part), tokens)
    return fetch(tokens)


def _launch(kernels: Any, logits: Tensor, nodes: dict[str, np.ndarray], c: SamplingBatch, tokens: Tensor) -> None:
    """Choose at ``nodes``, by arrays [n] as of the kernel ``sample``, which writes to ``tokens``."""
    size = logits.shape[1]
    drawn = (c.temperature > GREEDY) & (c.top_k != 1)
    gap = np.where(c.min_p > 0, c.temperature * np.log(np.maximum(c.min_p, 1e-300)), -np.inf).astype(np.float32)
    arrays = (
        {field.name: getattr(c, field.name) for field in fields(c)}
        | nodes
        | {
            "own": np.arange(len(drawn)),
            "inverse": np.where(drawn, 1 / np.maximum(c.temperature, GREEDY), 0.0),
            "heat": np.maximum(c.temperature, GREEDY).astype(np.float32),
            "gap": gap,
            "top_k": np.where((c.top_k > 0) & (c.top_k < size), c.top_k, size + 1),
            "history_generated": c.history_generated.astype(np.int32),
            "masks": _NO_MASK if c.masks is None else c.masks,
        }
    )
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    sent = Staging(arrays, logits.device).upload(arrays)
    if len(c.history_row) or len(c.logit_bias_row):
        logits = _changed(kernels, logits, sent)
        sent["row"] = sent["own"]
    names = "row", "index", "parent", "drafted", "inverse", "heat", "gap", "top_k", "top_p", "seed", "position"
    facts = [sent[name] for name in names]
    shape = {"MASKED": c.masks is not None, "LANES": _LANES} | SAMPLING | ROUNDING
    kernels.sample[len(drawn),](logits, sent["masks"], *facts, tokens, size, arrays["masks"].shape[1], **shape)


def _changed(kernels: Any, logits: Tensor, sent: dict[str, Tensor]) -> Tensor:
    """Return rows of logits, float32 [n, V], with penalties and biases."""
    rows, size = sent["row"], logits.shape[1]
    block = {"BLOCK": _ENTRIES} | ROUNDING
    out = logits[rows].float() if logits.dtype != torch.float32 else logits[rows]
    if count := len(sent["history_row"]):
        grid, entries = (-(-count // _ENTRIES),), (sent["history_row"], sent["history_token"])
        times = torch.zeros(out.shape, dtype=torch.int32, device=out.device)
        kernels.add_at[grid](times, *entries, sent["history_generated"], count, size, **block)
        factors = sent["repetition"], sent["presence"], sent["frequency"]
        kernels.penalise[grid](logits, rows, out, *entries, times, *factors, count, size, **block)
    if count := len(sent["logit_bias_row"]):
        grid, entries = (-(-count // _ENTRIES),), (sent["logit_bias_row"], sent["logit_bias_token"])
        kernels.add_at[grid](out, *entries, sent["logit_bias"], count, size, **block)
    return out


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


def _largest(logits: Tensor, max_top_k: int) -> Tensor:
    """Return the tokens of a row's ``max_top_k`` largest logits, in order, of equal ones the lowest first: [n,
    most].
    """
    size = logits.shape[1]
    bits = (logits + 0.0).view(torch.int32).long()  # + 0.0: of -0.0 and 0.0 none is larger
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    # A token's logit, and below it its index from the end: no two are equal, and of equal logits the first is larger.
    keys = (ordered << 32) | torch.arange(size - 1, -1, -1, device=logits.device)
    return size - 1 - (keys.topk(max_top_k, dim=1).values & _LOW)
