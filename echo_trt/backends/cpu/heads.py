"""The programs of draft heads, which read a target's hidden states: see ``models.eagle3``, ``mtp`` and ``block``."""

from __future__ import annotations

import numpy as np

from echo_trt.backends.cpu.network import Network, padded


class _Head(Network):
    """What draft heads share."""

    def _features(self, parts: int) -> np.ndarray:
        """Take ``parts`` of the target's hidden states for each of a pass's first tokens."""
        wide = padded(self._config["target_hidden_size"])
        self.inputs["features"] = np.zeros((self.capacity, parts, wide), np.float32)
        return self.inputs["features"]

    def _layer(self, index: int, name: str) -> None:
        """Compute a decoder's layer on the residual."""
        first, x = self._normed[:, : self._width], self._x[:, : self._config["hidden_size"]]
        self._norm(f"{name}.attention_norm", first)
        self._attend(index, f"{name}.attention", first)
        self._multiply(self._attended, (f"{name}.attention.out", x), plus=x)
        self._norm(f"{name}.mlp_norm", first)
        self._mlp(f"{name}.mlp", first, x, plus=x)


class Eagle3Network(_Head):
    """An EAGLE-3 head; its residual, which begins as features, becomes ``state``."""

    def _compute(self) -> None:
        config, hidden = self._config, self._config["hidden_size"]
        self._combine(self._x[:, :hidden])
        self.inputs["hidden"] = self.outputs["state"] = self._x[:, :hidden]  # behind the rows that features give
        self._advance()
        if config["norm_output"]:
            self._norm("norm", self._x)
        last = None if config["norm_output"] else "norm"
        self._norm(last, self._normed[:, : self._width], index=self.inputs["logit_rows"])
        self._logits("lm_head", self._normed[:, : self._width])

    def _combine(self, out: np.ndarray) -> None:
        features, theirs = self._features(3), self._config["target_hidden_size"]
        for i in range(3 if self._config["fc_norm"] else 0):
            part = features[:, i]
            self._norm(f"fc_norms.{i}", part, x=part, rows=self._given, size=part.shape[1], true_size=theirs)
        self._multiply(features.reshape(self.capacity, -1), ("fc", out), rows=self._given)

    def _advance(self) -> None:
        config, width, hidden = self._config, self._width, self._config["hidden_size"]
        embedded, first, out = self._buffer(width), self._normed[:, :width], self._x[:, :hidden]
        self._embed(embedded)
        self._norm("embed_norm", first, x=embedded)
        self._norm("hidden_norm", self._normed[:, width:])
        self._attend(0, "attention")
        residual = self._normed[:, width : width + hidden] if config["norm_before_residual"] else out
        self._multiply(self._attended, ("attention.out", out), plus=residual)
        self._norm("mlp_norm", first)
        self._mlp("mlp", first, out, plus=out)


class MtpNetwork(_Head):
    """An MTP head: an embedding and the hidden state before it, a layer, and a norm."""

    def _compute(self) -> None:
        width, hidden = self._width, self._config["hidden_size"]
        given, embedded, first = self._buffer(width), self._buffer(width), self._normed[:, :width]
        x = self._x[:, :hidden]
        self.inputs |= {"features": given[:, None], "hidden": given[:, :hidden]}
        self.outputs["state"] = x
        self._embed(embedded)
        self._norm("embed_norm", first, x=embedded)
        self._norm("hidden_norm", self._normed[:, width:], x=given)
        self._multiply(self._normed, ("fc", x))
        self._layer(0, "layer")
        self._norm("norm", self._x)
        self._norm(None, first, index=self.inputs["logit_rows"])
        self._logits("lm_head" if "lm_head.weight" in self._file.header["matrices"] else "embed", first)


class _Block(_Head):
    """A block drafter's: packed rows, ``state_rows``, have states of the context or of the block's rows behind these.

    states  float32 [2 * capacity, W]: the context's, and from ``capacity`` on the block's
    """

    def _take_states(self) -> np.ndarray:
        self.inputs["state_rows"] = np.zeros(self.capacity, np.int64)
        self._states = np.zeros((2 * self.capacity, self._width), np.float32)
        return self._states[self.capacity :]

    def _spread(self, out: np.ndarray) -> None:
        """Put packed rows' states where they are read."""
        self._norm(None, out, x=self._states, index=self.inputs["state_rows"], rows=self._rows)


class DFlashNetwork(_Block):
    """DFlash and DSpark: each layer's queries are the block's, its keys and values of the context, too."""

    def _compute(self) -> None:
        config, width, hidden = self._config, self._width, self._config["hidden_size"]
        block, combined, embedded = self._take_states(), self._buffer(width), self._buffer(width)
        context, features = self._states[: self.capacity], self._features(len(config["feature_layers"]))
        self._multiply(features.reshape(self.capacity, -1), ("fc", combined[:, :hidden]), rows=self._given)
        self._norm("hidden_norm", context, x=combined, rows=self._given)
        self._embed(embedded)
        logit_rows, wanted, x = self.inputs["logit_rows"], self._wanted, self._x[:, :hidden]
        packed, first = self._normed[:, :width], self._normed[:, width:]
        looked = self._buffer(self._attended.shape[1])
        for layer in range(config["num_layers"]):
            name = f"layers.{layer}"
            if layer:
                self._norm(f"{name}.attention_norm", block, rows=wanted)
            else:
                self._norm(f"{name}.attention_norm", block, x=embedded, index=logit_rows, kept=self._x)
            self._spread(packed)
            self._attend(layer, f"{name}.attention", packed)
            self._norm(None, looked, x=self._attended, index=logit_rows, size=looked.shape[1])
            self._multiply(looked, (f"{name}.attention.out", x), plus=x, rows=wanted)
            self._norm(f"{name}.mlp_norm", first, rows=wanted)
            self._mlp(f"{name}.mlp", first, x, rows=wanted, plus=x)
        self._norm("norm", first, rows=wanted)
        if config["confidence"]:
            self.outputs["confidence"] = confidence = self._buffer(padded(1))[:, :1]
            self._multiply(first, ("confidence", confidence), rows=wanted)
        self._logits("lm_head", first)


class ParallelEagleNetwork(_Block, Eagle3Network):
    """P-EAGLE: an EAGLE-3 head whose block's rows have one learnt state."""

    def _compute(self) -> None:
        self._take_states()[:] = self._file.array("mask_state")
        self._combine(self._states[: self.capacity, : self._config["hidden_size"]])
        self._spread(self._x)
        self._advance()
        for layer in range(1, self._config["num_layers"]):
            self._layer(layer, f"layers.{layer - 1}")
        first = self._normed[:, : self._width]
        self._norm("norm", first, index=self.inputs["logit_rows"])
        self._logits("lm_head", first)


HEADS = {"head": Eagle3Network, "mtp": MtpNetwork}


def network_of(role: str, anchored: bool) -> type[Network]:
    """Return the class of a role's network; ``anchored``: whether a block drafter is P-EAGLE."""
    if role == "block":
        return ParallelEagleNetwork if anchored else DFlashNetwork
    return HEADS.get(role, Network)
