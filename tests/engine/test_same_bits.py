"""Below fp32, too, texts have plain decoding's bits: chains with OpenVINO, and with the engine cpu everything."""

from pathlib import Path

import pytest
from driving import SPECULATION_PAYS, add, goodput_planner, prompt_ids, run
from pairs import FAMILY_PAIRS, LIMITS, recipe_of

from echo_trt.backends.openvino.cpu import has_amx, has_bf16
from echo_trt.backends.self_check import BOUNDS, RISES
from echo_trt.cli.build import build
from echo_trt.engine.llm import LLM
from echo_trt.engine.params import SamplingParams
from echo_trt.speculation.policies import POLICIES

needs_bf16 = pytest.mark.skipif(not has_bf16(), reason="needs a CPU with AVX-512, for bf16")
#: Around CHUNK, what one iteration computes of prompts, and LONGEST of lanes; and answers that end at other times.
CHUNK = 40
PROMPTS = (5, 41, 37, 2, 40, 33, 50, 18, 1, 70, 39, 81, 3, 20, 31, 34)
ANSWERS = (24, 9, 20, 31, 1, 26, 15, 22)


#: All precisions of docs/exactness.md, and every family in one of them; OpenVINO's texts in fp32 other tests compare.
PRECISIONS = ("int4", "bf16", "int8", "fp32")
CASES = [("cpu", "close", precision) for precision in PRECISIONS[:3]] + [
    ("cpu", "eagle3", "fp32"),
    ("cpu", "dspark", "int4"),
]
CASES += [("cpu", pair, PRECISIONS[i]) for i, pair in enumerate(FAMILY_PAIRS)]
CASES += [
    ("cpu", "qwen3_moe", "int4"),
    ("cpu", "lfm2", "int8"),
    *(("cpu", "mtp", precision) for precision in ("int4", "bf16", "fp32")),
]
CASES += [pytest.param("openvino", pair, "bf16", marks=needs_bf16) for pair in ("close", "gemma3", "smollm3")]


@pytest.fixture(scope="module")
def coarse_bundle(networks, tmp_path_factory):
    """(engine, pair, precision) -> a bundle."""

    def get(engine: str, pair: str, precision: str) -> Path:
        folder, limits = tmp_path_factory.mktemp(precision) / pair, LIMITS | {"prefill_chunk": CHUNK}
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(RISES, "int8", 5.0)
            patch.setitem(RISES, "int4", 5.0)  # so tiny a network keeps little of its text in few bits
            patch.setitem(BOUNDS, "int8", 0.3)  # nor much of the scores of its random draft, with queries in bf16
            recipe = recipe_of(pair, networks, engine=engine, precision=precision, limits=limits)
            build(recipe, networks, folder)
        return folder

    return get


def written(llm: LLM, policy: str) -> list[tuple[list[int], list[float]]]:
    """Token ids, and log P(token) to the last bit, of each answer: greedy, and every third with a seed."""
    if policy.startswith("goodput"):
        llm.loop.planner = goodput_planner(llm, SPECULATION_PAYS, policy)
    else:
        llm.set_policy(policy)
    prompts, drafted = [prompt_ids(length, i) for i, length in enumerate(PROMPTS)], llm.counters.drafted_tokens
    params = [
        SamplingParams(ANSWERS[i % len(ANSWERS)], 0.8 * (i % 3 == 2), seed=i, ignore_eos=True, logprobs=0)
        for i in range(len(PROMPTS))
    ]
    completions = llm.generate(prompts, params)
    assert (llm.counters.drafted_tokens > drafted) == (policy != "autoregressive")
    return [(c.token_ids, [entry.logprob for entry in c.logprobs]) for c in completions]


@pytest.mark.parametrize(("engine", "pair", "precision"), CASES)
def test_logprobs_are_plain_decodings_bit_by_bit(engine, pair, precision, coarse_bundle):
    bundle = coarse_bundle(engine, pair, precision)
    alone = written(LLM(bundle, "autoregressive", 1), "autoregressive")
    policies = {
        3: [*POLICIES] if pair in ("close", "eagle3", "mtp", "dspark") else ["static"],
        8: ["autoregressive", "goodput"],
    }
    if engine == "openvino":
        policies = {1: ["goodput"], 3: ["goodput-exact"], 8: ["autoregressive"]}
        if pair == "close":
            policies = {batch: [*policies[batch], "goodput-exact"] for batch in policies}
    for batch, names in policies.items():
        llm = LLM(bundle, "autoregressive", batch, prefix_cache=engine == "cpu")
        for policy in names:
            found = written(llm, policy)
            assert [ids for ids, _ in found] == [ids for ids, _ in alone], (policy, batch)
            # AMX rounds a prompt of a model with a window by how it was divided.
            assert found == alone or (engine == "openvino" and has_amx() and pair == "gemma3"), (policy, batch)


@pytest.fixture(scope="module")
def loop(bundle_of):
    return LLM(bundle_of("lookup"), "autoregressive", 8, prefix_cache=False).loop


#: Around the ends of three parts; each length has every other one of the neighbours.
LENGTHS = (2, 3, 9, *range(14, 20), *range(30, 36), 49)
NEIGHBOURS = ((5, 16, 14, 33), (15, 30), (14, 16, 31), (13, 17))


@pytest.mark.parametrize(
    ("length", "neighbours"), [(n, NEIGHBOURS[j]) for i, n in enumerate(LENGTHS) for j in (i % 2, i % 2 + 2)], ids=str
)
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
