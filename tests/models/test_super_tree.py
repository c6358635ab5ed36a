"""A tree in one call gives each node what its path gives as a plain sequence."""

import pytest
import torch
from checkpoints import gemma3, qwen3_moe
from paged import PagedCache, Tree, run_decoder

from echo_trt.models.open_checkpoint import open_checkpoint
from echo_trt.models.weights import load_decoder

ROOT_ONLY = Tree([-1])
CHAIN = Tree([-1, 0, 1, 2])
STAR = Tree([-1, 0, 0, 0, 0, 0])
BUSHY = Tree([-1, 0, 0, 1, 1, 2, 4, 4, 7, 3])
TWO_ROOTS = Tree([-1, 0, -1, 2, 1])
OUT_OF_ORDER = Tree([-1, 0, 1, 0, 3, 2, 4])

BATCHES = {
    "one tree": [(BUSHY, 9)],
    "ragged trees": [(BUSHY, 6), (ROOT_ONLY, 11), (STAR, 1), (CHAIN, 4), (TWO_ROOTS, 8)],
    "trees and prompt chunks": [(None, 2), (BUSHY, 5), (None, 7), (OUT_OF_ORDER, 12), (STAR, 3)],
    "without a past": [(BUSHY, 0), (None, 0), (STAR, 0)],
}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("build", [gemma3, qwen3_moe])
def test_nodes_equal_their_paths(build, batch, tmp_path):
    theirs = build()
    theirs.save_pretrained(tmp_path)
    decoder = load_decoder(open_checkpoint(tmp_path), positions=64)
    chunk = 5
    trees = [tree for tree, _ in batch]
    counts = [chunk if tree is None else len(tree.parents) for tree in trees]
    generator = torch.Generator().manual_seed(23)
    lengths = [past + count for (_, past), count in zip(batch, counts, strict=True)]
    sequences = [torch.randint(decoder.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    cache = PagedCache(decoder.config, decoder.config.num_layers, len(batch), capacity=24)

    with torch.no_grad():
        pasts = [sequence[:past] for sequence, (_, past) in zip(sequences, batch, strict=True)]
        if any(pasts):
            run_decoder(decoder, cache, pasts)
        cache.commit([len(past) for past in pasts])
        new = [sequence[len(past) :] for sequence, past in zip(sequences, pasts, strict=True)]
        logits, features = run_decoder(decoder, cache, new, trees)

        for i, tree in enumerate(trees):
            for node in range(counts[i]):
                path = list(range(node + 1)) if tree is None else tree.path(node)
                plain = theirs(torch.tensor([pasts[i] + [new[i][n] for n in path]]), output_hidden_states=True)
                torch.testing.assert_close(logits[i][node], plain.logits[0, -1], atol=1e-4, rtol=0)
                inputs = torch.cat([plain.hidden_states[layer][0, -1] for layer in decoder.config.feature_layers])
                torch.testing.assert_close(features[i][node], inputs, atol=1e-4, rtol=0)
