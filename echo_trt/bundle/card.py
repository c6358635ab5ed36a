"""The files of a bundle from which NVIDIA Dynamo's frontend reads what the model is: its model deployment card.

The frontend tokenizes prompts, writes chats and reads answers by these files alone. Their checksums and paths are part
of the card, and a worker whose card differs from the others' is sent no request.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from echo_trt.errors import UserError

CONFIG = "config.json"
FILES = (CONFIG, "tokenizer.json", "tokenizer_config.json")
TEMPLATE = "chat_template.jinja"


def write_config(folder: Path, eos_token_ids: Sequence[int], context: int, vocab_size: int) -> None:
    """Write config.json, without which Dynamo has no card; nothing else reads it. context: tokens of a whole text."""
    config = {
        "architectures": ["EchoForCausalLM"],
        "eos_token_id": list(eos_token_ids),
        "max_position_embeddings": context,
        "model_type": "echo",
        "vocab_size": vocab_size,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def check_card(folder: Path) -> None:
    missing = next((name for name in FILES if not (folder / name).is_file()), None)
    if missing:
        raise UserError(f"bundle {folder} has no {missing}, which Dynamo's frontend reads; build the bundle again.")


def has_template(folder: Path) -> bool:
    """Return whether the frontend can write chats."""
    return (folder / TEMPLATE).is_file()
