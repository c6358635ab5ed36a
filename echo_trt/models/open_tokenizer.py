"""The tokenizer and the chat template that go with a checkpoint."""

from __future__ import annotations

from pathlib import Path

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from echo_trt.errors import UserError
from echo_trt.models.chat_template import compiled
from echo_trt.models.checkpoint import Checkpoint


def read_tokenizer(checkpoint: Checkpoint, folder: Path | None = None) -> PreTrainedTokenizerFast:
    """Read the tokenizer of ``folder`` where one is named, else the checkpoint's."""
    if folder is None and (own := getattr(checkpoint, "tokenizer", None)):  # GGUF's
        return own()
    index = folder or checkpoint.path
    if not (index / "tokenizer.json").exists():
        raise UserError(f"{index / 'tokenizer.json'} is missing; add it, or name its folder in the recipe's tokenizer.")
    return checkpoint_tokenizer(index)


def checkpoint_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load a checkpoint's tokenizer; AutoTokenizer knows which class it takes. Raises UserError."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer in {folder} cannot be read ({' '.join(str(error).split())[:200]}).") from error


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


def read_template(path: Path) -> str:
    """Read a chat template (Jinja), and refuse one that does not compile."""
    try:
        source = path.read_text(encoding="utf-8")
        compiled(source)
    except (OSError, UnicodeDecodeError, TemplateError) as error:
        reason = " ".join(str(error).split()).split(". ")[0][:200].rstrip(".")
        raise UserError(
            f"chat_template {path} cannot be used ({reason}); give a file with a Jinja template."
        ) from error
    return source
