"""Log-probabilities in the shapes of OpenAI's two endpoints, from the entries that the Triton model gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Entry = dict[str, Any]  # token, logprob, bytes, top_logprobs (a list of such), text_offset


def for_chat(entries: Sequence[Entry]) -> dict[str, Any]:
    content = [{key: value for key, value in entry.items() if key != "text_offset"} for entry in entries]
    return {"content": content, "refusal": None}


def for_completion(entries: Sequence[Entry]) -> dict[str, Any]:
    """Each token's dictionary of the best ones holds the token itself too, so there may be one more than asked for."""
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [{each["token"]: each["logprob"] for each in (*e["top_logprobs"], e)} for e in entries],
        "text_offset": [entry["text_offset"] for entry in entries],
    }
