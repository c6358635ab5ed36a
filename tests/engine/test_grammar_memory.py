"""What a long answer under a grammar holds in memory: a parser for its end and its drafts, none for earlier tokens."""

from __future__ import annotations

import gc

from driving import add, prompt_ids, run

from echo_trt.grammar.state import State

STATES = 4  # of a request at most, between two iterations: its newest one, and some that a draft looked at behind it
RECORD = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "kind": {"enum": ["alpha", "beta"]}, "n": {"type": "integer"}},
    "required": ["name", "kind", "n"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": RECORD}


def states() -> int:
    """Count the states that are alive in this process."""
    gc.collect()
    return sum(type(each) is State for each in gc.get_objects())


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
