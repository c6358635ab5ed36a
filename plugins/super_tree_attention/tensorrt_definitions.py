"""The plugins' definitions for TensorRT: outputs, types and launches. Importing this module registers them.

TensorRT reads annotations as objects when a function is registered, so their evaluation is not postponed here.
"""

from typing import Any

import tensorrt as trt
import tensorrt.plugin as trtp

from super_tree_attention.ahead_of_time import CompiledKernel, compile_kernel
from super_tree_attention.kernel_plan import ROWS, KernelPlan, Whole, plan, split_rows, tile_count
from super_tree_attention.tensorrt_names import ATTENTION, COMBINE, NAMESPACE, relist_parameters

Desc, Tensor = trtp.TensorDesc, trtp.Tensor
Launch = tuple[bytes, bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]
_ATTENTION, _COMBINE = f"{NAMESPACE}::{ATTENTION}", f"{NAMESPACE}::{COMBINE}"
_BLOCK = 32
#: The largest tile of kernels that TensorRT launches itself. Whether it raises a kernel's limit of shared memory is not
#: documented, so these kernels need no more than any kernel gets (kernel_plan.modest_steps).
_MODEST_ROWS = ROWS[1]
#: The kernels' parameters in TensorRT's order: inputs, integers, outputs (relist_parameters). Outputs that are inputs
#: too, attention's caches and all of combine's, are written through the inputs: whether TensorRT passes the pointer of
#: an aliased output a second time is not documented. Combine reads no block numbers.
ATTENTION_ORDER = [*range(20), None, None]
COMBINE_ORDER = [0, 1, None, 2, 3, 4, 9, 5, 6, 7, 8, None]
_TYPES = {trt.DataType.HALF: "fp16", trt.DataType.BF16: "bf16"}


@trtp.register(_ATTENTION)
def _describe_attention(
    query: Desc, key: Desc, value: Desc, key_cache: Desc, value_cache: Desc, past_lens: Desc, seq_begins: Desc,
    block_indices: Desc, block_begins: Desc, tree_mask: Desc, tree_mask_begins: Desc,
    num_kv_heads: int, head_dim: int, alias_caches: int,
) -> tuple[Desc, Desc, Desc, Desc, Desc]:  # fmt: skip
    # Sizes that grow with the tokens, since TensorRT may reserve memory by the largest call alone; a call uses a part.
    rows = split_rows(query.shape_expr[0], query.shape_expr[1] // head_dim, trtp)
    partial = trtp.from_shape_expr((rows, head_dim), trt.float32)
    partial_lse = trtp.from_shape_expr((rows,), trt.float32)
    written = [cache.aliased() if alias_caches else cache.like() for cache in (key_cache, value_cache)]
    return query.like(), partial, partial_lse, *written


@trtp.register(_COMBINE)
def _describe_combine(
    past_lens: Desc, seq_begins: Desc, block_indices: Desc, block_begins: Desc, partial: Desc, partial_lse: Desc,
    attended: Desc, num_kv_heads: int, head_dim: int,
) -> Desc:  # fmt: skip
    return attended.aliased()  # requests of one split are done already


# One combination of types and one tactic leave nothing to time: TensorRT would time with made-up block tables. The
# tactic of attention is its tile's rows, since TensorRT keeps a compiled kernel by its tactic: two profiles with one
# tactic would both get the last kernel.
@trtp.autotune(_ATTENTION)
def _types_of_attention(
    query: Desc, key: Desc, value: Desc, key_cache: Desc, value_cache: Desc, past_lens: Desc, seq_begins: Desc,
    block_indices: Desc, block_begins: Desc, tree_mask: Desc, tree_mask_begins: Desc,
    num_kv_heads: int, head_dim: int, outputs: tuple[Desc],
) -> list[trtp.AutoTuneCombination]:  # fmt: skip
    half = _type_name(query)
    types = ", ".join([half] * 5 + ["INT32"] * 6 + [half, "FP32", "FP32", half, half])
    tokens, requests, entries = _usual(query), _usual(past_lens), _usual(block_indices)
    group = query.shape[1] // (num_kv_heads * head_dim)
    rows = _plan(tokens, requests, entries, num_kv_heads, group, max_rows=_MODEST_ROWS).rows
    return [trtp.AutoTuneCombination(types, tactics=[rows])]


@trtp.autotune(_COMBINE)
def _types_of_combine(
    past_lens: Desc, seq_begins: Desc, block_indices: Desc, block_begins: Desc, partial: Desc, partial_lse: Desc,
    attended: Desc, outputs: tuple[Desc],
) -> list[trtp.AutoTuneCombination]:  # fmt: skip
    half = _type_name(attended)
    return [trtp.AutoTuneCombination(", ".join(["INT32"] * 4 + ["FP32", "FP32", half, half]))]


@trtp.aot_impl(_ATTENTION)
def _compile_attention(
    query: Desc, key: Desc, value: Desc, key_cache: Desc, value_cache: Desc, past_lens: Desc, seq_begins: Desc,
    block_indices: Desc, block_begins: Desc, tree_mask: Desc, tree_mask_begins: Desc,
    num_kv_heads: int, head_dim: int, alias_caches: int, outputs: tuple[Desc], tactic: int,
) -> Launch:  # fmt: skip
    group, rows = query.shape[1] // (num_kv_heads * head_dim), tactic
    kernel = _kernel("attention", query.dtype, head_dim, group, rows, modest=True)
    tokens, requests, entries = query.shape_expr[0], past_lens.shape_expr[0], block_indices.shape_expr[0]
    tiles = tile_count(tokens, requests, rows, group, trtp)  # by the profile's tile, on which splits do not depend
    made = _symbolic_plan(query, past_lens, block_indices, num_kv_heads, head_dim)
    launch = _launch_params(kernel, tiles, num_kv_heads, made.num_splits)
    sizes = requests, made.wanted_splits, tokens, key_cache.shape_expr[0], entries, tree_mask.shape_expr[0] * 4
    integers = trtp.SymIntExprs.from_tuple(tuple(trtp.SymInt32(size) for size in sizes))
    name, ptx = relist_parameters(kernel.ptx, ATTENTION_ORDER, f"attention_{rows}")
    return name.encode(), ptx.encode(), launch, integers


@trtp.aot_impl(_COMBINE)
def _compile_combine(
    past_lens: Desc, seq_begins: Desc, block_indices: Desc, block_begins: Desc, partial: Desc, partial_lse: Desc,
    attended: Desc, num_kv_heads: int, head_dim: int, outputs: tuple[Desc], tactic: int,
) -> Launch:  # fmt: skip
    kernel = _kernel("combine", attended.dtype, head_dim)
    made = _symbolic_plan(attended, past_lens, block_indices, num_kv_heads, head_dim)
    tokens, splits = attended.shape_expr[0], made.num_splits
    # Without splits, the programs of one token, which do nothing: a grid must not be empty.
    merged = (tokens - 1) * trtp.min(splits - 1, 1) + 1
    launch = _launch_params(kernel, merged, attended.shape_expr[1] // head_dim, 1)
    integers = past_lens.shape_expr[0], made.wanted_splits, block_indices.shape_expr[0], splits
    extra = trtp.SymIntExprs.from_tuple(tuple(trtp.SymInt32(i) for i in integers))
    name, ptx = relist_parameters(kernel.ptx, COMBINE_ORDER, "combine")
    return name.encode(), ptx.encode(), launch, extra


@trtp.impl(_ATTENTION)
def _launch_attention(
    query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, past_lens: Tensor,
    seq_begins: Tensor, block_indices: Tensor, block_begins: Tensor, tree_mask: Tensor, tree_mask_begins: Tensor,
    num_kv_heads: int, head_dim: int, outputs: tuple[Tensor], stream: int,
) -> None:  # fmt: skip
    from super_tree_attention.launch import launch

    inputs = query, key, value, key_cache, value_cache, past_lens, seq_begins, block_indices, block_begins
    inputs = *inputs, tree_mask, tree_mask_begins
    for cache, written in zip((key_cache, value_cache), outputs[3:], strict=True):
        if cache.data_ptr != written.data_ptr:
            raise RuntimeError("a cache's output is not bound to the cache's own memory")
    requests, group = past_lens.shape[0], query.shape[1] // (num_kv_heads * head_dim)
    made = _plan(query.shape[0], requests, block_indices.shape[0], num_kv_heads, group)
    kernel = _kernel("attention", query.dtype, head_dim, group, made.rows)
    results = [*(o.data_ptr for o in outputs[:3]), 0, 0]  # two null pointers: Triton's scratch memory, of no size
    entries, mask_bytes = block_indices.shape[0], 4 * tree_mask.shape[0]
    sizes = [requests, made.wanted_splits, query.shape[0], key_cache.shape[0], entries, mask_bytes]
    launch(_loaded(kernel), made.grid, kernel.threads, kernel.shared, stream,
           [t.data_ptr for t in inputs], sizes, results)  # fmt: skip


@trtp.impl(_COMBINE)
def _launch_combine(
    past_lens: Tensor, seq_begins: Tensor, block_indices: Tensor, block_begins: Tensor, partial: Tensor,
    partial_lse: Tensor, attended: Tensor, num_kv_heads: int, head_dim: int, outputs: tuple[Tensor], stream: int,
) -> None:  # fmt: skip
    from super_tree_attention.launch import launch

    requests, group = past_lens.shape[0], attended.shape[1] // (num_kv_heads * head_dim)
    made = _plan(attended.shape[0], requests, block_indices.shape[0], num_kv_heads, group)
    if made.num_splits == 1:
        return
    kernel = _kernel("combine", attended.dtype, head_dim)
    integers = [requests, made.wanted_splits, block_indices.shape[0], made.num_splits]
    pointers = [t.data_ptr for t in (past_lens, seq_begins, block_begins, partial, partial_lse)]
    results = [outputs[0].data_ptr, 0, 0]
    launch(_loaded(kernel), (*made.combine_grid, 1), kernel.threads, kernel.shared, stream, pointers, integers, results)


def _launch_params(kernel: CompiledKernel, x: Any, y: Any, z: Any) -> trtp.KernelLaunchParams:
    return trtp.KernelLaunchParams(x, y, z, block_x=kernel.threads, shared_mem=kernel.shared)


def _usual(desc: Desc) -> int:
    """Return the size of the first axis for which the engine is optimised."""
    return (desc.shape.opt if desc.shape.is_dynamic else desc.shape)[0]


def _type_name(desc: Desc) -> str:
    if desc.dtype not in _TYPES:
        raise ValueError(f"SuperTreeAttention computes in fp16 or bf16, not in {desc.dtype}; build in one of them")
    return {"fp16": "FP16", "bf16": "BF16"}[_TYPES[desc.dtype]]


def _card() -> tuple[int, int]:
    from super_tree_attention.launch import device_facts

    return device_facts()


def _plan(
    tokens: Any, requests: Any, entries: Any, num_kv_heads: int, group: Any, ops: Any = Whole, max_rows: int = ROWS[-1]
) -> KernelPlan:
    capability, processors = _card()
    return plan(
        tokens, requests, entries, num_kv_heads, group, block=_BLOCK, processors=processors,
        compute_capability=capability, max_rows=max_rows, ops=ops,
    )  # fmt: skip


def _symbolic_plan(query: Desc, past_lens: Desc, block_indices: Desc, num_kv_heads: int, head_dim: int) -> KernelPlan:
    """Plan symbolically, for the shapes of any call of a kernel that TensorRT launches itself."""
    group = query.shape_expr[1] // (num_kv_heads * head_dim)
    tokens, requests, entries = query.shape_expr[0], past_lens.shape_expr[0], block_indices.shape_expr[0]
    return _plan(tokens, requests, entries, num_kv_heads, group, trtp, _MODEST_ROWS)


def _kernel(
    kind: str, dtype: trt.DataType, head_dim: int, group: int = 1, rows: int = ROWS[0], modest: bool = False
) -> CompiledKernel:
    return compile_kernel(kind, _card()[0], _TYPES[dtype], head_dim, group, rows, modest=modest)


def _loaded(kernel: CompiledKernel) -> Any:
    from super_tree_attention.launch import load

    return load(kernel.cubin, kernel.name, kernel.shared)
