"""The prefix cache beyond a restart: texts stay the same, and blocks are read only where that pays."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
from damage import damage
from driving import assert_all_free, prompt_ids

from echo_trt.engine import stored_prefixes
from echo_trt.engine.llm import LLM
from echo_trt.engine.params import SamplingParams
from echo_trt.engine.request import Request, Sender
from echo_trt.engine.stored_prefixes import keep_prefixes
from echo_trt.speculation.goodput.model.costs import Curve
from echo_trt.speculation.pack import BLOCK

PROMPT = prompt_ids(3 * BLOCK + 7, 3)
WAYS = [SamplingParams(max_tokens=24, ignore_eos=True, **way) for way in ({}, {"temperature": 0.8, "seed": 7})]


@pytest.fixture
def stored(tmp_path):
    """Return what gives an LLM a store, as after a restart: in the folder that those before it wrote."""
    opened = []

    def get(llm: LLM, size: str = "1G"):
        while opened:
            opened.pop().close()
        llm.loop.batch.blocks.forget_cached()
        prefixes = keep_prefixes(llm, tmp_path / "store", size)
        if prefixes:
            prefixes._rate = 1e15  # tiny networks compute as fast as a disk is read
            opened.append(prefixes)
        return prefixes

    yield get
    for prefixes in opened:
        prefixes.close()


def answers(llm: LLM, ids=PROMPT) -> list[list[int]]:
    return [completion.token_ids for completion in llm.generate([ids, ids], WAYS)]


def restored(llm: LLM) -> int:
    return llm.counters.restored_blocks


@pytest.mark.parametrize(
    ("pair", "engine"),
    [
        ("lookup", "openvino"),
        ("model", "openvino"),
        ("close", "openvino"),
        ("close", "torch"),
        ("dspark", "openvino"),
        ("mtp", "cpu"),
        ("mtp", "torch"),
    ],
)
def test_restored_blocks_have_the_bits_that_computing_gives(pair, engine, open_llm, stored):
    """Of target and draft: texts, and what the policy drafts behind them."""
    llm = open_llm(pair, engine=engine)
    expected = answers(llm)
    stored(llm)
    assert answers(llm) == expected
    drafts = llm.counters.accepted.copy()
    stored(llm)
    assert answers(llm) == expected
    # One of two equal prompts reads them, and the other finds them in memory, where there are no states to find.
    assert restored(llm) == (6 if pair == "mtp" else 3)
    assert_all_free(llm.loop)
    # Each of three equal rounds accepts as much: the draft finds what it had made of the text.
    assert {length: 2 * count for length, count in (llm.counters.accepted - drafts).items()} == dict(drafts)


def test_blocks_that_were_never_drafted_bring_what_a_draft_needs(open_llm, stored):
    llm = open_llm("close", "autoregressive")
    stored(llm)
    expected = answers(llm)
    stored(llm)
    llm.set_policy("static")
    assert answers(llm) == expected
    assert restored(llm) >= 3
    first = llm.counters.accepted_tokens
    stored(llm)
    assert answers(llm) == expected
    kinds = {entry.kind for entry in stored(llm)._store._known.values()}
    assert kinds == {1}  # written again, with what the draft has made of them
    assert llm.counters.accepted_tokens == 2 * first > 0


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "of another machine"])
def test_what_is_wrong_with_the_store_costs_warmth_alone(damage, open_llm, stored, tmp_path, monkeypatch, caplog):
    llm = open_llm("close", "static")
    stored(llm)
    expected = answers(llm)
    stored(llm)._store.commit()
    for number, file in enumerate(sorted((tmp_path / "store" / "blocks").iterdir())):
        whole = bytearray(file.read_bytes())
        whole[(number * 997) % len(whole)] ^= 1 << number % 8
        if damage == "gone":
            file.unlink()
        elif damage != "of another machine":
            file.write_bytes(whole if damage == "flipped" else whole[: number % len(whole)])
    if damage == "of another machine":
        monkeypatch.setattr(stored_prefixes, "machine", lambda manifest: "another")
        stored(llm)
    assert answers(llm) == expected
    assert restored(llm) == 0
    assert ("not as they were written" in caplog.text) == (damage in ("flipped", "cut"))
    assert_all_free(llm.loop)


def _damaged_at_random(folder: Path, draw: random.Random) -> None:
    places = [folder / "index.db", folder / "blocks", *folder.glob("blocks/*")]
    damage(draw.choice([path for path in places if os.path.lexists(path)]), draw)


def test_whatever_becomes_of_the_store_texts_stay_right(open_llm, stored, tmp_path, monkeypatch):
    """Before a start, and in the midst of serving."""
    monkeypatch.setattr(stored_prefixes, "REST", 0.0)
    llm, draw = open_llm("close", "static"), random.Random(0)
    stored(llm)
    expected = answers(llm)
    for _ in range(12):
        prefixes = stored(llm)
        assert answers(llm) == expected
        _damaged_at_random(tmp_path / "store", draw)
        llm.loop.batch.blocks.forget_cached()
        assert answers(llm) == expected
        assert prefixes._thread.is_alive()
        _damaged_at_random(tmp_path / "store", draw)
    before = restored(llm)
    for _ in range(2):
        stored(llm)
        assert answers(llm) == expected
    assert restored(llm) > before
    assert_all_free(llm.loop)


@pytest.mark.parametrize("damage", ["flipped", "gone"])
def test_without_its_states_a_hybrids_text_is_computed(damage, open_llm, stored, tmp_path):
    llm = open_llm("mtp", "static")
    stored(llm)
    expected = answers(llm)
    kinds = {name.hex(): entry.kind for name, entry in stored(llm)._store._known.items()}
    files = [*(tmp_path / "store" / "blocks").iterdir()]
    states = [file for file in files if kinds[file.name] == stored_prefixes.STATE]
    assert 1 <= len(states) < len(files)
    for file in states:
        content = file.read_bytes()
        file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        if damage == "gone":
            file.unlink()
    stored(llm)
    assert answers(llm) == expected
    assert restored(llm) == 0
    assert_all_free(llm.loop)


def test_blocks_belong_to_the_files_of_a_bundle_and_to_its_machine(open_llm, monkeypatch):
    llm = open_llm("close", "static")
    networks = [llm.loop.target.kv_block(0)]

    def scope(**changes) -> bytes:
        return stored_prefixes.scope_of(llm.manifest.model_copy(update=changes), networks)

    others = [scope(files=llm.manifest.files | {name: "0"}) for name in llm.manifest.files]  # weights have their own
    others += [scope(precision="bf16"), scope()]
    monkeypatch.setattr(stored_prefixes, "processor_facts", lambda: {"flags": "sse2"})
    others.append(scope())
    monkeypatch.setattr(stored_prefixes, "__version__", "0.0")
    assert len({*others, scope()}) == len(llm.manifest.files) + 4


def test_one_sender_never_finds_what_another_has_stored(open_llm, stored):
    llm, found = open_llm("lookup", "autoregressive"), []
    for salt in (b"one", b"two", b"one"):
        stored(llm)
        before = restored(llm)
        request = Request(0, llm.request(0, PROMPT, WAYS[0]).prompt, WAYS[0], sender=Sender(salt=salt))
        llm.loop.scheduler.add(request)
        while llm.loop.scheduler.busy:
            llm.loop.step()
        found.append((request.cached_tokens, restored(llm) - before))
    assert found == [(0, 0), (0, 0), (3 * BLOCK, 3)]


def test_reading_that_takes_longer_than_computing_is_left_and_tried_again(open_llm, stored, monkeypatch):
    llm = open_llm("lookup", "autoregressive")
    stored(llm)
    expected = answers(llm)
    prefixes = stored(llm)
    size = next(iter(prefixes._store._known.values())).bytes
    seconds = max(prefixes._seconds(blocks) / blocks for blocks in range(1, 9))
    prefixes._rate = size / seconds / stored_prefixes.RETRIED**3  # a disk that is a little too slow
    monkeypatch.setattr(prefixes, "_compare", lambda *pass_: None)  # whatever else the machine does
    unread = 0
    while not restored(llm):
        llm.loop.batch.blocks.forget_cached()
        assert answers(llm) == expected
        unread += not restored(llm)
    assert 1 <= unread <= 30


def test_a_machine_that_computes_slower_than_its_costs_say_reads_more(open_llm, stored):
    """Also what is left of a text that it has begun to compute."""
    llm = open_llm("lookup", "autoregressive")
    stored(llm)
    expected = llm.generate([PROMPT], WAYS[0])[0].token_ids
    prefixes = stored(llm)
    size = next(iter(prefixes._store._known.values())).bytes
    prefixes._costs = Curve([1, 64], [1e-9, 1e-9])
    prefixes._rate = size / prefixes._seconds(1) / 10
    assert llm.generate([PROMPT], WAYS[0])[0].token_ids == expected
    assert prefixes._pace > 10
    assert restored(llm) == 3


def test_an_engine_that_shows_no_blocks_serves_without_a_store(open_llm, stored, caplog, monkeypatch):
    llm = open_llm("lookup", "autoregressive")
    monkeypatch.setattr(llm.loop.target, "kv_block", lambda index: ())
    assert stored(llm) is None
    assert "--store is not used: engine openvino lets nobody read its KV blocks here" in caplog.text
    assert llm.loop.restore is None


def test_goodput_begins_with_what_it_had_learnt(open_llm, stored):
    llm, fresh, later = (open_llm("close", "goodput") for _ in range(3))
    stored(llm)
    for number in range(4):
        answers(llm, prompt_ids(20, number))
    stored(later)
    nodes, none, known = (each.loop.planner.learner.sources.dump() for each in (llm, fresh, later))
    assert all(np.array_equal(known[source], of_source) for source, of_source in nodes.items())
    assert sum(map(len, known.values())) > 0 == sum(map(len, none.values()))
    bias, unlearnt = (each.loop.planner.acceptance.bias for each in (later, fresh))
    assert abs(bias - unlearnt).max() > 0.01
    costs = [each.loop.planner.costs for each in (llm, fresh, later)]
    before, measured, after = ([*each.target.correction, *each.draft.correction, each.cold] for each in costs)
    assert before == after != measured


def test_what_was_learnt_before_a_source_existed_is_taken(open_llm):
    llm, later = (open_llm("close", "goodput") for _ in range(2))
    answers(llm, prompt_ids(20, 1))
    known = llm.loop.planner.learner.dump()
    del known["answer"]
    later.loop.planner.learner.load(known)
    taken = later.loop.planner.learner.sources.dump()
    assert all(np.array_equal(taken[source], known[source]) for source in taken if source != "answer")
    assert sum(map(len, taken.values())) > 0 == len(taken["answer"])


def test_a_state_of_no_use_is_learnt_anew(open_llm, stored, caplog):
    llm = open_llm("lookup", "goodput")
    stored(llm)
    whole = llm.loop.planner.dump()
    for form in (b"PK of another form", whole[: len(whole) // 2], whole.replace(b"NUMPY", b"NUMPI"), b""):
        caplog.clear()
        llm.loop.planner.dump = lambda form=form: form
        stored(llm)
        assert ("what was learnt by goodput is not taken from the store" in caplog.text) == bool(form)
