"""What the package knows of a drafter: one record, found by the entry points ``echo_trt.drafts``.

A record costs no import of PyTorch: its methods import what they need when they are called.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from echo_trt.bundle.manifest import CONFIDENCE, BlockFacts, Manifest
from echo_trt.bundle.recipe import Recipe
from echo_trt.errors import UserError
from echo_trt.files.extras import DRAFTS, extra, registered
from echo_trt.speculation.policies import reserve_for

if TYPE_CHECKING:
    from echo_trt.backends.base import Engine
    from echo_trt.engine.batch import InputBatch
    from echo_trt.engine.drafters.eagle3 import Drafter
    from echo_trt.models.checkpoint import Checkpoint
    from echo_trt.models.config import DecoderConfig
    from echo_trt.models.decoder import Decoder
    from echo_trt.models.layers import Config
    from echo_trt.models.roles import Role, RoleMaker

HEAD_VOCABULARY = 32000  # of published EAGLE-3 heads for vocabularies of 150,000


@dataclass(frozen=True)
class DraftSource:
    """What a draft's network is loaded from.

    checkpoint  the draft's own, or the target's where that has the draft in it
    folder      that the recipe's paths are relative to
    work        folder of the bundle that is built
    dtype       of the weights, and ``positions``, as ``models.weights.load_decoder`` takes them
    digest      SHA-256 of the target's weights
    """

    recipe: Recipe
    folder: Path
    work: Path
    checkpoint: Checkpoint
    dtype: Any
    positions: int
    target: Decoder
    digest: str
    tokenizer: Any


class DraftKind:
    """A drafter's record; this one says that there is no draft.

    network   whether it has a network
    sourced   whether that has a checkpoint of its own
    copies    whether it copies from the text
    features  hidden states of the target that a pass reads of one token; 0: as many as the checkpoint says; None: none
    hidden    whether a drafted token's pass reads its parent's output
    levels    whether a GPU drafts several levels of it at once
    block     whether one pass drafts all levels, as ``bundle.manifest.BlockFacts`` state
    """

    name = "none"
    network = sourced = copies = hidden = levels = block = False
    features: int | None = None

    def knows(self, raw: dict[str, Any]) -> bool:
        """Return whether a config.json is of a checkpoint of this kind."""
        return False

    def shaped(self, raw: dict[str, Any]) -> dict[str, Any]:
        """Return the config.json of a draft without weights: the checkpoint's, or one made of the target's."""
        return raw

    def config(self, raw: dict[str, Any], where: str, recipe: Recipe, target: DecoderConfig) -> Config:
        """Read the network's configuration. ``where`` names it in errors."""
        raise NotImplementedError

    def check(self, checkpoint: Checkpoint, recipe: Recipe, target: DecoderConfig) -> None:
        """Refuse a checkpoint before any weights are read."""

    def load(self, source: DraftSource) -> tuple[Role, tuple[int, ...]]:
        """Load the network; returns its role, and the target's layers whose inputs it reads."""
        raise NotImplementedError

    def role(self) -> RoleMaker:
        """Return what makes the role again, where ``load`` returns one of its own, which has the drafter's ``name``."""
        raise NotImplementedError

    def sizes(self, config: Any) -> Any:
        """Count a network (``sizing.networks.Sizes``) that ``draft_sizes`` there does not know; None: it does."""

    def block_facts(self, config: Any) -> BlockFacts | None:
        """State how a pass looks, for a runtime without PyTorch."""
        return None

    def drafter(self, manifest: Manifest, batch: InputBatch, engine: Engine, folder: Path) -> Drafter:
        """Make the drafter whose network ``engine`` runs, of the bundle in ``folder``."""
        raise NotImplementedError


class LookupKind(DraftKind):
    name = "lookup"
    copies = True


class HeadKind(DraftKind):
    """A head beside the target's features, which goes on from its own output."""

    network = hidden = True

    def drafter(self, manifest: Manifest, batch: InputBatch, engine: Engine, folder: Path) -> Drafter:
        from echo_trt.engine.drafters.eagle3 import Eagle3Drafter
        from echo_trt.engine.drafters.levels import LevelsDrafter

        kind = LevelsDrafter if engine.drafts_levels else Eagle3Drafter
        facts: Any = manifest.draft
        return kind(engine, batch, manifest.recipe.limits.prefill_chunk, facts.feature_size, facts.hidden_size)


class Eagle3Kind(HeadKind):
    name, features = "eagle3", 3
    sourced = levels = True

    def knows(self, raw: dict[str, Any]) -> bool:
        from echo_trt.models.block_config import is_block
        from echo_trt.models.read_config import is_eagle3

        return is_eagle3(raw) and not is_block(raw)

    def shaped(self, raw: dict[str, Any]) -> dict[str, Any]:
        """Make a head's of its target's: a layer of the same widths."""
        if self.knows(raw):
            return raw
        vocabulary = min(HEAD_VOCABULARY, raw["vocab_size"])
        head = {"architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1, "draft_vocab_size": vocabulary}
        return {**raw, **head}

    def config(self, raw: dict[str, Any], where: str, recipe: Recipe, target: DecoderConfig) -> Config:
        from echo_trt.models.read_config import eagle3_config

        return eagle3_config(raw, where)

    def load(self, source: DraftSource) -> tuple[Role, tuple[int, ...]]:
        from echo_trt.models.roles import HeadModule
        from echo_trt.models.weights import load_eagle3

        head = load_eagle3(source.checkpoint, source.positions, source.target, source.dtype)
        if head.config.target_sha256 and head.config.target_sha256 != source.digest:
            raise UserError(
                f"{source.checkpoint.path}: target_sha256 says that this head is for other weights than the recipe's "
                "target; train one with scripts/training/train_eagle3.py, or use the target it belongs to."
            )
        layers = head.config.feature_layers or source.target.config.feature_layers
        return HeadModule(head, source.recipe.draft.top_k), layers


class MtpKind(HeadKind):
    name, features = "mtp", 1

    def config(self, raw: dict[str, Any], where: str, recipe: Recipe, target: DecoderConfig) -> Config:
        from echo_trt.models.hybrid_config import mtp_config

        return mtp_config(target, where)

    def load(self, source: DraftSource) -> tuple[Role, tuple[int, ...]]:
        from echo_trt.models.roles import MtpModule
        from echo_trt.models.weights import load_mtp

        head = load_mtp(source.checkpoint, source.positions, source.target, source.dtype)
        return MtpModule(head, source.recipe.draft.top_k), (source.target.config.num_layers,)


class ModelKind(DraftKind):
    name = "model"
    network = sourced = True

    def knows(self, raw: dict[str, Any]) -> bool:
        known = any(kind.knows(raw) for kind in (EAGLE3, BLOCK))
        return not known and str((raw.get("architectures") or [""])[0]).endswith("ForCausalLM")

    def config(self, raw: dict[str, Any], where: str, recipe: Recipe, target: DecoderConfig) -> Config:
        from echo_trt.models.read_config import decoder_config

        return decoder_config(raw, where)

    def load(self, source: DraftSource) -> tuple[Role, tuple[int, ...]]:
        from echo_trt.models.open_tokenizer import check_same_tokens, read_tokenizer
        from echo_trt.models.roles import DraftModule
        from echo_trt.models.weights import load_decoder

        checkpoint, named = source.checkpoint, source.recipe.draft.source
        where = str(checkpoint.path)
        folder = source.folder / named.tokenizer if named and named.tokenizer else None
        check_same_tokens(source.tokenizer, read_tokenizer(checkpoint, folder), where)
        decoder = load_decoder(checkpoint, source.positions, source.dtype)
        size, maximum = decoder.config.vocab_size, source.target.config.vocab_size
        if decoder.config.states.shapes:
            raise UserError(
                f"{where} has recurrent layers, which no draft model may have; use draft.kind mtp or lookup."
            )
        if size > maximum:  # its padding would be proposed as tokens that the target cannot read
            raise UserError(
                f"{where}: vocab_size is {size}, but the target's is {maximum}; use a draft with at most as many."
            )
        return DraftModule(decoder, source.recipe.draft.top_k), ()

    def drafter(self, manifest: Manifest, batch: InputBatch, engine: Engine, folder: Path) -> Drafter:
        from echo_trt.engine.drafters.eagle3 import EngineDrafter

        return EngineDrafter(engine, batch, manifest.recipe.limits.prefill_chunk)


class BlockKind(DraftKind):
    name, features = "block", 0
    network = sourced = block = True

    def knows(self, raw: dict[str, Any]) -> bool:
        from echo_trt.models.block_config import is_block

        return is_block(raw)

    def config(self, raw: dict[str, Any], where: str, recipe: Recipe, target: DecoderConfig) -> Config:
        from echo_trt.models.block_config import block_config, fitted

        return fitted(block_config(raw, where, recipe.draft.block), target, where)

    def check(self, checkpoint: Checkpoint, recipe: Recipe, target: DecoderConfig) -> None:
        """Refuse a block drafter of another target, or one whose rows have no room."""
        from echo_trt.backends.self_check import block_shape
        from echo_trt.models.block_weights import check_block

        config = check_block(checkpoint, target, recipe.draft.block)
        appended, reserve = block_shape(config).appended, reserve_for(recipe.decoding.model_dump())
        if appended >= reserve:
            raise UserError(
                f"{checkpoint.path}: a block of {config.block_size} rows takes {appended} KV rows of a request, and "
                f"{reserve} are kept ready; set decoding.per_request to {appended + 1} or more, or lower draft.block."
            )

    def load(self, source: DraftSource) -> tuple[Role, tuple[int, ...]]:
        import torch

        from echo_trt.models.block_weights import confidence_by_token, load_block
        from echo_trt.models.roles import BlockModule

        checkpoint, recipe = source.checkpoint, source.recipe
        dtype = source.dtype or torch.float32
        drafter = load_block(checkpoint, source.positions, source.target, dtype, recipe.draft.block)
        config: Any = drafter.config
        if config.confidence:
            np.save(source.work / CONFIDENCE, confidence_by_token(drafter, checkpoint))
        return BlockModule(drafter, recipe.draft.top_k), config.feature_layers

    def block_facts(self, config: Any) -> BlockFacts:
        from echo_trt.backends.self_check import block_shape

        shape = asdict(block_shape(config))
        return BlockFacts(**shape, predicts_next=config.predicts_next, confidence=config.confidence)

    def drafter(self, manifest: Manifest, batch: InputBatch, engine: Engine, folder: Path) -> Drafter:
        from echo_trt.engine.drafters.block import BlockDrafter, read_confidence

        facts: Any = manifest.draft
        chunk, confidence = manifest.recipe.limits.prefill_chunk, read_confidence(folder, manifest)
        return BlockDrafter(engine, batch, chunk, facts.feature_size, facts.block, confidence)


NONE, LOOKUP, MODEL = DraftKind(), LookupKind(), ModelKind()
EAGLE3, MTP, BLOCK = Eagle3Kind(), MtpKind(), BlockKind()


def draft_kind(name: str) -> DraftKind:
    """Return the record of a drafter. Raises UserError where it is not installed."""
    kind: DraftKind = extra(DRAFTS, name)
    return kind


def draft_kinds() -> list[DraftKind]:
    """Return the records of all installed drafters, by name."""
    return [draft_kind(name) for name in registered(DRAFTS)]
