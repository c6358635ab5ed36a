"""KV events: told block by block, with their parents, and in the end what the cache holds."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from chained import chained_loop
from driving import add, echo_planner, prompt_ids, run
from steered import submit

from echo_trt.adapters.dynamo.events import BlockEvents, block_hash
from echo_trt.engine import stored_prefixes
from echo_trt.engine.batch import InputBatch
from echo_trt.engine.kv_blocks import rows
from echo_trt.engine.params import SamplingParams
from echo_trt.speculation.pack import BLOCK


class Router:
    """Keeps what it is told, as Dynamo's router does; a stored block's parent must be known."""

    def __init__(self) -> None:
        self.blocks: dict[int, list[int]] = {}  # hash -> tokens, one more than a block
        self.stored = self.removed = 0

    def publish_stored(self, tokens, counts, hashes, parent, **more: Any) -> None:
        assert more == {"is_eagle": True}
        assert counts == [BLOCK] * len(hashes)
        assert len(tokens) == BLOCK * len(hashes) + 1
        assert parent is None or parent in self.blocks
        for index, each in enumerate(hashes):
            assert -(2**63) <= each < 2**63
            assert each not in self.blocks
            self.blocks[each] = tokens[index * BLOCK : (index + 1) * BLOCK + 1]
            self.stored += 1

    def publish_removed(self, hashes) -> None:
        for each in hashes:
            del self.blocks[each]
            self.removed += 1


def test_the_router_knows_what_the_cache_holds_through_evictions_and_conversations():
    context = 9 * BLOCK
    planner = echo_planner(max_depth=3, beams=2, width=3, budget=14, per_request=9)
    slots = InputBatch(3, context, planner.settings.rows_per_request, 30, prefix_cache=True)
    loop, router = chained_loop(slots, planner, 64), Router()
    slots.blocks.cache.listener = BlockEvents(router)
    rng, texts = np.random.default_rng(0), []
    for number in range(40):
        begin = texts[rng.integers(len(texts))] if texts and number % 3 else prompt_ids(5 * BLOCK, number)
        cut = rng.integers(BLOCK, len(begin) + 1)
        request = add(loop, [*begin[:cut], *prompt_ids(20, 1000 + number)][: context - 30], max_tokens=25)
        if number % 2:
            run(loop)
            texts.append([*request.prompt.tolist(), *request.generated])
        assert router.blocks.keys() == {block_hash(key) for key in slots.blocks.cache._key.values()}
    run(loop)
    assert router.removed > 20
    assert router.stored - router.removed == len(router.blocks)
    slots.blocks.forget_cached()
    assert not router.blocks


class Deaf:
    """Fails as a publisher does whose runtime has gone."""

    def publish_stored(self, *values: Any, **more: Any) -> None:
        raise RuntimeError("the channel is closed")

    publish_removed = publish_stored


def test_a_router_that_cannot_be_told_costs_no_answer_and_is_logged_once(caplog):
    slots = InputBatch(1, 9 * BLOCK, 24, 30, prefix_cache=True)
    loop = chained_loop(slots, echo_planner(max_depth=3, beams=2, width=3, budget=14, per_request=9), 64)
    slots.blocks.cache.listener = BlockEvents(Deaf())
    request = add(loop, prompt_ids(5 * BLOCK, 1), max_tokens=2 * BLOCK)
    run(loop)
    assert len(request.generated) == 2 * BLOCK
    slots.blocks.forget_cached()
    assert [record.exc_info[0] for record in caplog.records] == [RuntimeError]


def test_blocks_that_follow_each_other_are_one_event():
    assert list(rows([])) == []
    assert list(rows([3])) == [(3, 4)]
    assert list(rows([0, 1, 2, 5, 7, 8])) == [(0, 3), (5, 6), (7, 9)]


@pytest.mark.needs_dynamo
def test_a_worker_tells_the_router_of_blocks_that_it_has_read_from_its_store(bundle_of, tmp_path, monkeypatch):
    pytest.importorskip("dynamo.common")
    from echo_trt.adapters.dynamo.engine import EchoEngine
    from echo_trt.adapters.dynamo.options import WorkerOptions

    monkeypatch.setattr(stored_prefixes, "RATE", 1e15)  # a tiny network computes as fast as a disk is read
    prompt, params = prompt_ids(3 * BLOCK + 7, 3), SamplingParams(max_tokens=4, ignore_eos=True)
    job = WorkerOptions(bundle_of("close"), name="echo", store=tmp_path / "store")

    async def lived() -> tuple[list[int], int, int]:
        engine, router = EchoEngine(job), Router()
        await engine.start(1)
        [source] = await engine.kv_event_sources()
        source.on_ready(router)
        service = engine._service
        answer = submit(service, prompt, params)[1]
        await asyncio.to_thread(service.drain, 60)
        await engine.cleanup()
        return answer.token_ids, service.loop.counters.restored_blocks, router.stored

    first, again = (asyncio.run(lived()) for _ in range(2))
    assert first == (again[0], 0, 3)
    assert again[1:] == (3, 3)


@pytest.mark.needs_dynamo
def test_a_worker_ends_behind_the_answers_that_it_hands_on(bundle_of):
    """Dynamo reads them slowly, and ends with "stop" what is open when the worker has ended."""
    pytest.importorskip("dynamo.common")
    from dynamo.llm.exceptions import EngineShutdown

    from echo_trt.adapters.dynamo.engine import EchoEngine
    from echo_trt.adapters.dynamo.options import WorkerOptions

    asked = {"token_ids": prompt_ids(9, 1), "stop_conditions": {"max_tokens": 1400, "ignore_eos": True}}
    context = SimpleNamespace(metadata={}, id=lambda: "1")

    async def lived() -> None:
        engine, began = EchoEngine(WorkerOptions(bundle_of("close"), name="echo", drain_seconds=0)), asyncio.Event()
        await engine.start(1)

        async def read() -> None:
            async for _ in engine.generate(asked, context):
                began.set()
                await asyncio.sleep(0.3)

        reader = asyncio.create_task(read())
        await began.wait()
        await engine.cleanup()
        assert reader.done()
        with pytest.raises(EngineShutdown):
            await reader

    asyncio.run(lived())
