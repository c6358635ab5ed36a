"""The kernel against the reference: all types, head dimensions and group sizes, on fresh random calls."""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from itertools import product

import numpy as np
import torch
from torch import Tensor

from echo_trt.decoding.pack import BLOCK
from gpu_proof_parts.calls import Shape, random_call
from gpu_proof_parts.report import Proof, Skipped
from super_tree_attention import super_tree_attention
from super_tree_attention.kernel_plan import plan
from super_tree_attention.triton_attention import _card, move_rows, super_tree_attention_triton

#: Largest error over largest value: a few roundings of the type.
BOUNDS = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 2e-5}
POOLS = "key_cache", "value_cache"


def prove(proof: Proof) -> None:
    rng = np.random.default_rng()  # fresh inputs every time
    worst: dict[tuple, float] = {}
    calls = skipped = too_large = 0
    wanted = list(shapes(rng, proof.interpret))
    if proof.in_time:
        compile_ahead(proof, wanted)
    for shape in wanted:
        if not proof.in_time:
            skipped += 1
            continue
        key = str(shape.dtype).removeprefix("torch."), shape.head_dim
        text = f"{key[0]}, head_dim {shape.head_dim}, {shape.heads}/{shape.kv_heads} heads, past {shape.past[:4]}"
        try:
            error, untouched = compare(shape, rng, proof.device)
        except Exception as failure:
            if shape.dtype == torch.float32 and type(failure).__name__ == "OutOfResources":
                too_large += 1  # float32 is for comparisons; its tiles need more shared memory than some cards have
            else:
                proof.expect(False, f"{type(failure).__name__}: {failure} ({text})")
            continue
        worst[key] = max(worst.get(key, 0.0), error)
        calls += 1
        proof.expect(error <= BOUNDS[shape.dtype], f"error {error:.2g} of the largest value ({text})")
        proof.expect(untouched, f"the caches do not hold the new rows and nothing else ({text})")
    if skipped:
        proof.lacks(f"{skipped} random calls for lack of time")
    if too_large:
        proof.lacks(f"{too_large} random calls in float32 for lack of shared memory")
    if not calls and not proof.failures:
        raise Skipped
    proof.say(
        f"{calls} random calls: ragged trees, chunks and single tokens, scattered blocks, unused rows NaN, output "
        "memory filled with NaN. Error is the largest over the largest value, against the reference in float32 on the "
        "same inputs; caches are compared bit by bit."
    )
    proof.record(calls=calls, errors={"-".join(map(str, key)): error for key, error in sorted(worst.items())})
    rows = [(*key, f"{error:.2g}", f"{BOUNDS[getattr(torch, key[0])]:.2g}") for key, error in sorted(worst.items())]
    proof.table(("type", "head dimension", "largest error", "allowed"), rows)
    moved = all(moves_exactly(rng, proof.device, proof.interpret) for _ in range(1 if proof.interpret else 4))
    proof.expect(moved, "move_rows does not copy rows that overlap as one indexed copy does")
    proof.say("Rows moved onto each other, all pools at once: as by one indexed copy, bit by bit.")
    if proof.device.type == "cuda":
        prove_driver_launch(proof, rng)


def prove_driver_launch(proof: Proof, rng: np.random.Generator) -> None:
    """The cubins that the TensorRT plugin launches, by the CUDA driver."""
    if importlib.util.find_spec("cuda") is None:
        proof.lacks("the cubins' launch by the CUDA driver: cuda-python is not installed")
        return
    from gpu_proof_parts.driver import launched_error

    for modest, (dtype, name) in product((True, False), ((torch.bfloat16, "bf16"), (torch.float16, "fp16"))):
        error = max(launched_error(rng, dtype, name, modest) for _ in range(3))
        kind = "of at most 48 KB of shared memory" if modest else "of any shared memory"
        proof.check(f"cubins in {name} {kind}, by the CUDA driver", error <= BOUNDS[dtype], f"{error:.2g} off")


def shapes(rng: np.random.Generator, small: bool) -> Iterator[Shape]:
    """Qwen3-8B's heads first, then every type, head dimension and group size, over batches of every kind."""
    if not small:
        yield Shape(np.array([32_000]), np.array([64]), 1, 32, 8, 128, torch.bfloat16)
        yield Shape(np.array([0, 70]), np.array([700, 300]), 0, 32, 8, 128, torch.bfloat16)
    types = (torch.float32,) if small else (torch.bfloat16, torch.float16, torch.float32)
    groups = (1, 4) if small else (1, 2, 4, 5, 8, 16)
    for dtype, group, head_dim in product(types, groups, (64,) if small else (64, 128)):
        for requests, context, most in ((2, 40, 5),) if small else ((1, 9000, 64), (7, 700, 40), (64, 300, 6)):
            past = rng.integers(0, context, requests)
            past[: requests // 3] = 0  # prompts that begin
            past[-1] = past[-1] // BLOCK * BLOCK  # a full block
            counts = rng.integers(1, most + 1, requests)
            counts[requests // 2] = 1 if requests > 2 else counts[requests // 2]
            kv_heads = 2 if group > 4 or small else 4
            yield Shape(past, counts, int(rng.integers(0, requests + 1)), group * kv_heads, kv_heads, head_dim, dtype)


def compile_ahead(proof: Proof, wanted: list[Shape]) -> None:
    """Compile the calls' kernels in a pool of processes, into Triton's cache: one after another they take minutes."""
    card = _card(proof.device)
    kernels = list(dict.fromkeys(kernel_of(shape, *card) for shape in wanted))
    start = time.monotonic()
    if proof.interpret:
        compile_one(kernels[0], str(proof.device))  # nothing is compiled, and the way is walked
        return
    context = multiprocessing.get_context("spawn")
    workers = min(len(kernels), max((os.cpu_count() or 2) - 1, 1), 12)  # a process has a CUDA context, of half a GB
    executor = ProcessPoolExecutor(workers, context)
    jobs = [executor.submit(compile_one, kernel, str(proof.device)) for kernel in kernels]
    done, left = wait(jobs, timeout=max(0.7 * (proof.ends - time.monotonic()), 1))
    executor.shutdown(wait=False, cancel_futures=True)
    failed = [job for job in done if job.exception()]
    if left or failed:  # those are compiled by the first call that needs them
        proof.say(f"{len(left)} kernels were not compiled ahead in time, and {len(failed)} failed there.")
    proof.say(f"{len(kernels)} kernels, compiled by {workers} processes in {time.monotonic() - start:.0f} s.")


def kernel_of(shape: Shape, processors: int, compute_capability: int) -> tuple[torch.dtype, int, int, int]:
    """Type, head dimension, group and tile of a call's kernel."""
    group, blocks = shape.heads // shape.kv_heads, -(-(shape.past + shape.counts) // BLOCK)
    made = plan(
        int(shape.counts.sum()), len(shape.past), int(blocks.sum()), shape.kv_heads, group,
        processors=processors, compute_capability=compute_capability,
    )  # fmt: skip
    return shape.dtype, shape.head_dim, group, made.rows


def compile_one(kernel: tuple[torch.dtype, int, int, int], device: str) -> None:
    """Launch a small call of a kernel, with several splits, so that the merge is compiled too."""
    dtype, head_dim, group, rows = kernel
    shape = Shape(np.array([70]), np.array([2]), 1, group, 1, head_dim, dtype)
    call = random_call(shape, np.random.default_rng(0), torch.device(device))
    super_tree_attention_triton(**call, rows=rows, num_splits=2)


def compare(shape: Shape, rng: np.random.Generator, device: torch.device) -> tuple[float, bool]:
    """The largest error over the largest value, and whether the caches hold exactly what they must."""
    call = random_call(shape, rng, device)
    before = {name: tensor.cpu() for name, tensor in call.items()}
    with poisoned_memory():
        output = super_tree_attention_triton(**call).float().cpu()
    single = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in before.items()}
    wanted = super_tree_attention(**single)
    error = (output - wanted).abs().max() / wanted.abs().max()
    same = all(bits(call[name].cpu()).equal(bits(single[name].to(shape.dtype))) for name in POOLS)
    return (float(error) if torch.isfinite(output).all() else float("inf")), same


def bits(tensor: Tensor) -> Tensor:
    """NaN compares as a value does."""
    return tensor.nan_to_num(nan=77.0).contiguous()


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty is filled with NaN, so that a row which nobody writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def moves_exactly(rng: np.random.Generator, device: torch.device, small: bool) -> bool:
    blocks, dtype = (4, torch.float32) if small else (300, torch.bfloat16)
    pools = torch.randn((4, blocks, 2, BLOCK, 64), device=device).to(dtype)
    rows = torch.from_numpy(rng.permutation(blocks * BLOCK)[: blocks * BLOCK // 2]).to(device)
    source, target = rows, rows.roll(1)  # every target is a source too
    wanted = pools.clone()
    wanted[:, target // BLOCK, :, target % BLOCK] = pools[:, source // BLOCK, :, source % BLOCK]
    move_rows(pools, source, target)
    return pools.equal(wanted)
