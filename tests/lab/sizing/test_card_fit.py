"""Whether a recipe fits a card; what is said to lower is enough, and no more than that."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_trt.backends.cuda.sizes import CallBounds, empty_calls, graph_sizes
from echo_trt.backends.kind import engine_kind
from echo_trt.bundle.call_sizes import CallSizes
from echo_trt.bundle.read_recipe import load_recipe, parse_recipe
from echo_trt.bundle.recipe import Recipe
from echo_trt.errors import UserError
from echo_trt.models.roles import HeadModule
from echo_trt.sizing.graphs import GRAPH_NODES, LEVEL_NODES, NODE_BYTES, Reserved
from echo_trt.sizing.needs import needs, split_scratch
from echo_trt.sizing.shapes import shapes
from echo_trt.speculation.pack import BLOCK
from echo_trt.speculation.policies import reserve_for
from echo_trt_lab.sizing.cards import CARDS, parse_cards
from echo_trt_lab.sizing.fit import CardFit, fit
from super_tree_attention.kernel_plan import plan

BUILD = Path(__file__).parents[3] / "build"
ON_CPUS = {"smollm2-135m", "gemma3-270m"}
#: The cards that each recipe's comment names.
MEANT = {
    "qwen3-0.6b": ("L4", "RTX-4090"),
    "qwen3-1.7b": ("L4", "RTX-4090"),
    "qwen3-4b": ("L4", "RTX-4090"),
    "qwen3-8b": ("A100-80GB", "H100-80GB"),
    "qwen3-0.6b-for-8b": ("A100-80GB", "H100-80GB"),
    "qwen3-14b": ("A100-80GB", "H100-80GB"),
    "qwen3-30b-a3b": ("A100-80GB", "H100-80GB"),
    "qwen3-32b": ("H200", "B200"),
    "qwen3-235b-a22b": ("A100-80GB", "H100-80GB"),
    "qwen3-4b-dflash": ("L4", "RTX-4090"),
    "qwen3-4b-dspark": ("L4", "RTX-4090"),
    "qwen3-8b-dflash": ("A100-80GB", "H100-80GB"),
    "qwen3-8b-dspark": ("A100-80GB", "H100-80GB"),
    "qwen3-14b-dspark": ("A100-80GB", "H100-80GB"),
}


LOWER = re.compile(
    r"(batch|context|kv_blocks|tensor_parallel)(?: from [\d,]+| \([\d,]+, as many as the batch needs\))? to ([\d,]*\d)"
)


def recipe(name: str = "qwen3-8b", **changes) -> Recipe:
    found = load_recipe(BUILD / f"{name}.yaml")
    limits = found.limits.model_copy(
        update={k: changes.pop(k) for k in list(changes) if k in type(found.limits).model_fields}
    )
    return found.model_copy(update={**changes, "limits": limits})


def on(cards: str, name: str = "qwen3-8b", **changes) -> CardFit:
    return fit(recipe(name, **changes), BUILD, *parse_cards(cards))


def numbers(sentence: str, pattern: str) -> list[int]:
    found = re.search(pattern, sentence)
    assert found, sentence
    return [int(n.replace(",", "")) for n in found.groups()]


@pytest.mark.parametrize("engine", ["tensorrt", "torch"])
@pytest.mark.parametrize("name", MEANT)
def test_shipped_recipes_fit_the_cards_they_are_for(name, engine):
    gpus = load_recipe(BUILD / f"{name}.yaml").tensor_parallel
    for card in MEANT[name]:
        verdict = on(f"{card} x{gpus}", name, engine=engine)
        assert verdict.fits, verdict.sentence
        assert verdict.spare >= 0


def test_the_table_in_the_docs_is_right():
    text = (BUILD.parent / "docs" / "recipes.md").read_text("utf-8")
    lines = text.partition("## Those that ship")[2].partition("\n## ")[0].splitlines()
    table = {line.split("`")[1]: [c.strip() for c in line.split("|")[1:-1]] for line in lines if line.startswith("| `")}
    assert {f.stem for f in BUILD.glob("*.yaml")} == table.keys() == {*MEANT, *ON_CPUS}
    for name in MEANT:
        own = recipe(name)
        target, draft = shapes(own, BUILD)
        need = needs(own, target.sizes, draft and draft.sizes)
        _, hub, head, _, weights, token, pool, knees = table[name]
        assert hub == own.target.hub
        assert draft is None or head == own.draft.source.hub
        assert weights.split()[0] == f"{(need.target_weights + need.draft_weights) / 1e9:.1f}"
        assert token.split()[0] == f"{need.kv_token / 1e3:.0f}"
        assert pool.split()[0] == f"{need.pool / 1e9:.1f}"
        assert knees == ", ".join(str(fit(own, BUILD, CARDS[card], 8).k_max) for card in MEANT[name])


def test_what_an_8b_model_needs():
    """Beside weights, KV rows and features: test_inspect.py."""
    target, draft = (shape.sizes for shape in shapes(recipe(), BUILD))
    need = needs(recipe(), target, draft)
    assert needs(recipe(engine="openvino"), target, draft).features == 0
    kept = [needs(recipe(engine=engine), target, draft).features_token for engine in ("tensorrt", "torch")]
    assert kept == [2 * draft.feature_size, 2 * draft.hidden_size]  # PyTorch keeps what the head makes of them
    assert need.fixed == need.target_weights + need.draft_weights + need.working + need.reserved.total
    assert needs(recipe(engine="openvino"), target, draft).reserved == Reserved()
    assert needs(recipe(precision="int8"), target, draft).target_weights == 8_190_735_360


@pytest.mark.parametrize("engine", ["torch", "tensorrt"])
def test_what_is_taken_before_requests_come_has_its_parts(engine):
    """Qwen3-8B and its head, 128 requests: sets of graphs, drafts of 12 batch sizes and 7 depths, contexts."""
    own = recipe(engine=engine)
    sizes = [shape.sizes for shape in shapes(own, BUILD)]
    taken, plain = needs(own, *sizes).reserved, needs(own, sizes[0], None).reserved
    captured = {"torch": 64, "tensorrt": 71}[engine]
    assert len(graph_sizes(128, 71 if engine == "torch" else 1024)) == captured
    assert (taken.target, taken.sampler) == (plain.target, plain.sampler)
    assert 0.1e9 < taken.target < 0.5e9
    assert taken.draft < taken.target  # two sets of one layer's graphs
    assert plain.draft == plain.levels == plain.states == 0
    lengths = range(1, own.decoding.max_depth)
    assert taken.levels == 12 * sum(lengths) * LEVEL_NODES * NODE_BYTES > 0.1e9
    assert taken.states == 128 * 72 * 4096 * 2
    assert taken.sampler > 0.5e9
    counts = 3 * captured + 12 * len(lengths), captured  # a head has two sets
    assert [r.contexts // 2**20 for r in (taken, plain)] == (list(counts) if engine == "tensorrt" else [0, 0])
    assert taken.total == sum((taken.target, taken.draft, taken.levels, taken.contexts, taken.states, taken.sampler))


def test_as_many_graphs_are_foreseen_as_are_captured():
    """Of a head of the engine: one per size and kind of entries."""
    own = recipe(engine="torch", batch=4)
    target, draft = (shape.sizes for shape in shapes(own, BUILD))
    calls = CallSizes.of(own)
    bounds = CallBounds(calls.batch, calls.blocks, calls.tree)
    entries = [list(empty_calls(s, bounds, HeadModule.inputs)) for s in graph_sizes(calls.batch, calls.tree)]
    taken = needs(own, target, draft).reserved
    nodes = GRAPH_NODES + engine_kind("torch").card.layer_nodes
    inputs = sum(sum(capacity.values()) for calls_of in entries for _, capacity in calls_of)
    assert taken.draft == sum(map(len, entries)) * nodes * NODE_BYTES + inputs


def test_a_call_grows_with_the_trees_and_the_chunk():
    def tokens(**changes) -> int:
        own = recipe(**changes)
        return needs(own, shapes(own, BUILD)[0].sizes, None).tokens

    assert tokens() == 1024 + 512
    assert tokens(prefill_chunk=2048) == 2048 + 2048
    assert tokens(batch=1) == 512 + 512  # a prompt's chunk, and another beside it
    sizes = shapes(recipe(), BUILD)[0].sizes
    assert needs(recipe(prefill_chunk=2048), sizes, None).working > 2 * needs(recipe(), sizes, None).working


def test_a_pool_without_a_limit_is_what_the_batch_needs():
    own = recipe(kv_blocks=None, batch=3)
    need = needs(own, shapes(own, BUILD)[0].sizes, None)
    assert need.blocks == 3 * -(-(8192 + reserve_for(own.decoding.model_dump())) // BLOCK)


@pytest.mark.parametrize(("card", "kv_blocks"), [("L40S", 8192), ("RTX 5090", 4096), ("A100-80GB", 100_000)])
def test_kv_blocks_to_lower(card, kv_blocks):
    verdict = on(card, kv_blocks=kv_blocks)
    assert not verdict.fits
    before, after = numbers(verdict.sentence, r"lower limits.kv_blocks from ([\d,]+) to ([\d,]+)\.$")
    assert before == kv_blocks
    assert after == verdict.max_blocks
    assert on(card, kv_blocks=after).fits
    assert not on(card, kv_blocks=after + 1).fits


@given(
    name=st.sampled_from(sorted(MEANT)),
    card=st.sampled_from(sorted(CARDS)),
    engine=st.sampled_from(["tensorrt", "torch"]),
    batch=st.sampled_from([1, 3, 64, 1000]),
    context=st.sampled_from([100, 2048, 8191, 40960]),
    chunk=st.sampled_from([1, 256, 4096]),
    blocks=st.sampled_from([None, 5, 2000, 100_000]),
)
def test_who_does_as_told_ends_with_what_fits(name, card, engine, batch, context, chunk, blocks):
    requested = {"batch": batch, "context": context, "prefill_chunk": chunk, "kv_blocks": blocks, "engine": engine}
    try:
        parse_recipe(recipe(name, **requested).model_dump(), "asked")
    except UserError:  # a pool that holds no request
        return
    verdict = on(f"{card} x8", name, **requested)
    for _ in range(3):
        if verdict.fits:
            parse_recipe(recipe(name, **requested).model_dump(), "told")
            return
        reported = {key: int(number.replace(",", "")) for key, number in LOWER.findall(verdict.sentence)}
        if not reported:
            assert re.search("take a larger card|take a smaller model", verdict.sentence)
            return
        requested |= reported
        verdict = on(f"{card} x8", name, **requested)
    raise AssertionError(verdict.sentence)


def test_gpus_to_add():
    verdict = on("L40S x2", "qwen3-32b")
    assert verdict.sentence.endswith("of 43.2 GB; set tensor_parallel to 2.")
    assert on("L40S x2", "qwen3-32b", tensor_parallel=2, kv_blocks=260).fits
    alone = on("L4", "qwen3-32b")
    assert "weights and working memory take 71." in alone.sentence
    assert alone.sentence.endswith("of 21.6 GB; set tensor_parallel to 8 and take 8 cards.")


def test_gpus_that_cannot_share_are_not_proposed(tmp_path):
    """Of 6 heads and 4,608 columns of the MLP 2 GPUs can take their share, and 4 not."""
    (tmp_path / "odd").mkdir()
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 128, "intermediate_size": 4608}
    config = {"architectures": ["Qwen3ForCausalLM"], "hidden_size": 4096, "vocab_size": 1000, **sizes}
    for layers, reported in ((600, "set tensor_parallel to 2."), (1050, "take a larger card (")):
        (tmp_path / "odd" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
        own = parse_recipe({"name": "odd", "target": {"path": "odd"}, "engine": "tensorrt"}, "odd.yaml")
        verdict = fit(own, tmp_path, *parse_cards("A100-80GB x8"))
        assert reported in verdict.sentence


def test_cards_to_take_instead():
    verdict = on("L4 x8", "qwen3-235b-a22b")
    assert not verdict.fits
    listed = verdict.sentence.partition("take a larger card (")[2].rstrip(").").split(", ")
    assert "A100-80GB" in listed
    for card in CARDS:
        split = recipe("qwen3-235b-a22b", kv_blocks=258)
        assert (card in listed) == (fit(split, BUILD, CARDS[card], 8).max_blocks >= 258)


def test_too_few_cards_for_the_recipe():
    verdict = on("H200 x4", "qwen3-235b-a22b")
    assert not verdict.fits
    assert verdict.spare > 0
    assert verdict.sentence == "does not fit: tensor_parallel is 8, but there are 4 cards; take 8."


def test_missing_and_left_add_up():
    verdict = on("H100-80GB")
    need = needs(recipe(), *(shape.sizes for shape in shapes(recipe(), BUILD)))
    assert verdict.spare == int(0.9 * 80e9) - need.fixed - need.pool - need.features
    assert (
        f"fits: {verdict.spare / 1e9:.1f} GB a GPU are left, room for {verdict.max_blocks:,} KV blocks."
        == verdict.sentence
    )
    missing = on("L40S").spare
    assert f"{-missing / 1e9:.1f} GB a GPU are missing" in on("L40S").sentence


def test_drafts_take_memory_where_pytorch_runs_them():
    """Qwen3-8B's head: 128 requests with up to 70 nodes in a level. Drafts of a whole vocabulary: their logits."""

    def working(name: str = "qwen3-8b", **changes) -> int:
        own = recipe(name, **changes)
        return needs(own, *(shape.sizes for shape in shapes(own, BUILD))).working

    more = working(engine="torch") - working()
    assert 1.5e9 < more < 3e9
    assert 0 < working(engine="torch", batch=1) - working(batch=1) < more / 4
    for name in ("qwen3-0.6b-for-8b", "qwen3-8b-dflash"):
        assert working(name, engine="torch") - working(name) == 1024 * 151_936 * (2 + 4 + 4)


def test_splits_have_scratch():
    """Qwen3-8B: as much as the kernel's plan asks for in calls of all sizes, on an H100."""
    sizes, calls = shapes(recipe(), BUILD)[0].sizes, CallSizes.of(recipe())
    maximum = split_scratch(sizes, 1536)
    for count, requests in ((1, 1), (64, 1), (256, 16), (512, 1), (768, 16), (1536, calls.batch)):
        made = plan(count, requests, requests * calls.blocks, 8, 4, processors=132)
        assert count * 32 * made.num_splits * 129 * 4 * (made.num_splits > 1) <= split_scratch(sizes, count) <= maximum
    assert 60e6 < maximum < 200e6
    divided = shapes(recipe("qwen3-235b-a22b"), BUILD)[0].sizes  # 8 query heads per GPU
    assert split_scratch(divided, 1536) <= maximum


def test_fp8_takes_a_byte_per_weight_of_a_layer_where_a_card_computes_it():
    """Qwen3-8B: 6.95 of its 8.19 billion parameters; an A100 dequantises them, so that it has room for less."""
    target = shapes(recipe(), BUILD)[0].sizes
    assert target.weight_bytes("bf16") - target.weight_bytes("fp8") == 6_945_767_424  # as counted by hand
    changes = {"engine": "torch", "precision": "fp8"}
    assert on("H100-80GB", **changes).max_blocks > on("H100-80GB", engine="torch").max_blocks
    assert on("A100-80GB", **changes).max_blocks == on("A100-80GB", engine="torch").max_blocks
    assert on("H100-80GB", **changes).k_max == on("H100-80GB").k_max
    assert recipe(**changes).draft_precision == "bf16"
