"""The KV pool follows the memory of the machine, or of its container; a user may choose another size."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from refusal import refused

from echo_trt.bundle.manifest import Manifest, read_manifest
from echo_trt.engine import kv_pool as module
from echo_trt.engine.host_memory import available_memory, bytes_in, gigabytes, memory_limit, total_memory
from echo_trt.engine.kv_pool import SHARE, KVPool, kv_pool
from echo_trt.engine.llm import LLM
from echo_trt.engine.params import SamplingParams
from echo_trt.errors import UserError

GIB = 2**30


def pool_of(folder: Path, **given: int) -> KVPool:
    return kv_pool(folder, read_manifest(folder), **given)


def test_a_batch_beyond_the_memory_opens_and_answers(with_limits):
    """64 contexts of a million tokens would take 88 GB."""
    llm = LLM(with_limits("lookup", context=2**20, batch=64), "autoregressive")
    assert llm.pool.request_blocks <= llm.pool.blocks == llm.loop.batch.blocks.count < 64 * llm.pool.request_blocks
    assert llm.pool.bytes <= max(SHARE * psutil.virtual_memory().total, llm.pool.request_blocks * llm.pool.block_bytes)
    assert len(llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4))[0].token_ids) == 4


def test_a_small_batch_takes_no_more_than_its_contexts(bundle_of):
    for batch in (1, 5):
        llm = LLM(bundle_of("lookup"), "autoregressive", batch)
        assert llm.loop.batch.blocks.count == batch * llm.pool.request_blocks
        assert f"{batch} request" in llm.pool.sentence


@pytest.mark.parametrize("pair", ["lookup", "close"])
def test_the_pool_s_bytes_are_those_that_are_allocated(pair, bundle_of):
    """The engines add a block for padding; features of a head are counted by the token."""
    llm = LLM(bundle_of(pair), "autoregressive", 2)
    engines = [engine for engine in (llm.networks.target, llm.networks.draft) if engine]
    taken = sum(engine._pool.nbytes // (engine.num_blocks + 1) * engine.num_blocks for engine in engines)
    features = llm.manifest.draft.feature_size if llm.manifest.draft else 0
    assert llm.pool.bytes == taken + llm.pool.blocks * 32 * 4 * features


def test_one_request_of_full_length_always_fits_or_is_refused(with_limits, monkeypatch):
    """What the refusal advises then opens."""
    folder = with_limits("lookup", context=100_000, batch=8)
    whole = pool_of(folder, batch=1)
    weights = psutil.virtual_memory().available - whole.available  # of a machine that is not quite at rest
    need = whole.request_blocks * whole.block_bytes
    monkeypatch.setattr(module, "available_memory", lambda: weights + need + 2**26)
    assert pool_of(folder).blocks == whole.request_blocks
    monkeypatch.setattr(module, "available_memory", lambda: need // 2)
    with pytest.raises(UserError, match=r"limits.context 100,000 tokens takes .* of this machine's memory") as refusal:
        pool_of(folder)
    shorter = int(str(refusal.value).split("--max-model-len ")[1].rstrip("."))
    assert pool_of(with_other_context(folder, shorter)).requests == 1
    with refused("one request of limits.context", "free some."):
        monkeypatch.setattr(module, "available_memory", lambda: 0)
        pool_of(folder)


def with_other_context(folder: Path, context: int) -> Path:
    manifest = read_manifest(folder)
    limits = manifest.recipe.limits.model_copy(update={"context": context})
    changed: Manifest = manifest.model_copy(update={"recipe": manifest.recipe.model_copy(update={"limits": limits})})
    (folder / "manifest.json").write_text(changed.model_dump_json())
    return folder


def test_a_pool_that_is_chosen_overrides_the_recipe(with_limits):
    folder = with_limits("lookup", kv_blocks=40)
    fixed = pool_of(folder)
    assert fixed.blocks == 40
    memory = 100 * fixed.block_bytes + 5
    assert LLM(folder, "autoregressive", kv_cache_memory=memory).loop.batch.blocks.count == 100
    with refused("--kv-cache-memory is 0.0 MB", "limits.context 160", "raise it"):
        pool_of(folder, memory=1)


def test_a_pool_beyond_half_of_the_memory_is_told(with_limits, monkeypatch):
    folder = with_limits("lookup", kv_blocks=20_000)
    taken = pool_of(folder).bytes
    monkeypatch.setattr(module, "available_memory", lambda: 3 * taken)
    assert pool_of(folder).warning == ""
    monkeypatch.setattr(module, "available_memory", lambda: 3 * taken // 2)
    assert "may grow to" in pool_of(folder).warning
    assert "choose less with --kv-cache-memory" in pool_of(folder).warning


def test_a_pool_beyond_the_machine_is_refused(bundle_of):
    total = total_memory()
    with refused(f"--kv-cache-memory is {gigabytes(total + 1)}, but this machine has {gigabytes(total)}", "give less"):
        pool_of(bundle_of("lookup"), memory=total + 1)
    assert pool_of(bundle_of("lookup"), memory=total).bytes <= total


def test_python_takes_memory_as_the_command_line_does(bundle_of):
    chosen = LLM(bundle_of("lookup"), "autoregressive", kv_cache_memory="64M").pool
    assert chosen.blocks == LLM(bundle_of("lookup"), "autoregressive", kv_cache_memory=64 * 2**20).pool.blocks
    assert chosen.blocks == 64 * 2**20 // chosen.block_bytes


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kv_cache_memory": "8 apples"}, "kv_cache_memory is '8 apples'; give GiB, such as 4, or"),
        ({"kv_cache_memory": [1]}, "kv_cache_memory is [1]; give GiB"),
        ({"kv_cache_memory": 1.5}, "kv_cache_memory is 1.5; give GiB"),  # bytes are whole
        ({"batch": "3"}, "batch is '3'; give a whole number from 1 to 4,096, or None."),
        ({"batch": 2.5}, "batch is 2.5; give a whole number"),
        ({"batch": True}, "batch is True; give a whole number"),
        ({"budget": 0}, "budget is 0; give a whole number from 1 to 2^31 - 1, or None."),
        ({"budget": "8"}, "budget is '8'; give a whole number"),
    ],
)
def test_python_is_refused_a_wrong_number_in_a_sentence(bundle_of, given, said):
    with refused(said):
        LLM(bundle_of("lookup"), **given)


def test_engines_that_share_a_machine_share_its_memory(with_limits):
    folder = with_limits("lookup", context=2**18, batch=4096)
    assert 3 * pool_of(folder, processes=3).bytes <= pool_of(folder).bytes + 2**28  # the machine is not quite at rest


def group(root: Path, position: str, **files: str) -> None:
    folder = root / "sys/fs/cgroup" / position
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.mark.parametrize("inside", [False, True])
def test_a_container_s_limit_counts(inside, tmp_path):
    """Of both versions of control groups; ``inside``: the mount is the container's, and the path the host's."""
    (tmp_path / "proc/self").mkdir(parents=True)
    path = tmp_path / "proc/self/cgroup"
    path.write_text("0::/docker/abc\n")
    stat = "anon 4096\nactive_file 1000\ninactive_file 500\n"
    group(
        tmp_path, "" if inside else "docker/abc", memory__max="9000000\n", memory__current="9000\n", memory__stat=stat
    )
    assert available_memory(tmp_path) == 9_000_000 - 9000 + 1500
    assert memory_limit(tmp_path) == 9_000_000
    group(tmp_path, "" if inside else "docker/abc", memory__max="max\n")
    assert available_memory(tmp_path) > 100 * 2**20
    assert memory_limit(tmp_path) is None
    path.write_text("5:cpu,cpuacct:/other\n4:memory:/docker/abc\n0::/\n")
    stat = "active_file 7\ntotal_active_file 1000\ntotal_inactive_file 500\n"
    files = {"memory__usage_in_bytes": "9000\n", "memory__stat": stat}
    group(tmp_path, "memory/docker", memory__limit_in_bytes="5000000\n", **files)
    assert available_memory(tmp_path) == 5_000_000 - 9000 + 1500
    group(tmp_path, "memory", memory__limit_in_bytes="6000\n", **files)
    assert available_memory(tmp_path) == 0


def test_a_container_too_small_is_refused_with_its_limit_and_the_need(bundle_of, with_limits, monkeypatch):
    pool = pool_of(bundle_of("lookup"))
    manifest = read_manifest(bundle_of("lookup"))
    need = module._weights(bundle_of("lookup"), manifest) + pool.request_blocks * pool.block_bytes
    need += module.PROCESSES + 4 * module.PASS * manifest.target.vocab_size
    monkeypatch.setattr(module, "memory_limit", lambda: need - 1)
    for given in ({}, {"memory": 2**30}):
        with refused(
            f"memory limit is {need / 1e9:.2f} GB, but the bundle needs {need / 1e9:.2f} GB", "raise the limit"
        ):
            pool_of(bundle_of("lookup"), **given)
    monkeypatch.setattr(module, "memory_limit", lambda: need)
    folder = with_limits("lookup", kv_blocks=10**6)
    assert pool_of(folder).blocks == pool.request_blocks  # a recipe's pool gives way


@pytest.mark.parametrize(
    ("text", "amount"),
    [("4", 4 * GIB), ("4G", 4 * GIB), ("1.5GiB", 3 * GIB // 2), ("512m", GIB // 2), ("7B", 7), ("2T", 2048 * GIB)],
)
def test_amounts(text, amount):
    assert bytes_in("--kv-cache-memory", text) == amount


@pytest.mark.parametrize("text", ["", "0", "-1", "4X", "G", "4GB", "4iB", "4BiB", "1e9", "nan"])
def test_what_is_no_amount(text):
    with refused("--kv-cache-memory is", "GiB, such as 4"):
        bytes_in("--kv-cache-memory", text)
