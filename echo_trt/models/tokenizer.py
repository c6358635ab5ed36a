"""A bundle's tokenizer, and the marks of a thought."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from echo_trt.errors import UserError

#: Around a reasoning model's thought, as Qwen3 and DeepSeek write it.
REASONING = ("<think>", "</think>")
#: Special tokens that answers show, since calls of tools cannot be read without them: Mistral's.
SHOWN = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
#: Names under which a template reads special tokens.
ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


@dataclass
class BundleTokenizer:
    """A bundle's tokenizer. A text is neither cut nor padded.

    special_tokens_map  special tokens by their names in ``ROLES``
    chat_template       Jinja's source; "": there is none
    """

    backend_tokenizer: Tokenizer
    special_tokens_map: dict[str, str]
    chat_template: str = ""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return a text's token ids. ``add_special_tokens``: the tokenizer's own around it, too."""
        ids: list[int] = self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of tokens."""
        text: str = self.backend_tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)
        return text

    def get_vocab(self) -> dict[str, int]:
        """Return the ids of all tokens, by their names."""
        known: dict[str, int] = self.backend_tokenizer.get_vocab()
        return known

    def __len__(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size())


def added_tokens(tokenizer: BundleTokenizer) -> dict[str, int]:
    """Return the ids of tokens that were added to a vocabulary, by their names, in the order of ids."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return {added[token].content: token for token in sorted(added)}


def think_tokens(tokenizer: BundleTokenizer) -> tuple[int, int] | None:
    """Return the tokens that open and close a thought; None where the model does not think."""
    known = added_tokens(tokenizer)
    return (known[REASONING[0]], known[REASONING[1]]) if all(mark in known for mark in REASONING) else None


def load_tokenizer(folder: Path) -> BundleTokenizer:
    """Load a bundle's tokenizer, whose tokenizer.json is complete. Raises UserError.

    Its template is in a file of its own, or in tokenizer_config.json, as earlier versions of transformers wrote it.
    """
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        named = {role: config[role] for role in ROLES if config.get(role)}
        special = {role: token if isinstance(token, str) else str(token["content"]) for role, token in named.items()}
        template = folder / "chat_template.jinja"
        source = template.read_text("utf-8") if template.exists() else config.get("chat_template")
        backend = Tokenizer.from_str(_showing((folder / "tokenizer.json").read_text("utf-8")))
        backend.encode_special_tokens = bool(config.get("split_special_tokens"))
    except Exception as error:  # tokenizers raises no narrower one
        raise UserError(f"tokenizer in {folder} cannot be read ({' '.join(str(error).split())[:200]}).") from error
    backend.no_truncation()
    backend.no_padding()
    return BundleTokenizer(backend, special, source if isinstance(source, str) else "")


def _showing(stored: str) -> str:
    """Let answers show the tokens of SHOWN, which decoding would leave out; ``stored``: of a tokenizer.json."""
    if not any(json.dumps(name) in stored for name in SHOWN):
        return stored
    raw = json.loads(stored)
    for token in raw["added_tokens"]:
        token["special"] &= token["content"] not in SHOWN
    return json.dumps(raw)
