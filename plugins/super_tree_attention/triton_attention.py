"""The operator by its Triton kernels, on CUDA tensors, or slowly in Triton's interpreter on CPU tensors."""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor

from super_tree_attention import kernel
from super_tree_attention.kernel_plan import MAX_SPLITS, ROUNDING, plan, registers_of, steps_for, warps_of


def super_tree_attention_triton(
    query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, past_lens: Tensor,
    seq_begins: Tensor, block_indices: Tensor, block_begins: Tensor, tree_mask: Tensor, tree_mask_begins: Tensor,
    sliding_window: int = 0, *, out: Tensor | None = None, num_splits: int | None = None, rows: int | None = None,
) -> Tensor:  # fmt: skip
    """Compute the reference's result from its arguments, and write the new rows into the caches, in place.

    Types are float16, bfloat16 or float32. Rows without a request (from seq_begins[B] on) are left unwritten. The
    result is written to ``out``, where it is given. ``num_splits`` and ``rows`` override the launch plan's choice.
    """
    _, kv_heads, block, head_dim = key_cache.shape
    num_tokens, width = query.shape
    if not num_tokens:
        return torch.empty_like(query) if out is None else out
    group = width // (kv_heads * head_dim)
    processors, compute_capability = _card(query.device)
    entries = len(block_indices)
    if sliding_window:  # a request sees so many blocks of its past, at most
        entries = min(entries, len(past_lens) * (sliding_window // block + 3))
    launch = plan(
        num_tokens, len(past_lens), entries, kv_heads, group, head_dim=head_dim, block=block,
        processors=processors, compute_capability=compute_capability, num_splits=num_splits, rows=rows,
    )  # fmt: skip
    splits, steps = launch.num_splits, steps_for(launch.rows, compute_capability, query.element_size(), head_dim)
    output = torch.empty_like(query) if out is None else out
    scratch = (num_tokens * kv_heads * group, splits) if splits > 1 else (0, 0)
    partial = query.new_empty((*scratch, head_dim), dtype=torch.float32)
    partial_lse = query.new_empty(scratch, dtype=torch.float32)
    kernels = _kernels(query.device)
    kernels.attention[launch.grid](
        query.contiguous(), key.contiguous(), value.contiguous(), key_cache, value_cache,
        past_lens, seq_begins, block_indices, block_begins, tree_mask, tree_mask_begins,
        len(past_lens), launch.wanted_splits, num_tokens, len(key_cache), len(block_indices), len(tree_mask),
        output, partial, partial_lse,
        HEAD_DIM=head_dim, GROUP=group, BLOCK=block, ROWS=launch.rows, KEYS=steps.keys, NEW_KEYS=steps.new_keys,
        WINDOW=sliding_window,
        num_warps=warps_of(launch.rows), maxnreg=registers_of(launch.rows), num_stages=steps.stages, **ROUNDING,
    )  # fmt: skip
    if splits > 1:
        kernels.combine[launch.combine_grid](
            past_lens, seq_begins, block_begins, partial, partial_lse,
            len(past_lens), launch.wanted_splits, len(block_indices), splits, output,
            HEAD_DIM=head_dim, BLOCK=block, MAX_SPLITS=triton.next_power_of_2(max(splits, MAX_SPLITS)),
            WINDOW=sliding_window, **ROUNDING,
        )  # fmt: skip
    return output


def move_rows(pools: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy rows source[j] to target[j] in every pool. All sources are read before a target is written.

    pools           [L2, num_blocks, Hk, block, D], contiguous
    source, target  int32 or int64 [m]; row r is in block r // block at r % block
    """
    layers, num_blocks, kv_heads, block, head_dim = pools.shape
    if not len(source):
        return
    rows = pools.new_empty((layers, len(source), kv_heads, head_dim))
    copy = _kernels(pools.device).copy_rows[len(source), layers]
    sizes = {"HEAD_DIM": head_dim, "BLOCK": block} | ROUNDING
    copy(pools, rows, source, target, kv_heads, num_blocks, **sizes, GATHER=True)
    copy(rows, pools, source, target, kv_heads, num_blocks, **sizes, GATHER=False)


def _kernels(device: torch.device) -> ModuleType:
    return kernel if device.type == "cuda" else _interpreted()


@functools.cache
def _interpreted() -> ModuleType:
    """Load a copy of the kernels' module for Triton's interpreter."""
    spec = importlib.util.spec_from_file_location(f"{kernel.__name__}_interpreted", kernel.__file__)
    module = importlib.util.module_from_spec(spec)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        spec.loader.exec_module(module)
    module._dot = _wide_dot
    return module


def _wide_dot(a: tl.tensor, b: tl.tensor, acc: tl.tensor) -> tl.tensor:
    """Multiply in float32: the interpreter's product takes the bits of bfloat16 for integers."""
    return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")


@functools.cache
def _card(device: torch.device) -> tuple[int, int]:
    """Return multiprocessors and compute capability; for a CPU, where programs run in turn, of a small H100."""
    if device.type != "cuda":
        return 8, 90
    facts = torch.cuda.get_device_properties(device)
    return facts.multi_processor_count, 10 * facts.major + facts.minor
