"""What a long answer under a grammar holds in memory: a parser for its end and its drafts, none for earlier tokens."""

from __future__ import annotations

import gc
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from driving import Foresight, add, echo_planner, prompt_ids, run
from tokenizers import Tokenizer

from echo_trt.engine.batch import InputBatch
from echo_trt.engine.core import EngineCore
from echo_trt.grammar.compiler import GrammarCompiler
from echo_trt.grammar.state import State, Vocabulary
from echo_trt.speculation.pack import ForwardBatch

DEFAULT = Path(__file__).parents[2] / "bundles/smollm2-135m"
TOKENS, MAX_MB = 2000, 20
STATES = 4  # of a request at most, between two iterations: its newest one, and some that a draft looked at behind it
RECORD = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "kind": {"enum": ["alpha", "beta"]}, "n": {"type": "integer"}},
    "required": ["name", "kind", "n"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": RECORD}


class Dictated:
    """A target that writes one text, whose tokens' places begin at 0."""

    def __init__(self, text: np.ndarray, vocabulary: int, num_blocks: int):
        self.text, self.vocabulary, self.num_blocks = text, vocabulary, num_blocks

    def run(self, call: ForwardBatch) -> dict[str, np.ndarray]:
        following = self.text[np.minimum(call.positions[call.logit_rows] + 1, len(self.text) - 1)]
        logits = np.zeros((len(following), self.vocabulary), np.float32)
        logits[np.arange(len(following)), following] = 1
        return {"logits": logits}

    def compact_kv(self, source: np.ndarray, target: np.ndarray) -> None:
        pass


def states() -> int:
    """Count the states that are alive in this process."""
    gc.collect()
    return sum(type(each) is State for each in gc.get_objects())


def records(number: int) -> str:
    """Write JSON that fits ``SCHEMA``."""
    draw = random.Random(0)
    kinds = ("alpha", "beta")
    made = [
        {"name": "".join(draw.choices("abc defg hij", k=20)), "kind": draw.choice(kinds), "n": draw.randrange(10**6)}
        for _ in range(number)
    ]
    return json.dumps(made, indent=2)


def answered(file: str) -> None:
    """Write a long answer under a grammar, with drafts, in the tokens of tokenizer.json at ``file``."""
    reads = Tokenizer.from_file(file)
    vocabulary = reads.get_vocab_size()
    text = np.array([1, 2, *reads.encode(records(200), add_special_tokens=False).ids[:TOKENS]])
    assert len(text) == TOKENS + 2
    batch = InputBatch(1, TOKENS + 40, 80)
    planner = echo_planner(max_depth=4, beams=2, width=3, budget=14)
    loop = EngineCore(Dictated(text, vocabulary, batch.num_blocks), None, batch, planner, ())
    loop.drafter = Foresight(batch, [text], vocabulary)
    grammars = GrammarCompiler(reads.to_str(), Vocabulary(vocabulary, (0,)))
    request = add(loop, text[:2], max_tokens=TOKENS)
    request.grammar = grammars.begin({"json": SCHEMA})
    run(loop, 10)
    process, maximum = psutil.Process(), 0
    begun = process.memory_info().rss
    while loop.scheduler.busy:
        run(loop, 100)
        assert states() <= STATES
        maximum = max(maximum, process.memory_info().rss)
    assert request.generated == text[2:].tolist()
    assert loop.counters.accepted_length > 1.5
    assert maximum - begun < MAX_MB * 2**20, f"{(maximum - begun) >> 20} MB"


@pytest.mark.parametrize("tokenizer", ["small", "default"])
def test_a_long_answer_takes_little_memory(tokenizer, networks):
    """In a process of its own, whose memory is no other test's."""
    folder = DEFAULT if tokenizer == "default" else networks / "target"
    if not folder.exists():
        pytest.skip("bundles/smollm2-135m is not built")
    code = "import sys, test_grammar_memory; test_grammar_memory.answered(sys.argv[1])"
    paths = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", code, str(folder / "tokenizer.json")]
    tried = subprocess.run(command, capture_output=True, text=True, env=os.environ | paths)
    assert tried.returncode == 0, tried.stderr[-1000:]


def test_requests_that_run_keep_their_newest_states_alone(open_llm):
    """Also when they are set back, and go on."""
    llm = open_llm("close", "echo", 4)
    before, maximum = states(), 0
    loop, schema = llm.loop, {"json": SCHEMA | {"minItems": 20}}
    requested = [
        add(loop, prompt_ids(5, i), max_tokens=120, temperature=1.0, seed=i, structured=schema) for i in range(4)
    ]
    for request in requested:
        request.grammar = llm.request(0, request.prompt, request.params).grammar
    for number in range(100):
        run(loop, 7)
        if number % 4 == 3:
            loop.scheduler.waiting.extend(loop.scheduler.preempt_all())
        if not loop.scheduler.busy:
            break
        maximum = max(maximum, states() - before)
    assert {len(request.generated) for request in requested} == {120}
    assert maximum <= 4 * STATES
