"""Plain decoding and speculation side by side: what they write, whose clock runs, and what is printed of it."""

from __future__ import annotations

import io
import re
from itertools import pairwise

import pytest
from rich.console import Console

from echo_trt.engine.llm import LLM
from echo_trt.engine.params import SamplingParams
from echo_trt_lab.demo import RACES, demo
from echo_trt_lab.race import compare, race, sides_of
from echo_trt_lab.side import Side

PROMPTS = [[5, 6, 7] * 3, [8, 9] * 5, [4] * 10]
IDS = ["a", "b", "c"]
PARAMS = SamplingParams(24, ignore_eos=True, token_sources=True)
POLICIES = ("autoregressive", "static")


def run(llm: LLM, sides: list[Side], **more) -> None:
    race(llm, sides, IDS, PROMPTS, PARAMS, **more)


def test_both_write_what_they_write_alone_each_on_its_own_clock(open_llm, monkeypatch):
    llm = open_llm("close", "autoregressive", 3)
    alone = [completion.token_ids for completion in llm.generate(PROMPTS, PARAMS)]
    monkeypatch.setattr("echo_trt_lab.race.SLICE", 0.0)
    sides = sides_of(llm, POLICIES, PROMPTS, 24)
    assert [side.policy for side in sides] == list(POLICIES)
    clocks: list[tuple[float, float]] = []
    run(llm, sides, show=lambda delta: clocks.append((sides[0].seconds, sides[1].seconds)))
    for side in sides:
        assert [side.completions[name].token_ids for name in IDS] == alone
        assert 0 < max(side.ended.values()) <= side.seconds
        assert side.tokens == side.counts.total() == 72
    assert sides[0].summary()["accepted_length"] == 1 < sides[1].summary()["accepted_length"]
    assert sides[1].counts["target"] < 72
    # The one that is behind goes next, so both were running until the first had ended.
    ran = ["plain" if after[0] > before[0] else "static" for before, after in pairwise(clocks)]
    assert {"plain", "static"} == set(ran[:20])


@pytest.fixture
def bundles(bundle_of, tmp_path):
    """Return the demo on a tiny pair under the names of the two real bundles."""
    for one in RACES:
        if not (tmp_path / one.bundle).exists():
            (tmp_path / one.bundle).symlink_to(bundle_of("close"))
    return tmp_path


def test_the_demo_is_short_and_says_that_texts_are_equal(bundles):
    out = Console(file=io.StringIO(), width=120)
    assert demo(bundles, 12, out) == 0
    text = out.file.getvalue()
    assert text.count("same text\n") == 6
    assert text.count("6 of 6") == 3
    assert re.search(r"policy, precision, load +plain decoding +with drafts +speedup +same text", text)
    assert re.search(r"goodput, \w+, 2 at once +\d+ +\d+ +\d+\.\d\dx +6 of 6", text)
    assert "The same texts came" in text
    assert len(text.splitlines()) < 30
    assert "\x1b" not in text


def test_the_demo_fails_where_texts_differ_that_must_not(bundles, monkeypatch):
    def broken(job, *more):
        rows, sides = compare(job, *more)
        return [rows[0], rows[1] | {"identical": 5, "logit_gaps": {"code": 0.25}}], sides

    monkeypatch.setattr("echo_trt_lab.demo.compare", broken)
    out = Console(file=io.StringIO(), width=400)
    assert demo(bundles, 4, out) == 1
    assert out.file.getvalue().count("error: texts differ that must not") == 2  # where it is no promise, it is a note
    assert "code 0.25" in out.file.getvalue()
