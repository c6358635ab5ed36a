"""Reading of a checkpoint's tokenizer for a bundle, and the check that target and draft have the same tokens."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

from echo_trt.errors import UserError
from echo_trt.files.model_type import MODEL_TYPE
from echo_trt.models.checkpoint import Checkpoint
from echo_trt.models.gguf_checkpoint import GgufCheckpoint

#: Around a reasoning model's thought, as Qwen3 and DeepSeek write it.
THOUGHT = ("<think>", "</think>")


def thought_marks(tokenizer: PreTrainedTokenizerFast) -> tuple[int, int] | None:
    """The tokens that open and close a thought; None where the model does not think."""
    known = tokenizer.get_added_vocab()
    return (known[THOUGHT[0]], known[THOUGHT[1]]) if all(mark in known for mark in THOUGHT) else None


def read_tokenizer(checkpoint: Checkpoint, folder: Path | None = None) -> PreTrainedTokenizerFast:
    """Read the tokenizer of ``folder`` where one is named, else the checkpoint's."""
    if folder is None and isinstance(checkpoint, GgufCheckpoint):
        return checkpoint.tokenizer()
    place = folder or checkpoint.path
    if not (place / "tokenizer.json").exists():
        raise UserError(f"{place / 'tokenizer.json'} is missing; add it, or name its folder in the recipe's tokenizer.")
    return load_tokenizer(place)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load a checkpoint's or a bundle's tokenizer; a bundle's config.json says nothing of it."""
    config = PreTrainedConfig() if _is_bundles(folder / "config.json") else None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, config=config)
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer in {folder} cannot be read ({' '.join(str(error).split())[:200]}).") from error


def _is_bundles(config: Path) -> bool:
    try:
        return bool(json.loads(config.read_text(encoding="utf-8")).get("model_type") == MODEL_TYPE)
    except (OSError, ValueError, AttributeError):
        return False


def check_same_tokens(target: PreTrainedTokenizerFast, draft: PreTrainedTokenizerFast, where: str) -> None:
    """Refuse a draft whose token ids, which it proposes, mean other tokens than the target's."""
    wanted, actual = target.get_vocab(), draft.get_vocab()
    if wanted == actual:
        return
    example = next((t for t, i in sorted(wanted.items(), key=lambda item: item[1]) if actual.get(t) != i), None)
    detail = f"token {example!r} is {wanted[example]} there and {actual.get(example)} here" if example else ""
    raise UserError(
        f"{where}: tokenizer differs from the target's ({detail or 'it has more tokens'}); use a draft with the "
        "target's tokenizer."
    )
