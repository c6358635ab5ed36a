"""The kernels as the TensorRT plugin launches them: compiled ahead of time, by the CUDA driver."""

from __future__ import annotations

import numpy as np
import torch

from echo_trt.decoding.pack import BLOCK
from gpu_proof_parts.calls import Shape, random_call
from super_tree_attention import super_tree_attention
from super_tree_attention.kernel_plan import ROWS, plan


def launched_error(rng: np.random.Generator, dtype: torch.dtype, name: str, modest: bool) -> float:
    """The largest error over the largest value of one call, by the plugins' own grids, splits and arguments.

    ``modest``: by the kernels of little shared memory, which TensorRT launches itself.
    """
    from super_tree_attention.ahead_of_time import compile_kernel
    from super_tree_attention.launch import device_facts, launch, load

    capability, processors = device_facts()
    heads, kv_heads, head_dim = 32, 8, 128
    shape = Shape(rng.integers(0, 4000, 5), rng.integers(1, 20, 5), 3, heads, kv_heads, head_dim, dtype)
    call = random_call(shape, rng, torch.device("cuda"))
    wanted = super_tree_attention(**{n: t.float().cpu() if t.is_floating_point() else t.cpu() for n, t in call.items()})
    sizes = len(call["query"]), len(call["past_lens"]), len(call["block_indices"])
    group = heads // kv_heads
    chosen = plan(
        *sizes, kv_heads, group, block=BLOCK, processors=processors, compute_capability=capability,
        most_rows=ROWS[1] if modest else ROWS[-1],
    )  # fmt: skip
    splits = chosen.num_splits
    nan = {"fill_value": float("nan"), "device": "cuda"}
    output = torch.full((sizes[0], heads * head_dim), dtype=dtype, **nan)
    partial = torch.full((sizes[0] * heads, splits, head_dim), dtype=torch.float32, **nan)
    partial_lse = torch.full((sizes[0] * heads, splits), dtype=torch.float32, **nan)
    stream = torch.cuda.current_stream().cuda_stream
    scratch = [0, 0]  # Triton's, of no size
    attention = compile_kernel("attention", capability, name, head_dim, group, chosen.rows, modest=modest)
    combine = compile_kernel("combine", capability, name, head_dim)
    for kernel, grid, pointers, integers, results in (
        (attention, chosen.grid, [*call.values()],
         [sizes[1], chosen.wanted_splits, sizes[0], len(call["key_cache"]), sizes[2], len(call["tree_mask"])],
         [output, partial, partial_lse]),
        (combine, (*chosen.combine_grid, 1),
         [*(call[n] for n in ("past_lens", "seq_begins", "block_begins")), partial, partial_lse],
         [sizes[1], chosen.wanted_splits, sizes[2], splits], [output]),
    ):  # fmt: skip
        function = load(kernel.cubin, kernel.name, kernel.shared)
        given, left = ([t.data_ptr() for t in tensors] for tensors in (pointers, results))
        launch(function, grid, kernel.threads, kernel.shared, stream, given, integers, left + scratch)
    torch.cuda.synchronize()
    error = float((output.float().cpu() - wanted).abs().max() / wanted.abs().max())
    return error if torch.isfinite(output).all() else float("inf")
