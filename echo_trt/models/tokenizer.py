"""Tokenizers of bundles and checkpoints, and the marks of a thought."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from echo_trt.errors import UserError
from echo_trt.files.model_type import MODEL_TYPE

#: Around a reasoning model's thought, as Qwen3 and DeepSeek write it.
REASONING = ("<think>", "</think>")
#: Special tokens that answers show, since calls of tools cannot be read without them: Mistral's.
SHOWN = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")


def think_tokens(tokenizer: PreTrainedTokenizerFast) -> tuple[int, int] | None:
    """Return the tokens that open and close a thought; None where the model does not think."""
    known = tokenizer.get_added_vocab()
    return (known[REASONING[0]], known[REASONING[1]]) if all(mark in known for mark in REASONING) else None


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load a checkpoint's or a bundle's tokenizer.

    A bundle's tokenizer.json is complete. Which class a checkpoint's takes is known to AutoTokenizer.
    """
    try:
        if _is_bundles(folder / "config.json"):
            return _showing(PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True))
        from transformers import AutoTokenizer

        return _showing(AutoTokenizer.from_pretrained(folder, local_files_only=True))
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer in {folder} cannot be read ({' '.join(str(error).split())[:200]}).") from error


def _showing(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Let answers show the tokens of SHOWN, which decoding would leave out."""
    if any(token.special and token.content in SHOWN for token in tokenizer.added_tokens_decoder.values()):
        raw = json.loads(tokenizer.backend_tokenizer.to_str())
        for token in raw["added_tokens"]:
            token["special"] &= token["content"] not in SHOWN
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(raw))
    return tokenizer


def _is_bundles(config: Path) -> bool:
    try:
        return bool(json.loads(config.read_text(encoding="utf-8")).get("model_type") == MODEL_TYPE)
    except (OSError, ValueError, AttributeError):
        return False
