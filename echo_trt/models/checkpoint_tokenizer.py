"""Reading of a checkpoint's tokenizer for a bundle, and the check that target and draft have the same tokens."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from echo_trt.errors import UserError
from echo_trt.models.checkpoint import Checkpoint
from echo_trt.models.gguf_checkpoint import GgufCheckpoint
from echo_trt.models.tokenizer import load_tokenizer


def read_tokenizer(checkpoint: Checkpoint, folder: Path | None = None) -> PreTrainedTokenizerFast:
    """Read the tokenizer of ``folder`` where one is named, else the checkpoint's."""
    if folder is None and isinstance(checkpoint, GgufCheckpoint):
        return checkpoint.tokenizer()
    place = folder or checkpoint.path
    if not (place / "tokenizer.json").exists():
        raise UserError(f"{place / 'tokenizer.json'} is missing; add it, or name its folder in the recipe's tokenizer.")
    return load_tokenizer(place)


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
