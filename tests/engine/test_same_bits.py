"""In bf16, int8 and int4, too, a chain has plain decoding's own bits, whatever else is computed beside it."""

import pytest
from driving import SPECULATION_PAYS, add, goodput_planner, prompt_ids, run
from pairs import LIMITS, recipe_of

from echo_trt.backends.openvino.cpu import has_bf16
from echo_trt.backends.self_check import RISES
from echo_trt.cli.build import build
from echo_trt.engine.llm import LLM
from echo_trt.engine.params import SamplingParams

#: Around CHUNK, what one iteration computes of prompts, and LONGEST of lanes; and answers that end at other times.
CHUNK = 40
PROMPTS = (5, 41, 37, 2, 40, 33, 50, 18, 1, 70, 39, 81, 3, 20, 31, 34)
ANSWERS = (24, 9, 20, 31, 1, 26, 15, 22)


@pytest.fixture(scope="module", params=["bf16", "int8", "int4"])
def coarse_bundle(request, networks, tmp_path_factory):
    folder, limits = tmp_path_factory.mktemp(request.param) / "close", LIMITS | {"prefill_chunk": CHUNK}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RISES, "int4", 5.0)  # so tiny a network keeps little of its text in 4 bits
        build(recipe_of("close", networks, precision=request.param, limits=limits), networks, folder)
    return folder


def written(bundle, policy: str, batch: int) -> list[tuple[list[int], list[float]]]:
    """Token ids, and log P(token) to the last bit, of each answer."""
    llm = LLM(bundle, "autoregressive", batch)
    if policy != "autoregressive":
        llm.loop.planner = goodput_planner(llm, SPECULATION_PAYS, policy)
    prompts = [prompt_ids(length, i) for i, length in enumerate(PROMPTS)]
    params = [
        SamplingParams(max_tokens=ANSWERS[i % len(ANSWERS)], ignore_eos=True, logprobs=0) for i in range(len(PROMPTS))
    ]
    completions = llm.generate(prompts, params)
    assert (llm.counters.drafted_tokens > 0) == (policy != "autoregressive")
    return [(c.token_ids, [entry.logprob for entry in c.logprobs]) for c in completions]


@pytest.mark.skipif(not has_bf16(), reason="needs a CPU with AVX-512, for bf16")
def test_logprobs_are_plain_decodings_bit_by_bit(coarse_bundle):
    alone = written(coarse_bundle, "autoregressive", 1)
    for policy, batch in (("autoregressive", 8), *(("goodput-exact", batch) for batch in (1, 3, 8)), ("goodput", 1)):
        assert written(coarse_bundle, policy, batch) == alone, (policy, batch)


@pytest.fixture(scope="module")
def loop(bundle_of):
    return LLM(bundle_of("lookup"), "autoregressive", 8, prefix_cache=False).loop


@pytest.mark.parametrize("neighbours", [(5, 16, 14, 33), (15, 30), (14, 16, 31), (13, 17)], ids=str)
@pytest.mark.parametrize("length", range(2, 50))  # three parts
def test_no_part_of_a_prompt_is_a_single_token(length, neighbours, loop):
    """Parts of 16 tokens in all here, so that neighbours leave any number to a prompt; attention rounds a single one
    otherwise.
    """
    requests = [add(loop, prompt_ids(n, i), max_tokens=1) for i, n in enumerate((*neighbours, length))]
    computed = dict.fromkeys(requests, 0)
    while loop.scheduler.busy:
        run(loop, 1)
        for request in requests:
            length = len(request.prompt)
            after = length if request.finish_reason else int(loop.batch.committed[request.slot]) * (request.slot >= 0)
            assert after - computed[request] != 1
            computed[request] = after
    assert [*computed.values()] == [len(request.prompt) for request in requests]
