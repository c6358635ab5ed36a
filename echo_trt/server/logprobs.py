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
        "top_logprobs": [_by_token(entry) for entry in entries],
        "text_offset": [entry["text_offset"] for entry in entries],
    }


def _by_token(entry: Entry) -> dict[str, float] | None:
    if entry["logprob"] is None:  # a prompt's first token
        return None
    return {each["token"]: each["logprob"] for each in (*entry["top_logprobs"], entry)}
