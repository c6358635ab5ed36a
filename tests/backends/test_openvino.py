"""The OpenVINO engine is the reference engine, call by call, whatever is packed into a call."""

import numpy as np
import pytest
from pairs import SIZES, VOCAB, reference_engines
from random_calls import Script, inputs_for

from echo_trt.backends.base import Engine
from echo_trt.backends.openvino import cpu
from echo_trt.backends.openvino import engine as openvino
from echo_trt.backends.openvino.engine import OpenVINOEngine
from echo_trt.speculation.pack import BLOCK, ForwardBatch, pack

BLOCKS, PER_REQUEST = 24, 4
#: Numbers of bf16 differ by this much relatively; these networks round some 32 times from token to output.
BF16, ROUNDINGS = 2.0**-8, 32
TOLERANCE = {"fp32": 2e-6, "bf16": BF16 * ROUNDINGS}  # of the largest number
#: A network of every role: pair and file.
NETWORKS = {
    "target": ("lookup", "target"),
    "target with features": ("eagle3", "target"),
    "draft model": ("model", "draft"),
    "head": ("eagle3", "draft"),
    "block drafter": ("dflash", "draft"),
}


class Calls(Script):
    """Random calls over the same requests, whose blocks are scattered: prompts, then trees beside prompt chunks."""

    def __init__(self, seed: int, requests: int):
        blocks = np.random.default_rng(seed).permutation(BLOCKS)[: requests * PER_REQUEST]
        super().__init__(seed, blocks.reshape(requests, PER_REQUEST))
        self.slots = np.arange(requests)

    def prompts(self) -> ForwardBatch:
        return self.call(self.slots, chunks=self.rng.integers(1, 2 * BLOCK, len(self.slots)))

    def trees_and_chunks(self) -> ForwardBatch:
        """Pack trees of the first requests, some of them a root alone, the others a chunk of their prompt."""
        planted = int(self.rng.integers(1, len(self.slots) + 1))
        chunks = self.rng.integers(1, BLOCK, len(self.slots) - planted)
        return self.call(self.slots, planted, chunks, int(self.rng.integers(1, 25)))

    def compact_kv(self) -> tuple[np.ndarray, np.ndarray]:
        """Copy committed rows of one request to distinct others; some of the targets are sources too."""
        request = int(self.past.argmax())
        rows = (
            self.table[request, np.arange(self.past[request]) // BLOCK] * BLOCK + np.arange(self.past[request]) % BLOCK
        )
        size = len(rows) // 2
        return self.rng.permutation(rows)[:size], self.rng.permutation(rows)[:size]


def assert_same(wanted: dict[str, np.ndarray], got: dict[str, np.ndarray], tolerance: float) -> None:
    assert wanted.keys() == got.keys()
    for name, values in wanted.items():
        assert got[name].shape == values.shape
        if name != "candidates":
            assert got[name].dtype == np.float32
            scale = np.abs(values).max() if values.size else 1.0
            np.testing.assert_allclose(got[name], values, atol=tolerance * scale, rtol=0)
        elif tolerance < 1e-3:
            assert (got[name] == values).all()


@pytest.fixture(scope="module")
def engines(networks, bundle_of):
    """(network, precision) -> the reference engine and the compiled one."""

    def get(network: str, precision: str = "fp32") -> tuple[Engine, Engine]:
        pair, name = NETWORKS[network]
        compiled = OpenVINOEngine(bundle_of(pair) / f"{name}.onnx", precision, BLOCKS)
        return reference_engines(pair, networks, BLOCKS)[name], compiled

    return get


@pytest.mark.parametrize(("precision", "tolerance"), TOLERANCE.items())
@pytest.mark.parametrize("network", NETWORKS)
def test_calls_of_any_shape_equal_the_reference(network, precision, tolerance, engines):
    reference, compiled = engines(network, precision)
    for seed in range(6):
        calls = Calls(seed, requests=1 + seed)
        packed = [calls.prompts(), calls.trees_and_chunks(), calls.trees_and_chunks()]
        for call in packed:
            inputs = inputs_for(reference._role, call, calls.rng)
            # A block drafter's log-probabilities are differences of logits that are several times as large.
            allowed = 4 * tolerance if "state_rows" in inputs and precision == "fp32" else tolerance
            assert_same(reference.run(call, **inputs), compiled.run(call, **inputs), allowed)


@pytest.mark.parametrize(("precision", "tolerance"), TOLERANCE.items())
def test_moved_rows_are_those_that_later_calls_see(precision, tolerance, engines):
    reference, compiled = engines("target", precision)
    for seed in range(4):
        calls = Calls(100 + seed, requests=3)
        prompts, later = calls.prompts(), calls.trees_and_chunks()
        source, target = calls.compact_kv()
        assert set(source) & set(target)
        outputs = []
        for engine in (reference, compiled):
            engine.run(prompts)
            before = engine.run(later)["logits"].copy()
            engine.compact_kv(source, target)
            outputs.append(engine.run(later))
            assert np.abs(outputs[-1]["logits"] - before).max() > 0.5
        assert_same(*outputs, tolerance)


@pytest.mark.parametrize("network", ["target", "head"])
def test_kernels_of_usual_sizes_are_prepared_without_a_trace(network, bundle_of, monkeypatch):
    pair, name = NETWORKS[network]
    graph, sizes, run = bundle_of(pair) / f"{name}.onnx", [], OpenVINOEngine.run

    def reported(self, call: ForwardBatch, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        sizes.append(len(call.token_ids))
        return run(self, call, **inputs)

    monkeypatch.setattr(OpenVINOEngine, "run", reported)
    engine = OpenVINOEngine(graph, "fp32", BLOCKS)
    assert sorted(set(sizes)) == [size for size in engine.sizes if size <= openvino.PREPARED]
    assert not engine._pool[:, :BLOCKS].any()
    sizes.clear()
    monkeypatch.setattr(openvino, "PREPARE_SECONDS", -1.0)  # a network whose passes take long
    OpenVINOEngine(graph, "fp32", BLOCKS)
    assert sizes == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_another_cache_layout_is_refused(precision, bundle_of, monkeypatch):
    """Rows are moved by hand, so a version of OpenVINO that lays the cache out otherwise must not get past loading."""
    graph = bundle_of("lookup") / "target.onnx"
    compiled = openvino.compile_graph(openvino.read_graph(graph), precision)
    caches = [i for i in compiled.inputs if "_cache." in i.get_any_name()]
    shapes = {str(cache.partial_shape) for cache in caches}
    assert shapes == {f"[?,{SIZES['num_key_value_heads']},{BLOCK},{SIZES['head_dim']}]"}
    assert [cache.get_any_name() for cache in caches] == [
        f"{kind}_cache.{layer}" for layer in range(SIZES["num_hidden_layers"]) for kind in ("key", "value")
    ]
    monkeypatch.setattr(openvino, "BLOCK", 16)
    with pytest.raises(RuntimeError, match="blocks of 16"):
        OpenVINOEngine(graph, precision, 2)


def test_without_bf16_the_same_bundle_computes_in_fp32(bundle_of, monkeypatch):
    """As on a CPU without AVX-512, where OpenVINO refuses bf16: weights in fp16, arithmetic and cache in fp32."""
    monkeypatch.setattr(cpu, "has_bf16", lambda: False)
    graph, calls = bundle_of("lookup") / "target.onnx", Calls(0, requests=3)
    engines = [OpenVINOEngine(graph, precision, BLOCKS) for precision in ("fp32", "bf16")]
    assert [engine._pool.dtype for engine in engines] == [np.float32] * 2
    for call in (calls.prompts(), calls.trees_and_chunks()):
        exact, rounded = (engine.run(call)["logits"].copy() for engine in engines)
        assert 0 < np.abs(exact - rounded).max() < 1e-2 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("capabilities", "flags", "expected"),
    [
        (["FP32", "BF16"], "flags : avx2 avx512f", True),
        (["FP32", "BF16"], "flags : avx2 avx_ne_convert", False),  # its matrix products could, its attention could not
        (["FP32"], "flags : avx2 avx512f", False),
        (["FP32", "BF16"], None, True),  # nobody says
    ],
)
def test_bf16_takes_what_openvinos_attention_does(capabilities, flags, expected, tmp_path, monkeypatch):
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(flags)
    monkeypatch.setattr(cpu, "_CPU", tmp_path / "cpuinfo")
    monkeypatch.setattr(cpu.ov.Core, "get_property", lambda *_: capabilities)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert cpu.has_bf16.__wrapped__() == expected
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")  # oneDNN's kernels alone obey it
    assert not cpu.has_bf16.__wrapped__()


@pytest.mark.skipif(not cpu.has_bf16(), reason="needs a CPU with AVX-512, for bf16")
@pytest.mark.parametrize("length", [2, 4, 7])
@pytest.mark.parametrize("amx", sorted({False, cpu.has_amx()}))
def test_a_verified_chain_of_one_request_has_the_bits_of_plain_decoding(amx, length, bundle_of, monkeypatch):
    monkeypatch.setattr(cpu, "has_amx", lambda: amx)
    rng, past, table = np.random.default_rng(length), 37, np.array([[2, 0]])
    text = rng.integers(0, VOCAB, past + length)
    reported = []
    for together in (1, length):
        engine = OpenVINOEngine(bundle_of("lookup") / "target.onnx", "bf16", 3)
        count = np.array([past])
        engine.run(pack(text[:past], np.arange(past), 0 * count, count, table, np.zeros(1)))
        for begin in range(past, past + length, together):
            index = np.arange(begin, begin + together)
            mask = (np.tril(np.ones((together, together), np.uint8)).reshape(-1), np.array([0, together**2]))
            call = pack(
                text[index],
                index,
                np.array([begin]),
                np.array([together]),
                table,
                np.arange(together),
                mask if together > 1 else None,
            )
            reported.append(engine.run(call)["logits"].copy())
    plain, verified = np.concatenate(reported[:-1]), reported[-1]
    assert plain.shape == verified.shape
    assert (plain == verified).all()
