"""The items of an answer, thought, message and calls, and the events that tell of them as they grow."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from echo_trt.server.answers import Entry, chat_logprobs
from echo_trt.server.turns import Delta

Event = dict[str, Any]
PREFIXES = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_"}
#: Of items with a text: its part's type, which is also in the names of its events.
PARTS = {"message": "output_text", "reasoning": "reasoning_text"}


class Output:
    """Takes deltas of a chat. ``items`` are complete once ``end`` has been read to its end."""

    def __init__(self, namespaces: Mapping[str, tuple[str, str]] | None = None) -> None:
        """``namespaces``: name of a function in the chat -> its namespace, and its name there."""
        self._namespaces = namespaces or {}
        self.items: list[dict[str, Any]] = []
        self._texts: list[str] = []  # of the open item
        self._logprobs: list[Entry] = []
        self._open = False

    def take(self, delta: Delta, logprobs: Sequence[Entry] = ()) -> Iterator[Event]:
        """``logprobs`` are of the delta's content."""
        if text := delta.get("reasoning"):
            yield from self._text("reasoning", text, ())
        if text := delta.get("content"):
            yield from self._text("message", text, chat_logprobs(logprobs)["content"])
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                namespace, name = self._namespaces.get(call["function"]["name"], (None, call["function"]["name"]))
                within = {"namespace": namespace} if namespace is not None else {}
                more = {"call_id": call["id"], **within, "name": name, "arguments": ""}
                yield from self._begin("function_call", more)
            if arguments := call["function"]["arguments"]:
                self._texts.append(arguments)
                yield self._event("function_call_arguments.delta", delta=arguments)

    def end(self, status: str) -> Iterator[Event]:
        """``status`` is that of the last item, for it may have been cut short."""
        if not self.items:
            yield from self._begin("message", {"role": "assistant", "content": []})
        yield from self._close(status)

    def _text(self, kind: str, text: str, logprobs: Sequence[Entry]) -> Iterator[Event]:
        if not self._open or self.items[-1]["type"] != kind:
            own: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
            yield from self._begin(kind, {**own, "content": []})
        self._texts.append(text)
        self._logprobs += logprobs
        more = {"logprobs": list(logprobs)} if kind == "message" else {}
        yield self._event(f"{PARTS[kind]}.delta", content_index=0, delta=text, **more)

    def _begin(self, kind: str, more: dict[str, Any]) -> Iterator[Event]:
        yield from self._close("completed")
        item = {"id": PREFIXES[kind] + secrets.token_hex(16), "type": kind, "status": "in_progress", **more}
        self.items.append(item)
        self._texts, self._logprobs, self._open = [], [], True
        yield {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": item}
        if kind in PARTS:
            yield self._event("content_part.added", content_index=0, part=self._part(kind, "", []))

    def _close(self, status: str) -> Iterator[Event]:
        if not self._open:
            return
        item, text = self.items[-1], "".join(self._texts)
        kind = item["type"]
        if kind in PARTS:
            part = self._part(kind, text, self._logprobs)
            more = {"logprobs": self._logprobs} if kind == "message" else {}
            yield self._event(f"{PARTS[kind]}.done", content_index=0, text=text, **more)
            yield self._event("content_part.done", content_index=0, part=part)
            item = {**item, "content": [part]}
        else:
            item = {**item, "arguments": text}
            yield self._event("function_call_arguments.done", name=item["name"], arguments=text)
        self.items[-1] = item = {**item, "status": status}
        self._open = False
        yield {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": item}

    def _event(self, kind: str, **more: Any) -> Event:
        item = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        return {"type": f"response.{kind}", **item, **more}

    def _part(self, kind: str, text: str, logprobs: list[Entry]) -> dict[str, Any]:
        own: dict[str, Any] = {"annotations": [], "logprobs": logprobs} if kind == "message" else {}
        return {"type": PARTS[kind], "text": text, **own}
