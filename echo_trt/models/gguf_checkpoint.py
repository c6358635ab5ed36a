"""GGUF files: dequantised weights under Hugging Face names, the configuration and the tokenizer."""

from __future__ import annotations

import mmap
import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from echo_trt.errors import UserError
from echo_trt.files.inputs import gguf_parts
from echo_trt.models.checkpoint import Part
from echo_trt.models.families import gguf_family
from echo_trt.models.read_config import decoder_config
from echo_trt.models.sentencepiece import sentencepiece_tokenizer
from echo_trt.models.split_checkpoint import halved, parts_of
from echo_trt.models.weights import decoder_sources, mtp_sources

#: Tensor by which each inverse rotary frequency is divided; Llama 3.1 and later have one, Phi-4-mini one for texts up
#: to its original length, and another one for longer ones.
ROPE_DIVISORS, SHORT_DIVISORS, LONG_DIVISORS = (
    f"rope_{kind}.weight" for kind in ("freqs", "factors_short", "factors_long")
)
NORMAL_TOKEN, CONTROL_TOKEN, USER_TOKEN = 1, 3, 4
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: Of Qwen3.5: marks belong to their letters.
MARKED_WORDS = QWEN_WORDS.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"[^\s\p{L}", r"[^\s\p{L}\p{M}")
#: llama.cpp's names of splitters by Llama 3's pattern; SmolLM3's files have the second, Granite 4.0's the third.
LLAMA_WORDS = dict.fromkeys(("llama-bpe", "smaug-bpe", "dbrx", "lfm2"), QWEN_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|"))
#: llama.cpp's splitter gpt-4o, of Phi-4-mini: cases of letters part words.
CASED_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SMOLLM_WORDS = "smollm", "refact"  # Granite 3's files have the second
#: Of an MTP head, which is the block behind the last layer: Hugging Face's name -> what the file's begins with there.
NEXTN = {"fc": "eh_proj", "pre_fc_norm_embedding": "enorm", "pre_fc_norm_hidden": "hnorm", "norm": "shared_head_norm"}
IMAGES = "v.", "mm."  # what tensors for images begin with, which a text does not need
#: Our sampling parameters -> names behind general.sampling in files that recommend some.
SAMPLING = {"temperature": "temp", "repetition_penalty": "penalty_repeat"} | {k: k for k in ("top_k", "top_p", "min_p")}
ELSEWHERE = "name a folder with the model's tokenizer.json in the recipe's tokenizer."


class _Reader(gguf.GGUFReader):
    """Reads arrays, such as a vocabulary, whole: element by element they take ten seconds."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        if raw_type != gguf.GGUFValueType.ARRAY or self.byte_order == "S":
            return super()._get_field_parts(orig_offs, raw_type)
        kind = gguf.GGUFValueType(self._get(orig_offs, np.uint32)[0])
        count = int(self._get(orig_offs + 4, np.uint64)[0])
        begin, types = orig_offs + 12, [gguf.GGUFValueType.ARRAY, kind]
        if kind in self.gguf_scalar_to_np:
            values = self._get(begin, self.gguf_scalar_to_np[kind], count)
            return 12 + values.nbytes, [values], [0], types
        if kind != gguf.GGUFValueType.STRING:
            return super()._get_field_parts(orig_offs, raw_type)
        file, at, strings = memoryview(self.data), begin, []  # type: ignore[arg-type]  # an array is a buffer
        for _ in range(count):
            end = at + 8 + int.from_bytes(file[at : at + 8], "little")
            if end > len(file) or at + 8 > len(file):
                raise ValueError("it ends within an array")
            strings.append(file[at + 8 : end])
            at = end
        return at - orig_offs, strings, list(range(count)), types


class GgufCheckpoint:
    """A .gguf file of an architecture that a family names, with the other parts of a model in several files."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._reader, *others = self._readers = [*map(_Reader, gguf_parts(path))]
        except (ValueError, OSError, LookupError) as error:
            raise UserError(
                f"checkpoint file {path} is not a complete GGUF file ({error}); download it again."
            ) from error
        self._stored = list(chain(self._reader.tensors, *(each.tensors for each in others)))
        self.config = self._config()
        names = self._names()
        beside = (ROPE_DIVISORS, SHORT_DIVISORS, LONG_DIVISORS)
        weights = [each for each in self._stored if each.name not in beside and not each.name.startswith(IMAGES)]
        if unknown := [tensor.name for tensor in weights if tensor.name not in names]:
            raise UserError(
                f"{path}: tensor {unknown[0]} belongs to no part of a {self._family.gguf} network; use a file without "
                "it."
            )
        stored = {tensor.name: tensor for tensor in weights}
        self._tensors = {
            name: (stored[theirs], part) for theirs, parts in names.items() if theirs in stored for name, part in parts
        }

    def names(self) -> Sequence[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        stored, part = self._tensors[name]
        shape = tuple(int(size) for size in reversed(stored.shape))
        if isinstance(part, slice):
            return (part.stop - part.start, *shape[1:])
        return tuple(self._values(name, torch.empty(shape[0 if part is None else 1 :], device="meta")).shape)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def get(self, name: str, part: Part = ()) -> torch.Tensor:
        stored, which = self._tensors[name]
        try:
            chosen = stored.data if which is None else stored.data[which]
            data = torch.from_numpy(dequantize(chosen, stored.tensor_type).copy())
        except NotImplementedError:
            kind = stored.tensor_type.name
            raise UserError(f"{self.path}: tensor {stored.name} is {kind}, which cannot be read; use Q8_0.") from None
        return self._with_halves(name, self._values(name, data))[part]

    def _values(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the network from the file's values."""
        made = next((make for end, make in self._family.gguf_values.items() if name.endswith(end)), None)
        return stored if made is None else made(stored)

    def in_blocks(self, name: str) -> bool:
        return gguf.GGML_QUANT_SIZES[self._tensors[name][0].tensor_type][0] > 1

    def stored(self, name: str) -> tuple[str, torch.Tensor]:
        tensor, which = self._tensors[name]
        chosen = tensor.data if which is None else tensor.data[which]
        data = torch.from_numpy(np.array(chosen)).view(torch.uint8)
        if hasattr(mmap, "MADV_DONTNEED"):  # pages that were read stay in memory with their map
            for reader in self._readers:
                reader.data._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]
        return tensor.tensor_type.name.lower(), self._with_halves(name, data)

    def _with_halves(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Put the two halves of each head's rotary dimensions apart, which llama.cpp interleaves."""
        if self._family.interleaved and (heads := self._permuted_heads(name)):
            return rows.view(heads, -1, 2, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)
        return halved(self._family, self.config, self.config["head_dim"], name, rows)

    def field(self, key: str, default: Any = None) -> Any:
        entry = self._reader.get_field(key)
        return default if entry is None else entry.contents()

    def _need(self, key: str) -> Any:
        value = self.field(key)
        if value is None:
            raise UserError(f"{self.path}: {key} is missing; use a complete GGUF file of a language model.")
        return value

    def _permuted_heads(self, name: str) -> int:
        if name.endswith("q_proj.weight"):
            return self.config["num_attention_heads"]
        return self.config["num_key_value_heads"] if name.endswith("k_proj.weight") else 0

    def _config(self) -> dict[str, Any]:
        self._family = gguf_family(self.field("general.architecture"), str(self.path))
        kind = self._family.gguf
        heads = self._need(f"{kind}.attention.head_count")
        hidden = self._need(f"{kind}.embedding_length")
        kv_heads = self.field(f"{kind}.attention.head_count_kv", heads)  # or a list, of each layer
        scaling = {
            "rope_type": self.field(f"{kind}.rope.scaling.type", "none"),
            "factor": self.field(f"{kind}.rope.scaling.factor"),
            "original_max_position_embeddings": self.field(f"{kind}.rope.scaling.original_context_length"),
        }
        names = {tensor.name for tensor in self._stored}
        if divisors := [each.data.tolist() for each in self._stored if each.name == ROPE_DIVISORS]:
            scaling = {"rope_type": "divisors", "divisors": divisors[0]}
        if short := [each.data.tolist() for each in self._stored if each.name == SHORT_DIVISORS]:
            original = scaling["original_max_position_embeddings"]
            scaling = {
                "rope_type": "longrope",
                "short_factor": short[0],
                "original_max_position_embeddings": original,
                "attention_factor": self.field(f"{kind}.rope.scaling.attn_factor"),
            }
        config = {
            "_name_or_path": self.field("general.name", ""),
            "architectures": [self._family.architecture],
            "vocab_size": len(self._need("tokenizer.ggml.tokens")),
            "hidden_size": hidden,
            "intermediate_size": self._need(f"{kind}.feed_forward_length"),
            "num_hidden_layers": self._need(f"{kind}.block_count") - self.field(f"{kind}.nextn_predict_layers", 0),
            "num_attention_heads": heads,
            "num_key_value_heads": max(kv_heads) if isinstance(kv_heads, list) else kv_heads,
            "head_dim": self.field(f"{kind}.attention.key_length", hidden // heads),
            "rms_norm_eps": self._need(f"{kind}.attention.layer_norm_rms_epsilon"),
            "rope_theta": self.field(f"{kind}.rope.freq_base", 10000.0),
            "rope_scaling": None if scaling["rope_type"] == "none" else scaling,
            "max_position_embeddings": self._need(f"{kind}.context_length"),
            "tie_word_embeddings": "output.weight" not in names,
            "eos_token_id": self.field("tokenizer.ggml.eos_token_id"),
            "generation_config": self._recommended(),
        }
        return config | self._family.gguf_options(self.field, config)

    def _recommended(self) -> dict[str, float]:
        stated = {name: self.field(f"general.sampling.{key}") for name, key in SAMPLING.items()}
        known = {name: round(value, 6) for name, value in stated.items() if value is not None}  # of float32
        return known | ({"top_k": 0} if known.get("top_k", 0) < 0 else {})

    def _names(self) -> dict[str, list[tuple[str, int | slice | None]]]:
        """Return what each tensor holds of a network of this configuration, by the file's name.

        That is one tensor by Hugging Face's name, or one for each expert, with its index along axis 0, or parts of a
        merged matrix, with their rows.
        """
        network, family = decoder_config(self.config, str(self.path)), self._family
        kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.gguf)
        known = gguf.get_tensor_name_map(kind, network.num_layers + 1)
        parts = chain.from_iterable(decoder_sources(network, set()).values())
        names = chain.from_iterable([part] if isinstance(part, str) else part for part in parts)
        found = dict[str, list[tuple[str, int | slice | None]]]()
        rows = {tensor.name: int(tensor.shape[-1]) for tensor in self._stored}
        for merged in [f"model.layers.{i}.{each}.weight" for i in range(network.num_layers) for each in family.merged]:
            theirs = known.get_name(merged, (".weight",))
            found[theirs] = list(parts_of(family, network, merged, rows.get(theirs, 0)))
        split = {name for parts in found.values() for name, _ in parts}
        for name in names:
            if name in split:
                continue
            expert = re.search(r"\.experts\.(\d+)\.", name)
            together = name if expert is None else name.replace(expert[0], ".experts.")
            theirs = known.get_name(together.replace(".dt_bias", ".dt_proj.bias"), (".weight", ".bias"))
            found.setdefault(theirs, []).append((name, None if expert is None else int(expert[1])))
        if self.config.get("mtp_num_hidden_layers"):
            last = network.num_layers
            for name in chain.from_iterable(mtp_sources().values()):
                layer = name.replace("mtp.layers.0.", f"model.layers.{last}.")
                own = f"blk.{last}.nextn.{NEXTN.get(name.split('.')[1])}.weight"
                found[own if layer == name else known.get_name(layer, (".weight",))] = [(name, None)]
        return found

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Build the file's tokenizer, byte-level BPE or SentencePiece's, with its chat template."""
        tokens, kinds = self._need("tokenizer.ggml.tokens"), self._need("tokenizer.ggml.token_type")
        words, model = self.field("tokenizer.ggml.pre", "default"), self.field("tokenizer.ggml.model")
        vocab, is_llama = {t: i for i, t in enumerate(tokens)}, words in ("llama-bpe", "lfm2") or model == "llama"
        if model == "llama":
            joined = [piece for piece, kind in zip(tokens, kinds, strict=True) if kind == NORMAL_TOKEN]
            prefix = self.field("tokenizer.ggml.add_space_prefix", True)
            unknown = tokens[self.field("tokenizer.ggml.unknown_token_id", 0)]
            tokenizer = sentencepiece_tokenizer(vocab, joined, self._need("tokenizer.ggml.scores"), unknown, prefix)
        elif model == "gpt2":
            merges = [tuple(m.split(" ", 1)) for m in self._need("tokenizer.ggml.merges")]
            tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=is_llama))
            self._set_word_splitter(tokenizer, words)
            tokenizer.decoder = decoders.ByteLevel()
        else:
            raise UserError(f"{self.path}: tokenizer.ggml.model is {model!r}, not gpt2 or llama; {ELSEWHERE}")
        whole = {CONTROL_TOKEN, USER_TOKEN}  # both stay whole in a text; control tokens are not printed
        marked = [(token, kind == CONTROL_TOKEN) for token, kind in zip(tokens, kinds, strict=True) if kind in whole]
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token, special in marked])
        special = {
            f"{role}_token": tokens[index]
            for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
            if (index := self.field(f"tokenizer.ggml.{key}_token_id")) is not None
        }
        if "bos_token" in special and self.field("tokenizer.ggml.add_bos_token", is_llama):
            bos = special["bos_token"]
            tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", None, [(bos, vocab[bos])])
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            chat_template=self.field("tokenizer.chat_template"),
            clean_up_tokenization_spaces=False,
            **special,
        )

    def _set_word_splitter(self, tokenizer: Tokenizer, kind: str) -> None:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind in SMOLLM_WORDS)
        if kind in SMOLLM_WORDS:
            first = pre_tokenizers.Digits(individual_digits=True)
        elif kind in ("qwen2", "qwen35"):
            first = pre_tokenizers.Split(Regex(QWEN_WORDS if kind == "qwen2" else MARKED_WORDS), "isolated")
            tokenizer.normalizer = normalizers.NFC()
        elif kind in LLAMA_WORDS:
            first = pre_tokenizers.Split(Regex(LLAMA_WORDS[kind]), "isolated")
        elif kind == "gpt-4o":
            first = pre_tokenizers.Split(Regex(CASED_WORDS), "isolated")
        else:
            known = ", ".join((*SMOLLM_WORDS, "qwen2", "qwen35", "gpt-4o", *LLAMA_WORDS))
            raise UserError(f"{self.path}: tokenizer.ggml.pre is {kind!r}, not one of {known}; {ELSEWHERE}")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, byte_level])
