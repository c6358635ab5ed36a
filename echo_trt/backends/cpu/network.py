"""The program of a network: its products and the steps between them, as one list that a pool of threads runs.

This is a decoder's, target's or draft's; ``heads`` has those of draft heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from echo_trt.backends.cpu import attention, operators
from echo_trt.backends.cpu.delta_net import DeltaNets, gate_heads
from echo_trt.backends.cpu.experts import Mixtures
from echo_trt.backends.cpu.network_file import NetworkFile
from echo_trt.backends.cpu.products import Product, products
from echo_trt.backends.cpu.program import Argument, Op, Pool, Program
from echo_trt.backends.cpu.short_conv import ShortConvs
from echo_trt.speculation.pack import BLOCK

Recurrent = DeltaNets | ShortConvs | None
KINDS = {"": 0, "f32": 1, "bf16": 2, "f16": 3}  # of weights, for look-ups


class KVArrays:
    """Keys and values, whose memory is taken as they are written: what all layers have of a block stands together.

    keys    bf16 in uint16, or float32 [blocks, layers, KV heads, D / P, BLOCK, P]; of bf16 P is 2: two numbers that are
            multiplied at once stand beside each other, of float32 1
    values  likewise [blocks, layers, KV heads, BLOCK / P, D, P]
    jump    bytes from a block to the next one, of either
    """

    def __init__(self, layers: int, blocks: int, heads: int, dim: int, wide: bool):
        kind, pair = (np.float32, 1) if wide else (np.uint16, 2)
        self.keys = np.zeros((blocks, layers, heads, dim // pair, BLOCK, pair), kind)
        self.values = np.zeros((blocks, layers, heads, BLOCK // pair, dim, pair), kind)
        self.jump, self.wide = self.keys.strides[0], wide

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copy rows of all layers; all sources are read before a target is written."""
        old, new = (source // BLOCK, source % BLOCK), (target // BLOCK, target % BLOCK)
        self.keys[new[0], :, :, :, new[1]] = self.keys[old[0], :, :, :, old[1]]
        pair = self.values.shape[-1]
        from_, to = (old[0], old[1] // pair, old[1] % pair), (new[0], new[1] // pair, new[1] % pair)
        self.values[to[0], :, :, to[1], :, to[2]] = self.values[from_[0], :, :, from_[1], :, from_[2]]


class Network:
    """A network of a file, prepared for passes of up to ``capacity`` tokens.

    cells       int64 [16], what a pass sets: see ``attention``
    inputs      arrays that it fills, by name; tokens, positions and logit_rows are int64, a head's features and hidden
                states float32
    outputs     arrays that it leaves, by name
    recurrent   the layers of a network that keep states
    """

    def __init__(self, file: NetworkFile, kv: KVArrays, pool: Pool, capacity: int, recurrent: Recurrent = None):
        self._file, self._kv, self._pool, self.capacity = file, kv, pool, capacity
        self._config: dict[str, Any] = file.header["config"]
        self.cells = np.zeros(16, np.int64)
        cells = [self.cells[i : i + 1] for i in range(len(self.cells))]
        self._rows, self._wanted = cells[attention.TOKENS], cells[attention.LOGIT_ROWS]
        self._given = cells[attention.FEATURE_ROWS]
        self.recurrent = recurrent
        integers = {name: np.zeros(capacity, np.int64) for name in ("token_ids", "positions", "logit_rows")}
        self.inputs: dict[str, np.ndarray] = dict(integers)
        self.pool_rows = np.zeros(capacity, np.int64)
        self.outputs: dict[str, np.ndarray] = {}
        self._ops: list[Op] = []
        self._build()
        self.program = Program(self._ops)

    def run(self) -> None:
        self._pool.run(self.program)

    def _build(self) -> None:
        config, role, setting = self._config, self._file.header["role"], self._file.header["setting"]
        hidden = config["hidden_size"]
        self._width = width = padded(hidden)
        self._dim = 2 * padded(config["head_dim"] // 2, 16)
        self._heads, self._kv_heads = config["num_heads"], config["num_kv_heads"]
        self._gated = padded(config["intermediate_size"])
        self._gates = self._heads * self._dim if self._file.header.get("gated") else 0  # before a row's queries
        everything = self._gates + (self._heads + 2 * self._kv_heads) * self._dim
        self._x = self._buffer(width)
        self._normed = self._buffer(width if role in ("target", "draft") else 2 * width)
        self._projected = self._buffer(everything)
        self._attended = self._buffer(self._heads * self._dim)
        self._both, self._active = self._buffer(2 * self._gated), self._buffer(self._gated)
        self._delta = self._buffer(width) if config["post_norms"] else None
        self._scratch_bytes = padded(attention.scratch_bytes(self._heads // self._kv_heads, self._dim), 128)
        self._scratch = np.zeros((self._pool.threads, self._scratch_bytes), np.uint8)
        self._compute()
        if role != "target":
            self._candidates(setting)

    def _compute(self) -> None:
        """Add the network's own steps, which leave ``logits``."""
        header = self._file.header
        self._decoder(header["setting"] if header["role"] == "target" else [])

    def _buffer(self, width: int, kind: Any = np.float32) -> np.ndarray:
        return np.zeros((self.capacity, width), kind)

    def _add(self, operator: Any, *args: Argument, keeps: Sequence[Any] = ()) -> None:
        self._ops.append(Op.of(operator, *args, keeps=keeps))

    def _array(self, name: str) -> np.ndarray | None:
        return self._file.array(name) if name in self._file.header["arrays"] else None

    def _multiply(self, x: np.ndarray, *wanted: tuple[str, np.ndarray], plus: Any = None, rows: Any = None) -> None:
        """Multiply ``x`` by matrices of the file."""
        requested = []
        for name, out in wanted:
            weights, bias = self._file.matrix(f"{name}.weight"), self._array(f"{name}.bias")
            requested.append(Product(weights, out, bias if plus is None else plus))
        self._ops += products(x, self._rows if rows is None else rows, requested)

    def _norm(
        self, weight: str | None, out: np.ndarray, delta: np.ndarray | None = None, post: str = "", **more: Any
    ) -> None:
        """Add ``delta`` to the residual, normed itself with a weight ``post``, and write the sum's norm to ``out``.

        x      the residual; ``index`` int64: the rows of it that are normed, as many as ``rows`` holds
        kept   where a copy of the sum goes
        """
        x, index, kept = more.get("x", self._x), more.get("index"), more.get("kept")
        rows = self._rows if index is None else self._wanted
        strides = out.strides[0], 0 if kept is None else kept.strides[0]
        self._add(
            operators.add_norm, more.get("rows", rows), x, delta, self._array(post), self._array(f"{weight}.weight"),
            out, strides[0], more.get("size", self._width), more.get("true_size", self._config["hidden_size"]),
            float(self._config["norm_eps"]), kept, strides[1], index, x.strides[0],
        )  # fmt: skip

    def _embed(self, out: np.ndarray, scale: float = 1.0) -> None:
        table = self._file.matrix("embed.weight")
        kind = table.format
        self._add(
            operators.embed, self._rows, self.inputs["token_ids"], table.quants, table.scales, out, table.columns,
            scale, table.lanes, kind.bits, kind.offset, int(kind.minimum), kind.integers, KINDS[kind.kind],
            keeps=(table,),
        )  # fmt: skip

    def _attend(self, layer: int, prefix: str, x: np.ndarray | None = None) -> None:
        """Project to queries, keys and values, and attend; ``x``: by default what was normed."""
        config, dim, kv = self._config, self._dim, self._kv
        ends = np.cumsum([0, self._heads * dim + self._gates, self._kv_heads * dim, self._kv_heads * dim])
        # A matrix whose heads are not padded in the file fills them whole.
        parts = [self._projected[:, begin:end] for begin, end in pairwise(ends)]
        names = [f"{prefix}.{name}" for name in ("query", "key", "value")]
        self._multiply(self._normed if x is None else x, *zip(names, parts, strict=True))
        window = self._file.header["windows"][layer]
        local = "local" if window and config["local_rope_theta"] else "rotary"
        rotated = layer not in config["unrotated_layers"]
        wide, head = int(kv.wide), config["head_dim"]
        projected, stride = self._projected[:, self._gates :], self._projected.strides[0]
        self._add(
            operators.keep, self._rows, projected, self.inputs["positions"],
            self._array(f"{local}.cos") if rotated else None, self._array(f"{local}.sin") if rotated else None,
            self._array(f"{prefix}.query_norm.weight"), self._array(f"{prefix}.key_norm.weight"),
            float(config["norm_eps"]), self._heads, self._kv_heads, dim, head, self.pool_rows,
            kv.keys[:, layer], kv.values[:, layer], wide, stride, kv.jump,
        )  # fmt: skip
        self._add(
            attention.attend, self.cells, projected, self._attended, kv.keys[:, layer], kv.values[:, layer],
            self._scratch, self._heads, self._kv_heads, dim, float(head**-0.5), window, attention.kind_of(kv.wide),
            self._scratch_bytes, stride, kv.jump,
        )  # fmt: skip
        if self._gates:
            heads, size = self._attended, self._attended.strides[0]
            self._add(gate_heads, self._rows, heads, size, self._projected, stride, None, 0.0, self._heads, dim)

    def _mlp(self, name: str, x: np.ndarray, out: np.ndarray, rows: Any = None, plus: Any = None) -> None:
        size, rows = self._config["intermediate_size"], self._rows if rows is None else rows
        gate, up = self._both[:, :size], self._both[:, self._gated : self._gated + size]
        self._multiply(x, (f"{name}.gate", gate), (f"{name}.up", up), rows=rows)
        self._add(operators.activate, rows, self._both, self._active, self._gated, int(self._config["gelu"]))
        self._multiply(self._active, (f"{name}.down", out), rows=rows, plus=plus)

    def _decoder(self, feature_layers: Sequence[int]) -> None:
        config, hidden = self._config, self._config["hidden_size"]
        x, delta, post = self._x[:, :hidden], self._delta, config["post_norms"]
        into = {"plus": x} if delta is None else {}
        out = x if delta is None else delta[:, :hidden]
        kept = np.zeros((self.capacity, len(feature_layers), self._width), np.float32)
        experts: Mixtures | None = None
        layers_of_states, attended = list(config.get("recurrent_layers", ())), 0
        self._embed(self._x, float(config["embedding_scale"]))
        for layer in range(config["num_layers"]):
            name = f"layers.{layer}"
            before = delta if layer else None
            into_features = kept[:, list(feature_layers).index(layer)] if layer in feature_layers else None
            after = f"layers.{layer - 1}.mlp_post_norm.weight" if post else ""
            self._norm(f"{name}.attention_norm", self._normed, before, after, kept=into_features)
            if layer in layers_of_states:
                mixers: Any = self.recurrent
                index = layers_of_states.index(layer)
                self._ops += mixers.mix(self._file, self._rows, index, f"{name}.attention", self._normed, out)
            else:
                self._attend(attended, f"{name}.attention")
                self._multiply(self._attended, (f"{name}.attention.out", out), **into)
                attended += 1
            after = f"{name}.attention_post_norm.weight" if post else ""
            self._norm(f"{name}.mlp_norm", self._normed, delta, after)
            if f"{name}.mlp.router.weight" in self._file.header["matrices"]:
                experts = experts or Mixtures(config, self._rows, self.capacity)
                self._ops += experts.mix(self._file, f"{name}.mlp", self._normed, out, **into)
            else:
                self._mlp(f"{name}.mlp", self._normed, out, **into)
        after = f"{name}.mlp_post_norm.weight" if post else ""
        if config["num_layers"] in feature_layers:  # of an MTP head: the last hidden states, behind the norm
            self._norm("norm", kept[:, list(feature_layers).index(config["num_layers"])])
        self._norm("norm", self._normed, delta, after, index=self.inputs["logit_rows"])
        self._logits("lm_head" if "lm_head.weight" in self._file.header["matrices"] else "embed", self._normed)
        if feature_layers:
            self.outputs |= {"features": kept, "hidden": self._normed[:, :hidden]}

    def _logits(self, name: str, rows: np.ndarray) -> None:
        vocab = self._file.matrix(f"{name}.weight").rows
        logits = self._buffer(padded(vocab))
        self._multiply(rows, (name, logits[:, :vocab]), rows=self._wanted)
        self.outputs["logits"] = logits[:, :vocab]

    def _candidates(self, count: int) -> None:
        """Leave a draft's best next tokens instead of logits."""
        logits = self.outputs.pop("logits")
        found = self._buffer(2 * count)
        stride, vocab = logits.strides[0], logits.shape[1]
        self._add(operators.candidates, self._wanted, logits, stride, vocab, count, found)
        self.outputs |= {"scores": found[:, :count], "candidates": found[:, count:]}


def padded(size: int, unit: int = 32) -> int:
    return -(-size // unit) * unit
