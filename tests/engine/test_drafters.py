"""Drafts in step: whatever happened to a request, its draft is what the network gives for the whole text at once."""

import numpy as np
import pytest
from driving import Counted, add, echo_planner, prompt_ids, run
from pairs import FOLDERS, LIMITS, VOCAB, reference_engines

from echo_trt.backends.self_check import block_shape
from echo_trt.engine.batch import InputBatch
from echo_trt.engine.drafters.eagle3 import NEWEST, EngineDrafter
from echo_trt.models.block_weights import confidence_by_token
from echo_trt.models.open_checkpoint import open_checkpoint
from echo_trt.models.roles import BlockModule
from echo_trt.speculation.pack import BLOCK, pack, pack_blocks
from echo_trt.speculation.super_tree import SuperTree

LEVEL_PAIRS, BLOCK_PAIRS = ("model", "self", "eagle3", "close"), ("dflash", "dspark", "peagle")
ENGINE_PAIRS = (*LEVEL_PAIRS, *BLOCK_PAIRS)


class FromScratch:
    """A pair's draft, computed over a whole text by the reference engines, with nothing kept from anywhere."""

    def __init__(self, pair: str, networks):
        self.engines, self.folder = reference_engines(pair, networks, 8), networks / FOLDERS[pair][2]
        self.table = np.array([[5, 2, 7, 0, 3, 1, 4, 6]])

    def call(self, network: str, tokens, past: int = 0, **inputs) -> dict[str, np.ndarray]:
        """Return the outputs for one request's next tokens, those by row for the last one."""
        count = len(tokens)
        where = past + np.arange(count)
        return self.engines[network].run(
            pack(np.asarray(tokens), where, np.array([past]), np.array([count]), self.table, np.array([count - 1])),
            **inputs,
        )

    def candidates(self, text, path=()) -> tuple[np.ndarray, np.ndarray]:
        """log q [k] and tokens [k] of what follows ``text`` and then the drafted ``path``."""
        if not hasattr(self.engines["draft"]._role.network, "fc"):
            outputs = self.call("draft", [*text, *path])
            return outputs["scores"][0], outputs["candidates"][0]
        features = self.call("target", text[:-1])["features"]
        if isinstance(self.engines["draft"]._role, BlockModule):
            return self.of_block(text, path, features)
        none = {"features": features[:0], "hidden": np.zeros((0, 64), np.float32)}
        outputs = self.call("draft", text[1:], **none | {"features": features})
        for i, token in enumerate(path):
            outputs = self.call("draft", [token], len(text) - 1 + i, **none | {"hidden": outputs["state"][-1:].copy()})
        return outputs["scores"][0], outputs["candidates"][0]

    def of_block(self, text, path, features) -> tuple[np.ndarray, np.ndarray]:
        """Return the same of a block drafter, whose whole context comes with the block."""
        network = self.engines["draft"]._role.network
        count, config = np.array([len(text) - 1]), network.config
        call, states = pack_blocks(
            block_shape(config), np.array(text[1:]), 0 * count, count, np.array(text[-1:]), self.table
        )
        outputs = self.engines["draft"].run(call, features=features, state_rows=states)
        row = int(not config.predicts_next) + len(path)
        log_q, candidates = (outputs[name][row].copy() for name in ("scores", "candidates"))
        if config.confidence:
            previous = [*text, *path][-1]
            logit = outputs["confidence"][row, 0] + confidence_by_token(network, open_checkpoint(self.folder))[previous]
            best = 1 / (1 + np.exp(-logit))
            log_q += np.log((1 - best) / (1 - np.exp(log_q[0])))
            log_q[0] = np.log(best)
        return log_q, candidates


@pytest.fixture(scope="module")
def from_scratch(networks):
    known = {}
    return lambda pair: known.setdefault(pair, FromScratch(pair, networks))


def text_of(loop, slot: int) -> list[int]:
    return loop.batch.tokens[slot, : loop.batch.length[slot]].tolist()


def assert_in_step(loop, scratch: FromScratch) -> None:
    """Draft three uneven levels for all decoding requests; each node's children are those of its path from scratch."""
    slots = loop.batch.decoding()
    assert len(slots)
    texts = [text_of(loop, slot) for slot in slots]
    tree = SuperTree.from_roots(np.array([text[-1] for text in texts]))
    draft = loop.drafter.begin(slots)
    nodes = np.arange(len(slots))
    expanded = draft.expand_roots(nodes)
    for level in range(3):
        for node, log_q, tokens in zip(nodes, *expanded, strict=True):
            wanted_q, wanted_tokens = scratch.candidates(texts[tree.request[node]], path_of(tree, node))
            np.testing.assert_allclose(log_q, wanted_q, atol=1e-4, rtol=1e-4)
            assert tokens.tolist() == wanted_tokens.tolist()
        if level == 2:
            return
        children = tree.add(np.repeat(nodes, 3), expanded[1][:, [2, 0, 1]].reshape(-1), np.zeros(3 * len(nodes)))
        # The first request goes on from two of three children, the others from one, the last only at the first level.
        nodes = children[(children % 3 == 0) | ((tree.request[children] == 0) & (children % 3 == 1))]
        if level == 1 and len(slots) > 1:
            nodes = nodes[tree.request[nodes] < len(slots) - 1]
        expanded = draft.expand(tree, nodes)


def path_of(tree: SuperTree, node: int) -> list[int]:
    path = []
    while tree.parent[node] >= 0:
        path.insert(0, int(tree.token[node]))
        node = tree.parent[node]
    return path


# What may happen to a request before it drafts again. Each leaves at least one request decoding.


def running(llm):
    for seed in range(3):
        add(llm.loop, prompt_ids(9 + 7 * seed, seed))
    run(llm.loop, 9)


def a_pause(llm):
    running(llm)
    llm.set_policy("autoregressive")
    run(llm.loop, 5)


def a_pause_longer_than_a_chunk(llm):
    add(llm.loop, prompt_ids(9, 0), max_tokens=100)
    add(llm.loop, prompt_ids(40, 1), max_tokens=100)
    run(llm.loop, 5)
    llm.set_policy("autoregressive")
    run(llm.loop, 2 * LIMITS["prefill_chunk"] + 3)


def only_plain_decoding_so_far(llm):
    llm.set_policy("autoregressive")
    running(llm)


def a_neighbour_cancelled(llm):
    requests = [add(llm.loop, prompt_ids(12, seed)) for seed in range(3)]
    run(llm.loop, 4)
    llm.loop.scheduler.cancel(requests[1])
    run(llm.loop, 2)


def a_slot_of_another_before(llm):
    earlier = [add(llm.loop, prompt_ids(30, seed), max_tokens=60) for seed in range(3)]
    run(llm.loop, 8)
    for request in earlier[:2]:
        llm.loop.scheduler.cancel(request)
    add(llm.loop, prompt_ids(11, 7))
    add(llm.loop, prompt_ids(5, 8))
    run(llm.loop, 4)


def a_prompt_that_just_ended(llm):
    add(llm.loop, prompt_ids(LIMITS["prefill_chunk"] + 1, 0))
    run(llm.loop, 2)


def being_set_back(llm):
    requests = [add(llm.loop, prompt_ids(40, seed), max_tokens=100) for seed in range(3)]
    run(llm.loop, 9)
    llm.loop.scheduler.preempt_least_urgent()
    llm.loop.scheduler.preempt_least_urgent()
    run(llm.loop, 7)
    assert all(request.slot in llm.loop.batch.decoding() for request in requests)


def a_prefix_that_was_found(llm):
    common = prompt_ids(2 * BLOCK + 1, 5)
    for seed in range(2):
        add(llm.loop, common + prompt_ids(9, seed), max_tokens=30)
    run(llm.loop)
    found = [add(llm.loop, common + prompt_ids(9 + seed, seed), max_tokens=40) for seed in range(3)]
    run(llm.loop, 3)
    assert llm.counters.cached_tokens >= 3 * 2 * BLOCK
    assert all(request.slot in llm.loop.batch.decoding() for request in found)


def a_prefix_that_was_found_undrafted(llm):
    llm.set_policy("autoregressive")
    add(llm.loop, prompt_ids(70, 5), max_tokens=30)
    run(llm.loop)
    llm.set_policy("echo")
    for seed in range(2):
        add(llm.loop, prompt_ids(70, 5) + prompt_ids(9, seed), max_tokens=40)
    run(llm.loop, 4)
    assert llm.counters.cached_tokens >= 2 * 2 * BLOCK


def another_turn(llm):
    first = add(llm.loop, prompt_ids(40, 5), max_tokens=30)
    run(llm.loop)
    add(llm.loop, [*prompt_ids(40, 5), *first.generated, *prompt_ids(9, 1)], max_tokens=40)
    run(llm.loop, 2)
    assert llm.counters.cached_tokens == 2 * BLOCK


@pytest.mark.parametrize(
    "event",
    [
        running,
        a_prefix_that_was_found,
        a_prefix_that_was_found_undrafted,
        another_turn,
        a_pause,
        a_pause_longer_than_a_chunk,
        only_plain_decoding_so_far,
        a_neighbour_cancelled,
        a_slot_of_another_before,
        a_prompt_that_just_ended,
        being_set_back,
    ],
    ids=lambda event: event.__name__,
)
@pytest.mark.parametrize("pair", ["model", "close", "dspark"])
def test_the_draft_is_in_step_after(event, pair, open_llm, from_scratch):
    """A model, a head and a block drafter: what they keep of a request is each kind's, whatever its network is."""
    llm = open_llm(pair)
    event(llm)
    assert_in_step(llm.loop, from_scratch(pair))


@pytest.mark.parametrize("pair", [pair for pair in BLOCK_PAIRS if pair != "dspark"])
def test_every_block_drafter_is_in_step_after_a_setback(pair, open_llm, from_scratch):
    llm = open_llm(pair)
    being_set_back(llm)
    assert_in_step(llm.loop, from_scratch(pair))


@pytest.mark.parametrize("pair", ENGINE_PAIRS)
def test_not_drafting_never_calls_the_draft(pair, open_llm):
    llm = open_llm(pair, "autoregressive")
    llm.loop.drafter.engine = draft = Counted(llm.loop.drafter.engine)
    llm.loop.target = target = Counted(llm.loop.target)
    for seed in range(3):
        add(llm.loop, prompt_ids(30, seed), max_tokens=10)
    run(llm.loop, 8)
    assert len(target.calls) == 8
    llm.loop.planner = echo_planner(max_depth=4, beams=2, width=3, budget=3)  # spent on the roots
    run(llm.loop, 3)
    assert draft.calls == []
    llm.set_policy("echo")
    run(llm.loop, 1)
    assert draft.calls


def in_step(open_llm, pair: str) -> tuple:
    """Return the LLM with one running request, its draft's counted engine, and the tokens just emitted."""
    llm = open_llm(pair, "static")
    add(llm.loop, prompt_ids(10, 0), max_tokens=100)
    run(llm.loop, 2)
    llm.loop.drafter.engine = draft = Counted(llm.loop.drafter.engine)
    ((_, emitted),) = run(llm.loop, 1)
    return llm, draft, emitted


@pytest.mark.parametrize("pair", BLOCK_PAIRS)
def test_a_block_costs_one_pass_an_iteration(pair, open_llm):
    llm, draft, emitted = in_step(open_llm, pair)
    for _ in range(6):
        draft.calls.clear()
        passes, drafted = llm.counters.draft_passes, llm.counters.drafted_tokens
        ((_, next_emitted),) = run(llm.loop, 1)
        assert llm.counters.draft_passes == passes + 1
        assert llm.counters.drafted_tokens > drafted + 3
        (call,) = draft.calls
        assert len(call.token_ids) == len(emitted) + llm.loop.drafter.shape.appended
        emitted = next_emitted


@pytest.mark.parametrize("pair", LEVEL_PAIRS)
def test_a_request_in_step_costs_one_pass_a_level_and_reads_no_token_twice(pair, open_llm):
    llm, draft, emitted = in_step(open_llm, pair)
    for _ in range(6):
        draft.calls.clear()
        ((_, next_emitted),) = run(llm.loop, 1)
        assert len(draft.calls) == llm.loop.planner.settings.max_depth
        assert len(draft.calls[0].token_ids) == len(emitted)
        emitted = next_emitted


def test_many_requests_that_are_behind_catch_up_in_passes_of_a_chunk(open_llm, from_scratch):
    """Whoever misses most goes first, and the last pass has a few entries per request."""
    llm = open_llm("close")
    llm.set_policy("autoregressive")
    for seed, length in enumerate((70, 20, 30)):
        add(llm.loop, prompt_ids(length, seed))
    run(llm.loop, 12)
    assert len(llm.loop.batch.decoding()) == 3
    llm.set_policy("static")
    llm.loop.drafter.engine = draft = Counted(llm.loop.drafter.engine)
    draft_lag = int(llm.loop.drafter.draft_lag(llm.loop.batch.decoding()).sum())
    run(llm.loop, 1)
    read = np.cumsum([len(call.token_ids) for call in draft.calls])
    last = int(np.searchsorted(read, draft_lag))
    assert read[last] == draft_lag
    sizes = np.diff(read, prepend=0)[: last + 1]
    assert last > 3
    assert (sizes[:-1] <= LIMITS["prefill_chunk"]).all()
    assert sizes[-1] <= NEWEST * 3
    assert_in_step(llm.loop, from_scratch("close"))


def test_a_slots_next_text_is_drafted_from_its_beginning():
    batch = InputBatch(1, 8 * BLOCK, BLOCK, 9)
    drafter = EngineDrafter(Counted(Silent()), batch, 8 * BLOCK)
    for seed in (1, 2):
        text = np.random.default_rng(seed).integers(0, VOCAB, 200)
        assert batch.open(0, text, [])
        batch.committed[0] = len(text) - 1
        assert drafter.draft_lag(np.array([0])) == len(text)
        drafter.prefill_draft(np.array([0]))
        assert len(drafter.engine.calls[-1].token_ids) == len(text)
        batch.release(0)
        drafter.forget(0)


class Silent:
    """An engine that proposes nothing."""

    num_blocks = 9

    def run(self, call):
        return {"scores": np.zeros((len(call.logit_rows), 0)), "candidates": np.zeros((len(call.logit_rows), 0))}
