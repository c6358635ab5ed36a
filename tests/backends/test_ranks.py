"""One rank's part of a network: all ranks together compute what the undivided network does, in PyTorch and exported."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from backends.cut_graph import CutGraph
from gloo_threads import on_ranks
from models.checkpoints import qwen2, qwen3, qwen3_moe, smollm3
from random_calls import Script
from role_sessions import RoleSession

from echo_trt.backends.onnx_export import export
from echo_trt.backends.parallel.rank_group import ByNccl
from echo_trt.backends.tensorrt.engine import TensorRTEngine
from echo_trt.backends.tensorrt.graph import name_collectives
from echo_trt.backends.torch.engine import METADATA, TorchEngine
from echo_trt.bundle.call_sizes import CallSizes
from echo_trt.models.open_checkpoint import open_checkpoint
from echo_trt.models.ranks import Shard, all_reduce, among
from echo_trt.models.roles import TargetModule
from echo_trt.models.weights import load_decoder
from echo_trt.speculation.pack import BLOCK, ForwardBatch
from super_tree_attention import super_tree_attention
from super_tree_attention.tensorrt_plugin import prepare_graph

SLOTS, EACH, POSITIONS = 3, 3, 96
SIZES = {"hidden_size": 24, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 6, "num_hidden_layers": 2}
#: A vocabulary that ranks can divide, and one that they cannot; KV heads that two or four share, and not.
NETWORKS = {
    "dense": (qwen3, {"vocab_size": 60, "num_key_value_heads": 1}),
    "a bias": (qwen2, {"vocab_size": 60}),
    "a layer without rotary positions": (smollm3, {"vocab_size": 60, "no_rope_layer_interval": 2}),
    "tied": (qwen3, {"vocab_size": 60, "tie_word_embeddings": True, "num_key_value_heads": 4}),
    "mixture": (qwen3_moe, {"vocab_size": 61, "mlp_only_layers": [0], "moe_intermediate_size": 12}),
    "a tensor per expert": (qwen3_moe, {"vocab_size": 60, "moe_intermediate_size": 12}),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, (make, sizes) in NETWORKS.items():
        make(**SIZES | sizes).save_pretrained(folder / name, save_original_format="expert" in name)
    return folder


def role_of(folder, shard: Shard | None = None) -> TargetModule:
    network = load_decoder(open_checkpoint(folder), POSITIONS, **({"shard": shard} if shard else {}))
    return TargetModule(network, network.config.feature_layers)


def calls(seed: int, table: np.ndarray, vocab: int) -> list[ForwardBatch]:
    """Prompts, then trees of two requests beside a chunk, single tokens, and single tokens of which no row is asked."""
    script, slots, ones = Script(seed, table, vocab), np.arange(3), np.ones(3, np.int64)
    prompt = script.call(slots, chunks=[BLOCK + 5, 7, 3])
    mixed = script.call(slots, 2, [9], 6)
    return [prompt, mixed, *(script.call(slots, chunks=ones, share=share) for share in (1.0, 0.0))]


def assert_close(got: dict, wanted: dict) -> None:
    assert got.keys() == wanted.keys()
    for name, values in wanted.items():
        largest = np.abs(values).max(initial=1.0)
        assert largest < 100
        np.testing.assert_allclose(np.asarray(got[name]), values, atol=1e-5 * largest, rtol=0)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", NETWORKS)
def test_ranks_together_are_the_network(name, ranks, checkpoints):
    """Every rank has the same logits and features, and of the KV pool its own heads."""
    table = np.random.default_rng(1).permutation(SLOTS * EACH).reshape(SLOTS, EACH)
    whole = TorchEngine(role_of(checkpoints / name), SLOTS * EACH)
    sequence = calls(2, table, NETWORKS[name][1]["vocab_size"])
    wanted = [whole.run(call) for call in sequence]

    def work(group):
        role = role_of(checkpoints / name, Shard(group.rank, ranks))
        engine = TorchEngine(role, SLOTS * EACH, collectives=group.collectives)
        return engine, [engine.run(call) for call in sequence]

    for rank, (engine, outputs) in enumerate(on_ranks(ranks, work)):
        for got, expected in zip(outputs, wanted, strict=True):
            assert_close(got, expected)
        heads, own = whole._pool.shape[2], engine._pool.shape[2]
        assert own == max(heads // ranks, 1)
        first = rank * heads // ranks
        torch.testing.assert_close(engine._pool, whole._pool[:, :, first : first + own], atol=1e-4, rtol=0)


def test_a_layers_output_is_added_up_where_it_is(checkpoints):
    """NCCL's calls on gloo's group, which has them, too: a copy would be one more kernel, twice a layer."""
    table = np.random.default_rng(1).permutation(SLOTS * EACH).reshape(SLOTS, EACH)
    sequence = calls(2, table, NETWORKS["dense"][1]["vocab_size"])
    wanted = [TorchEngine(role_of(checkpoints / "dense"), SLOTS * EACH).run(sequence[0])]

    def work(group):
        collectives = ByNccl(group.collectives.group)
        part = torch.full((3, 2), 1.0 + group.rank)
        with among(collectives):
            assert all_reduce(part, 2) is part
        assert (part == 3).all()
        role = role_of(checkpoints / "dense", Shard(group.rank, 2))
        return TorchEngine(role, SLOTS * EACH, collectives=collectives).run(sequence[0])

    for outputs in on_ranks(2, work):
        assert_close(outputs, wanted[0])


def by_numpy(collectives):
    return {
        "AllReduce": lambda part, ranks: collectives.all_reduce(torch.from_numpy(part), ranks).numpy(),
        "AllGather": lambda part, ranks: collectives.all_gather(torch.from_numpy(part), ranks).numpy(),
    }


class RankSession(RoleSession):
    """A rank's engine behind the session's interface; ``collectives`` stand in for TensorRT's own."""

    def __init__(self, role, graph, sizes, collectives):
        super().__init__(role, graph, sizes)
        self._collectives = collectives

    def launch(self, tensors, aliases, recurs=True):
        with among(self._collectives):
            return super().launch(tensors, aliases, recurs)


def test_packed_graphs_and_engines_of_all_ranks_are_the_network(checkpoints, tmp_path):
    """As TensorRT gets them, and what its engine makes of calls; attention is the operator's reference."""
    ranks, blocks = 2, SLOTS * EACH
    sizes = CallSizes(batch=SLOTS, blocks=EACH, tree=8, chunk=64, pool=blocks)
    table = np.random.default_rng(4).permutation(blocks).reshape(SLOTS, EACH)
    whole = TorchEngine(role_of(checkpoints / "mixture"), blocks)
    roles = [role_of(checkpoints / "mixture", Shard(rank, ranks)) for rank in range(ranks)]
    for rank, role in enumerate(roles):
        export(role, tmp_path / f"{rank}.onnx")
    sequence = calls(5, table, NETWORKS["mixture"][1]["vocab_size"])[:3]

    def attention(*inputs, **attributes):
        return super_tree_attention(*map(torch.from_numpy, inputs)).numpy()

    def work(group):
        path = tmp_path / f"{group.rank}.onnx"
        graph = CutGraph(path, by_numpy(group.collectives) | {"SuperTreeAttention": attention})
        shapes = {n: [d.dim_value for d in t.shape.dim][1:] for n, t in graph.inputs.items() if "_cache." in n}
        caches = {name: np.zeros((blocks, *shape), np.float32) for name, shape in shapes.items()}
        names = ("token_ids", "positions", *METADATA, "logit_rows")
        outputs = [graph.run({name: getattr(call, name) for name in names} | caches) for call in sequence]
        prepare_graph(path, path)
        assert name_collectives(path) == 4
        session = RankSession(roles[group.rank], path, sizes, group.collectives)
        engine = TensorRTEngine(session, SLOTS, EACH, blocks, graphs=False)
        return outputs, [engine.run(call) for call in sequence]

    wanted = [whole.run(call) for call in sequence]
    for both in on_ranks(ranks, work):
        for outputs in both:
            for got, expected in zip(outputs, wanted, strict=True):
                assert_close(got, expected)


class Counting:
    """A checkpoint that keeps what was taken out of it."""

    def __init__(self, stored):
        self.path, self.config, self._stored, self.read = stored.path, stored.config, stored, {}

    def names(self):
        return self._stored.names()

    def shape(self, name):
        return self._stored.shape(name)

    def get(self, name, part=()):
        tensor = self._stored.get(name, part)
        self.read[name] = self.read.get(name, 0) + tensor.numel()
        return tensor


@pytest.mark.parametrize("name", NETWORKS)
def test_a_rank_reads_its_own_part_alone(name, checkpoints):
    read = []
    for rank in range(4):
        checkpoint = Counting(open_checkpoint(checkpoints / name))
        network = load_decoder(checkpoint, POSITIONS, shard=Shard(rank, 4))
        assert sum(checkpoint.read.values()) == sum(p.numel() for p in network.parameters())
        read.append(checkpoint.read)
    stored = open_checkpoint(checkpoints / name)
    for tensor in stored.names():
        size = stored.get(tensor).numel()
        if "down_proj" in tensor or "q_proj" in tensor:  # of a matrix or a bias
            assert all(each[tensor] == size // 4 for each in read)
