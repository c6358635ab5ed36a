"""The Triton kernels against the reference, by Triton's interpreter on the CPU (on a GPU, where there is one)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need Triton")

from plugins.attention_calls import BLOCK, DEVICE, TOLERANCE, Batch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from super_tree_attention import kernel, super_tree_attention
from super_tree_attention.triton_attention import move_rows, super_tree_attention_triton

REQUEST = st.tuples(
    st.one_of(st.sampled_from([0, 1, 31, 32, 33, 64, 128, 129]), st.integers(0, 200)),
    st.one_of(st.sampled_from([0, 1, 32, 33]), st.integers(1, 20)),
    st.booleans(),
    st.one_of(st.just(0), st.sampled_from([1, 31, 32, 33, 70]), st.integers(0, 70)),
)


@settings(max_examples=settings().max_examples // 4, derandomize=True)  # the interpreter is slow
@given(
    requests=st.lists(REQUEST, min_size=1, max_size=3).filter(lambda batch: any(r[1] for r in batch)),
    heads=st.tuples(st.integers(1, 2), st.integers(1, 16)).filter(lambda pair: pair[0] * pair[1] <= 16),
    head_dim=st.sampled_from([64, 128]),
    dtype=st.sampled_from(list(TOLERANCE)),
    num_splits=st.sampled_from([None, 1, 2, 3, 7]),
    rows=st.sampled_from([None, 16, 64, 128]),
    seed=st.integers(0, 2**16),
    window=st.sampled_from([0, 0, 80, 96, 129]),
)
@example([(0, 1, False, 0)], (1, 1), 64, torch.float32, None, None, 0, 0)
@example([(0, 7, True, 9), (0, 0, False, 0), (64, 1, False, 0)], (2, 5), 64, torch.float32, 2, 64, 1, 0)
@example([(200, 17, True, 0), (1, 1, True, 40)], (1, 16), 128, torch.bfloat16, 7, 128, 2, 0)
@example([(40, 7, True, 9), (70, 1, False, 0)], (1, 2), 256, torch.bfloat16, 2, None, 4, 0)
@example([(200, 17, True, 0), (150, 40, False, 0), (70, 5, True, 9)], (1, 4), 64, torch.float32, 2, 16, 3, 80)
def test_any_batch_equals_the_reference(requests, heads, head_dim, dtype, num_splits, rows, seed, window):
    Batch(requests, *heads, head_dim, dtype, seed).check(num_splits=num_splits, rows=rows, sliding_window=window)


def test_a_long_past_of_which_a_window_is_seen():
    """Splits cover the window alone, in both kernels; the past before it is not read."""
    batch = Batch([(1500, 5, True), (600, 1, False)], 2, 2)
    expected = super_tree_attention(*batch.packed, *[c.clone() for c in batch.caches], *batch.metadata, 256)
    for cache in batch.caches:
        cache[batch.metadata[2][:35].long()] = torch.nan  # 1,120 tokens
    arguments = [tensor.to(DEVICE) for tensor in (*batch.packed, *batch.caches, *batch.metadata)]
    output = super_tree_attention_triton(*arguments, sliding_window=256).cpu()
    torch.testing.assert_close(output, expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("group", [1, 5, 16])
def test_groups(group):
    Batch([(70, 3, True), (33, 1, False), (0, 6, False)], 2, group).check()


def test_a_level_of_a_draft_computes_its_new_nodes_alone():
    """Ten new nodes of a request see forty that four levels before have left behind its past."""
    Batch([(70, 10, True, 40), (0, 10, True, 40), (31, 10, True, 0)], 2, 4).check()


def test_levels_that_keep_their_rows_attend_as_one_call_over_all_of_them():
    """Three calls of two new nodes write the cache, and give the last nodes the outputs, of a call of six."""
    batch = Batch([(40, 6, True), (0, 6, True)], 2, 2)
    below = [m.view(6, 6).tril() | torch.eye(6, dtype=torch.uint8) for m in batch.metadata[4].view(2, 36)]
    mask = torch.stack(below)
    pasts, begins, blocks, block_begins, _, mask_begins = batch.metadata
    whole = [cache.clone() for cache in batch.caches]
    expected = super_tree_attention(
        *batch.packed, *whole, pasts, begins, blocks, block_begins, mask.flatten(), mask_begins
    )
    caches = [cache.to(DEVICE, copy=True) for cache in batch.caches]
    order = torch.arange(3, dtype=torch.int32)
    for level in (1, 2, 3):
        rows = torch.cat([6 * i + torch.arange(2 * level - 2, 2 * level) for i in (0, 1)])
        section = mask[:, 2 * level - 2 : 2 * level, : 2 * level].flatten()
        new = [tensor[rows] for tensor in batch.packed]
        metadata = pasts, 2 * order, blocks, block_begins, section, 4 * level * order
        arguments = [t.to(DEVICE) for t in (*new, *caches, *metadata)]
        arguments[3:5] = caches
        output = super_tree_attention_triton(*arguments).cpu()
        torch.testing.assert_close(output, expected[rows], atol=2e-6, rtol=2e-6)
    for cache, written in zip(caches, whole, strict=True):
        torch.testing.assert_close(cache.cpu(), written, atol=0, rtol=0, equal_nan=True)


def test_a_prompt_chunk_a_single_token_and_a_tree_in_one_call():
    Batch([(96, 70, False), (200, 1, False), (40, 50, True)], 1, 4, dtype=torch.bfloat16).check()


def test_a_long_context_in_as_many_splits_as_the_plan_chooses():
    Batch([(1500, 5, True)], 2, 2).check()


def test_more_requests_than_one_step_of_the_search():
    Batch([(i % 5, i % 3, i % 2 == 0) for i in range(260)]).check(num_splits=1, rows=16)


def test_rows_after_the_last_request_are_left_alone():
    batch = Batch([(40, 3, True), (0, 2, False)])
    padded = [torch.cat([tensor, torch.full_like(tensor[:4], torch.nan)]) for tensor in batch.packed]
    expected = super_tree_attention(*batch.packed, *[cache.clone() for cache in batch.caches], *batch.metadata)
    arguments = [tensor.to(DEVICE) for tensor in (*padded, *batch.caches, *batch.metadata)]
    output = super_tree_attention_triton(*arguments, num_splits=2).cpu()
    torch.testing.assert_close(output[:5], expected, atol=2e-6, rtol=2e-6)


def test_a_view_of_a_merged_matrix_is_taken_for_what_it_shows():
    batch = Batch([(40, 3, True), (9, 2, False)], 2, 2)
    merged = torch.cat(batch.packed, dim=1)
    batch.packed = list(merged.split([tensor.shape[1] for tensor in batch.packed], dim=1))
    batch.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moved_rows_may_overlap(dtype):
    pools = torch.randn(4, 6, 3, BLOCK, 64, generator=torch.Generator().manual_seed(3)).to(dtype)
    source, target = torch.tensor([40, 41, 7, 160, 33]), torch.tensor([41, 7, 40, 32, 33])
    expected = pools.clone()
    expected[:, target // BLOCK, :, target % BLOCK] = pools[:, source // BLOCK, :, source % BLOCK]
    moved = pools.to(DEVICE, copy=True)
    move_rows(moved, source.to(DEVICE), target.to(DEVICE))
    torch.testing.assert_close(moved.cpu(), expected, atol=0, rtol=0)
    move_rows(moved, source[:0].to(DEVICE), target[:0].to(DEVICE))
    torch.testing.assert_close(moved.cpu(), expected, atol=0, rtol=0)


def test_moves_of_any_number_of_rows_are_one_kernel():
    """Where the second half of an odd number of row numbers begins must compile no further kernel while serving."""
    copy, backend = kernel.copy_rows, make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(copy.signature, copy.params, backend)
    pools, made = torch.zeros(2, 4, 2, BLOCK, 64, dtype=torch.bfloat16), set()
    for count in (3, 4):
        source, target = torch.zeros(2, count, dtype=torch.int64)
        rows = pools.new_zeros(2, count, 2, 64)
        _, special, _ = bind(pools, rows, source, target, 2, 4, HEAD_DIM=64, BLOCK=BLOCK, GATHER=True)
        made.add(tuple(special))
    assert len(made) == 1


def surrounded(tensor: Tensor, margin: int, fill: float) -> tuple[Tensor, Tensor]:
    """Return a copy of ``tensor`` between ``margin`` elements of ``fill`` on both sides, and the whole memory."""
    whole = torch.full((tensor.numel() + 2 * margin,), fill, dtype=tensor.dtype)
    inside = whole[margin:-margin].view(tensor.shape)
    inside.copy_(tensor)
    return inside, whole


@pytest.mark.skipif(DEVICE == "cuda", reason="memory around tensors is looked at on a CPU")
@pytest.mark.parametrize(("seed", "largest"), enumerate((9, 9, 2**31 - 1, 2**31 - 1)))
def test_whatever_the_metadata_holds_nothing_outside_is_written(seed, largest):
    """A builder may time the kernels with made-up inputs. Small wrong numbers reach no further than the margins."""
    batch = Batch([(40, 5, True, 7), (70, 3, False, 0), (0, 4, True, 33)], 2, 2, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    low = -9 if largest == 9 else -(2**31)
    metadata = [
        t if t.dtype == torch.uint8 else torch.randint(low, largest, t.shape, generator=generator, dtype=torch.int64)
        for t in batch.metadata
    ]
    begins = [surrounded(t.int() if t.dtype == torch.int64 else t, 64, 0)[0] for t in metadata]
    caches = [torch.zeros_like(cache) for cache in batch.caches]
    margin = 12 * caches[0][0].numel()
    views, wholes = zip(*(surrounded(cache, margin, 7.0) for cache in caches), strict=True)
    super_tree_attention_triton(*batch.packed, *views, *begins)
    for whole in wholes:
        assert (whole[:margin] == 7.0).all()
        assert (whole[-margin:] == 7.0).all()


@pytest.mark.parametrize("past", [190, 2**31 - 1])
def test_a_past_beyond_the_table_ends_with_it_in_both_kernels(past):
    """The merge of splits takes the past that attention took: else it would merge what no split has written."""
    batch = Batch([(91, 5, True)], 2, 2)
    table = len(batch.metadata[2]) * BLOCK
    clamped, wrong = ([torch.tensor([n]), *batch.metadata[1:]] for n in (table - 5, past))
    outputs = []
    for metadata in (clamped, wrong):
        caches = [cache.to(DEVICE, copy=True) for cache in batch.caches]
        arguments = [tensor.to(DEVICE) for tensor in (*batch.packed, *caches, *metadata)]
        outputs.append(super_tree_attention_triton(*arguments, num_splits=4))
    torch.testing.assert_close(outputs[0], outputs[1], atol=0, rtol=0)
    assert outputs[0].isfinite().all()


def test_a_table_that_is_padded_is_the_table():
    """Graphs are captured for the longest tables; the splits of a past follow the table's true length."""
    batch = Batch([(900, 5, True), (300, 3, False)], 2, 2)
    expected = super_tree_attention(*batch.packed, *[c.clone() for c in batch.caches], *batch.metadata)
    padded = list(batch.metadata)
    padded[2] = torch.cat((padded[2], torch.zeros(400, dtype=torch.int32)))
    arguments = [tensor.to(DEVICE) for tensor in (*batch.packed, *batch.caches, *padded)]
    torch.testing.assert_close(super_tree_attention_triton(*arguments).cpu(), expected, atol=2e-6, rtol=2e-6)
