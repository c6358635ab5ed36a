"""What plain decoding answers, which every other way to decode is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from echo_trt.engine.llm import LLM
    from echo_trt.engine.params import Completion


@pytest.fixture(scope="session")
def plain(open_llm) -> Callable[[str, str], list[Completion]]:
    """pair, requests -> what plain decoding answers, one request at a time."""
    from batches import REQUESTS
    from pairs import FOLDERS

    known: dict[tuple[str, str], list[Completion]] = {}

    def get(pair: str, requests: str) -> list[Completion]:
        key = FOLDERS[pair][0], requests
        if key not in known:
            known[key] = open_llm(pair, "autoregressive", 1).generate(*REQUESTS[requests]())
        return known[key]

    return get


@pytest.fixture(scope="session")
def plain_ids(plain) -> Callable[..., list[list[int]]]:
    """pair, requests -> the tokens of those answers."""
    return lambda pair, requests="repeated": [completion.token_ids for completion in plain(pair, requests)]


@pytest.fixture(scope="module")
def llm_of(open_llm) -> Callable[..., LLM]:
    """LLMs that are used again and again, as a server would."""
    opened: dict[tuple[str, int, str], LLM] = {}

    def get(pair: str, policy: str, batch: int, engine: str = "openvino") -> LLM:
        key = pair, batch, engine
        if key not in opened:
            opened[key] = open_llm(pair, batch=batch, engine=engine)
        opened[key].set_policy(policy)
        return opened[key]

    return get
