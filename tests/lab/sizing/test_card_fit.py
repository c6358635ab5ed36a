"""Whether a recipe fits a card; what is said to lower is enough, and no more than that."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_trt.backends.cuda.sizes import CallBounds, empty_call, graph_sizes
from echo_trt.backends.kind import engine_kind
from echo_trt.bundle.call_sizes import CallSizes
from echo_trt.bundle.read_recipe import load_recipe, parse_recipe
from echo_trt.bundle.recipe import Recipe
from echo_trt.errors import UserError
from echo_trt.models.roles import HeadModule
from echo_trt.sizing.graphs import GRAPH_NODES, NODE_BYTES
from echo_trt.sizing.needs import needs
from echo_trt.sizing.shapes import shapes
from echo_trt.speculation.pack import BLOCK
from echo_trt.speculation.policies import reserve_for
from echo_trt_lab.sizing.cards import CARDS, parse_cards
from echo_trt_lab.sizing.fit import CardFit, fit

BUILD = Path(__file__).parents[3] / "build"
ON_CPUS = {"smollm2-135m", "gemma3-270m", "qwen2.5-coder-1.5b"}
#: The cards that each recipe's comment names.
MEANT = {
    "qwen3-0.6b": ("L4", "RTX-4090"),
    "qwen3-1.7b": ("L4", "RTX-4090"),
    "qwen3-4b": ("L4", "RTX-4090"),
    "qwen3-8b": ("A100-80GB", "H100-80GB"),
    "llama3.1-8b": ("A100-80GB", "H100-80GB"),
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
        _, hub, head, _, weights, token = table[name]
        assert hub == own.target.hub
        assert draft is None or head == own.draft.source.hub
        assert weights.split()[0] == f"{(need.target_weights + need.draft_weights) / 1e9:.1f}"
        assert token.split()[0] == f"{need.kv_token / 1e3:.0f}"


def test_as_many_graphs_are_foreseen_as_are_captured():
    """Of a head of the engine: one per size."""
    own = recipe(engine="torch", batch=4)
    target, draft = (shape.sizes for shape in shapes(own, BUILD))
    calls = CallSizes.of(own)
    bounds = CallBounds(calls.batch, calls.blocks, calls.tree)
    entries = [empty_call(s, bounds, HeadModule.inputs) for s in graph_sizes(calls.batch, calls.tree)]
    taken = needs(own, target, draft).reserved
    nodes = GRAPH_NODES + engine_kind("torch").card.layer_nodes
    inputs = sum(sum(capacity.values()) for _, capacity in entries)
    assert taken.draft == len(entries) * nodes * NODE_BYTES + inputs


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


def test_drafts_take_memory_where_pytorch_runs_them():
    """Qwen3-8B's head: 128 requests with up to 70 nodes in a level. Drafts of a whole vocabulary: their logits."""

    def working(name: str = "qwen3-8b", **changes) -> int:
        own = recipe(name, **changes)
        return needs(own, *(shape.sizes for shape in shapes(own, BUILD))).working

    more = working() - working(engine="tensorrt")
    assert 1.5e9 < more < 3e9
    assert 0 < working(batch=1) - working(engine="tensorrt", batch=1) < more / 4
    for name in ("qwen3-0.6b-for-8b", "qwen3-8b-dflash"):
        assert working(name) - working(name, engine="tensorrt") == 1024 * 151_936 * (2 + 4 + 4)


def test_fp8_takes_a_byte_per_weight_of_a_layer_where_a_card_computes_it():
    """Qwen3-8B: 6.95 of its 8.19 billion parameters; an A100 dequantises them, so that it has room for less."""
    target = shapes(recipe(), BUILD)[0].sizes
    assert target.weight_bytes("bf16") - target.weight_bytes("fp8") == 6_945_767_424  # as counted by hand
    changes = {"engine": "torch", "precision": "fp8"}
    assert on("H100-80GB", **changes).max_blocks > on("H100-80GB", engine="torch").max_blocks
    assert on("A100-80GB", **changes).max_blocks == on("A100-80GB", engine="torch").max_blocks
    assert on("H100-80GB", **changes).k_max == on("H100-80GB").k_max
    assert recipe(**changes).draft_precision == "bf16"
