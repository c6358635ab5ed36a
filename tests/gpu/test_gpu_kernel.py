"""The kernels on a card, at the sizes of real networks, and what attention moves of the memory's bandwidth."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from gpu.compile_kernels import COMPARED
from gpu.random_networks import QWEN3_8B, TINY, random_decoder
from plugins.attention_calls import BLOCK, Batch
from plugins.interpreted import interpreted
from plugins.test_sampling_kernels import choice_of, chosen, rows_of

from echo_trt.models import layers
from echo_trt.speculation.sampling import draw as host

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("requests", [[(32_000, 64, True)], [(0, 700, False), (70, 300, False)]])
def test_calls_of_qwen3_8b_are_the_references(card, seed, requests):
    Batch(card.pick(requests, [(40, 5, True)]), *card.pick((8, 4, 128), (1, 4, 64)), torch.bfloat16, seed).check()


def test_rows_that_move_onto_each_other_move_at_once(card, seed):
    from super_tree_attention.triton_attention import move_rows

    blocks, dtype = card.pick((300, torch.bfloat16), (4, torch.float32))
    pools = torch.randn((4, blocks, 2, BLOCK, 64), device=card.device).to(dtype)
    source = torch.randperm(blocks * BLOCK, device=card.device)[: blocks * BLOCK // 2]
    target, wanted = source.roll(1), pools.clone()  # every target is a source too
    wanted[:, target // BLOCK, :, target % BLOCK] = pools[:, source // BLOCK, :, source % BLOCK]
    move_rows(pools, source, target)
    assert pools.equal(wanted)


@pytest.mark.parametrize(("requests", "context", "tokens"), [(1, 32_768, 64), (32, 2048, 256), (256, 1024, 512)])
def test_the_kernel_reads_at_the_memorys_speed(card, requests, context, tokens, figures):
    """With Qwen3-8B's heads; a copy of a large array is the ceiling, its reads and writes counted."""
    if card.device.type != "cuda":
        pytest.skip("speed is a card's")
    from triton.testing import do_bench

    from super_tree_attention.triton_attention import super_tree_attention_triton

    batch = Batch([(context, tokens // requests, True)] * requests, 8, 4, 128, torch.bfloat16)
    call = [tensor.to("cuda") for tensor in (*batch.packed, *batch.caches, *batch.metadata)]
    large, other = (torch.zeros(2**30, dtype=torch.uint8, device="cuda") for _ in range(2))
    kernel, copy = (
        1e-3 * do_bench(run, warmup=100, rep=300, return_mode="median")
        for run in (lambda: super_tree_attention_triton(*call), lambda: other.copy_(large))
    )
    read, ceiling = requests * context * 8 * 128 * 2 * 2 / kernel, 2 * 2**30 / copy
    figures(us=1e6 * kernel, kv_gb_per_s=read / 1e9, copy_gb_per_s=ceiling / 1e9, of_copy=read / ceiling)
    assert 0 < read < ceiling


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_draws_over_qwen3s_vocabulary_are_the_hosts(card, dtype, figures):
    """Peaked and flat rows, with ties, by all limits, in one launch."""
    count, size = card.pick((64, 151_936), (6, 700))
    logits, choice = torch.from_numpy(rows_of(1, count, size)).to(dtype), choice_of(1, count)
    wanted = host.choose(logits.float().numpy(), choice)
    assert chosen(logits, np.arange(count), choice).tolist() == wanted.tolist()
    if card.cuda:
        from triton.testing import do_bench

        logits = logits.cuda()
        figures(us=1e3 * do_bench(lambda: chosen(logits, np.arange(count), choice), return_mode="median"))


@torch.inference_mode()
def test_a_layers_small_steps_in_kernels_are_those_of_operators(card, monkeypatch):
    """Sum and norm, rotation of normed queries and keys, and activation, of Qwen3-8B's widths in bfloat16."""
    config = dataclasses.replace(card.pick(QWEN3_8B, TINY), num_layers=1, vocab_size=64)
    network = random_decoder(config, 99, torch.bfloat16, card.device)
    tokens, found = torch.arange(card.pick(60, 5), device=card.device), []

    def attend(layer, query, key, value):
        return (query + (key + value).to(query.dtype).repeat(1, query.shape[1] // key.shape[1])).to(value.dtype)

    kernels = layers.fused(network.norm.weight) or interpreted("super_tree_attention.layer_kernels")
    for module in (None, kernels):
        monkeypatch.setattr(layers, "fused", lambda x, module=module: module)
        found.append(network(tokens, tokens, tokens, attend)[0].float())
    assert (found[1] - found[0]).norm() <= 0.02 * found[0].norm()


@pytest.mark.parametrize(
    ("dtype", "head_dim"), [(dtype, d) for dtype, (sizes, _) in COMPARED.items() for d in sizes], ids=str
)
def test_calls_of_every_kind_are_the_references(card, seed, dtype, head_dim):
    """Ragged trees, chunks and single tokens, of every group of heads, over scattered blocks."""
    rng = np.random.default_rng(seed)
    for group in card.pick(COMPARED[dtype][1], (4,)):
        for requests, context, maximum in card.pick(((1, 9000, 64), (7, 700, 40), (64, 300, 6)), ((2, 40, 5),)):
            past, counts = rng.integers(0, context, requests), rng.integers(1, maximum + 1, requests)
            past[: requests // 3] = 0  # prompts that begin
            past[-1] = past[-1] // BLOCK * BLOCK  # a full block
            rows = [(int(p), int(n), bool(rng.integers(2))) for p, n in zip(past, counts, strict=True)]
            Batch(rows, 2 if group > 4 else 4, group, head_dim, dtype, int(rng.integers(2**31))).check()
