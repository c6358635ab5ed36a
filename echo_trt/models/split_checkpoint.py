"""Merged matrices under the names of their parts, and heads of which only a part is rotated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from echo_trt.models.checkpoint import Checkpoint, Part
from echo_trt.models.config import DecoderConfig
from echo_trt.models.families.family import Family
from echo_trt.models.read_config import decoder_config


def parts_of(family: Family, network: DecoderConfig, name: str, rows: int) -> Iterator[tuple[str, slice]]:
    """Yield the usual names of what a tensor of ``rows`` rows holds, and the rows of each."""
    merged = next((each for each in family.merged if name.endswith(f".{each}.weight")), None)
    heads = {"q_proj": network.num_heads, "k_proj": network.num_kv_heads, "v_proj": network.num_kv_heads}
    begin, names = 0, family.merged[merged] if merged else (name,)
    for part in names:
        kind = part.rpartition(".")[2]
        end = begin + (heads[kind] * network.head_dim if merged and kind in heads else rows // len(names))
        yield name.replace(merged, part) if merged else name, slice(begin, end)
        begin = end


def halved(family: Family, raw: dict[str, Any], head_dim: int, name: str, rows: torch.Tensor) -> torch.Tensor:
    """Return rows of a query's or key's matrix with the numbers that are rotated together half a head apart.

    A head of whose D numbers the first r are rotated, i with i + r / 2, becomes one of two halves, each of r / 2
    that are rotated and (D - r) / 2 that are not.
    """
    turned = family.rotated(raw, head_dim)
    if turned == head_dim or not name.endswith(("q_proj.weight", "k_proj.weight")):
        return rows
    still = range(turned, head_dim)
    half = len(still) // 2
    order = [*range(turned // 2), *still[:half], *range(turned // 2, turned), *still[half:]]
    return rows.unflatten(0, (-1, head_dim))[:, order].flatten(0, 1)


class SplitCheckpoint:
    """Reads a checkpoint of a ``family`` that merges matrices."""

    def __init__(self, stored: Checkpoint, family: Family):
        self.path, self.config, self._stored, self._family = stored.path, stored.config, stored, family
        self._network = network = decoder_config(stored.config, str(stored.path))
        self._parts = {
            part: (name, rows)
            for name in stored.names()
            for part, rows in parts_of(family, network, name, stored.shape(name)[0])
        }

    def names(self) -> Sequence[str]:
        return list(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        stored, rows = self._parts[name]
        return rows.stop - rows.start, *self._stored.shape(stored)[1:]

    def dtype(self, name: str) -> torch.dtype:
        return self._stored.dtype(self._parts[name][0])

    def get(self, name: str, part: Part = ()) -> torch.Tensor:
        stored, rows = self._parts[name]
        tensor = self._stored.get(stored, (rows,))
        return halved(self._family, self.config, self._network.head_dim, name, tensor)[part]
