"""The kernel against PyTorch's attention on padded batches, and against what this card's memory can move."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from echo_trt.decoding.pack import BLOCK
from gpu_proof_parts.calls import Shape, random_call
from gpu_proof_parts.report import Proof
from super_tree_attention.triton_attention import super_tree_attention_triton

#: B, context, N; Qwen3-8B's heads
SHAPES = ((1, 32_768, 64), (32, 2048, 256), (256, 1024, 512))
SMALL = ((1, 64, 4), (2, 32, 4))


def prove(proof: Proof) -> None:
    rng = np.random.default_rng(0)
    ceiling = copy_bandwidth(proof.device, 2**22 if proof.interpret else 2**30)
    proof.say(f"A copy of a large array moves {ceiling / 1e9:,.0f} GB/s, reads and writes counted: the ceiling.")
    rows, figures = [], []
    for requests, context, tokens in SMALL if proof.interpret else SHAPES:
        if not proof.in_time:
            proof.lacks(f"B = {requests} for lack of time")
            continue
        heads, kv_heads, head_dim, dtype = (
            (4, 2, 16, torch.float32) if proof.interpret else (32, 8, 128, torch.bfloat16)
        )
        past, counts = np.full(requests, context), np.full(requests, tokens // requests)
        shape = Shape(past, counts, requests, heads, kv_heads, head_dim, dtype)
        call = random_call(shape, rng, proof.device)
        seconds = measured(lambda call=call: super_tree_attention_triton(**call), proof.device)
        other, same = against_padded(call, shape, proof.device)
        proof.expect(same, f"B={requests}: the kernel and PyTorch's attention differ")
        rate = shape.kv_bytes / seconds
        figures.append(
            {"requests": requests, "context": context, "tokens": tokens, "us": 1e6 * seconds, "of_copy": rate / ceiling}
        )
        told = f"{1e6 * seconds:,.1f}", f"{rate / 1e9:,.0f}", f"{rate / ceiling:.0%}"
        rows.append((f"{requests} x {context}", tokens, f"{shape.kv_bytes / 1e6:,.0f}", *told,
                     f"{1e6 * other:,.1f}", f"{other / seconds:.2f}x"))  # fmt: skip
    proof.table(
        ("B x context", "N", "KV, MB", "kernel, us", "KV GB/s", "of the ceiling", "SDPA padded, us", "speedup"), rows
    )
    proof.record(copy_gb_per_s=ceiling / 1e9, kernel=figures)
    proof.say(
        "SDPA reads keys and values that lie in one piece for each request; gathering them from the pool is not "
        "counted, and the kernel's time includes writing the new rows. Caches are flushed before every run."
    )


def against_padded(call: dict[str, Tensor], shape: Shape, device: torch.device) -> tuple[float, bool]:
    """Seconds of PyTorch's attention, NaN where it takes too much memory, and whether both compute the same."""
    try:
        padded = padded_batch(call, shape)
        seconds = measured(lambda: F.scaled_dot_product_attention(*padded, enable_gqa=True), device)
        theirs = F.scaled_dot_product_attention(*padded, enable_gqa=True)
    except torch.OutOfMemoryError:  # it may copy keys and values for every query head
        return float("nan"), True
    return seconds, agree(super_tree_attention_triton(**call), theirs, shape)


def padded_batch(call: dict[str, Tensor], shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query, key, value [B, heads, T, D] and the mask [B, 1, T, T_kv], of requests that are all alike."""
    requests, past, count = len(shape.past), int(shape.past[0]), int(shape.counts[0])
    blocks = call["block_indices"].view(requests, -1)
    position = torch.arange(past, device=blocks.device)
    rows = blocks[:, position // BLOCK], position % BLOCK
    parts = []
    for pool, new in (("key_cache", "key"), ("value_cache", "value")):
        old = call[pool][rows[0], :, rows[1].expand(requests, -1)]  # [B, past, Hk, D]
        parts.append(
            torch.cat((old, call[new].view(requests, count, shape.kv_heads, -1)), 1).transpose(1, 2).contiguous()
        )
    tree = call["tree_mask"].view(requests, 1, count, count).bool()
    mask = torch.cat((tree.new_ones(requests, 1, count, past), tree), dim=-1)
    query = call["query"].view(requests, count, shape.heads, -1).transpose(1, 2).contiguous()
    return query, *parts, mask


def agree(ours: Tensor, theirs: Tensor, shape: Shape) -> bool:
    theirs = theirs.transpose(1, 2).reshape(ours.shape)
    bound = 1e-4 if shape.dtype == torch.float32 else 3e-2
    return bool((ours - theirs).abs().max() <= bound * theirs.abs().max())


def measured(run: Callable[[], object], device: torch.device) -> float:
    """Seconds: the median of many runs, with caches flushed between them."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return 1e-3 * do_bench(run, warmup=100, rep=300, return_mode="median")
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes a second that a copy of ``size`` bytes reads and writes."""
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / measured(lambda: target.copy_(source), device)
