"""Other engines on tiny bundles: in fp32 they write what plain decoding of ours writes, prompt by prompt."""

import sys
from importlib.util import find_spec

import pytest
from engine.driving import prompt_ids
from models.checkpoints import head_config, head_tensors, llama, qwen3, write_head
from models.gguf_files import vocabulary, write_gguf
from pairs import SIZES, raw_recipe, write_tokenizer
from refusal import refused

from echo_trt.backends.openvino import cpu
from echo_trt.bundle.manifest import read_manifest
from echo_trt.bundle.read_recipe import parse_recipe
from echo_trt.cli.build import build
from echo_trt.engine.llm import LLM
from echo_trt.engine.params import SamplingParams
from echo_trt_lab.benchmark.peers import PEERS, open_peer

needs_genai = pytest.mark.skipif(find_spec("openvino_genai") is None, reason="openvino-genai is not installed")
ENGINES = [pytest.param("openvino-genai", marks=needs_genai), "transformers"]
LENGTHS = (5, 37, 2, 16, 50)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _use_cache(cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


@pytest.fixture(scope="module")
def eagle_bundle(tmp_path_factory):
    """Return a target deep enough for features from three layers, and a head that names them."""
    folder = tmp_path_factory.mktemp("deep")
    write_tokenizer(folder / "target")
    qwen3(**SIZES | {"num_hidden_layers": 5}).save_pretrained(folder / "target")
    sizes = {key: SIZES[key] for key in ("vocab_size", "hidden_size")}
    shape = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}
    config = head_config(**sizes, **shape, draft_vocab_size=100, eagle_aux_hidden_state_layer_ids=[1, 2, 4])
    tensors = head_tensors(config)
    del tensors["embed_tokens.weight"]
    write_head(folder / "head", config, tensors)
    build(parse_recipe(raw_recipe("eagle3", folder), "recipe.yaml"), folder, folder / "bundle")
    return folder / "bundle"


def prompts_of(*lengths: int) -> list[list[int]]:
    return [prompt_ids(length, seed) for seed, length in enumerate(lengths)]


def ours(bundle, prompts: list[list[int]], stop: tuple[int, ...] = ()) -> list[list[int]]:
    llm = LLM(bundle, "autoregressive", batch=4)
    return [c.token_ids for c in llm.generate(prompts, SamplingParams(max_tokens=12, stop_token_ids=stop))]


def test_an_unknown_peer_is_named_beside_the_known(bundle_of):
    bundle = bundle_of("lookup")
    with refused("'exllama'", "NAME=URL", *PEERS):
        open_peer("exllama", bundle, read_manifest(bundle))


@pytest.mark.parametrize(
    ("name", "server"), [("tensorrt-llm", "trtllm-serve"), ("vllm", "vllm serve"), ("sglang", "launch_server")]
)
def test_an_engine_that_is_a_server_says_how_to_reach_it(name, server, bundle_of):
    with refused(f"pip install {name}", server, f"{name}=http://127.0.0.1:8000"):
        open_peer(name, bundle_of("lookup"), read_manifest(bundle_of("lookup")))


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("openvino-genai", "openvino_genai", "openvino-genai=="),
        ("openvino-genai-eagle3", "openvino_genai", "openvino-genai=="),
        ("vllm=http://127.0.0.1:1", "httpx", "httpx"),
    ],
)
def test_a_peer_that_is_not_installed_names_its_package(name, module, package, bundle_of, monkeypatch):
    bundle = bundle_of("lookup")
    monkeypatch.setitem(sys.modules, module, None)  # Python's own way to say that there is no such module
    with refused(name, f"pip install {package}"):
        open_peer(name, bundle, read_manifest(bundle))


def test_a_bundle_in_a_precision_of_its_own_is_refused(bundle_of):
    bundle = bundle_of("lookup")
    with refused("int8", "fp32 or bf16"):
        open_peer("transformers", bundle, read_manifest(bundle).model_copy(update={"precision": "int8"}))


def test_another_target_than_the_bundles_is_refused(bundle_of):
    bundle = bundle_of("lookup")
    with refused("holds other weights"):
        open_peer("transformers", bundle, read_manifest(bundle).model_copy(update={"target_sha256": "0" * 64}))


@needs_genai
def test_eagle3_asks_for_a_bundle_with_a_head(bundle_of):
    bundle = bundle_of("lookup")
    with refused("kind lookup", "needs eagle3"):
        open_peer("openvino-genai-eagle3", bundle, read_manifest(bundle))


@pytest.mark.parametrize("concurrency", [1, 2, 8])
@pytest.mark.parametrize("name", ENGINES)
def test_peers_write_our_tokens(name, concurrency, bundle_of):
    bundle, prompts = bundle_of("lookup"), prompts_of(*LENGTHS)
    run = open_peer(name, bundle, read_manifest(bundle)).run(prompts, concurrency, max_tokens=12)
    assert run.answers == ours(bundle, prompts)
    assert run.whole.elapsed >= run.prefill.elapsed > 0
    assert run.whole.tokens >= run.decode.tokens > 0
    assert run.decode.elapsed > 0
    assert run.prefill.tokens >= sum(map(len, prompts))
    assert len(run.ttft) == len(run.pace) == len(prompts)
    assert run.accepted_length == 1


@pytest.mark.parametrize("name", ENGINES)
def test_an_end_token_ends_a_text_and_is_its_last(name, bundle_of):
    bundle, prompts = bundle_of("lookup"), prompts_of(*LENGTHS)
    end = ours(bundle, prompts)[1][5]
    manifest = read_manifest(bundle)
    manifest = manifest.model_copy(update={"eos_token_ids": [*manifest.eos_token_ids, end]})
    run = open_peer(name, bundle, manifest).run(prompts, 3, max_tokens=12)
    assert run.answers == ours(bundle, prompts, (end,))
    assert run.answers[1][-1] == end
    assert len(run.answers[1]) < 12


@pytest.mark.parametrize("name", ENGINES)
def test_a_gguf_llama_is_read_as_we_read_it(name, tmp_path):
    sizes = {"vocab_size": len(vocabulary().tokens), "num_attention_heads": 8, "head_dim": 16, "num_key_value_heads": 2}
    model = llama(**sizes, intermediate_size=64, max_position_embeddings=256, tie_word_embeddings=True)
    write_gguf(tmp_path / "model.gguf", model)
    raw = raw_recipe("lookup", tmp_path) | {"target": {"path": "model.gguf"}}
    bundle = tmp_path / "bundle"
    build(parse_recipe(raw, "recipe.yaml"), tmp_path, bundle)
    prompts = prompts_of(5, 20)
    run = open_peer(name, bundle, read_manifest(bundle), recipe_folder=tmp_path).run(prompts, 2, max_tokens=12)
    assert run.answers == ours(bundle, prompts)


@needs_genai
@pytest.mark.parametrize("concurrency", [1, 3])  # a tree, a chain
def test_genai_drafts_with_our_head_and_writes_our_tokens(concurrency, eagle_bundle):
    prompts = prompts_of(*LENGTHS)
    run = open_peer("openvino-genai-eagle3", eagle_bundle, read_manifest(eagle_bundle)).run(prompts, concurrency, 12)
    assert run.answers == ours(eagle_bundle, prompts)
    assert run.accepted_length >= 1


@needs_genai
def test_a_converted_network_is_kept(bundle_of, cache):
    bundle = bundle_of("lookup")
    manifest = read_manifest(bundle)
    open_peer("openvino-genai", bundle, manifest)
    graph = cache / "echo-trt" / "peers" / manifest.target_sha256 / "target" / "openvino_model.xml"
    written = graph.stat().st_mtime_ns
    open_peer("openvino-genai", bundle, manifest)
    assert graph.stat().st_mtime_ns == written
    assert {p.name for p in graph.parents[1].iterdir()} <= {"target", "target-fp16"}


@needs_genai
@pytest.mark.parametrize("name", ["openvino-genai", "openvino-genai-eagle3"])
def test_genai_runs_int8(name, eagle_bundle):
    """Weights are ours, activations and KV cache as GenAI chooses: its texts may part from ours."""
    manifest = read_manifest(eagle_bundle).model_copy(update={"precision": "int8"})
    run = open_peer(name, eagle_bundle, manifest).run(prompts_of(*LENGTHS), 2, max_tokens=12)
    assert [len(answer) for answer in run.answers] == [
        len(answer) for answer in ours(eagle_bundle, prompts_of(*LENGTHS))
    ]


@needs_genai
def test_where_our_weights_are_fp16_so_are_the_peers(bundle_of, cache, monkeypatch):
    """As on a CPU without bf16: the same bytes per weight, or the comparison would be of memory alone."""
    bundle = bundle_of("lookup")
    open_peer("openvino-genai", bundle, read_manifest(bundle))
    manifest = read_manifest(bundle).model_copy(update={"precision": "bf16"})
    monkeypatch.setattr(cpu, "has_bf16", lambda: False)
    open_peer("openvino-genai", bundle, manifest)
    graphs = [
        cache / "echo-trt" / "peers" / manifest.target_sha256 / name / "openvino_model.bin"
        for name in ("target", "target-fp16")
    ]
    whole, half = (graph.stat().st_size for graph in graphs)
    assert 0.45 * whole < half < 0.6 * whole
