"""A network divided among cards is the whole one on the first: PyTorch's all-reduce over NCCL, a process per card."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from gpu.engines import call_of
from gpu.random_networks import SMALL, TINY, random_decoder

from echo_trt.backends.parallel.rank_group import RankGroup
from echo_trt.backends.parallel.ranked import RankedEngine
from echo_trt.backends.torch.engine import TorchEngine, open_torch
from echo_trt.models.config import DecoderConfig
from echo_trt.models.decoder import Decoder
from echo_trt.models.layers import Rotary
from echo_trt.models.ranks import Shard
from echo_trt.models.read_config import rank_config
from echo_trt.models.roles import TargetModule
from echo_trt.speculation.pack import pack

pytestmark = pytest.mark.gpu
POSITIONS, BLOCKS, PATIENCE = 512, 8, 60.0
BOUND = 1e-3  # of the largest logit, in float32


@dataclass(frozen=True)
class RandomRank:
    """Opens a rank of a random network, from a file as a bundle's: its weights must be on its own card alone."""

    config: DecoderConfig
    graphs: bool
    cuda: bool

    def __call__(self, group: RankGroup) -> TorchEngine:
        role = TargetModule(part_of(whole(self.config), Shard(group.rank, group.ranks)))
        if not self.cuda:
            return TorchEngine(role, BLOCKS, graphs=self.graphs, collectives=group.collectives)
        from echo_trt.backends.torch.files import save_role  # needs safetensors

        with tempfile.TemporaryDirectory() as folder:
            save_role(role, Path(folder) / "rank", "fp32")
            engine = open_torch(Path(folder) / "rank", BLOCKS, group=group)
        if not self.graphs:
            engine._graphs = None
        assert group.rank == 0 or torch.cuda.memory_allocated(0) == 0, "weights of another rank are on the first card"
        return engine


def whole(config: DecoderConfig) -> Decoder:
    return random_decoder(config, POSITIONS, torch.float32, torch.device("cpu"))


def part_of(network: Decoder, shard: Shard) -> Decoder:
    config = rank_config(network.config, shard.ranks)
    with torch.device("meta"):
        part = Decoder(config, POSITIONS)
    values = {}
    for name, own in part.state_dict().items():
        pairs = zip(_merged(name, network.get_parameter(name), network.config), _merged(name, own, config), strict=True)
        values[name] = torch.cat([one[tuple(map(shard.slice_of, one.shape, mine.shape))] for one, mine in pairs])
    part.load_state_dict(values, assign=True)
    part.rotary = Rotary(config, POSITIONS)
    return part.requires_grad_(False).eval()


def _merged(name: str, value: torch.Tensor, config: DecoderConfig) -> tuple[torch.Tensor, ...]:
    if name.endswith("qkv.weight"):
        heads = config.num_heads, config.num_kv_heads, config.num_kv_heads
        return value.split([config.head_dim * h for h in heads])
    return value.chunk(2) if name.endswith("gate_up.weight") else (value,)


@pytest.mark.parametrize("graphs", [False, True], ids=["launches", "graphs"])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_compute_what_one_card_does(card, ranks, graphs, figures):
    cards = torch.cuda.device_count() if card.device.type == "cuda" else 2
    if card.device.type == "cuda":
        pytest.importorskip("safetensors")
    if cards < ranks or (graphs and card.device.type != "cuda"):
        pytest.skip(f"{ranks} ranks{' with graphs' * graphs} take {ranks} cards, and this machine has {cards}")
    config = card.pick(dataclasses.replace(SMALL, num_heads=16, num_kv_heads=4, head_dim=32), TINY)
    rng, count = np.random.default_rng(0), 45
    none, size, table = np.zeros(1, np.int64), np.array([count]), np.array([[2, 0, 3]])
    tokens, indices = rng.integers(0, config.vocab_size, count), np.arange(count)
    tree = call_of(1, 7, count, config.vocab_size, rng)
    calls = [pack(tokens, indices, none, size, table, indices), tree._replace(block_indices=np.array([2, 0]))]
    single = TorchEngine(TargetModule(whole(config)), BLOCKS, str(card.device))
    wanted = [np.asarray(single.run(call)["logits"]) for call in calls]
    engine = RankedEngine(RandomRank(config, graphs, card.device.type == "cuda"), ranks, PATIENCE)
    got = [np.asarray(engine.run(call)["logits"]) for call in calls]
    for one, other in zip(got, wanted, strict=True):
        assert np.abs(one - other).max() <= BOUND * np.abs(other).max()
    begin = time.perf_counter()
    for _ in range(10):
        np.asarray(engine.run(calls[-1])["logits"])
    figures(ms=(time.perf_counter() - begin) * 100)
