"""The CPU engine: a node's bits depend on its text alone, and a GGUF file's matrices are taken as they are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from models.checkpoints import BUILDERS
from models.gguf_files import GGUF_SIZES, write_gguf
from pairs import SIZES, VOCAB, roles_of
from random_calls import Script, inputs_for

from echo_trt.backends.cpu import attention, operators
from echo_trt.backends.cpu.build import compile_role
from echo_trt.backends.cpu.engine import CPUEngine
from echo_trt.backends.cpu.experts import route
from echo_trt.backends.cpu.formats import FORMATS, Weights, pack, quantised
from echo_trt.backends.cpu.network import KINDS
from echo_trt.backends.cpu.program import Op, Pool, Program
from echo_trt.backends.torch.engine import TorchEngine
from echo_trt.models.open_checkpoint import open_checkpoint
from echo_trt.models.roles import TargetModule
from echo_trt.models.weights import load_decoder
from echo_trt.speculation.pack import BLOCK
from echo_trt.speculation.pack import pack as packed
from echo_trt.speculation.super_tree import SuperTree, ancestor_mask

LENGTH, REQUESTED = 300, 3
Rows = dict[tuple[int, ...], np.ndarray]  # a text -> the logits behind it


@pytest.fixture(scope="module")
def engine_of(tmp_path_factory) -> Callable[..., CPUEngine]:
    folder = tmp_path_factory.mktemp("cpu")

    def get(family: str, precision: str, threads: int = 1) -> CPUEngine:
        path = folder / f"{family}-{precision}.cpu"
        if not path.exists():
            changes = {"sliding_window": 20} if family == "gemma3" else {}
            BUILDERS[family](**SIZES | changes).save_pretrained(folder / family)
            role = TargetModule(load_decoder(open_checkpoint(folder / family), 8 * BLOCK))
            compile_role(role, path, precision)
        return CPUEngine(path, precision, 64, threads)

    return get


def plain_rows(engine: CPUEngine, texts: np.ndarray) -> Rows:
    """Return the logits behind all beginnings of texts, token by token, each text alone."""
    rows: Rows = {}
    for text in texts:
        table = np.arange(10)[None]
        for i in range(len(text)):
            at, one = np.array([i]), np.ones(1, np.int64)
            logits = engine.run(packed(text[i : i + 1], at, at, one, table, np.zeros(1, np.int64)))["logits"]
            rows[tuple(text[: i + 1])] = logits[0].copy()
    return rows


def in_chunks(engine: CPUEngine, texts: np.ndarray, table: np.ndarray, rng: np.random.Generator) -> Rows:
    """Return the same of prompts in parts of any size, together."""
    rows, at = {}, np.zeros(len(texts), np.int64)
    while (at < LENGTH).any():
        counts = np.minimum(rng.integers(1, 25, len(texts)), LENGTH - at)
        live = np.flatnonzero(counts)
        owner = np.repeat(live, counts[live])
        positions = np.concatenate([np.arange(at[r], at[r] + counts[r]) for r in live])
        every = np.arange(len(owner))
        call = packed(texts[owner, positions], positions, at[live], counts[live], table[live], every)
        logits = engine.run(call)["logits"]
        rows |= {
            tuple(texts[r][: p + 1]): logits[i].copy() for i, (r, p) in enumerate(zip(owner, positions, strict=True))
        }
        at += counts
    return rows


def in_trees(engine: CPUEngine, texts: np.ndarray, table: np.ndarray, past: int, rng: np.random.Generator) -> Rows:
    """Return the same of five tokens behind ``past`` ones, among random branches."""
    trees, nodes, pasts = [], [], np.full(len(texts), past)
    for text, blocks in zip(texts, table, strict=True):
        rows = np.arange(past)
        engine.run(packed(text[:past], rows, np.zeros(1, np.int64), pasts[:1], blocks[None], np.zeros(0, np.int64)))
        tree, path = SuperTree.from_roots(text[past : past + 1]), [0]
        for depth in range(1, 6):
            for _ in range(rng.integers(0, 3)):
                tree.add(rng.integers(0, len(tree), 1), rng.integers(0, VOCAB, 1), np.zeros(1))
            tree.add(np.array(path[-1:]), text[past + depth][None], np.zeros(1))
            path.append(len(tree) - 1)
        trees.append(tree)
        nodes.append(path)
    masks, counts = [ancestor_mask(tree)[0] for tree in trees], np.array([len(tree) for tree in trees])
    mask = np.concatenate(masks), np.cumsum([0, *map(len, masks)])
    tokens, depths = (np.concatenate([getattr(tree, part) for tree in trees]) for part in ("token", "depth"))
    logits = engine.run(packed(tokens, past + depths, pasts, counts, table, np.arange(len(tokens)), mask))["logits"]
    first = np.cumsum([0, *counts])
    return {
        tuple(text[: past + depth + 1]): logits[first[r] + node].copy()
        for r, text in enumerate(texts)
        for depth, node in enumerate(nodes[r])
    }


@pytest.mark.parametrize(
    ("family", "precision", "has_pairs"),
    [
        ("llama", "bf16", True),
        ("llama", "bf16", False),
        ("gemma3", "fp32", True),
        ("qwen2", "int4", True),
        ("gemma3", "int4", False),
        ("qwen3_moe", "int8", True),
    ],
)
def test_a_tokens_bits_depend_on_its_text_alone(family, precision, has_pairs, engine_of, monkeypatch):
    """Not on company, batch, chunks, the blocks that hold it, threads, or where tiles of its context end."""
    monkeypatch.setattr(attention, "HAS_PAIRS", attention.HAS_PAIRS and has_pairs)
    rng = np.random.default_rng(0)
    texts = rng.integers(0, VOCAB, (REQUESTED, LENGTH))
    plain = plain_rows(engine_of(family, precision), texts)
    found = []
    for threads in (1, 2):
        engine, table = engine_of(family, precision, threads), rng.permutation(60)[:48].reshape(REQUESTED, 16)
        found.append(in_chunks(engine, texts, table, rng))
        found += [in_trees(engine, texts, table, past, rng) for past in (5, 31, 63, 250, 255, 256, 290)]
    assert sum(map(len, found)) > 500
    for rows in found:
        assert all(np.array_equal(logits, plain[text]) for text, logits in rows.items())


def test_products_of_pairs_and_of_single_numbers_are_close(engine_of, monkeypatch):
    texts = np.random.default_rng(0).integers(0, VOCAB, (1, LENGTH))
    found = []
    for has_pairs in (attention.HAS_PAIRS, False):
        monkeypatch.setattr(attention, "HAS_PAIRS", has_pairs)
        found.append(np.stack(list(plain_rows(engine_of("llama", "bf16"), texts).values())))
    pairs, single = found
    assert np.median(np.abs(pairs - single)) < 0.1 * single.std()  # a random network makes much of a rounding


def _weights(name: str) -> Weights:
    matrix = np.random.default_rng(1).standard_normal((50, 512)).astype(np.float32)
    if name == "f32":
        return Weights(FORMATS[name], matrix)
    if name in ("f16", "bf16"):
        bits = (
            matrix.astype(np.float16).view(np.uint16) if name == "f16" else (matrix.view(np.uint32) >> 16).astype("u2")
        )
        return Weights(FORMATS[name], bits)
    return quantised(matrix, name)


@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize("name", ["f32", "bf16", "f16", "q4_0", "q8_0"])
def test_embeddings_are_the_packed_matrix_rows(name, lanes):
    weights, tokens, out = _weights(name), np.array([3, 49, 16, 3]), np.zeros((4, 512), np.float32)
    table, rows = pack(weights, lanes), np.array([4])
    kind = table.format
    addresses = [array.ctypes.data for array in (rows, tokens, table.quants, table.scales, out)]
    record = np.array(
        [*addresses, 512, 0, lanes, kind.bits, kind.offset, kind.minimum, kind.integers, KINDS[kind.kind]]
    )
    record[6:7].view(np.float32)[0] = 2
    operators.embed.ctypes(record.ctypes.data, 0, 1)
    np.testing.assert_array_equal(out, 2 * weights.dequantise()[tokens])


@pytest.mark.parametrize("normalised", [False, True])
def test_the_first_of_equal_experts_is_chosen(normalised):
    scores = np.zeros((9, 32), np.float32)
    scores[:, :20] = np.random.default_rng(2).integers(-3, 3, (9, 20))
    rows, chosen, weights = np.array([9]), np.zeros((9, 6), np.int64), np.zeros((9, 6), np.float32)
    wanted = np.argsort(-scores[:, :20], axis=1, kind="stable")[:, :6]
    powers = np.exp(scores[:, :20].astype(float))
    whole = np.take_along_axis(powers, wanted, 1) if normalised else powers
    op = Op.of(route, rows, scores, scores.strides[0], 20, 6, int(normalised), chosen, weights)
    Pool(2).run(Program([op]))
    np.testing.assert_array_equal(chosen, wanted)
    np.testing.assert_allclose(weights, np.take_along_axis(powers, wanted, 1) / whole.sum(1, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize(
    ("family", "storage"),
    [("llama", "Q4_0"), ("llama", "Q4_1"), ("llama", "Q5_0"), ("llama", "Q8_0"), ("qwen3_moe", "Q4_1")],
)
def test_a_gguf_files_matrices_keep_their_bits(family, storage, tmp_path):
    """Then all that is lost is the rounding of activations to 8 bits; all experts are chosen, or it chose others."""
    experts = {"num_experts_per_tok": 7, "moe_intermediate_size": 32, "norm_topk_prob": True}
    changes = experts if family == "qwen3_moe" else {}
    model = BUILDERS[family](**GGUF_SIZES | changes, tie_word_embeddings=False)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "model.gguf", model, GGMLQuantizationType[storage]))
    role = TargetModule(load_decoder(checkpoint, 64))
    compile_role(TargetModule(load_decoder(checkpoint, 64, in_blocks=True)), tmp_path / "target.cpu", "int8")
    engine = CPUEngine(tmp_path / "target.cpu", "int8", 2)
    kinds = {kind for kind, *_ in engine._file.header["matrices"].values()}
    assert storage.lower() in kinds
    rows = np.arange(20)
    call = packed(rows + 1, rows, np.zeros(1, np.int64), np.array([20]), np.arange(2)[None], rows)
    wanted, got = TorchEngine(role, 2).run(call)["logits"], engine.run(call)["logits"]
    assert np.square(got - wanted).mean() < 0.05**2 * np.square(wanted).mean()


@pytest.mark.parametrize("pair", ["eagle3", "dflash", "dspark", "peagle"])
def test_heads_equal_the_reference(pair, networks, tmp_path):
    role = roles_of(pair, networks)["draft"]
    compile_role(role, tmp_path / "draft.cpu", "fp32")
    reference, engine = TorchEngine(role, 24), CPUEngine(tmp_path / "draft.cpu", "fp32", 24)
    for seed in range(4):
        calls, requests = Script(seed, np.arange(24).reshape(-1, 4)), np.arange(1 + seed)
        chunks = [calls.rng.integers(1, 2 * BLOCK, len(requests)), calls.rng.integers(1, BLOCK, len(requests) - 1)]
        for planted, sizes in enumerate(chunks):
            call = calls.call(requests, planted, sizes, 20)
            inputs = inputs_for(role, call, calls.rng)
            wanted, got = reference.run(call, **inputs), engine.run(call, **inputs)
            assert wanted.keys() == got.keys()
            for name, values in wanted.items():
                np.testing.assert_allclose(got[name], values, atol=1e-4, err_msg=name)


def test_what_all_layers_have_of_a_block_stands_together(engine_of):
    """So memory is taken block by block: of regions of layers a prompt would take a page of 2 MB each."""
    for part in engine_of("qwen3", "bf16").kv_block(5):
        assert len(part) == SIZES["num_hidden_layers"] > 1
        assert part.flags.c_contiguous
