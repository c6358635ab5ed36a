"""What TensorRT asks of the plugins: outputs, types, and how a kernel is launched. Importing this registers them.

Annotations are read when a function is registered, so they stay objects here (no postponed evaluation).
"""

from typing import Any

import tensorrt as trt
import tensorrt.plugin as trtp

from super_tree_attention.ahead_of_time import CompiledKernel, compile_kernel
from super_tree_attention.kernel_plan import MIN_SPLIT_KEYS, ROWS, plan
from super_tree_attention.tensorrt_plugin import ATTENTION, COMBINE, NAMESPACE, relist_parameters
from super_tree_attention.tensorrt_rules import ATTENTION_ORDER, COMBINE_ORDER, split_count, tile_count

Desc, Tensor = trtp.TensorDesc, trtp.Tensor
Launch = tuple[bytes, bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]
_ATTENTION, _COMBINE = f"{NAMESPACE}::{ATTENTION}", f"{NAMESPACE}::{COMBINE}"
_BLOCK = 32
_TYPES = {trt.DataType.HALF: "fp16", trt.DataType.BF16: "bf16"}


@trtp.register(_ATTENTION)
def _describe_attention(
    query: Desc,
    key: Desc,
    value: Desc,
    key_cache: Desc,
    value_cache: Desc,
    past_lens: Desc,
    seq_begins: Desc,
    block_indices: Desc,
    block_begins: Desc,
    tree_mask: Desc,
    tree_mask_begins: Desc,
    num_kv_heads: int,
    head_dim: int,
    alias_caches: int,
) -> tuple[Desc, Desc, Desc, Desc, Desc]:
    tokens, heads = query.shape_expr[0], query.shape_expr[1] // head_dim
    sizes = tokens, past_lens.shape_expr[0], block_indices.shape_expr[0]
    splits = split_count(*sizes, heads // num_kv_heads, num_kv_heads, _BLOCK, _card()[1], trtp)
    rows = tokens * heads
    partial = trtp.from_shape_expr((rows, splits, head_dim), trt.float32)
    partial_lse = trtp.from_shape_expr((rows, splits), trt.float32)
    written = [cache.aliased() if alias_caches else cache.like() for cache in (key_cache, value_cache)]
    return query.like(), partial, partial_lse, *written


@trtp.register(_COMBINE)
def _describe_combine(
    past_lens: Desc, seq_begins: Desc, partial: Desc, partial_lse: Desc, attended: Desc, head_dim: int
) -> Desc:
    return attended.aliased()  # requests of one split are done already


# One combination of types and one tactic, so that there is nothing to time: TensorRT times with numbers of its own, and
# block tables must be real.
@trtp.autotune(_ATTENTION)
def _types_of_attention(
    query: Desc,
    key: Desc,
    value: Desc,
    key_cache: Desc,
    value_cache: Desc,
    past_lens: Desc,
    seq_begins: Desc,
    block_indices: Desc,
    block_begins: Desc,
    tree_mask: Desc,
    tree_mask_begins: Desc,
    outputs: tuple[Desc],
) -> list[trtp.AutoTuneCombination]:
    own = _type_name(query)
    return [trtp.AutoTuneCombination(", ".join([own] * 5 + ["INT32"] * 6 + [own, "FP32", "FP32", own, own]))]


@trtp.autotune(_COMBINE)
def _types_of_combine(
    past_lens: Desc, seq_begins: Desc, partial: Desc, partial_lse: Desc, attended: Desc, outputs: tuple[Desc]
) -> list[trtp.AutoTuneCombination]:
    own = _type_name(attended)
    return [trtp.AutoTuneCombination(", ".join(["INT32", "INT32", "FP32", "FP32", own, own]))]


@trtp.aot_impl(_ATTENTION)
def _compile_attention(
    query: Desc,
    key: Desc,
    value: Desc,
    key_cache: Desc,
    value_cache: Desc,
    past_lens: Desc,
    seq_begins: Desc,
    block_indices: Desc,
    block_begins: Desc,
    tree_mask: Desc,
    tree_mask_begins: Desc,
    num_kv_heads: int,
    head_dim: int,
    alias_caches: int,
    outputs: tuple[Desc],
    tactic: int,
) -> Launch:
    group = query.shape[1] // (num_kv_heads * head_dim)
    usual = (_usual(query), _usual(past_lens), _usual(block_indices))
    rows = _rows(*usual, num_kv_heads, group)
    kernel = _kernel("attention", query.dtype, head_dim, group, rows)
    requests = past_lens.shape_expr[0]
    launch = _launch_params(
        kernel, tile_count(query.shape_expr[0], requests, rows, group), num_kv_heads, outputs[1].shape_expr[1]
    )
    integers = trtp.SymIntExprs.from_tuple((trtp.SymInt32(requests), trtp.SymInt32(MIN_SPLIT_KEYS)))
    return kernel.name.encode(), relist_parameters(kernel.ptx, ATTENTION_ORDER).encode(), launch, integers


@trtp.aot_impl(_COMBINE)
def _compile_combine(
    past_lens: Desc,
    seq_begins: Desc,
    partial: Desc,
    partial_lse: Desc,
    attended: Desc,
    head_dim: int,
    outputs: tuple[Desc],
    tactic: int,
) -> Launch:
    kernel = _kernel("combine", attended.dtype, head_dim)
    launch = _launch_params(kernel, attended.shape_expr[0], attended.shape_expr[1] // head_dim, 1)
    integers = past_lens.shape_expr[0], MIN_SPLIT_KEYS, partial.shape_expr[1]
    extra = trtp.SymIntExprs.from_tuple(tuple(trtp.SymInt32(i) for i in integers))
    return kernel.name.encode(), relist_parameters(kernel.ptx, COMBINE_ORDER).encode(), launch, extra


@trtp.impl(_ATTENTION)
def _launch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    past_lens: Tensor,
    seq_begins: Tensor,
    block_indices: Tensor,
    block_begins: Tensor,
    tree_mask: Tensor,
    tree_mask_begins: Tensor,
    num_kv_heads: int,
    head_dim: int,
    outputs: tuple[Tensor],
    stream: int,
) -> None:
    from super_tree_attention.launch import launch

    inputs = query, key, value, key_cache, value_cache, past_lens, seq_begins, block_indices, block_begins
    inputs = *inputs, tree_mask, tree_mask_begins
    for cache, written in zip((key_cache, value_cache), outputs[3:], strict=True):
        if cache.data_ptr != written.data_ptr:
            raise RuntimeError("a cache's output is not bound to the cache's own memory")
    tokens, requests, splits = query.shape[0], past_lens.shape[0], outputs[1].shape[1]
    group = query.shape[1] // (num_kv_heads * head_dim)
    rows = _rows(tokens, requests, block_indices.shape[0], num_kv_heads, group)
    kernel = _kernel("attention", query.dtype, head_dim, group, rows)
    grid = tile_count(tokens, requests, rows, group), num_kv_heads, splits
    results = [*(o.data_ptr for o in outputs[:3]), 0, 0]  # two null pointers: Triton's scratch memory, of no size
    launch(_loaded(kernel), grid, kernel.threads, kernel.shared, stream,
           [t.data_ptr for t in inputs], [requests, MIN_SPLIT_KEYS], results)  # fmt: skip


@trtp.impl(_COMBINE)
def _launch_combine(
    past_lens: Tensor,
    seq_begins: Tensor,
    partial: Tensor,
    partial_lse: Tensor,
    attended: Tensor,
    head_dim: int,
    outputs: tuple[Tensor],
    stream: int,
) -> None:
    from super_tree_attention.launch import launch

    kernel = _kernel("combine", attended.dtype, head_dim)
    grid = attended.shape[0], attended.shape[1] // head_dim, 1
    integers = [past_lens.shape[0], MIN_SPLIT_KEYS, partial.shape[1]]
    pointers = [t.data_ptr for t in (past_lens, seq_begins, partial, partial_lse)]
    results = [outputs[0].data_ptr, 0, 0]
    launch(_loaded(kernel), grid, kernel.threads, kernel.shared, stream, pointers, integers, results)


def _launch_params(kernel: CompiledKernel, x: Any, y: Any, z: Any) -> trtp.KernelLaunchParams:
    return trtp.KernelLaunchParams(x, y, z, block_x=kernel.threads, shared_mem=kernel.shared)


def _usual(desc: Desc) -> int:
    """The first extent that the engine is optimised for."""
    return (desc.shape.opt if desc.shape.is_dynamic else desc.shape)[0]


def _type_name(desc: Desc) -> str:
    if desc.dtype not in _TYPES:
        raise ValueError(f"SuperTreeAttention computes in fp16 or bf16, not in {desc.dtype}; build in one of them")
    return {"fp16": "FP16", "bf16": "BF16"}[_TYPES[desc.dtype]]


def _card() -> tuple[int, int]:
    from super_tree_attention.launch import device_facts

    return device_facts()


def _rows(tokens: int, requests: int, entries: int, num_kv_heads: int, group: int) -> int:
    capability, processors = _card()
    launch = plan(tokens, requests, entries, num_kv_heads, group, processors=processors, compute_capability=capability)
    return launch.rows


def _kernel(kind: str, dtype: trt.DataType, head_dim: int, group: int = 1, rows: int = ROWS[0]) -> CompiledKernel:
    return compile_kernel(kind, _card()[0], _TYPES[dtype], head_dim, group, rows)


def _loaded(kernel: CompiledKernel) -> Any:
    from super_tree_attention.launch import load

    return load(kernel.cubin, kernel.name, kernel.shared)
