"""Tools, calls and results as text, for chat templates that have no place for them: in Hermes' form."""

from __future__ import annotations

import json
from typing import Any

from echo_trt.models.messages import Messages, Tools

OPEN, CLOSE = MARKS = ("<tool_call>", "</tool_call>")
PROMPT = f"""You can call these functions:
<tools>
%s
</tools>
To call one, write
{OPEN}
{{"name": NAME, "arguments": OBJECT}}
{CLOSE}"""


def tools_as_text(messages: Messages, tools: Tools, in_system: bool = True) -> list[dict[str, Any]]:
    """Write tools, calls and results into the contents of a chat, which must not be empty.

    Tools are told of in the system prompt, or without ``in_system`` in the first turn. Results are turns of the user's,
    and those that follow each other are one turn, since templates may ask that user and assistant alternate.
    """
    turns: list[dict[str, Any]] = []
    is_result = False
    for message in messages:
        parts = [content] if (content := message["content"]) else []
        parts += [_call(call["function"]) for call in message.get("tool_calls") or ()]
        turn = {name: value for name, value in message.items() if name not in ("tool_calls", "tool_call_id")}
        turn["content"], was_result, is_result = "\n".join(parts), is_result, message["role"] == "tool"
        if is_result:
            turn = {"role": "user", "content": f"<tool_response>\n{turn['content']}\n</tool_response>"}
        if turn["role"] == "user" and turns and turns[-1]["role"] == "user" and (is_result or was_result):
            turns[-1]["content"] += "\n" + turn["content"]
        else:
            turns.append(turn)
    if tools:
        prompt = PROMPT % "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        if in_system and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": prompt})
        elif turns[0]["role"] == "system":
            turns[0]["content"] += "\n\n" + prompt
        else:
            turns[0]["content"] = prompt + "\n\n" + turns[0]["content"]
    return turns


def _call(function: Any) -> str:
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f'{OPEN}\n{{"name": {json.dumps(function["name"])}, "arguments": {text or "{}"}}}\n{CLOSE}'
