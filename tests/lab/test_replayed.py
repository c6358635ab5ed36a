"""The simulator's replay and the loop do the same: iterations of each request, compared one by one."""

from __future__ import annotations

import numpy as np
import pytest

from echo_trt.engine.params import SamplingParams
from echo_trt.files.prompts import Prompt
from echo_trt.speculation.echo.settings import EchoSettings
from echo_trt_lab.calibration.record import record
from echo_trt_lab.simulation.machines import Machine
from echo_trt_lab.simulation.replay import Replay
from echo_trt_lab.simulation.walk import Recording, Walk

SIZES = np.array([1, 2, 4, 8, 16, 32, 64, 128, 256])
#: A target whose passes cost the same up to a knee.
KNEE = Machine(
    "test", (SIZES, np.maximum(1e-2, 3e-4 * SIZES), 0.0, 0.0), (SIZES, 5e-4 + 1e-5 * SIZES, 0.0, 0.0), 1e-3, 0.0, ()
)


def test_the_replay_walks_as_the_runtime_does(open_llm):
    """Iterations of each request, one by one: recorded trees replayed against the same policy run for real."""
    llm = open_llm("close", "goodput", 4)
    prompts = [Prompt(str(i), f"hello there number {i} and again hello there") for i in range(4)]
    trees = record(llm, prompts, ["all"] * 4, 40, EchoSettings(max_depth=3, beams=3, width=4, per_request=64))
    llm.set_policy("static")
    answers = llm.chat([[{"role": "user", "content": p.text}] for p in prompts], SamplingParams(40))
    recording = Recording(trees)
    for i, answer in enumerate(answers):
        walk = Walk(recording, 1, 10)
        walk.answer[:], walk.index[:] = i, 1
        run, iterations = Replay(walk, KNEE, llm.loop.planner), 0
        while walk.answer[0] == i and (iterations == 0 or walk.index[0] > 1):
            run.step()
            iterations += 1
        begin, end = trees.answer_begins[i : i + 2]
        assert answer.token_ids == trees.answers[begin:end].tolist()
        assert answer.accepted_length == pytest.approx(len(answer.token_ids) / (iterations + 1), abs=0.01) or (
            answer.accepted_length == pytest.approx((len(answer.token_ids) - 1) / iterations, abs=0.01)
        )
