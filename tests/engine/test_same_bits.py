"""In bf16, int8 and int4, too, a chain has plain decoding's own bits, whatever else is computed beside it."""

from pathlib import Path

import pytest
from driving import SPECULATION_PAYS, add, goodput_planner, prompt_ids, run
from pairs import FAMILY_PAIRS, LIMITS, recipe_of
from refusal import refused

from echo_trt.backends.openvino.cpu import has_amx, has_bf16
from echo_trt.backends.self_check import RISES
from echo_trt.cli.build import build
from echo_trt.engine.llm import LLM
from echo_trt.engine.params import SamplingParams
from echo_trt_lab.sizing.tables import manifest_table

needs_bf16 = pytest.mark.skipif(not has_bf16(), reason="needs a CPU with AVX-512, for bf16")
#: Around CHUNK, what one iteration computes of prompts, and LONGEST of lanes; and answers that end at other times.
CHUNK = 40
PROMPTS = (5, 41, 37, 2, 40, 33, 50, 18, 1, 70, 39, 81, 3, 20, 31, 34)
ANSWERS = (24, 9, 20, 31, 1, 26, 15, 22)


#: All precisions of docs/exactness.md but fp32, whose texts other tests compare, and every family in one of them.
WINDOWED = ("gemma3", "mistral")
PRECISIONS = ("bf16", "int8", "int4")
CASES = [("close", precision) for precision in PRECISIONS]
CASES += [(pair, PRECISIONS[i % 3]) for i, pair in enumerate(FAMILY_PAIRS)]


@pytest.fixture(scope="module")
def coarse_bundle(networks, tmp_path_factory):
    """(pair, precision) -> a bundle."""

    def get(pair: str, precision: str) -> Path:
        folder, limits = tmp_path_factory.mktemp(precision) / pair, LIMITS | {"prefill_chunk": CHUNK}
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(RISES, "int8", 5.0)
            patch.setitem(RISES, "int4", 5.0)  # so tiny a network keeps little of its text in few bits
            build(recipe_of(pair, networks, precision=precision, limits=limits), networks, folder)
        return folder

    return get


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


@needs_bf16
@pytest.mark.parametrize(("pair", "precision"), [each for each in CASES if not (has_amx() and each[1] == "int4")])
def test_logprobs_are_plain_decodings_bit_by_bit(pair, precision, coarse_bundle):
    bundle = coarse_bundle(pair, precision)
    alone = written(bundle, "autoregressive", 1)
    batches = (1, 3, 8) if pair == "close" else (3,)
    for policy, batch in (("autoregressive", 8), *(("goodput-exact", batch) for batch in batches), ("goodput", 1)):
        found = written(bundle, policy, batch)
        assert [ids for ids, _ in found] == [ids for ids, _ in alone], (policy, batch)
        # AMX rounds a prompt of a model with a window by how it was divided.
        assert found == alone or (has_amx() and pair in WINDOWED), (policy, batch)


def test_a_hybrid_in_bf16_promises_no_bits(bundle_of):
    """Where states are committed in float32 and rounded within a pass, a chain is not plain decoding's."""
    bundle = bundle_of("mtp")
    llm = LLM(bundle, "autoregressive", 2)
    llm.networks.target.rounds_trees = True  # as in bf16
    with refused("policy is goodput-exact", "delta-net layers", "--precision fp32"):
        llm.set_policy("goodput-exact", 4)
    for precision in ("fp32", "bf16"):
        manifest = llm.manifest.model_copy(update={"precision": precision, "engine": "torch"})
        told = any("no goodput-exact" in each for each in manifest_table(manifest, bundle).columns[1].cells)
        assert told == (precision == "bf16")


@pytest.fixture(scope="module")
def loop(bundle_of):
    return LLM(bundle_of("lookup"), "autoregressive", 8, prefix_cache=False).loop


@pytest.mark.parametrize("neighbours", [(5, 16, 14, 33), (15, 30), (14, 16, 31), (13, 17)], ids=str)
@pytest.mark.parametrize("length", [2, 3, 9, *range(14, 20), *range(30, 36), 49])  # around the ends of three parts
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
