"""Other engines on tiny bundles: in fp32 they write what plain decoding of ours writes, prompt by prompt."""

import sys
from importlib.util import find_spec

import pytest
from engine.driving import prompt_ids
from refusal import refused

from echo_trt.bundle.manifest import read_manifest
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


@pytest.mark.parametrize("concurrency", [1, 3])
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
