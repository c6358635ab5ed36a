"""A network divided among GPUs against the whole one on the first: PyTorch's all-reduce over NCCL, a process a GPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from echo_trt.backends.cuda.device import has_cuda
from echo_trt.backends.parallel.rank_group import RankGroup
from echo_trt.backends.parallel.ranked import RankedEngine
from echo_trt.backends.torch.engine import TorchEngine
from echo_trt.decoding.pack import pack
from echo_trt.decoding.super_tree import SuperTree, ancestor_mask
from echo_trt.errors import UserError
from echo_trt.models.config import DecoderConfig, rank_config
from echo_trt.models.decoder import Decoder
from echo_trt.models.layers import Rotary
from echo_trt.models.ranks import Shard
from echo_trt.models.roles import TargetRole
from gpu_proof_parts.networks import SMALL, TINY, random_decoder
from gpu_proof_parts.report import Proof, Skipped

POSITIONS, BLOCKS, PATIENCE = 512, 8, 60.0
BOUND = 1e-3  # of the largest logit, in float32


@dataclass(frozen=True)
class RandomRank:
    """Opens a rank of a random network: every process makes the whole and keeps its part."""

    config: DecoderConfig
    graphs: bool = False

    def __call__(self, group: RankGroup) -> TorchEngine:
        if has_cuda() and importlib.util.find_spec("safetensors"):
            return self._from_file(group)
        role = TargetRole(part_of(whole(self.config), Shard(group.rank, group.ranks)))
        device = "cuda" if has_cuda() else "cpu"
        return TorchEngine(role, BLOCKS, device, graphs=self.graphs, collectives=group.collectives)

    def _from_file(self, group: RankGroup) -> TorchEngine:
        """Open the rank's file as a bundle's is: its weights must be on its own card alone."""
        from echo_trt.backends.torch.engine import open_torch
        from echo_trt.backends.torch.files import save_role

        role = TargetRole(part_of(whole(self.config), Shard(group.rank, group.ranks)))
        with tempfile.TemporaryDirectory() as folder:
            save_role(role, Path(folder) / "rank", "fp32")
            engine = open_torch(Path(folder) / "rank", BLOCKS, group=group)
        if not self.graphs:
            engine._graphs = None
        if group.rank and torch.cuda.memory_allocated(0):
            raise UserError(f"rank {group.rank} holds {torch.cuda.memory_allocated(0)} bytes on the first card.")
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
        values[name] = torch.cat([one[tuple(map(shard.place, one.shape, mine.shape))] for one, mine in pairs])
    part.load_state_dict(values, assign=True)
    part.rotary = Rotary(config, POSITIONS)
    return part.requires_grad_(False).eval()


def _merged(name: str, value: torch.Tensor, config: DecoderConfig) -> tuple[torch.Tensor, ...]:
    if name.endswith("qkv.weight"):
        heads = config.num_heads, config.num_kv_heads, config.num_kv_heads
        return value.split([config.head_dim * h for h in heads])
    return value.chunk(2) if name.endswith("gate_up.weight") else (value,)


def prove(proof: Proof) -> None:
    gpus = 2 if proof.interpret else torch.cuda.device_count()
    if gpus < 2:
        raise Skipped(f"it takes two GPUs, and this machine has {gpus}")
    config = TINY if proof.interpret else dataclasses.replace(SMALL, num_heads=16, num_kv_heads=4, head_dim=32)
    single = TorchEngine(TargetRole(whole(config)), BLOCKS, str(proof.device))
    calls = _calls(config.vocab_size)
    wanted = [np.asarray(single.run(call)["logits"]) for call in calls]
    rows = []
    for ranks in (r for r in (2, 4, 8) if r <= min(gpus, 2 if proof.interpret else 8)):
        for graphs in (False,) if proof.interpret else (False, True):
            if proof.in_time:
                rows.append(_row(proof, RandomRank(config, graphs), ranks, calls, wanted))
    if not rows:
        raise Skipped("no time was left")
    proof.table(("ranks", "CUDA graphs", "largest error", "time of a call"), rows)
    proof.say(
        "A prompt and a tree, in float32; errors are over the largest logit. Where safetensors is installed, ranks "
        "were opened from files, and those above the first have nothing on the first card."
    )


def _row(proof: Proof, opened: RandomRank, ranks: int, calls: list, wanted: list[np.ndarray]) -> tuple:
    try:
        engine = RankedEngine(opened, ranks, PATIENCE)
        got = [np.asarray(engine.run(call)["logits"]) for call in calls]
        start = time.perf_counter()
        for _ in range(10):
            np.asarray(engine.run(calls[-1])["logits"])
        told = f"{(time.perf_counter() - start) * 100:.2f} ms"
        error = max(np.abs(g - w).max() / np.abs(w).max() for g, w in zip(got, wanted, strict=True))
    except UserError as refusal:
        told, error = str(refusal), float("inf")
    kind = "with CUDA graphs" if opened.graphs else "by launches"
    proof.check(
        f"{ranks} ranks compute what one does, {kind}", error <= BOUND, f"{error:.1g} of the largest logit; {told}"
    )
    return ranks, "yes" if opened.graphs else "no", f"{error:.1e}", told


def _calls(vocab: int) -> list:
    rng, count = np.random.default_rng(0), 45
    table, none = np.array([[2, 0, 3]], np.int32), np.zeros(1, np.int64)
    prompt = pack(rng.integers(0, vocab, count), np.arange(count), none, np.array([count]), table, np.arange(count))
    tree = SuperTree.from_roots(rng.integers(0, vocab, 1))
    for parent in (0, 0, 1, 1, 2, 3):
        tree.add(np.array([parent]), rng.integers(0, vocab, 1), np.zeros(1))
    past, size = np.array([count]), np.array([len(tree)])
    mask = ancestor_mask(tree)
    return [prompt, pack(tree.token, count + tree.depth, past, size, table, np.arange(len(tree)), mask)]
