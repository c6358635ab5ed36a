"""The record of a drafter of your own: draft.kind mlp, two matrices over the target's last hidden state.

    pip install ./examples/mlp_drafter
    echo-trt build recipe.yaml      # with draft: {kind: mlp, source: {path: my-drafter}}

The entry point in pyproject.toml names KIND. docs/internals/drafts.md tells what a record and a network must have. This
module is imported wherever a bundle is opened, so it imports PyTorch only where it loads a network.
"""

from __future__ import annotations

from dataclasses import dataclass

from echo_trt.engine.drafters.kind import DraftSource, HeadKind
from echo_trt.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config:
    """What the package reads of a draft network's configuration; without attention there are no KV heads."""

    vocab_size: int
    hidden_size: int
    feature_size: int  # numbers of the target's features that a pass reads of one token
    num_kv_heads: int = 0
    head_dim: int = 0


class MlpKind(HeadKind):
    """A checkpoint is a config.json with the target's ``hidden_size`` and ``vocab_size``, and ``Network``'s tensors."""

    name, features, sourced = "mlp", 1, True

    def knows(self, raw):
        return raw.get("architectures") == ["MlpDrafter"]

    def config(self, raw, where, recipe, target):
        sizes = {name: raw.get(name) for name in ("hidden_size", "vocab_size")}
        for name, size in sizes.items():
            if size != getattr(target, name):
                raise UserError(f"{where}: {name} is {size}, and the target's {getattr(target, name)}; train another.")
        return Config(**sizes, feature_size=target.hidden_size)

    def load(self, source: DraftSource):
        from mlp_network import MlpRole, Network

        checkpoint, target = source.checkpoint, source.target.config
        network = Network(self.config(checkpoint.config, str(checkpoint.path), source.recipe, target))
        weights = {name: checkpoint.get(name).to(source.dtype) for name in network.state_dict()}
        network.load_state_dict(weights, assign=True)
        return MlpRole(network.eval(), source.recipe.draft.top_k), (target.num_layers,)

    def sizes(self, config):
        from echo_trt.sizing.networks import Sizes

        width, vocabulary = config.hidden_size, config.vocab_size
        return Sizes(
            embedding=vocabulary * width,
            output=vocabulary * width,
            mlp=3 * width * width,
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=width,
            feature_size=width,
            attention=0, kv_matrices=0, norms=0, num_heads=0, num_kv_heads=0, head_dim=0, num_layers=0,
        )  # fmt: skip

    def role(self):
        from mlp_network import MlpRole, Network

        return MlpRole, Config, lambda config, positions: Network(config)


KIND = MlpKind()
