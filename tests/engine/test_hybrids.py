"""Targets with delta-net layers: states beside the KV rows change nothing in what is written."""

from __future__ import annotations

import pytest
import torch
from batches import PROMPTS, REQUESTS, assert_same
from driving import assert_all_free, goodput_planner, machine, prompt_ids
from gguf import GGMLQuantizationType
from models.checkpoints import mtp_tensors, qwen3_5
from models.gguf_files import GGUF_SIZES, write_gguf
from pairs import recipe_of
from transformers import AutoModelForCausalLM

from echo_trt.backends.kind import built_as
from echo_trt.backends.states import KEPT
from echo_trt.cli.build import build
from echo_trt.cli.recipes import recipe_for
from echo_trt.engine.llm import LLM
from echo_trt.engine.params import SamplingParams
from echo_trt.errors import UserError
from echo_trt.speculation.pack import BLOCK
from echo_trt.speculation.policies import BUILT_IN, POLICIES, reserve_for

MATRIX = [(policy, batch, ("cpu", "torch")[(i + batch) % 2]) for i, policy in enumerate(BUILT_IN) for batch in (1, 8)]


def plan_by(llm: LLM, policy: str) -> None:
    """Set ``policy``, a goodput one with costs that are not measured."""
    if policy.startswith("goodput"):
        llm.loop.planner = goodput_planner(llm, machine(), policy)
    else:
        llm.set_policy(policy)


def test_plain_decoding_is_the_models_own(networks, llm_of):
    prompts = [prompt_ids(n, i) for i, n in enumerate(PROMPTS)][:4]
    ours = llm_of("mtp", "autoregressive", 3).generate(prompts, SamplingParams(max_tokens=20, ignore_eos=True))
    model = AutoModelForCausalLM.from_pretrained(networks / "hybrid")
    for prompt, completion in zip(prompts, ours, strict=True):
        asked = torch.tensor([prompt])
        more = {"attention_mask": torch.ones_like(asked), "max_new_tokens": 20, "do_sample": False}
        theirs = model.generate(asked, **more, eos_token_id=None)
        assert completion.token_ids == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("policy", "batch", "engine"), MATRIX)
def test_policies_write_the_same(policy, batch, engine, llm_of, plain):
    """Greedy and seeded requests, cut prompts among them (``LIMITS``)."""
    prompts, params = REQUESTS["mixed"]()
    count = 4 if batch == 1 else len(prompts)
    llm = llm_of("mtp", "autoregressive", batch, engine)
    plan_by(llm, policy)
    drafted = llm.counters.drafted_tokens
    assert_same(llm.generate(prompts[:count], params[:count]), plain("mtp", "mixed")[:count])
    assert (llm.counters.drafted_tokens > drafted) == bool(POLICIES[policy].shape)
    assert_all_free(llm.loop)


@pytest.mark.parametrize("policy", ["autoregressive", "echo"])
def test_preempted_requests_begin_their_states_again(policy, with_limits, plain):
    llm = LLM(with_limits("mtp", kv_blocks=9), policy, 8)
    prompts, params = REQUESTS["mixed"]()
    assert_same(llm.generate(prompts, params), plain("mtp", "mixed"))
    assert llm.counters.preemptions > 0


def test_the_mtp_head_drafts_a_tree_that_is_accepted(llm_of):
    for policy in ("static", "echo"):
        answer = llm_of("mtp", policy, 1).generate([prompt_ids(5, 0)], SamplingParams(max_tokens=40, ignore_eos=True))
        assert answer[0].accepted_length > 1.5


def test_texts_go_on_where_a_prompt_ended_and_where_others_have_parted(bundle_of):
    llm, plain = (LLM(bundle_of("mtp"), "autoregressive", 4, prefix_cache=cached) for cached in (True, False))
    system, few = prompt_ids(2 * BLOCK + 9, 0), SamplingParams(max_tokens=4, ignore_eos=True)
    found = []
    for text in [
        system,
        system,
        [*system, *prompt_ids(40, 1)],
        *([*system[:50], *prompt_ids(40, i)] for i in (2, 3, 4)),
    ]:
        before = llm.counters.cached_tokens
        assert llm.generate([text], few)[0].token_ids == plain.generate([text], few)[0].token_ids
        found.append((llm.counters.cached_tokens - before) // BLOCK)
    assert found == [0, 2, 2, 0, 1, 1]  # the first that parts in the second block computes the states at its beginning
    assert_all_free(llm.loop)


def test_kept_states_are_bounded_and_counted(bundle_of):
    llm = LLM(bundle_of("mtp"), "autoregressive", 2)
    for i in range(9):
        llm.generate([prompt_ids(40, i)] * 2, SamplingParams(max_tokens=40, ignore_eos=True))
    states, slots = llm.loop.batch.blocks.states, 2
    assert len(states._kept) == slots * (KEPT - 2)
    recipe, kept = llm.manifest.recipe, llm.manifest.target
    rows = slots * reserve_for(recipe.decoding.model_dump()) + recipe.limits.prefill_chunk
    assert llm.pool.states == 4 * (slots * (1 + KEPT) * kept.state_values + rows * kept.state_row)
    assert kept.state_values > kept.state_row > 0
    assert "of states beside it" in llm.pool.sentence


def test_networks_of_a_hybrid_say_what_they_keep(llm_of):
    llm = llm_of("mtp", "autoregressive", 1)
    target, draft = llm.networks.target, llm.networks.draft
    assert (target.paged, draft.paged) == (False, True)  # the MTP head's layer has attention alone
    assert llm.loop.chunk <= target.longest < draft.longest


def test_a_gguf_file_is_served_with_its_mtp_head(tmp_path):
    model = qwen3_5(**GGUF_SIZES | {"head_dim": 16})
    file = write_gguf(tmp_path / "m.gguf", model, GGMLQuantizationType.Q8_0, mtp=mtp_tensors(model))
    recipe, folder = recipe_for(str(file))
    assert recipe.draft.kind == "mtp"
    manifest = build(built_as(recipe, "cpu", "int8"), folder, tmp_path / "bundle")
    assert manifest.engine_facts["matrices, target"].split()[1].startswith("q8_0")
    texts = []
    for policy in ("autoregressive", "static"):
        llm = LLM(tmp_path / "bundle", policy, 2)
        texts.append([each.token_ids for each in llm.generate([[5, 6, 7], [9]], SamplingParams(max_tokens=20))])
    assert texts[0] == texts[1]
    assert llm.counters.drafted_tokens > 0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"precision": "fp8"}, "precision is 'fp8'"),
        ({"engine": "openvino"}, "engine is openvino"),
        ({"engine": "tensorrt", "precision": "bf16"}, "engine is tensorrt"),
        ({"decoding": {"per_request": 129}}, "verifies 128 tokens"),
    ],
)
def test_what_a_hybrid_does_not_have_is_refused(changes, named, networks, tmp_path, monkeypatch):
    monkeypatch.setattr("echo_trt.backends.tensorrt.build.check_machine", lambda: None)  # without its library
    with pytest.raises(UserError, match=named):
        build(recipe_of("mtp", networks, **changes), networks, tmp_path / "out")
