"""The CPU engine: a network's program, its KV pool, and what a pass plans for attention."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from echo_trt.backends.cpu import attention
from echo_trt.backends.cpu.delta_net import DeltaNets
from echo_trt.backends.cpu.heads import network_of
from echo_trt.backends.cpu.network import KVArrays
from echo_trt.backends.cpu.network_file import NetworkFile
from echo_trt.backends.cpu.products import instruction_set
from echo_trt.backends.cpu.program import Pool
from echo_trt.backends.cpu.short_conv import ShortConvs
from echo_trt.backends.states import KeepsStates
from echo_trt.errors import UserError
from echo_trt.speculation.pack import ForwardBatch

#: The threads that all networks of this process share, one pass at a time.
_pool = cache(Pool)
SLOTS = 32  # of requests' states, where nobody says how many run at once
CAPACITY = 512  # tokens of a pass that a network is prepared for at first. Larger: more address space


class CPUEngine(KeepsStates):
    """A network and a KV pool of ``num_blocks`` blocks, whose memory is taken as it fills. Passes are not padded.

    threads  0: as many as ``_threads`` says
    layers   of the network that are computed, of a check; 0: all
    slots    of requests' states, where the network has any
    """

    sizes = ()

    def __init__(
        self, path: Path, precision: str, num_blocks: int, threads: int = 0, layers: int = 0, slots: int = SLOTS
    ):
        self.num_blocks = num_blocks
        self._file = file = NetworkFile(path)
        lanes = next(iter(file.header["matrices"].values()))[3]
        if lanes != instruction_set().lanes:
            have = "with AVX-512" if lanes > instruction_set().lanes else "without AVX-512"
            raise UserError(
                f"{path} was built for CPUs {have}, and this is none; build the bundle again on this machine."
            )
        config = file.header["config"]
        if layers and file.header["role"] in ("target", "draft"):
            kept = [each for each in config.get("recurrent_layers", ()) if each < layers]
            config |= {"num_layers": layers} | ({"recurrent_layers": kept} if "recurrent_layers" in config else {})
            file.header["windows"] = file.header["windows"][: layers - len(kept)]
        self._target = file.header["role"] == "target"
        self._hidden: int = config["hidden_size"]
        self._ids = file.array("target_ids") if "target_ids" in file.names() else None
        dim = 2 * -(-config["head_dim"] // 32) * 16
        layers = len(file.header["windows"])
        self._kv = KVArrays(layers, num_blocks, config["num_kv_heads"], dim, precision == "fp32")
        self._pool = _pool(threads or _threads())
        self._open_states(file.header.get("states", {}), slots, applied=1)
        self._prepare(CAPACITY)

    def _prepare(self, capacity: int) -> None:
        header, recurrent = self._file.header, None
        if self.states:
            layers = DeltaNets if self.states.delta.size else ShortConvs
            recurrent = layers(header, self.states, capacity, self._pool)
        kind = network_of(header["role"], header["config"].get("anchored", False))
        self._network = network = kind(self._file, self._kv, self._pool, capacity, recurrent)
        self._arrays = {"limits": np.zeros(capacity, np.int64), "path_begins": np.zeros(capacity, np.int64)}
        self._reserve(jobs=capacity * attention.JOB_WORDS, costs=capacity + 1, table=capacity, paths=capacity)
        hidden, outputs = self._hidden, network.outputs
        first = "logits" if self._target else "candidates"
        self.widths = {first: outputs[first].shape[1]}
        if "features" in outputs:
            self.widths["features"] = outputs["features"].shape[1] * hidden
        if "features" in network.inputs:
            theirs = self._file.header["config"].get("target_hidden_size", hidden)
            self.widths |= {"features": network.inputs["features"].shape[1] * theirs}
            self.widths |= {"hidden": hidden} if "hidden" in network.inputs else {}

    def _reserve(self, **sizes: int) -> None:
        """Let the arrays of a pass's plan have at least these many numbers."""
        for name, size in sizes.items():
            if name not in self._arrays or len(self._arrays[name]) < size:
                self._arrays[name] = np.zeros(2 * size, np.int64)

    def run(self, call: ForwardBatch, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        tokens, rows = len(call.token_ids), len(call.logit_rows)
        if tokens > self._network.capacity:
            self._prepare(1 << (tokens - 1).bit_length())
        network = self._network
        for name in ("token_ids", "positions", "logit_rows"):
            values = getattr(call, name)
            network.inputs[name][: len(values)] = values
        given = self._feed(inputs, tokens, rows) if "features" in network.inputs else 0
        jobs = self._plan(call)
        if network.recurrent:
            network.recurrent.plan(call)
        network.cells[: attention.JOBS] = tokens, rows, jobs
        network.cells[attention.FEATURE_ROWS] = given
        network.run()
        return self._read(tokens, rows)

    def _feed(self, inputs: dict[str, np.ndarray], tokens: int, rows: int) -> int:
        """Put in a head's features, and behind their rows the states that it goes on from; returns their number.

        A block drafter's packed rows say which states they are: first the block's ``rows``, then those of features.
        """
        into, features = self._network.inputs, inputs["features"]
        parts = into["features"].shape[1]
        given, theirs = len(features), features.shape[1] // parts
        into["features"][:given, :, :theirs] = features.reshape(given, parts, theirs)
        if "hidden" in into:
            into["hidden"][given:tokens] = inputs["hidden"]
        else:
            states = inputs["state_rows"]
            into["state_rows"][:tokens] = np.where(states < rows, self._network.capacity + states, states - rows)
        return given

    def _plan(self, call: ForwardBatch) -> int:
        arrays, cells = self._arrays, self._network.cells
        count = len(call.past_lens) + len(call.token_ids)
        self._reserve(jobs=count * attention.JOB_WORDS, costs=count + 1)
        self._reserve(table=len(call.block_indices), paths=len(call.tree_mask))
        names = ("limits", "jobs", "costs", "table", "paths", "path_begins")
        jobs: int = attention.plan_pass(
            call.past_lens, call.seq_begins, call.block_indices, call.block_begins, call.tree_mask,
            call.tree_mask_begins, self._network.pool_rows, *(arrays[name] for name in names),
        )  # fmt: skip
        in_order = ("jobs", "costs", "limits", "table", "paths", "path_begins")
        cells[attention.JOBS : attention.PATH_BEGINS + 1] = [arrays[name].ctypes.data for name in in_order]
        return jobs

    def _read(self, tokens: int, rows: int) -> dict[str, np.ndarray]:
        outputs = self._network.outputs
        if self._target:
            read = {"logits": outputs["logits"][:rows]}
            if "features" in outputs:
                features = outputs["features"][:tokens, :, : self._hidden]
                read |= {"features": features.reshape(tokens, -1), "hidden": outputs["hidden"][:rows]}
            return read
        found = outputs["candidates"][:rows].astype(np.int64)
        read = {"scores": outputs["scores"][:rows], "candidates": found if self._ids is None else self._ids[found]}
        if "state" in outputs:
            read["state"] = outputs["state"][:tokens]
        if "confidence" in outputs:
            read["confidence"] = outputs["confidence"][:rows]
        return read

    def commit(self, rows: np.ndarray, counts: np.ndarray) -> None:
        if self._network.recurrent:
            self._network.recurrent.commit(rows, counts)

    def kv_block(self, index: int) -> Sequence[np.ndarray]:
        return self._kv.keys[index], self._kv.values[index]

    def compact_kv(self, source: np.ndarray, target: np.ndarray) -> None:
        self._kv.move(source, target)


def _threads() -> int:
    """Return OMP_NUM_THREADS, by which a share of a machine's cores is set, or the cores that this process may use."""
    requested: Any = os.environ.get("OMP_NUM_THREADS", "")
    return int(requested) if requested.isdecimal() and int(requested) else len(os.sched_getaffinity(0))
