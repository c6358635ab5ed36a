"""Loading of a checkpoint's tensors into a network: names, merged projections, shapes, one copy in memory."""

from __future__ import annotations

import gc
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from echo_trt.errors import UserError
from echo_trt.models.checkpoint import Checkpoint, HasBlocks
from echo_trt.models.config import DecoderConfig, Eagle3Config
from echo_trt.models.decoder import Decoder
from echo_trt.models.eagle3 import Eagle3Head
from echo_trt.models.families import FAMILIES
from echo_trt.models.families.family import NORMS
from echo_trt.models.fp8_checkpoint import Fp8Checkpoint
from echo_trt.models.fp8_linear import E4M3, Fp8Linear, takes
from echo_trt.models.hybrid_config import OTHERS, HybridConfig, RecurrentConfig, ShortConvConfig, mtp_config
from echo_trt.models.layers import Config, Embedding, Linear, ReadBlocks, RMSNorm, Rotary
from echo_trt.models.lfm2 import ShortConvDecoder, short_conv_sources
from echo_trt.models.mtp import MtpHead
from echo_trt.models.qwen3_5 import HybridDecoder, delta_net_sources
from echo_trt.models.ranks import Shard
from echo_trt.models.read_config import check_fits, decoder_config, eagle3_config, rank_config

#: our parameter -> the checkpoint's tensors, stacked along axis 0; a list of such lists where experts are stacked too.
Sources = dict[str, list[str]]
WHOLE = Shard()
QK = ("query", "key")
#: The type of a recipe's precision, but for the matrices in FP8.
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
NARROW = {torch.bfloat16, torch.float16}  # types whose every number float32 has, too

#: Tensors that a network may go without: copies of others, tables that are computed, and the inverse of d2t.
IGNORED = r"^(lm_head\.weight|t2d|d2t|draft_id_to_target_id)$|\.rotary_emb\.inv_freq$"


def load_decoder(
    checkpoint: Checkpoint,
    positions: int,
    dtype: torch.dtype | None = torch.float32,
    shard: Shard = WHOLE,
    in_blocks: bool = False,
) -> Decoder:
    """Load a target or a standalone draft, or the bytes of one rank's ``shard``.

    positions  the rotary table's length
    dtype      of the weights; None: float32, with matrices in their stored type where it is narrower; E4M3: as None,
               and a layer's matrices that are stored in FP8 stay FP8, with the scales that are stored
    in_blocks  whether matrices of blocks of few bits stay in the checkpoint, to be read by ``Decoder.stored``
    """
    whole = decoder_config(checkpoint.config, str(checkpoint.path))
    config = rank_config(whole, shard.ranks)
    with torch.device("meta"):
        # A rank's output matrix is a parameter apart, also where it is a part of the embedding.
        network = decoder_class(config)
        model, undivided = network(config, positions), network(replace(whole, tie_embeddings=False), positions)
    sources = decoder_sources(config, set(checkpoint.names()))
    if whole.tie_embeddings and not config.tie_embeddings:
        sources["lm_head.weight"] = sources["embed.weight"]
    others = [name for name in checkpoint.names() if isinstance(config, HybridConfig) and name.startswith(OTHERS)]
    _assign(model, checkpoint, sources, dtype, undivided, shard, others, in_blocks)
    _complete_norms(model)
    model.rotary = Rotary(config, positions)
    if shard.ranks == 1:
        model.stored = _readers(checkpoint, sources)
    return model.eval()


def _readers(checkpoint: Checkpoint, sources: dict[str, Any]) -> dict[str, ReadBlocks]:
    """Return what reads matrices that are stored in blocks, by their names."""
    if not isinstance(checkpoint, HasBlocks):
        return {}
    flat = {name: _flat(parts) for name, parts in sources.items()}
    return {name: _reader(checkpoint, parts) for name, parts in flat.items() if checkpoint.in_blocks(parts[0])}


def _flat(parts: list) -> list[str]:
    """Return the names of all parts, of experts one after the other."""
    return [name for part in parts for name in (part if isinstance(part, list) else [part])]


def _reader(checkpoint: HasBlocks, names: list[str]) -> ReadBlocks:
    return lambda part: checkpoint.stored(names[part])


def decoder_class(config: DecoderConfig) -> type[Decoder]:
    kinds = {HybridConfig: HybridDecoder, ShortConvConfig: ShortConvDecoder}
    return kinds.get(type(config), Decoder)


@torch.no_grad()
def _complete_norms(model: Decoder | MtpHead) -> None:
    """Give norms what their weights are stored without, and the factors on queries and on logits."""
    model.norm.weight *= model.config.logit_scale
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm) and model.config.norm_offset:
            module.weight += model.config.norm_offset
        if name.endswith("attention.query_norm") and model.config.query_scale != 1:
            module.weight *= model.config.query_scale


def load_eagle3(
    checkpoint: Checkpoint, positions: int, target: Decoder, dtype: torch.dtype | None = torch.float32
) -> Eagle3Head:
    """Load the head for ``target``, in EAGLE's or vLLM's spelling, with its embeddings or the target's.

    positions, dtype  as of ``load_decoder``
    """
    where = str(checkpoint.path)
    config = eagle3_config(checkpoint.config, where)
    check_fits(config, target.config, where)
    names = {head_tensor_name(name): name for name in checkpoint.names()}
    with torch.device("meta"):
        model = Eagle3Head(config, positions, Embedding(config.vocab_size, config.hidden_size))
    sources = eagle3_sources(config, names)
    if "embed_tokens.weight" not in names:
        del sources["embed.weight"]
        if config.hidden_size != target.config.hidden_size:
            raise UserError(
                f"{where}: tensor embed_tokens.weight is missing and hidden_size {config.hidden_size} is not the "
                f"target's {target.config.hidden_size}; use a head with its own embeddings."
            )
        model.embed.weight = target.embed.weight
        model.stored = {name: read for name, read in target.stored.items() if name == "embed.weight"}
    model.stored = {**model.stored, **_readers(checkpoint, sources)}
    _assign(model, checkpoint, sources, dtype)
    model.rotary = Rotary(config, positions)
    model.target_ids = _target_ids(config, checkpoint, names)
    return model.eval()


def load_mtp(
    checkpoint: Checkpoint, positions: int, target: Decoder, dtype: torch.dtype | None = torch.float32
) -> MtpHead:
    """Load the MTP head in the checkpoint of ``target``, whose embedding and output matrix it shares.

    positions, dtype  as of ``load_decoder``
    """
    names = set(checkpoint.names())
    config = mtp_config(target.config if "mtp.fc.weight" in names else None, str(checkpoint.path))
    with torch.device("meta"):
        model = MtpHead(config, positions)
    _assign(model, checkpoint, mtp_sources(), dtype, read_apart=[name for name in names if not name.startswith("mtp.")])
    _complete_norms(model)
    model.embed.weight = target.embed.weight
    if model.lm_head is not None:
        model.lm_head.weight = target.lm_head.weight
    shared = {name: read for name, read in target.stored.items() if name in ("embed.weight", "lm_head.weight")}
    model.stored = shared | _readers(checkpoint, mtp_sources())
    model.rotary = Rotary(config, positions)
    return model.eval()


def release_weights(network: nn.Module) -> None:
    """Take ``network``'s parameters out of memory and keep their shapes; other networks keep what they share."""
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))
    gc.collect()  # an export leaves circles behind


def _target_ids(config: Eagle3Config, checkpoint: Checkpoint, names: dict[str, str]) -> Tensor:
    draft_ids = torch.arange(config.draft_vocab_size)
    if "d2t" in names:
        offsets = checkpoint.get(names["d2t"])
        if offsets.shape != draft_ids.shape:
            raise _shape_error(checkpoint, names["d2t"], offsets.shape, draft_ids.shape)
        draft_ids = draft_ids + offsets
    elif config.draft_vocab_size != config.vocab_size:
        raise UserError(
            f"{checkpoint.path}: tensor d2t is missing, but draft_vocab_size {config.draft_vocab_size} is not "
            f"vocab_size {config.vocab_size}; download the head again."
        )
    wrong = draft_ids[(draft_ids < 0) | (draft_ids >= config.vocab_size)]
    if len(wrong):
        raise UserError(
            f"{checkpoint.path}: tensor d2t points to token {wrong[0]}, outside the vocabulary of {config.vocab_size}; "
            "use a head trained for this target."
        )
    return draft_ids


def head_tensor_name(name: str, layer: str = "midlayer.") -> str:
    """Turn vLLM's spelling of a head's tensor into EAGLE's; ``layer``: its name of the first layer, "" for none."""
    name = name.removeprefix("model.").replace("layers.0.", layer or "layers.0.", 1)
    return {"draft_id_to_target_id": "d2t"}.get(name, name)


def decoder_sources(config: DecoderConfig, present: set[str]) -> dict[str, Any]:
    root = "model.language_model." if any(name.startswith("model.language_model.") for name in present) else "model."
    sources: dict[str, Any] = {"embed.weight": [root + "embed_tokens.weight"], "norm.weight": [root + "norm.weight"]}
    recurrent = config.recurrent_layers if isinstance(config, RecurrentConfig) else ()
    own = delta_net_sources if isinstance(config, HybridConfig) else short_conv_sources
    if not config.tie_embeddings:
        sources["lm_head.weight"] = ["lm_head.weight"]
    for i in range(config.num_layers):
        theirs, ours = f"{root}layers.{i}.", f"layers.{i}."
        norms = FAMILIES[config.family].norms
        if i in recurrent:
            sources |= _norm_sources(ours, theirs, norms) | own(ours, theirs)
        else:
            sources |= _layer_sources(ours, theirs, config.qk_norm, norms)
        if config.attention_bias:
            sources[ours + "attention.qkv.bias"] = [f"{theirs}self_attn.{p}_proj.bias" for p in "qkv"]
        if config.has_experts(i):
            sources[ours + "mlp.router.weight"] = [theirs + "mlp.gate.weight"]
            if f"{theirs}mlp.experts.gate_up_proj" in present:
                sources |= {f"{ours}mlp.{p}": [f"{theirs}mlp.experts.{p}_proj"] for p in ("gate_up", "down")}
            else:
                experts = [f"{theirs}mlp.experts.{e}." for e in range(config.num_experts)]
                sources[ours + "mlp.gate_up"] = [[e + "gate_proj.weight", e + "up_proj.weight"] for e in experts]
                sources[ours + "mlp.down"] = [[e + "down_proj.weight"] for e in experts]
        else:
            sources |= _mlp_sources(ours, theirs)
    for usual, theirs in FAMILIES[config.family].renamed.items():
        sources = {ours: [each.replace(usual, theirs) for each in parts] for ours, parts in sources.items()}
    return sources


def _norm_sources(ours: str, theirs: str, norms: Mapping[str, str]) -> Sources:
    return {f"{ours}{norm}.weight": [f"{theirs}{name}.weight"] for norm, name in norms.items()}


def _layer_sources(ours: str, theirs: str, qk_norm: bool, norms: Mapping[str, str] = NORMS) -> Sources:
    return {
        **_norm_sources(ours, theirs, norms),
        **_attention_sources(ours, theirs),
        **{f"{ours}attention.{n}_norm.weight": [f"{theirs}self_attn.{n[0]}_norm.weight"] for n in QK[: 2 * qk_norm]},
    }


def mtp_sources() -> Sources:
    norms = {"embed_norm": "pre_fc_norm_embedding", "hidden_norm": "pre_fc_norm_hidden", "norm": "norm", "fc": "fc"}
    shared = {f"{ours}.weight": [f"mtp.{theirs}.weight"] for ours, theirs in norms.items()}
    return shared | _layer_sources("layer.", "mtp.layers.0.", qk_norm=True) | _mlp_sources("layer.", "mtp.layers.0.")


def eagle3_sources(config: Eagle3Config, names: dict[str, str]) -> dict[str, Any]:
    layer = "midlayer."
    sources = {
        "embed.weight": ["embed_tokens.weight"],
        "fc.weight": ["fc.weight"],
        "embed_norm.weight": [layer + "input_layernorm.weight"],
        "hidden_norm.weight": [layer + "hidden_norm.weight"],
        "mlp_norm.weight": [layer + "post_attention_layernorm.weight"],
        "norm.weight": ["norm.weight"],
        "lm_head.weight": ["lm_head.weight"],
        **_attention_sources("", layer),
        **_mlp_sources("", layer),
    }
    if config.fc_norm:
        sources |= {f"fc_norms.{i}.weight": [f"fc_norm.{i}.weight"] for i in range(3)}
    return {ours: [names.get(theirs, theirs) for theirs in parts] for ours, parts in sources.items()}


def _attention_sources(ours: str, theirs: str) -> Sources:
    return {
        ours + "attention.qkv.weight": [f"{theirs}self_attn.{p}_proj.weight" for p in "qkv"],
        ours + "attention.out.weight": [f"{theirs}self_attn.o_proj.weight"],
    }


def _mlp_sources(ours: str, theirs: str) -> Sources:
    return {
        ours + "mlp.gate_up.weight": [f"{theirs}mlp.{p}_proj.weight" for p in ("gate", "up")],
        ours + "mlp.down.weight": [f"{theirs}mlp.down_proj.weight"],
    }


def _assign(
    model: nn.Module,
    checkpoint: Checkpoint,
    sources: dict[str, Any],
    dtype: torch.dtype | None,
    whole: nn.Module | None = None,
    shard: Shard = WHOLE,
    read_apart: Collection[str] = (),
    in_blocks: bool = False,
) -> None:
    """Fill the model's meta parameters, which are allocated once and filled part by part.

    whole       the undivided network, whose shapes the checkpoint must have; None: the model
    shard       the part that is read
    read_apart  tensors of the checkpoint that others read
    in_blocks   whether matrices of blocks stay where they are
    """
    filling = _Filling(checkpoint, set(checkpoint.names()), model, whole or model, shard)
    read, in_rows = set(read_apart), dtype == E4M3
    for ours, parts in sources.items():
        module_path, _, leaf = ours.rpartition(".")
        module = model.get_submodule(module_path)
        shape = getattr(module, leaf).shape
        if in_rows and isinstance(module, Linear) and ours != "lm_head.weight" and takes(shape):
            found = filling.in_fp8(shape, filling.whole.get_parameter(ours).shape, parts)
            if found is not None:
                model.set_submodule(module_path, Fp8Linear(*found, module.bias))
                read.update(parts)
                continue
        if in_blocks and len(shape) > 1 and filling.blocks(_flat(parts)):
            read.update(_flat(parts))
            continue
        value = torch.empty(shape, dtype=_stored_type(filling, shape, parts) if in_rows or dtype is None else dtype)
        stored = filling.whole.get_parameter(ours).shape
        if isinstance(parts[0], list):
            slots = [(slot, stored[1:], names) for slot, names in zip(value, parts, strict=True)]
        else:
            slots = [(value, stored, parts)]
        for slot, shape, names in slots:
            filling.fill(slot, shape, names)
            read.update(names)
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))
    # A bias, a norm or a quantisation scale that is not read would make a different network without a word.
    for name in sorted(filling.present - read):
        if not re.search(IGNORED, name):
            raise UserError(
                f"{checkpoint.path}: tensor {name} belongs to no part of this network; use a checkpoint without it."
            )


@dataclass(frozen=True)
class _Filling:
    checkpoint: Checkpoint
    present: set[str]
    model: nn.Module
    whole: nn.Module
    shard: Shard

    def fill(self, slot: Tensor, shape: torch.Size, names: list[str]) -> None:
        """Stack the named tensors, of ``shape`` together, or the shard's parts of them, into ``slot``."""
        for name, part, height in self._parts(slot, shape, names):
            if self.shard.ranks > 1 and name.endswith("experts.gate_up_proj"):  # gate over up, divided one by one
                for half, begin in zip(part.chunk(2, dim=1), (0, shape[1] // 2), strict=True):
                    rows = self.shard.slice_of(shape[1] // 2, half.shape[1])
                    rows = slice(begin + rows.start, begin + rows.stop)
                    half.copy_(self.checkpoint.get(name, (slice(None), rows, slice(None))))
            else:
                part.copy_(self.checkpoint.get(name, self._slices((height, *shape[1:]), part.shape)))

    def in_fp8(self, shape: torch.Size, stored: torch.Size, names: list[str]) -> tuple[Tensor, Tensor] | None:
        """Return a matrix e4m3 of ``shape``, stacked as by ``fill``, and its scales as ``Fp8Linear`` has them.

        Returns None where a part is not stored in FP8, or ends within a block.
        """
        checkpoint, weight, scales = self.checkpoint, torch.empty(shape, dtype=E4M3), list[Tensor]()
        for name, part, height in self._parts(weight, stored, names):
            if not isinstance(checkpoint, Fp8Checkpoint) or not checkpoint.has_fp8(name):
                return None
            found = checkpoint.in_fp8(name, self._slices((height, *stored[1:]), part.shape))
            if found is None:
                return None
            part.copy_(found[0])
            scales.append(found[1])
        return weight, torch.cat(scales)

    def blocks(self, names: list[str]) -> bool:
        """Return whether a matrix of these parts stays in the file: the first is in blocks, small ones need not be."""
        return isinstance(self.checkpoint, HasBlocks) and self.checkpoint.in_blocks(names[0])

    def _parts(self, slot: Tensor, shape: torch.Size, names: list[str]) -> Iterator[tuple[str, Tensor, int]]:
        """Yield the named tensors, which are checked, their parts of ``slot`` and their stored heights."""
        filled, stored = ([size // len(names)] * len(names) for size in (len(slot), shape[0]))
        if len(names) > 2:  # a merged qkv, or a delta net's projection
            filled, stored = (heights(network.config, len(names)) for network in (self.model, self.whole))
        for name, part, height in zip(names, slot.split(filled), stored, strict=True):
            self._check(name, (height, *shape[1:]))
            yield name, part, height

    def _slices(self, stored: tuple[int, ...], own: torch.Size) -> tuple[slice, ...]:
        """Return the shard's slices of a tensor of size ``stored``; () for the whole one."""
        return () if self.shard.ranks == 1 else tuple(map(self.shard.slice_of, stored, own))

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        checkpoint = self.checkpoint
        if name not in self.present:
            raise UserError(f"{checkpoint.path}: tensor {name} is missing; use a complete checkpoint of this network.")
        if checkpoint.shape(name) != shape:
            raise _shape_error(checkpoint, name, checkpoint.shape(name), shape)


def _stored_type(filling: _Filling, shape: torch.Size, parts: list) -> torch.dtype:
    """Return the narrow type that all parts of a matrix are stored in, or float32.

    Vectors are float32: they are small, and the norm's type is the one that a network computes in.
    """
    names = _flat(parts)
    if len(shape) == 1 or not filling.present.issuperset(names):
        return torch.float32
    types = {filling.checkpoint.dtype(name) for name in names}
    return types.pop() if len(types) == 1 and types <= NARROW else torch.float32


def heights(config: Config, parts: int = 3) -> list[int]:
    """Return the rows of the ``parts`` that a merged projection is made of."""
    if parts > 3:
        return config.linear_projected
    queries = config.num_heads * (2 if config.gated else 1)  # gated: a gate beside each
    return [heads * config.head_dim for heads in (queries, config.num_kv_heads, config.num_kv_heads)]


def _shape_error(checkpoint: Checkpoint, name: str, got: Any, expected: Any) -> UserError:
    return UserError(
        f"{checkpoint.path}: tensor {name} has shape {list(got)}, but the configuration asks for {list(expected)}; "
        "take weights and config.json of the same model."
    )
