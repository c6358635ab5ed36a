"""Trees that a tiny pair has really drafted."""

from __future__ import annotations

import pytest
from engine.driving import prompt_ids

from echo_trt.files.prompts import Prompt
from echo_trt.speculation.echo.settings import EchoSettings
from echo_trt_lab.calibration.record import record
from echo_trt_lab.calibration.trees import Trees

#: As wide and deep as the pairs' static tree, so that a replay can follow that policy.
SHAPE = EchoSettings(max_depth=3, beams=3, width=3, per_request=64)
INT32 = 24  # tokens of an answer


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return ["the theme of a thing", "naïve café", "another " * 6, "".join(map(chr, prompt_ids(9, 0))), "and then"]


@pytest.fixture(scope="session")
def recorded(open_llm, texts) -> Trees:
    """Of the pair whose head agrees with its target in part."""
    prompts = [Prompt(str(i), text) for i, text in enumerate(texts)]
    return record(open_llm("close", "autoregressive", 3), prompts, ["odd", "even", "odd", "even", "odd"], INT32, SHAPE)
