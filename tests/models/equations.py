"""The published equations of a layer, over one request and in numpy, with nothing merged, packed or cached."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor


class Equations:
    """Retells a network of the shape ``config`` with ``tensors``; ``embed``: the table of a target, if it has none."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, Tensor], embed: Tensor):
        self.c, self.t = config, {name: tensor.double().numpy() for name, tensor in tensors.items()}
        self.embed = self.t.get("embed_tokens.weight", embed.detach().double().numpy())

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + self.c["rms_norm_eps"]) * self.t[name + ".weight"]

    def heads(self, x: np.ndarray, layer: str, name: str, positions: np.ndarray | None) -> np.ndarray:
        """Project x [T, W] to heads [H, T, D]; with positions they are normed, where there is a norm, and turned."""
        size = self.c["head_dim"]
        y = (x @ self.t[f"{layer}self_attn.{name}_proj.weight"].T).reshape(len(x), -1, size)
        if positions is None:
            return y.transpose(1, 0, 2)
        if f"{layer}self_attn.{name}_norm.weight" in self.t:
            y = self.norm(y, f"{layer}self_attn.{name}_norm")
        half = size // 2
        angle = positions[:, None] * self.c["rope_theta"] ** (-np.arange(half) / half)
        turned = (y[..., :half] + 1j * y[..., half:]) * np.exp(1j * angle)[:, None]
        return np.concatenate((turned.real, turned.imag), axis=-1).transpose(1, 0, 2)

    def attention(self, x, seen, layer, positions, seen_positions, mask) -> np.ndarray:
        """Attend from x [T, W] to seen [S, W], where mask [T, S] allows."""
        q = self.heads(x, layer, "q", positions)
        k, v = self.heads(seen, layer, "k", seen_positions), self.heads(seen, layer, "v", None)
        outputs = []
        for head in range(len(q)):
            group = head * len(k) // len(q)
            score = np.where(mask, q[head] @ k[group].T / np.sqrt(self.c["head_dim"]), -np.inf)
            weight = np.exp(score - score.max(axis=1, keepdims=True))
            outputs.append(weight / weight.sum(axis=1, keepdims=True) @ v[group])
        return np.concatenate(outputs, axis=-1) @ self.t[layer + "self_attn.o_proj.weight"].T

    def mlp(self, x: np.ndarray, layer: str) -> np.ndarray:
        y = self.norm(x, layer + "post_attention_layernorm")
        gate, up = (y @ self.t[f"{layer}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        return (gate / (1 + np.exp(-gate)) * up) @ self.t[layer + "mlp.down_proj.weight"].T
