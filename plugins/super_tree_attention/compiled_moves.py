"""The move of KV rows by kernels compiled ahead of time: no C compiler is needed, unlike for Triton's launcher."""

from __future__ import annotations

import torch
from torch import Tensor

from super_tree_attention.ahead_of_time import HEAD_DIMS, CompiledKernel, compile_kernel
from super_tree_attention.launch import device_facts, launch, load

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def can_move(pools: Tensor) -> bool:
    """Return whether there are compiled kernels for ``pools``, [L2, num_blocks, Hk, block, D]."""
    return pools.dtype in _TYPES and pools.shape[-1] in HEAD_DIMS


def move_rows(pools: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy rows source[j] to target[j] in every pool, as ``triton_attention.move_rows``, on the current stream.

    pools           fp16 or bf16 [L2, num_blocks, Hk, block, D], contiguous, D as in HEAD_DIMS
    source, target  int32 or int64 [m]
    """
    layers, num_blocks, kv_heads, block, head_dim = pools.shape
    if not len(source):
        return
    source, target = source.long(), target.long()
    rows = pools.new_empty((layers, len(source), kv_heads, head_dim))
    stream = torch.cuda.current_stream(pools.device).cuda_stream
    capability, _ = device_facts()
    for kind, read, written in (("gather_rows", pools, rows), ("scatter_rows", rows, pools)):
        kernel = compile_kernel(kind, capability, _TYPES[pools.dtype], head_dim, block=block)
        pointers = [tensor.data_ptr() for tensor in (read, written, source, target)]
        # Two null pointers: Triton's scratch memory, of no size.
        launch(_loaded(kernel), (len(source), layers, 1), kernel.threads, kernel.shared, stream, pointers,
               [kv_heads, num_blocks], [0, 0])  # fmt: skip


def _loaded(kernel: CompiledKernel) -> object:
    return load(kernel.cubin, kernel.name, kernel.shared)
