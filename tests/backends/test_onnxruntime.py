"""The native export on ONNX Runtime: the reference's numbers, and ECHO's losslessness from end to end."""

import numpy as np
import pytest
from driving import Foresight, add, assert_all_free, prompt_ids, run
from models.checkpoints import qwen3_moe
from pairs import DECODING, LIMITS, NATIVE_ROWS, VOCAB, roles_of
from random_calls import Script, inputs_for

from echo_trt.backends.native_export import export_native
from echo_trt.backends.onnxruntime import OnnxRuntimeEngine
from echo_trt.backends.torch.engine import TorchEngine
from echo_trt.cli.build import block_facts
from echo_trt.engine.batch import InputBatch, blocks_for
from echo_trt.engine.core import EngineCore
from echo_trt.engine.drafters.block import BlockDrafter
from echo_trt.engine.drafters.eagle3 import Eagle3Drafter, EngineDrafter
from echo_trt.models.open_checkpoint import open_checkpoint
from echo_trt.models.roles import BlockModule, HeadModule, TargetModule
from echo_trt.models.weights import load_decoder
from echo_trt.speculation.pack import BLOCK
from echo_trt.speculation.policies import make_planner, reserve_for

CONTEXT, CHUNK = LIMITS["context"], LIMITS["prefill_chunk"]
RESERVE = reserve_for(DECODING)
BLOCKS = blocks_for(CONTEXT + RESERVE)


@pytest.fixture(scope="module")
def native(networks, tmp_path_factory):
    """(pair, network, precision) -> the role and its native graph; the pair "experts" has a Qwen3-MoE target."""
    folder, known = tmp_path_factory.mktemp("native"), {}

    def role_of(pair, name):
        if pair != "experts":
            return roles_of(pair, networks)[name]
        qwen3_moe(vocab_size=VOCAB, num_hidden_layers=2, mlp_only_layers=[0]).save_pretrained(folder / "moe")
        return TargetModule(load_decoder(open_checkpoint(folder / "moe"), CONTEXT + RESERVE), (0, 1, 1))

    def get(pair, name, precision="fp32"):
        key = pair, name, precision
        if key not in known:
            role, path = role_of(pair, name), folder / f"{pair}-{name}-{precision}.onnx"
            export_native(role, path, precision, NATIVE_ROWS)
            known[key] = role, path
        return known[key]

    return get


class Conversation:
    """Random calls to two engines: prompt chunks, single tokens and trees whose best path is then moved into place."""

    def __init__(self, role, engines, slots, seed):
        self.role, self.engines, self.slots = role, engines, slots
        self.script = Script(seed, np.arange(slots * BLOCKS).reshape(slots, BLOCKS))

    def call(self) -> list[dict[str, np.ndarray]]:
        """Return a call over some of the slots; returns both engines' outputs."""
        script, rng, past = self.script, self.script.rng, self.script.past
        slots = rng.permutation(self.slots)[: rng.integers(1, self.slots + 1)]
        for slot in slots[(past[slots] > CONTEXT - 60) | (rng.random(len(slots)) < 0.15)]:
            past[slot] = 0  # another request, into a slot of which nothing may be read
            self.engines[1]._pool[:, slot] = np.nan
        planted = int(rng.integers(0, len(slots) + 1))
        chunks = rng.choice([1, 1, 3, 11, 50], len(slots) - planted)
        call = script.call(slots, planted, chunks, int(rng.integers(0, 4 * planted + 1)), 0.5)
        inputs = inputs_for(self.role, call, rng)
        outputs = [engine.run(call, **inputs) for engine in self.engines]
        self._commit(script.tree, slots, planted)
        return outputs

    def _commit(self, tree, slots, planted):
        """Keep the path to each tree's last node, as a verification would."""
        for request in range(planted):
            nodes = np.flatnonzero(tree.request == request)
            path, node = [], nodes[-1]
            while node >= 0:
                path.insert(0, int(node - nodes[0]))
                node = tree.parent[node]
            first = slots[request] * BLOCKS * BLOCK + self.script.past[slots[request]]
            for engine in self.engines:
                engine.compact_kv(first + np.array(path), first + np.arange(len(path)))
            self.script.past[slots[request]] += len(path)


def errors(role, path, calls, seed=0) -> dict[str, list[float]]:
    """Largest error of each output, as a share of its largest value, call by call."""
    slots = 4
    engines = [TorchEngine(role, slots * BLOCKS), OnnxRuntimeEngine(path, slots, BLOCKS, threads=1)]
    engines[1]._pool[:] = np.nan
    conversation, found = Conversation(role, engines, slots, seed), {name: [] for name in role.outputs}
    for _ in range(calls):
        want, got = conversation.call()
        assert set(got) == set(want) == set(role.outputs)
        for name, array in want.items():
            wanted = np.asarray(array)
            assert got[name].shape == wanted.shape
            assert got[name].dtype == (np.int64 if name == "candidates" else np.float32)
            if wanted.size:
                found[name].append(float(np.abs(got[name] - wanted).max() / np.abs(wanted).max()))
    return found


@pytest.mark.parametrize(
    ("pair", "name"),
    [("eagle3", "target"), ("model", "draft"), ("eagle3", "draft"), ("experts", "target"), ("dflash", "draft")],
)
def test_outputs_are_the_references(pair, name, native):
    for output, shares in errors(*native(pair, name), calls=40).items():
        assert len(shares) > 30
        assert max(shares) < (1e-5 if output != "candidates" else 1e-9), output


def test_half_precision_is_near(native):
    shares = errors(*native("eagle3", "target", "fp16"), calls=10)
    assert 1e-5 < max(shares["logits"]) < 0.01
    assert 1e-5 < max(shares["features"]) < 0.01


# -- ECHO from end to end ---------------------------------------------------------------------------------------------

PROMPTS = (5, 37, 1, 16, 50, 17, 2, 33)
ANSWERS = (24, 9, 20, 31, 1, 26, 15, 22)


@pytest.fixture(scope="module")
def open_loop(native):
    """Return a loop over engines of either kind, without a bundle."""

    def get(pair: str, policy: str, batch: int, kind: str = "onnxruntime") -> EngineCore:
        contiguous = kind == "onnxruntime"
        input_batch = InputBatch(batch, CONTEXT, RESERVE, None if contiguous else batch * BLOCKS)

        def engine(name):
            role, path = native(pair, name)
            return (
                OnnxRuntimeEngine(path, batch, BLOCKS, threads=1) if contiguous else TorchEngine(role, batch * BLOCKS)
            )

        drafter = EngineDrafter(engine("draft"), input_batch, CHUNK)
        head = native(pair, "draft")[0]
        if isinstance(head, BlockModule):
            config = head.network.config
            drafter = BlockDrafter(drafter.engine, input_batch, CHUNK, config.feature_size, block_facts(config))
        if isinstance(head, HeadModule):
            config = head.network.config
            sizes = 3 * config.target_hidden_size, config.hidden_size
            drafter = Eagle3Drafter(drafter.engine, input_batch, CHUNK, *sizes)
        planner = make_planner(policy, DECODING, lambda *_: None)
        return EngineCore(engine("target"), drafter, input_batch, planner, (0,), CHUNK)

    return get


def answers(loop: EngineCore, apart: int = 0) -> list[list[int]]:
    """Greedy and sampled requests, each ``apart`` iterations after the one before it."""
    requested = []
    for i, (length, tokens) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        sampled = {"temperature": 0.8, "top_p": 0.95} if i % 2 else {}
        requested.append(
            add(loop, prompt_ids(length, i), max_tokens=tokens, seed=100 + i, ignore_eos=i % 4 < 2, **sampled)
        )
        run(loop, steps=apart)
    run(loop)
    assert_all_free(loop)
    return [request.generated for request in requested]


@pytest.fixture(scope="module")
def plain(open_loop):
    """Return what plain decoding writes, one request at a time, on this engine and on the reference."""
    known = {}

    def get(pair: str) -> list[list[int]]:
        if pair not in known:
            known[pair] = answers(open_loop(pair, "autoregressive", 1))
            assert known[pair] == answers(open_loop(pair, "autoregressive", 3, "torch"))
        return known[pair]

    return get


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("policy", ["static", "echo"])
@pytest.mark.parametrize("pair", ["eagle3", "close", "dflash"])
def test_policies_write_the_same_tokens(pair, policy, batch, open_loop, plain):
    loop = open_loop(pair, policy, batch)
    assert answers(loop, apart=2 * (batch > 1)) == plain(pair)
    assert loop.counters.drafted_tokens > 100
    if pair == "close":
        assert loop.counters.accepted_length > 1.2


def test_branches_beside_the_first_are_accepted(open_loop, plain):
    """Most of each tree is accepted, so that nearly every iteration moves rows of the caches."""
    loop, written = open_loop("eagle3", "echo", 3), plain("eagle3")
    texts = [prompt_ids(n, i) + w for i, (n, w) in enumerate(zip(PROMPTS, written, strict=True))]
    loop.drafter = Foresight(loop.batch, texts)
    assert answers(loop) == written
    assert loop.counters.accepted_length > 1.3
