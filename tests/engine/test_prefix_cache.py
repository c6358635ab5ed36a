"""The prefix cache: every block in one place, the oldest go first, and no KV row of another text is ever read."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from chained import VOCAB, chained_loop, continued
from driving import add, assert_all_free, echo_planner, run
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from echo_trt.engine.batch import InputBatch
from echo_trt.engine.kv_blocks import PrefixCache, blocks_for
from echo_trt.speculation.pack import BLOCK
from echo_trt.speculation.planner import PlainPlanner

COUNT, CONTEXT, CHUNK = 4, 5 * BLOCK + 9, 40
PLANNERS = {
    "plain": PlainPlanner(),
    "static": echo_planner(max_depth=3, beams=2, width=3, per_request=9),
    "echo": echo_planner(max_depth=4, beams=2, width=3, budget=14, per_request=9),
}
RESERVE = max(PLANNERS[name].settings.rows_per_request for name in ("static", "echo"))
LEAST = blocks_for(CONTEXT + RESERVE)
#: Parts of prompts: two differ in their first token, two in their last alone, which is the key of the block before.
PARTS = np.random.default_rng(0).integers(0, VOCAB, (3, BLOCK))
PARTS[2] = PARTS[1]
PARTS[2, -1] = (PARTS[1, -1] + 1) % VOCAB
prompts = st.builds(
    lambda parts, length: np.concatenate([PARTS[p] for p in parts])[:length],
    st.lists(st.integers(0, 2), min_size=4, max_size=4),
    st.integers(1, 4 * BLOCK),
)


def slots(blocks: int, prefix_cache: bool = True) -> InputBatch:
    return InputBatch(COUNT, CONTEXT, RESERVE, blocks, prefix_cache)


class Traffic(RuleBasedStateMachine):
    """Requests of texts that begin alike come, are set back, are cancelled and end, in a pool that is often full."""

    @initialize(blocks=st.integers(LEAST, 3 * LEAST))
    def begin(self, blocks):
        self.loop = chained_loop(slots(blocks), PLANNERS["echo"], CHUNK)
        self.requested = []

    @rule(prompt=prompts, answer=st.integers(1, 2 * BLOCK), stop=st.sampled_from([(), (3,), (7, 8, 9)]))
    def ask(self, prompt, answer, stop):
        self.requested.append(add(self.loop, prompt, max_tokens=answer, stop_token_ids=stop))

    @rule(turn=st.integers(0, 99), more=prompts)
    def ask_again(self, turn, more):
        """Ask the next turn of a conversation."""
        ended = [r for r in self.requested if r.finish_reason]
        if ended:
            before = ended[turn % len(ended)]
            text = np.concatenate((before.prompt, before.generated, more[: 1 + turn % 20])).astype(np.int64)
            self.requested.append(add(self.loop, text[: CONTEXT - 1], max_tokens=1 + turn % 40))

    @rule(steps=st.integers(1, 12), planner=st.sampled_from(sorted(PLANNERS)))
    def step(self, steps, planner):
        self.loop.planner = PLANNERS[planner]
        run(self.loop, steps)

    @precondition(lambda self: self.loop.scheduler.running)
    @rule()
    def set_one_back(self):
        self.loop.scheduler.preempt_least_urgent()

    @rule(which=st.integers(0, 99))
    def cancel(self, which):
        if self.requested:
            request = self.requested.pop(which % len(self.requested))
            self.loop.scheduler.cancel(request)

    @rule(forget=st.booleans())
    def start_again(self, forget):
        requests = self.loop.scheduler.preempt_all()
        if forget:
            self.loop.batch.blocks.forget_cached()
            assert self.loop.batch.blocks.free == self.loop.batch.blocks.count
        for request in requests:
            self.loop.scheduler.add(request)

    @rule()
    def nobody_waits_who_would_not_without_the_cache(self):
        batch, loop = self.loop.batch, self.loop
        loop.scheduler.admit()
        if loop.scheduler.waiting and not batch.active.all():
            needed = blocks_for(
                len(loop.scheduler.waiting[0].prompt) + len(loop.scheduler.waiting[0].generated) + RESERVE
            )
            assert needed > batch.blocks.count - batch.blocks.held.sum()

    @invariant()
    def texts_are_the_targets(self):
        for request in self.requested:
            if request.finish_reason:
                text = continued(request.prompt.tolist(), min(request.params.max_tokens, CONTEXT - len(request.prompt)))
                stops = [i for i, token in enumerate(text) if token in request.params.stop_token_ids]
                assert request.generated == text[: stops[0] + 1 if stops else None]
                keys = keys_of(PrefixCache(), np.concatenate((request.prompt, request.generated)))
                assert request.keys == keys[: len(request.keys)]  # of nothing that was accepted behind a stop

    @invariant()
    def every_block_has_one_place(self):
        batch, cache = self.loop.batch, self.loop.batch.blocks.cache
        held = Counter()
        for slot in range(COUNT):
            held.update(batch.blocks.table[slot, : batch.blocks.held[slot]].tolist())
        free, idle = batch.blocks._free[: batch.blocks.free].tolist(), list(cache._idle)
        assert sorted([*held, *free, *idle]) == list(range(batch.blocks.count))
        assert batch.blocks.used == len(held) <= batch.blocks.held.sum()
        assert cache._holders == {block: held[block] for block in cache._key}
        assert all(count == 1 for block, count in held.items() if block not in cache._key)
        assert {key: block for block, key in cache._key.items()} == cache._block

    @invariant()
    def ends_go_before_beginnings(self):
        cache = self.loop.batch.blocks.cache
        position = {cache._key[block]: i for i, block in enumerate(cache._idle)}
        for request in self.requested:
            chain = [position[key] for key in request.keys if key in position]
            assert chain == sorted(chain, reverse=True)

    def teardown(self):
        if hasattr(self, "loop"):
            run(self.loop)
            assert_all_free(self.loop)
            self.texts_are_the_targets()


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(stateful_step_count=40)


# -- the cache alone ------------------------------------------------------------------------------------------------


def keys_of(cache: PrefixCache, text: np.ndarray) -> list[bytes]:
    keys: list[bytes] = []
    cache.extend(keys, text.astype(np.int32), (len(text) - 1) // BLOCK)
    return keys


def test_the_text_let_go_longest_ago_goes_first_and_its_end_before_its_beginning():
    cache = PrefixCache()
    old, new = (keys_of(cache, np.arange(2 * BLOCK + 1) + offset) for offset in (0, 1000))
    for keys, blocks in ((old, [0, 1]), (new, [2, 3])):
        cache.add(keys, blocks, np.arange(2 * BLOCK + 1))
        assert cache.leave(keys, [*blocks, 9]) == [9]
    found = cache.find(old[:1])
    cache.hold(found)
    cache.leave(old[:1], found)  # used again: the beginning of the old text is now the newest
    assert (cache.evict(1), cache.evict(2), cache.idle) == ([1], [3, 2], 1)
    assert (cache.find(old), cache.find(new), cache.evicted) == ([0], [], 3)


def test_a_block_is_counted_as_forgotten_once_nobody_finds_it():
    """A thread that copies it, and finds the count unchanged, has copied what it looked for."""
    found = []

    class Watched(PrefixCache):
        def __setattr__(self, name, value):
            if name == "forgotten" and value:
                found.append(self.find(keys))
            super().__setattr__(name, value)

    cache = Watched()
    keys = keys_of(cache, np.arange(2 * BLOCK + 1))
    cache.add(keys, [0, 1], np.arange(2 * BLOCK + 1))
    cache.leave(keys, [0, 1])
    cache.forget(1)
    cache.forget(1)
    assert found == [[0], []]


# -- what is computed ------------------------------------------------------------------------------------------------


@pytest.fixture
def loop():
    return chained_loop(slots(6 * LEAST), PLANNERS["echo"], CHUNK)


def computed(loop, prompt, **params) -> tuple[int, int]:
    """Prompt tokens that a request made the target compute, and that it found."""
    before = loop.counters.copy()
    add(loop, prompt, **params)
    run(loop)
    return loop.counters.prompt_tokens - before.prompt_tokens, loop.counters.cached_tokens - before.cached_tokens


@pytest.mark.parametrize(("length", "found"), [(32, 0), (33, 0), (34, 32), (65, 32), (66, 64)])
def test_the_end_of_a_prompt_is_always_computed(length, found, loop):
    prompt = np.random.default_rng(1).integers(0, VOCAB, length)
    assert computed(loop, prompt, max_tokens=1) == (length, 0)
    assert computed(loop, prompt, max_tokens=1) == (length - found, found)


def test_a_request_that_was_set_back_computes_little_again(loop):
    request = add(loop, np.random.default_rng(1).integers(0, VOCAB, 100), max_tokens=50)
    run(loop, 12)
    loop.scheduler.preempt_least_urgent()
    length = 100 + len(request.generated)
    run(loop)
    assert request.cached_tokens == 0, "what it finds of its own text is no part of what the cache had of its prompt"
    assert loop.counters.prompt_tokens == 100 + length - (length - 2) // BLOCK * BLOCK


def test_drafts_find_what_drafts_have_left(loop):
    """The head reads a found prefix no second time, and is accepted as often as without one."""
    prompt = np.random.default_rng(1).integers(0, VOCAB, 3 * BLOCK + 5)
    first = add(loop, prompt, max_tokens=40)
    run(loop)
    before = loop.drafter.engine.tokens_read
    second = add(loop, prompt, max_tokens=40)
    run(loop)
    alone = chained_loop(slots(6 * LEAST, False), PLANNERS["echo"], CHUNK)
    third = add(alone, prompt, max_tokens=40)
    run(alone)
    assert first.verifications == second.verifications == third.verifications < 25
    assert alone.drafter.engine.tokens_read - (loop.drafter.engine.tokens_read - before) == 3 * BLOCK
