"""The reference engine: a role in PyTorch, with the operator in plain operators. Slow, but the measure of others."""

from __future__ import annotations

import numpy as np
import torch

from echo_trt.decoding.pack import BLOCK, Packed
from echo_trt.models.roles import Role
from super_tree_attention import super_tree_attention


class TorchEngine:
    """A network in eager PyTorch and a KV pool of ``num_blocks`` blocks."""

    def __init__(self, role: Role, num_blocks: int):
        self.num_blocks = num_blocks
        config = role.network.config
        self._role = role
        dtype = next(role.parameters()).dtype
        self._pool = torch.zeros(
            2 * role.num_layers, num_blocks, config.num_kv_heads, BLOCK, config.head_dim, dtype=dtype
        )

    @torch.inference_mode()
    def run(self, call: Packed, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        arrays = {"token_ids": call.token_ids, "positions": call.positions, **inputs}
        named = {name: torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in self._role.inputs}
        metadata = [
            torch.from_numpy(a)
            for a in (
                call.past_lens,
                call.seq_begins,
                call.block_indices,
                call.block_begins,
                call.tree_mask,
                call.tree_mask_begins,
            )
        ]

        def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return super_tree_attention(query, key, value, self._pool[2 * layer], self._pool[2 * layer + 1], *metadata)

        outputs = self._role(named, torch.from_numpy(call.logit_rows), attend)
        return {name: o.numpy() for name, o in zip(self._role.outputs, outputs, strict=True)}

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        old, new = torch.from_numpy(source), torch.from_numpy(target)
        self._pool[:, new // BLOCK, :, new % BLOCK] = self._pool[:, old // BLOCK, :, old % BLOCK]
