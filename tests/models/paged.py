"""A paged KV cache around the operator's reference, to run networks here the way an engine does."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedModel

from echo_trt.models.decoder import Decoder
from echo_trt.models.layers import Attend, Config
from super_tree_attention import super_tree_attention

BLOCK = 4


class PagedCache:
    """Block tables of several requests, scattered over one pool per layer.

    A row that nobody wrote is NaN: a call that reads one shows it.
    """

    def __init__(self, config: Config, layers: int, requests: int, capacity: int):
        per_request = -(-capacity // BLOCK)
        blocks = torch.randperm(requests * per_request + 3, generator=torch.Generator().manual_seed(7)).int()
        self.tables = blocks[:-3].view(requests, per_request)
        shape = (len(blocks), config.num_kv_heads, BLOCK, config.head_dim)
        self.pools = [(torch.full(shape, torch.nan), torch.full(shape, torch.nan)) for _ in range(layers)]
        self.lengths, self.window_of = [0] * requests, config.window_of

    def attend(self, counts: list[int], masks: list[Tensor | None] | None = None) -> Attend:
        """How layers attend in a call with ``counts`` new tokens per request; a mask [n, n] or None, which is
        causal.
        """
        totals = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        used = [table[: -(-total // BLOCK)] for table, total in zip(self.tables, totals, strict=True)]
        sections = [torch.zeros(0) if mask is None else mask.flatten() for mask in masks or [None] * len(counts)]
        metadata = (
            torch.tensor(self.lengths, dtype=torch.int32),
            _begins(counts),
            torch.cat(used),
            _begins([len(blocks) for blocks in used]),
            torch.cat(sections).to(torch.uint8),
            _begins([len(section) for section in sections]),
        )
        window = self.window_of
        return lambda layer, *qkv: super_tree_attention(*qkv, *self.pools[layer], *metadata, window(layer))

    def commit(self, counts: list[int]) -> None:
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]


class Tree:
    """The new tokens of one request: parents[i] is an earlier node, or -1 for a root."""

    def __init__(self, parents: list[int]):
        self.parents = parents
        self.mask = torch.eye(len(parents), dtype=torch.bool)
        for node, parent in enumerate(parents):
            if parent >= 0:
                self.mask[node] |= self.mask[parent]
        self.depths = self.mask.sum(dim=1) - 1

    def path(self, node: int) -> list[int]:
        """Return the nodes from the root down to ``node``."""
        return self.mask[node].nonzero().flatten().tolist()


def run_decoder(
    decoder: Decoder, cache: PagedCache, tokens: list[list[int]], trees: list[Tree | None] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """One call over the new tokens of each request: every token's logits, and its features."""
    trees = trees or [None] * len(tokens)
    counts = [len(new) for new in tokens]
    depths = [torch.arange(count) if tree is None else tree.depths for count, tree in zip(counts, trees, strict=True)]
    logits, features = decoder(
        torch.tensor([token for new in tokens for token in new]),
        torch.cat([length + depth for length, depth in zip(cache.lengths, depths, strict=True)]),
        torch.arange(sum(counts)),
        cache.attend(counts, [None if tree is None else tree.mask for tree in trees]),
        decoder.config.feature_layers,
    )
    return list(logits.split(counts)), list(features.split(counts))


def run_in_calls(
    decoder: Decoder, sequences: list[list[int]], calls: list[list[int]]
) -> tuple[list[Tensor], list[Tensor]]:
    """Every token's logits and features, of sequences that come in call after call."""
    cache = PagedCache(decoder.config, decoder.config.num_layers, len(sequences), max(map(len, sequences)))
    outputs = []
    with torch.no_grad():
        for counts in calls:
            spans = zip(sequences, cache.lengths, counts, strict=True)
            outputs.append(run_decoder(decoder, cache, [tokens[past : past + count] for tokens, past, count in spans]))
            cache.commit(counts)
    logits, features = ([torch.cat(parts) for parts in zip(*kind, strict=True)] for kind in zip(*outputs, strict=True))
    return logits, features


def assert_same_network(decoder: Decoder, theirs: PreTrainedModel) -> None:
    """Logits and features equal transformers': prompt chunks, single tokens, and a chunk that crosses blocks.

    Our residual stream is transformers', divided by Granite's factor on residuals.
    """
    stream = getattr(theirs.config, "residual_multiplier", 1)
    calls = [[11, 3], [1, 1], [1, 1], [1, 1], [9, 8]]
    generator = torch.Generator().manual_seed(13)
    vocab, lengths = decoder.config.vocab_size, [sum(counts) for counts in zip(*calls, strict=True)]
    sequences = [torch.randint(vocab, (length,), generator=generator).tolist() for length in lengths]
    logits, features = run_in_calls(decoder, sequences, calls)
    for i, sequence in enumerate(sequences):
        with torch.no_grad():
            expected = theirs(torch.tensor([sequence]), output_hidden_states=True)
        assert 5 < expected.logits.abs().max() < 100
        torch.testing.assert_close(logits[i], expected.logits[0], atol=1e-4, rtol=0)
        inputs = torch.cat([expected.hidden_states[layer][0] for layer in decoder.config.feature_layers], dim=-1)
        torch.testing.assert_close(features[i] * stream, inputs, atol=1e-4, rtol=0)


def _begins(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
